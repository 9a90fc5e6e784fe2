"""The event loop of the programs: it looks out for a moment before it falls asleep.

A request that goes through three processes is a few ten microseconds of work; falling asleep and being woken
costs each of them as much again, more on a virtual machine, whose processor is given up meanwhile. So a loop that has
nothing to do looks on for `AWAKE` seconds whether something comes, on any of its sockets, and sleeps then. Between
two looks it gives the processor to whoever wants it, so that on a busy machine others do not wait for it.

Nothing is looked out for while threads of ours are at work (they need the interpreter that looking holds), and less
and less often if nothing ever comes in time (`Patience`): a quiet program costs nothing.

Measured on two cores, looking out against sleeping at once: a write that is acknowledged on both sides, 4k, depth 1,
7.5 k to 12 k a second, depth 16, 34 k to 46 k; an export, depth 1, 20 k to 24 k.
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import selectors
from collections.abc import Coroutine
from time import perf_counter
from typing import Any, Final, TypeVar

from blockstep.aio import pool

T = TypeVar("T")

#: Seconds: a standby of ours answers a batch of sixteen writes in that time.
AWAKE: Final = 200e-6
#: After so many times in a row that nothing came, one in 2^6 is looked out for.
MOST_MISSES: Final = 6


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in a loop that stays awake. From now on garbage is looked for, in what is not there yet."""
    gc.freeze()
    gc.enable()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(WakefulSelector())) as runner:
        return runner.run(main)


class Patience:
    """How often to look out for what may not come in time: after n misses in a row, one time in 2^n."""

    __slots__ = ("_misses", "_most", "_skip")

    def __init__(self, most: int = MOST_MISSES) -> None:
        """``most``: the misses that count, at the most."""
        self._most = most
        self._misses = self._skip = 0

    def allows(self) -> bool:
        """Whether to look out this time."""
        if self._skip:
            self._skip -= 1
            return False
        return True

    def learn(self, came: bool) -> None:
        """What looking out has brought."""
        self._misses = 0 if came else min(self._misses + 1, self._most)
        self._skip = (1 << self._misses) - 1


class WakefulSelector(selectors.EpollSelector):
    """See the module."""

    def __init__(self, awake: float = AWAKE) -> None:
        super().__init__()
        self.patience = Patience()
        self._awake = awake
        self._all = select.poll()
        self._all.register(self.fileno(), select.POLLIN)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As of all selectors."""
        if (timeout is None or timeout > 0) and not pool.at_work() and self.patience.allows():
            self.patience.learn(self._look_out(self._awake if timeout is None else min(timeout, self._awake)))
        return super().select(timeout)

    def _look_out(self, seconds: float) -> bool:
        look, yield_, end = self._all.poll, os.sched_yield, perf_counter() + seconds
        while not look(0):
            yield_()
            if perf_counter() >= end:
                return False
        return True
