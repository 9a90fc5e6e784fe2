"""Reads that miss the page cache: looked out for, then done in threads.

The attempt to read without waiting (RWF_NOWAIT) that found nothing has told the kernel what to fetch. A fast device
has it in a tenth of a millisecond, which is less than a trip to a thread and back, most of it for waking the thread
and for handing the interpreter's lock around. So the loop goes on, and in each of its turns the oldest of such reads
is tried again, and after a success the next one. If none succeeds for `LOOK` seconds they go to threads, a batch at a
time:

    reads that miss ─► tried again in each turn of the loop ─► most of them
          │                        └─ nothing for LOOK seconds ─┐
          └─ while that is not worth it (Patience) ─────────────┴─► a thread: tell the kernel of all, then read
                                                                    one after the other; those that have ended
                                                                    are told of at the end, and every REPORT s

The kernel fetches what it was told of at the same time, so reads overlap in the device as if each had a thread of its
own. `THREADS` batches are on their way at a time.

4k random reads at depth 16, nothing cached, a second: in threads alone 31 k, looked out for 47 k; qemu-nbd 35 k. See
the bench, row cold-4k-read.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Final

from blockstep.aio import Buffer
from blockstep.aio.inline import Completion, start
from blockstep.aio.loop import Patience
from blockstep.aio.pool import in_thread
from blockstep.aio.posix import Reader, read_whole

#: Reads in a batch, and batches at a time for one file.
BATCH: Final = 32
THREADS: Final = 8
#: Seconds for which a read that has ended may wait for its neighbours.
REPORT: Final = 1e-3
#: Bytes: longer reads go to a thread right away. Each attempt copies what is there already.
SMALL: Final = 64 << 10
#: Seconds: a device that has nothing for so long is left to threads.
LOOK: Final = 1e-3

_Result = Buffer | OSError


class _Read:
    """A read on its way."""

    __slots__ = ("ended", "fd", "length", "offset")

    def __init__(self, fd: int, length: int, offset: int) -> None:
        self.fd, self.length, self.offset = fd, length, offset
        self.ended: Completion[Buffer] = Completion()


class ColdReads:
    """The reads of one file that would wait. ``quick``: reads less than it is asked for where it would have to wait."""

    __slots__ = ("_clock", "_last", "_looked_for", "_patience", "_planned", "_quick", "_running", "_waiting")

    def __init__(self, quick: Reader, clock: Callable[[], float] = perf_counter) -> None:
        self._quick, self._clock = quick, clock
        self._patience = Patience()
        #: What the loop looks out for, and when one of them was there last.
        self._looked_for: deque[_Read] = deque()
        self._last = 0.0
        #: What waits for a thread.
        self._waiting: deque[_Read] = deque()
        self._planned = False
        self._running = 0

    async def read(self, fd: int, length: int, offset: int) -> Buffer:
        """As `read_whole`. The caller has tried ``quick``. Raises OSError."""
        read = _Read(fd, length, offset)
        if length <= SMALL and (self._looked_for or self._patience.allows()):
            if not self._looked_for:
                self._last = self._clock()
                asyncio.get_running_loop().call_soon(self._look)
            self._looked_for.append(read)
        else:
            self._waiting.append(read)
            if not self._planned and self._running < THREADS:
                self._planned = True
                asyncio.get_running_loop().call_soon(self._begin)
        return await read.ended

    def _look(self) -> None:
        """Try again, once in a turn of the loop."""
        looked_for, found = self._looked_for, []
        try:
            while looked_for:
                read = looked_for[0]
                data = self._quick(read.fd, read.length, read.offset)
                if len(data) < read.length:
                    break
                found.append((looked_for.popleft(), data))
        except OSError:
            self._last = -LOOK  # its thread will say whose it is
        now = self._clock()
        if found:
            self._patience.learn(True)
            self._last = now
        elif now - self._last >= LOOK:
            self._patience.learn(False)
            self._waiting.extend(looked_for)
            looked_for.clear()
            self._begin()
        if looked_for:
            asyncio.get_running_loop().call_soon(self._look)
        for read, data in found:
            read.ended.set_result(data)

    def _begin(self) -> None:
        self._planned = False
        loop = asyncio.get_running_loop()
        while self._waiting and self._running < THREADS:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._running += 1
            start(in_thread(_read_all, batch, loop), partial(self._ended, batch))

    def _ended(self, batch: list[_Read], rest: list[_Result] | None, error: BaseException | None) -> None:
        self._running -= 1
        self._begin()
        if error is not None:
            for read in batch:
                if not read.ended.done():
                    read.ended.set_error(error)
        elif rest:
            _report(batch[-len(rest):], rest)


def _report(reads: list[_Read], results: list[_Result]) -> None:
    for read, result in zip(reads, results, strict=True):
        if isinstance(result, OSError):
            read.ended.set_error(result)
        else:
            read.ended.set_result(result)


def _read_all(batch: list[_Read], loop: asyncio.AbstractEventLoop) -> list[_Result]:
    """Read all; the results of the last ones, which have not been reported yet. In a thread."""
    if len(batch) > 1:
        for read in batch:
            try:
                os.posix_fadvise(read.fd, read.offset, read.length, os.POSIX_FADV_WILLNEED)
            except OSError:
                pass  # it is only advice
    results: list[_Result] = []
    reported, at = 0, perf_counter()
    for number, read in enumerate(batch, 1):
        try:
            results.append(read_whole(read.fd, read.length, read.offset))
        except OSError as error:
            results.append(error)
        if number < len(batch) and perf_counter() - at > REPORT:
            loop.call_soon_threadsafe(_report, batch[reported:number], results)
            results, reported, at = [], number, perf_counter()
    return results
