"""The loop that looks out before it sleeps: what it must still do, and when it does not look."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from blockstep.aio.loop import Patience, WakefulSelector, run
from blockstep.aio.pool import at_work, in_thread
from blockstep.cli import signals


class Looks(WakefulSelector):
    """Counts how often it looked out, and what that brought."""

    def __init__(self, awake: float) -> None:
        super().__init__(awake)
        self.found: list[bool] = []

    def _look_out(self, seconds: float) -> bool:
        found = super()._look_out(seconds)
        self.found.append(found)
        return found


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def selector() -> Iterator[Looks]:
    with Looks(awake=60) as selector:
        yield selector


def test_what_comes_while_it_looks_out_is_reported_as_ever(selector: Looks, pipe: tuple[int, int]) -> None:
    selector.register(pipe[0], select.EPOLLIN, "reader")
    threading.Timer(0.01, os.write, (pipe[1], b"x")).start()
    [(key, _)] = selector.select()
    assert key.data == "reader"
    assert selector.found == [True]


def test_a_program_to_which_nothing_comes_in_time_looks_out_less_and_less_often() -> None:
    patience = Patience(3)
    allowed = []
    for _ in range(20):
        allowed.append(patience.allows())
        if allowed[-1]:
            patience.learn(False)
    assert [number for number, yes in enumerate(allowed) if yes] == [0, 2, 6, 14]
    patience.learn(True)
    assert patience.allows()


def test_a_timer_is_not_late_for_the_looking(selector: Looks, pipe: tuple[int, int]) -> None:
    selector.register(pipe[0], select.EPOLLIN)
    assert selector.select(0.001) == []
    assert selector.found == [False]


def test_without_time_to_wait_nothing_is_looked_out_for(selector: Looks) -> None:
    assert selector.select(0) == []
    assert selector.found == []


def test_while_a_thread_works_it_gets_the_interpreter(selector: Looks, pipe: tuple[int, int]) -> None:
    async def main() -> None:
        assert not at_work()
        waiting = asyncio.ensure_future(in_thread(os.read, pipe[0], 1))
        await asyncio.sleep(0)
        assert at_work()
        asyncio.get_running_loop().call_later(0.001, os.write, pipe[1], b"x")
        before = len(selector.found)
        assert await waiting == b"x"
        assert not at_work()
        assert len(selector.found) == before

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())


def test_run_returns_and_raises_what_the_program_does() -> None:
    async def returns() -> int:
        return 7

    async def raises() -> None:
        raise OSError(5, "x")

    assert run(returns()) == 7
    with pytest.raises(OSError, match="x"):
        run(raises())


@pytest.mark.parametrize("begin", [run, signals.run, signals.run_unless_told])
def test_garbage_is_looked_for_once_a_loop_runs(begin: Callable[[Coroutine[Any, Any, bool]], bool]) -> None:
    """The programs do not look while they import: see `blockstep.cli.main`."""

    async def looked_for() -> bool:
        return gc.isenabled()

    gc.disable()
    assert begin(looked_for())
