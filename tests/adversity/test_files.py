"""Somebody deletes, moves, replaces or shortens the file of a disk that is in use."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockstep.testing.pair import Pair, Side
from blockstep.testing.processes import blockstep, run
from blockstep.units import MiB
from tests.scenarios import scenario


def told(side: Side, words: str) -> list[dict[str, Any]]:
    """The states that were announced with these words."""
    return [event["data"] for event in side.events
            if event["event"] == "REPLICATION_STATE" and words in event["data"]["reason"]]


@pytest.mark.parametrize("format", ["raw", "qcow2", "overlay"])
@scenario
async def test_a_standby_whose_file_was_deleted_says_so_once_and_again_when_it_is_promoted(
        tmp_path: Path, format: str) -> None:
    async with Pair(tmp_path, disks=2, format=format) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        assert (await pair.standby.status())["health"] == "healthy"
        path = tmp_path / "disk1.standby"
        path.unlink()
        copy = f"/proc/{pair.standby.process.pid}/fd/"
        said = f"disk 'disk1': {path} was deleted: its data end with this program; copy {copy}"
        for _ in range(3):
            status = await pair.standby.status()
            assert (status["state"], status["health"]) == ("replicating", "at-risk")
            assert status["reason"].startswith(said)
        assert [disk["reason"] for disk in status["disks"]] == ["", status["reason"].removeprefix("disk 'disk1': ")]
        await pair.checkpoint_shows()
        [event] = told(pair.standby, said)
        assert event["health"] == "at-risk"
        pair.primary.kill()
        promotion = await asyncio.create_subprocess_exec(
            *blockstep("failover", "--qmp", tmp_path / "standby.qmp"), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE)
        _, warning = await promotion.communicate()
        assert promotion.returncode == 0
        assert warning.decode().startswith(f"blockstep: {said}")
        status = await pair.standby.until(state="promoted")
        assert status["health"] == "at-risk"
        assert status["reason"].startswith(said)
        assert "; it has no standby of its own" in status["reason"]


@scenario
async def test_what_was_cut_off_stays_lost_when_the_file_is_long_again(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=2 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        path = tmp_path / "disk0.primary"
        os.truncate(path, MiB)
        said = f"{path} was shortened from {2 * MiB} to {MiB} bytes"
        async with pair.primary.clients() as (guest,):
            with pytest.raises(OSError, match=said):
                await guest.pread(MiB, 512)
            assert (await pair.primary.status())["reason"].startswith(f"disk 'disk0': {said}")
            await guest.pwrite(2 * MiB - 512, b"!" * 512)  # makes it long again
            assert path.stat().st_size == 2 * MiB
        status = await pair.primary.status()
        assert (status["state"], status["health"]) == ("replicating", "at-risk")
        assert len(told(pair.primary, said)) == 1


@scenario
async def test_a_standby_that_has_met_what_is_lost_says_it_once(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=2 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        os.truncate(tmp_path / "disk0.standby", MiB)
        async with pair.primary.clients() as (guest,):
            await guest.pwrite(MiB, b"!" * 4096)  # what this overwrites cannot be saved
        await pair.primary.until(state="offline")
        status = await pair.standby.status()
        assert "disk 'disk0': " in status["reason"]
        for reason in (status["reason"], status["disks"][0]["reason"]):
            assert reason.count("was shortened") == 1


@scenario
async def test_a_standby_whose_file_was_cut_off_takes_no_checkpoint_and_no_primary(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=2 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        path = tmp_path / "disk0.standby"
        os.truncate(path, MiB)
        assert (await pair.standby.status())["health"] == "at-risk"
        os.truncate(path, 2 * MiB)  # what was there is zeroes now, and nobody knows on which side that differs
        said = f"disk 'disk0' of the standby: {path} was shortened"
        with pytest.raises(Exception, match=f"no checkpoint was taken: .*{said}"):
            await pair.primary.execute("replication-checkpoint")
        status = await pair.primary.until(lambda status: said in status["reason"], health="at-risk")
        assert status["reason"].count(said) == 1  # also where it is the reason for something else
        await pair.standby.close()
        await pair.start_standby(link=pair.link)
        await pair.primary.until(health="healthy")
        assert await pair.file("standby") == await pair.file("primary")


@scenario
async def test_a_file_that_was_moved_can_be_put_back(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        path = tmp_path / "disk0.primary"
        for other in (None, b"another file"):
            path.rename(tmp_path / "elsewhere")
            if other:
                path.write_bytes(other)
            status = await pair.primary.status()
            assert status["health"] == "at-risk"
            assert ("is not the one in use any more" if other else "was moved away") in status["reason"]
            (tmp_path / "elsewhere").rename(path)
            assert (await pair.primary.status())["health"] == "healthy"
        states = [event["data"]["health"] for event in pair.primary.events if event["event"] == "REPLICATION_STATE"]
        assert states[-4:] == ["at-risk", "healthy", "at-risk", "healthy"]


@scenario
async def test_a_backing_image_counts_as_well(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(MiB))
    async with Pair(tmp_path, format="qcow2") as pair:
        path = tmp_path / "disk0.standby"
        run(*blockstep("img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path))
        await pair.start()
        await pair.primary.until(health="healthy")
        base.unlink()
        assert (await pair.standby.status())["reason"].startswith(f"disk 'disk0': {base} was deleted: ")


@pytest.mark.parametrize(("side", "other"), [("standby", "primary"), ("primary", "standby")])
@scenario
async def test_each_end_tells_what_is_the_matter_with_the_other_ones_file_until_that_is_mended(
        tmp_path: Path, side: str, other: str) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.standby.until(health="healthy")
        theirs, asked = getattr(pair, side), getattr(pair, other)
        path, elsewhere = tmp_path / f"disk1.{side}", tmp_path / "elsewhere"
        path.rename(elsewhere)
        await theirs.until(health="at-risk")  # to ask is to look, and nobody has asked the other end
        said = f"disk 'disk1' of the {side}: {path} was moved away: put it back before this program ends"
        event = await asked.heard("REPLICATION_STATE", reason=said)
        assert (event["state"], event["health"]) == ("replicating", "at-risk")
        status = await asked.status()
        assert (status["health"], status["reason"]) == ("at-risk", said)
        assert [disk["fault"] for disk in status["disks"]] == ["", ""]  # of its own files
        assert [disk["fault"] for disk in (await theirs.status())["disks"]] == ["", said.partition(": ")[2]]
        shown = run(*blockstep("status", "--qmp", tmp_path / f"{other}.qmp"), check=False)
        assert shown.returncode == 2
        assert f"\n  at risk: {said}\n" in shown.stdout
        since = len(asked.events)
        elsewhere.rename(path)
        await theirs.until(health="healthy")
        await asked.heard("REPLICATION_STATE", since=since, health="healthy", reason="")
        assert (await asked.status())["health"] == "healthy"


@scenario
async def test_of_a_side_that_has_gone_nothing_is_told_any_more(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        (tmp_path / "disk0.standby").unlink()
        await pair.standby.until(health="at-risk")
        await pair.primary.until(lambda status: "was deleted" in status["reason"])
        pair.standby.kill()
        assert "was deleted" not in (await pair.primary.heard("REPLICATION_STATE", state="offline"))["reason"]
        assert "was deleted" not in (await pair.primary.until(state="offline"))["reason"]
