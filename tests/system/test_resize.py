"""A disk of a running pair grows: on both sides or on none, with guests that go on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockstep.drivers.qcow2.format import parse_header
from blockstep.nbd.client import Client
from blockstep.qmp.errors import CommandRefused
from blockstep.testing.pair import Pair, Side, environment
from blockstep.units import MiB
from tests.scenarios import scenario

of_any_kind = pytest.mark.usefixtures("four_disks")

#: Neither a whole cluster nor a whole sector.
ODD = 2 * MiB + 12345


async def length(side: Side) -> int:
    """What a guest that connects now is told."""
    client = await side.client("disk0")
    size = client.info.size
    client.yank()
    return size


async def content(side: Side, offset: int, count: int) -> bytes:
    client = await side.client("disk0")
    data = bytes(await client.pread(offset, count))
    client.yank()
    return data


async def lengths(pair: Pair) -> list[int]:
    """Of both sides, as guests, files and status have it."""
    return [await length(pair.primary), await length(pair.standby), *files(pair),
            *[(await side.status())["disks"][0]["size"] for side in (pair.primary, pair.standby)]]


def files(pair: Pair) -> list[int]:
    paths = [pair.directory / f"disk0.{role}" for role in ("primary", "standby")]
    return [parse_header(path.read_bytes()).size if pair.format == "qcow2" else path.stat().st_size for path in paths]


def fill(seed: int, count: int) -> bytes:
    return bytes((seed + index) % 251 for index in range(count))


async def healthy(pair: Pair) -> Client:
    await pair.start()
    await pair.primary.until(health="healthy")
    return await pair.primary.client("disk0")


@of_any_kind
@scenario
async def test_a_disk_grows_on_both_sides_while_its_guest_writes(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        guest = await healthy(pair)
        await pair.primary.execute("block_resize", device="disk0", size=ODD)
        assert await lengths(pair) == [ODD] * 6
        around = MiB - 1000
        await guest.pwrite(around, fill(1, 5000))  # over the old end, on a connection that was there before
        await guest.pwrite(ODD - 100, fill(2, 100))
        assert await content(pair.standby, MiB, ODD - MiB) == bytes(ODD - MiB), "zeroes up to the checkpoint"
        await pair.primary.execute("replication-checkpoint")
        await guest.pwrite(around, fill(3, 5000))
        assert await content(pair.standby, around, 5000) == fill(1, 5000)
        assert await content(pair.standby, ODD - 100, 100) == fill(2, 100)
        assert (await pair.primary.status())["health"] == "healthy"
        pair.primary.kill()
        await pair.standby.execute("replication-failover")
        await pair.standby.until(state="promoted")
        assert await content(pair.standby, around, 5000) == fill(1, 5000)
        await pair.standby.execute("quit")
        await pair.standby.ended()
        assert (await pair.file("standby"))[around:around + 5000] == fill(1, 5000)


@of_any_kind
@scenario
async def test_the_command_line_lets_a_disk_grow(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await healthy(pair)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "blockstep", "resize", "disk0", "3M", "--qmp", str(tmp_path / "primary.qmp"),
            stdout=subprocess.PIPE, env=environment())
        printed, _ = await process.communicate()
        assert (process.returncode, printed) == (0, b"disk disk0 has 3 MiB now\n")
        assert await lengths(pair) == [3 * MiB] * 6


@pytest.mark.parametrize(("arguments", "error"), [
    ({"node-name": "disk0", "size": 4096}, "it can only grow, because"),
    ({"node-name": "other", "size": ODD}, "there is no node named 'other'"),
    ({"size": ODD}, "node-name"),
    ({"node-name": "disk0", "device": "disk0", "size": ODD}, "node-name"),
])
@scenario
async def test_what_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, arguments: dict[str, Any], error: str
) -> None:
    async with Pair(tmp_path) as pair:
        await healthy(pair)
        with pytest.raises(CommandRefused, match=error):
            await pair.primary.execute("block_resize", **arguments)
        assert await lengths(pair) == [MiB] * 6


@of_any_kind
@scenario
async def test_a_standby_refuses_a_resize_of_its_own_until_it_is_promoted(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        with pytest.raises(CommandRefused, match="asked of its primary"):
            await pair.standby.execute("block_resize", device="disk0", size=ODD)
        await pair.start_primary()
        await pair.primary.until(health="healthy")
        with pytest.raises(CommandRefused, match="asked of its primary"):
            await pair.standby.execute("block_resize", device="disk0", size=ODD)
        pair.primary.kill()
        await pair.standby.execute("replication-failover")
        await pair.standby.until(state="promoted")
        await pair.standby.execute("block_resize", device="disk0", size=ODD)
        assert await length(pair.standby) == ODD
        assert files(pair)[1] == ODD


@of_any_kind
@scenario
async def test_a_primary_alone_grows_and_its_standby_when_it_comes(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        guest = await healthy(pair)
        pair.standby.kill()
        await pair.primary.until(state="offline")
        await pair.primary.execute("block_resize", device="disk0", size=ODD)
        await guest.pwrite(ODD - 5000, fill(4, 5000))
        await pair.standby.close()
        pair.sides.remove(pair.standby)
        await pair.start_standby(link=pair.link)
        await pair.primary.until(health="healthy")
        assert await lengths(pair) == [ODD] * 6
        await pair.primary.execute("replication-checkpoint")
        assert await content(pair.standby, ODD - 5000, 5000) == fill(4, 5000)


@of_any_kind
@scenario
async def test_an_absurd_length_is_refused_by_name_and_the_next_one_works(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await healthy(pair)
        with pytest.raises(CommandRefused, match=r"'disk0-active' cannot .*; the disk has 1048576 bytes, as before"):
            await pair.primary.execute("block_resize", device="disk0", size=8_000_000 << 40)
        assert await lengths(pair) == [MiB] * 6
        assert (await pair.standby.status())["health"] == "healthy"
        await goes_on(pair)
        await pair.primary.execute("block_resize", device="disk0", size=ODD)
        assert await lengths(pair) == [ODD] * 6


@scenario
async def test_a_standby_that_grew_before_a_crash_says_what_would_fit(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await healthy(pair)
        pair.standby.kill()
        await pair.primary.until(state="offline")
        await pair.standby.close()
        pair.sides.remove(pair.standby)
        with open(tmp_path / "disk0.standby", "r+b") as file:
            file.truncate(ODD)
        await pair.start_standby(link=pair.link)
        await pair.primary.until(lambda status: f"blockstep resize disk0 {ODD}" in status["reason"])
        await pair.primary.execute("block_resize", device="disk0", size=ODD)
        await pair.primary.until(health="healthy")
        assert await lengths(pair) == [ODD] * 6


@scenario
async def test_a_primary_that_comes_back_without_its_growth_takes_the_standbys_back(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await healthy(pair)
        await pair.primary.execute("block_resize", device="disk0", size=ODD)
        pair.primary.kill()
        await pair.primary.close()
        pair.sides.remove(pair.primary)
        with open(tmp_path / "disk0.primary", "r+b") as file:
            file.truncate(MiB)
        await pair.start_primary()
        await pair.primary.until(health="healthy")
        assert await lengths(pair) == [MiB] * 6


async def goes_on(pair: Pair) -> None:
    """The pair replicates as before."""
    async with pair.writing():
        await pair.written(50)
        await pair.checkpoint_shows()
    assert (await pair.primary.status())["health"] == "healthy"


def limited(size: int) -> dict[str, Any]:
    """For a process whose files cannot grow beyond ``size`` bytes."""
    import resource
    import signal

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return {"preexec_fn": limit}


@scenario
async def test_when_the_standby_cannot_grow_neither_does(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby(**limited(2 * MiB))
        await pair.start_primary()
        await pair.primary.until(health="healthy")
        with pytest.raises(CommandRefused, match="disk 'disk0' of the standby cannot get"):
            await pair.primary.execute("block_resize", device="disk0", size=ODD)
        assert await lengths(pair) == [MiB] * 6
        await goes_on(pair)


@scenario
async def test_when_the_primary_cannot_grow_the_standby_is_put_back(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        await pair.start_primary(**limited(2 * MiB))
        await pair.primary.until(health="healthy")
        with pytest.raises(CommandRefused, match="disk 'disk0' of this side cannot grow"):
            await pair.primary.execute("block_resize", device="disk0", size=ODD)
        assert await lengths(pair) == [MiB] * 6
        await goes_on(pair)
