"""System calls that may wait for a device, made in a few threads so that the event loop does not.

One pool serves all drivers: what is waited for is the storage, and a device has only so many requests that it can
work on at a time. A trip to a thread and back costs some ten microseconds, which is why drivers first try what
ends at once (`blockstep.aio.posix.Cached`) and come here with the rest.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import get_native_id
from typing import Final, ParamSpec, TypeVar

from blockstep.aio.endings import wait_out
from blockstep.errors import noting

P = ParamSpec("P")
T = TypeVar("T")

#: Requests that wait for storage at the same time; what comes beyond them queues.
THREADS: Final = 16

_pool: Final = ThreadPoolExecutor(THREADS, "blockstep-io")
#: Freeing a gigabyte takes a core for tens of milliseconds: it is done by one thread, when nobody else wants the core.
_releasing: Final = ThreadPoolExecutor(
    1, "blockstep-release", lambda: os.setpriority(os.PRIO_PROCESS, get_native_id(), 19))


_at_work = 0


def at_work() -> bool:
    """Whether a request of this process is in a thread."""
    return _at_work > 0


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``function(*args)`` in a thread of the pool, and return or raise what it does.

    May be awaited in a strand. A task that is cancelled here is cancelled only once the thread has ended: nobody
    finds a buffer still in use, or a range still being written, whose request has gone.
    """
    global _at_work
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(_pool, lambda: function(*args, **kwargs))
    _at_work += 1
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await wait_out(future)
        future.exception()
        raise
    finally:
        _at_work -= 1


async def made_in_thread(undo: Callable[[T], object], make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `in_thread`, for what somebody has to close: an open file, say, with its lock.

    A task that is cancelled here never gets it. So if it was made, ``undo`` is called with it in a thread before the
    task is cancelled; what it raises changes nothing about that.
    """
    made: list[T] = []
    try:
        await in_thread(lambda: made.append(make(*args, **kwargs)))
    except asyncio.CancelledError as error:
        if made:
            with noting(error):
                await in_thread(undo, made[0])
        raise
    return made[0]


def in_background(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Callable[[], None]:
    """Run ``function(*args)`` in a thread of low priority soon, without waiting: to release what nobody uses any more.

    The thread is woken in the loop's next turn, not now, so that it does not take the processor from the caller.
    Whatever is still to be released when the loop ends goes with the process.

    On a busy machine that thread gets nowhere for seconds. Who comes again and again would leave more and more, and so
    calls what this returns: what has not begun by then is done soon by another thread, at the program's priority.
    """
    todo = [partial(function, *args, **kwargs)]

    def release() -> None:
        try:
            call = todo.pop()
        except IndexError:  # the other thread has begun with it
            return
        call()

    def hasten() -> None:
        if todo:
            asyncio.get_running_loop().call_soon(_pool.submit, release)

    asyncio.get_running_loop().call_soon(_releasing.submit, release)
    return hasten
