"""Time that passes only when nothing else happens: programs that wait for seconds are tested in milliseconds.

    async def test() -> None:
        await asyncio.sleep(3600)            # takes no time
        await until(lambda: ready, 10.0)     # asked after each turn of the loop; no polling

    run(test())

In such an event loop sockets, threads and callbacks are real; only its clock is not. It stands still while anything
can happen, and when nothing can any more it jumps to the next timer. So deadlines are exact, however busy the machine
is, a silence of ten seconds is over at once, and what would hang for ever comes to its deadline instead, or, without
one, to an error.

Everything that is waited for has to be in this process: what another one does takes real time. Of a packet that
the kernel has and has not delivered yet nothing is known here; so the loop waits `GRACE` before each jump. Programs
take their time from the loop: give ``loop.time`` to those that want a clock.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Real seconds in which the kernel delivers, to the same machine, what has been sent.
GRACE: Final = 300e-6


class _Selector(selectors.EpollSelector):
    """Jumps where others sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        #: Calls in threads that have not ended.
        self.at_work = 0
        self.waiting: list[tuple[Callable[[], object], asyncio.Future[None]]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._wake():
            timeout = 0
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.at_work:
            return super().select(None)
        ready = super().select(GRACE)
        if not ready:
            if timeout is None:
                raise RuntimeError("nothing can happen any more: no timer, no thread and no packet is under way")
            self.now += timeout
        return ready

    def _wake(self) -> bool:
        """Wake those whose condition has come true; whether there are any."""
        woken = [entry for entry in self.waiting if entry[1].done() or entry[0]()]
        for entry in woken:
            self.waiting.remove(entry)
            if not entry[1].done():
                entry[1].set_result(None)
        return bool(woken)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = _Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = super().run_in_executor(executor, func, *args)
        self.selector.at_work += 1
        future.add_done_callback(self._back)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        self.selector.at_work += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self.selector.at_work -= 1

    def _back(self, _: object) -> None:
        self.selector.at_work -= 1


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in such a loop. Its clock begins at 0."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


async def until(condition: Callable[[], object], limit: float) -> None:
    """Wait until ``condition`` is true, which is asked after each turn of the loop, in a loop made by `run`.

    Raises TimeoutError ``limit`` seconds later if it is not.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    if not condition():
        future: asyncio.Future[None] = loop.create_future()
        loop.selector.waiting.append((condition, future))
        async with asyncio.timeout(limit):
            await future
