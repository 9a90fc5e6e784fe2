"""How a standby's life with its primary ends: by a promotion, or by a stop.

Both revoke the primary's way in first, are all of one piece as long as nothing has been done to a disk, and are never
taken back from then on: a disk that is promoted may be in use, and no primary may write to it again. Until then all may
be as before, so a primary that asks meanwhile is put off and not sent away: one that is told of a promotion never comes
back. What a failure leaves undone, the same command does when it is repeated: it goes on with the disks that are not
promoted, or not merged, and leaves the others alone.

A promotion is written down, durably, before anything of it happens: see `blockstep.daemon.promotion`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Literal

from blockstep.aio.pool import in_thread
from blockstep.block.graph import Graph
from blockstep.daemon import promotion
from blockstep.daemon.standby_setup import close_buffers
from blockstep.daemon.standby_status import Situation
from blockstep.drivers.replication import Stage
from blockstep.errors import BlockstepError, ReplicationError, noting
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.schema import Event
from blockstep.replication.registry import ReplicationRegistry


class Ends:
    """The verbs. ``revoke`` shuts the primary out; ``emit`` sends an event; ``tell`` sends the state if it is new.

    ``unfollow`` forgets, durably, that the disks follow a primary: before a merge writes to them.
    """

    def __init__(self, situation: Situation, graph: Graph, registry: ReplicationRegistry,
                 revoke: Callable[[], Awaitable[None]], unfollow: Callable[[], Awaitable[None]],
                 emit: Callable[[Event], None], tell: Callable[[], None]) -> None:
        self._now, self._graph, self._registry = situation, graph, registry
        self._revoke, self._unfollow, self._emit, self._tell = revoke, unfollow, emit, tell
        self._pair = situation.config.pair
        self._note = situation.config.state
        # One at a time.
        self._turn = asyncio.Lock()
        self._merging: asyncio.Task[None] | None = None

    # --- promotion ---

    async def fail_over(self, to: Literal["checkpoint", "latest"]) -> None:
        """Promote all disks that are not. Raises ReplicationError, or OSError of the note."""
        now = self._now
        async with self._turn:
            if now.promoted_to and to != now.promoted_to:
                raise ReplicationError(self._pair, "failover", f"it has been promoted with --to {now.promoted_to}; "
                                       "that cannot be changed any more")
            if now.promoted_to and not now.unfinished:
                return
            if not now.promoted_to:
                self._must_run("failover")
                if to == "latest":
                    self._must_be_whole("failover")
            now.ending = "failover"
            try:
                await (self._go_on() if now.promoted_to else self._promote(to))
            finally:
                now.ending = ""
                self._tell()

    async def _promote(self, to: Literal["checkpoint", "latest"]) -> None:
        now = self._now
        try:
            await self._write_down(to, [] if to == "latest" else list(now.disks))
            await self._unfollow()
            await self._revoke()
            with self._saying_which():
                try:
                    await self._registry.stop_all(failover=to == "checkpoint")
                finally:  # where a part of it is promoted no primary may write to that
                    now.promoted_to = "" if now.untouched else to
        except BaseException as error:
            if not now.promoted_to:
                with noting(error):
                    promotion.take_back(self._note)
            raise
        finally:
            if now.promoted_to:
                self._begun()

    async def _go_on(self) -> None:
        try:
            with self._saying_which():
                await self._finish()
        finally:
            self._begun()

    @contextlib.contextmanager
    def _saying_which(self) -> Iterator[None]:
        """Of several disks the error says for each how it is, once they are not all the same."""
        try:
            yield
        except ReplicationError as error:
            if self._now.untouched:
                raise
            raise ReplicationError(self._pair, "failover", self._now.what_is_left()) from error

    def _begun(self) -> None:
        self._announce("begun")
        if not self._merging or self._merging.done():
            self._merging = asyncio.get_running_loop().create_task(self._see_merged())

    async def _see_merged(self) -> None:
        await self._merged()
        self._tell()
        await self._close_buffers()
        await self._write_down_what_is_left()
        left = self._now.what_is_left()
        self._announce("failed" if left else "done", left)
        self._tell()

    async def _write_down(self, to: str, unmerged: list[str]) -> None:
        await in_thread(promotion.write, self._note, self._pair, self._now.epoch, to, unmerged)

    async def _write_down_what_is_left(self) -> None:
        now = self._now
        with contextlib.suppress(OSError):  # then the note stays as it is, and says of too many that they are torn
            await self._write_down(now.promoted_to,
                                   [] if now.keeps_latest else [disk.spec.name for disk in now.unfinished])

    def _announce(self, stage: Literal["begun", "done", "failed"], reason: str = "") -> None:
        self._emit(qmp.ReplicationFailover(pair=self._pair, stage=stage, to=self._now.promoted_to,
                                           epoch=self._now.epoch, reason=reason))

    # --- stop ---

    async def stop(self) -> None:
        """The views become what the primary wrote last. Raises ReplicationError, or OSError of a note."""
        now = self._now
        async with self._turn:
            try:
                if now.stopped:
                    await self._finish()
                    await self._close_buffers()
                    return
                self._must_run("stop")
                self._must_be_whole("stop")
                now.ending = "stop"
                try:
                    await self._unfollow()
                    await self._revoke()
                    await self._registry.stop_all(failover=False)
                finally:
                    now.ending, now.stopped = "", not now.untouched
                await self._close_buffers()
            finally:
                self._tell()

    # --- both ---

    async def close(self) -> list[Exception]:
        """The program ends: put the disks to the checkpoint if nothing else was decided, else go on with what was.

        Returns what could not be put right: an error for each disk, and that of a note which may be wrong now.
        """
        async with self._turn:  # what is being done is decided when it has ended
            return await self._close()

    async def _close(self) -> list[Exception]:
        now = self._now
        errors: list[Exception] = []
        buffers = [buffer for disk in now.disks.values() if (buffer := disk.buffer)]
        with contextlib.suppress(BlockstepError):  # each disk is asked below
            if now.running and not now.declines():
                try:
                    await self._unfollow()
                except OSError as error:
                    errors.append(error)
                await self._registry.stop_all(failover=True)
            else:
                await self._merged()
                await self._finish()
        for buffer in buffers:
            await buffer.merged()
        if self._merging:
            await self._merging
        if now.promoted_to:
            await self._write_down_what_is_left()
        else:
            promotion.give_back(self._note)
        torn = [] if now.keeps_latest else now.unfinished
        return errors + [
            ReplicationError(disk.filter.name, "stop", f"the disk is not at a checkpoint: {disk.filter.error}")
            for disk in torn]

    async def _finish(self) -> None:
        for disk in self._now.unfinished:
            disk.errors.clear()
        await self._registry.finish_all(failover=not self._now.keeps_latest)

    async def _close_buffers(self) -> None:
        for disk in self._now.disks.values():
            if disk.filter.stage is Stage.DONE:
                await close_buffers(self._graph, disk.spec)

    async def _merged(self) -> None:
        """Wait until no merge runs."""
        while buffers := [disk.buffer for disk in self._now.disks.values()
                          if disk.buffer and disk.filter.stage is Stage.FAILOVER]:
            await buffers[0].merged()

    def _must_run(self, step: str) -> None:
        if self._now.declines():
            raise ReplicationError(self._pair, step, f"it has ended already: it is {self._now.state}")
        if not self._now.running:
            raise ReplicationError(self._pair, step, f"there is no checkpoint to stand on (it is {self._now.state})")

    def _must_be_whole(self, step: str) -> None:
        if self._now.mixed:
            instead = "'--to checkpoint'" if step == "failover" else "'blockstep stop --quit', or a failover,"
            raise ReplicationError(self._pair, step, "a copy from the primary has begun and has not ended: half of it "
                                   f"is no state the disks ever were in. {instead} takes checkpoint {self._now.epoch}")
