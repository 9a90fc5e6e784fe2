"""A disk for tests of what stands above a disk: its content is a bytearray that the test can see.

    ram = await graph.open({"driver": "test-ram", "node-name": "disk", "size": 4096})
    ram.content, ram.requests

Faults and suspensions come from `blkdebug` over it, as they do for any other driver.
"""

from __future__ import annotations

from typing import Any, ClassVar

from blockstep.block.driver import Buffer, Driver, Prepared
from blockstep.block.graph import Graph
from blockstep.block.node import NodeOptions, NodeRef
from blockstep.block.permissions import Role
from blockstep.block.registry import register
from blockstep.drivers.blkdebug import Blkdebug


class RamOptions(NodeOptions, tag="test-ram"):
    """``backing`` makes it an overlay in name only: nothing of the backing node shows through."""

    size: int = 1 << 16
    backing: NodeRef | None = None


@register
class Ram(Driver):
    """See the module."""

    driver: ClassVar[str] = "test-ram"
    Options = RamOptions
    options: RamOptions
    child_roles: ClassVar[dict[str, Role]] = {"backing": Role.BACKING}

    async def open(self) -> None:
        self.length = self.options.size
        self.content = bytearray(self.length)
        #: (what, offset, length) of all that came, in order
        self.requests: list[tuple[str, int, int]] = []
        self.closed = False

    async def close(self) -> None:
        self.closed = True

    async def pread(self, offset: int, length: int) -> Buffer:
        self.requests.append(("read", offset, length))
        return bytes(self.content[offset:offset + length])

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        self.requests.append(("write", offset, len(data)))
        self.content[offset:offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.requests.append(("zero", offset, length))
        self.content[offset:offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        self.requests.append(("discard", offset, length))

    async def flush(self) -> None:
        self.requests.append(("flush", 0, 0))

    async def truncate(self, length: int) -> None:
        self.requests.append(("truncate", length, 0))
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))
        self.length = length

    async def prepare_empty(self) -> Prepared:
        def commit() -> None:
            self.content[:] = bytes(self.length)

        return Prepared(commit)


async def ram(graph: Graph, name: str, content: bytes | int = 1 << 16, **options: Any) -> Ram:
    """A new disk with ``content``, or of so many zero bytes."""
    size = content if isinstance(content, int) else len(content)
    node = await graph.open({"driver": "test-ram", "node-name": name, "size": size, **options})
    assert isinstance(node, Ram)
    if not isinstance(content, int):
        node.content[:] = content
    return node


async def faulty(graph: Graph, name: str, content: bytes | int = 1 << 16) -> tuple[Blkdebug, Ram]:
    """A blkdebug named ``name`` over a new disk ``name``-disk."""
    disk = await ram(graph, f"{name}-disk", content)
    node = await graph.open({"driver": "blkdebug", "node-name": name, "file": disk.name})
    assert isinstance(node, Blkdebug)
    return node, disk
