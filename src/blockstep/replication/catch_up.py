"""The job that brings a standby up to its primary, and switches the link on in the moment in which both are the same.

A mirror whose end costs the guest no time on the network. A mirror of the usual kind copies the last that is dirty
while the guest waits; over a slow link that is seconds. Here, in the last section, what is dirty is only *read*, from
the primary's own disk, and put at the head of the link's queue: the standby gets it there before anything that the
guest writes from then on. It is little, because passes in the background go before.

Nor do the guest's writes go to the standby during the copy, as long as passes make what is dirty less. Only when the
guest writes faster than the link carries, its writes are sent to both ends, and it is held down to the link's speed.

A full sync compares before it copies (`blockstep.replication.comparison`). Where nearly everything differs digests are
work for nothing: then more and more is copied without a look, up to sixteen parts of seventeen.

Nothing is durable on the standby when the job ends; the first checkpoint after it sees to that.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Final

from blockstep.aio.endings import wait_out
from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.jobs.mirror import MirrorJob
from blockstep.jobs.states import JobKind, OnError
from blockstep.replication import comparison
from blockstep.replication.comparison import Content
from blockstep.replication.link import Link
from blockstep.units import MiB

#: Bytes that may be left to the link's queue, and how many passes are made to get there.
_REST: Final = MiB
_PASSES: Final = 4
#: Bytes that are copied without a look, at the most, before some are compared again.
_UNSEEN: Final = 16 * comparison.WINDOW

#: What the target holds of a range (offset, length), with a key for the digests. None: it cannot say.
Ask = Callable[[int, int, bytes], Coroutine[Any, Any, Content | None]]


class CatchUp(MirrorJob):
    """From ``source``, below the ``link``, to ``target``: what ``bitmap`` says, or all that is not the same there.

    ``ask`` is the way to hear of what is there; without it everything is copied.
    """

    kind: ClassVar[JobKind] = "mirror"

    def __init__(self, id: str, graph: Graph, source: Driver, target: Driver, link: Link,
                 bitmap: DirtyBitmap | None, ask: Ask | None = None) -> None:
        super().__init__(id, graph, source, target, sync="bitmap" if bitmap else "full", bitmap=bitmap,
                         copy_mode="background", auto_complete=True)
        self.link = link
        self._ask = ask
        self._rest: list[tuple[int, bytes]] = []

    async def fill(self) -> None:
        await super().fill()
        if self._ask and self.bitmap is None:
            await self._compare(self._ask, secrets.token_bytes(comparison.SIZE))

    async def _compare(self, ask: Ask, key: bytes) -> None:
        """Take out of `dirty` what the target holds already. It is asked for the next part while one is compared."""
        size, at, unseen = self.source.length, 0, 0
        asking = asyncio.ensure_future(ask(at, size, key))
        try:
            while (theirs := await asking) is not None:
                offset, length = at, theirs.told(size - at)
                at = min(offset + length + unseen, size)
                if at < size:
                    asking = asyncio.ensure_future(ask(at, size - at, key))
                await self.pause_point()
                differing = await self._leave_out(offset, length, theirs, key)
                many = differing * 8 > len(theirs.digests) // comparison.SIZE * 7
                unseen = min(unseen * 2 or comparison.WINDOW, _UNSEEN) if many else 0
                if at == size:
                    break
        finally:
            asking.cancel()
            await wait_out(asking)
            _ = asking.cancelled() or asking.exception()  # whatever it is, another one is raised, or nobody waits

    async def _leave_out(self, offset: int, length: int, theirs: Content, key: bytes) -> int:
        """Leave out what is the same of a range. Returns how many clusters differ, of those that have digests."""
        source, start, end = self._backends[0], offset + theirs.zeroes, offset + length
        try:
            for at in range(offset, start, comparison.STATUS):
                count = min(comparison.STATUS, start - at)
                await self._look(at, count, comparison.data(source, at, count))
                await self.pause_point()
                await asyncio.sleep(0)  # where nobody waits for a device: let the others have their turn
            return await self._look(start, end - start, self._differing(start, end, theirs.digests, key))
        except OSError as error:
            raise self._said("of this side", error) from error

    async def _look(self, offset: int, length: int, differing: Coroutine[Any, Any, list[tuple[int, int]]]) -> int:
        """Leave out a range but for the parts that are ``differing``. Returns how many those are.

        As in a copy, the bits are reset before the content is looked at, and the range is in flight meanwhile.
        """
        assert self.engine is not None
        before = self.dirty.count()
        self.dirty.reset(offset, length)
        looked_at = before - self.dirty.count()
        self.engine.in_flight += looked_at
        try:
            parts = await differing
        finally:
            self.engine.in_flight -= looked_at
        left = self.dirty.count()
        for part in parts:
            self.dirty.set(*part)
        self.copied(looked_at - (self.dirty.count() - left))
        return len(parts)

    async def _differing(self, start: int, end: int, theirs: bytes, key: bytes) -> list[tuple[int, int]]:
        ours = await comparison.digests(self._backends[0], start, end - start, key)
        return [(start + cluster * comparison.CLUSTER, 1) for cluster in comparison.differing(ours, theirs)]

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
