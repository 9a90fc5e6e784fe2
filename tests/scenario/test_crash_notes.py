"""What both ends write down for a start after a crash, in moments that a random trace does not meet."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from blockstep.daemon.following import Following
from blockstep.replication.coordinator import State
from blockstep.testing.clock import run, until
from tests.scenario.pair_world import MAX_STALL, Shape, World


def with_world(test: Callable[[World], Awaitable[None]]) -> None:
    """With a pair that replicates."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        async def main() -> None:
            world = World(Path(directory), Shape())
            await world.open()
            try:
                await until(lambda: world.primary.coordinator.state is State.REPLICATING, 60)
                await test(world)
            finally:
                await world.close()

        run(main())


def test_a_note_that_takes_long_costs_no_standby(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file system is slow. Meanwhile nothing is forgotten."""
    keep = Following.keep

    async def slow(self: Following, *args: object) -> None:
        await asyncio.sleep(10 * MAX_STALL)
        await keep(self, *args)  # type: ignore[arg-type]

    async def test(world: World) -> None:
        await asyncio.sleep(5 * MAX_STALL)
        assert world.primary.coordinator.state is State.REPLICATING
        assert world.primary.checkpoints.durable == 0
        await asyncio.sleep(10 * MAX_STALL)
        assert world.primary.checkpoints.durable == world.primary.coordinator.epoch > 0

    monkeypatch.setattr(Following, "keep", slow)
    with_world(test)


def test_after_a_flush_that_failed_there_are_no_books() -> None:
    """What the disk has lost may be older than they are."""
    async def test(world: World) -> None:
        await world.primary.checkpoints.settled()
        assert world.keeps_books
        for node in world.faulty():
            if node.name == "a-disk":
                node.fail("flush", errno.EIO, once=True)
        with pytest.raises(OSError, match="Input/output"):
            await world.clients["guest", "a"].flush()
        assert not world.keeps_books

    with_world(test)


@pytest.mark.parametrize("side", ["primary", "standby"])
def test_of_a_file_that_was_cut_off_nothing_is_believed_after_a_crash(side: str) -> None:
    async def test(world: World) -> None:
        await world.primary.checkpoints.settled()
        path = world.path("a", "primary" if side == "primary" else "standby")
        whole = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(4096)
            await (world.primary if side == "primary" else world.standby).look()
            file.truncate(whole)
        await asyncio.sleep(0.1)
        assert not (world.keeps_books if side == "primary" else world.follows)

    with_world(test)


def test_a_start_that_is_refused_leaves_the_books_of_the_one_that_lives() -> None:
    async def test(world: World) -> None:
        first = world.primary
        with pytest.raises(OSError, match="another node or process has this file open"):
            await world.start_primary()
        world.primary = first
        assert world.keeps_books

    with_world(test)
