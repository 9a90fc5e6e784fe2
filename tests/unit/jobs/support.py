"""What the tests of jobs share: a clock turned by hand, a listener, a picture of the graph."""

from __future__ import annotations

import asyncio
import errno
import heapq
from collections.abc import Callable, Mapping
from typing import Any

import blockstep.drivers  # noqa: F401  (they register themselves)
from blockstep.block.graph import Graph
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.jobs.job import Job


class HandClock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._count = 0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> _Timer:
        self._count += 1
        timer = _Timer(callback, args)
        heapq.heappush(self._timers, (self.now + delay, self._count, timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Let time pass, and everything happen that it brings about."""
        end = self.now + seconds
        await settle()
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            timer.run()
            await settle()
        self.now = end
        await settle()


class _Timer:
    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._callback, self._args = callback, args
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def run(self) -> None:
        if not self._cancelled:
            self._callback(*self._args)


class Listener:
    """Keeps all events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, data: Mapping[str, Any]) -> None:
        self.events.append((name, dict(data)))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events if name != "JOB_STATUS_CHANGE"]

    @property
    def states(self) -> list[str]:
        return [data["status"] for name, data in self.events if name == "JOB_STATUS_CHANGE"]

    def last(self, name: str) -> dict[str, Any]:
        return next(data for known, data in reversed(self.events) if known == name)


async def settle(turns: int = 200) -> None:
    """Let everything happen that needs no time and no other thread."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def reach(job: Job, *states: str) -> None:
    """Wait until the job is in one of ``states``."""
    while job.status not in states:
        assert job.status != "null", job.error
        await asyncio.sleep(0)


#: The states in which a job with a ready state can be cancelled before it ends; for `cancelled`.
CANCELLABLE = ("running", "paused", "ready", "standby", "pending")


async def cancelled(job: Job, when: str, target: Blkdebug) -> None:
    """Launch a job that writes to ``target``, cancel it in the state ``when``, and see that it ends with ECANCELED."""
    if when in ("running", "paused"):
        target.suspend("write", "held")
        await job.launch()
        await target.suspended("held")
    else:
        await job.launch()
        await reach(job, "ready")
    if when in ("paused", "standby"):
        job.pause()
    elif when == "pending":
        job.complete()
        await reach(job, "pending")
    job.cancel(force=True)
    await settle(20)
    if when in ("running", "paused"):
        target.resume("held")
    error = await job.wait()
    assert isinstance(error, OSError)
    assert error.errno == errno.ECANCELED


def picture(graph: Graph) -> dict[str, Any]:
    """All of the graph that a job might forget to put back."""
    return {
        name: (
            {child.name: (child.node.name, child.taken, child.shared) for child in node.children.values()},
            sorted((edge.parent.description, edge.name, edge.taken, edge.shared) for edge in node.parents),
            len(node.watchers), node.blockers, node.read_only,
        )
        for name, node in graph.nodes.items()
    }
