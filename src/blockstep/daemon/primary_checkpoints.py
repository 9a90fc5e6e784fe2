"""A primary's checkpoints: when one is due, how it is taken, and who waits for it.

One checkpoint is the same moment on all links: they are marked, what was before the mark reaches the standby, the
standby commits, and what came after the mark is let go. The guest goes on all the time. Then the checkpoint is made
durable on the standby, behind everybody's back; no checkpoint is begun before the last one is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from blockstep.daemon.ledger import Ledger
from blockstep.daemon.primary_setup import PrimaryConfig, PrimaryDisk
from blockstep.daemon.primary_standby import StandbySide
from blockstep.errors import BlockstepError
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.errors import CommandRefused
from blockstep.qmp.schema import Event
from blockstep.replication import coordinator as c


class Checkpoints:
    """See the module. ``post`` takes what is due to the coordinator, whose state is asked with ``state``."""

    def __init__(self, config: PrimaryConfig, disks: Mapping[str, PrimaryDisk], standby: StandbySide, ledger: Ledger,
                 post: Callable[[c.Event], None], state: Callable[[], c.State], emit: Callable[[Event], None],
                 clock: Callable[[], float]) -> None:
        self._config, self._disks, self._standby, self._ledger = config, disks, standby, ledger
        self._post, self._state, self._emit, self._clock = post, state, emit, clock
        self._timer: asyncio.TimerHandle | None = None
        self._settling: asyncio.Task[None] | None = None
        #: Those who asked for the one that is being taken, and for the next one.
        self._asking: list[asyncio.Future[qmp.Committed]] = []
        self._asking_next: list[asyncio.Future[qmp.Committed]] = []
        #: When the last one was committed, and for how long writes were held back from the links, in seconds.
        self.committed_at: float | None = None
        self.pause = 0.0
        #: When the last one of the run was committed where this one goes on.
        self.committed_before: float | None = None
        #: The last one that is durable on the standby: what came before it is not remembered any more.
        self.durable = 0

    @property
    def age(self) -> float:
        """How old the last one is, in seconds; 0: there is none."""
        at = self.committed_before if self.committed_at is None else self.committed_at
        return 0.0 if at is None else self._clock() - at

    # --- when one is due ---

    def schedule(self) -> None:
        """From now on one is due every so many seconds."""
        if self._config.checkpoint_every:
            self._timer = asyncio.get_running_loop().call_later(self._config.checkpoint_every, self._due)

    def close(self) -> None:
        """No more by time."""
        if self._timer:
            self._timer.cancel()

    def _due(self) -> None:
        self.schedule()
        self._post(c.Due())

    def written(self) -> None:
        """A link has more than its `alarm`: a checkpoint is due, or that was another disk's share.

        A disk's buffer on the standby that is three quarters full gets nothing more until the checkpoint: what is in
        the queue then, a quarter at the most, has to fit as well.
        """
        links = [disk.link for disk in self._disks.values()]
        limit, room = self._config.checkpoint_bytes, self._standby.room
        by_bytes = limit and sum(link.written for link in links) > limit
        by_room = room and any(link.written > room for link in links)
        if by_room and self._state() in (c.State.REPLICATING, c.State.CHECKPOINTING):
            for link in links:
                link.alarm = room * 3 // 2
                if link.written > link.alarm:
                    link.stall()
        elif by_bytes:
            for link in links:
                link.alarm = 0
        if by_bytes or by_room:
            asyncio.get_running_loop().call_soon(self._post, c.Due())

    def _alarm(self) -> int:
        """Bytes after which a link is to be looked at."""
        limits = [self._config.checkpoint_bytes // len(self._disks), self._standby.room]
        return min(filter(None, limits), default=0)

    # --- taking one ---

    async def take(self, attempt: int, epoch: int) -> c.Event:
        """Take one. Raises what the links and the standby's answer fail with."""
        links = [disk.link for disk in self._disks.values()]
        asking, self._asking_next = self._asking_next, []
        self._asking += asking
        await self.settled()
        self._ledger.note(asked=epoch)
        started = self._clock()
        for link in links:
            link.mark()
            link.alarm = self._alarm()
        try:
            for link in links:
                await link.settle()
            await self._standby.ask("pair-checkpoint", epoch=epoch)
        except CommandRefused as error:
            self._release()
            self._answer(None, str(error))
            return c.NotCommitted(attempt, str(error))
        except BaseException as error:
            # Nothing is released: the standby may take the checkpoint yet, and these writes are not part of it.
            self._answer(None, str(error))
            raise
        self._release()
        self.pause, self.committed_at = self._clock() - started, self._clock()
        self._answer(qmp.Committed(epoch=epoch, pause=self.pause), "")
        self._emit(qmp.ReplicationCheckpoint(pair=self._config.pair, epoch=epoch, pause=self.pause))
        self._settling = asyncio.get_running_loop().create_task(self._settle(epoch))
        return c.Committed(attempt, epoch)

    def _release(self) -> None:
        for disk in self._disks.values():
            if disk.link.on:
                disk.link.release()

    async def _settle(self, epoch: int) -> None:
        """Make the checkpoint durable on the standby; from then on a resync need not copy again what is in it."""
        disks = [(disk.link, disk.sync) for disk in self._disks.values()]
        for link, sync in disks:
            if sync is None or not link.on:
                return
            try:
                await sync.flush()
            except OSError as error:
                link.fail(error)
                return
        try:
            await self._standby.durable(epoch)
        except CommandRefused:  # the standby tells why; should it crash, it has an older note, or none
            pass
        except (OSError, BlockstepError):  # it is gone, of which others hear
            return
        self.durable = epoch
        self._ledger.note(durable=epoch)
        for link, _ in disks:
            link.settled()

    async def settled(self) -> None:
        """Wait until the last one is durable, or its standby is lost."""
        await ended(self._settling)

    # --- those who wait ---

    async def wanted(self) -> qmp.Committed:
        """Ask for one, and wait for it; several who ask at a time get one. Raises BlockstepError."""
        future: asyncio.Future[qmp.Committed] = asyncio.get_running_loop().create_future()
        self._asking_next.append(future)
        self._post(c.Due())
        return await future

    def give_up(self, reason: str) -> None:
        """There will be none: nobody waits any longer."""
        self._asking += self._asking_next
        self._asking_next = []
        self._answer(None, reason)

    def _answer(self, committed: qmp.Committed | None, reason: str) -> None:
        waiting, self._asking = self._asking, []
        for future in waiting:
            if not future.done():
                if committed:
                    future.set_result(committed)
                else:
                    future.set_exception(BlockstepError(f"no checkpoint was taken: {reason}"))


async def ended(task: asyncio.Task[None] | None) -> None:
    """Wait for a task's end, however it ends; who is cancelled here does not cancel the task."""
    if task:
        await asyncio.wait([task])
