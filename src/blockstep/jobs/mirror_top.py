"""Driver ``mirror-top``: the filter of a write-blocking job: writes go to the source and to the target.

    guest ──► mirror-top ──file──► source ──► Tracker: what the target does not have
                   └──target──► target

A guest that writes faster than a job copies would keep it from ever being done. Under this filter what is not in
sync only gets less: a write that reached both ends leaves the bitmap as it was. It neither sets bits (both ends
have it) nor resets any (a write of a part of a cluster says nothing about the rest of it, and the background copy
comes by in any case), so there is no rounding that could go wrong.

The copy engine and this filter lock the clusters that they write, so that neither overtakes the other. A failure
of the target never fails the guest's write: the clusters become dirty, and the job decides what to do.

A discard goes to the source only and makes its clusters dirty: the two ends may answer a discard with different
content. The job makes one of these filters and removes it; nobody else can: the driver is not registered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

from blockstep.aio.rangelock import RangeLock
from blockstep.block.bitmap import Bitmap, CountedBitmap
from blockstep.block.driver import FAST, FUA, Buffer, Filter
from blockstep.block.node import Child, NodeOptions, NodeRef
from blockstep.block.permissions import ALL, NONE, WRITE_UNCHANGED, Permission, Role


class Tracker(CountedBitmap):
    """What was written to the source and is not in the target, in clusters. Watches the source."""

    __slots__ = ("_on_both", "on_dirty")

    def __init__(self, length: int, granularity: int) -> None:
        super().__init__(length, granularity)
        #: Called once with the next change, then forgotten.
        self.on_dirty: Callable[[], None] | None = None
        self._on_both: list[tuple[int, int]] = []

    def expect(self, offset: int, length: int) -> None:
        """The next write of exactly this range goes to both ends: do not count it."""
        self._on_both.append((offset, length))

    def wrote(self, offset: int, length: int) -> None:
        # Two writes of the same range at the same time, of which one passes the filter by, may be taken for
        # each other: one of them is counted, whichever it is.
        if self._on_both and (offset, length) in self._on_both:
            self._on_both.remove((offset, length))
        else:
            self.dirty_now(offset, length)

    def dirty_now(self, offset: int, length: int) -> None:
        """The range is not in sync."""
        self.set(offset, length)
        if self.on_dirty is not None:
            tell, self.on_dirty = self.on_dirty, None
            tell()


class MirrorTopOptions(NodeOptions, tag="mirror-top"):
    """``file``: the source. ``target``."""

    file: NodeRef
    target: NodeRef


class MirrorTop(Filter):
    """See the module."""

    driver: ClassVar[str] = "mirror-top"
    Options = MirrorTopOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED, "target": Role.TARGET}
    options: MirrorTopOptions
    target: Child
    #: Set by the job. None: writes go to the source only.
    tracker: Tracker | None = None
    lock: RangeLock
    written: Bitmap | None = None
    #: Called with each error of the target.
    on_target_error: Callable[[OSError], None]

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        if child.name == "target":
            return (WRITE_UNCHANGED if self.parents else NONE), ALL  # in the job's name, which holds the rights
        return super().child_permissions(child, taken, shared)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        if self.tracker is None:
            await self.file.pwrite(offset, data, flags)
        else:
            await self._both(self.tracker, offset, len(data), self.file.pwrite(offset, data, flags),
                             lambda: self.target.pwrite(offset, data))

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if self.tracker is None:
            await self.file.write_zeroes(offset, length, flags)
        else:
            await self._both(self.tracker, offset, length, self.file.write_zeroes(offset, length, flags),
                             lambda: self.target.write_zeroes(offset, length, flags & ~(FUA | FAST)))

    async def _both(self, tracker: Tracker, offset: int, length: int, to_source: Awaitable[None],
                    to_target: Callable[[], Awaitable[None]]) -> None:
        mask = tracker.granularity - 1
        start, end = offset & ~mask, (offset + length + mask) & ~mask
        token = self.lock.try_take(start, end) or await self.lock.take(start, end)
        try:
            tracker.expect(offset, length)
            try:
                await to_source
            except BaseException:
                tracker.dirty_now(offset, length)
                raise
            if self.written is not None:
                self.written.set(offset, length)
            try:
                await to_target()
            except OSError as error:
                tracker.dirty_now(offset, length)
                self.on_target_error(error)
        finally:
            self.lock.give_back(token)
