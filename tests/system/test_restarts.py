"""Programs that end and are started again: after an end in good order the checkpoint is there; what is copied is the
difference, also to a standby that was killed."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from blockstep.testing.pair import Pair, Side
from blockstep.testing.proxy import Proxy
from blockstep.units import KiB, MiB
from tests.scenarios import scenario

of_any_kind = pytest.mark.usefixtures("four_disks")

#: More than a resync of some dozen blocks sends, or a comparison of all of them, and half of what a disk holds.
LITTLE = 4 * MiB
#: What a primary says of a sync if it does not know what its standby lacks, and if it does.
ALL, DIFFERENCE = "copying all that differs", "copying what the standby lacks"


@asynccontextmanager
async def pair_behind_proxy(directory: Path, disks: int = 2) -> AsyncIterator[tuple[Pair, Proxy]]:
    """A pair that replicates, some writes into it, at a checkpoint."""
    async with Pair(directory, disks=disks, size=20 * MiB + 512) as pair:
        await pair.start_standby()
        host, _, port = pair.link.rpartition(":")
        async with Proxy(host, int(port)) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            await pair.write(30)
            await pair.checkpoint()
            yield pair, proxy


async def quit(side: Side) -> None:
    await side.execute("quit")
    assert await side.ended() == 0
    assert "Traceback" not in side.printed


async def start_primary(pair: Pair, proxy: Proxy) -> str:
    """Returns what it says of its first sync; that has ended then."""
    proxy.closed = True
    await pair.start_primary(to=proxy.address)
    proxy.closed = False
    return await what_is_copied(pair)


async def what_is_copied(pair: Pair, since: int = 0) -> str:
    """What the primary says of a sync after so many events, whose end is waited for."""
    said = await pair.primary.heard("REPLICATION_STATE", state="syncing", since=since)
    await pair.primary.until(health="healthy")
    return str(said["reason"])


def checkpoint(status: dict[str, Any]) -> int:
    return int(status["checkpoint"]["epoch"]) if status["checkpoint"] else 0


@of_any_kind
@scenario
async def test_a_standby_that_was_stopped_has_its_checkpoint_again_and_gets_the_difference(tmp_path: Path) -> None:
    async with pair_behind_proxy(tmp_path) as (pair, proxy):
        at, epoch = pair.writes.acknowledged, checkpoint(await pair.standby.status())
        await pair.write(10)
        await quit(pair.standby)
        await pair.primary.until(state="offline")
        await pair.write(10)
        proxy.closed = True
        await pair.start_standby(link=pair.link)
        status = await pair.standby.status()
        assert (status["state"], checkpoint(status)) == ("lost", epoch)
        assert await pair.proven(pair.standby) == at
        before, proxy.closed = proxy.up, False
        await pair.primary.until(health="healthy")
        await pair.write(10)
        await pair.checkpoint_shows()
        assert proxy.up - before < LITTLE
        assert checkpoint(await pair.standby.status()) > epoch


@of_any_kind
@scenario
async def test_a_standby_that_was_stopped_can_be_promoted_without_its_primary(tmp_path: Path) -> None:
    async with pair_behind_proxy(tmp_path) as (pair, _):
        at, epoch = pair.writes.acknowledged, checkpoint(await pair.standby.status())
        await pair.write(10)
        await quit(pair.standby)
        pair.primary.kill()
        await pair.start_standby()
        assert (await pair.standby.execute("replication-failover"))["epoch"] == epoch
        assert await pair.proven(pair.standby) == at
        await pair.standby.until(state="promoted")
        await quit(pair.standby)
        assert pair.writes.prove([[await pair.file("standby", disk)] for disk in range(2)]) == at


@scenario
async def test_how_old_the_checkpoint_is_outlives_a_restart(tmp_path: Path) -> None:
    async with pair_behind_proxy(tmp_path) as (pair, _):
        age = (await pair.standby.status())["checkpoint"]["age"]
        pair.primary.kill()
        await quit(pair.standby)
        await pair.start_standby()
        assert age < (await pair.standby.status())["checkpoint"]["age"] < age + 60


@scenario
async def test_what_the_standby_itself_wrote_is_there_again_until_the_next_checkpoint(tmp_path: Path) -> None:
    """The primary does not know where that was: everything is compared."""
    async with pair_behind_proxy(tmp_path, disks=1) as (pair, proxy):
        async with pair.standby.clients() as (view,):
            await view.pwrite(MiB + 1, b"mine")
        await quit(pair.standby)
        proxy.closed = True
        await pair.start_standby(link=pair.link)
        async with pair.standby.clients() as (view,):
            assert await view.pread(MiB + 1, 4) == b"mine"
        before, events, proxy.closed = proxy.up, len(pair.primary.events), False
        assert await what_is_copied(pair, events) == ALL
        assert proxy.up - before < LITTLE
        await pair.checkpoint_shows()


@of_any_kind
@scenario
async def test_a_primary_that_was_stopped_copies_the_difference(tmp_path: Path) -> None:
    async with pair_behind_proxy(tmp_path) as (pair, proxy):
        await pair.write(10)
        await quit(pair.primary)
        assert await pair.proven(pair.standby) == pair.writes.acknowledged  # the last checkpoint
        before = proxy.up
        await pair.start_primary(to=proxy.address)
        await pair.primary.until(health="healthy")
        await pair.write(10)
        await pair.checkpoint_shows()
        assert proxy.up - before < LITTLE


@of_any_kind
@scenario
async def test_a_primary_that_was_stopped_without_its_standby_remembers_what_that_lacks(tmp_path: Path) -> None:
    async with pair_behind_proxy(tmp_path) as (pair, proxy):
        at = pair.writes.acknowledged
        proxy.closed = True
        proxy.cut()
        await pair.primary.until(state="offline")
        await pair.write(10)
        for _ in range(2):  # also when it never finds its standby between two restarts
            await quit(pair.primary)
            await pair.start_primary(to=proxy.address)
            await pair.write(10)
        assert await pair.proven(pair.standby) == at
        before, proxy.closed = proxy.up, False
        await pair.primary.until(health="healthy")
        await pair.checkpoint_shows()
        assert proxy.up - before < LITTLE


@of_any_kind
@scenario
async def test_both_can_be_stopped_and_exchange_their_roles_without_a_copy(tmp_path: Path) -> None:
    async with pair_behind_proxy(tmp_path) as (pair, _):
        await quit(pair.primary)
        await quit(pair.standby)
        hosts = {"standby": tmp_path / "a", "primary": tmp_path / "b"}
        for host in hosts.values():
            host.mkdir()
        # On a host of its own each program finds the note of the other role in the same place.
        os.rename(tmp_path / "primary.ended", hosts["standby"] / "test.ended")
        os.rename(tmp_path / "test.ended", hosts["primary"] / "primary.ended")
        disks = {"standby": pair.disks("primary"), "primary": pair.disks("standby")}
        pair.disks = disks.__getitem__  # type: ignore[method-assign]
        pair.directory = hosts["standby"]
        await pair.start_standby()
        assert await pair.proven(pair.standby) == pair.writes.acknowledged
        host_name, _, port = pair.link.rpartition(":")
        async with Proxy(host_name, int(port)) as proxy:
            pair.directory = hosts["primary"]
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            await pair.write(20)
            await pair.checkpoint_shows()
            assert proxy.up < LITTLE


async def killed(side: Side) -> None:
    side.kill()


def written_long_after(note: Path, disk: Path) -> None:
    """Somebody writes to the disk of a program that was killed a minute ago."""
    os.utime(note, (then := os.stat(note).st_mtime - 60, then))
    with open(disk, "r+b") as file:
        file.write(b"somebody")


def replaced(disk: Path) -> None:
    """Another file has the disk's name, its content and its times."""
    copy = shutil.copy2(disk, disk.with_name("copy"))
    os.replace(copy, disk)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@scenario
