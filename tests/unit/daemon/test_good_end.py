"""The note of an end in good order: what is believed at the next start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.bitmap import Bitmap
from blockstep.block.graph import Graph
from blockstep.daemon import good_end
from blockstep.daemon.disks import DiskSpec
from blockstep.units import KiB, MiB
from tests.devices import loop_device, release
from tests.scenarios import scenario


def noted(directory: Path, **disks: str) -> tuple[Path, list[DiskSpec]]:
    """A note of an end with these disks, name -> format, whose files there are."""
    specs = [DiskSpec(name, directory / name, format=format) for name, format in disks.items()]
    for spec in specs:
        spec.path.write_bytes(bytes(KiB))
    note = directory / "state" / "web.ended"
    good_end.write(note, good_end.GoodEnd("web", "run", 7, 8, 1.0, {
        spec.name: good_end.DiskEnd(str(spec.path), spec.format, {str(spec.path): ""}) for spec in specs}, 7))
    return note, specs


def test_what_was_written_is_read_until_it_is_forgotten(tmp_path: Path) -> None:
    note, disks = noted(tmp_path, a="raw", b="qcow2")
    assert note.stat().st_mode & 0o077 == 0
    for _ in range(2):
        end = good_end.read(note, "web", disks[::-1])
        assert end is not None
        assert (end.instance, end.epoch, end.asked) == ("run", 7, 8)
        assert 1.0 <= end.age_now < 60
    good_end.forget(note)
    assert good_end.read(note, "web", disks) is None
    good_end.forget(note)


def replaced(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def written_and_touched_back(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"x" * KiB)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [
    Path.unlink, Path.touch, replaced, written_and_touched_back, lambda path: os.truncate(path, 2 * KiB)])
def test_a_file_that_is_not_as_it_was_makes_the_note_worthless(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    note, disks = noted(tmp_path, a="raw", b="raw")
    change(tmp_path / "b")
    assert good_end.read(note, "web", disks) is None


def test_an_end_lasts_until_a_write_would_have_another_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        (tmp_path / "a").write_bytes(b"somebody")

    monkeypatch.setattr(time, "sleep", sleep)
    note, disks = noted(tmp_path, a="raw")
    assert slept == [good_end.tick((tmp_path / "a").stat().st_ctime_ns)]
    assert good_end.read(note, "web", disks) is None


@pytest.mark.parametrize(("changed", "seconds"), [(7_000_000_000, 2.0), (7_000_000_001, 0.02), (6_990_000_000, 0.02)])
def test_times_in_whole_seconds_are_those_of_a_filesystem_that_has_no_others(changed: int, seconds: float) -> None:
    assert good_end.tick(changed) == seconds


@pytest.mark.parametrize(("pair", "disks"), [
    ("other", "ab"), ("web", "a"), ("web", "abc"), ("web", "aB")])
def test_a_note_of_another_pair_or_of_other_disks_is_worthless(tmp_path: Path, pair: str, disks: str) -> None:
    note, _ = noted(tmp_path, a="raw", b="raw")
    specs = [DiskSpec(name.lower(), tmp_path / name.lower(), format="qcow2" if name.isupper() else "raw")
             for name in disks]
    assert good_end.read(note, pair, specs) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"pair": "web"}', bytes(4096)])
def test_a_note_that_cannot_be_understood_is_none(tmp_path: Path, content: bytes) -> None:
    note, disks = noted(tmp_path, a="raw")
    note.write_bytes(content)
    assert good_end.read(note, "web", disks) is None


def test_of_disks_that_show_no_writes_nothing_is_noted(tmp_path: Path) -> None:
    note = tmp_path / "note"
    good_end.write(note, good_end.GoodEnd("web", "run", 7, 8, 1.0, {
        "a": good_end.DiskEnd("/dev/null", "raw", {"/dev/null": ""})}, 7))
    assert not note.exists()


def test_a_block_device_shows_that_it_was_written_to_or_grew_or_became_another_one(tmp_path: Path) -> None:
    seen: list[str] = []

    def look(device: Path) -> None:
        found = good_end.stamps([str(device)])
        assert found is not None
        seen.extend(found.values())

    for _ in range(2):
        device = loop_device(tmp_path / "image")
        try:
            look(device)
            device.read_bytes()
            look(device)
            with open(device, "r+b") as file:
                file.write(b"somebody")
            look(device)
            os.truncate(tmp_path / "image", 2 * MiB)
            subprocess.run(["losetup", "--set-capacity", device], check=True)
            look(device)
        finally:
            release(device)
    assert [seen.index(stamp) for stamp in seen] == [0, 0, 2, 3, 4, 4, 6, 7]


@scenario
async def test_the_files_of_a_disk_are_those_of_its_whole_chain(tmp_path: Path) -> None:
    graph = Graph()
    for name in ("base", "top"):
        (tmp_path / name).write_bytes(bytes(MiB))
    base = {"driver": "file", "filename": str(tmp_path / "base")}
    node = await graph.open({"driver": "overlay", "filename": str(tmp_path / "over"), "create": True,
                             "backing": {"driver": "raw", "file": base}})
    assert good_end.files_of(node) == [str(tmp_path / "over"), str(tmp_path / "base")]
    memory = await graph.open({"driver": "quorum", "vote-threshold": 1, "children": [
        base | {"read-only": True}, {"driver": "memory", "size": MiB}]})
    assert good_end.files_of(memory) is None
    await graph.close(memory)
    await graph.close(node)


def test_what_a_standby_lacks_is_packed_and_unpacked(tmp_path: Path) -> None:
    length = 100 * MiB + 512
    one, other = Bitmap(length, 64 * KiB), Bitmap(length, 64 * KiB)
    assert good_end.pack(one, other) == b""
    one.set(0, 1)
    other.set(length - 1, 1)
    found = good_end.unpacked(good_end.pack(one, other), length, 64 * KiB)
    assert found is not None
    assert list(found.dirty()) == [(0, 64 * KiB), (100 * MiB, 512)]
    assert good_end.unpacked(good_end.pack(one), 2 * length, 64 * KiB) is None
    assert good_end.unpacked(good_end.pack(one), length // 2, 64 * KiB) is None
    assert good_end.unpacked(b"garbage", length, 64 * KiB) is None


def test_of_two_runs_from_one_note_only_the_first_is_known() -> None:
    known = good_end.successor("")
    assert not good_end.follows(known, "")
    first, second = good_end.successor(known), good_end.successor(known)
    assert good_end.follows(first, known)
    assert not good_end.follows(second, first)
    assert not good_end.follows(known, first)
    assert good_end.follows(good_end.successor(first), first)
    assert not good_end.follows(good_end.successor(""), "")


def test_a_note_says_no_more_than_it_must(tmp_path: Path) -> None:
    """It is a file that operators look at."""
    note, _ = noted(tmp_path, a="raw")
    assert json.loads(note.read_text()).keys() == {"pair", "instance", "epoch", "asked", "age", "disks",
                                                  "durable", "ended"}
