"""qcow2 images behind gates, for a rig whose disks all are images.

The file of an image lies in memory, where each request ends at once, so that a request of the disk stops at its gates
and nowhere else; or in a directory.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from blockstep.aio.inline import start
from blockstep.aio.posix import punch_hole
from blockstep.block.driver import FUA, Buffer, Driver
from blockstep.block.graph import Graph
from blockstep.block.node import CacheOptions, NodeOptions
from blockstep.block.permissions import Role
from blockstep.block.registry import register
from blockstep.drivers.qcow2.create import new_header, write_image
from blockstep.drivers.qcow2.driver import Qcow2, Qcow2Options
from tests.scenario.gates import GatedImage, Gates


class SparseOptions(NodeOptions, tag="test-sparse"):
    size: int


@register
class Sparse(Driver):
    """Bytes in memory, with holes, and no request ever waits. What is in it can be seen after its end."""

    driver: ClassVar[str] = "test-sparse"
    Options = SparseOptions
    options: SparseOptions

    async def open(self) -> None:
        self.fd = os.memfd_create(self.name)
        self._close = weakref.finalize(self, os.close, self.fd)  # many tests leave their disks behind
        os.ftruncate(self.fd, self.options.size)
        self.length = self.options.size

    async def close(self) -> None:
        self._content = os.pread(self.fd, self.length, 0)
        self._close()

    def content(self) -> bytes:
        return self._content

    async def pread(self, offset: int, length: int) -> Buffer:
        return os.pread(self.fd, length, offset)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        os.pwrite(self.fd, data, offset)

    async def discard(self, offset: int, length: int) -> None:
        pass

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        punch_hole(self.fd, offset, length)

    async def flush(self) -> None:
        pass

    async def truncate(self, length: int) -> None:
        os.ftruncate(self.fd, length)
        self.length = length


class GatedQcow2(GatedImage, Qcow2):
    """A qcow2 image behind gates. What the driver asks of itself passes none."""

    #: Of each change, in order.
    flags: list[int]

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        self.flags.append(flags)
        await self.gates.passes(self.name, "write", offset, len(data))
        await Qcow2.pwrite(self, offset, data, flags & ~FUA)
        await self._flush_if(flags)
        await self._done("write", offset, len(data))

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.flags.append(flags)
        await self.gates.passes(self.name, "write_zeroes", offset, length)
        await Qcow2.write_zeroes(self, offset, length, flags & ~FUA)
        await self._flush_if(flags)
        await self._done("write_zeroes", offset, length)

    async def truncate(self, length: int) -> None:
        await self.gates.passes(self.name, "truncate", length, 0)
        gates, self.gates = self.gates, Gates()
        try:
            await Qcow2.truncate(self, length)
        finally:
            self.gates = gates
        await self.gates.passes(self.name, "truncate-done", length, 0)

    async def _flush_if(self, flags: int) -> None:
        if flags & FUA:
            await Qcow2.flush(self)

    @property
    def data(self) -> bytes:
        """What the disk reads as. Only of one whose file lies in memory."""
        ended: list[Any] = []
        start(Qcow2.pread(self, 0, self.length), lambda value, error: ended.append(error or value))
        [content] = ended
        return bytes(content)


@cache
def image_of_length(length: int, cluster_size: int) -> bytes:
    """A new image that holds nothing."""
    fd = os.memfd_create("image")
    try:
        write_image(fd, new_header(length, cluster_size=cluster_size), "off")
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


async def gated_qcow2(
    graph: Graph, gates: Gates, name: str, backing: str | None, length: int, cluster_size: int,
    directory: Path | None = None, *, owned: bool = True
) -> tuple[GatedQcow2, Callable[[], bytes]]:
    """A new image as a node of ``graph``, as `Graph.open` makes one; and what tells the bytes of its file."""
    image = image_of_length(length, cluster_size)
    if directory is None:
        file = await graph.open({"driver": "test-sparse", "node-name": f"{name}-file", "size": len(image)}, owned=False)
        assert isinstance(file, Sparse)
        os.pwrite(file.fd, image, 0)
        content = file.content
    else:
        path = directory / f"{name}.qcow2"
        path.write_bytes(image)
        content = path.read_bytes
        file = await graph.open({"driver": "file", "node-name": f"{name}-file", "filename": str(path),
                                 "cache": {"no-flush": True}}, owned=False)
    node = GatedQcow2(name, Qcow2Options(node_name=name, file=file.name, backing=backing,
                                         cache=CacheOptions(no_flush=True)))
    node.gates, node.on_event, node.owned, node.flags = gates, graph.report, owned, []
    if backing is None:  # a secondary disk, as `GatedDisk` is one
        node.stops_twice = frozenset({"write", "write_zeroes", "discard", "flush"})
    graph.nodes[name] = node
    with graph.change() as change:
        change.attach(node, "file", Role.STORAGE, file)
        if backing is not None:
            change.attach(node, "backing", Role.BACKING, graph.find(backing))
    await node.open()
    return node, content
