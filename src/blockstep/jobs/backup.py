"""Backup: a copy of a source as it was at one moment, while it goes on being written to.

    guest ──► copy-before-write ──file──► source        before a cluster is overwritten, the guest's own write
                     └────target────────► target        copies it out; the job copies the rest

The moment is the drained section in which the filter is put over the source. What is copied: ``full``: everything;
``top``: what the source itself holds (its backing node is the target's too); ``bitmap``: the clusters that a dirty
bitmap says; ``none``: nothing but what is about to be overwritten: the target then holds what the source alone does
not have any more, and with ``none`` the job runs until it is cancelled.

A bitmap of the source starts anew at that moment. At the end it also gets back, as ``bitmap_mode`` says::

    on-success   if the job fails: all that it held
    always       what was not copied
    never        all that it held, in any case

With ``full`` and ``top`` a bitmap only takes part in this, so that the next backup can be one by bitmap.

All but ``none`` leave the target flushed when they succeed. The filter and this job take the same lock over a
cluster while they copy it, and share one bitmap of what is done. Several backups of one source work at a time, each
with its own filter, one over the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Final, Literal, Unpack

from blockstep.block.bitmap import Bitmap, CountedBitmap, DirtyBitmap
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.io import Backend, enter, leave
from blockstep.block.permissions import ALL, NONE, READ
from blockstep.block.status import backing_of
from blockstep.drivers.copy_before_write import CopyBeforeWrite
from blockstep.errors import OptionError
from blockstep.jobs.block_copy import BlockCopy, Control, Pass
from blockstep.jobs.job import Job, JobOptions
from blockstep.jobs.states import JobKind, OnError
from blockstep.jobs.sync import JobControl
from blockstep.units import KiB

Sync = Literal["full", "top", "bitmap", "none"]
BitmapMode = Literal["never", "on-success", "always"]

_SYNCS: Final = ("full", "top", "bitmap", "none")
#: What nobody else may do with the source; another backup may begin.
_BLOCKED: Final = ("remove", "resize", "mirror", "commit", "snapshot", "backup target")


class BackupJob(Job):
    """See the module."""

    kind: ClassVar[JobKind] = "backup"

    def __init__(
        self, id: str, graph: Graph, source: Driver, target: Driver, *, sync: Sync = "full",
        bitmap: DirtyBitmap | None = None, bitmap_mode: BitmapMode = "on-success", cluster_size: int = 64 * KiB,
        on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write",
        on_source_error: OnError | str = OnError.REPORT, on_target_error: OnError | str = OnError.REPORT,
        filter_node_name: str | None = None, internal: bool = False, workers: int = 4,
        target_is_zero: bool = False, detect_zeroes: bool = True, **options: Unpack[JobOptions],
    ) -> None:
        """``on_cbw_error``: what breaks when old content cannot be saved: the guest's write (the job goes on), or the
        snapshot (the job fails). ``internal``: blockers on the nodes do not apply. Raises OptionError.
        """
        if sync not in _SYNCS:
            raise OptionError("sync", sync, "full, top, bitmap or none")
        if bitmap is None and sync == "bitmap":
            raise OptionError("bitmap", None, "given with sync=bitmap")
        if bitmap is not None and (sync == "none" or (sync != "bitmap" and bitmap_mode == "never")):
            raise OptionError("bitmap", bitmap.name, f"left out: with sync={sync} and bitmap-mode={bitmap_mode} it "
                                                     "would learn nothing")
        if source is target:
            raise OptionError("target", target.name, "another node than the source")
        super().__init__(id, **options)
        self.graph, self.source, self.target = graph, source, target
        self.sync: Sync = sync
        self.bitmap = bitmap
        self.bitmap_mode: BitmapMode = bitmap_mode
        self.cluster_size = cluster_size
        self.internal = internal
        #: The filter, while the job has its nodes.
        self.filter: CopyBeforeWrite | None = None
        self.engine: BlockCopy | None = None
        self._filter_options = {"driver": "copy-before-write", "file": source.name, "target": target.name,
                                "on-cbw-error": on_cbw_error, "cluster-size": cluster_size,
                                **({"node-name": filter_node_name} if filter_node_name else {})}
        self._control = JobControl(self, OnError(on_source_error), OnError(on_target_error))
        self._workers, self._target_is_zero, self._detect_zeroes = workers, target_is_zero, detect_zeroes
        self._undo = AsyncExitStack()
        self._todo = CountedBitmap(0, cluster_size)
        self._was: Bitmap | None = None

    # --- setup ---

    async def setup(self) -> None:
        if not self.internal:
            self.source.check_operation("backup source")
            self.target.check_operation("backup target")
        bitmap = self.bitmap
        if bitmap is not None and bitmap.node is not self.source:
            raise OptionError("bitmap", bitmap.name, f"a bitmap of node '{self.source.name}'")
        if self.target.length < self.source.length:
            raise OptionError("target", self.target.name, f"at least {self.source.length} bytes long")
        async with AsyncExitStack() as undo:
            if bitmap is not None:
                undo.callback(bitmap.claim(f"job '{self.id}'", restores=self.bitmap_mode == "never"))
                bitmap.fit()
            node = await self.graph.open(self._filter_options, owned=False)
            assert isinstance(node, CopyBeforeWrite)
            undo.push_async_callback(self.graph.close_unused, node)
            node.owned = True  # by this job: it stays when the last user of the source goes
            undo.callback(setattr, node, "owned", False)
            undo.callback(node.block_operations(f"job '{self.id}' uses it"))
            doors = []
            for used in (self.source, self.target):
                # Only for drains: the requests are the filter's, on its edges.
                doors.append(self.graph.attach_backend(used, f"job '{self.id}'", NONE, ALL))
                undo.push_async_callback(self.graph.detach_backend, doors[-1])
            self.engine = _ClusterCopy(node, doors, self._control, self._workers, self._detect_zeroes,
                                       Bitmap(node.length, self.cluster_size) if self._target_is_zero else None,
                                       top_only=self.sync == "top")
            node.on_error = self._snapshot_failed
            # So that the filter holds its permissions also while the source has no user: nobody writes past it.
            reader = Backend(f"job '{self.id}'", node, READ, ALL)
            async with self.graph.drained(self.source):
                with self.graph.change() as change:
                    for edge in list(self.source.parents):
                        if edge.parent is not node and edge.parent not in doors:
                            change.move(edge, node)
                    change.attach_backend(reader)
                self._choose(node)
            undo.push_async_callback(self._take_out, node)
            undo.push_async_callback(self.graph.detach_backend, reader)
            undo.callback(self.source.block_operations(f"job '{self.id}' uses it", *_BLOCKED))
            undo.callback(self.target.block_operations(f"job '{self.id}' uses it"))
            self.filter = node
            self._undo = undo.pop_all()

    def _choose(self, node: CopyBeforeWrite) -> None:
        """The moment: nothing is in flight."""
        self._todo = CountedBitmap(node.length, self.cluster_size)
        if self.sync in ("full", "top"):
            self._todo.set(0, node.length)
        if self.bitmap is not None:
            self._was = self.bitmap.exchange()
        if self.sync != "bitmap":
            return
        assert self._was is not None
        self._todo.merge(self._was)
        # What is not in the bitmap need not be saved.
        node.done.set(0, node.length)
        for offset, length in self._todo.dirty():
            node.done.reset(offset, length)

    async def _take_out(self, node: CopyBeforeWrite) -> None:
        async with self.graph.drained(node):
            with self.graph.change() as change:
                change.replace(node, node.file.node)

    def _snapshot_failed(self, error: OSError) -> None:
        self.emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": "write", "action": "report"})
        self.kick()

    # --- the work ---

    async def run(self) -> None:
        assert self.filter is not None
        assert self.engine is not None
        while self.sync == "none" or self._todo.next_dirty(0, 1) is not None:
            await self.pause_point()
            self._check_snapshot()
            if self.sync == "none":
                await self.sleep()
            else:
                await self.engine.copy(Pass(self._todo))
        await self._flush(self.filter, self.engine.doors)
        self._check_snapshot()

    def _check_snapshot(self) -> None:
        if self.filter is not None and self.filter.broken is not None:
            raise self.filter.broken

    async def _flush(self, node: CopyBeforeWrite, doors: Sequence[Backend]) -> None:
        while True:
            await self.pause_point()
            await enter(*doors)
            try:
                await node.target.flush()
                return
            except OSError as error:
                failure = error
            finally:
                leave(*doors)
            await self._control.failed("write", failure)

    async def prepare(self) -> None:
        # Since the work ended the filter has gone on saving, into clusters that are all done.
        self._check_snapshot()

    async def clean(self) -> None:
        if self.bitmap is not None and self._was is not None:
            if self.bitmap_mode == "never" or (self.bitmap_mode == "on-success" and self.failed):
                self.bitmap.merge(self._was)
            elif self.bitmap_mode == "always" and self.filter is not None:
                self._give_back_rest(self.bitmap, self.filter)
        self.filter = None
        await self._undo.aclose()

    def _give_back_rest(self, bitmap: DirtyBitmap, node: CopyBeforeWrite) -> None:
        offset = 0
        for length, done in node.done.extents(0, node.length):
            if not done:
                bitmap.set(offset, length)
            offset += length

    # --- what others see ---

    def cancel_in_flight(self) -> None:
        cancel = getattr(self.target, "cancel_in_flight", None)
        if cancel is not None:
            cancel()

    @property
    def total(self) -> int:
        in_flight = self.engine.in_flight if self.engine is not None else 0
        return self.current + self._todo.count() + in_flight

    def block_info(self) -> dict[str, Any]:
        return {**super().block_info(), "sync": self.sync}


class _ClusterCopy(BlockCopy):
    """Copies the clusters that the filter has not saved yet, under the filter's lock."""

    def __init__(self, node: CopyBeforeWrite, doors: Sequence[Backend], control: Control, workers: int,
                 detect_zeroes: bool, written: Bitmap | None, top_only: bool) -> None:
        super().__init__(node.file, node.target, doors, control, granularity=node.done.granularity, workers=workers,
                         base=backing_of(node) if top_only else None, allocated_only=top_only,
                         detect_zeroes=detect_zeroes, lock=node.lock, written=written)
        self._done = node.done

    def wanted(self, offset: int, length: int) -> list[tuple[int, int]]:
        parts = []
        for count, done in self._done.extents(offset, length):
            if not done:
                parts.append((offset, count))
            offset += count
        return parts

    def finished(self, offset: int, length: int) -> None:
        self._done.set(offset, length)
