"""The side of a standby that its primary sees: the link's exports, and the commands on the control port above it.

A primary presents itself: `attach`. When it has copied its disks, its first `commit` starts replication, and from
then on the views are checkpoints, moved forward by `commit`, all together. Nothing here decides: it does as its primary
says, until the standby is promoted or stopped (`revoke`).

One primary at a time, over one control connection at a time; a new connection of the same primary takes the place of
the old one, whose requests and commands are waited for, or fail, before the new one's are taken: a checkpoint that came
late must not be one of half of a resync. With each attach the exports get new names: a stale primary that dials them
anew, and has not noticed yet that it is stale, finds nothing. While the standby waits, anything may happen: so each
command asks anew, when its turn has come, whether its connection is still the one.

A buffer without room fails the primary's writes, and the primary lets go and comes back with a resync. The checkpoint
stays as long as it can: only when the buffer becomes full in a resync as well, it is given up with the next `attach`.
Then there is no view until the next `commit`; but there is a way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import ssl
from collections.abc import Callable
from functools import partial
from typing import Final

from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.daemon.following import Following
from blockstep.daemon.good_end import follows
from blockstep.daemon.standby_setup import StandbyDisk
from blockstep.daemon.standby_status import Situation
from blockstep.drivers.replication import Stage
from blockstep.errors import BlockstepError, OptionError, ReplicationError
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server as NbdServer
from blockstep.nbd.uri import InetAddress
from blockstep.qmp.commands import core
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.schema import Monitor, Registry
from blockstep.qmp.server import Server as QmpServer
from blockstep.replication.comparison import CLUSTER, content
from blockstep.replication.registry import Check, ReplicationRegistry
from blockstep.replication.resize import check_growth, disks_of

#: What a buffer's file system says that has no more room, to all or to this user.
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


class PrimarysSide:
    """See the module. ``tell`` is called when the situation has changed; ``status`` is what the primary may ask for.

    ``refused`` is called with each error that the primary gets for a request to a disk.
    """

    def __init__(self, situation: Situation, graph: Graph, registry: ReplicationRegistry, following: Following,
                 tell: Callable[[], None], status: Callable[[], qmp.PairStatus],
                 refused: Callable[[StandbyDisk, OSError], None]) -> None:
        self._now, self._graph, self._registry, self._tell = situation, graph, registry, tell
        self._following = following
        self._status, self._refused = status, refused
        self._config = situation.config
        #: Where it listens; the control port is one above.
        self.port = 0
        self.server: NbdServer | None = None
        self._control: QmpServer | None = None
        self._cutting = asyncio.Lock()
        self._heard_at = 0.0
        #: What the names of the exports begin with, since the last attach.
        self._prefix = ""
        #: Whether the buffer has become full in a resync.
        self._no_room = False
        #: Which run of a primary is attached.
        self._wanted_instance = ""

    # --- start and stop ---

    async def listen(self, version: core.Version, tls: ssl.SSLContext | None) -> None:
        """Take the link's port and the one above it. Port 0: any two neighbours that are free. Raises OSError."""
        host, port = self._config.link.host, self._config.link.port
        for _ in range(64):
            server = NbdServer(tls="required" if tls else "off", tls_context=tls)
            (_, self.port), *_ = await server.start_tcp(host or None, port)
            control = QmpServer(Registry.of(qmp.peer_commands), self, version=version)
            try:
                await control.start_tcp(host or "::", self.port + 1, tls)
            except OSError:
                await server.stop()
                if port:
                    raise
            else:
                self.server, self._control = server, control
                return
        raise OptionError("--link", str(self._config.link), "an address with two free ports in a row")

    @property
    def address(self) -> str:
        """Where a primary finds this standby."""
        return str(InetAddress(self._config.link.host, self.port))

    async def close(self) -> None:
        """Listen no more; what the primary has sent is finished."""
        for server in (self._control, self.server):
            if server:
                await server.stop()
        await self._cut_links()

    # --- the primary's commands ---

    async def attach(self, args: qmp.AttachArguments, monitor: Monitor) -> qmp.Attached:
        """A primary presents itself. What another connection of the same primary still had is cut off."""
        now = self._now
        if now.declines():
            return self._decline()
        if now.ending:  # and may be taken back: the primary is to ask again
            raise BlockstepError(f"standby '{self._config.pair}' is just being "
                                 f"{'promoted' if now.ending == 'failover' else 'stopped'}")
        self._must_not_be_torn()
        self._check_primary(args, monitor)
        now.primary, now.primarys_faults = monitor, {}
        now.room.begin()
        self._tell()
        self._watcher = asyncio.get_running_loop().create_task(self._watch(monitor, args.silence))
        if self.server is None:
            raise BlockstepError("the standby is not ready")
        await self._cut_links()
        await self._registry.quiet()  # what the old connection asked for is done, or will be refused
        still = partial(self._must_be_primary, monitor, "attach")
        await self._fit({disk.name: disk.size for disk in args.disks}, still)
        if self._no_room:
            await self._give_up(still)
        await self._follow(args.instance, still)
        # While it waited the standby may have been promoted, or the primary may have come again: no way in then.
        if now.declines():
            return self._decline()
        still()
        now.mixed = True
        self._prefix = secrets.token_hex(8) + "/"
        for name, disk in now.disks.items():
            node = self._graph.find(f"{name}-secondary")
            # Below the copy-before-write filter, if there is one: it is put over the node's parents.
            top = disk.buffer.entrance if disk.buffer else node
            disk.link = self._graph.attach_backend(top, f"link of {name}", READ | WRITE)
            disk.link_name = self._prefix + name
            export = Export(disk.link_name, disk.link, description=f"pair {self._config.pair}, for the primary")
            export.on_error = partial(self._refused, disk)
            self.server.add(export)
        self._tell()
        return self._answer(True, "")

    def _decline(self) -> qmp.Attached:
        what = "was promoted" if self._now.promoted_to else "was stopped"
        return self._answer(False, f"standby '{self._config.pair}' {what}; it takes no primary any more")

    def _answer(self, accepted: bool, reason: str) -> qmp.Attached:
        return qmp.Attached(accepted=accepted, reason=reason, instance=self._now.instance, epoch=self._now.origin,
                            running=self._now.running, port=self.port, prefix=self._prefix,
                            buffer_limit=self._now.room.least)

    def _check_primary(self, args: qmp.AttachArguments, monitor: Monitor) -> None:
        now = self._now
        if args.pair != self._config.pair:
            raise OptionError("pair", args.pair, f"'{self._config.pair}', as this standby was told")
        if now.primary and now.primary is not monitor and args.instance != self._wanted_instance:
            raise BlockstepError(f"another primary, at {now.primary.peer}, is attached; stop it first")
        mine = {name: disk.view.length for name, disk in now.disks.items()}
        theirs = {disk.name: disk.size for disk in args.disks}
        if set(mine) != set(theirs):
            raise OptionError("disks", ", ".join(sorted(theirs)), f"those of this standby: {', '.join(sorted(mine))}")
        for name, size in theirs.items():
            if size < now.disks[name].primary_length:
                raise OptionError(f"size of disk '{name}'", size, f"{mine[name]} bytes, as the standby's is; let the "
                                  f"primary's grow to that (blockstep resize {name} {mine[name]})")
        self._wanted_instance = args.instance
        # From here on it may write to the disks: another one that committed before cannot tell any more what differs.
        same = args.instance == now.instance or follows(args.instance, now.instance)
        now.instance = args.instance if same else ""

    async def _follow(self, instance: str, still: Check) -> None:
        """Before this run of a primary may write to the disks, no note says that they follow another one."""
        if self._following.instance == instance:
            return
        try:
            if self._following.instance and self._now.instance:  # this run goes on where the other one has ended
                await self._following.keep(instance, self._now.origin, still)
            else:
                await self._following.forget()
        except OSError as error:
            raise BlockstepError(f"the standby cannot take back what it has written down: {error}") from error

    async def _give_up(self, still: Check) -> None:
        """The buffer has no room for what a resync changes: without the checkpoint none is needed."""
        now = self._now
        if now.running:
            try:
                await self._registry.give_up_all(still)
            finally:  # it has not been refused: also with an error there is none any more
                if any(disk.filter.stage is Stage.NONE for disk in now.disks.values()):
                    now.epoch = 0
                    now.last_error = "the checkpoint was given up: the buffer has no room for it and for a resync"
        self._no_room = False

    async def commit(self, epoch: int, monitor: Monitor) -> None:
        """Move the views of all disks forward, or of none. The first one is the start."""
        now = self._now
        still = partial(self._must_be_primary, monitor, "checkpoint")
        still()
        try:
            self._must_not_be_torn()
            if now.running:
                await self._registry.checkpoint_all(still)
            else:
                await self._registry.start_all("secondary", still)
        except BlockstepError as error:
            if self._is_primary(monitor):
                now.last_error = str(error)
                self._tell()
            raise
        if monitor is now.primary:  # else another has come meanwhile, whose disks these are not
            now.instance = self._wanted_instance
            now.committed_by, now.mixed = monitor, False
        now.epoch = now.origin = epoch
        now.committed_at = now.clock()
        now.last_error = ""
        self._no_room = False
        for disk in now.disks.values():
            disk.filter.error = None
            disk.errors.clear()
        self._tell()
        await self._registry.give_back_all()

    async def durable(self, args: qmp.DurableArguments) -> None:
        """What the last checkpoint holds is durable: from here on the disks follow that, also after a crash."""
        now, epoch = self._now, args.epoch

        def still() -> None:
            if args.prefix != self._prefix or now.shut or now.committed_by is not now.primary or epoch != now.epoch:
                raise ReplicationError(self._config.pair, "note", f"checkpoint {epoch} is not the last one of the "
                                       "primary that is attached")

        unnoted = ""
        try:
            await self._following.keep(now.instance, epoch, still)
        except OSError as error:
            unnoted = f"after a crash everything would be compared, as it cannot be written down what it has: {error}"
            raise BlockstepError(unnoted) from error
        finally:
            if unnoted != now.unnoted:
                now.unnoted = unnoted
                self._tell()

    async def digests(self, args: qmp.DigestsArguments) -> qmp.Digests:
        """What a disk holds, without the writes of the view, for a primary that is to copy what differs."""
        link = self._now.disks[args.disk].link if args.disk in self._now.disks else None
        if args.prefix != self._prefix or link is None:
            raise ReplicationError(self._config.pair, "compare", "only the primary that is attached may ask for it")
        end = args.offset + args.length
        if end > link.length or args.offset % CLUSTER or (end % CLUSTER and end != link.length):
            raise OptionError("offset, length", f"{args.offset}, {args.length}", f"a part of the disk's {link.length} "
                              f"bytes that begins and ends with {CLUSTER} bytes, or ends with the disk")
        try:
            zeroes, digests = await content(link, args.offset, args.length, args.key)
        except OSError as error:
            raise BlockstepError(f"disk '{args.disk}' of the standby: {error.strerror or error}") from error
        return qmp.Digests(zeroes=zeroes, digests=digests)

    async def resize_for_primary(self, args: qmp.PairResizeArguments, monitor: Monitor) -> None:
        """A disk, its buffers and its view grow, or get back the length before they did; all or none."""
        still = partial(self._must_be_primary, monitor, "resize")
        still()
        if args.disk not in self._now.disks:
            raise OptionError("disk", args.disk, f"one of {', '.join(self._now.disks)}")
        check_growth(args.now, args.size)
        self._now.disks[args.disk].primary_length = args.now
        await self._resize(args.disk, args.size, still)

    async def _fit(self, sizes: dict[str, int], still: Check) -> None:
        """Follow what became of the primary's disks while it was away."""
        for name, size in sizes.items():
            try:
                await self._resize(name, size, still)
            except OSError as error:
                length = self._now.disks[name].view.length
                raise OptionError(f"size of disk '{name}'", size, f"{length} bytes, as the "
                                  f"standby's is, which cannot grow: {error.strerror or error}") from error
            self._now.disks[name].primary_length = size

    async def _resize(self, name: str, size: int, still: Check) -> None:
        filter = self._now.disks[name].filter
        if any(disk.length != size for disk in disks_of(filter)):
            try:
                await self._registry.resize(filter, size, still)
            finally:
                self._tell()

    def _must_not_be_torn(self) -> None:
        """Where a file was cut off, a copy of what differs makes no disk, and a checkpoint would be of none."""
        for name, fault in self._now.files.torn.items():
            raise BlockstepError(f"disk '{name}' of the standby: {fault}; start the standby again, and all that "
                                 "differs is copied")

    def _is_primary(self, monitor: Monitor) -> bool:
        return monitor is self._now.primary and not self._now.shut

    def _must_be_primary(self, monitor: Monitor, step: str) -> None:
        if not self._is_primary(monitor):
            raise ReplicationError(self._config.pair, step, f"only the attached primary may ask for it "
                                   f"(the standby is {self._now.state})")

    # --- signs of life ---

    def heard(self, args: qmp.PairQueryArguments, monitor: Monitor) -> qmp.PairStatus:
        """A sign of life of somebody, who is told how it is, and of the primary how its files are."""
        now = self._now
        if monitor is now.primary:
            self._heard_at = now.clock()
            now.room.begin()
            faults = {disk.name: disk.fault for disk in args.faults}
            if faults != now.primarys_faults:
                now.primarys_faults = faults
                self._tell()
        return self._status()

    async def _watch(self, monitor: Monitor, silence: float) -> None:
        """See the primary go: its connection ends, or it is silent for too long and is cut off."""
        now = self._now
        self._heard_at = now.clock()
        while not monitor.gone.is_set():
            left = self._heard_at + silence - now.clock() if silence else None
            if left is not None and left <= 0:
                monitor.abort()
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await monitor.gone.wait()
        if monitor is now.primary:
            now.primary = None
            self._tell()

    def not_saved(self, error: OSError) -> None:
        """What a request of the primary overwrites could not be saved: the request fails for it."""
        if error.errno in _NO_ROOM and self._now.mixed:
            self._no_room = True

    # --- the way out ---

    async def revoke(self) -> None:
        """A primary's writes are refused from here on: at the border at once, then its connections are cut."""
        for disk in self._now.disks.values():
            if disk.link:
                disk.link.revoke(f"standby '{self._config.pair}' has been promoted")
        await self._cut_links()

    async def _cut_links(self) -> None:
        """Take the primary's exports away, and wait for what had been begun."""
        async with self._cutting:  # who comes second waits for the same requests
            for disk in self._now.disks.values():
                if disk.link and self.server:
                    await self.server.remove(disk.link_name, "hard")
                    await self._graph.detach_backend(disk.link)
                    disk.link = None
