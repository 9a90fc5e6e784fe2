"""Storage whose requests take effect, end or fail when the test says so.

    gates = Gates()
    disk = gated_disk(graph, gates, "secondary", bytes(65536))
    gates.close()                       # from now on each request stops twice: before its effect, and after it
    gates.waiting                       # those that have stopped, in order
    gates.release(0)                    # one goes on, at once, up to its next stop
    gates.fail("secondary", "write")    # the next write there fails

Two stops are what it takes to show every race: a read that has its data and has not returned, a write that has
reached the disk and is not acknowledged.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from blockstep.aio.copying import zero_runs
from blockstep.aio.inline import Completion
from blockstep.block.driver import Buffer, Driver, Extent, Prepared
from blockstep.block.graph import Graph
from blockstep.block.node import NodeOptions


@dataclass(eq=False)
class Stop:
    """A request that waits at a gate."""

    node: str
    event: str
    offset: int
    length: int
    _go: Completion[None]


class Gates:
    """Stops requests, and fails them."""

    def __init__(self) -> None:
        self.waiting: list[Stop] = []
        self.closed: set[str] | None = set()
        #: All requests that came by, as (node, event).
        self.seen: list[tuple[str, str]] = []
        self._faults: list[tuple[str, str, int, bool]] = []

    # --- what the test does ---

    def close(self, *nodes: str) -> None:
        """Stop the requests of these nodes (none given: of all) from now on."""
        self.closed = set(nodes) if nodes else None

    def open(self) -> None:
        """Stop nobody any more, and let all go on."""
        self.closed = set()
        while self.waiting:
            self.release(0)

    def release(self, index: int = 0) -> Stop:
        """Let one of those that wait go on."""
        stop = self.waiting.pop(index % len(self.waiting))
        stop._go.set_result(None)
        return stop

    def release_all(self) -> None:
        """Let all go on that wait now, and those that stop meanwhile."""
        while self.waiting:
            self.release(0)

    def fail(self, node: str, event: str, code: int = errno.EIO, always: bool = False) -> None:
        """Fail the next request of that kind (``always``: all of them); events end with ``-done`` after the effect."""
        self._faults.append((node, event, code, always))

    def heal(self) -> None:
        """Forget all faults that have not been met."""
        self._faults.clear()

    # --- what storage does ---

    async def passes(self, node: str, event: str, offset: int, length: int) -> None:
        """A request comes by."""
        self.seen.append((node, event))
        if self.closed is None or node in self.closed:
            stop = Stop(node, event, offset, length, Completion())
            self.waiting.append(stop)
            await stop._go
        for fault in self._faults:
            if fault[:2] == (node, event):
                if not fault[3]:
                    self._faults.remove(fault)
                raise OSError(fault[2], f"{os.strerror(fault[2])}: injected into {event} of '{node}'")


class GatedImage(Driver):
    """Gates before a driver that stands behind this class; the event of emptying is ``make_empty``."""

    gates: Gates
    #: Changes that stop a second time, after their effect.
    stops_twice: frozenset[str] = frozenset({"write"})

    async def pread(self, offset: int, length: int) -> Buffer:
        await self.gates.passes(self.name, "read", offset, length)
        data = await super().pread(offset, length)
        await self.gates.passes(self.name, "read-done", offset, length)
        return data

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self.gates.passes(self.name, "write", offset, len(data))
        await super().pwrite(offset, data, flags)
        await self._done("write", offset, len(data))

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.gates.passes(self.name, "write_zeroes", offset, length)
        await super().write_zeroes(offset, length, flags)
        await self._done("write_zeroes", offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self.gates.passes(self.name, "discard", offset, length)
        await super().discard(offset, length)
        await self._done("discard", offset, length)

    async def flush(self) -> None:
        await self.gates.passes(self.name, "flush", 0, 0)
        await super().flush()
        await self._done("flush", 0, 0)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self.gates.passes(self.name, "block_status", offset, length)
        return await super().block_status(offset, length)

    async def truncate(self, length: int) -> None:
        await self.gates.passes(self.name, "truncate", length, 0)
        await super().truncate(length)
        await self.gates.passes(self.name, "truncate-done", length, 0)

    async def prepare_empty(self) -> Prepared:
        await self.gates.passes(self.name, "make_empty", 0, 0)
        return await super().prepare_empty()

    async def _done(self, event: str, offset: int, length: int) -> None:
        if event in self.stops_twice:
            await self.gates.passes(self.name, f"{event}-done", offset, length)


class GatedDisk(Driver):
    """Bytes behind gates."""

    driver = "gated-disk"
    data: bytearray
    gates: Gates
    #: Of each change, in order.
    flags: list[int]

    async def open(self) -> None:
        self.length = len(self.data)

    async def pread(self, offset: int, length: int) -> Buffer:
        await self.gates.passes(self.name, "read", offset, length)
        data = bytes(self.data[offset:offset + length])
        await self.gates.passes(self.name, "read-done", offset, length)
        return data

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        self.flags.append(flags)
        await self._change("write", offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.flags.append(flags)
        await self._change("write_zeroes", offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self._change("discard", offset, bytes(length))

    async def flush(self) -> None:
        await self.gates.passes(self.name, "flush", 0, 0)
        await self.gates.passes(self.name, "flush-done", 0, 0)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self.gates.passes(self.name, "block_status", offset, length)
        extents = [Extent(count, data=not zero, zero=zero)
                   for count, zero in zero_runs(self.data[offset:offset + length], 512)]
        await self.gates.passes(self.name, "block_status-done", offset, length)
        return extents

    async def truncate(self, length: int) -> None:
        await self.gates.passes(self.name, "truncate", length, 0)
        del self.data[length:]
        self.data.extend(bytes(length - len(self.data)))
        self.length = length
        await self.gates.passes(self.name, "truncate-done", length, 0)

    async def _change(self, event: str, offset: int, data: Buffer) -> None:
        await self.gates.passes(self.name, event, offset, len(data))
        self.data[offset:offset + len(data)] = data
        await self.gates.passes(self.name, event + "-done", offset, len(data))


def gated_disk(graph: Graph, gates: Gates, name: str, data: bytes) -> GatedDisk:
    """A node of ``graph`` that holds ``data``."""
    disk = GatedDisk(name, NodeOptions(node_name=name))
    disk.gates, disk.data, disk.length, disk.flags = gates, bytearray(data), len(data), []
    disk.on_event = graph.report
    disk.owned = True
    graph.nodes[name] = disk
    return disk
