"""A real guest lives through the death of its host: a journalled file system, on the standby as on the primary."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.testing.pair import Pair
from blockstep.units import MiB
from tests.guest import Guest, make_disk, need_guest
from tests.peers import run
from tests.scenarios import scenario

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(240)]


@scenario
async def test_a_guest_boots_again_from_the_standby_with_the_data_of_the_last_checkpoint(tmp_path: Path) -> None:
    need_guest()
    async with Pair(tmp_path, image=make_disk(tmp_path / "fresh", 64 * MiB)) as pair:
        await pair.start()
        guest = await Guest.boot(tmp_path, pair.primary.nbd, "disk0", task="write")
        try:
            await guest.until("WROTE 3")
            await pair.primary.until(health="healthy")
            await pair.primary.execute("replication-checkpoint")
            await guest.until(f"WROTE {guest.written + 5}")
            low = guest.written
            await pair.primary.execute("replication-checkpoint")
            high = guest.written + 2  # one that it has not told of yet, and one whose line is on its way
            await guest.until(f"WROTE {high + 5}")
            pair.primary.kill()
        finally:
            await guest.kill()

        await pair.standby.execute("replication-failover")
        guest = await Guest.boot(tmp_path, pair.standby.nbd, "disk0", task="check")
        try:
            found = int((await guest.until(r"FOUND (\d+)"))[1])
            assert low <= found <= high
            await guest.until("RECOVERED")
            await guest.until("ENDED")
            assert await guest.ended() == 0
        finally:
            await guest.kill()

        await pair.standby.until(state="promoted")
        await pair.standby.execute("quit")
        assert await pair.standby.ended() == 0
        run("e2fsck", "-f", "-n", tmp_path / "disk0.standby")
