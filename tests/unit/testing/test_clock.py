"""Time that passes only when nothing else happens."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from blockstep.aio.pool import in_thread
from blockstep.testing.clock import run, until


def test_hours_pass_at_once_and_in_order() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        seen: list[float] = []
        for delay in (3600.0, 0.5, 7.0):
            loop.call_later(delay, lambda: seen.append(loop.time()))
        await asyncio.sleep(4000)
        return seen

    began = time.monotonic()
    assert run(main()) == [0.5, 7.0, 3600.0]
    assert time.monotonic() - began < 5


def test_time_stands_still_while_a_thread_works_and_while_a_packet_is_under_way() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(1e-6):
            await in_thread(time.sleep, 0.02)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.send(b"x")
            async with asyncio.timeout(1e-6):
                assert await loop.sock_recv(ours, 1) == b"x"
        assert loop.time() == 0

    run(main())


def test_a_condition_is_seen_in_the_turn_in_which_it_comes_true() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen: list[int] = []
        loop.call_later(5, seen.append, 1)
        loop.call_later(6, seen.append, 2)
        await until(lambda: seen, 10)
        assert (seen, loop.time()) == ([1], 5)
        with pytest.raises(TimeoutError):
            await until(lambda: len(seen) == 3, 10)
        assert loop.time() == 15

    run(main())


def test_what_waits_for_ever_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing can happen any more"):
        run(main())
