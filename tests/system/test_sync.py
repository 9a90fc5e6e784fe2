"""How a standby gets what the primary has: the first sync, and what a resync costs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockstep.testing.numbered import BLOCK
from blockstep.testing.pair import Pair
from blockstep.testing.proxy import Proxy
from blockstep.units import KiB, MiB
from tests.scenarios import scenario

of_any_kind = pytest.mark.usefixtures("four_disks")


def proxy_to(pair: Pair) -> Proxy:
    host, _, port = pair.link.rpartition(":")
    return Proxy(host, int(port))


@of_any_kind
@scenario
async def test_the_first_sync_copies_a_disk_that_is_being_written(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            proxy.rate = 3 * MiB
            await pair.start_primary(to=proxy.address)
            async with pair.writing():
                status = await pair.primary.until(lambda status: status["work"] and status["work"]["current"])
                assert status["work"]["kind"] == "sync"
                assert status["health"] == "degraded"
                assert any(disk["behind"] for disk in status["disks"])
                await pair.written(20)
                proxy.rate = 0
                await pair.primary.until(health="healthy")
                await pair.checkpoint_shows()


@of_any_kind
@scenario
async def test_the_first_sync_leaves_holes_where_the_primary_has_holes(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=32 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            assert await pair.proven(pair.standby) == 0
            assert 8 * MiB <= proxy.up < 9 * MiB
        assert os.stat(tmp_path / "disk0.standby").st_blocks * 512 < 9 * MiB


@of_any_kind
@scenario
async def test_a_sync_replaces_whatever_the_standbys_disk_held(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=6 * MiB) as pair:
        (tmp_path / "random").write_bytes(os.urandom(6 * MiB))
        await pair.make_file(tmp_path / "random", "standby")
        await pair.start()
        await pair.primary.until(health="healthy")
        assert await pair.proven(pair.standby) == 0


@of_any_kind
@scenario
async def test_disks_of_any_size_are_replicated(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2, size=MiB + 3 * 512) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.primary.clients() as (guest, _):
            await guest.pwrite(MiB + 2 * 512, b"x" * 512)
            await guest.pwrite(MiB - 1, b"yy")
        await pair.primary.execute("replication-checkpoint")
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@of_any_kind
@scenario
async def test_after_a_cut_only_the_difference_is_copied_and_the_view_stays(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2, size=16 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            await pair.write(50)
            await pair.checkpoint()
            at = pair.writes.acknowledged
            proxy.closed = True
            proxy.cut()
            await pair.primary.until(state="offline")
            await pair.write(20)
            behind = sum(disk["behind"] for disk in (await pair.primary.status())["disks"])
            assert 10 * BLOCK < behind <= 70 * 64 * KiB
            assert await pair.proven(pair.standby) == at

            before, proxy.rate, proxy.closed = proxy.up, 512 * KiB, False
            syncing = await pair.primary.until(lambda status: status["work"])
            assert syncing["work"]["kind"] == "resync"
            assert syncing["work"]["total"] <= behind
            await pair.primary.until(lambda status: status["work"] and status["work"]["current"] > 128 * KiB)
            proxy.rate = 64 * KiB  # it does not end while the view is read, however slow this machine is
            assert await pair.proven(pair.standby) == at  # in the middle of the resync
            proxy.rate = 0
            await pair.primary.until(health="healthy")
            assert proxy.up - before < behind + 256 * KiB
        assert await pair.proven(pair.standby) == pair.writes.acknowledged


@of_any_kind
@scenario
async def test_a_primary_that_was_restarted_copies_what_differs_and_the_view_stays_meanwhile(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            async with pair.writing():
                await pair.written(50)
                low, high = await pair.checkpoint()
                proxy.closed = True
                proxy.cut()
                await pair.primary.until(state="offline")
                await pair.written(100)
                pair.primary.kill()
            at = await pair.proven(pair.standby)
            assert low <= at <= high
            proxy.closed, proxy.rate = False, 128 * KiB
            await pair.start_primary(to=proxy.address)
            work = (await pair.primary.until(lambda status: status["work"] and status["work"]["current"]))["work"]
            assert work["kind"] == "sync"
            proxy.rate = 64 * KiB  # it does not end while the view is read, however slow this machine is
            assert await pair.proven(pair.standby) == at
            proxy.rate = 0
            await pair.primary.until(health="healthy")
        # An image that was killed holds what was flushed, and it may hold some of what was not.
        assert await pair.standby.read_disks() == await pair.primary.read_disks()
        if pair.format == "raw":
            await pair.proven(pair.primary)


@of_any_kind
@scenario
async def test_a_failover_in_the_middle_of_a_resync_lives_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            async with pair.writing():
                await pair.written(100)
                proxy.closed = True
                proxy.cut()
                await pair.primary.until(state="offline")
                await pair.written(100)
            at = await pair.proven(pair.standby)
            proxy.closed, proxy.rate = False, MiB
            await pair.primary.until(lambda status: status["work"] and status["work"]["current"] > 512 * KiB)
            pair.primary.kill()
            await pair.standby.execute("replication-failover")
            assert await pair.proven(pair.standby) == at
            await pair.standby.until(state="promoted")
            assert await pair.proven(pair.standby) == at


@scenario
async def test_a_standby_that_was_restarted_gets_what_it_lacks(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=2 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing() as writes:
            await pair.written(50)
            pair.standby.kill()
            await pair.primary.until(state="offline")
            await pair.primary.heard("REPLICATION_STATE", state="offline", health="at-risk")
            await pair.start_standby(link=pair.link)
            await pair.primary.until(health="healthy")
            low, high = await pair.checkpoint()
            assert writes.error is None
        assert low <= await pair.proven(pair.standby) <= high


@scenario
async def test_the_primary_serves_its_guest_before_there_is_a_standby(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        pair.link = "127.0.0.1:1"
        await pair.start_primary()
        async with pair.writing() as writes:
            await pair.written(50)
        status = await pair.primary.status()
        assert (status["state"], status["health"]) == ("offline", "at-risk")
        assert await pair.proven(pair.primary) == writes.acknowledged
