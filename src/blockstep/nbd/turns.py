"""Who may make an expensive request now: of all connections of a server, one in each iteration of the event loop.

A block status of many extents takes tens of milliseconds. One of them is what a small request of somebody else may
have to wait for; one of each connection that floods the server with them would be a second.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

from blockstep.aio.inline import Completion


class Turns:
    """First come, first served; who has had a turn goes to the end of the line."""

    __slots__ = ("_loop", "_taken", "_waiting")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._taken = False
        self._waiting: dict[Callable[[], None], None] = {}

    def take(self) -> bool:
        """Take this iteration's turn. False: somebody has had it; see `wait`."""
        if self._taken:
            return False
        self._taken = True
        self._loop.call_soon(self._next)
        return True

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call ``go_on`` when there is a turn to take. Once for each caller, however often it asks."""
        self._waiting[go_on] = None

    def _next(self) -> None:
        self._taken = False
        while self._waiting and not self._taken:
            go_on = next(iter(self._waiting))
            del self._waiting[go_on]
            go_on()


_lines: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[Completion[None]]] = WeakKeyDictionary()


async def let_others() -> None:
    """In the middle of long work: go on in another iteration of the event loop, in which nobody else does.

    All who wait here stand in one line, whichever server they work for.
    """
    loop = asyncio.get_running_loop()
    line = _lines.setdefault(loop, deque())
    turn: Completion[None] = Completion()
    line.append(turn)
    if len(line) == 1:
        loop.call_soon(_go_on, loop, line)
    await turn


def _go_on(loop: asyncio.AbstractEventLoop, line: deque[Completion[None]]) -> None:
    turn = line[0]
    try:
        turn.set_result(None)  # it may come back to the end of the line at once
    finally:
        line.popleft()
        if line:
            loop.call_soon(_go_on, loop, line)
