"""Who of all monitors may run a request: one, and then the event loop has some iterations for itself.

A flood of requests must not delay what else the loop serves: reads and writes of disks. What delays them is a request
of a monitor in the iterations that they take, which are two, one with the request and one with the reply. So the
monitors together get one request in each `REST` + 1 iterations, in the order in which they asked. While nobody asks,
that costs nothing, and an iteration without work takes a few microseconds.

Measured, the 99th percentile of 4k reads, one after the other: 85 us beside idle monitors. Beside one with a hundred
requests under way: 280 with eight requests an iteration, 200 with one, 130 with one in three.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

#: Iterations without a turn after each turn.
REST: Final = 2


class Turns:
    """`take` one before each request."""

    def __init__(self) -> None:
        self._taken = False
        self._rest = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Return when it is the caller's turn: at once if nobody has had one lately."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken, self._rest = True, REST
            loop.call_soon(self._next)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        """Some iterations later: the first who waits, and has not given up, goes on in the next one."""
        loop = asyncio.get_running_loop()
        if self._rest:
            self._rest -= 1
            loop.call_soon(self._next)
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._rest = REST
                loop.call_soon(self._next)
                return
        self._taken = False
