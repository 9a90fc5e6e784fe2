"""What mirror and commit have in common: bring a target in sync with a source that is being written to, then pivot.

    setup     users on both ends, blockers; in a drained section: the Tracker begins to watch the source
    run       pass after pass over what is dirty ──► flush ──► ready (active jobs) ──► until complete
              │      ▲
              └──────┘ the guest writes: its clusters are dirty again
    prepare   drained: what is still dirty, flush, the pivot's change of the graph (checked, and kept to be undone)
    commit    the drained section ends: the guest's held requests go to where the pivot has put them

The guest waits only in the last section, for what is dirty then: at most `FINAL` bytes, and one flush that has
little left to do, because one was done just before. If the guest writes so fast that passes do not get shorter, a
`mirror-top` filter makes its writes go to both ends from then on (copy mode *write-blocking*): then what is dirty
can only get less, whatever the guest does.

The bits are reset when a range is taken, before its content is looked at; a write that ends later sets them
again. So a range that is clean and not in flight is in sync.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final, Literal, Unpack

from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import Driver
from blockstep.block.graph import Change, Graph
from blockstep.block.io import Backend, enter, leave
from blockstep.block.names import check_name
from blockstep.block.node import Child
from blockstep.block.permissions import ALL, NONE, READ, RESIZE, Permission, Role
from blockstep.block.status import status_through
from blockstep.errors import OptionError
from blockstep.jobs.block_copy import BlockCopy, Control, Pass, Side
from blockstep.jobs.job import Job, JobOptions
from blockstep.jobs.mirror_top import MirrorTop, MirrorTopOptions, Tracker
from blockstep.jobs.states import JobStatus, OnError
from blockstep.units import KiB, MiB

CopyMode = Literal["background", "write-blocking"]

#: As little as this may be copied while the guest waits, in bytes.
FINAL: Final = 8 * MiB
#: After so many passes that did not halve what is dirty, writes go to both ends.
_PATIENCE: Final = 3
#: Bytes whose block status is asked at a time, at least; some milliseconds where every 4 KiB is an extent of its own.
_WINDOW: Final = 8 * MiB
#: Seconds between two passes of a ready job over what the guest goes on writing.
_IDLE: Final = 0.1


class JobControl(Control):
    """A job's say in its copy."""

    def __init__(self, job: Job, on_source_error: OnError, on_target_error: OnError) -> None:
        self.job = job
        #: How many ranges have failed so far.
        self.failures = 0
        self.policies: dict[Side, OnError] = {"read": on_source_error, "write": on_target_error}

    async def pause_point(self) -> None:
        await self.job.pause_point()

    async def throttle(self, count: int) -> None:
        await self.job.throttle(count)

    def began(self) -> None:
        self.job.enter_busy()

    def ended(self) -> None:
        self.job.leave_busy()

    def copied(self, count: int) -> None:
        self.job.copied(count)

    async def failed(self, side: Side, error: OSError) -> None:
        self.failures += 1
        await self.job.met_error(side, error, self.policies[side])


