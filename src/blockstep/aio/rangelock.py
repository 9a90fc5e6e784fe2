"""Overlapping ranges take turns; all others pass.

While requests end without waiting, nothing can come between two steps of one, and a held range never meets
another. Only once a request waits (a read that missed the page cache, a reply from a peer) can a second one reach
the same bytes. So the lock is made for the case that nobody is there: taking and giving back is a dictionary entry.

Shared holders (readers of the view) pass each other; an exclusive holder passes nobody. Waiters of one range are
served in the order in which they came; a waiter holds back all later comers that overlap it, so none starves.
"""

from __future__ import annotations

import asyncio
from typing import Final

from blockstep.aio.inline import Completion


class RangeLock:
    """A lock over byte ranges. Usage::

        token = lock.try_take(start, end) or await lock.take(start, end)
        try: ...
        finally: lock.give_back(token)
    """

    __slots__ = ("_held", "_next", "_waiting")

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, int, bool]] = {}
        self._waiting: dict[int, tuple[int, int, bool, Completion[None]]] = {}
        self._next = 1

    @property
    def idle(self) -> bool:
        """Whether nobody holds or waits for any range."""
        return not self._held and not self._waiting

    def try_take(self, start: int, end: int, shared: bool = False) -> int:
        """Take ``[start, end)`` now. Returns a token (never 0), or 0 if somebody is in the way."""
        if self._held and self._blocked(start, end, shared, self._next):
            return 0
        token = self._next
        self._next += 1
        self._held[token] = (start, end, shared)
        return token

    async def take(self, start: int, end: int, shared: bool = False) -> int:
        """Take ``[start, end)``, waiting for those who hold or were earlier to wait for a part of it.

        A task that is cancelled meanwhile holds nothing, and holds nobody back.
        """
        token = self.try_take(start, end, shared)
        if token:
            return token
        token = self._next
        self._next += 1
        waiter: Completion[None] = Completion()
        self._waiting[token] = (start, end, shared, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if self._waiting.pop(token, None) is None:  # granted already, though it was not told yet
                del self._held[token]
            self._grant()
            raise
        return token

    def give_back(self, token: int) -> None:
        """Release what `take` or `try_take` returned; waiters that it held back go on at once."""
        del self._held[token]
        if self._waiting:
            self._grant()

    def _grant(self) -> None:
        ready = []
        for waiting, (start, end, shared, waiter) in list(self._waiting.items()):
            if not self._blocked(start, end, shared, waiting):
                del self._waiting[waiting]
                self._held[waiting] = (start, end, shared)
                ready.append(waiter)
        for waiter in ready:
            waiter.set_result(None)

    def _blocked(self, start: int, end: int, shared: bool, token: int) -> bool:
        for held_start, held_end, held_shared in self._held.values():
            if held_start < end and start < held_end and not (shared and held_shared):
                return True
        for earlier, (held_start, held_end, held_shared, _) in self._waiting.items():
            if earlier >= token:
                break
            if held_start < end and start < held_end and not (shared and held_shared):
                return True
        return False


class BusyRanges:
    """Which ranges are out, when there may be a hundred of them: overlaps are found by where they are, not by trying.

    Nobody waits here: `try_take` says no, and the one who asks comes again when something was given back.
    """

    #: Ranges are filed under each 128 KiB of the disk that they touch.
    _SHIFT: Final = 17

    __slots__ = ("_filed",)

    def __init__(self) -> None:
        self._filed: dict[int, list[tuple[int, int]]] = {}

    def try_take(self, start: int, end: int) -> bool:
        """Take ``[start, end)`` unless a part of it is out."""
        filed = self._filed
        first, last = start >> self._SHIFT, (end - 1) >> self._SHIFT
        for place in range(first, last + 1):
            for taken_start, taken_end in filed.get(place, ()):
                if taken_start < end and start < taken_end:
                    return False
        for place in range(first, last + 1):
            if place in filed:
                filed[place].append((start, end))
            else:
                filed[place] = [(start, end)]
        return True

    def give_back(self, start: int, end: int) -> None:
        """Give back what `try_take` took."""
        filed = self._filed
        for place in range(start >> self._SHIFT, ((end - 1) >> self._SHIFT) + 1):
            if len(filed[place]) == 1:
                del filed[place]
            else:
                filed[place].remove((start, end))
