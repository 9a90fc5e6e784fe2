"""The disk buffer that keeps a checkpoint in an *active* and a *hidden* disk.

    primary's export ──► copy-before-write ──file──► secondary disk
                              └─target─► hidden ─────backing──┘
    view ──► replication ──► active ──backing──┘

The old content of what the primary overwrites is saved in the hidden disk, the standby's own writes go to the active
disk; so active over hidden over secondary is the last checkpoint plus the standby's own writes, always.

* A checkpoint empties both, and forgets what was saved: constant time, whatever they hold.
* `drop` puts the secondary disk itself under the filter.
* `fail_over` takes the copy-before-write away and merges active and hidden into the secondary disk, with a commit
  job, while the view is read and written; then the secondary disk takes the active disk's place. Each of its steps
  can be done again: after one that failed, `fail_over` goes on where it was, and a merge that failed begins anew.

What it changed to do its work it puts back in the end: read-only flags, blocked operations.

Durable: nothing before the commit job has ended. After a crash the secondary disk holds what the primary wrote, and
the hidden disk may lack what was saved last. This is what a journal of epochs is to repair.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import Driver, Prepared
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.node import Node
from blockstep.block.permissions import WRITE
from blockstep.block.status import allocated_above
from blockstep.drivers.copy_before_write import CopyBeforeWrite
from blockstep.drivers.overlay import Overlay
from blockstep.drivers.replication import Replication, Stage
from blockstep.errors import BlockstepError, ReplicationError, noting
from blockstep.jobs.commit import CommitJob
from blockstep.jobs.registry import JobRegistry

if TYPE_CHECKING:
    from blockstep.jobs.job import Job

#: Bytes saved at a time at the least. Small, so that a first 4k write after a checkpoint saves 4k and not more.
CLUSTER_SIZE = 4096


class HiddenDiskBuffer:
    """The disk buffer of one filter. Made by `open`; satisfies `DiskBuffer`."""

    def __init__(self, graph: Graph, jobs: JobRegistry, filter: Replication) -> None:
        self._graph = graph
        self._jobs = jobs
        self._filter = filter
        self._undo: list[Callable[[], Any]] = []
        self._commit: Job | None = None
        self._waiter: asyncio.Task[None] | None = None
        #: No merge runs: not begun, or it has ended and all is put back.
        self._settled = asyncio.Event()
        self._settled.set()
        self.view_lock = RangeLock()
        self.view_alignment = 65536

    @classmethod
    async def open(cls, graph: Graph, jobs: JobRegistry, filter: Replication) -> HiddenDiskBuffer:
        """Check everything that a secondary needs, and start to save. Raises ReplicationError; then nothing changed."""
        buffer = cls(graph, jobs, filter)
        buffer._find_disks()
        try:
            await buffer._set_up()
        except BaseException as error:
            with noting(error):
                await buffer.undo()
            if isinstance(error, ReplicationError) or not isinstance(error, BlockstepError | OSError):
                raise
            raise ReplicationError(filter.name, "start", str(error)) from error
        return buffer

    # --- start ---

    def _find_disks(self) -> None:
        refuse = self._refuse
        active = self._filter.file.node
        hidden = active.children["backing"].node if "backing" in active.children else refuse(
            f"the active disk '{active.name}' has no backing node; it should be the hidden disk")
        secondary = hidden.children["backing"].node if "backing" in hidden.children else refuse(
            f"the hidden disk '{hidden.name}' has no backing node; it should be the secondary disk")
        if not (secondary.owned or any(isinstance(edge.parent, Backend) for edge in secondary.parents)):
            refuse(f"the secondary disk '{secondary.name}' is not exported and has no name to be exported by")
        if not active.length == hidden.length == secondary.length:
            refuse(f"the active disk '{active.name}' ({active.length} bytes), the hidden disk '{hidden.name}' "
                   f"({hidden.length}) and the secondary disk '{secondary.name}' ({secondary.length}) "
                   "must have the same length")
        for disk in (active, hidden):
            if not disk.can_be_emptied:
                refuse(f"'{disk.name}' (driver {disk.driver}) cannot be emptied; use an overlay")
        top_id = self._filter.options.top_id
        top = self._graph.nodes.get(top_id or "")
        if top is None:
            raise self._error(f"top-id '{top_id}' is not a node")
        if any(isinstance(edge.parent, Node) for edge in top.parents):
            refuse(f"top-id '{top_id}' is not a root node")
        if top is not self._filter and self._filter not in top.below():
            refuse(f"top-id '{top_id}' does not have the filter among its descendants")
        self.active, self.hidden, self.secondary, self.top = active, hidden, secondary, top

    async def _set_up(self) -> None:
        frozen = [node for disk in (self.hidden, self.secondary) for node in disk.stored_in() if node.read_only]
        await self._graph.reopen([(node, {"read-only": False}) for node in frozen])
        if frozen:
            self._undo.append(lambda: self._freeze(frozen))
        self._block_operations()
        node = await self._graph.insert_filter(
            {"driver": "copy-before-write", "file": self.secondary.name, "target": self.hidden.name,
             "cluster-size": CLUSTER_SIZE}, self.secondary)
        assert isinstance(node, CopyBeforeWrite)
        node.owned = True  # by this buffer: it stays when the primary's export goes
        node.block_operations(f"'{self._filter.name}' keeps its checkpoint with it")
        self.cbw = node
        node.on_error = self._filter.fail
        self.view_lock = node.lock
        self._undo.append(self._remove_cbw)
        self.view_alignment = self.active.cluster_size

    def _block_operations(self) -> None:
        self._undo.append(self.top.block_operations(f"it is replicated by '{self._filter.name}'"))

    async def _freeze(self, nodes: list[Driver]) -> None:
        """Make read-only again what is still open, except a secondary disk that the view now writes to."""
        written = self._filter.stage is Stage.FAILOVER_FAILED or bool(self.secondary.cumulative()[0] & WRITE)
        in_use = set(self.secondary.stored_in()) if written else set()
        await self._graph.reopen([(node, {"read-only": True}) for node in nodes
                                  if self._graph.nodes.get(node.name) is node and node not in in_use])

    async def _remove_cbw(self) -> None:
        self.cbw.owned = False
        if self._graph.nodes.get(self.cbw.name) is self.cbw:  # else only its end had failed
            await self._graph.remove_filter(self.cbw)

    async def undo(self) -> None:
        """Undo what start did, last first."""
        while self._undo:
            result = self._undo.pop()()
            if result is not None:
                await result

    # --- checkpoint ---

    async def prepare_checkpoint(self) -> Prepared:
        """See `DiskBuffer`. Raises ReplicationError that names the step and the node."""
        prepared: list[Prepared] = []
        for disk, what in ((self.active, "active"), (self.hidden, "hidden")):
            try:
                prepared.append(await disk.prepare_empty())
            except BaseException as error:
                for one in prepared:
                    one.abort()
                if not isinstance(error, OSError):
                    raise
                raise ReplicationError(
                    self._filter.name, "checkpoint", f"cannot empty the {what} disk '{disk.name}': {error}"
                ) from error

        def commit() -> None:
            self.cbw.forget()
            for one in prepared:
                one.commit()

        def abort() -> None:
            for one in prepared:
                one.abort()

        return Prepared(commit, abort)

    async def give_back(self) -> None:
        """See `DiskBuffer`. An image that was emptied keeps what it held until it is flushed."""
        for disk in (self.hidden, self.active):
            with contextlib.suppress(OSError):
                await disk.flush()

    # --- the two ends ---

    async def drop(self) -> None:
        """See `DiskBuffer`. What active and hidden disk hold is not erased: nobody looks at it any more."""
        async with self._graph.drained(self._filter, self.secondary):
            with self._graph.change() as change:
                change.replace(self.cbw, self.secondary)
                change.move(self._filter.file, self.secondary)
            self._undo.remove(self._remove_cbw)
            self.cbw.owned = False
            self._finish()
        try:
            await self._graph.close_unused(self.cbw)
            await self._graph.close_unused(self.active)
        finally:
            await self.undo()

    async def fail_over(self) -> None:
        """See `DiskBuffer`. Returns when the view can be used; the merge goes on as a job named ``failover-NODE``.

        A merge that cannot even begin is one that failed: the view lives on, and nothing is raised.
        """
        if self._filter.stage is Stage.FAILOVER_FAILED:
            self._block_operations()
            async with self._graph.drained(self._filter):
                self._begin()
        else:
            self.revoke_writers()
            if self._remove_cbw in self._undo:
                await self._remove_cbw()
                self._undo.remove(self._remove_cbw)
            self._begin()
        try:
            self._commit = await self._jobs.create(CommitJob(
                f"failover-{self._filter.name}", self._graph, self.active, self.secondary, active=True,
                auto_complete=True, replace_in=self._filter.file, internal=True))
        except BaseException as error:
            await self._merged(error)
            if not isinstance(error, BlockstepError | OSError):
                raise
        else:
            self._waiter = asyncio.get_running_loop().create_task(self._committed(self._commit))

    def _begin(self) -> None:
        self._settled.clear()
        self._filter.enter(Stage.FAILOVER)

    def revoke_writers(self) -> None:
        """From now on nobody but the view writes to the secondary disk: an old primary is refused."""
        for edge in [*self.cbw.parents, *self.secondary.parents]:
            if isinstance(edge.parent, Backend) and edge.taken & WRITE:
                edge.parent.revoke("this standby has been promoted")

    async def _committed(self, commit: Job) -> None:
        error = await commit.wait()
        self._commit = None
        await self._merged(error)

    async def _merged(self, error: BaseException | None) -> None:
        if error is None:
            self._finish()
        else:
            # Drained, as on the way back: a write that goes past the active disk must not be in flight beside one
            # that copies its cluster up.
            async with self._graph.drained(self._filter):
                self._filter.enter(Stage.FAILOVER_FAILED)
            self._fail(error)
        try:
            await self.undo()
        except (BlockstepError, OSError) as failure:  # the flags of a file that cannot be opened anew
            self._fail(failure)
        finally:
            self._settled.set()

    def _fail(self, error: BaseException) -> None:
        self._filter.fail(error if isinstance(error, OSError) else OSError(errno.EIO, str(error) or repr(error)))

    def _finish(self) -> None:
        self._filter.buffer = None
        self._filter.enter(Stage.DONE)

    async def merged(self) -> None:
        """See `DiskBuffer`."""
        await self._settled.wait()

    async def give_up(self) -> None:
        """See `DiskBuffer`."""
        await self.undo()
        async with self._graph.drained(self._filter):  # requests of the view are at the files yet
            await self.active.make_empty()
            await self.hidden.make_empty()
        await self.give_back()

    async def close(self) -> None:
        """See `DiskBuffer`."""
        if self._commit:
            self._commit.end(force=True)
            await self.merged()
        elif self._filter.stage is Stage.RUNNING:
            await self.drop()

    async def split(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See `DiskBuffer`."""
        return await allocated_above(self.active, self.secondary, offset, length)

    async def view_is_written(self) -> bool:
        """See `DiskBuffer`."""
        return any(held for _, held in await allocated_above(self.active, self.hidden, 0, self.active.length))

    @property
    def entrance(self) -> Driver:
        """See `DiskBuffer`."""
        return self.cbw

    @property
    def used(self) -> int:
        """See `DiskBuffer`."""
        return self.hidden.used if isinstance(self.hidden, Overlay) else self.cbw.done.count()

    def _refuse(self, reason: str) -> Any:
        raise self._error(reason)

    def _error(self, reason: str) -> ReplicationError:
        return ReplicationError(self._filter.name, "start", reason)
