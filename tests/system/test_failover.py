"""A standby is promoted: what it lives on from, what becomes of its old primary; and the end without a promotion."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from blockstep.errors import BlockstepError
from blockstep.nbd.client import Client
from blockstep.nbd.dial import list_server
from blockstep.nbd.uri import parse_address
from blockstep.testing.numbered import BLOCK
from blockstep.testing.pair import Pair, Side, Status
from tests.scenarios import scenario

of_any_kind = pytest.mark.usefixtures("four_disks")


@of_any_kind
@scenario
async def test_failover_to_the_checkpoint(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(200)
            low, high = await pair.checkpoint()
            await pair.written(200)
            pair.primary.kill()
        answer = await pair.standby.execute("replication-failover")
        assert low <= await pair.proven(pair.standby) <= high
        status = await pair.standby.until(state="promoted")
        assert status["role"] == "promoted"
        assert answer["exports"] == status["exports"]
        assert low <= await pair.proven(pair.standby) <= high
        begun = await pair.standby.heard("REPLICATION_FAILOVER", stage="begun", to="checkpoint")
        assert begun["epoch"] == answer["epoch"]
        await pair.standby.heard("REPLICATION_FAILOVER", stage="done")


@of_any_kind
@scenario
async def test_failover_to_the_latest(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(100)
            await pair.checkpoint()
            await pair.written(100)
        await pair.primary.until(lambda status: not any(disk["behind"] for disk in status["disks"]))
        pair.primary.kill()
        await pair.standby.execute("replication-failover", to="latest")
        assert await pair.proven(pair.standby) == pair.writes.acknowledged
        assert (await pair.standby.status())["role"] == "promoted"
        await pair.standby.heard("REPLICATION_FAILOVER", stage="done", to="latest")


@of_any_kind
@pytest.mark.parametrize("to", ["checkpoint", "latest"])
@scenario
async def test_after_a_failover_writes_go_on_and_are_on_the_disk_in_the_end(tmp_path: Path, to: str) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(100)
        pair.primary.kill()
        await pair.standby.execute("replication-failover", to=to)
        async with pair.standby.clients() as (client,):
            await client.pwrite(3 * BLOCK + 7, b"after the failover")
            await client.flush()
        await pair.standby.until(state="promoted")
        [[content]] = await pair.standby.read_disks()
        assert content[3 * BLOCK + 7:].startswith(b"after the failover")
        await pair.standby.execute("quit")
        assert await pair.standby.ended() == 0
        assert await pair.file("standby") == content


@of_any_kind
@scenario
async def test_the_standbys_own_writes_are_kept_by_a_failover(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.standby.clients() as (client,):
            await client.pwrite(BLOCK + 1, b"mine")
            await pair.standby.execute("replication-failover")
            assert bytes(await client.pread(BLOCK + 1, 4)) == b"mine"
            await pair.standby.until(state="promoted")
            assert bytes(await client.pread(BLOCK + 1, 4)) == b"mine"


@of_any_kind
@scenario
async def test_a_promoted_standby_refuses_the_old_primarys_writes_which_goes_on_alone(tmp_path: Path) -> None:
    """D6. The old primary is told, says so, and serves its guest on."""
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        address = parse_address(pair.link)
        export = (await list_server(address))[0].name
        stale = await Client.connect(address, export)
        async with pair.writing() as writes:
            await pair.written(100)
            low, high = await pair.checkpoint()
            await pair.written(50)
            await pair.standby.execute("replication-failover")
            with pytest.raises(OSError) as refused:
                await stale.pwrite(0, bytes(BLOCK))
            assert refused.value.errno in (errno.ENOTCONN, errno.EPERM, errno.ESHUTDOWN, errno.ECONNRESET)
            status = await pair.primary.until(state="fenced")
            assert status["health"] == "at-risk"
            assert "promoted" in status["reason"]
            await pair.primary.heard("REPLICATION_STATE", state="fenced")
            await pair.written(200)
            assert writes.error is None
        assert low <= await pair.proven(pair.standby) <= high
        assert await pair.proven(pair.primary) == writes.acknowledged
        with pytest.raises((BlockstepError, OSError)):
            await Client.connect(address, export)


@scenario
async def test_a_primary_that_comes_back_is_fenced_at_once(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        pair.primary.kill()
        await pair.standby.execute("replication-failover")
        await pair.standby.until(state="promoted")
        await pair.start_primary()
        status = await pair.primary.until(state="fenced")
        assert "promoted" in status["reason"]
        async with pair.primary.clients() as (guest,):
            await guest.pwrite(0, b"alone")
        [[content]] = await pair.standby.read_disks()
        assert not content.startswith(b"alone")


@scenario
async def test_a_failover_needs_a_checkpoint(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        with pytest.raises(BlockstepError, match=r"no checkpoint to stand on \(it is waiting\)"):
            await pair.standby.execute("replication-failover")
        assert (await pair.standby.status())["state"] == "waiting"


@scenario
async def test_a_failover_is_not_asked_of_the_primary(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        with pytest.raises(BlockstepError, match="asked of its standby"):
            await pair.primary.execute("replication-failover")


@scenario
async def test_a_second_failover_changes_nothing_and_cannot_choose_again(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        first = await pair.standby.execute("replication-failover")
        again = await pair.standby.execute("replication-failover")
        assert (again["epoch"], again["exports"]) == (first["epoch"], first["exports"])
        with pytest.raises(BlockstepError, match="promoted with --to checkpoint"):
            await pair.standby.execute("replication-failover", to="latest")
        status = await pair.standby.until(state="promoted")
        assert status["role"] == "promoted"
        await pair.standby.heard("REPLICATION_FAILOVER", stage="done")


@scenario
async def test_stop_on_the_primary_ends_replication_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing() as writes:
            await pair.written(50)
            await pair.primary.execute("replication-stop")
            assert (await pair.primary.status())["state"] == "stopped"
            await pair.written(100)
            assert writes.error is None
        await pair.standby.until(state="lost")


@of_any_kind
@scenario
async def test_stop_on_the_standby_shows_what_the_primary_wrote_last(tmp_path: Path) -> None:
    """D1: one point in time, and no error."""
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(50)
            await pair.checkpoint()
            await pair.written(50)
        await pair.primary.until(lambda status: not any(disk["behind"] for disk in status["disks"]))
        await pair.standby.execute("replication-stop")
        assert await pair.proven(pair.standby) == pair.writes.acknowledged
        status = await pair.standby.status()
        assert (status["state"], status["role"]) == ("stopped", "standby")
        primary = await pair.primary.until(state="fenced")
        assert "stopped" in primary["reason"]


def unlinked(side: Side) -> list[str]:
    """The files that a process has open and that have no name: the buffers of a standby."""
    found = []
    for entry in Path(f"/proc/{side.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found.append(os.readlink(entry))
    return [name for name in found if name.endswith(" (deleted)")]


@of_any_kind
@pytest.mark.parametrize("end", ["checkpoint", "latest", "stop"])
@scenario
async def test_the_buffers_of_a_standby_that_has_ended_as_one_take_no_room_any_more(tmp_path: Path, end: str) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        assert unlinked(pair.standby)
        if end == "stop":
            await pair.standby.execute("replication-stop")
        else:
            pair.primary.kill()
            await pair.standby.execute("replication-failover", to=end)
            await pair.standby.heard("REPLICATION_FAILOVER", stage="done")
        while unlinked(pair.standby):  # what a checkpoint emptied is freed when nobody else wants the processor
            await pair.standby.status()


@of_any_kind
@scenario
async def test_status_is_true_at_every_moment_of_a_failover(tmp_path: Path) -> None:
    """D5: a healthy failover is no error; it is work with progress, and it ends with an event."""
    async with Pair(tmp_path, size=8 << 20) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.primary.clients() as (guest,):
            await guest.pwrite(0, bytes(8 << 20))
            await pair.primary.until(lambda status: not status["disks"][0]["behind"])
        pair.primary.kill()
        failing_over = pair.standby.begin("replication-failover")
        seen: list[Status] = []
        while not seen or seen[-1]["state"] != "promoted":
            seen.append(await pair.standby.status())
            assert "rror" not in seen[-1]["reason"]
        await failing_over
        assert {status["state"] for status in seen} <= {"replicating", "lost", "failover", "promoted"}
        await pair.standby.heard("REPLICATION_FAILOVER", stage="done", reason="")
