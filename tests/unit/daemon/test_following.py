"""The note of whom a standby follows: what is believed at the start after a crash."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockstep.block.graph import Graph
from blockstep.daemon import following
from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.files import Files
from blockstep.daemon.following import Followed, Following
from blockstep.testing.clock import run
from blockstep.units import KiB
from tests.devices import loop_device, release


async def kept(directory: Path, disks: list[DiskSpec], attached: Callable[[], bool] = lambda: True,
               files: Files | None = None) -> Following:
    """A note with these disks, open: of the run "run", from checkpoint 7 on."""
    graph = Graph()
    for disk in disks:
        await disk.open(graph, f"{disk.name}-secondary")
    opened: Any = {disk.name: SimpleNamespace(spec=disk) for disk in disks}
    note = Following(directory / "web.follows", "web", graph, opened, files or Files(lambda: None), attached)
    await note.keep("run", 7)
    return note


@pytest.fixture
def disks(tmp_path: Path) -> list[DiskSpec]:
    disks = [DiskSpec(name, tmp_path / name) for name in ("a", "b")]
    for disk in disks:
        disk.path.write_bytes(bytes(KiB))
    return disks


@pytest.fixture
def note(tmp_path: Path, disks: list[DiskSpec]) -> Path:
    """The program that has written it has died."""

    async def scenario() -> None:
        await (await kept(tmp_path, disks)).close()

    run(scenario())
    return tmp_path / "web.follows"


def killed_a_minute_ago(note: Path) -> None:
    then = time.time() - 60
    os.utime(note, (then, then))


def found(note: Path, disks: list[DiskSpec]) -> Followed | None:
    return following.read(note, "web", disks)


def test_what_was_written_is_believed_after_the_last_writes_of_the_program(note: Path, disks: list[DiskSpec]) -> None:
    disks[0].path.write_bytes(b"x" * KiB)
    assert note.stat().st_mode & 0o077 == 0
    for _ in range(2):
        said = found(note, disks[::-1])
        assert said
        assert (said.instance, said.epoch) == ("run", 7)


def replaced(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def put_back(note: Path) -> None:
    """The files were changed once more before the note was written: they are an older state of them."""
    said = json.loads(note.read_bytes())
    for disk in said["disks"].values():
        for name, stamp in disk["files"].items():
            inode, changed, length = stamp.split()
            disk["files"][name] = f"{inode} {int(changed) + 1} {length}"
    note.write_text(json.dumps(said))


@pytest.mark.parametrize("change", [
    lambda note, disk: disk.unlink(), lambda note, disk: replaced(disk), lambda note, disk: os.truncate(disk, 512),
    lambda note, disk: put_back(note),
    lambda note, disk: killed_a_minute_ago(note),  # and the file was changed since then
    lambda note, disk: note.write_bytes(b"{}"), lambda note, disk: note.write_bytes(note.read_bytes()[:-9])])
def test_what_is_not_as_the_note_says_makes_it_worthless_for_good(
    note: Path, disks: list[DiskSpec], change: Callable[[Path, Path], Any]
) -> None:
    change(note, disks[1].path)
    assert found(note, disks) is None
    assert not note.exists()


def test_it_is_of_these_disks_and_of_no_others(tmp_path: Path, note: Path, disks: list[DiskSpec]) -> None:
    said = note.read_bytes()
    for pair, others in (("mail", disks), ("web", disks[:1]),
                         ("web", [disks[0], DiskSpec("b", tmp_path / "b", format="qcow2")])):
        assert following.read(note, pair, others) is None
        note.write_bytes(said)
    assert found(note, disks)


@pytest.mark.parametrize(("uptime", "believed"), [(0.0, True), (30.0, False)])
def test_after_a_reboot_nothing_may_have_been_changed_since(
    note: Path, disks: list[DiskSpec], monkeypatch: pytest.MonkeyPatch, uptime: float, believed: bool
) -> None:
    """The files were changed just now, which is after a boot that was 30 s ago."""
    monkeypatch.setattr("blockstep.daemon.pulse.boot", lambda: "another")
    monkeypatch.setattr(time, "clock_gettime", lambda clock: uptime)
    assert bool(found(note, disks)) is believed


@pytest.mark.parametrize("attached", [True, False])
def test_its_time_goes_on_with_a_primary(tmp_path: Path, disks: list[DiskSpec], attached: bool) -> None:
    async def scenario() -> None:
        following = await kept(tmp_path, disks, lambda: attached)
        killed_a_minute_ago(tmp_path / "web.follows")
        before = (tmp_path / "web.follows").stat().st_mtime
        await asyncio.sleep(3)
        await following.close()
        assert ((tmp_path / "web.follows").stat().st_mtime > before) is attached

    run(scenario())


def test_what_is_forgotten_is_gone_whatever_has_become_of_the_last_write(
    tmp_path: Path, disks: list[DiskSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content)
        raise OSError("its name is not durable")

    def wrong() -> None:
        raise LookupError

    async def scenario() -> None:
        following = await kept(tmp_path, disks)
        with pytest.raises(LookupError):
            await following.keep("other", 8, wrong)
        assert following.instance == "run"
        monkeypatch.setattr("blockstep.daemon.following.replace_file", full)
        with pytest.raises(OSError, match="durable"):
            await following.keep("other", 8)
        assert following.instance == ""
        await following.forget()
        assert not (tmp_path / "web.follows").exists()
        await following.close()

    run(scenario())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a loop device")
def test_of_a_block_device_there_is_no_note(tmp_path: Path) -> None:
    device = loop_device(tmp_path / "image")
    try:
        async def scenario() -> None:
            following = await kept(tmp_path, [DiskSpec("a", device)])
            assert following.instance == ""
            await following.close()

        run(scenario())
        assert not (tmp_path / "web.follows").exists()
    finally:
        release(device)


@pytest.mark.parametrize("writes", [True, False])
def test_of_a_disk_whose_file_is_not_what_it_was_there_is_no_note(
    tmp_path: Path, disks: list[DiskSpec], writes: bool
) -> None:
    """Also none that was there before, though nothing is written."""
    async def scenario() -> None:
        files = Files(lambda: None)
        following = await kept(tmp_path, disks, files=files)
        files.watch("a", following._graph.find("a-secondary"))
        disks[0].path.rename(tmp_path / "elsewhere")
        if writes:
            await following.keep("run", 8)
        else:
            await asyncio.sleep(2)
        assert not (tmp_path / "web.follows").exists()
        await following.close()
        await files.close()

    run(scenario())


def test_whoever_else_writes_to_its_disks_forgets_it(tmp_path: Path, note: Path, disks: list[DiskSpec]) -> None:
    following.forget_if_of(note, [DiskSpec("a", tmp_path / "c")])
    assert note.exists()
    following.forget_if_of(note, [DiskSpec("c", tmp_path / "b")])
    assert not note.exists()
    following.forget_if_of(note, disks)
