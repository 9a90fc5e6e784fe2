"""Driver ``null``: a disk of any size that reads as zeroes and forgets what is written.

Useful to measure what lies above it, and as a place for tests. Nothing is ever durable, and nothing fails.
``null-co`` and ``null-aio`` are QEMU's names of it, with QEMU's options.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from blockstep.block.driver import ZEROES, Buffer, Driver, Extent
from blockstep.block.node import NodeOptions
from blockstep.block.registry import register
from blockstep.errors import OptionError


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
        if self.options.size < 0:
            raise OptionError("size", self.options.size, "0 or more bytes")
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


class NullCoOptions(NullOptions, tag="null-co"):
    """``latency-ns``: how long each request takes. ``read-zeroes``: of no effect, reads always give zeroes."""

    latency_ns: int = 0
    read_zeroes: bool = False


class NullAioOptions(NullCoOptions, tag="null-aio"):
    """As ``null-co``."""


@register
class NullCo(Null):
    """`Null`, as slow as one likes."""

    driver: ClassVar[str] = "null-co"
    Options = NullCoOptions
    options: NullCoOptions

    async def open(self) -> None:
        if self.options.latency_ns < 0:
            raise OptionError("latency-ns", self.options.latency_ns, "0 or more nanoseconds")
        await super().open()

    async def pread(self, offset: int, length: int) -> Buffer:
        await self._take_time()
        return await super().pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self._take_time()

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._take_time()

    async def flush(self) -> None:
        await self._take_time()

    async def _take_time(self) -> None:
        if self.options.latency_ns:
            await asyncio.sleep(self.options.latency_ns / 1e9)


@register
class NullAio(NullCo):
    """As `NullCo`."""

    driver: ClassVar[str] = "null-aio"
    Options = NullAioOptions
