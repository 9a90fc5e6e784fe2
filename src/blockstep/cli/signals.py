"""The event loop of commands, and how those that have something to take away end at a signal."""

from __future__ import annotations

import gc
import sys
from collections.abc import Coroutine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")



def run(work: Coroutine[Any, Any, T]) -> T:
    """Do the work in an event loop. From now on garbage is looked for, in what is not there yet."""
    import asyncio

    gc.freeze()
    gc.enable()
    return asyncio.run(work)


def run_unless_told(work: Coroutine[Any, Any, T]) -> T:
    """Do the work in an event loop. SIGTERM, SIGINT and SIGHUP cancel it, and end the program with 128 + the signal
    when the work has taken away what it had begun; one that was ignored from the beginning (nohup) still is."""
    import asyncio
    import signal

    caught: list[int] = []

    async def until_told() -> T:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()

        def told(number: int) -> None:
            caught.append(number)
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, told, number)
        return await task

    try:
        return run(until_told())
    except asyncio.CancelledError:
        sys.exit(128 + caught[0] if caught else 1)
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # asyncio's idea of how it was before
            signal.signal(signal.SIGINT, signal.SIG_DFL)
