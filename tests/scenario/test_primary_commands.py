"""A primary in this process: what its program does in moments that a test of processes does not meet."""

from __future__ import annotations

import asyncio
import gc
import warnings
from pathlib import Path

import pytest

from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.primary import Primary, PrimaryConfig
from blockstep.nbd.uri import InetAddress, UnixAddress


def config(directory: Path) -> PrimaryConfig:
    """One of a primary whose standby is not there."""
    return PrimaryConfig(pair="p", disks=(DiskSpec("d", directory / "d.img", 1 << 20),),
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
