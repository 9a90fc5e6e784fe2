"""Internal snapshots: made by qemu-img and by us, and used by the other one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.drivers.qcow2.format import Snapshot
from blockstep.drivers.qcow2.snapshots import apply_snapshot, create_snapshot, delete_snapshot, list_snapshots
from blockstep.errors import ImageError, OptionError
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import KINDS, Damage, make, our_check, our_repair, qemu_check, write

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need("qemu-img", "qemu-io")


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, ...]]:
    with open(path, "r+b") as file:
        fd = file.fileno()

        def put(offset: int, data: bytes) -> None:
            assert os.pwrite(fd, data, offset) == len(data)

        yield lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size, put, lambda: None


def create(path: Path, name: str) -> Snapshot:
    with opened(path) as image:
        return create_snapshot(*image, name, seconds=1_700_000_000)


def delete(path: Path, name: str) -> Snapshot:
    with opened(path) as image:
        return delete_snapshot(*image, name)


def apply(path: Path, name: str) -> Snapshot:
    with opened(path) as image:
        return apply_snapshot(*image, name)


def names(path: Path) -> list[tuple[str, str]]:
    with opened(path) as image:
        return [(each.id, each.name) for each in list_snapshots(*image[:2])]


def content(path: Path, snapshot: str | None = None) -> bytes:
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", *(("-l", snapshot) if snapshot else ()), "-O", "raw", str(path), str(raw))
    return raw.read_bytes()


def clean(path: Path) -> bool:
    found = qemu_check(path)
    return found is not None and not (found.get("corruptions") or found.get("leaks") or found["check-errors"])


_SHARING = [kind for kind in KINDS if kind != "refcount-1" and not kind.startswith("external")]


def _no_bitmaps(path: Path) -> None:
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
    for each in info["format-specific"]["data"].get("bitmaps", []):
        run("qemu-img", "bitmap", "--remove", str(path), each["name"])


@pytest.mark.parametrize("kind", _SHARING)
def test_a_snapshot_keeps_what_the_disk_was(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path / "image", kind)
    _no_bitmaps(image)
    first, second, before = content(image, "first"), content(image, "second"), content(image)
    assert create(image, "ours").id == "3"
    assert clean(image)
    assert names(image) == [("1", "first"), ("2", "second"), ("3", "ours")]
    write(image, "write -P 77 0 1M", "write -P 78 6M 300k")
    assert clean(image)
    after = content(image)
    assert after != before
    assert (content(image, "ours"), content(image, "first"), content(image, "second")) == (before, first, second)
    assert apply(image, "first").name == "first"
    assert clean(image)
    assert content(image) == first
    assert content(image, "ours") == before
    assert apply(image, "ours").name == "ours"
    write(image, "write -P 79 128k 1M")
    assert clean(image)
    assert (content(image, "ours"), content(image, "first"), content(image, "second")) == (before, first, second)
    delete(image, "first")
    assert clean(image)
    assert (content(image, "ours"), content(image, "second")) == (before, second)
    run("qemu-img", "snapshot", "-d", "ours", str(image))
    delete(image, "2")
    assert clean(image)
    assert names(image) == []
    assert our_check(image).clean


def test_qemu_uses_a_snapshot_of_ours(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    _no_bitmaps(image)
    before = content(image)
    create(image, "ours")
    write(image, "write -P 77 0 1M")
    run("qemu-img", "snapshot", "-a", "ours", str(image))
    assert content(image) == before
    run("qemu-img", "snapshot", "-d", "ours", str(image))
    assert clean(image)


def test_many_snapshots_of_small_clusters_let_the_refcount_table_grow(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", str(image), "64M")
    write(image, "write -P 1 0 1M")
    for number in range(12):
        create(image, f"s{number}")
        assert clean(image)
        write(image, f"write -P {number + 2} {number * 60}k 100k")
    assert clean(image)
    for number in range(11, -1, -1):
        delete(image, f"s{number}")
        assert clean(image)


def test_applying_changes_the_size_back(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    _no_bitmaps(image)
    run("qemu-img", "resize", "-q", str(image), "2G")
    write(image, "write -P 9 1G 64k")
    apply(image, "first")
    assert len(content(image)) == 8 << 20
    assert clean(image)


@pytest.mark.parametrize(("change", "error"), [
    (lambda image: create(image, "first"), OptionError), (lambda image: create(image, "2"), OptionError),
    (lambda image: create(image, ""), OptionError), (lambda image: delete(image, "third"), OptionError),
    (lambda image: apply(image, "third"), OptionError), (lambda image: apply(image, "first"), ImageError)])
def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path, change: Callable[[Path], Snapshot],
                                                       error: type[Exception]) -> None:
    image = make(tmp_path / "image", "default")  # it has a bitmap that follows the disk
    before = image.read_bytes()
    with pytest.raises(error):
        change(image)
    assert image.read_bytes() == before


def test_one_bit_cannot_count_two_users(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "refcount-1")
    _no_bitmaps(image)
    before = image.read_bytes()
    with pytest.raises(ImageError, match="refcount_order"):
        create(image, "first")
    assert image.read_bytes() == before


@pytest.mark.parametrize("change", [create, delete, apply])
def test_killed_anywhere_it_leaves_what_a_repair_makes_good(tmp_path: Path,
                                                            change: Callable[[Path, str], Snapshot]) -> None:
    good = make(tmp_path / "image", "default")
    _no_bitmaps(good)
    first, second, disk = content(good, "first"), content(good, "second"), content(good)
    done = False
    steps = 0
    while not done:
        image = tmp_path / "killed"
        shutil.copy(good, image)
        done = _change_at_most(image, change, steps)
        steps += 1
        assert our_repair(image, "all").clean
        assert clean(image)
        assert Damage(image).header.incompatible == 0
        assert content(image) == disk if change is not apply else content(image) in (disk, first)
        assert content(image, "second") == second
        if change is not delete or len(names(image)) == 2:
            assert content(image, "first") == first
    assert steps > 8


def _change_at_most(path: Path, change: Callable[[Path, str], Snapshot], steps: int) -> bool:
    """Make a change with at most so many writes; whether that was enough."""
    function = {create: create_snapshot, delete: delete_snapshot, apply: apply_snapshot}[change]
    left = steps

    class Killed(Exception):
        pass

    with opened(path) as (read, length, put, sync):
        def counted(offset: int, data: bytes) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            put(offset, data)

        try:
            if change is create:
                create_snapshot(read, length, counted, sync, "new", seconds=0)
            else:
                function(read, length, counted, sync, "first")
        except Killed:
            return False
        return True
