"""Reads that miss the page cache, a batch at a time.

A trip to a thread and back costs more than a fast device takes for the read, most of it for handing the
interpreter's lock around. So reads that miss in the same turn of the loop make the trip together:

    misses of this turn ─► a thread: tell the kernel of all (posix_fadvise), then read one after the other ─► all end

The kernel fetches what it was told of at the same time, so the reads overlap in the device as if each had a thread
of its own. `THREADS` batches are on their way at a time, and `BATCH` bounds for how long a read may have to wait
for its neighbours. (4k random reads at depth 16, nothing cached: see the bench, row cold-4k-read.)
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from functools import partial
from typing import Final

from blockstep.aio.inline import Completion, start
from blockstep.aio.pool import in_thread
from blockstep.aio.posix import Buffer, read_whole

#: Reads in a batch, and batches at a time for one file.
BATCH: Final = 8
THREADS: Final = 8

#: (fd, length, offset)
_Read = tuple[int, int, int]


class ColdReads:
    """The reads of one file that would wait."""

    __slots__ = ("_planned", "_running", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[tuple[_Read, Completion[Buffer]]] = deque()
        self._planned = False
        self._running = 0

    async def read(self, fd: int, length: int, offset: int) -> Buffer:
        """As `read_whole`, in a thread. Raises OSError."""
        ended: Completion[Buffer] = Completion()
        self._waiting.append(((fd, length, offset), ended))
        if not self._planned and self._running < THREADS:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._begin)
        return await ended

    def _begin(self) -> None:
        self._planned = False
        while self._waiting and self._running < THREADS:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._running += 1
            start(in_thread(_read_all, [read for read, _ in batch]), partial(self._ended, batch))

    def _ended(self, batch: list[tuple[_Read, Completion[Buffer]]], results: list[Buffer | OSError] | None,
               error: BaseException | None) -> None:
        self._running -= 1
        self._begin()
        for at, (_, ended) in enumerate(batch):
            result = results[at] if results is not None else error
            if isinstance(result, BaseException):
                ended.set_error(result)
            else:
                assert result is not None
                ended.set_result(result)


def _read_all(reads: list[_Read]) -> list[Buffer | OSError]:
    if len(reads) > 1:
        for fd, length, offset in reads:
            try:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
            except OSError:
                pass  # it is only advice
    results: list[Buffer | OSError] = []
    for fd, length, offset in reads:
        try:
            results.append(read_whole(fd, length, offset))
        except OSError as error:
            results.append(error)
    return results
