"""``blockstep primary``: serves a guest's disks, and keeps a standby of them.

    the guest ──► the disks and their links ──► StandbySide ──► the standby
                  (primary_setup)     └── Sync, Checkpoints act on them, as the coordinator says

`Primary` is the hands of a `Coordinator`: it turns what happens (connections, jobs, timers, commands) into events
and carries the resulting actions out. All decisions are in the coordinator; all waiting is here and in the parts:
`primary_standby` (the way to the standby), `primary_sync` (first sync and resync), `primary_checkpoints`, and
`primary_status`, which says how it is.

No request of the guest waits for the standby for longer than ``max-stall``: each link looks how long those have waited
that wait, each of its own requests has that deadline, and the standby is asked all the time whether it is there. After
that the pair lets go and goes on alone. (In a sync that holds the guest down to the speed of the link only the last one
counts: a standby that is slow is waited for.)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal

from blockstep.aio.pool import in_thread
from blockstep.block.bitmap import Bitmap
from blockstep.daemon import following, good_end, ledger, promotion
from blockstep.daemon.certificates import Certificates, of_client, of_server
from blockstep.daemon.disks import missing_last, serve, uris
from blockstep.daemon.files import Files
from blockstep.daemon.ledger import Ledger
from blockstep.daemon.primary_checkpoints import Checkpoints, ended
from blockstep.daemon.primary_setup import PrimaryConfig, PrimaryDisk, open_disk
from blockstep.daemon.primary_standby import StandbySide
from blockstep.daemon.primary_status import PrimaryStatus
from blockstep.daemon.primary_sync import Sync
from blockstep.daemon.service import Service
from blockstep.errors import BlockstepError, NodeNotFound, noting
from blockstep.inventory.inventory import Inventory
from blockstep.inventory.nodes import tried
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server as NbdServer
from blockstep.nbd.tls import server_context
from blockstep.nbd.uri import Address
from blockstep.places import FOLLOWS_SUFFIX, LACKS_SUFFIX
from blockstep.qmp.client import Connection
from blockstep.qmp.commands import looking
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.errors import CommandRefused
from blockstep.replication import coordinator as c
from blockstep.replication.link import GRANULARITY, LOOKS
from blockstep.replication.resize import check_growth, resize_together
from blockstep.streams import complain

__all__ = ["Primary", "PrimaryConfig", "main"]


class Primary(Service):
    """The program. `open` starts to serve, `close` ends everything."""

    def __init__(self, config: PrimaryConfig, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(config.pair)
        self.config = config
        self._clock = clock
        self.inventory = Inventory()
        self.graph, self.jobs = self.inventory.graph, self.inventory.jobs
        self.disks: dict[str, PrimaryDisk] = {}
        self.coordinator = c.Coordinator()
        self._files = Files(self._files_changed, Certificates([*of_client(config.tls), *of_server(config.export_tls)]))
        self.ledger = Ledger(config.qmp.with_name(f"{config.pair}{LACKS_SUFFIX}"), config.pair, self.graph, self.disks,
                             self._files)
        self.standby = StandbySide(config, self.graph, self.disks, self._files, self.ledger, self._post, self._spawn,
                                   self._report)
        self.sync = Sync(self.graph, self.jobs, self.disks, self.standby.content)
        self.checkpoints = Checkpoints(config, self.disks, self.standby, self.ledger, self._post,
                                       lambda: self.coordinator.state, self.emit, clock)
        self._status = PrimaryStatus(config, self.disks, self.coordinator, self.standby, self.checkpoints, self.sync,
                                     self._files, clock)
        self._server: NbdServer | None = None
        self._addresses: list[Address] = []
        self._tasks: set[asyncio.Task[None]] = set()
        #: The one that carries out what the coordinator awaits (attach, sync, checkpoint).
        self._action: asyncio.Task[None] | None = None
        self._cleanup: asyncio.Task[None] | None = None
        self._resizing = asyncio.Lock()
        self._looker: asyncio.TimerHandle | None = None
        #: The links know what the standby lacks, as far as anybody does.
        self._informed = False

    # --- start and stop ---

    async def open(self) -> None:
        """Open the disks and serve them; the standby is looked for meanwhile. Raises OptionError or OSError."""
        promotion.spare(self.config.state)
        end = await in_thread(good_end.read, self.config.state, self.config.pair, self.config.disks)
        try:
            self.standby.tls()  # certificates that are not there are the user's error now, not one of every attempt
            for spec in missing_last(self.config.disks):
                disk = await open_disk(self.graph, self.config, spec)
                disk.link.on_fail = partial(self._link_failed, spec.name)
                disk.link.on_written = self.checkpoints.written
                disk.link.on_trouble = partial(self._trouble, disk)
                self.disks[spec.name] = disk
                self._files.watch(spec.name, self.graph.find(f"{spec.name}-disk"))
            for spec in self.config.disks:  # in the user's order
                self.disks[spec.name] = self.disks.pop(spec.name)
            # Now that no other process has the disks any more that may have kept them.
            left = None if end else await in_thread(ledger.read, self.ledger.path, self.config.pair, self.config.disks)
            if end:
                self._go_on(end)
            elif left and await self._lost_nothing():
                self._go_on_with(*left)
            await in_thread(following.forget_if_of, self.config.state.with_name(f"{self.config.pair}{FOLLOWS_SUFFIX}"),
                            self.config.disks)
            self._informed = True
            self.ledger.note(instance=self.standby.known_as, durable=self.checkpoints.durable,
                             asked=self.coordinator.asked)
            await self._keep_books()
            folder = self.config.export_tls
            tls = server_context(folder, verify_peer=True, option="--export-tls") if folder else None
            await in_thread(good_end.forget, self.config.state)
            self._server = NbdServer(tls="required" if tls else "off", tls_context=tls)
            for name, disk in self.disks.items():
                self._server.add(Export(name, disk.backend, description=f"pair {self.config.pair}, primary"))
            self._addresses = await serve(self._server, self.config.export, self.config.export_given)
            await self.serve_qmp(self.config.qmp, qmp.commands, looking.commands)
        except BaseException as error:
            with noting(error):
                await self.close()
            raise
        self._act(self.coordinator.begin())
        self.checkpoints.schedule()
        self._look()

    def _go_on(self, end: good_end.GoodEnd) -> None:
        """What the standby lacked then is all that it lacks now; if it is the same standby, see `good_end`."""
        for name, disk in self.disks.items():
            if packed := end.disks[name].lacks:
                lacks = good_end.unpacked(packed, disk.link.length, GRANULARITY)
                if lacks is None:
                    return
                disk.link.since.merge(lacks)
        self.standby.go_on(end.instance)
        self.coordinator.epoch, self.coordinator.asked = end.epoch, end.asked
        self.checkpoints.durable = end.durable
        self.checkpoints.committed_before = self._clock() - end.age_now

    def _go_on_with(self, books: ledger.Books, bits: dict[str, Bitmap]) -> None:
        """Likewise, after the death of the process: see `blockstep.daemon.ledger`."""
        if books.lengths == {name: disk.link.length for name, disk in self.disks.items()}:
            for name, disk in self.disks.items():
                disk.link.since.merge(bits[name])
            self.standby.go_on(books.instance)
            self.coordinator.epoch = self.checkpoints.durable = books.durable
            self.coordinator.asked = books.asked

    async def _lost_nothing(self) -> bool:
        """Whether the disks have all that they were told: the process that has died may not have heard of a failure."""
        return not any([await tried(self.graph.find(f"{name}-disk"), disk.backend.flush())
                        for name, disk in self.disks.items()])

    async def _keep_books(self) -> None:
        try:
            await self.ledger.begin()
        except OSError as error:
            complain(f"blockstep: after a crash everything would be compared: {error}")

    async def close(self) -> None:
        """End everything, in good order: the standby's last checkpoint is the disks as they are in the end.

        Exports are drained, a last checkpoint is taken if there is a standby, then it is let go, and the disks are
        flushed and closed. If all that went well, what the standby lacks is written down for the next start.
        REPLICATION_ENDED, and a line on standard error, say it if the standby does not have everything. Raises
        OSError, when all is closed, if a disk could not be flushed or closed in order, or the note not be written.
        """
        self.checkpoints.close()
        if self._looker:
            self._looker.cancel()
        if self._server:
            await self._server.stop()
        missing = ""
        try:
            await self.checkpoint()
        except BlockstepError as refusal:
            missing = f"the standby lacks what was written last: {refusal}"
        await self.checkpoints.settled()
        in_pair = self._informed and self.coordinator.state not in (c.State.FENCED, c.State.STOPPED)
        self._act(self.coordinator.apply(c.Stop()))
        for task in list(self._tasks):
            task.cancel()
        if self._cleanup:
            await self._cleanup
        lost = [await tried(self.graph.find(f"{name}-disk"), disk.backend.flush())
                for name, disk in self.disks.items()]
        await self.finish_qmp()
        await self._files.close()
        end = self._end() if in_pair and not self._files.faults else None
        for name, disk in self.disks.items():
            storage = self.graph.find(f"{name}-disk")
            lost += [await tried(storage, self.graph.detach_backend(disk.backend)),
                     await tried(storage, self.graph.close(disk.link)), await tried(storage, self.graph.close(storage))]
        try:
            await self.ledger.close()
        except OSError as failure:
            lost.append(failure)
        errors = list(filter(None, lost))
        if end and not errors:
            errors += await good_end.noted(self.config.state, end)
        if self.qmp:
            if missing:
                complain(f"blockstep: {missing}")
            self.emit(qmp.ReplicationEnded(pair=self.config.pair, role="primary", epoch=self.coordinator.epoch,
                                           reason="; ".join(map(str, filter(None, [missing, *errors])))))
        await self.stop_qmp()
        for error in errors:
            raise error

    def _end(self) -> good_end.GoodEnd | None:
        """What the standby lacks of the disks; None if that cannot be said."""
        disks = {name: good_end.disk_end(disk.spec, self.graph.find(f"{name}-disk"), *disk.link.lacking())
                 for name, disk in self.disks.items()}
        ends = {name: end for name, end in disks.items() if end}
        epoch, asked = self.coordinator.epoch, self.coordinator.asked
        if len(ends) < len(disks):
            return None
        # A number that was never asked for is that of a standby's checkpoint of something else.
        return good_end.GoodEnd(self.config.pair, self.standby.known_as, epoch if epoch <= asked else 0, asked,
                                self.checkpoints.age, ends, self.checkpoints.durable)

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
                    self._begin(action.attempt, partial(self.checkpoints.take, action.attempt, action.epoch))
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

    async def _attach(self, attempt: int, delay: float) -> c.Event:
        await asyncio.sleep(delay)
        await ended(self._cleanup)
        answer = await self.standby.attach()
        if not answer["accepted"]:
            return c.Refused(answer["reason"])
        epoch, last, asked = answer["epoch"], self.coordinator.epoch, self.coordinator.asked
        # Older than the last one that is durable, or of a number that was never given: it is another standby's, or a
        # host was put back to an old snapshot.
        known = answer["instance"] == self.standby.instance and self.checkpoints.durable <= epoch <= asked
        self.coordinator.epoch = max(last, epoch)
        return c.Attached(attempt, full=not known)

    async def _sync(self, attempt: int, full: bool) -> c.Event:
        async with self._resizing:  # a disk that grew behind the back of its sync would lack its end on the standby
            await self.sync.begin(full)
        await self.sync.ended()
        return c.Synced(attempt)

    def _link_failed(self, disk: str, error: OSError) -> None:
        self._post(c.Failed(f"disk '{disk}' on the standby: {error.strerror or error}"))

    def _trouble(self, disk: PrimaryDisk) -> None:
        if disk.link.trouble:
            self._give_books_up()
            self.emit(qmp.ReplicationIoError(pair=self.config.pair, disk=disk.spec.name, reason=disk.reasons[-1]))
        self._report()

    def _files_changed(self) -> None:
        if self._files.faults:
            self._give_books_up()
        self._report()

    def _give_books_up(self) -> None:
        """A disk may not hold what it was told."""
        try:
            self.ledger.give_up()
        except OSError as error:
            complain(f"blockstep: {error}; remove that file before this program is started again")

    def _look(self) -> None:
        seconds = self.config.max_stall / LOOKS
        for disk in self.disks.values():
            disk.link.look(seconds, self.config.max_stall)
        self._looker = asyncio.get_running_loop().call_later(seconds, self._look)

    # --- letting go ---

    def _let_go(self, reason: str) -> None:
        """At once: writes go on alone, nobody waits. The rest of the clearing up follows."""
        for disk in self.disks.values():
            disk.link.switch_off()
        connections = self.standby.cut_off()
        self.checkpoints.give_up(reason)
        action, self._action = self._action, None
        if action:
            action.cancel()
        self.sync.cancel()
        before = self._cleanup
        self._cleanup = asyncio.get_running_loop().create_task(self._clear_up(connections, action, before))

    async def _clear_up(self, connections: list[Connection], action: asyncio.Task[None] | None,
                        before: asyncio.Task[None] | None) -> None:
        await ended(before)
        await ended(action)
        for connection in connections:
            await connection.close()
        await self.sync.cancelled()
        await self.checkpoints.settled()
        await self.standby.detach()

    # --- the operator's commands ---

    async def checkpoint(self) -> qmp.Committed:
        """A checkpoint now; several requests at a time are one."""
        if self.coordinator.state not in (c.State.REPLICATING, c.State.CHECKPOINTING):
            raise BlockstepError(f"no checkpoint can be taken: the pair is {self.coordinator.state.value}"
                                 f" ({self.coordinator.reason})")
        return await self.checkpoints.wanted()

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

        If one fails and the other cannot be put back, the error says so, and so does the status until it is made good:
        by the next resize, or when the standby is attached again.
        """
        if disk not in self.disks:
            raise NodeNotFound(disk)
        async with self._resizing:
            one = self.disks[disk]
            before = one.link.length
            check_growth(before, size)
            for node in (one.link, self.graph.find(f"{disk}-disk")):
                node.check_operation("resize")
            control = self.standby.control
            try:
                await self.standby.resize(disk, size)
                async with self.graph.drained(one.link):
                    self.ledger.forget()
                    try:
                        await resize_together([one.link], size)
                    finally:
                        await self._keep_books()
            except OSError as error:
                left = await self._take_back(disk, before, control)
                raise BlockstepError(f"disk '{disk}' of this side cannot grow: {error.strerror or error}; "
                                     f"{left}") from error
            except BlockstepError as error:
                raise BlockstepError(f"{error}; {await self._take_back(disk, before, control)}") from error
            one.wrong = ""
            for connection in (one.standby, one.sync):
                if connection and self.standby.control is control:  # else it is another one's, with a length of its own
                    connection.has_grown(size)

    async def _take_back(self, disk: str, before: int, asked: Connection | None) -> str:
        """After a growth that failed: let the standby's disk be as this side's. Returns how it is then, in words.

        ``asked``: the standby that may have grown.
        """
        one = self.disks[disk]
        left = f"it has {one.link.length} bytes on this side"
        if one.link.length != before:
            self._post(c.Failed(f"disk '{disk}': a resize failed, and {left}: the standby has to follow"))
            return left
        if asked and self.standby.control is None:
            return f"{left}; the standby, which is gone, gets the same when it is attached again"
        try:
            await self.standby.resize(disk, before)
        except BlockstepError as error:
            one.wrong = f"{left}, and {error}"
            if not isinstance(error.__cause__, CommandRefused):
                self._post(c.Failed(f"disk '{disk}': a resize failed: {one.wrong}"))
            self._report()
            return one.wrong
        return f"the disk has {before} bytes, as before"

    # --- how it is ---

    def _report(self) -> None:
        self.emit(self._status.event())

    async def look(self) -> None:
        """Find out how the disks' files are."""
        await self._files.look()

    def status(self) -> qmp.PairStatus:
        """The truth, at once."""
        return self._status.status(uris(self._addresses, self.disks, tls=self.config.export_tls is not None))


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
