"""An internal snapshot in place of the disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from blockstep import drivers  # noqa: F401  makes them known
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.snapshots import create_snapshot
from blockstep.errors import OptionError
from blockstep.units import KiB, MiB


def options(path: Path, **more: object) -> dict[str, object]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **more}


async def write(path: Path, data: bytes) -> None:
    graph = Graph()
    node = await graph.open(options(path))
    user = graph.attach_backend(node, "test", READ | WRITE)
    await user.pwrite(100 * KiB, data)
    await graph.detach_backend(user)
    await graph.close(node)


async def read(path: Path, snapshot: str) -> bytes:
    graph = Graph()
    node = await graph.open(options(path, snapshot=snapshot, **{"read-only": True}))
    user = graph.attach_backend(node, "test", READ)
    data = bytes(await user.pread(100 * KiB, 5))
    with pytest.raises(OptionError, match="to show the snapshot"):
        await graph.reopen([(node, {"read-only": False})])
    await graph.detach_backend(user)
    await graph.close(node)
    return data


def test_a_snapshot_is_shown_and_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    CreateQcow2(filename=str(path), size=MiB).create()
    for name, data in (("one", b"first"), ("two", b"later")):
        asyncio.run(write(path, data))
        with open(path, "r+b") as file:
            fd = file.fileno()
            create_snapshot(lambda offset, length, fd=fd: os.pread(fd, length, offset), os.fstat(fd).st_size,
                            lambda offset, piece, fd=fd: os.pwrite(fd, piece, offset), lambda: None, name,
                            seconds=0, nanoseconds=0)
    asyncio.run(write(path, b"today"))
    assert [asyncio.run(read(path, name)) for name in ("one", "two", "1", "2")] == [b"first", b"later"] * 2
    with pytest.raises(OptionError, match="to show the snapshot"):
        asyncio.run(Graph().open(options(path, snapshot="one")))
    with pytest.raises(OptionError, match="the id or the name"):
        asyncio.run(Graph().open(options(path, snapshot="three", **{"read-only": True})))
