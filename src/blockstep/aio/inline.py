"""Coroutines on the path of a request, run without a task.

A request is a chain of plain ``async def`` calls: export, filter, overlay, file. Most requests never wait: the
data is in the page cache. An asyncio task would cost more than all the rest of such a request, so a request is a
*strand* instead:

    start(coroutine, done)
       │  runs in the caller's frame, now
       ├─ ends without waiting ──────────────► done(value, error), before start() returns
       └─ waits for a future ─► strand ─► resumed by that future ─► ... ─► done(value, error)

A strand can await anything that ends in an asyncio future (locks, events, thread pools, gather), and
`Completion`, the light future of this module. It is *not* a task: ``asyncio.current_task()`` is None in it, so
``asyncio.timeout``, ``wait_for`` and ``TaskGroup`` do not work there, and nobody can cancel it: a request always
runs to its end. Whoever needs a deadline puts it into the thing that is waited for.

Order: strands resumed by a `Completion` run in the frame of the one who sets it, at once. The setter must have
its own state in order before it does. Strands resumed by asyncio futures run from the event loop, as tasks do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: What a strand calls at its end: ``done(value, None)`` or ``done(None, error)``.
Done = Callable[[Any, BaseException | None], None]


def start(coroutine: Coroutine[Any, Any, T], done: Done) -> bool:
    """Run ``coroutine`` up to its first wait. Returns True if it ended (``done`` has been called then)."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration as stop:
        done(stop.value, None)
        return True
    except (Exception, asyncio.CancelledError) as error:
        done(None, error)
        return True
    _Strand(coroutine, done)._wait(waits_for)
    return False


def go_on(coroutine: Coroutine[Any, Any, Any], waits_for: Any, done: Done) -> None:
    """Go on with a coroutine that the caller has started itself, and whose ``send(None)`` gave ``waits_for``.

    For loops over many requests: most of them end in that first send, and need no ``done`` at all.
    """
    _Strand(coroutine, done)._wait(waits_for)


async def together(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Start all ``coroutines`` before waiting for any, and run them to their ends.

    Returns their values in order; where one failed, the exception stands in place of the value.
    """
    results, running = start_all(coroutines)
    if running is not None:
        await running.wait()
    return results


def start_all(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> tuple[list[Any], Running | None]:
    """`together` for the hot path: the results, and what to ``await ... .wait()`` for until they are complete."""
    results: list[Any] = []
    running: Running | None = None
    for coroutine in coroutines:
        try:
            waits_for = coroutine.send(None)
        except StopIteration as stop:
            results.append(stop.value)
        except Exception as error:
            results.append(error)
        else:
            if running is None:
                running = Running(results)
            _Strand(coroutine, running.add(len(results)))._wait(waits_for)
            results.append(None)
    return results, running


class Running:
    """Those of `start_all` that wait for something."""

    __slots__ = ("_all_ended", "_left", "_results")

    def __init__(self, results: list[Any]) -> None:
        self._results = results
        self._left = 0
        self._all_ended: Completion[None] | None = None

    def add(self, index: int) -> Done:
        """One more; returns what it calls at its end."""
        self._left += 1

        def ended(value: Any, error: BaseException | None) -> None:
            self._results[index] = value if error is None else error
            self._left -= 1
            if not self._left and self._all_ended is not None:
                self._all_ended.set_result(None)

        return ended

    async def wait(self) -> None:
        """Until all have ended."""
        if self._left:
            self._all_ended = Completion()
            await self._all_ended


def submit(coroutine: Coroutine[Any, Any, object], done: Callable[[BaseException | None], None]) -> None:
    """As `start`, for those who only want to know how it ended: ``done(error or None)``."""
    start(coroutine, lambda _, error: done(error))


class _Strand:
    """A started coroutine that waits for something."""

    __slots__ = ("_coroutine", "_done")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], done: Done) -> None:
        self._coroutine = coroutine
        self._done = done

    def _wait(self, waits_for: Any) -> None:
        if type(waits_for) is Completion:
            waits_for._strand = self
        elif waits_for is None:  # a bare yield: asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(self._resume)
        else:
            waits_for._asyncio_future_blocking = False
            waits_for.add_done_callback(self._resume)

    def _resume(self, _future: object = None) -> None:
        try:
            waits_for = self._coroutine.send(None)
        except StopIteration as stop:
            self._done(stop.value, None)
        except (Exception, asyncio.CancelledError) as error:  # cancelled: what it waited for, not the strand
            self._done(None, error)
        else:
            self._wait(waits_for)


class Completion(Generic[T]):
    """A future for one waiter that is resumed at once, in the frame of `set_result` or `set_error`; others may `watch`.

    For results that arrive in batches (replies from a socket): resuming costs a call, not a turn of the event
    loop. A task may await it as well; it is then woken through the loop, as tasks are.
    """

    __slots__ = ("_asyncio_future_blocking", "_callbacks", "_error", "_is_done", "_strand", "_value", "_watchers")

    def __init__(self) -> None:
        self._is_done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._strand: _Strand | None = None
        self._callbacks: list[tuple[Callable[[Any], object], Any, asyncio.AbstractEventLoop]] | None = None
        self._watchers: list[Done] | None = None
        self._asyncio_future_blocking = False

    def done(self) -> bool:
        """Whether a result or an error is there."""
        return self._is_done

    def set_result(self, value: T) -> None:
        """Hand over the result and resume the waiter. A second call, or one after `set_error`, is a bug."""
        if self._is_done:
            assert isinstance(self._error, asyncio.CancelledError)
            return
        self._is_done = True
        self._value = value
        self._wake()

    def set_error(self, error: BaseException) -> None:
        """Make the waiter raise ``error``."""
        if self._is_done:
            assert isinstance(self._error, asyncio.CancelledError)
            return
        self._is_done = True
        self._error = error
        self._wake()

    def result(self) -> T:
        """The result, or raises the error. Only after the end."""
        assert self._is_done
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def watch(self, done: Done) -> None:
        """Call ``done(value, error)`` at the end, before the waiter goes on; at once if it has ended.

        For layers that count, and would need a coroutine only to see the end.
        """
        if self._is_done:
            done(self._value, self._error)
        elif self._watchers is None:
            self._watchers = [done]
        else:
            self._watchers.append(done)

    def _wake(self) -> None:
        if self._watchers is not None:
            for done in self._watchers:
                done(self._value, self._error)
        if self._strand is not None:
            self._strand._resume()
        elif self._callbacks:
            for callback, context, loop in self._callbacks:
                loop.call_soon(callback, self, context=context)

    def __await__(self) -> Generator[Any, None, T]:
        if not self._is_done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    # What asyncio's Task asks of a future.

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Any = None) -> None:
        if self._is_done:
            asyncio.get_running_loop().call_soon(callback, self, context=context)
        else:
            # The loop of today: asyncio.run cancels its last tasks while none is running.
            self._callbacks = [*(self._callbacks or []), (callback, context, asyncio.get_running_loop())]

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        before = self._callbacks or []
        self._callbacks = [entry for entry in before if entry[0] != callback]
        return len(before) - len(self._callbacks)

    def cancel(self, msg: object = None) -> bool:
        """A cancelled task stops waiting; the result, when it comes, goes nowhere."""
        if self._is_done:
            return False
        self._is_done = True
        self._error = asyncio.CancelledError(msg)
        self._wake()
        return True

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()
