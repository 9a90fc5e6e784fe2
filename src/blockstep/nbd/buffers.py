"""The memory that a connection receives into.

Requests are decoded where they were received, and the payload of a write is a slice of that memory. While a write
is in flight its slice must not change, so a buffer is an *arena*: receiving only ever appends, and it starts again
at the front only when nobody uses what is in it.

    0        start        end              size
    ├─ used ──┼─ tail ─────┼─ free ─────────┤     tail: an incomplete request; its end is not here yet
                           └► the next recv_into

When the free space runs short and somebody still uses what lies before, the arena is left to its users and the tail
moves to another one; the last user gives it back to the pool. A request that does not fit into an arena gets a
larger one, and the connection goes on with that size for as long as such requests come.

Large arenas are what clients can make a server hold: all connections together have one *budget* for them. A
connection that gets none receives nothing until others have given theirs back, first come, first served; small
requests need none. One is always given, whatever the budget. While somebody waits, nobody keeps a large arena for
what may come: those that hold no part of a request are given back at once, or by their last users, and who waits
itself holds a small one, if what it has received fits into that.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from typing import Final

#: Sizes of arenas: room for a batch of small requests, then for one request of up to 1, 4, 16 and 32 MiB.
SIZES: Final = tuple((1 << shift) + (64 << 10) for shift in (18, 20, 22, 24, 25))
#: Below this much free space receiving becomes inefficient.
_LEAST_FREE: Final = 32 << 10
#: A tail of at most this many bytes is moved to the front whenever nobody uses the arena.
_CHEAP_MOVE: Final = 64 << 10
#: After so many batches without a request that needs it, a large arena is given up.
_QUIET_BATCHES: Final = 256


class Arena:
    """A piece of memory and how many requests use it."""

    __slots__ = ("pool", "retired", "size", "users", "view")

    def __init__(self, size: int, pool: Pool) -> None:
        # Mapped, not cleared: a client that is silent costs a page, not an arena (1500 of them: 465 MB to 40).
        self.view = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.size = size
        self.users = 0
        self.retired = False
        self.pool = pool

    def release(self) -> None:
        """One user less."""
        self.users -= 1
        if self.retired and not self.users:
            self.pool.give_back(self)


class Pool:
    """Spare arenas, so that memory is not mapped and cleared anew for each batch. Keeps ``limit`` bytes at most.

    ``budget``: bytes of large arenas that may be out.
    """

    __slots__ = ("_budget", "_limit", "_out", "_spare", "_waiting", "holders", "kept")

    def __init__(self, limit: int = 16 << 20, budget: int = 1 << 30) -> None:
        self._limit, self._budget = limit, budget
        #: Bytes of large arenas that are out, and who waits for some of them to come back.
        self._out = 0
        self._waiting: deque[Callable[[], bool]] = deque()
        self._spare: dict[int, list[Arena]] = {size: [] for size in SIZES}
        #: Who receives into a large arena.
        self.holders: dict[ReceiveBuffer, None] = {}
        #: Bytes in spare arenas.
        self.kept = 0

    def take(self, least: int, instead: Arena | None = None) -> Arena:
        """An arena of at least ``least`` bytes that nobody uses. ``instead``: that one will come back for it.

        Raises MemoryError if the budget has not so much.
        """
        size = next((size for size in SIZES if size >= least), least)
        if size > SIZES[0]:
            others = self._out - (instead.size if instead is not None and instead.size > SIZES[0] else 0)
            if others and others + size > self._budget:
                raise MemoryError(size)
            self._out += size
        spare = self._spare.get(size)
        if spare:
            self.kept -= size
            arena = spare.pop()
            arena.retired = False
            return arena
        return Arena(size, self)

    def give_back(self, arena: Arena) -> None:
        """Take an arena back that nobody uses or receives into."""
        if arena.size > SIZES[0]:
            self._out -= arena.size
        spare = self._spare.get(arena.size)
        if spare is not None and self.kept + arena.size <= self._limit:
            self.kept += arena.size
            spare.append(arena)
        if arena.size > SIZES[0]:
            self._wake()

    def wait(self, again: Callable[[], bool]) -> None:
        """Call ``again`` when large arenas come back, perhaps at once, until it says that it needs none any more."""
        self._waiting.append(again)
        for buffer in list(self.holders):
            buffer.let_go()

    @property
    def is_short(self) -> bool:
        """Whether somebody waits for a large arena."""
        return bool(self._waiting)

    def _wake(self) -> None:
        while self._waiting:
            # Who is asked may give back another arena for the one it gets, and so bring us here again.
            again = self._waiting.popleft()
            if not again():
                self._waiting.appendleft(again)
                break


class ReceiveBuffer:
    """The arena that a connection receives into, and where the undecoded bytes lie in it."""

    __slots__ = ("_large", "_pool", "arena", "end", "is_settled", "need", "start", "view")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.arena = pool.take(0)
        self.view = self.arena.view
        #: The undecoded bytes are ``view[start:end]``.
        self.start = 0
        self.end = 0
        #: What the incomplete request at ``start`` still lacks.
        self.need = 0
        #: False from the decoding of a batch to its end: there are requests in it that do not count as users yet.
        self.is_settled = True
        self._large = 0  # for how many batches more a large arena is worth having

    def target(self) -> memoryview:
        """Where to receive. For a large payload it ends with the payload, so that nothing behind it must move."""
        if self.need > _LEAST_FREE:
            return self.view[self.end:self.end + self.need]
        return self.view[self.end:]

    def add(self, data: bytes | bytearray) -> None:
        """Append bytes that were received elsewhere."""
        self.need = max(self.need, len(data))
        self.settle()
        self.view[self.end:self.end + len(data)] = data
        self.end += len(data)
        self.need = 0

    def settle(self) -> bool:
        """After a batch: make room for what comes next. ``need`` bytes at least will fit behind ``end``.

        False: not now, the budget of large arenas is used up (see `Pool.wait`). Receive nothing, and settle again.
        """
        arena, tail = self.arena, self.end - self.start
        self.is_settled = True
        if arena.size > SIZES[0] or self.need > SIZES[0]:
            self._large = _QUIET_BATCHES if self.need > SIZES[0] else self._large - 1
            if self._large <= 0 or self._pool.is_short:
                self.let_go()
                arena = self.arena
        if not arena.users:
            if not tail:
                self.start = self.end = 0
                return True
            if self.start and tail <= _CHEAP_MOVE:
                self.view[:tail] = self.view[self.start:self.end]
                self.start, self.end = 0, tail
        free = arena.size - self.end
        if free >= self.need and (free >= _LEAST_FREE or self.need > _LEAST_FREE):
            return True
        if not arena.users and arena.size >= tail + max(self.need, _LEAST_FREE):
            self.view[:tail] = self.view[self.start:self.end]
            self.start, self.end = 0, tail
        else:
            try:
                self._change(max(tail + self.need, arena.size if self._large > 0 else 0), tail)
            except MemoryError:
                if arena.size > SIZES[0] and tail <= SIZES[0]:
                    self._change(0, tail)
                return tail + self.need <= SIZES[0]
        return True

    def let_go(self) -> None:
        """Leave a large arena to its users, or to the pool, if nothing that was received has still to be looked at."""
        if self.arena.size > SIZES[0] and self.is_settled and self.start == self.end:
            self._large = 0
            self._change(0, 0)

    def give_up(self) -> None:
        """The connection is gone: leave the arena to its users, or to the pool."""
        self._pool.holders.pop(self, None)
        self.arena.retired = True
        if not self.arena.users:
            self._pool.give_back(self.arena)

    def _change(self, least: int, tail: int) -> None:
        """Go on in another arena, at its front. Raises MemoryError; then nothing has changed."""
        old, view = self.arena, self.view
        self.arena = self._pool.take(least, None if old.users else old)
        self.view = self.arena.view
        self.view[:tail] = view[self.start:self.end]
        self.start, self.end = 0, tail
        if self.arena.size > SIZES[0]:
            self._pool.holders[self] = None
        else:
            self._pool.holders.pop(self, None)
        old.retired = True
        if not old.users:
            self._pool.give_back(old)