async def test_a_primary_that_was_killed_copies_the_difference(in_memory: Path) -> None:
    """Again and again, and after its disk has grown. Its books are where its sockets are."""
    async with pair_behind_proxy(in_memory) as (pair, proxy):
        await pair.primary.execute("replication-checkpoint")
        before = proxy.up
        for _ in range(3):
            await pair.write(2)  # few: each start may copy again what the one before it has copied
            pair.primary.kill()
            await pair.start_primary(to=proxy.address)
            await pair.write(1)
        await pair.primary.until(health="healthy")
        await pair.primary.execute("block_resize", device="disk1", size=pair.size + 64 * KiB)
        pair.primary.kill()
        await pair.start_primary(to=proxy.address)
        await pair.primary.until(health="healthy")
        await pair.checkpoint()
        assert proxy.up - before < LITTLE
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_pair_that_was_killed_copies_the_difference(in_memory: Path) -> None:
    async with pair_behind_proxy(in_memory) as (pair, proxy):
        await pair.primary.execute("replication-checkpoint")
        await pair.write(10)
        pair.primary.kill()
        pair.standby.kill()
        before = proxy.up
        await pair.start_standby(link=pair.link)
        await pair.start_primary(to=proxy.address)
        await pair.primary.until(health="healthy")
        await pair.checkpoint_shows()
        assert proxy.up - before < LITTLE


