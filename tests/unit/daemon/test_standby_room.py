"""What the buffers of a standby may hold, in file systems that are not as usual."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockstep.daemon import standby_room as module
from blockstep.daemon.standby_room import Room
from blockstep.daemon.standby_setup import StandbyConfig
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.units import MiB


def room(directory: Path | None, *used: int, kind: Any = "overlay") -> Room:
    config = StandbyConfig(
        pair="p", disks=(), link=InetAddress("", 0), view=UnixAddress(""), qmp=Path(), state=Path(),
        buffer_memory=MiB, buffer_dir=directory, buffer_format=kind)
    disks: Any = {f"disk{number}": SimpleNamespace(buffer=SimpleNamespace(used=held))
                  for number, held in enumerate(used)}
    return Room(config, disks)


def seen(one: Room) -> list[int]:
    asyncio.run(one.look())
    return [one.limit(name) for name in one._disks]


def has_free(free: int, monkeypatch: pytest.MonkeyPatch, size: int = 1000) -> None:
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=free, f_frsize=4096, f_blocks=size))


def test_without_a_directory_it_is_the_memory() -> None:
    one = room(None, 5, 3 * MiB)
    assert seen(one) == [MiB, MiB]
    assert one.least == MiB


@pytest.mark.parametrize(("kind", "limits"), [
    ("overlay", [MiB + 5 * 4096, 3 * MiB + 5 * 4096]),
    ("qcow2", [4096 + 5 * 4096, 3 * MiB + 5 * 4096]),
])
def test_each_disk_has_what_it_holds_and_its_share_of_what_is_free(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limits: list[int]) -> None:
    has_free(10, monkeypatch)
    one = room(tmp_path, 4096, 3 * MiB, kind=kind)
    assert seen(one) == limits
    assert one.least == limits[0]


def test_a_file_system_without_a_size_has_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(0, monkeypatch, size=0)
    assert seen(room(tmp_path, 0)) == [0]


def test_one_that_is_full_is_not_taken_for_one_without_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(0, monkeypatch)
    assert seen(room(tmp_path, 0)) == [MiB]
    assert seen(room(tmp_path, 0, kind="qcow2")) == [1]


def test_of_a_directory_that_is_gone_only_the_memory_is_left(tmp_path: Path) -> None:
    assert seen(room(tmp_path / "gone", 0)) == [MiB]
    assert seen(room(tmp_path / "gone", 0, kind="qcow2")) == [0]


def test_a_file_system_that_hangs_holds_nobody_up_and_is_asked_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, asked = threading.Event(), []

    def statvfs(place: Path) -> Any:
        asked.append(place)
        hangs.wait()
        return SimpleNamespace(f_bavail=1, f_frsize=MiB, f_blocks=9)

    async def main() -> None:
        one = room(tmp_path, 0)
        await one.look()
        await one.look()
        assert (one.limit("disk0"), asked) == (0, [tmp_path])
        hangs.set()
        monkeypatch.setattr(module, "PATIENCE", 20)
        await one.look()
        assert one.limit("disk0") == 2 * MiB

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    asyncio.run(main())
