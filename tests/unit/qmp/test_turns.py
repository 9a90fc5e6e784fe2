"""One request in a few iterations of the event loop, in the order of asking."""

from __future__ import annotations

import asyncio
import itertools

from blockstep.qmp.turns import REST, Turns
from tests.scenarios import scenario


async def iterations(count: int) -> list[int]:
    """Count up by one in each iteration of the loop."""
    seen = [0]

    def step() -> None:
        seen[0] += 1
        if seen[0] < count:
            asyncio.get_running_loop().call_soon(step)

    asyncio.get_running_loop().call_soon(step)
    return seen


@scenario
async def test_nobody_waits_who_asks_alone() -> None:
    turns = Turns()
    for _ in range(3):
        await asyncio.wait_for(turns.take(), 1)
        for _ in range(REST + 1):
            await asyncio.sleep(0)


@scenario
async def test_many_get_their_turns_in_their_order_and_the_loop_has_rest_between() -> None:
    turns, order = Turns(), list[tuple[str, int]]()
    now = await iterations(50)

    async def worker(name: str) -> None:
        for _ in range(3):
            await turns.take()
            order.append((name, now[0]))

    await asyncio.gather(*(worker(name) for name in "abc"))
    assert [name for name, _ in order] == list("aabcabcbc")  # a asked for its second before b was there
    times = [when for _, when in order]
    assert all(later - earlier > REST for earlier, later in itertools.pairwise(times))


@scenario
async def test_one_who_gives_up_holds_nobody() -> None:
    turns = Turns()
    had, gave_up, second = (asyncio.ensure_future(turns.take()) for _ in range(3))
    await asyncio.sleep(0)
    gave_up.cancel()
    await asyncio.wait_for(second, 1)
    assert had.done()
    assert gave_up.cancelled()
