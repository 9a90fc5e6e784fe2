"""Who of all monitors may run a request: one in each iteration of the event loop.

A flood of requests must not delay what else the loop serves: reads and writes of disks. What delays them is how long
one iteration takes, and so the monitors together get one request in each, in the order in which they asked; while
nobody else asks, that costs nothing. (Measured: four monitors with a hundred requests each raised the 99th percentile
of 4k reads from 0.11 to 0.9 ms when each had eight requests an iteration.)
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """`take` one before each request."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Return when it is the caller's turn: at once if nobody has had this iteration's."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        """A new iteration: the first who waits, and has not given up, goes on in the one after it."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._next)
                return
        self._taken = False
