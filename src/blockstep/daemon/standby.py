"""``blockstep standby``: the disks that a primary writes to, and their view at the last checkpoint.

For each disk NAME, once opened:

    link server ──► NAME-secondary ◄── NAME-hidden ◄── NAME-active ◄── NAME-filter ◄── NAME ──► view server
    (for the primary)   file            overlay          overlay       replication    quorum   (for a guest)

A primary presents itself on the control port (the link's port + 1): `attach`. When it has copied its disks, its first
`commit` starts replication, and from then on the views are checkpoints, moved forward by `commit`, all together.
Nothing on this side decides: it does as its primary says, until an operator promotes it (`fail_over`); then the link's
exports are gone at once, and no primary is taken any more.

A buffer without room fails the primary's writes, and the primary lets go and comes back with a resync. The checkpoint
stays as long as it can: only when the buffer becomes full in a resync as well, it is given up with the next `attach`.
Then there is no view until the next `commit`; but there is a way out.

State, in words: *waiting* for a primary, *syncing*, *replicating*, *resyncing* (it has a checkpoint, and a primary that
copies what came since, or everything), *lost* (it has a checkpoint, and the primary is gone), *failover* (it is being
promoted, or the merge runs), *promoted*, *failover-failed*, *stopped*.

A promotion of which a part fails is never taken back once a disk is promoted: no primary comes in any more, and each
disk is in a state of its own. The same command goes on with those that are not promoted, or not merged, as often as
it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blockstep.aio.pool import in_thread
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from blockstep.daemon import promotion
from blockstep.daemon.disks import DiskSpec, serve, uris, work_status
from blockstep.daemon.service import Service
from blockstep.drivers.replication import Replication, Stage
from blockstep.errors import BlockstepError, NodeNotFound, OperationBlocked, OptionError, ReplicationError
from blockstep.jobs.registry import JobRegistry
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server as NbdServer
from blockstep.nbd.tls import server_context
from blockstep.nbd.uri import Address, InetAddress
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.schema import Monitor, Registry
from blockstep.qmp.server import Server as QmpServer
from blockstep.replication.hidden_disk import HiddenDiskBuffer
from blockstep.replication.registry import ReplicationRegistry
from blockstep.replication.resize import check_growth


@dataclass(frozen=True, slots=True)
class StandbyConfig:
    """What ``blockstep standby`` was told."""

    pair: str
    disks: tuple[DiskSpec, ...]
    #: Where the primary connects to; the control port is one above.
    link: InetAddress
    #: Where a guest finds the views.
    view: Address
    qmp: Path
    #: Where a promotion is written down; see `blockstep.daemon.promotion`.
    state: Path
    #: Bytes that the buffers of one disk may hold in memory, and where they spill to (None: then they are full).
    buffer_memory: int
    buffer_dir: Path | None
    #: A directory with certificates: TLS is required of the primary, both sides are verified.
    tls: Path | None = None
    #: Likewise for those who use the views.
    view_tls: Path | None = None
    #: The user said where to serve the views: sockets that systemd passes are not looked at.
    view_given: bool = True


@dataclass(slots=True)
class _Disk:
    """One disk, opened."""

    spec: DiskSpec
    filter: Replication
    view: Backend
    link: Backend | None = None
    errors: list[str] = field(default_factory=list)
    #: Its length before it grew last: a primary whose disk could not follow may have it back.
    former_length: int | None = None

    @property
    def buffer(self) -> HiddenDiskBuffer | None:
        return self.filter.buffer if isinstance(self.filter.buffer, HiddenDiskBuffer) else None


class Standby(Service):
    """The program. `open` starts to serve, `close` ends everything; between them it reacts."""

    def __init__(self, config: StandbyConfig, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(config.pair)
        self.config = config
        self.graph = Graph()
        self.jobs = JobRegistry(on_event=self._job_event)
        self.registry = ReplicationRegistry(self.graph, self.jobs)
        self.disks: dict[str, _Disk] = {}
        self._clock = clock
        self._view_server: NbdServer | None = None
        self._addresses: list[Address] = []
        self._link_server: NbdServer | None = None
        self._control: QmpServer | None = None
        self._primary: Monitor | None = None
        #: The connection whose checkpoint the views are. Another one's disks are something else until it commits.
        self._committed_by: Monitor | None = None
        self._cutting = asyncio.Lock()
        self._heard_at = 0.0
        #: Whether the primary has committed a checkpoint since it was attached, that is: its (re)sync is over.
        self._has_committed = False
        #: Whether the buffer has become full in a resync.
        self._no_room = False
        self.link_port = 0
        self._instance = ""
        self._wanted_instance = ""
        self._epoch = 0
        self._committed_at = 0.0
        #: The promotion's choice, "checkpoint" or "latest", from the moment in which it begins.
        self._promoted_to = ""
        self._stopped = False
        #: A promotion, or a stop: one at a time.
        self._ending = asyncio.Lock()
        self._promoting = False
        self._merging: asyncio.Task[None] | None = None
        self._last_error = ""
        self._told = ""

    # --- start and stop ---

    async def open(self) -> None:
        """Open the disks, serve the views, wait for a primary. Raises OptionError or OSError; then all is closed."""
        promotion.check(self.config.state, self.config.pair)
        try:
            for spec in self.config.disks:
                await self._open_disk(spec)
            tls = server_context(self.config.tls, verify_peer=True) if self.config.tls else None
            await self._listen_to_primary(tls)
            await self._serve_views()
            await self.serve_qmp(self.config.qmp, qmp.commands)
        except BaseException:
            await self.close()
            raise

    async def _serve_views(self) -> None:
        tls = server_context(self.config.view_tls, verify_peer=True) if self.config.view_tls else None
        self._view_server = NbdServer(tls="required" if tls else "off", tls_context=tls)
        for name, disk in self.disks.items():
            self._view_server.add(Export(name, disk.view, description=f"pair {self.config.pair}, standby's view"))
        self._addresses = await serve(self._view_server, self.config.view, self.config.view_given)

    async def _listen_to_primary(self, tls: ssl.SSLContext | None) -> None:
        """Take the link's port and the one above it. Port 0: any two neighbours that are free."""
        host, port = self.config.link.host, self.config.link.port
        for _ in range(64):
            server = NbdServer(tls="required" if tls else "off", tls_context=tls)
            (_, self.link_port), *_ = await server.start_tcp(host or None, port)
            control = QmpServer(Registry.of(qmp.peer_commands), self, version=self.version)
            try:
                await control.start_tcp(host or "::", self.link_port + 1, tls)
            except OSError:
                await server.stop()
                if port:
                    raise
            else:
                self._link_server, self._control = server, control
                return
        raise OptionError("--link", str(self.config.link), "an address with two free ports in a row")

    async def _open_disk(self, spec: DiskSpec) -> None:
        spec.make()
        name = spec.name
        secondary = await self.graph.open(
            {"driver": "file", "node-name": f"{name}-secondary", "filename": str(spec.path), "discard": "unmap"})
        limits: dict[str, Any] = {"memory-limit": self.config.buffer_memory}
        if self.config.buffer_dir:
            limits["spill-dir"] = str(self.config.buffer_dir)
        backing: Any = secondary.name
        for part in ("hidden", "active"):
            await self.graph.open({"driver": "overlay", "node-name": f"{name}-{part}", "backing": backing, **limits})
            backing = f"{name}-{part}"
        top = await self.graph.open({
            "driver": "quorum", "node-name": name, "vote-threshold": 1, "read-pattern": "fifo",
            "children": [{"driver": "replication", "node-name": f"{name}-filter", "mode": "secondary",
                          "top-id": name, "file": backing}]})
        filter = self.graph.find(f"{name}-filter")
        assert isinstance(filter, Replication)
        disk = _Disk(spec, filter, self.graph.attach_backend(top, f"view of {name}", READ | WRITE))
        filter.on_error = lambda error: self._io_error(disk, error)
        self.disks[name] = disk

    async def close(self) -> None:
        """End everything, in good order: a standby that is stopped leaves its disks at the last checkpoint.

        Exports are drained; what the primary wrote since the checkpoint is undone by the same merge as after a
        failover, which is waited for; then the disks are flushed and closed. Raises ReplicationError, when all is
        closed, if the merge failed: a disk is torn.
        """
        for server in (self._control, self._link_server, self._view_server):
            if server:
                await server.stop()
        for disk in self.disks.values():
            if disk.link:
                await self.graph.detach_backend(disk.link)
        buffers = [buffer for disk in self.disks.values() if (buffer := disk.buffer)]
        with contextlib.suppress(BlockstepError):  # told at the end, of the disks that are torn
            if self._running and not self._declines():
                await self.registry.stop_all(failover=True)
            else:
                await self._merged()
                await self._finish()
        for buffer in buffers:
            await buffer.merged()
        if self._merging:
            await self._merging
        torn = [disk.filter for disk in self._unfinished if not self._keeps_latest]
        for disk in self.disks.values():
            if disk.filter.stage is not Stage.NONE:
                await disk.view.flush()
            await self.graph.detach_backend(disk.view)
        for name in reversed(list(self.graph.nodes)):
            node = self.graph.nodes.get(name)
            if node and node.owned and not node.parents:
                await self.graph.close(node)
        await self.stop_qmp()
        for filter in torn:
            raise ReplicationError(filter.name, "stop", f"the disk is not at a checkpoint: {filter.error}")

    # --- the primary's commands ---

    async def attach(self, args: qmp.AttachArguments, monitor: Monitor) -> qmp.Attached:
        """A primary presents itself. What another connection of the same primary still had is cut off."""
        if self._declines():
            return self._decline()
        self._check_primary(args, monitor)
        self._primary = monitor
        self._watcher = asyncio.get_running_loop().create_task(self._watch(monitor, args.silence))
        if self._link_server is None:
            raise BlockstepError("the standby is not ready")
        await self._cut_links()
        await self._fit({disk.name: disk.size for disk in args.disks})
        if self._no_room:
            await self._give_up()
        # While it waited the standby may have been promoted, or the primary may have come again: no way in then.
        if self._declines():
            return self._decline()
        self._must_be_primary(monitor, "attach")
        self._has_committed = False
        for name, disk in self.disks.items():
            node = self.graph.find(f"{name}-secondary")
            # Below the copy-before-write filter, if there is one: it is put over the node's parents.
            top = disk.buffer.cbw if disk.buffer else node
            disk.link = self.graph.attach_backend(top, f"link of {name}", READ | WRITE)
            self._link_server.add(Export(name, disk.link, description=f"pair {self.config.pair}, for the primary"))
        self._tell()
        return self._answer(True, "")

    def _declines(self) -> bool:
        return bool(self._promoted_to) or self._stopped

    def _decline(self) -> qmp.Attached:
        what = "was promoted" if self._promoted_to else "was stopped"
        return self._answer(False, f"standby '{self.config.pair}' {what}; it takes no primary any more")

    async def _give_up(self) -> None:
        """The buffer has no room for what a resync changes: without the checkpoint none is needed."""
        self._no_room = False
        if self._running:
            await self.registry.give_up_all()
            self._epoch = 0
            self._last_error = "the checkpoint was given up: the buffer has no room for it and for a resync"

    def _check_primary(self, args: qmp.AttachArguments, monitor: Monitor) -> None:
        if args.pair != self.config.pair:
            raise OptionError("pair", args.pair, f"'{self.config.pair}', as this standby was told")
        if self._primary and self._primary is not monitor and args.instance != self._wanted_instance:
            raise BlockstepError(f"another primary, at {self._primary.peer}, is attached; stop it first")
        mine = {name: disk.view.length for name, disk in self.disks.items()}
        theirs = {disk.name: disk.size for disk in args.disks}
        if set(mine) != set(theirs):
            raise OptionError("disks", ", ".join(sorted(theirs)), f"those of this standby: {', '.join(sorted(mine))}")
        for name, size in theirs.items():
            if mine[name] > size and self.disks[name].former_length != size:
                raise OptionError(f"size of disk '{name}'", size, f"{mine[name]} bytes, as the standby's is")
        self._wanted_instance = args.instance
        if args.instance != self._instance:
            # From here on it may write to the disks: whoever committed before cannot tell what differs any more.
            self._instance = ""

    def _answer(self, accepted: bool, reason: str) -> qmp.Attached:
        return qmp.Attached(accepted=accepted, reason=reason, instance=self._instance, epoch=self._epoch,
                            running=self._running, port=self.link_port,
                            buffer_limit=0 if self.config.buffer_dir else self.config.buffer_memory)

    async def commit(self, epoch: int, monitor: Monitor) -> None:
        """Move the views of all disks forward, or of none. The first one is the start."""
        self._must_be_primary(monitor, "checkpoint")
        try:
            if self._running:
                await self.registry.checkpoint_all()
            else:
                await self.registry.start_all("secondary")
        except BlockstepError as error:
            self._last_error = str(error)
            self._tell()
            raise
        if monitor is self._primary:  # else another has come meanwhile, whose disks these are not
            self._instance, self._has_committed = self._wanted_instance, True
            self._committed_by = monitor
        self._epoch, self._committed_at = epoch, self._clock()
        self._last_error = ""
        self._no_room = False
        for disk in self.disks.values():
            disk.filter.error = None
            disk.errors.clear()
        self._tell()

    async def resize_for_primary(self, disk: str, size: int, monitor: Monitor) -> None:
        """A disk, its buffers and its view grow, or get back the length before they did; all or none."""
        self._must_be_primary(monitor, "resize")
        if disk not in self.disks:
            raise OptionError("disk", disk, f"one of {', '.join(self.disks)}")
        await self._resize(disk, size)

    async def _fit(self, sizes: dict[str, int]) -> None:
        """Follow what became of the primary's disks while it was away."""
        for name, size in sizes.items():
            try:
                await self._resize(name, size)
            except OSError as error:
                raise OptionError(f"size of disk '{name}'", size, f"{self.disks[name].view.length} bytes, as the "
                                  f"standby's is, which cannot grow: {error.strerror or error}") from error

    async def _resize(self, name: str, size: int) -> None:
        disk = self.disks[name]
        before = disk.view.length
        if size == before:
            return
        if size != disk.former_length:
            check_growth(before, size)
        await self.registry.resize(disk.filter, size)
        disk.former_length = before if size > before else None

    def _must_be_primary(self, monitor: Monitor, step: str) -> None:
        if self._promoted_to or self._stopped or monitor is not self._primary:
            raise ReplicationError(self.config.pair, step, f"only the attached primary may ask for it "
                                   f"(the standby is {self.state})")

    def heard(self, monitor: Monitor) -> qmp.PairStatus:
        """A sign of life of somebody, who is told how it is."""
        if monitor is self._primary:
            self._heard_at = self._clock()
        return self.status()

    async def _watch(self, monitor: Monitor, silence: float) -> None:
        """See the primary go: its connection ends, or it is silent for too long and is cut off."""
        self._heard_at = self._clock()
        while not monitor.gone.is_set():
            left = self._heard_at + silence - self._clock() if silence else None
            if left is not None and left <= 0:
                monitor.abort()
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await monitor.gone.wait()
        if monitor is self._primary:
            self._primary = None
            self._tell()

    # --- the operator's commands ---

    async def checkpoint(self) -> qmp.Committed:
        """Not here."""
        raise BlockstepError("checkpoints are taken on the primary; ask it")

    async def fail_over(self, to: Literal["checkpoint", "latest"]) -> qmp.Promoted:
        """Promote: see `qmp.replication_failover`."""
        async with self._ending:
            started = self._clock()
            if self._promoted_to and to != self._promoted_to:
                raise ReplicationError(self.config.pair, "failover", f"it has been promoted with --to "
                                       f"{self._promoted_to}; that cannot be changed any more")
            if not self._promoted_to or self._unfinished:
                self._promoting = True
                try:
                    await (self._go_on() if self._promoted_to else self._promote(to))
                finally:
                    self._promoting = False
                    self._tell()
            return qmp.Promoted(epoch=self._epoch, seconds=self._clock() - started, exports=self.exports)

    async def _promote(self, to: Literal["checkpoint", "latest"]) -> None:
        self._must_run("failover")
        self._promoted_to = to
        try:
            await in_thread(promotion.write, self.config.state, self.config.pair, self._epoch, to)
            await self._revoke()
            with self._saying_which():
                await self.registry.stop_all(failover=to == "checkpoint")
        except BaseException:
            if self._untouched:  # else a part of it is promoted, and no primary may write to that
                self._promoted_to = ""
                promotion.take_back(self.config.state)
            else:
                self._begun()
            raise
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
            if self._untouched:
                raise
            raise ReplicationError(self.config.pair, "failover", self._what_is_left()) from error

    def _begun(self) -> None:
        self._failover_event("begun")
        if not self._merging or self._merging.done():
            self._merging = asyncio.get_running_loop().create_task(self._see_merged())

    async def _see_merged(self) -> None:
        await self._merged()
        left = self._what_is_left()
        self._failover_event("failed" if left else "done", left)
        self._tell()

    def _failover_event(self, stage: Literal["begun", "done", "failed"], reason: str = "") -> None:
        self.emit(qmp.ReplicationFailover(
            pair=self.config.pair, stage=stage, to=self._promoted_to, epoch=self._epoch, reason=reason))

    async def _finish(self) -> None:
        """Go on with a promotion, or a stop, of which a part failed."""
        for disk in self._unfinished:
            disk.errors.clear()
        await self.registry.finish_all(failover=not self._keeps_latest)

    @property
    def _keeps_latest(self) -> bool:
        return self._stopped or self._promoted_to == "latest"

    async def _merged(self) -> None:
        """Wait until no merge runs."""
        while buffers := [disk.buffer for disk in self.disks.values()
                          if disk.buffer and disk.filter.stage is Stage.FAILOVER]:
            await buffers[0].merged()

    async def resize(self, disk: str, size: int) -> None:
        """A promoted standby's disks can grow; before that it follows its primary."""
        if disk not in self.disks:
            raise NodeNotFound(disk)
        top = self.graph.find(disk)
        top.check_operation("resize")
        if not self._promoted_to and not self._stopped:
            raise OperationBlocked(disk, "resize", "this is a standby; a resize is asked of its primary")
        check_growth(top.length, size)
        async with self.graph.drained(top):
            await top.truncate(size)

    async def stop_replication(self) -> None:
        """The view becomes what the primary wrote last, and no primary is taken any more."""
        async with self._ending:
            if self._stopped:
                await self._finish()
            else:
                self._must_run("stop")
                self._stopped = True
                try:
                    await self._revoke()
                    await self.registry.stop_all(failover=False)
                except BaseException:
                    self._stopped = not self._untouched
                    raise
                finally:
                    self._tell()

    async def _revoke(self) -> None:
        """A primary's writes are refused from here on: at the border at once, then its connections are cut."""
        for disk in self.disks.values():
            if disk.link:
                disk.link.revoke(f"standby '{self.config.pair}' has been promoted")
        await self._cut_links()

    async def _cut_links(self) -> None:
        """Take the primary's exports away, and wait for what had been begun."""
        async with self._cutting:  # who comes second waits for the same requests
            for name, disk in self.disks.items():
                if disk.link and self._link_server:
                    await self._link_server.remove(name, "hard")
                    await self.graph.detach_backend(disk.link)
                    disk.link = None

    def _must_run(self, step: str) -> None:
        if not self._running or self._declines():
            raise ReplicationError(self.config.pair, step, f"there is no checkpoint to stand on (it is {self.state})")

    # --- how it is ---

    @property
    def _running(self) -> bool:
        return bool(self.disks) and all(disk.filter.stage is Stage.RUNNING for disk in self.disks.values())

    @property
    def state(self) -> str:
        """One word; see the module."""
        stages = {disk.filter.stage for disk in self.disks.values()}
        if self._promoting or Stage.FAILOVER in stages:
            return "failover"
        if self._promoted_to:
            return "failover-failed" if self._unfinished else "promoted"
        if self._stopped:
            return "stopped"
        if self._running:
            if self._primary is None:
                return "lost"
            return "replicating" if self._committed_by is self._primary else "resyncing"
        return "syncing" if self._primary else "waiting"

    @property
    def _untouched(self) -> bool:
        """Whether all disks keep their checkpoint: no step of a promotion, or a stop, has been done with any."""
        return self._running and all(disk.buffer and not disk.filter.failed_over for disk in self.disks.values())

    @property
    def _unfinished(self) -> list[_Disk]:
        """The disks with which a promotion, or a stop, has to go on."""
        return [disk for disk in self.disks.values() if disk.filter.stage in (Stage.RUNNING, Stage.FAILOVER_FAILED)]

    def _lacks(self, disk: _Disk) -> str:
        """What keeps a disk from being promoted, or stopped; empty if nothing does."""
        error = disk.filter.error
        why = f": {error.strerror or error}" if error else ""
        if disk.filter.stage is Stage.FAILOVER_FAILED:
            return f"promoted, but not merged{why}"
        if disk.filter.stage is Stage.RUNNING:
            return f"not {'promoted' if self._promoted_to else 'stopped'}, its view is at checkpoint {self._epoch}{why}"
        return ""

    def _what_is_left(self) -> str:
        """How the disks are with which a promotion, or a stop, has to go on, and what to do; empty if all are well."""
        if not self._unfinished:
            return ""
        disks = "; ".join(f"disk '{disk.spec.name}' is {self._lacks(disk)}" for disk in self._unfinished)
        if not self._promoted_to:
            return f"{disks}. 'blockstep stop' again goes on with it"
        to = " --to latest" if self._promoted_to == "latest" else ""
        torn = "" if to else ", and until it succeeds do not end this program: the views are whole, the disks are not"
        return f"{disks}. 'blockstep failover{to}' again goes on with it{torn}"

    @property
    def exports(self) -> list[str]:
        """The NBD URIs of the views."""
        return uris(self._addresses, self.disks, tls=self.config.view_tls is not None)

    def _health(self) -> tuple[qmp.Health, str]:
        state = self.state
        errors = [f"disk '{name}': {error}" for name, disk in self.disks.items() for error in disk.errors[:1]]
        if state == "failover-failed":
            return "at-risk", self._what_is_left()
        if state in ("waiting", "syncing"):
            return "at-risk", self._last_error or "there is no checkpoint yet"
        if state == "lost":
            return "at-risk", f"the primary is gone; the view is at checkpoint {self._epoch}"
        if state == "stopped" and self._unfinished:
            return "at-risk", self._what_is_left()
        if state in ("promoted", "failover", "stopped"):
            return "degraded", "it has no standby of its own"
        reasons = [*errors, *([self._last_error] if self._last_error else [])]
        if state == "resyncing":
            reasons.insert(0, "the primary copies what is missing; until that is done the view stays at checkpoint "
                              f"{self._epoch}")
        if reasons:
            return "degraded", "; ".join(reasons)
        return "healthy", ""

    def status(self) -> qmp.PairStatus:
        """The truth, at once."""
        health, reason = self._health()
        checkpoint = None
        if self._epoch:
            age = self._clock() - self._committed_at
            checkpoint = qmp.CheckpointStatus(epoch=self._epoch, age=age, pause=0.0)
        return qmp.PairStatus(
            pair=self.config.pair, role="promoted" if self._promoted_to else "standby", state=self.state,
            health=health, reason=reason, link=str(InetAddress(self.config.link.host, self.link_port)),
            peer=self._primary.peer if self._primary else "", ack="",
            checkpoint_every=0.0, checkpoint_bytes=0, checkpoint=checkpoint,
            disks=[self._disk_status(name, disk) for name, disk in self.disks.items()],
            work=self._work(), exports=self.exports)

    def _disk_status(self, name: str, disk: _Disk) -> qmp.DiskStatus:
        ended = self._declines() and not self._promoting
        return qmp.DiskStatus(
            name=name, size=disk.view.length, state=self._disk_state(disk), behind=0,
            buffer_used=disk.buffer.used if disk.buffer else 0,
            buffer_limit=0 if self.config.buffer_dir else self.config.buffer_memory,
            reason=(self._lacks(disk) if ended else "") or "; ".join(disk.errors[:1]))

    def _disk_state(self, disk: _Disk) -> str:
        if disk.filter.stage is Stage.DONE:
            return "promoted" if self._promoted_to else "stopped"
        return str(disk.filter.stage.value)

    def _work(self) -> qmp.WorkStatus | None:
        jobs = self.jobs.list()
        return work_status("failover", jobs) if jobs else None

    def _io_error(self, disk: _Disk, error: OSError) -> None:
        reason = error.strerror or str(error)
        disk.errors.append(reason)
        del disk.errors[8:]
        if error.errno == errno.ENOSPC and not self._has_committed:
            self._no_room = True
        self.emit(qmp.ReplicationIoError(pair=self.config.pair, disk=disk.spec.name, reason=reason))
        self._tell()

    def _job_event(self, name: str, data: Mapping[str, Any]) -> None:
        self._tell()

    def _tell(self) -> None:
        health, reason = self._health()
        news = f"{self.state} {health} {reason}"
        if news != self._told:
            self._told = news
            self.emit(qmp.ReplicationState(
                pair=self.config.pair, role="promoted" if self._promoted_to else "standby", state=self.state,
                health=health, reason=reason, epoch=self._epoch))


async def main(config: StandbyConfig, ready: Callable[[Standby], None]) -> None:
    """Run a standby until it is told to stop."""
    os.umask(0o077)
    standby = Standby(config)
    await standby.open()
    try:
        ready(standby)
        await standby.wait()
    finally:
        await standby.close()
