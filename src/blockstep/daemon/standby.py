"""``blockstep standby``: the disks that a primary writes to, and their view at the last checkpoint.

    the primary ──► PrimarysSide ──► ReplicationRegistry ──► the disks ──► views, for a guest
    operators   ──► Standby, Ends ────────┘                (standby_setup)
                           └── all of them write down in Situation what they know; status and events come from there

`standby_link` is what the primary may do; `standby_ends` how it ends, by a promotion or a stop; `standby_status` what
is known and how it is said. This module is the program: it opens and closes all of it, and operators talk to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Literal

from blockstep.aio.pool import in_thread
from blockstep.daemon import following, good_end, promotion
from blockstep.daemon.certificates import Certificates, of_server
from blockstep.daemon.disks import missing_last, serve, uris
from blockstep.daemon.files import Files
from blockstep.daemon.service import Service
from blockstep.daemon.standby_ends import Ends
from blockstep.daemon.standby_link import PrimarysSide
from blockstep.daemon.standby_setup import BUFFERS, StandbyConfig, StandbyDisk, open_disk
from blockstep.daemon.standby_status import Situation
from blockstep.drivers.replication import Stage
from blockstep.errors import BlockstepError, NodeNotFound, OperationBlocked, OptionError, noting
from blockstep.inventory.inventory import Inventory
from blockstep.inventory.nodes import tried
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server as NbdServer
from blockstep.nbd.tls import server_context
from blockstep.nbd.uri import Address
from blockstep.places import ENDED_SUFFIX, FOLLOWS_SUFFIX
from blockstep.qmp.commands import looking
from blockstep.qmp.commands import replication as qmp
from blockstep.replication.resize import check_growth, resize_together

__all__ = ["Standby", "StandbyConfig", "main"]

#: Errors of a request that say nothing about a disk.
_ASKED_WRONGLY: Final = {errno.EINVAL, errno.ENOTSUP, errno.ESHUTDOWN, errno.ECANCELED}


class Standby(Service):
    """The program. `open` starts to serve, `close` ends everything; between them it reacts."""

    def __init__(self, config: StandbyConfig, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(config.pair)
        self.config = config
        self.inventory = Inventory()
        self.inventory.on_event = self._happened
        self.graph, self.jobs, self.registry = self.inventory.graph, self.inventory.jobs, self.inventory.replication
        self._files = Files(self._files_changed, Certificates([*of_server(config.tls), *of_server(config.view_tls)]))
        self.situation = Situation(config, clock, self._files)
        self._good_end, self._follows = (config.state.with_name(f"{config.pair}{suffix}")
                                         for suffix in (ENDED_SUFFIX, FOLLOWS_SUFFIX))
        self.following = following.Following(self._follows, config.pair, self.graph, self.disks, self._files,
                                             lambda: self.situation.primary is not None)
        self.link = PrimarysSide(self.situation, self.graph, self.registry, self.following, self._tell, self.status,
                                 self._refused)
        self.ends = Ends(self.situation, self.graph, self.registry, self.link.revoke, self.following.forget, self.emit,
                         self._tell)
        self._clock = clock
        self._view_server: NbdServer | None = None
        self._addresses: list[Address] = []
        self._unfollowing: asyncio.Task[None] | None = None
        self._told: tuple[str, str, str] | None = None
        self._heard_of: OSError | None = None

    @property
    def disks(self) -> dict[str, StandbyDisk]:
        """The disks, by name."""
        return self.situation.disks

    # --- start and stop ---

    async def open(self) -> None:
        """Open the disks, serve the views, wait for a primary. Raises OptionError or OSError; then all is closed."""
        if self.config.state in (self._good_end, self._follows):
            raise OptionError("--state", str(self.config.state), "another name: in the file of this one is written "
                              "down what the disks were at an end in good order, or whom they follow")
        promotion.check(self.config.state, self.config.pair)
        end = await in_thread(good_end.read, self._good_end, self.config.pair, self.config.disks)
        followed = await in_thread(following.read, self._follows, self.config.pair, self.config.disks)
        try:
            for spec in missing_last(self.config.disks):
                disk = await open_disk(self.graph, self.config, spec)
                disk.filter.on_error = partial(self._not_saved, disk)
                self.disks[spec.name] = disk
                self._files.watch(spec.name, self.graph.find(f"{spec.name}-secondary"))
            for spec in self.config.disks:  # in the user's order
                self.disks[spec.name] = self.disks.pop(spec.name)
            if followed and followed == await in_thread(following.read, self._follows, self.config.pair,
                                                        self.config.disks, opened=True):
                self.situation.instance, self.situation.origin = followed.instance, followed.epoch
                await self.following.go_on(followed.instance)
            if end:
                await self._go_on(end)
            tls = server_context(self.config.tls, verify_peer=True, option="--tls") if self.config.tls else None
            await in_thread(good_end.forget, self._good_end)
            await self.link.listen(self.version, tls)
            await self._serve_views()
            await self.serve_qmp(self.config.qmp, qmp.commands, looking.commands)
            await in_thread(promotion.reserve, self.config.state)
        except BaseException as error:
            with noting(error):
                await self.close()
            raise

    async def _go_on(self, end: good_end.GoodEnd) -> None:
        """The disks are a checkpoint, unless a standby lacks something of them: go on with that one."""
        now = self.situation
        if end.epoch and not any(disk.lacks for disk in end.disks.values()):
            await self.registry.start_all("secondary")
            now.epoch = now.origin = end.epoch
            now.instance, now.committed_at = end.instance, now.clock() - end.age_now
            await self.following.forget()
            if end.instance:
                with contextlib.suppress(OSError):  # if it lasts, the next checkpoint tells
                    await self.following.keep(end.instance, end.epoch)

    async def _serve_views(self) -> None:
        folder = self.config.view_tls
        tls = server_context(folder, verify_peer=True, option="--export-tls") if folder else None
        self._view_server = NbdServer(tls="required" if tls else "off", tls_context=tls)
        for name, disk in self.disks.items():
            self._view_server.add(Export(name, disk.view, description=f"pair {self.config.pair}, standby's view"))
        self._addresses = await serve(self._view_server, self.config.view, self.config.view_given)

    async def close(self) -> None:
        """End everything, in good order: a standby that is stopped leaves its disks at the last checkpoint.

        Exports are drained; what the primary wrote since the checkpoint is undone by the same merge as after a
        failover, which is waited for; then the disks are flushed and closed. When all is closed, raises
        ReplicationError if the merge failed: a disk is torn; or OSError if one could not be flushed or closed in order.
        If all went well and the disks are the checkpoint, that is written down for the next start.
        """
        await self.link.close()
        if self._view_server:
            await self._view_server.stop()
        end = await self._end()
        torn = await self.ends.close()
        lost = [await tried(disk.filter, disk.view.flush()) for disk in self.disks.values()
                if disk.filter.stage is not Stage.NONE]
        await self.finish_qmp()
        await self._files.close()
        lost += [await tried(disk.filter, self.graph.detach_backend(disk.view)) for disk in self.disks.values()]
        for name in reversed(list(self.graph.nodes)):
            node = self.graph.nodes.get(name)
            if node and node.owned and not node.parents:
                ended = await tried(node, self.graph.close(node))
                if not name.endswith(BUFFERS):  # what they hold is nobody's by now, or a disk is torn
                    lost.append(ended)
        if self._unfollowing:
            await self._unfollowing
        await self.following.close()
        errors: list[Exception] = [*torn, *filter(None, lost)]
        if end and not errors and not self.situation.declines() and not self._files.faults:
            errors += await good_end.noted(self._good_end, end)
        reasons = [str(error) for error in errors]
        if not self.situation.epoch:
            reasons.append("there is no checkpoint that its disks could be at")
        self.emit(qmp.ReplicationEnded(pair=self.config.pair, role=self.situation.role, epoch=self.situation.epoch,
                                       reason="; ".join(reasons)))
        await self.stop_qmp()
        for error in errors:
            raise error

    async def _end(self) -> good_end.GoodEnd | None:
        """What the disks will be when their buffers are merged; None if that is no checkpoint, or cannot be said."""
        now = self.situation
        if not now.running or now.declines():
            return None
        disks: dict[str, good_end.DiskEnd] = {}
        written = False
        for name, disk in self.disks.items():
            end = good_end.disk_end(disk.spec, self.graph.find(f"{name}-secondary"))
            if end is None or disk.buffer is None:
                return None
            disks[name] = end
            written = written or await disk.buffer.view_is_written()
        # What was written here is merged as well: the disks are a view of the checkpoint, and not what it was then.
        return good_end.GoodEnd(self.config.pair, "" if written else now.instance, now.epoch, now.epoch,
                                now.clock() - now.committed_at, disks, now.epoch)

    # --- the operator's commands ---

    async def checkpoint(self) -> qmp.Committed:
        """Not here."""
        raise BlockstepError("checkpoints are taken on the primary; ask it")

    async def fail_over(self, to: Literal["checkpoint", "latest"]) -> qmp.Promoted:
        """Promote: see `qmp.replication_failover`."""
        started = self._clock()
        await self.ends.fail_over(to)
        seconds = self._clock() - started
        # Faults as far as they are known: whoever waits for the disks does not wait for another look.
        return qmp.Promoted(epoch=self.situation.epoch, seconds=seconds, exports=self.exports,
                            faults=self._files.told())

    async def resize(self, disk: str, size: int) -> None:
        """A promoted standby's disks can grow; before that it follows its primary."""
        if disk not in self.disks:
            raise NodeNotFound(disk)
        if not self.situation.declines():
            raise OperationBlocked(disk, "resize", "this is a standby; a resize is asked of its primary")
        top = self.graph.find(disk)
        top.check_operation("resize")
        check_growth(top.length, size)
        async with self.graph.drained(top):
            await resize_together([top], size)

    async def stop_replication(self) -> None:
        """The view becomes what the primary wrote last, and no primary is taken any more."""
        await self.ends.stop()

    # --- how it is ---

    @property
    def exports(self) -> list[str]:
        """The NBD URIs of the views."""
        return uris(self._addresses, self.disks, tls=self.config.view_tls is not None)

    async def look(self) -> None:
        """Find out how the disks' files are, and what room the buffers have."""
        await asyncio.gather(self._files.look(), self.situation.room.look())

    def status(self) -> qmp.PairStatus:
        """The truth, at once."""
        return self.situation.status(self.link.address, self.exports, self.jobs.list())

    def _not_saved(self, disk: StandbyDisk, error: OSError) -> None:
        self._heard_of = error  # the primary gets it as well, at once
        self.link.not_saved(error)
        self._note(disk, error.strerror or str(error))

    def _refused(self, disk: StandbyDisk, error: OSError) -> None:
        heard_of, self._heard_of = self._heard_of, None
        if error is not heard_of and error.errno not in _ASKED_WRONGLY and not self.situation.shut:
            self._note(disk, f"{disk.spec.path}: {error.strerror or error}")

    def _note(self, disk: StandbyDisk, reason: str) -> None:
        disk.errors.append(reason)
        del disk.errors[8:]
        self.emit(qmp.ReplicationIoError(pair=self.config.pair, disk=disk.spec.name, reason=reason))
        self._tell()

    def _happened(self, name: str, data: Mapping[str, Any]) -> None:
        self._tell()

    def _files_changed(self) -> None:
        if self._files.faults:  # what is on the disks may be anything
            self._unfollowing = asyncio.get_running_loop().create_task(self._unfollow())
        self._tell()

    async def _unfollow(self) -> None:
        with contextlib.suppress(OSError):  # then it becomes too old in some seconds
            await self.following.forget()

    def _tell(self) -> None:
        """Announce the state if it is news."""
        event = self.situation.event()
        news = event.state, event.health, event.reason
        if news != self._told:
            self._told = news
            self.emit(event)


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
