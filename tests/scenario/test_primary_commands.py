"""A primary in this process: what its program does in moments that a test of processes does not meet."""

from __future__ import annotations

import asyncio
import gc
import warnings
from pathlib import Path

import pytest

from blockstep.daemon.primary import Primary, PrimaryConfig
from blockstep.daemon.standby import Standby
from blockstep.nbd.uri import InetAddress, UnixAddress
from tests.scenario.pair import a_disk, until, with_pair

pytestmark = pytest.mark.usefixtures("four_disks")


def config(directory: Path) -> PrimaryConfig:
    """One of a primary whose standby is not there."""
    return PrimaryConfig(pair="p", disks=(a_disk("d", directory / "d.img"),),
                         standby=InetAddress("127.0.0.1", 1), export=UnixAddress(str(directory / "nbd")),
                         qmp=directory / "qmp")


@pytest.mark.parametrize("turns", range(3))
def test_a_primary_that_is_told_to_end_at_once_ends_quietly(tmp_path: Path, turns: int) -> None:
    async def main() -> None:
        primary = Primary(config(tmp_path))
        await primary.open()
        for _ in range(turns):
            await asyncio.sleep(0)
        await primary.close()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert [str(one.message) for one in told if issubclass(one.category, RuntimeWarning)] == []


def test_many_requests_at_a_time_are_few_checkpoints(tmp_path: Path) -> None:
    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        await until(lambda: primary.coordinator.protected)
        epoch = primary.coordinator.epoch
        answers = await asyncio.gather(*(primary.checkpoint() for _ in range(8)))
        assert {answer.epoch for answer in answers} == {epoch + 1}

    with_pair(tmp_path, test)
