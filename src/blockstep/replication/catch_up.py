"""The job that brings a standby up to its primary, and switches the link on in the moment in which both are the same.

A mirror whose end costs the guest no time on the network. A mirror of the usual kind copies the last that is dirty
while the guest waits; over a slow link that is seconds. Here, in the last section, what is dirty is only *read*, from
the primary's own disk, and put at the head of the link's queue: the standby gets it there before anything that the
guest writes from then on. It is little, because passes in the background go before.

Nor do the guest's writes go to the standby during the copy, as long as passes make what is dirty less. Only when the
guest writes faster than the link carries, its writes are sent to both ends, and it is held down to the link's speed.

Nothing is durable on the standby when the job ends; the first checkpoint after it sees to that.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, ClassVar, Final

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.jobs.mirror import MirrorJob
from blockstep.jobs.states import JobKind, OnError
from blockstep.replication.link import Link
from blockstep.units import MiB

#: Bytes that may be left to the link's queue, and how many passes are made to get there.
_REST: Final = MiB
_PASSES: Final = 4


class CatchUp(MirrorJob):
    """From ``source``, below the ``link``, to ``target``: all of it, or what ``bitmap`` says."""

    kind: ClassVar[JobKind] = "mirror"

    def __init__(self, id: str, graph: Graph, source: Driver, target: Driver, link: Link,
                 bitmap: DirtyBitmap | None) -> None:
        super().__init__(id, graph, source, target, sync="bitmap" if bitmap else "full", bitmap=bitmap,
                         copy_mode="background", auto_complete=True)
        self.link = link
        self._rest: list[tuple[int, bytes]] = []

    async def prepare(self) -> None:
        await self._converge()
        for _ in range(_PASSES):
            if self.dirty.count() <= _REST:
                break
            await self._copy_dirty()
        async with AsyncExitStack() as drained:
            await drained.enter_async_context(self.graph.drained(self.source))
            position = 0
            while (run := self.dirty.next_dirty(position, MiB)) is not None:
                offset, length = run
                try:
                    self._rest.append((offset, bytes(await self.source.pread(offset, length))))
                except OSError as error:
                    raise self._said("of this side", error) from error
                position = offset + length
            await self.pause_point()
            self._drained = drained.pop_all()

    async def met_error(self, operation: str, error: OSError, policy: OnError) -> None:
        where = "on the standby" if operation == "write" else "of this side"
        await super().met_error(operation, self._said(where, error), policy)

    def _said(self, where: str, error: OSError) -> OSError:
        return OSError(error.errno, f"disk '{self.link.name}' {where}: {error.strerror or error}")

    def synced(self) -> None:
        super().synced()
        self.link.switch_on(self._rest)
        self._rest = []

    def block_info(self) -> dict[str, Any]:
        return {**super().block_info(), "actively-synced": self.link.on}
