"""A primary and its standby as two programs in one process: tests reach into both, turn by turn of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.primary import Primary, PrimaryConfig
from blockstep.daemon.standby import Standby, StandbyConfig
from blockstep.images.opened import ImageName, opened
from blockstep.nbd.uri import InetAddress, UnixAddress
from tests.scenario.standby import Rig

SIZE = 1 << 20


def a_disk(name: str, path: Path) -> DiskSpec:
    """A disk that is made, of the kind that the fixture ``four_disks`` says."""
    return DiskSpec(name, path, SIZE, "qcow2" if Rig.kind == "qcow2" else "raw")


def content_of(path: Path) -> bytes:
    """What the file of such a disk reads as."""

    async def read() -> bytes:
        async with opened(ImageName(str(path), "qcow2" if Rig.kind == "qcow2" else "raw")) as image:
            return bytes(await image.pread(0, image.length))

    return asyncio.run(read())


def buffers(directory: Path) -> dict[str, Any]:
    """Of a standby's configuration: the same for hidden and active disk."""
    if Rig.kind == "qcow2":
        return {"buffer_dir": directory, "buffer_format": "qcow2"}
    return {"buffer_dir": None}


def with_pair(tmp_path: Path, test: Callable[[Primary, Standby], Awaitable[None]]) -> None:
    """The primary is not opened yet: `test` does that."""

    async def main() -> None:
        standby = Standby(StandbyConfig(
            pair="p", disks=tuple(a_disk(name, tmp_path / f"{name}.standby") for name in "ab"),
            link=InetAddress("127.0.0.1", 0), view=UnixAddress(str(tmp_path / "view")), qmp=tmp_path / "s.qmp",
            state=tmp_path / "promoted",
            buffer_memory=SIZE, **buffers(tmp_path)))
        await standby.open()
        primary = Primary(PrimaryConfig(
            pair="p", disks=tuple(a_disk(name, tmp_path / f"{name}.primary") for name in "ab"),
            standby=InetAddress("127.0.0.1", standby.link.port), export=UnixAddress(str(tmp_path / "export")),
            qmp=tmp_path / "p.qmp", state=tmp_path / "primary.ended", checkpoint_every=0.0, checkpoint_bytes=0))
        try:
            await test(primary, standby)
        finally:
            await primary.close()
            await standby.close()

    asyncio.run(main())


async def until(condition: Callable[[], object], limit: float = 10.0) -> None:
    async with asyncio.timeout(limit):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)
