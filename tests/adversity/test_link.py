"""The network between the two: cut, half-open, slow, far away."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from blockstep.testing.pair import Pair
from blockstep.testing.proxy import Proxy
from blockstep.units import KiB, MiB
from tests.scenarios import scenario

MAX_STALL = 0.6
MARGIN = 1.0  # what a busy machine may add


def proxy_to(pair: Pair) -> Proxy:
    host, _, port = pair.link.rpartition(":")
    return Proxy(host, int(port))


@scenario
async def test_a_cut_costs_no_write_and_is_mended_by_itself(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            async with pair.writing() as writes:
                for _ in range(3):
                    await pair.written(100)
                    events = len(pair.primary.events)
                    proxy.cut()
                    await pair.primary.heard("REPLICATION_STATE", since=events, state="offline")
                    await pair.primary.until(health="healthy")
                await pair.checkpoint_shows()
                assert writes.error is None
                assert writes.slowest < MARGIN


@scenario
async def test_the_standby_notices_a_half_open_link_when_its_primary_comes_back(tmp_path: Path) -> None:
    """The old connections never end by themselves: the new ones of the same primary take their place."""
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary("--max-stall", f"{MAX_STALL}s", to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.half_open()
            await pair.primary.until(state="offline")
            proxy.heal()
            await pair.primary.until(health="healthy")
            assert (await pair.standby.status())["health"] == "healthy"


@scenario
async def test_a_primary_that_was_restarted_behind_a_half_open_link_is_taken(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary("--max-stall", f"{MAX_STALL}s", to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.half_open()
            pair.primary.kill()
            proxy.heal()
            await pair.start_primary("--max-stall", f"{MAX_STALL}s", to=proxy.address)
            await pair.primary.until(health="healthy", limit=8)


@scenario
async def test_acknowledged_locally_a_write_does_not_wait_for_a_far_standby(tmp_path: Path) -> None:
    """D9."""
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.delay = 0.1
            started = time.monotonic()
            await pair.write(100)
            assert time.monotonic() - started < 100 * 0.1 / 4
            await pair.checkpoint_shows()


@scenario
async def test_acknowledged_on_both_sides_a_write_waits_for_a_far_standby(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary("--ack", "both", to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.delay = 0.05
            started = time.monotonic()
            await pair.write(5)
            assert time.monotonic() - started >= 5 * 0.1


@scenario
async def test_a_slow_link_holds_the_guest_up_only_when_the_queue_is_full(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary("--queue", "2M", "--max-stall", "30s", to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.rate = 64 * KiB
            await pair.write(256)  # 1 MiB: the link takes 16 s for it
            status = await pair.primary.status()
            assert status["health"] == "healthy"
            assert status["disks"][0]["behind"] > 256 * KiB
            proxy.rate = 0
            await pair.checkpoint_shows()


@scenario
async def test_a_sync_over_a_slow_link_does_not_hold_the_guest_up(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            proxy.rate = MiB
            await pair.start_primary("--max-stall", "2s", to=proxy.address)
            await pair.primary.until(lambda status: status["work"] and proxy.up > 64 * KiB)
            await pair.write(15)
            assert pair.writes.slowest < 0.5
            assert (await pair.primary.status())["state"] == "syncing"
            while (await pair.primary.status())["state"] == "syncing":
                await pair.write(1)
                await asyncio.sleep(0.1)  # the pace of this guest
            await pair.primary.until(health="healthy")
            assert pair.writes.slowest < 0.5
            await pair.checkpoint_shows()


@scenario
async def test_a_link_that_is_cut_in_the_middle_of_a_resync_again_and_again(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=8 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            at = await pair.proven(pair.standby)
            for _ in range(3):
                proxy.cut()
                await pair.primary.until(state="offline")
                await pair.write(30)
                proxy.rate = 128 * KiB
                before = proxy.up
                await pair.primary.until(lambda status: status["work"] and proxy.up > before + 64 * KiB)  # noqa: B023
                assert await pair.proven(pair.standby) == at
            proxy.rate = 0
            await pair.primary.until(health="healthy")
            assert await pair.proven(pair.standby) == pair.writes.acknowledged


@scenario
async def test_a_slow_link_is_not_taken_for_a_dead_one_when_a_busy_guest_fills_it(tmp_path: Path) -> None:
    """More waits than the link carries within max-stall."""
    async with Pair(tmp_path, size=12 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary("--max-stall", "1s", to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.rate = 5 * MiB
            events = len(pair.primary.events)
            async with pair.primary.clients() as (guest,):
                await asyncio.gather(*(guest.pwrite(part * MiB, bytes([part + 1]) * MiB) for part in range(12)))
            await pair.primary.execute("replication-checkpoint")
            assert not [event for event in pair.primary.events[events:] if event["event"] == "REPLICATION_STATE"]
            assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_guest_waits_for_room_in_the_queue_for_max_stall_at_most(tmp_path: Path) -> None:
    """The link is alive, but so slow that a write would wait for ever: then the pair lets go."""
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary("--queue", "64k", "--max-stall", f"{MAX_STALL}s", to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.rate = 256 * KiB
            async with pair.primary.clients() as (guest,):
                await guest.pwrite(0, bytes(MiB))
                started = time.monotonic()
                await guest.pwrite(MiB, bytes(MiB))
                assert time.monotonic() - started < MAX_STALL + MARGIN
            await pair.primary.until(state="offline")
            proxy.heal()
            await pair.primary.until(health="healthy")
            assert await pair.standby.read_disks() == await pair.primary.read_disks()
