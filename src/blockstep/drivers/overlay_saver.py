"""How the map of an overlay in memory gets into its image, and how the image gives back what is not held any more.

    flush ──► save ──► data, then the pages of the map that got bits      (the state goes on)
                   └─► data, then a whole map and a new state             (after emptying or a resize)
                            └──► reclaim, in the background

`blockstep.drivers.overlay_image` says why this order survives a crash. Reclaiming punches holes where the image
has storage and the map has no data. It belongs to a state: it starts when that is on the disk, goes on piece by piece
while writes to a piece wait, and stops when another state has begun in memory, until that is on the disk as well: till
then a crash must find the old data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from blockstep.aio.inline import Completion, start
from blockstep.aio.pool import in_thread
from blockstep.aio.posix import data_runs, punch_hole
from blockstep.aio.rangelock import RangeLock
from blockstep.block.bitmap import Bitmap
from blockstep.drivers.overlay_image import PAGE_SHIFT, OverlayImage

#: Freed at a time, in the background, while writes to it wait.
_RECLAIM: Final = 16 << 20


class OverlaySaver:
    """Keeps track of what of the map is not on the disk yet."""

    def __init__(
        self, image: OverlayImage, held: Callable[[], tuple[Bitmap, Bitmap | None]], lock: RangeLock, durable: bool
    ) -> None:
        """``held``: the clusters with data and those that are zero, now; ``lock``: of those who write to clusters."""
        self._image = image
        self._held = held
        self._lock = lock
        self._durable = durable
        #: Pages of the map with bits, and of them those that are not yet on the disk.
        self._pages = self._pages_with_bits()
        self._unsaved: set[int] = set()
        #: States are numbered from the one that was loaded on: the one in memory, and the one on the disk.
        self._state = self._state_on_disk = 0
        self._saving = asyncio.Lock()
        self._closing = False
        self._reclaiming: Completion[None] | None = None

    def changed(self, first: int, end: int) -> None:
        """The clusters ``[first, end)`` are held now."""
        pages = range(first >> PAGE_SHIFT, (end - 1 >> PAGE_SHIFT) + 1)
        self._unsaved.update(pages)
        self._pages.update(pages)

    def emptied(self) -> None:
        """Nothing is held any more: the next save makes a new state. Constant time."""
        self._pages, self._unsaved = set(), set()
        self._state += 1

    def resized(self) -> None:
        """The map has another length: the next save makes a new state."""
        self._pages = self._pages_with_bits()
        self._state += 1

    async def save(self) -> None:
        """Make all data durable, and the map. Raises OSError; the same again after a sync that failed."""
        async with self._saving:
            state = self._state
            new_state = state != self._state_on_disk
            unsaved, self._unsaved = self._unsaved, set()
            # Copied now: what gets its bit after this has its data after this, too.
            pages = {number: self._page(number) for number in (self._pages if new_state else unsaved)}
            try:
                if new_state:
                    await in_thread(self._image.sync_new_state, pages, self._held()[0].length, self._durable)
                else:
                    await in_thread(self._image.sync, pages, self._durable)
            except BaseException:
                self._unsaved |= unsaved
                raise
            self._state_on_disk = state
        if new_state and not self._reclaiming and not self._closing:
            self._reclaiming = Completion()
            start(self._reclaim(), self._reclaimed)

    async def stop(self) -> None:
        """Reclaim no more, and wait for the piece at hand."""
        self._closing = True
        if self._reclaiming:
            await self._reclaiming

    def _page(self, number: int) -> bytes:
        data, zero = self._held()
        held = data.bits[number << PAGE_SHIFT:(number + 1) << PAGE_SHIFT]
        if zero is not None:
            held |= zero.bits[number << PAGE_SHIFT:(number + 1) << PAGE_SHIFT]
        return held.tobytes()

    def _pages_with_bits(self) -> set[int]:
        """The pages of the map that have a cluster held."""
        pages = set()
        for bitmap in filter(None, self._held()):
            at = bitmap.bits.find(1)
            while at >= 0:
                pages.add(at >> PAGE_SHIFT)
                at = bitmap.bits.find(1, ((at >> PAGE_SHIFT) + 1) << PAGE_SHIFT)
        return pages

    # --- reclaim ---

    async def _reclaim(self) -> None:
        """Reclaim in each state that gets to the disk while this goes on."""
        done = -1
        while done != self._state_on_disk:
            done = self._state_on_disk
            await self._reclaim_in(done)

    async def _reclaim_in(self, state: int) -> None:
        """Give back what lies in the image and is not held, as long as both maps are of ``state``, which is saved."""
        image, position, length = self._image, 0, self._held()[0].length
        while position < length and self._state == state and not self._closing:
            run, is_data = await in_thread(_next_run, image.fd, image.data_offset + position,
                                           image.data_offset + length)
            if not is_data:
                position += run
                continue
            begin = position & -image.cluster_size
            position = min(begin + _RECLAIM, length)
            token = self._lock.try_take(begin, position) or await self._lock.take(begin, position)
            try:
                if self._state == state:
                    holes = [(image.data_offset + at, run) for at, run in self._without_data(begin, position)]
                    if not await in_thread(lambda holes: all(punch_hole(image.fd, *hole) for hole in holes), holes):
                        return
            finally:
                self._lock.give_back(token)

    def _without_data(self, begin: int, end: int) -> list[tuple[int, int]]:
        data, result = self._held()[0], []
        for run, is_data in data.extents(begin, end - begin):
            if not is_data:
                result.append((begin, run))
            begin += run
        return result

    def _reclaimed(self, _value: object, _error: BaseException | None) -> None:
        # An error leaves space occupied that the next reclaim finds again: nobody has to act on it.
        done, self._reclaiming = self._reclaiming, None
        assert done is not None
        done.set_result(None)


def _next_run(fd: int, begin: int, end: int) -> tuple[int, bool]:
    """How long the run of data, or the hole, at ``begin`` is, and which it is."""
    return next(iter(data_runs(fd, begin, end)), (0, True))
