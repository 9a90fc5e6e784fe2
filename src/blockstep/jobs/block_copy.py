"""The one copy engine: ranges of a source into a target, for backup, commit and mirror.

    ranges.take() ──► cut: how far the same kind goes ──► lock ──► block status ──► nothing │ zeroes │ data
                                                                                               │
                                        one of ``workers``, all alike                copy_file_range, or read,
                                                                                     look for zeroes, write

What the source is known not to hold is not read: a range that reads as zeroes becomes one request however long it
is, and none if the target is known to be zero there. Data is read in chunks, several at a time (a target behind a
network gets its requests pipelined), and clusters that turn out to be zero are written as zeroes. Where both ends
are plain files, the kernel copies.

A chunk is one piece of work for a drain (`blockstep.block.io.enter`), and its range is locked from the question
what is there until it is written: whoever writes to both ends at the same time takes `BlockCopy.lock`.

A range that fails, or that is not reached because the copy is stopped, is given back to ``ranges``. However a copy
ends, nothing is in flight after it.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Final, Literal, Protocol

from blockstep.aio.copying import PIECE, zero_runs
from blockstep.aio.rangelock import RangeLock
from blockstep.block.bitmap import Bitmap
from blockstep.block.driver import FAST, MAY_UNMAP, Buffer, Driver, Extent
from blockstep.block.io import Backend, enter, leave
from blockstep.block.node import Child
from blockstep.block.status import backing_of, status_through
from blockstep.units import GiB, MiB

#: The most that one request for zeroes covers, of a target that may have to write them, and where they are fast. For
#: as long as it takes nobody can pause the copy, and a writer to the range may wait.
ZEROES_AT_ONCE: Final = 64 * MiB
FAST_ZEROES_AT_ONCE: Final = GiB
#: How far ahead block status is asked, at least, where there is nothing but one long extent.
_LOOK_AHEAD: Final = GiB
#: A chunk in more extents than this is copied as a whole: one large request costs less than many small ones.
_FRAGMENTS: Final = 16
#: The depth in a hint for such a chunk.
_FRAGMENTED: Final = -1

Side = Literal["read", "write"]


class Ranges(Protocol):
    """What is to be copied."""

    def peek(self) -> int | None:
        """The offset at which the next range begins; None: nothing is left."""

    def take(self, limit: int) -> tuple[int, int]:
        """The next range, as (offset, length) of at most ``limit`` bytes. After a `peek` that was not None."""

    def give_back(self, offset: int, length: int) -> None:
        """A range that was taken was not copied."""


class Pass(Ranges):
    """One pass over the set clusters of a bitmap, in order. What is taken is reset in it."""

    __slots__ = ("_bitmap", "_cursor")

    def __init__(self, bitmap: Bitmap) -> None:
        self._bitmap = bitmap
        self._cursor = 0

    def peek(self) -> int | None:
        run = self._bitmap.next_dirty(self._cursor, 1)
        return run[0] if run else None

    def take(self, limit: int) -> tuple[int, int]:
        run = self._bitmap.next_dirty(self._cursor, limit)
        assert run
        self._bitmap.reset(*run)
        self._cursor = run[0] + run[1]
        return run

    def give_back(self, offset: int, length: int) -> None:
        self._bitmap.set(offset, length)


class Control:
    """Who has a say in a copy while it runs. This one never has: a copy at full speed that stops at an error."""

    async def pause_point(self) -> None:
        """Before each range. May wait; raises to stop the copy."""

    async def throttle(self, count: int) -> None:
        """Before ``count`` bytes of data are copied. May wait; raises to stop the copy."""

    def began(self) -> None:
        """Something is in flight."""

    def ended(self) -> None:
        """The opposite of `began`."""

    def copied(self, count: int) -> None:
        """``count`` bytes of a range are done, or needed nothing."""

    async def failed(self, side: Side, error: OSError) -> None:
        """An error. Returns when the copy shall go on (the range was given back), or raises to stop it."""
        raise error


class BlockCopy:
    """Copies from the lower end of one edge to the lower end of another."""

    def __init__(
        self, source: Child, target: Child, doors: Sequence[Backend], control: Control | None = None, *,
        granularity: int = PIECE, chunk: int = MiB, workers: int = 4, base: Driver | None = None,
        allocated_only: bool = False, detect_zeroes: bool = True, lock: RangeLock | None = None,
        written: Bitmap | None = None, offload: bool = True, piece: int = PIECE, in_threads: bool = False,
    ) -> None:
        """``doors``: the users in whose name it works, for drains. ``granularity``: ranges are multiples of it, except
        at the end of the disk. ``base``: block status stops above it. ``allocated_only``: skip what is not
        allocated above ``base``. ``written``: the clusters that may not be zero in the target; None: all.
        ``offload``: the kernel may copy, and then does not look for zeroes. ``piece``: so many bytes of zeroes
        within data, aligned, are written as zeroes. ``in_threads``: each chunk is read and written in a thread, where
        both ends can do that; it may then be long, and needs no memory of its length.
        """
        self.source, self.target, self.doors = source, target, doors
        self.control = control if control is not None else Control()
        self.granularity = granularity
        self.chunk = max(chunk, granularity)
        self.workers = workers
        self.base = base
        self.allocated_only = allocated_only
        self.detect_zeroes = detect_zeroes
        self.piece = piece
        #: Held over a range while it is copied.
        self.lock = lock if lock is not None else RangeLock()
        self.written = written
        #: Bytes that were taken and are not copied yet.
        self.in_flight = 0
        # What was found ahead: (end, extent), in order; of the current one, where it ends.
        self._ahead: deque[tuple[int, Extent]] = deque()
        self._hint_end = 0
        self._hint = Extent(1)
        self._offload = offload
        self._in_threads = in_threads
        self._has_fast_zeroes = True  # until the target says no
        self._stopped = False

    async def copy(self, ranges: Ranges) -> None:
        """Copy all ``ranges``. Raises what `Control` raises, after everything in flight has ended."""
        self._ahead.clear()
        self._hint_end = 0
        self._stopped = False
        planning = asyncio.Lock()
        if self.workers == 1:
            await self._work(ranges, planning)
            return
        ends = await asyncio.gather(*(self._work(ranges, planning) for _ in range(self.workers)),
                                    return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    @property
    def _is_flat(self) -> bool:
        return backing_of(self.source.node) is None

    # --- what a subclass may change ---

    def wanted(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of a locked range that still need a copy, as (offset, length)."""
        return [(offset, length)]

    def finished(self, offset: int, length: int) -> None:
        """A wanted part is copied; its range is still locked."""

    # --- a worker ---

    async def _work(self, ranges: Ranges, planning: asyncio.Lock) -> None:
        try:
            while not self._stopped:
                await self.control.pause_point()
                async with planning:
                    taken = await self._next(ranges)
                if taken is None:
                    return
                offset, length, hint = taken
                self.in_flight += length
                done = False
                try:
                    if not self._is_sparse(hint):
                        await self.control.throttle(length)
                    try:
                        done = await self._one(offset, length, hint)
                    except _NoHole:
                        done = await self._by_chunks(offset, length)
                finally:
                    self.in_flight -= length
                    if not done:
                        ranges.give_back(offset, length)
                # Memory never waits: let the others have their turn.
                await asyncio.sleep(0)
        except BaseException:
            self._stopped = True
            raise

    async def _by_chunks(self, offset: int, length: int) -> bool:
        """As `_one`, of a long range that may have to be read."""
        for at in range(offset, offset + length, self.chunk):
            count = min(self.chunk, offset + length - at)
            await self.control.pause_point()
            await self.control.throttle(count)
            if not await self._one(at, count, Extent(count, depth=0)):
                return False
        return True

    async def _next(self, ranges: Ranges) -> tuple[int, int, Extent] | None:
        """The next range to copy, and what is probably there: long where there is nothing to read, else a chunk."""
        offset = ranges.peek()
        if offset is None or self._stopped:
            return None
        while offset >= self._hint_end and self._ahead:
            self._hint_end, self._hint = self._ahead.popleft()
        if offset >= self._hint_end:
            await self._look_ahead(offset)
            offset = ranges.peek()
            if offset is None:
                return None
        limit = self.chunk
        if self._is_sparse(self._hint) and self.chunk < self._hint_end - offset:
            most = FAST_ZEROES_AT_ONCE if self._has_fast_zeroes else ZEROES_AT_ONCE
            limit = min(self._hint_end - offset, most) // self.granularity * self.granularity
        offset, length = ranges.take(limit)
        return offset, length, self._hint if offset + length <= self._hint_end else Extent(length, depth=0)

    async def _look_ahead(self, offset: int) -> None:
        """Only hints how to cut: what counts is asked again under the lock.

        All that was found is kept: to ask anew where each extent ends would count the same pages over and over.
        """
        begin, rest = offset, self.source.node.length - offset
        window = min(self.chunk, rest)
        try:
            async with self._door():
                while True:
                    extents = await status_through(self.source.node, offset, window, self.base)
                    if len(extents) > 1 or window >= min(_LOOK_AHEAD, rest):
                        break
                    window = min(window * 16, rest)
            if len(extents) > _FRAGMENTS and extents[0].length < self.chunk:
                extents = [Extent(min(window, self.chunk), depth=_FRAGMENTED)]
        except OSError:
            extents = [Extent(window, depth=0)]
        for extent in extents:
            offset += extent.length
            self._ahead.append((offset, extent))
        end, self._hint = self._ahead.popleft()
        self._hint_end = max(end, begin + self.granularity)

    def _is_sparse(self, extent: Extent) -> bool:
        return extent.zero or (self.allocated_only and not extent.allocated)

    async def _one(self, offset: int, length: int, hint: Extent) -> bool:
        """Copy one range. False: it failed, and `Control` says that the copy goes on."""
        try:
            async with self._door():
                token = await self.lock.take(offset, offset + length)
                try:
                    for start, count in self.wanted(offset, length):
                        await self._copy(start, count, hint)
                        self.finished(start, count)
                finally:
                    self.lock.give_back(token)
        except Failure as failure:
            await self.control.failed(failure.side, failure.error)
            return False
        self.control.copied(length)
        return True

    @asynccontextmanager
    async def _door(self) -> AsyncIterator[None]:
        await enter(*self.doors)
        self.control.began()
        try:
            yield
        finally:
            leave(*self.doors)
            self.control.ended()

    async def _copy(self, offset: int, length: int, hint: Extent) -> None:
        # Reading what might be a hole is never wrong; a depth may be, unless there is only one.
        if hint.depth == _FRAGMENTED or (hint.data and hint.depth == 1 and hint.allocated and self._is_flat):
            await self._data(offset, length, hint.depth)
            return
        extents = await self._status(offset, length)
        if length > self.chunk and not all(self._is_sparse(extent) for extent in extents):
            raise _NoHole
        if len(extents) > _FRAGMENTS and length <= self.chunk:
            extents = [Extent(length, depth=0)]
        for extent in extents:
            if extent.zero:
                await self._zero(offset, extent.length)
            elif extent.allocated or not self.allocated_only:
                await self._data(offset, extent.length, extent.depth)
            offset += extent.length

    async def _status(self, offset: int, length: int) -> list[Extent]:
        try:
            return await status_through(self.source.node, offset, length, self.base)
        except OSError as error:
            raise Failure("read", error) from error

    async def _zero(self, offset: int, length: int) -> None:
        if self.written is not None:
            if not self.written.any(offset, length):
                return
            self.written.set(offset, length)
        try:
            if length > ZEROES_AT_ONCE and await self._zero_fast(offset, length):
                return
            for at in range(offset, offset + length, ZEROES_AT_ONCE):
                await self.target.write_zeroes(at, min(ZEROES_AT_ONCE, offset + length - at), MAY_UNMAP)
        except OSError as error:
            raise Failure("write", error) from error

    async def _zero_fast(self, offset: int, length: int) -> bool:
        """Whether the target does that without writing zeroes."""
        try:
            await self.target.write_zeroes(offset, length, MAY_UNMAP | FAST)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            self._has_fast_zeroes = False
            return False
        return True

    async def _data(self, offset: int, length: int, depth: int) -> None:
        if self._offload and await self._kernel_copy(offset, length, depth):
            return
        if self._in_threads:
            if await self._thread_copy(offset, length, depth):
                return
            for at in range(offset, offset + length, MiB):  # the chunks are long only for the threads' sake
                part = min(MiB, offset + length - at)
                if part == length or not await self._thread_copy(at, part, depth):
                    await self._read_and_write(at, part)
        else:
            await self._read_and_write(offset, length)

    async def _read(self, offset: int, length: int) -> Buffer:
        try:
            return await self.source.pread(offset, length)
        except OSError as error:
            raise Failure("read", error) from error

    async def _read_and_write(self, offset: int, length: int) -> None:
        data = await self._read(offset, length)
        if self.detect_zeroes:
            view = memoryview(data)
            start = 0
            for count, zero in zero_runs(data, self.piece):
                if zero:
                    await self._zero(offset + start, count)
                else:
                    await self._write(offset + start, data if count == length else view[start:start + count])
                start += count
        else:
            await self._write(offset, data)

    async def _write(self, offset: int, data: Buffer) -> None:
        self._may_hold(offset, len(data))
        try:
            await self.target.pwrite(offset, data)
        except OSError as error:
            raise Failure("write", error) from error

    async def _thread_copy(self, offset: int, length: int, depth: int) -> bool:
        """Whether a thread has copied the range. Trouble is met as in `_kernel_copy`."""
        of = self._place(offset, length, depth)
        if of is None:
            return False
        try:
            runs = await self.target.node.copy_in(of, offset, length, self.piece if self.detect_zeroes else 0)
        except OSError:
            self._may_hold(offset, length)
            return False
        if runs is None:
            return False
        for count, zero in runs:
            if zero:
                await self._zero(offset, count)
            else:
                self._may_hold(offset, count)
            offset += count
        return True

    async def _kernel_copy(self, offset: int, length: int, depth: int) -> bool:
        """Whether the kernel has copied the range. Any trouble: no, and the ordinary way finds out whose it is."""
        of = self._place(offset, length, depth)
        if of is None:
            return False
        try:
            self._offload = await self.target.node.clone_in(of, offset, length)
        except OSError:
            self._may_hold(offset, length)
            return False
        if self._offload:
            self._may_hold(offset, length)
        return self._offload

    def _place(self, offset: int, length: int, depth: int) -> tuple[int, int] | None:
        """Where the range lies in a file, if it does, and may be copied without those who watch the target's writes."""
        holder = _holder(self.source.node, depth) if not self.target.node.watchers else None
        return holder.raw_range(offset, length) if holder is not None else None

    def _may_hold(self, offset: int, length: int) -> None:
        """Something is written there, or was before it failed: the target need not be zero there any more."""
        if self.written is not None:
            self.written.set(offset, length)


class _NoHole(Exception):
    """A long range, taken for a hole, has data: the guest has written there since somebody looked."""


class Failure(Exception):
    """An I/O error, and on which side."""

    def __init__(self, side: Side, error: OSError) -> None:
        super().__init__(side, error)
        self.side, self.error = side, error


def _holder(node: Driver, depth: int) -> Driver | None:
    """The node ``depth`` layers down (1: the first below the filters at the top), or None."""
    layers = (each for each in node.chain() if not each.is_filter)
    return next(islice(layers, depth - 1, None), None) if depth > 0 else None
