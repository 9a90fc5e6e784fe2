"""A primary in this process: what its program does in moments that a test of processes does not meet."""

from __future__ import annotations

import asyncio
import errno
import gc
import warnings
from dataclasses import replace
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


def test_a_disk_that_cannot_be_closed_in_order_is_told_of_when_all_are_closed(tmp_path: Path) -> None:
    async def main() -> None:
        primary = Primary(replace(config(tmp_path), disks=tuple(a_disk(name, tmp_path / name) for name in "ab")))
        await primary.open()
        disk = primary.graph.find("a-disk")
        close = disk.close

        async def fail() -> None:
            await close()
            raise OSError(errno.EIO, "not all was stored")

        disk.close = fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="node 'a-disk': not all was stored"):
            await primary.close()
        assert not primary.graph.nodes

    asyncio.run(main())
