"""Overlapping ranges take turns; all others pass.

While requests end without waiting, nothing can come between two steps of one, and a held range never meets
another. Only once a request waits (a read that missed the page cache, a reply from a peer) can a second one reach
the same bytes. So the lock is made for the case that nobody is there: taking and giving back is a dictionary entry.

Shared holders (readers of the view) pass each other; an exclusive holder passes nobody. Waiters of one range are
served in the order in which they came; a waiter holds back all later comers that overlap it, so none starves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from blockstep.aio.inline import Completion


class RangeLock:
    """A lock over byte ranges. Usage::

        token = lock.try_take(start, end) or await lock.take(start, end)
        try: ...
        finally: lock.give_back(token)
    """

    __slots__ = ("_granted", "_held", "_is_telling", "_next", "_waiting")

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, int, bool]] = {}
        self._waiting: dict[int, tuple[int, int, bool, Completion[None]]] = {}
        # Those who hold their range now, and have not been told.
        self._granted: deque[Completion[None]] = deque()
        self._is_telling = False
        self._next = 1

    @property
    def idle(self) -> bool:
        """Whether nobody holds or waits for any range."""
        return not self._held and not self._waiting

    @property
    def held(self) -> list[tuple[int, int]]:
        """The ranges that are held now, as (start, end)."""
        return [(start, end) for start, end, _ in self._held.values()]

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
        """Release what `take` or `try_take` returned; waiters that it held back have their ranges, and go on at once.

        Where this is called by one of them that has just gone on, they do so after that, and not within: each of
        a hundred that wait for one range may end, and give it back, in the frame in which it goes on.
        """
        del self._held[token]
        if self._waiting:
            self._grant()

    def _grant(self) -> None:
        for waiting, (start, end, shared, waiter) in list(self._waiting.items()):
            if not self._blocked(start, end, shared, waiting):
                del self._waiting[waiting]
                self._held[waiting] = (start, end, shared)
                self._granted.append(waiter)
        if self._is_telling:
            return
        self._is_telling = True
        try:
            while self._granted:
                self._granted.popleft().set_result(None)
        finally:
            self._is_telling = False

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
    """Which ranges are out, when there may be a hundred of them.

    Kept as the set of the 4 KiB pages that they touch, so that looking for an overlap costs the same however many
    are out; neighbours within a page count as overlapping. A range of more than `WIDE` bytes goes out alone.
    Nobody waits here: `try_take` says no, and the one who asks comes again when something was given back.
    """

    #: Bytes above which pages are not counted any more: 64 MiB would be 16384 of them.
    WIDE: Final = 16 << 20

    __slots__ = ("_pages", "_wide")

    def __init__(self) -> None:
        self._pages: set[int] = set()
        self._wide = False

    def try_take(self, start: int, end: int) -> bool:
        """Take ``[start, end)`` unless a part of it is out."""
        pages = self._pages
        first, last = start >> 12, (end - 1) >> 12
        if first == last:
            if first in pages or self._wide:
                return False
            pages.add(first)
            return True
        if end - start > self.WIDE:
            if pages or self._wide:
                return False
            self._wide = True
            return True
        if self._wide or not pages.isdisjoint(range(first, last + 1)):
            return False
        pages.update(range(first, last + 1))
        return True

    def give_back(self, start: int, end: int) -> None:
        """Give back what `try_take` took."""
        first, last = start >> 12, (end - 1) >> 12
        if first == last:
            self._pages.remove(first)
        elif end - start > self.WIDE:
            self._wide = False
        else:
            self._pages.difference_update(range(first, last + 1))
