"""A promotion outlives the process: a standby that was promoted does not become one again by a restart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockstep.daemon import promotion
from blockstep.errors import BlockstepError, OptionError
from blockstep.testing.pair import Pair
from blockstep.units import MiB
from tests.scenarios import limit_files, scenario


@scenario
async def test_a_promoted_standby_that_is_started_again_refuses_and_names_the_note(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=1) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.checkpoint()
        await pair.standby.execute("replication-failover")
        note = tmp_path / "standby.promoted"
        assert note.exists()
        pair.standby.kill()
        with pytest.raises(BlockstepError, match=r"was promoted on .* 'blockstep primary'") as refusal:
            await pair.start_standby()
        assert str(note) in str(refusal.value)
        assert "Traceback" not in str(refusal.value)
        note.unlink()
        await pair.start_standby()


@scenario
async def test_a_standby_that_was_not_promoted_writes_no_note(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=1) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.checkpoint()
        pair.standby.kill()
        assert not (tmp_path / "standby.promoted").exists()


@scenario
async def test_a_merge_that_was_cut_short_is_in_the_note(tmp_path: Path) -> None:
    """And one that has ended is not: the operator has to know which files are whole."""
    async with Pair(tmp_path, disks=2, size=2 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.standby.clients() as (_, view):
            await view.pwrite(MiB, b"mine" * 1024)
        limit_files(pair.standby, MiB)  # the merge of that cannot be written
        await pair.standby.execute("replication-failover")
        await pair.standby.until(state="failover-failed")
        await pair.standby.heard("REPLICATION_FAILOVER", stage="failed")
        pair.standby.kill()
        with pytest.raises(BlockstepError, match=r"But the file of 'disk1' is a part of the merge") as refusal:
            await pair.start_standby()
        assert "'disk0'" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'"x"', b"\xff", b'{"when": 3}', b'{"unmerged": 1}'])
def test_a_note_that_cannot_be_understood_is_one(tmp_path: Path, content: bytes) -> None:
    """Who starts anyway lets a primary overwrite live disks."""
    note = tmp_path / "note"
    note.write_bytes(content)
    with pytest.raises(OptionError, match=r"was promoted.*remove that file"):
        promotion.check(note, "web")


@scenario
async def test_there_is_room_for_the_note_when_the_file_system_is_full(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        reserved = tmp_path / "standby.promoted.new"
        assert os.stat(reserved).st_blocks * 512 >= 4096
        limit_files(pair.standby, 4096)  # what has been reserved can be written
        await pair.standby.execute("replication-failover")
        await pair.standby.heard("REPLICATION_FAILOVER", stage="done")  # the note is written anew before that
        assert not reserved.exists()


@scenario
async def test_a_standby_that_could_not_write_the_note_says_so_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "standby.promoted.new").mkdir()
    async with Pair(tmp_path) as pair:
        with pytest.raises(BlockstepError, match=r"standby\.promoted\.new: Is a directory"):
            await pair.start_standby()


@scenario
async def test_a_standby_that_ends_without_a_promotion_leaves_nothing_in_its_place(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.standby.execute("quit")
        assert await pair.standby.ended() == 0
        assert not [*tmp_path.glob("standby.promoted*")]
