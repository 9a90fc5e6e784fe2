"""Strands: what runs when, what `done` is told, and a `Completion` awaited from a strand and from a task."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.aio.inline import Completion, start


class Ended:
    """A ``done`` that notes what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, BaseException | None]] = []

    def __call__(self, value: Any, error: BaseException | None) -> None:
        self.calls.append((value, error))

    @property
    def value(self) -> Any:
        [(value, error)] = self.calls
        assert error is None
        return value

    @property
    def error(self) -> BaseException:
        [(value, error)] = self.calls
        assert value is None
        assert error is not None
        return error


async def waits_for(awaitable: Any) -> Any:
    return await awaitable


def test_a_coroutine_that_never_waits_ends_before_start_returns_and_needs_no_loop() -> None:
    async def inner() -> int:
        return 7

    async def outer() -> int:
        return await inner() + 1

    ended = Ended()
    assert start(outer(), ended) is True
    assert ended.value == 8


def test_an_exception_without_a_wait_goes_to_done() -> None:
    async def fails() -> None:
        raise OSError(5, "no")

    ended = Ended()
    assert start(fails(), ended) is True
    assert isinstance(ended.error, OSError)


def test_what_is_no_exception_is_not_swallowed() -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    ended = Ended()
    with pytest.raises(KeyboardInterrupt):
        start(interrupted(), ended)
    assert ended.calls == []


def test_a_completion_resumes_its_strand_in_the_frame_of_the_setter() -> None:
    completion: Completion[int] = Completion()
    ended = Ended()
    assert start(waits_for(completion), ended) is False
    assert ended.calls == []
    completion.set_result(3)
    assert ended.value == 3


def test_an_error_of_a_completion_is_raised_in_the_strand() -> None:
    completion: Completion[int] = Completion()
    ended = Ended()
    start(waits_for(completion), ended)
    completion.set_error(OSError(28, "full"))
    assert ended.error.args == (28, "full")


def test_a_strand_may_handle_the_error_and_wait_again() -> None:
    first: Completion[int] = Completion()
    second: Completion[int] = Completion()

    async def tries_twice() -> int:
        try:
            return await first
        except OSError:
            return await second

    ended = Ended()
    start(tries_twice(), ended)
    first.set_error(OSError(5, "no"))
    assert ended.calls == []
    second.set_result(4)
    assert ended.value == 4


def test_a_completion_that_is_set_before_it_is_awaited_does_not_wait() -> None:
    completion: Completion[str] = Completion()
    completion.set_result("early")
    ended = Ended()
    assert start(waits_for(completion), ended) is True
    assert ended.value == "early"
    assert completion.done()
    assert completion.result() == "early"


@pytest.mark.parametrize("error", [None, OSError(28, "full")])
def test_watchers_hear_the_end_before_the_waiter_goes_on(error: OSError | None) -> None:
    completion: Completion[int] = Completion()
    log: list[str] = []
    first, second, ended = Ended(), Ended(), Ended()
    completion.watch(lambda value, error: log.append("watcher"))
    completion.watch(first)

    def waiter(value: Any, error: BaseException | None) -> None:
        log.append("waiter")
        ended(value, error)

    start(waits_for(completion), waiter)
    assert first.calls == []
    if error is None:
        completion.set_result(3)
    else:
        completion.set_error(error)
    completion.watch(second)  # it has ended: told at once
    assert log == ["watcher", "waiter"]
    assert first.calls == second.calls == ended.calls == [(3 if error is None else None, error)]


@given(st.permutations(range(6)))
def test_strands_end_in_the_order_in_which_they_are_resumed(order: list[int]) -> None:
    completions: list[Completion[int]] = [Completion() for _ in order]
    ended: list[int] = []
    for completion in completions:
        start(waits_for(completion), lambda value, error: ended.append(value))
    for index in order:
        completions[index].set_result(index)
    assert ended == order


def test_a_strand_runs_on_to_its_next_wait_before_the_setter_goes_on() -> None:
    log: list[str] = []
    first: Completion[None] = Completion()
    second: Completion[None] = Completion()

    async def body() -> None:
        log.append("started")
        await first
        log.append("between")
        await second
        log.append("end")

    start(body(), lambda value, error: log.append("done"))
    log.append("set first")
    first.set_result(None)
    log.append("set second")
    second.set_result(None)
    assert log == ["started", "set first", "between", "set second", "end", "done"]


def test_a_strand_can_wait_for_what_asyncio_has() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        lock, event = asyncio.Lock(), asyncio.Event()
        finished = loop.create_future()

        async def body() -> list[Any]:
            await asyncio.sleep(0)
            await event.wait()
            async with lock:
                pooled = await loop.run_in_executor(None, lambda: "pool")
            both = await asyncio.gather(asyncio.sleep(0, "a"), asyncio.sleep(0, "b"))
            return [pooled, *both]

        assert start(body(), lambda value, error: finished.set_result((value, error))) is False
        event.set()
        assert await finished == (["pool", "a", "b"], None)

    asyncio.run(main())


def test_a_failing_future_raises_in_the_strand() -> None:
    async def main() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended = Ended()
        start(waits_for(future), ended)
        future.set_exception(OSError(5, "no"))
        await asyncio.sleep(0)
        assert isinstance(ended.error, OSError)

    asyncio.run(main())


def test_a_cancelled_future_ends_the_strand_with_an_error() -> None:
    """Nobody can cancel a strand, but the future it waits for may be cancelled: `done` must hear of it."""
    async def main() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended = Ended()
        start(waits_for(future), ended)
        future.cancel()
        await asyncio.sleep(0)
        assert isinstance(ended.error, asyncio.CancelledError)

    asyncio.run(main())


def test_a_task_may_await_a_completion() -> None:
    async def main() -> None:
        completion: Completion[int] = Completion()
        task = asyncio.create_task(waits_for(completion))
        await asyncio.sleep(0)
        completion.set_result(5)
        assert not task.done()  # through the loop, as tasks are
        assert await task == 5

    asyncio.run(main())


def test_a_task_gets_the_error_of_a_completion() -> None:
    async def main() -> None:
        completion: Completion[int] = Completion()
        task = asyncio.create_task(waits_for(completion))
        await asyncio.sleep(0)
        completion.set_error(OSError(5, "no"))
        with pytest.raises(OSError, match="no"):
            await task

    asyncio.run(main())


def test_a_cancelled_task_stops_waiting_and_the_late_result_goes_nowhere() -> None:
    async def main() -> None:
        completion: Completion[int] = Completion()
        task = asyncio.create_task(waits_for(completion))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        completion.set_result(5)
        late: Completion[int] = Completion()
        other = asyncio.create_task(waits_for(late))
        await asyncio.sleep(0)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        late.set_error(OSError(5, "no"))

    asyncio.run(main())


def test_a_deadline_of_a_task_works_on_a_completion() -> None:
    async def main() -> None:
        completion: Completion[int] = Completion()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waits_for(completion), timeout=0.001)

    asyncio.run(main())