@of_any_kind
@scenario
async def test_an_old_primary_whose_host_has_crashed_becomes_the_standby_of_its_successor(tmp_path: Path) -> None:
    """Each side has writes that the other one lacks; what is copied is the difference, on which nobody kept books."""
    async with pair_behind_proxy(tmp_path) as (pair, proxy):
        proxy.cut()
        proxy.closed = True
        await pair.primary.until(state="offline")
        await pair.write(10)
        pair.primary.kill()
        (tmp_path / "test.lacks").unlink(missing_ok=True)
        await pair.standby.execute("replication-failover")
        await pair.standby.heard("REPLICATION_FAILOVER", stage="done")
        async with pair.standby.clients() as views:
            for number, view in enumerate(views):
                await view.pwrite(number * MiB + 7, b"written after the failover")
        await quit(pair.standby)
        for disk in range(2):
            old, new = tmp_path / f"disk{disk}.primary", tmp_path / f"disk{disk}.standby"
            old.rename(tmp_path / "in.between")
            new.rename(old)
            (tmp_path / "in.between").rename(new)
        (tmp_path / "standby.promoted").unlink()
        (tmp_path / "test.follows").unlink(missing_ok=True)
        await pair.start_standby(link=pair.link)
        before = proxy.up
        assert await start_primary(pair, proxy) == ALL
        assert proxy.up - before < LITTLE
        await pair.checkpoint()
        assert await pair.standby.read_disks() == await pair.primary.read_disks()
        async with pair.standby.clients() as views:
            for number, view in enumerate(views):
                assert await view.pread(number * MiB + 7, 26) == b"written after the failover"


@pytest.mark.parametrize("what", ["written to", "replaced", "another kernel's", "of a format", "ended in good order"])
@scenario
async def test_a_primary_that_was_killed_and_whose_disk_is(in_memory: Path, what: str) -> None:
    """... may differ anywhere, and everything is compared; but for an end in good order before that."""
    books, disk = in_memory / "test.lacks", in_memory / "disk0.primary"
    async with Pair(in_memory, size=20 * MiB, format="qcow2" if what == "of a format" else "raw") as pair:
        await pair.start_standby()
        host, _, port = pair.link.rpartition(":")
        async with Proxy(host, int(port)) as proxy:
            await pair.start_primary(to=proxy.address)
            await pair.primary.until(health="healthy")
            await pair.write(30)
            await pair.primary.execute("replication-checkpoint")
            if what == "ended in good order":
                await quit(pair.primary)
                assert not books.exists()
                await pair.start_primary(to=proxy.address)
                await pair.primary.until(health="healthy")
            pair.primary.kill()
            if what == "written to":
                written_long_after(books, disk)
            elif what == "replaced":
                replaced(disk)
            elif what == "another kernel's":
                line, _, bits = books.read_bytes().partition(b"\n")
                books.write_bytes(re.sub(rb'"boot":"[^"]*"', b'"boot":"another"', line) + b"\n" + bits)
            assert books.exists() == (what != "of a format")
            sent = proxy.up
            assert await start_primary(pair, proxy) == (DIFFERENCE if what == "ended in good order" else ALL)
            assert proxy.up - sent < LITTLE
            await pair.checkpoint()
            assert await pair.standby.read_disks() == await pair.primary.read_disks()


