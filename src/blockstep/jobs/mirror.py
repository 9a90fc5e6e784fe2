"""Mirror: make a target the same as a source that is in use, and keep it so until somebody says `complete`.

What is copied: ``full``: all that the source reads as; ``top``: what the source node itself holds (its backing node
is the target's too); ``bitmap``: what a dirty bitmap says, plus what is written meanwhile; ``none``: only what is
written from now on.

A bitmap that was given is in use while the job runs, and at the end, in the drained section in which the two ends
are the same, it is dealt with as ``bitmap_mode`` says::

    never        left alone (it has gone on counting writes)
    on-success   cleared, if the job succeeded
    always       cleared if it succeeded, else it holds what is not in sync: a resync goes on where this one ended

With ``pivot`` the target takes the place of the source under all of its parents; ``pivot`` may also be a function
that makes other changes in the same all-or-nothing step, while no request is in flight: it gets the `Change`.

Durable: at ready, and again at the end, all that the target has was flushed, also if nothing had to be copied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Literal, Unpack

from blockstep.block.bitmap import Bitmap, DirtyBitmap
from blockstep.block.driver import Driver
from blockstep.block.graph import Change, Graph
from blockstep.block.io import Backend
from blockstep.block.node import Child
from blockstep.block.permissions import READ, WRITE, WRITE_UNCHANGED, Role
from blockstep.block.status import backing_of
from blockstep.errors import GraphError, OptionError
from blockstep.jobs.block_copy import BlockCopy
from blockstep.jobs.job import JobOptions
from blockstep.jobs.states import JobKind, OnError
from blockstep.jobs.sync import CopyMode, SyncJob
from blockstep.units import KiB

Sync = Literal["full", "top", "none", "bitmap"]
BitmapMode = Literal["never", "on-success", "always"]


class MirrorJob(SyncJob):
    """See the module."""

    kind: ClassVar[JobKind] = "mirror"
    target_permissions = (READ | WRITE, READ | WRITE_UNCHANGED)

    def __init__(
        self, id: str, graph: Graph, source: Driver, target: Driver, *, sync: Sync = "full",
        bitmap: DirtyBitmap | None = None, bitmap_mode: BitmapMode = "never", copy_mode: CopyMode = "background",
        granularity: int = 64 * KiB, target_is_zero: bool = False, pivot: bool | Callable[[Change], None] = False,
        replace_in: Child | None = None, auto_complete: bool = False, internal: bool = False,
        on_source_error: OnError | str = OnError.REPORT, on_target_error: OnError | str = OnError.REPORT,
        replaces: Driver | None = None, filter_node_name: str | None = None, workers: int = 4,
        detect_zeroes: bool = True, **options: Unpack[JobOptions],
    ) -> None:
        """``target_is_zero``: the target reads as zeroes now; it is not told so again. ``workers``: chunks of 1 MiB in
        flight. ``replace_in``: the only edge that the pivot moves. ``replaces``: the target takes the place of this
        node and not of the source, which shows it (a child of a quorum). ``auto_complete``: no ready state.
        ``internal``: started by whoever blocks other operations on the nodes; blockers do not apply.

        Raises OptionError.
        """
        if sync not in ("full", "top", "none", "bitmap"):
            raise OptionError("sync", sync, "full, top, none or bitmap")
        if (bitmap is None) is (sync == "bitmap"):
            raise OptionError("bitmap", bitmap and bitmap.name, "given with sync=bitmap, and only with it")
        super().__init__(id, graph, source, target, copy_mode=copy_mode, granularity=granularity,
                         auto_complete=auto_complete, internal=internal, on_source_error=on_source_error,
                         on_target_error=on_target_error, workers=workers, pivot=pivot, replace_in=replace_in,
                         filter_node_name=filter_node_name, **options)
        self.sync: Sync = sync
        self.bitmap = bitmap
        self.bitmap_mode: BitmapMode = bitmap_mode
        self.target_is_zero = target_is_zero
        self.detect_zeroes = detect_zeroes
        self.replaces = replaces if replaces is not source else None

    def check(self) -> None:
        needed, there = self.source.length, self.target.length
        if there < needed or (self.pivot is True and there != needed):
            right = "exactly" if self.pivot is True else "at least"
            raise OptionError("target", self.target.name, f"{right} {needed} bytes long; it has {there}")
        if self.bitmap is not None and self.bitmap.node is not self.source:
            raise OptionError("bitmap", self.bitmap.name, f"a bitmap of node '{self.source.name}'")
        if self.replaces is not None and not _shows(self.source, self.replaces):
            raise OptionError("replaces", self.replaces.name, f"'{self.source.name}', or a node whose data it shows")
        if any(node is self.source for node in self.target.below()):
            raise GraphError(f"node '{self.source.name}' lies below '{self.target.name}'")

    async def take_more(self, undo: AsyncExitStack) -> None:
        if self.bitmap is not None:
            undo.callback(self.bitmap.claim(f"job '{self.id}'"))
            self.bitmap.fit()

    async def setup(self) -> None:
        await super().setup()
        if self.bitmap is not None:
            # Here and not in `fill`: a job that ends before it begins to run knows too what is not in sync.
            self.dirty.merge(self.bitmap)

    def make_engine(self, source: Backend, target: Backend) -> BlockCopy:
        written = Bitmap(self.source.length, self.granularity) if self.target_is_zero else None
        return BlockCopy(source.edge, target.edge, (source, target), self._control, granularity=self.granularity,
                         workers=self._workers, base=self._base, allocated_only=self.sync == "top",
                         detect_zeroes=self.detect_zeroes, lock=self._lock, written=written)

    @property
    def _base(self) -> Driver | None:
        return backing_of(self.source) if self.sync == "top" else None

    async def fill(self) -> None:
        if self.sync == "full":
            self.dirty.set(0, self.source.length)
        elif self.sync == "top":
            await self.fill_allocated(self._base)

    def synced(self) -> None:
        if self.bitmap is not None and self.bitmap_mode != "never":
            self.bitmap.clear()

    @property
    def replaced(self) -> Driver:
        return self.replaces if self.replaces is not None else super().replaced

    async def clean(self) -> None:
        if self.bitmap is not None and self.bitmap_mode == "always" and self.failed:
            # The tracker began with the bitmap's content and has counted all writes since.
            self.bitmap.clear()
            self.bitmap.merge(self.dirty)
        await super().clean()

    def block_info(self) -> dict[str, Any]:
        return {**super().block_info(), "sync": self.sync, "copy-mode": self.copy_mode}


def _shows(node: Driver, below: Driver) -> bool:
    """Whether ``below`` reads as ``node`` does: there are only filters, or quorums, between them."""
    return any(child.node is below or _shows(child.node, below) for child in node.children.values()
               if child.role in (Role.FILTERED, Role.DATA))
