"""Driver ``null``: a disk of any size that reads as zeroes and forgets what is written.

Useful to measure what lies above it, and as a place for tests. Nothing is ever durable, and nothing fails.
"""

from __future__ import annotations

from typing import ClassVar

from blockstep.block.driver import ZEROES, Buffer, Driver, Extent
from blockstep.block.node import NodeOptions
from blockstep.block.registry import register


class NullOptions(NodeOptions, tag="null"):
    """``size``: the length in bytes."""

    size: int = 1 << 30


@register
class Null(Driver):
    """See the module."""

    driver: ClassVar[str] = "null"
    Options = NullOptions
    options: NullOptions

    async def open(self) -> None:
        self.length = self.options.size

    async def pread(self, offset: int, length: int) -> Buffer:
        return ZEROES[:length] if length <= len(ZEROES) else bytes(length)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        pass

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        pass

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, data=False, zero=True)]

    async def truncate(self, length: int) -> None:
        self.length = length