@of_any_kind
@scenario
async def test_a_standby_that_was_killed_gets_the_difference(tmp_path: Path) -> None:
    """In the middle of writes of its primary, and of its own guest, whose writes are gone."""
    async with pair_behind_proxy(tmp_path) as (pair, proxy):
        await pair.primary.execute("replication-checkpoint")  # that the one before it is durable
        async with pair.standby.clients() as (view, _):
            await view.pwrite(MiB + 1, b"mine")
        await pair.write(10)
        writing = asyncio.create_task(pair.write(20))
        await asyncio.sleep(0)
        pair.standby.kill()
        await writing
        proxy.closed = True
        await pair.start_standby(link=pair.link)
        assert checkpoint(await pair.standby.status()) == 0
        before, proxy.closed = proxy.up, False
        await pair.primary.until(health="healthy")
        await pair.write(10)
        await pair.checkpoint_shows()
        assert proxy.up - before < LITTLE
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_standby_that_is_killed_again_and_again_gets_the_difference_of_all_of_it(tmp_path: Path) -> None:
    """Also when it ends in good order before it had a checkpoint again, and when its primary was not there."""
    async with pair_behind_proxy(tmp_path, disks=1) as (pair, proxy):
        await pair.primary.execute("replication-checkpoint")
        before = proxy.up
        for end in (killed, quit, killed, killed):
            proxy.closed = end is quit
            await pair.write(3)
            await end(pair.standby)
            await pair.start_standby(link=pair.link)
        proxy.closed = False
        await pair.primary.until(health="healthy")
        await pair.checkpoint_shows()
        assert proxy.up - before < LITTLE
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@pytest.mark.parametrize("what", ["written to", "replaced", "merged", "of another primary"])
@scenario
async def test_a_standby_that_was_killed_and_whose_disk_was_then(tmp_path: Path, what: str) -> None:
    """... may differ anywhere, and all of it is compared."""
    async with pair_behind_proxy(tmp_path, disks=1) as (pair, proxy):
        await pair.primary.execute("replication-checkpoint")
        note, disk = tmp_path / "test.follows", tmp_path / "disk0.standby"
        if what == "merged":
            await pair.standby.execute("replication-failover")
            await pair.standby.until(state="promoted")
        pair.standby.kill()
        if what == "written to":
            written_long_after(note, disk)
        elif what == "replaced":
            replaced(disk)
        elif what == "of another primary":
            await pair.start_standby(link=pair.link)
            pair.primary.kill()
            (tmp_path / "test.follows.new").mkdir()  # so that no other note takes its place
            await pair.start_primary(to=proxy.address)
            await pair.primary.heard("REPLICATION_STATE", state="replicating")
            pair.standby.kill()
            (tmp_path / "test.follows.new").rmdir()
        else:
            (tmp_path / "standby.promoted").unlink()
            pair.primary.kill()
            await pair.start_primary(to=proxy.address)
        sent, events = proxy.up, len(pair.primary.events)
        await pair.start_standby(link=pair.link)
        assert not note.exists()
        assert await what_is_copied(pair, events) == ALL
        assert proxy.up - sent < LITTLE
        await pair.checkpoint()
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_standby_that_cannot_write_down_whom_it_follows_says_what_that_means(tmp_path: Path) -> None:
    in_the_way = tmp_path / "test.follows.new"
    in_the_way.mkdir()
    async with pair_behind_proxy(tmp_path, disks=1) as (pair, _):
        status = await pair.standby.until(health="degraded")
        assert "after a crash everything would be compared" in status["reason"]
        assert "test.follows.new" in status["reason"]
        in_the_way.rmdir()
        await pair.checkpoint_shows()
        await pair.standby.until(health="healthy")
        assert (tmp_path / "test.follows").exists()


@pytest.mark.parametrize("role", ["primary", "standby"])
@scenario
async def test_a_disk_that_somebody_wrote_to_meanwhile_is_compared_as_a_whole(tmp_path: Path, role: str) -> None:
    async with pair_behind_proxy(tmp_path, disks=1) as (pair, proxy):
        await quit(pair.primary if role == "primary" else pair.standby)
        with open(tmp_path / f"disk0.{role}", "r+b") as file:
            file.seek(64 * KiB)
            file.write(b"somebody")
        before = proxy.up
        if role == "primary":
            assert await start_primary(pair, proxy) == ALL
        else:
            events = len(pair.primary.events)
            await pair.start_standby(link=pair.link)
            assert checkpoint(await pair.standby.status()) == 0
            assert await what_is_copied(pair, events) == ALL
        assert proxy.up - before < LITTLE
        await pair.checkpoint()
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_standby_that_was_replaced_and_comes_back_without_room_for_its_checkpoint_gets_everything(
    tmp_path: Path
) -> None:
    """It gives the checkpoint up, but that makes its disks no others: the primary remembers what another one lacked."""
    async with pair_behind_proxy(tmp_path, disks=1) as (pair, _):
        await quit(pair.standby)
        note = tmp_path / "test.ended"
        note.rename(tmp_path / "kept.ended")
        await pair.write(100)
        disks, replacement = pair.disks, {"disk0": f"{tmp_path / 'replacement'},size={pair.size}"}
        pair.disks = lambda role: replacement if role == "standby" else disks(role)  # type: ignore[method-assign]
        await pair.start_standby(link=pair.link)
        await pair.primary.until(health="healthy")
        await pair.checkpoint_shows()
        pair.standby.kill()
        pair.disks = disks  # type: ignore[method-assign]
        (tmp_path / "kept.ended").rename(note)
        await pair.start_standby("--buffer-memory", "64K", link=pair.link)
        assert checkpoint(await pair.standby.status()) > 0
        await pair.primary.until(health="healthy")
        await pair.checkpoint()
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_primary_whose_good_end_cannot_be_written_down_says_what_that_means(tmp_path: Path) -> None:
    (tmp_path / "primary.ended.new").mkdir()
    async with pair_behind_proxy(tmp_path, disks=1) as (pair, _):
        await pair.primary.execute("quit")
        assert await pair.primary.ended() == 3
        assert "primary.ended: Is a directory: all has ended in good order, but the next start will compare " \
               "everything" in pair.primary.printed
