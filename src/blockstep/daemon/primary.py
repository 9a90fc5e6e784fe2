"""``blockstep primary``: serves a guest's disks, and keeps a standby of them.

For each disk NAME, once opened:

    guest's export ──► NAME (link) ──file──► NAME-disk (file)
                          └──target──► NAME-standby (nbd), while there is a standby

`Primary` is the hands of a `Coordinator`: it turns what happens (connections, jobs, timers, commands) into events
and carries the resulting actions out. All its decisions are in the coordinator; all its waiting is here.

The first sync and every resync is a job for each disk (`CatchUp`), from NAME-disk to NAME-sync, a second connection.
It converges while the guest writes, and switches the link on when the two are the same. A full sync covers the disk;
a resync covers what the link remembers.

No request of the guest waits for the standby for longer than ``max-stall``: each request of a link has that
deadline, and the standby is asked all the time whether it is there. After that the pair lets go and goes on alone.
What may take long without harm, making the standby's disk durable, goes over the second connection, and no
checkpoint is begun before the last one is durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.daemon.disks import DiskSpec, serve, uris, work_status
from blockstep.daemon.service import Service
from blockstep.drivers.nbd import Nbd
from blockstep.errors import BlockstepError, ConnectionLost, NodeNotFound, PeerRefused
from blockstep.jobs.registry import JobRegistry
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server as NbdServer
from blockstep.nbd.tls import client_context, server_context
from blockstep.nbd.uri import Address, InetAddress
from blockstep.qmp.client import Connection, open_connection
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.errors import CommandRefused
from blockstep.replication import coordinator as c
from blockstep.replication.catch_up import CatchUp
from blockstep.replication.link import GRANULARITY, LOOKS, Link
from blockstep.replication.resize import check_growth

#: Seconds for which a guest's lone write looks out for the standby's acknowledgement before the process sleeps.
BUSY_POLL: Final = 100e-6


@dataclass(frozen=True, slots=True)
class PrimaryConfig:
    """What ``blockstep primary`` was told. Times in seconds, sizes in bytes."""

    pair: str
    disks: tuple[DiskSpec, ...]
    standby: InetAddress
    export: Address
    qmp: Path
    ack: Literal["local", "both"] = "local"
    #: Bytes of writes that may wait for the standby, for each disk.
    queue: int = 64 << 20
    max_stall: float = 2.0
    #: When a checkpoint is due (0: never by this).
    checkpoint_every: float = 5.0
    checkpoint_bytes: int = 256 << 20
    #: A directory with certificates: the standby is spoken to with TLS only.
    tls: Path | None = None
    #: A directory with certificates: guests must speak TLS, and have a certificate of the same CA.
    export_tls: Path | None = None
    #: The user said where to serve: sockets that systemd passes are not looked at.
    export_given: bool = True


@dataclass(slots=True)
class _Disk:
    spec: DiskSpec
    link: Link
    backend: Backend
    #: Connections to the standby: for the link, with the deadline; for syncs and flushes.
    standby: Nbd | None = None
    sync: Nbd | None = None
    job: CatchUp | None = None
    bitmap: DirtyBitmap | None = None


class Primary(Service):
    """The program. `open` starts to serve, `close` ends everything."""

    def __init__(self, config: PrimaryConfig, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(config.pair)
        self.config = config
        self.graph = Graph()
        self.jobs = JobRegistry()
        self.disks: dict[str, _Disk] = {}
        self.coordinator = c.Coordinator()
        self._clock = clock
        self._instance = str(uuid.uuid4())
        self._server: NbdServer | None = None
        self._addresses: list[Address] = []
        self._control: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: The one that carries out what the coordinator awaits (attach, sync, checkpoint).
        self._action: asyncio.Task[None] | None = None
        self._cleanup: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._resizing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._looker: asyncio.TimerHandle | None = None
        self._sync_is_full = True
        #: Bytes that a disk's buffer on the standby may take before a checkpoint is due; 0: there is no limit.
        self._room = 0
        self._committed_at: float | None = None
        self._pause = 0.0
        self._asking: list[asyncio.Future[qmp.Committed]] = []
        self._asking_next: list[asyncio.Future[qmp.Committed]] = []

    # --- start and stop ---

    async def open(self) -> None:
        """Open the disks and serve them; the standby is looked for meanwhile. Raises OptionError or OSError."""
        try:
            self._tls()  # certificates that are not there are the user's error now, not one of every attempt
            for spec in self.config.disks:
                await self._open_disk(spec)
            tls = server_context(self.config.export_tls, verify_peer=True) if self.config.export_tls else None
            self._server = NbdServer(tls="required" if tls else "off", tls_context=tls)
            for name, disk in self.disks.items():
                self._server.add(Export(name, disk.backend, description=f"pair {self.config.pair}, primary"))
            self._addresses = await serve(self._server, self.config.export, self.config.export_given)
            await self.serve_qmp(self.config.qmp, qmp.commands)
        except BaseException:
            await self.close()
            raise
        self._act(self.coordinator.begin())
        self._schedule()
        self._look()

    async def _open_disk(self, spec: DiskSpec) -> None:
        spec.make()
        await self.graph.open(
            {"driver": "file", "node-name": f"{spec.name}-disk", "filename": str(spec.path), "discard": "unmap"})
        link = await self.graph.open(
            {"driver": "link", "node-name": spec.name, "file": f"{spec.name}-disk",
             "ack": self.config.ack, "queue": self.config.queue})
        assert isinstance(link, Link)
        link.on_fail = lambda error: self._post(
            c.Failed(f"disk '{spec.name}' on the standby: {error.strerror or error}"))
        link.on_written = self._written
        self.disks[spec.name] = _Disk(spec, link, self.graph.attach_backend(link, f"guest's {spec.name}", READ | WRITE))

    async def close(self) -> None:
        """End everything, in good order: the standby's last checkpoint is the disks as they are in the end.

        Exports are drained, a last checkpoint is taken if there is a standby, then it is let go, and the disks are
        flushed and closed.
        """
        for timer in (self._timer, self._looker):
            if timer:
                timer.cancel()
        if self._server:
            await self._server.stop()
        if self.coordinator.state in (c.State.REPLICATING, c.State.CHECKPOINTING):
            with contextlib.suppress(BlockstepError):  # the standby has gone: there is nobody to tell any more
                await self.checkpoint()
        self._act(self.coordinator.apply(c.Stop()))
        for task in list(self._tasks):
            task.cancel()
        if self._cleanup:
            await self._cleanup
        for name, disk in self.disks.items():
            await disk.backend.flush()
            await self.graph.detach_backend(disk.backend)
            await self.graph.close(disk.link)
            await self.graph.close(self.graph.find(f"{name}-disk"))
        await self.stop_qmp()

    # --- events in, actions out ---

    def _post(self, event: c.Event) -> None:
        self._act(self.coordinator.apply(event))

    def _act(self, actions: list[c.Action]) -> None:
        for action in actions:
            match action:
                case c.Attach():
                    self._begin(action.attempt, partial(self._attach, action.attempt, action.delay))
                case c.Sync():
                    self._begin(action.attempt, partial(self._sync, action.attempt, action.full))
                case c.TakeCheckpoint():
                    self._begin(action.attempt, partial(self._checkpoint, action.attempt, action.epoch))
                case c.LetGo():
                    self._let_go(action.reason)
                case c.Report():
                    self._report()

    def _begin(self, attempt: int, work: Callable[[], Coroutine[Any, Any, c.Event]]) -> None:
        """Carry an action out; what it returns, or how it fails, is the event that answers it.

        It may be cancelled before its first step: ``work`` is called then, not before.
        """

        async def run() -> None:
            event: c.Event
            try:
                event = await work()
            except (OSError, BlockstepError, TimeoutError) as error:
                event = c.Failed(getattr(error, "strerror", None) or str(error), attempt)
            except Exception as error:  # a bug: the pair lets go and says so, and the guest goes on
                asyncio.get_running_loop().call_exception_handler({"message": "blockstep: a bug", "exception": error})
                event = c.Failed(f"internal error: {error!r}", attempt)
            if self._action is asyncio.current_task():
                self._action = None
            self._post(event)

        self._action = self._spawn(run())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- attach ---

    async def _attach(self, attempt: int, delay: float) -> c.Event:
        await asyncio.sleep(delay)
        await _ended(self._cleanup)
        host, port = self.config.standby.host, self.config.standby.port
        control = await open_connection((host, port + 1), timeout=max(self.config.max_stall, 1.0), ssl=self._tls())
        try:
            answer = await control.execute("pair-attach", {
                "pair": self.config.pair, "instance": self._instance, "silence": 3 * self.config.max_stall,
                "disks": [{"name": name, "size": disk.link.length} for name, disk in self.disks.items()]})
            if not answer["accepted"]:
                await control.close()
                return c.Refused(answer["reason"])
            for name, disk in self.disks.items():
                disk.standby = await self._open_nbd(
                    f"{name}-standby", name, self.config.max_stall, BUSY_POLL if self.config.ack == "both" else 0.0)
                disk.sync = await self._open_nbd(f"{name}-sync", name, 0.0)
                with self.graph.change() as change:
                    change.attach(disk.link, "target", Role.TARGET, disk.standby)
        except CommandRefused as error:
            await control.close()
            raise PeerRefused(f"the standby refuses: {error}") from None
        except BaseException:
            await control.close()
            await self._detach()
            raise
        self._control = control
        self._spawn(self._watch(control))
        self._room = answer["buffer-limit"] // 2
        for disk in self.disks.values():
            disk.link.queue = min(self.config.queue, self._room // 2) if self._room else self.config.queue
        # Also when the standby has given its checkpoint up: what its disks hold is known all the same.
        known = answer["instance"] == self._instance
        self._sync_is_full = not known
        self.coordinator.epoch = max(self.coordinator.epoch, answer["epoch"])
        return c.Attached(attempt, full=not known)

    async def _open_nbd(self, name: str, export: str, timeout: float, busy_poll: float = 0.0) -> Nbd:
        tls = {"tls-creds": str(self.config.tls)} if self.config.tls else {}
        node = await self.graph.open({
            "driver": "nbd", "node-name": name, "export": export, "timeout": timeout, "discard": "unmap",
            "busy-poll": busy_poll,
            "server": {"type": "inet", "host": self.config.standby.host, "port": self.config.standby.port}, **tls})
        assert isinstance(node, Nbd)
        return node

    def _tls(self) -> ssl.SSLContext | None:
        return client_context(self.config.tls) if self.config.tls else None

    async def _watch(self, control: Connection) -> None:
        """Hear of the control connection's end; and, by asking, of a standby that answers no more."""
        try:
            while self._control is control:
                status = await control.execute("pair-query", timeout=self.config.max_stall * 0.75)
                if any(disk["buffer-used"] > self._room > 0 for disk in status["disks"]):
                    self._post(c.Due())
                if status["role"] == "promoted" or status["state"] == "stopped":
                    self._post(c.Refused(f"standby '{self.config.pair}' is {status['state']}; this side is stale"))
                    return
                await asyncio.sleep(self.config.max_stall * 0.25)
        except (OSError, BlockstepError, TimeoutError) as error:
            if self._control is control:
                self._post(c.Failed(getattr(error, "strerror", None) or str(error)))

    async def _ask(self, command: str, **arguments: Any) -> Any:
        """A command to the standby. Raises ConnectionLost, TimeoutError, CommandRefused."""
        if self._control is None:
            raise ConnectionLost("the standby's control connection is gone")
        return await self._control.execute(command, arguments, timeout=max(self.config.max_stall, 1.0))

    # --- sync ---

    async def _sync(self, attempt: int, full: bool) -> c.Event:
        jobs = []
        for name, disk in self.disks.items():
            assert disk.sync is not None
            source = self.graph.find(f"{name}-disk")
            if not full:
                disk.bitmap = DirtyBitmap(source, "resync", disk.link.length, GRANULARITY)
                disk.bitmap.merge(disk.link.since)
                disk.bitmap.merge(disk.link.closing)
            job = CatchUp(f"sync-{name}", self.graph, source, disk.sync, disk.link, disk.bitmap)
            disk.job = await self.jobs.create(job)
            jobs.append(job)
        for job in jobs:
            error = await job.wait()
            if error:
                raise error
        with self.graph.change() as change:
            for disk in self.disks.values():
                change.refresh(disk.link)
        self._drop_bitmaps()
        return c.Synced(attempt)

    def _drop_bitmaps(self) -> None:
        for disk in self.disks.values():
            disk.job = None
            if disk.bitmap:
                disk.bitmap.remove()
                disk.bitmap = None

    # --- checkpoints ---

    def _schedule(self) -> None:
        if self.config.checkpoint_every:
            self._timer = asyncio.get_running_loop().call_later(self.config.checkpoint_every, self._due)

    def _look(self) -> None:
        seconds = self.config.max_stall / LOOKS
        for disk in self.disks.values():
            disk.link.look(seconds, self.config.max_stall)
        self._looker = asyncio.get_running_loop().call_later(seconds, self._look)

    def _due(self) -> None:
        self._schedule()
        self._post(c.Due())

    def _written(self) -> None:
        """A link has more than its `alarm`: a checkpoint is due, or that was another disk's share.

        A disk's buffer on the standby that is three quarters full gets nothing more until the checkpoint: what is in
        the queue then, a quarter at the most, has to fit as well.
        """
        links = [disk.link for disk in self.disks.values()]
        by_bytes = self.config.checkpoint_bytes and sum(link.written for link in links) > self.config.checkpoint_bytes
        by_room = self._room and any(link.written > self._room for link in links)
        if by_room and self.coordinator.state in (c.State.REPLICATING, c.State.CHECKPOINTING):
            for link in links:
                link.alarm = self._room * 3 // 2
                if link.written > link.alarm:
                    link.stall()
        elif by_bytes:
            for link in links:
                link.alarm = 0
        if by_bytes or by_room:
            asyncio.get_running_loop().call_soon(self._post, c.Due())

    def _alarm(self) -> int:
        """Bytes after which a link is to be looked at."""
        limits = [self.config.checkpoint_bytes // len(self.disks), self._room]
        return min(filter(None, limits), default=0)

    async def _checkpoint(self, attempt: int, epoch: int) -> c.Event:
        links = [disk.link for disk in self.disks.values()]
        asking, self._asking_next = self._asking_next, []
        self._asking += asking
        await _ended(self._settling)
        started = self._clock()
        for link in links:
            link.mark()
            link.alarm = self._alarm()
        try:
            for link in links:
                await link.settle()
            await self._ask("pair-checkpoint", epoch=epoch)
        except CommandRefused as error:
            self._release(links)
            self._answer(None, str(error))
            return c.NotCommitted(attempt, str(error))
        except BaseException as error:
            # Nothing is released: the standby may take the checkpoint yet, and these writes are not part of it.
            self._answer(None, str(error))
            raise
        self._release(links)
        self._pause, self._committed_at = self._clock() - started, self._clock()
        self._answer(qmp.Committed(epoch=epoch, pause=self._pause), "")
        self.emit(qmp.ReplicationCheckpoint(pair=self.config.pair, epoch=epoch, pause=self._pause))
        self._settling = asyncio.get_running_loop().create_task(self._settle())
        return c.Committed(attempt, epoch)

    @staticmethod
    def _release(links: list[Link]) -> None:
        for link in links:
            if link.on:
                link.release()

    async def _settle(self) -> None:
        """Make the checkpoint's data durable on the standby; from then on a resync need not copy it again."""
        for disk in self.disks.values():
            if disk.sync and disk.link.on:
                try:
                    await disk.sync.flush()
                    disk.link.settled()
                except OSError as error:
                    disk.link.fail(error)

    def _answer(self, committed: qmp.Committed | None, reason: str) -> None:
        waiting, self._asking = self._asking, []
        for future in waiting:
            if not future.done():
                if committed:
                    future.set_result(committed)
                else:
                    future.set_exception(BlockstepError(f"no checkpoint was taken: {reason}"))

    # --- letting go ---

    def _let_go(self, reason: str) -> None:
        """At once: writes go on alone, nobody waits. The rest of the clearing up follows."""
        for disk in self.disks.values():
            disk.link.switch_off()
            for node in (disk.standby, disk.sync):
                if node:
                    node.yank()
        control, self._control = self._control, None
        self._asking += self._asking_next
        self._asking_next = []
        self._answer(None, reason)
        action, self._action = self._action, None
        if action:
            action.cancel()
        for job in self.jobs.list():
            job.end(force=True)  # now: a sync that is about to end must not switch its link on
        before = self._cleanup
        self._cleanup = asyncio.get_running_loop().create_task(self._clear_up(control, action, before))

    async def _clear_up(self, control: Connection | None, action: asyncio.Task[None] | None,
                        before: asyncio.Task[None] | None) -> None:
        await _ended(before)
        await _ended(action)
        if control:
            await control.close()
        await self.jobs.cancel_all()
        await _ended(self._settling)
        self._drop_bitmaps()
        await self._detach()

    async def _detach(self) -> None:
        for disk in self.disks.values():
            if "target" in disk.link.children:
                with self.graph.change() as change:
                    change.detach(disk.link.target)
            standby, sync, disk.standby, disk.sync = disk.standby, disk.sync, None, None
            for node in (standby, sync):
                if node:
                    await self.graph.close(node)

    # --- the operator's commands ---

    async def checkpoint(self) -> qmp.Committed:
        """A checkpoint now; several requests at a time are one."""
        if self.coordinator.state not in (c.State.REPLICATING, c.State.CHECKPOINTING):
            raise BlockstepError(f"no checkpoint can be taken: the pair is {self.coordinator.state.value}"
                                 f" ({self.coordinator.reason})")
        future: asyncio.Future[qmp.Committed] = asyncio.get_running_loop().create_future()
        self._asking_next.append(future)
        self._post(c.Due())
        return await future

    async def fail_over(self, to: Literal["checkpoint", "latest"]) -> qmp.Promoted:
        """Not here."""
        raise BlockstepError("this is the primary; a failover is asked of its standby")

    async def stop_replication(self) -> None:
        """End replication; the disks are served on, and what is written is remembered no more than before."""
        self._post(c.Stop())
        if self._cleanup:
            await self._cleanup

    async def resize(self, disk: str, size: int) -> None:
        """A disk grows: on the standby first, if there is one, then here; both or none.

        If this side fails and the standby cannot be put back, the error says so; that is made good when it is
        attached again.
        """
        if disk not in self.disks:
            raise NodeNotFound(disk)
        async with self._resizing:
            one = self.disks[disk]
            before = one.link.length
            check_growth(before, size)
            for node in (one.link, self.graph.find(f"{disk}-disk")):
                node.check_operation("resize")
            if self._control:
                await self._resize_standby(disk, size)
            try:
                async with self.graph.drained(one.link):
                    await one.link.truncate(size)
            except OSError as error:
                reason = f"disk '{disk}' of this side cannot grow: {error.strerror or error}"
                try:
                    if self._control:
                        await self._resize_standby(disk, before)
                except BlockstepError as also:
                    reason += f"; {also}"
                raise BlockstepError(reason) from error
            for connection in (one.standby, one.sync):
                if connection:
                    connection.has_grown(size)

    async def _resize_standby(self, disk: str, size: int) -> None:
        try:
            await self._ask("pair-resize", disk=disk, size=size)
        except (OSError, BlockstepError, TimeoutError) as error:
            why = getattr(error, "strerror", None) or str(error) or "no answer in time"
            raise BlockstepError(f"disk '{disk}' of the standby cannot get {size} bytes: {why}") from error

    # --- how it is ---

    def _health(self) -> tuple[qmp.Health, str]:
        coordinator = self.coordinator
        state = coordinator.state
        if state in (c.State.OFFLINE, c.State.FENCED, c.State.STOPPED):
            return "at-risk", coordinator.reason
        if not coordinator.protected:
            return "degraded", coordinator.reason or "the first checkpoint is being taken"
        if coordinator.reason:
            return "degraded", coordinator.reason
        age = self._age()
        if self.config.checkpoint_every and age > 3 * self.config.checkpoint_every + self.config.max_stall:
            return "degraded", f"the last checkpoint is {age:.1f} s old"
        return "healthy", ""

    def _age(self) -> float:
        return self._clock() - self._committed_at if self._committed_at is not None else 0.0

    def status(self) -> qmp.PairStatus:
        """The truth, at once."""
        health, reason = self._health()
        checkpoint = None
        if self._committed_at is not None:
            checkpoint = qmp.CheckpointStatus(epoch=self.coordinator.epoch, age=self._age(), pause=self._pause)
        jobs = [disk.job for disk in self.disks.values() if disk.job]
        return qmp.PairStatus(
            pair=self.config.pair, role="primary", state=self.coordinator.state.value, health=health, reason=reason,
            link="", peer=str(self.config.standby), ack=self.config.ack, checkpoint_every=self.config.checkpoint_every,
            checkpoint_bytes=self.config.checkpoint_bytes, checkpoint=checkpoint,
            disks=[self._disk_status(name, disk) for name, disk in self.disks.items()],
            work=work_status("sync" if self._sync_is_full else "resync", jobs) if jobs else None,
            exports=uris(self._addresses, self.disks, tls=self.config.export_tls is not None))

    def _disk_status(self, name: str, disk: _Disk) -> qmp.DiskStatus:
        state = self.coordinator.state
        word = "replicating" if disk.link.on else "syncing" if disk.job else state.value
        return qmp.DiskStatus(name=name, size=disk.link.length, state=word, behind=disk.link.behind,
                              buffer_used=0, buffer_limit=0, reason="")

    def _report(self) -> None:
        health, reason = self._health()
        self.emit(qmp.ReplicationState(
            pair=self.config.pair, role="primary", state=self.coordinator.state.value, health=health, reason=reason,
            epoch=self.coordinator.epoch))


async def _ended(task: asyncio.Task[None] | None) -> None:
    """Wait for a task's end, however it ends; who is cancelled here does not cancel the task."""
    if task:
        await asyncio.wait([task])


async def main(config: PrimaryConfig, ready: Callable[[Primary], None]) -> None:
    """Run a primary until it is told to stop."""
    os.umask(0o077)
    primary = Primary(config)
    await primary.open()
    try:
        ready(primary)
        await primary.wait()
    finally:
        await primary.close()
