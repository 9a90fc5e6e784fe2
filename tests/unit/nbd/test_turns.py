"""Long work and expensive requests: one step of one of them in each iteration of the loop."""

from __future__ import annotations

import asyncio

from blockstep.aio.inline import start
from blockstep.block.driver import Extent
from blockstep.nbd import constants as c
from blockstep.nbd.contexts import MAX_EXTENTS, extents_of
from blockstep.nbd.export import Export
from blockstep.nbd.turns import Turns, let_others
from blockstep.units import MiB
from tests.unit.nbd.storage import Storage


def test_those_who_let_others_go_first_go_on_one_at_a_time_in_their_order() -> None:
    async def main() -> None:
        steps: list[str] = []

        async def work(name: str) -> None:
            for _ in range(3):
                steps.append(name)
                await let_others()

        for name in "abc":
            start(work(name), lambda value, error: None)
        assert steps == ["a", "b", "c"]
        for made in range(4, 10):
            await asyncio.sleep(0)
            assert len(steps) == made
        assert "".join(steps) == "abcabcabc"

    asyncio.run(main())


def test_there_is_one_turn_in_each_iteration_and_who_does_not_take_it_leaves_it_to_the_next() -> None:
    async def main() -> None:
        turns = Turns()
        taken: list[str] = []

        def gone() -> None:
            taken.append("gone")

        def there() -> None:
            assert turns.take()
            taken.append("there")

        assert turns.take()
        assert not turns.take()
        for waiting in (gone, there, gone):
            turns.wait(waiting)
        await asyncio.sleep(0)
        assert taken == ["gone", "there"]
        assert not turns.take()
        await asyncio.sleep(0)
        assert turns.take()

    asyncio.run(main())


def test_the_status_of_a_fragmented_disk_is_looked_at_a_slice_at_a_time() -> None:
    async def main() -> None:
        storage = Storage(64 * MiB)
        storage.extents = [Extent(4096, number % 2 == 0, number % 2 == 1) for number in range(64 * MiB // 4096)]
        asking = asyncio.ensure_future(extents_of(Export("", storage), [c.BASE_ALLOCATION], 0, 64 * MiB, False, True))
        looked = 0
        while not asking.done():
            await asyncio.sleep(0)
            assert len(storage.calls) <= looked + 1
            looked = len(storage.calls)
        [extents] = asking.result()
        assert len(extents) == MAX_EXTENTS
        assert looked == 8

    asyncio.run(main())
