"""A promotion outlives the process: a standby that was promoted does not become one again by a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.errors import BlockstepError
from blockstep.testing.pair import Pair
from tests.scenarios import scenario


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
