"""Checkpoints of a running pair: when they are taken, and that all disks share one point in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.errors import BlockstepError
from blockstep.testing.numbered import BLOCK
from blockstep.testing.pair import Pair
from tests.scenarios import scenario

of_any_kind = pytest.mark.usefixtures("four_disks")


@of_any_kind
@pytest.mark.parametrize("ack", ["local", "both"])
@scenario
async def test_several_disks_share_one_point_in_time_at_every_checkpoint(tmp_path: Path, ack: str) -> None:
    async with Pair(tmp_path, disks=3) as pair:
        await pair.start("--ack", ack)
        await pair.primary.until(health="healthy")
        async with pair.writing():
            for _ in range(4):
                await pair.written(200)
                await pair.checkpoint_shows()


@of_any_kind
@scenario
async def test_nothing_that_is_written_after_a_checkpoint_shows_on_the_standby(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(100)
        await pair.checkpoint()
        at = pair.writes.acknowledged
        async with pair.writing():
            await pair.written(300)
            assert await pair.proven(pair.standby) == at
        assert await pair.proven(pair.standby) == at
        assert (await pair.standby.status())["disks"][0]["buffer-used"] > 0


@scenario
async def test_a_checkpoint_is_taken_by_time(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start("--checkpoint-every", "100ms")
        first = await pair.primary.until(lambda status: status["checkpoint"])
        await pair.primary.until(lambda status: status["checkpoint"]["epoch"] >= first["checkpoint"]["epoch"] + 3)
        await pair.primary.heard("REPLICATION_CHECKPOINT", epoch=first["checkpoint"]["epoch"] + 2)


@of_any_kind
@pytest.mark.parametrize("written", [1, 4])
@scenario
async def test_a_checkpoint_is_taken_by_bytes_over_all_disks(tmp_path: Path, written: int) -> None:
    """However many of the four disks are written to; and again after that."""
    async with Pair(tmp_path, disks=4) as pair:
        await pair.start("--checkpoint-bytes", "200k")
        epoch = (await pair.primary.until(health="healthy"))["checkpoint"]["epoch"]
        async with pair.primary.clients() as clients:

            async def write(count: int) -> None:
                for number in range(count):
                    await clients[number % written].pwrite(0, pair.writes.block(0, number))

            await write(40)  # 160 KiB, of 200
            assert (await pair.primary.status())["checkpoint"]["epoch"] == epoch
            await write(12)
            await pair.primary.until(lambda status: status["checkpoint"]["epoch"] == epoch + 1)
            await write(52)
            await pair.primary.until(lambda status: status["checkpoint"]["epoch"] == epoch + 2)


@scenario
async def test_a_checkpoint_is_asked_of_the_primary_only(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        with pytest.raises(BlockstepError, match="on the primary"):
            await pair.standby.execute("replication-checkpoint")


@scenario
async def test_without_a_standby_no_checkpoint_is_promised(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        pair.link = "127.0.0.1:1"
        await pair.start_primary()
        offline = await pair.primary.until(lambda status: "refused" in status["reason"])
        assert offline["reason"] == "Connection refused: 127.0.0.1:2"
        with pytest.raises(BlockstepError, match="no checkpoint can be taken: the pair is offline"):
            await pair.primary.execute("replication-checkpoint")


@of_any_kind
@scenario
async def test_the_standbys_own_writes_are_dropped_by_a_checkpoint(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        client = await pair.standby.client("disk0")
        before = bytes(await client.pread(0, BLOCK))
        await client.pwrite(100, b"mine")
        assert bytes(await client.pread(100, 4)) == b"mine"
        await pair.primary.execute("replication-checkpoint")
        assert bytes(await client.pread(0, BLOCK)) == before
        client.yank()
        assert await pair.proven(pair.standby) == 0


@of_any_kind
@scenario
async def test_discards_and_zeroes_of_the_guest_reach_the_standby(tmp_path: Path) -> None:
    """D10: what QEMU's replication does not forward."""
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.primary.clients() as (guest,):
            await guest.write_zeroes(4096, 65536)
            await guest.discard(200 * 1024, 300 * 1024)
            await guest.write_zeroes(700001, 4097, 0)
            await pair.primary.execute("replication-checkpoint")
            [expected] = await pair.primary.read_disks()
            [found] = await pair.standby.read_disks()
            assert expected == found
            assert not any(found[0][4096:4096 + 65536])
            assert not any(found[0][700001:704098])