class SyncJob(Job):
    """See the module. A kind says which nodes, what is dirty at the beginning, and what the pivot is."""

    def __init__(
        self, id: str, graph: Graph, source: Driver, target: Driver, *, copy_mode: CopyMode = "background",
        granularity: int = 64 * KiB, auto_complete: bool = False, internal: bool = False,
        on_source_error: OnError | str = OnError.REPORT, on_target_error: OnError | str = OnError.REPORT,
        workers: int = 4, pivot: bool | Callable[[Change], None] = False, replace_in: Child | None = None,
        filter_node_name: str | None = None, **options: Unpack[JobOptions],
    ) -> None:
        """``filter_node_name``: put the filter over the source from the beginning, under this name."""
        if source is target:
            raise OptionError("target", target.name, "another node than the source")
        if granularity < 512 or granularity & (granularity - 1) or granularity > 64 * MiB:
            raise OptionError("granularity", granularity, "a power of two from 512 to 64M")
        if filter_node_name is not None:
            check_name("filter-node-name", filter_node_name)
        if copy_mode not in ("background", "write-blocking"):
            raise OptionError("copy-mode", copy_mode, "background or write-blocking")
        super().__init__(id, **options)
        self.graph, self.source, self.target = graph, source, target
        self.copy_mode: CopyMode = copy_mode
        self.granularity = granularity
        self.auto_complete = auto_complete
        self.internal = internal
        self.pivot = pivot
        self.replace_in = replace_in
        self.filter_node_name = filter_node_name
        self.dirty = Tracker(0, granularity)
        self.filter: MirrorTop | None = None
        self.engine: BlockCopy | None = None
        self._control = JobControl(self, OnError(on_source_error), OnError(on_target_error))
        self._workers = workers
        self._undo = AsyncExitStack()
        self._drained = AsyncExitStack()
        self._change: Change | None = None
        self._target_failure: OSError | None = None
        self._lock = RangeLock()
        self._soft_cancelled = False

    # --- what a kind of job says ---

    #: What the job takes from, and shares on, the target.
    target_permissions: tuple[Permission, Permission]
    #: Whether there is a ready state, ended by `complete`.
    has_ready = True

    def check(self) -> None:
        """Refuse what cannot work, before anything is changed. Raises OptionError or GraphError."""

    async def take_more(self, undo: AsyncExitStack) -> None:
        """What this kind needs beside the two users (a reopen)."""

    def make_engine(self, source: Backend, target: Backend) -> BlockCopy:
        """The copy, as this kind wants it."""
        raise NotImplementedError

    async def fill(self) -> None:
        """Mark in `dirty` what has to be copied. The tracker watches already."""

    async def fill_allocated(self, base: Driver | None) -> None:
        """Mark what the source, or a layer between it and ``base``, holds."""
        offset, window = 0, _WINDOW
        while offset < self.source.length:
            await self.pause_point()
            source = self._backends[0]
            await enter(source)
            try:
                extents = await status_through(source.node, offset, min(window, self.source.length - offset), base)
            except OSError as error:
                await self._control.failed("read", error)
                continue
            finally:
                leave(source)
            for extent in extents:
                if extent.allocated or extent.zero:
                    self.dirty.set(offset, extent.length)
                offset += extent.length
            window = min(window * 2, _WINDOW << 8) if len(extents) < 64 else _WINDOW
            await asyncio.sleep(0)

    def synced(self) -> None:
        """The target has all that the source has, and it is durable; nothing is in flight. The last step."""

    # --- setup ---

    async def setup(self) -> None:
        if not self.internal:
            self.source.check_operation(self.kind)
            self.target.check_operation(self.kind)
        self.check()
        async with AsyncExitStack() as undo:
            await self.take_more(undo)
            taken, shared = self.target_permissions
            target = self._user(self.target, "target", taken, shared)
            undo.push_async_callback(self.graph.detach_backend, target)
            source = self._user(self.source, "source", READ, ALL & ~RESIZE)  # what is dirty is noted for this length
            undo.push_async_callback(self.graph.detach_backend, source)
            self._backends = source, target
            for node in self.uses():
                undo.callback(node.block_operations(f"job '{self.id}' uses it"))
            self.dirty = Tracker(self.source.length, self.granularity)
            async with self.graph.drained(self.source):
                self.source.watch(self.dirty)
            undo.callback(self.source.unwatch, self.dirty)
            self.engine = self.make_engine(source, target)
            undo.push_async_callback(self._remove_filter)
            if self.filter_node_name is not None:
                await self._insert_filter(self.filter_node_name)
            if self.copy_mode == "write-blocking":
                await self._block_writes()
            self._undo = undo.pop_all()

    def _user(self, node: Driver, what: str, taken: Permission, shared: Permission) -> Backend:
        return self.graph.attach_backend(node, f"job '{self.id}', {what}", taken, shared)

    def uses(self) -> list[Driver]:
        """The nodes on which other operations are blocked."""
        return [self.source, self.target]

    async def _block_writes(self) -> None:
        """From now on the guest's writes go to both ends."""
        if self.filter is None:
            await self._insert_filter(f"#mirror-top-{self.id}")
        assert self.filter is not None
        if self.filter.tracker is None:
            async with self.graph.drained(self.filter):
                self.filter.tracker = self.dirty
            self.copy_mode = "write-blocking"

    async def _insert_filter(self, name: str) -> None:
        """Put a filter over the source that does nothing yet."""
        assert self.engine is not None
        if self.graph.is_taken(name):
            raise OptionError("filter-node-name", name, "a name that no other node has")
        node = MirrorTop(name, MirrorTopOptions(file=self.source.name, target=self.target.name))
        node.lock, node.written, node.on_target_error = self._lock, self.engine.written, self._target_failed
        node.on_event = self.graph.report
        self.graph.nodes[name] = node
        try:
            async with self.graph.drained(self.source):
                with self.graph.change() as change:
                    change.attach(node, "file", Role.FILTERED, self.source)
                    change.attach(node, "target", Role.TARGET, self.target)
                    self._move_parents(change, self.source, node, keep=node)
        except BaseException:
            del self.graph.nodes[name]
            raise
        node.owned = True  # by this job: it stays when the last user of the source goes
        node.block_operations(f"job '{self.id}' uses it")
        self.filter = node

    async def _remove_filter(self) -> None:
        if self.filter is not None:
            node, self.filter = self.filter, None
            node.owned = False
            async with self.graph.drained(node):
                node.tracker = None
                with self.graph.change() as change:
                    self._move_parents(change, node, self.source)
            await self.graph.close_unused(node)

    def _move_parents(self, change: Change, old: Driver, new: Driver, keep: Driver | None = None) -> None:
        """Put ``new`` under the parents of ``old``, but for the job and ``keep``."""
        for edge in list(old.parents):
            if edge.parent is not keep and edge.parent not in self._backends:
                change.move(edge, new)

    def _target_failed(self, error: OSError) -> None:
        self._target_failure = error
        self.kick()

    # --- the work ---

    async def run(self) -> None:
        await self.fill()
        await self._converge()
        await self._flush()
        if self.has_ready and not self.auto_complete:
            self.ready()
            while not self._should_complete:
                await self.pause_point()
                await self._blame()
                if self.copy_mode == "write-blocking":
                    await self._block_writes()
                if self.dirty.next_dirty(0, 1) is not None:
                    await self._copy_dirty()
                    await self._unless_completing(_IDLE)
                else:
                    self.dirty.on_dirty = self.kick
                    await self._unless_completing(None)
            await self.pause_point()
            await self._converge()
        await self._blame()

    async def _unless_completing(self, seconds: float | None) -> None:
        if not self._should_complete and not self.cancelled:
            await self.sleep(seconds)

    async def _converge(self) -> None:
        """Pass after pass, until what is dirty is little enough to be copied while the guest waits."""
        patience = _PATIENCE
        left = self.dirty.count()
        while left:
            if self.copy_mode == "write-blocking":
                await self._block_writes()
            failures = self._control.failures
            await self._copy_dirty()
            await self._blame()
            before, left = left, self.dirty.count()
            if before <= FINAL and left <= FINAL and failures == self._control.failures:
                return
            if left > before // 2:
                patience -= 1
                if patience <= 0 and self.may_block_writes:
                    await self._block_writes()

    @property
    def may_block_writes(self) -> bool:
        """Whether the job may choose the copy mode write-blocking by itself: once somebody waits for its end."""
        return self._should_complete or self.auto_complete or not self.has_ready

    async def _copy_dirty(self) -> None:
        assert self.engine is not None
        await self.engine.copy(Pass(self.dirty))

    async def _blame(self) -> None:
        """A guest's write could not be mirrored: what the policy says about that."""
        if self._target_failure is not None:
            error, self._target_failure = self._target_failure, None
            await self._control.failed("write", error)
            await self.pause_point()

    async def _flush(self) -> None:
        """Make the target durable; also when nothing was copied, for what others have written before."""
        while True:
            await self.pause_point()
            try:
                await self._backends[1].flush()
                return
            except OSError as error:
                await self._control.failed("write", error)

    # --- the end ---

    async def prepare(self) -> None:
        await self._converge()
        await self._flush()
        async with AsyncExitStack() as drained:
            await drained.enter_async_context(self.graph.drained(self.source))
            # The job is a user of the drained nodes too, and the only one that may go on.
            for backend in self._backends:
                if any(node is self.source for node in (backend.node, *backend.node.below())):
                    backend.resume()
                    drained.callback(backend.pause)
            while self.dirty.next_dirty(0, 1) is not None:
                await self._copy_dirty()
            await self._flush()
            await self.pause_point()
            if self.pivot and not self._soft_cancelled:
                self._change = self._make_pivot()
            self._drained = drained.pop_all()

    def _make_pivot(self) -> Change:
        """Move the parents, checked, but ready to be undone until `commit`."""
        change = Change()
        try:
            for backend in self._backends:
                change.take(backend.edge, NONE, ALL)
            if self.replace_in is not None:
                change.move(self.replace_in, self.target)
            else:
                self._move_parents(change, self.replaced, self.target)
            if callable(self.pivot):
                self.pivot(change)
            change.finish()
        except BaseException:
            change.rollback()
            raise
        return change

    @property
    def replaced(self) -> Driver:
        """The node whose place the target takes in the pivot."""
        return self.filter if self.filter is not None else self.source

    async def commit(self) -> None:
        self._change = None
        try:
            self.synced()
        finally:
            await self._drained.aclose()

    async def abort(self) -> None:
        try:
            if self._change is not None:
                self._change.rollback()
        finally:
            await self._drained.aclose()

    async def clean(self) -> None:
        await self._undo.aclose()

    # --- verbs ---

    def accepts_cancel(self) -> bool:
        if self.status not in (JobStatus.READY, JobStatus.STANDBY):
            return True
        self._soft_cancelled = True
        return False

    def cancel_in_flight(self) -> None:
        cancel = getattr(self.target, "cancel_in_flight", None)
        if cancel is not None:
            cancel()

    def change_option(self, name: str, value: Any) -> None:
        if name != "copy_mode":
            super().change_option(name, value)
        if value not in ("background", "write-blocking") or (value, self.copy_mode) == ("background", "write-blocking"):
            raise OptionError("copy-mode", value, "write-blocking: there is no way back")
        self.copy_mode = value
        self.kick()

    @property
    def left(self) -> int:
        """Bytes that the target may lack."""
        in_flight = self.engine.in_flight if self.engine is not None else 0
        return self.dirty.count() + in_flight

    @property
    def total(self) -> int:
        return self.current + self.left

    @property
    def actively_synced(self) -> bool:
        """Whether both ends are the same and stay so."""
        return self.filter is not None and self.filter.tracker is not None and not self.dirty.bits.any()

    def block_info(self) -> dict[str, Any]:
        return {**super().block_info(), "actively-synced": self.actively_synced}
