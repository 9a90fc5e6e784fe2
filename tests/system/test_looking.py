"""What a pair's programs hold can be looked at, and changes by the commands of the pair alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.qmp.errors import CommandRefused
from blockstep.testing.pair import Pair, Side
from tests.peers import blockstep, run
from tests.scenarios import scenario


def _drawn(side: Side) -> list[str]:
    return run(*blockstep("graph", "--socket", side.directory / f"{side.role}.qmp")).stdout.splitlines()


@scenario
async def test_both_ends_of_a_pair_can_be_drawn(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        primary, standby = _drawn(pair.primary), _drawn(pair.standby)
        assert primary[0].startswith("pair test · primary · replicating · healthy")
        assert standby[0].startswith("pair test · standby · replicating · healthy")
        assert any(line.split()[:2] == ["guest's", "disk0"] for line in primary)
        assert any(line.endswith(str(tmp_path / "disk0.primary")) for line in primary)
        assert any(line.split()[:3] == ["view", "of", "disk0"] for line in standby)
        assert any(line.endswith(str(tmp_path / "disk0.standby")) for line in standby)


@scenario
async def test_the_nodes_of_a_pair_cannot_be_taken_from_it(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        for side in (pair.primary, pair.standby):
            nodes = await side.connection.execute("query-named-block-nodes", {"flat": True})
            assert "disk0" in [node["node-name"] for node in nodes]
            jobs = await side.connection.execute("query-jobs")
            assert {job["id"] for job in jobs} <= {"sync-disk0"}  # the first sync may not have ended
            with pytest.raises(CommandRefused) as caught:
                await side.connection.execute("blockdev-del", {"node-name": "disk0"})
            assert caught.value.error_class == "CommandNotFound"
