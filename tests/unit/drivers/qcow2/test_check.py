"""The check of qcow2 images beside that of qemu-img."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstep.drivers.qcow2 import check as checks
from blockstep.drivers.qcow2.format import (
    AT_L1,
    COMPRESSED,
    COPIED,
    CORRUPT,
    DIRTY,
    OFFSET,
)
from blockstep.drivers.qcow2.repair import Repair
from blockstep.errors import ImageError
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import KINDS, Damage, make, our_check, our_repair, qemu_check, write

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need("qemu-img", "qemu-io")


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_image_gives_the_numbers_of_qemu_img(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path / "image", kind)
    assert our_check(image).as_json(str(image)) == qemu_check(image)


def test_leaks_are_given_back_and_nothing_else_is_touched(tmp_path: Path, images: dict[str, Path]) -> None:
    path = tmp_path / "image"
    shutil.copy(images["default"], path)
    image = Damage(path)
    image.data.extend(bytes(-len(image.data) % 65536 + 65536))
    image.refcount(len(image.data) // 65536 - 1, 1)
    at = image.exclusive
    image.refcount((image.u64(at) & OFFSET) >> 16, 0)
    image.save()
    found = our_check(path)
    assert (found.leaks, found.corruptions > 0) == (1, True)
    repaired = our_repair(path, "leaks")
    assert (repaired.leaks, repaired.leaks_fixed, repaired.corruptions) == (0, 1, found.corruptions)
    image.refcount(len(image.data) // 65536 - 1, 0)
    assert path.read_bytes() == image.data


def _overlap(image: Damage) -> None:
    image.put(image.exclusive, image.header.l1_table_offset | COPIED)


def _l2_over_refcount_block(image: Damage) -> None:
    image.put(image.l1, image.block | COPIED)


def _twice(image: Damage) -> None:
    at = image.exclusive
    image.put(at + (16 if image.header.extended_l2 else 8), image.u64(at))


DAMAGES: dict[str, Callable[[Damage], object]] = {
    "refcount too low": lambda image: image.refcount((image.u64(image.exclusive) & OFFSET) >> 16, 0),
    "refcount too high": lambda image: image.refcount((image.u64(image.exclusive) & OFFSET) >> 16, 7),
    "leak": lambda image: image.refcount(len(image.data) // 65536 - 1, 9),
    "leaked cluster": lambda image: (image.data.extend(bytes(-len(image.data) % 65536 + 65536)),
                                     image.refcount(len(image.data) // 65536 - 1, 1)),
    "all refcounts gone": lambda image: image.data.__setitem__(slice(image.block, image.block + 65536), bytes(65536)),
    "refcount of the header": lambda image: image.refcount(0, 0),
    "not marked as exclusive": lambda image: image.put(image.exclusive, image.u64(image.exclusive) & ~COPIED),
    "marked as exclusive": lambda image: image.put(
        image.entry(lambda entry: 0 < entry < COMPRESSED and entry != 1), image.u64(
            image.entry(lambda entry: 0 < entry < COMPRESSED and entry != 1)) | COPIED),
    "L1 entry not marked": lambda image: image.put(image.l1, image.u64(image.l1) & ~COPIED),
    "L1 entry reserved": lambda image: image.put(image.l1, image.u64(image.l1) | 2),
    "L1 entry unaligned": lambda image: image.put(image.l1, image.u64(image.l1) | 512),
    "L1 entry outside": lambda image: image.put(image.l1, 1 << 40 | COPIED),
    "L1 entry over the header": lambda image: image.put(image.l1, COPIED),
    "L2 table over a refcount block": _l2_over_refcount_block,
    "L2 entry reserved": lambda image: image.put(image.exclusive, image.u64(image.exclusive) | 16),
    "L2 entry unaligned": lambda image: image.put(image.exclusive, image.u64(image.exclusive) + 512),
    "L2 entry outside": lambda image: image.put(image.exclusive, 1 << 44 | COPIED),
    "L2 entry without an offset": lambda image: image.put(image.exclusive, COPIED),
    "data over the L1 table": _overlap,
    "one cluster twice": _twice,
    "compressed outside": lambda image: image.put(
        image.entry(lambda entry: bool(entry & COMPRESSED)), COMPRESSED | 1 << 45),
    "compressed and exclusive": lambda image: image.put(
        image.entry(lambda entry: bool(entry & COMPRESSED)),
        image.u64(image.entry(lambda entry: bool(entry & COMPRESSED))) | COPIED),
    "refcount block unaligned": lambda image: image.put(image.header.refcount_table_offset, image.block + 512),
    "refcount block outside": lambda image: image.put(image.header.refcount_table_offset, 1 << 42),
    "refcount block not there": lambda image: image.put(image.header.refcount_table_offset, 0),
    "refcount block twice": lambda image: image.put(image.header.refcount_table_offset + 8, image.block),
    "refcount block over data": lambda image: image.put(
        image.header.refcount_table_offset, image.u64(image.exclusive) & OFFSET),
    "refcount table outside": lambda image: image.put(48, 1 << 40),
    "refcount table behind the end": lambda image: image.put(48, -(-len(image.data) // 65536) * 65536),
    "snapshot's L1 table outside": lambda image: image.put(image.snapshot, 1 << 40),
    "snapshot's L1 table unaligned": lambda image: image.put(image.snapshot, image.u64(image.snapshot) + 512),
    "snapshot's L1 table over the active one": lambda image: image.put(image.snapshot, image.l1),
    "snapshot with too much extra data": lambda image: image.put(image.snapshot + 36, 1 << 30, 4),
    "snapshots that are not there": lambda image: image.put(60, 500, 4),
    "bitmap directory outside": lambda image: image.data.__setitem__(
        slice(image.data.index(b"\x23\x85\x28\x75") + 24, image.data.index(b"\x23\x85\x28\x75") + 32),
        (1 << 40).to_bytes(8, "big")),
    "truncated": lambda image: image.data.__delitem__(slice(len(image.data) * 2 // 3, None)),
    "truncated a little": lambda image: image.data.__delitem__(slice(len(image.data) - 70000, None)),
    "truncated much": lambda image: image.data.__delitem__(slice(len(image.data) // 3 + 1, None)),
}


_LONG = {
    "one behind the other": ("", "write 0 100M"),
    "zeroes": ("", "write -z 0 400M"),
    "zeroes in version 2": ("compat=0.10", "write -z 0 100M"),
    "runs and gaps": ("cluster_size=4k", *(f"write {at * 700}k {at * 23 + 4}k" for at in range(20))),
    "backwards": ("", *(f"write {at}M 1M" for at in range(70, 0, -1))),
    "preallocated": ("preallocation=metadata", "write 17M 1k"),
    "preallocated subclusters": ("preallocation=metadata,extended_l2=on", "write 17M 1k"),
    "subclusters": ("extended_l2=on", "write 0 100M", "write 200M 2k", "write -z 30M 300k"),
}


@pytest.mark.parametrize("what", _LONG)
@pytest.mark.parametrize("damaged", [False, True])
def test_long_runs_give_the_numbers_of_qemu_img(tmp_path: Path, what: str, damaged: bool) -> None:
    path = tmp_path / "image"
    options, *writes = _LONG[what]
    run("qemu-img", "create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), str(path), "512M")
    write(path, *writes)
    changed = 0
    if damaged and what != "zeroes":
        with open(path, "r+b") as file:
            image = Damage(path, file.read(32 << 20))
            entries = [at for at in image.entries() if image.u64(at) & COPIED]
            for at in entries[70:72]:
                file.seek(at)
                file.write((image.u64(at) & ~COPIED).to_bytes(8, "big"))
                changed += 1
    theirs = qemu_check(path)
    assert our_check(path).as_json(str(path)) == theirs
    assert theirs is not None
    assert theirs.get("corruptions", 0) == changed


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    need("qemu-img", "qemu-io")
    directory = tmp_path_factory.mktemp("images")
    return {kind: make(directory / kind, kind) for kind in ("default", "subclusters")}


@pytest.mark.parametrize("kind", ["default", "subclusters"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_repaired(tmp_path: Path, images: dict[str, Path], kind: str, damage: str) -> None:
    path = tmp_path / "image"
    shutil.copy(images[kind], path)
    image = Damage(path)
    DAMAGES[damage](image)
    image.save()
    theirs = qemu_check(path)
    ours = our_check(path)
    if theirs is None or theirs.get("corruptions") or theirs["check-errors"]:
        assert ours.corruptions
    elif theirs.get("leaks"):
        assert ours.leaks
    assert not ours.clean
    repaired = our_repair(path, "all")
    assert repaired.clean
    assert repaired.corruptions_fixed == ours.corruptions
    assert repaired.leaks_fixed == ours.leaks
    again = qemu_check(path)
    assert again is not None
    assert not again.get("corruptions")
    assert not again.get("leaks")
    assert not again["check-errors"]
    run("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "raw"))


@pytest.mark.parametrize("damage", [
    "all refcounts gone", "refcount block twice", "refcount block over data", "refcount of the header",
    "refcount block outside", "refcount table outside", "refcount table behind the end", "not marked as exclusive",
    "L1 entry not marked"])
def test_what_can_be_counted_anew_costs_no_data(tmp_path: Path, images: dict[str, Path], damage: str) -> None:
    path = tmp_path / "image"
    shutil.copy(images["default"], path)
    image = Damage(path)
    DAMAGES[damage](image)
    image.save()
    assert our_repair(path, "all").clean
    run("qemu-img", "compare", str(path), str(images["default"]))
    for name in ("first", "second"):
        run("qemu-img", "convert", "-l", name, "-O", "raw", str(path), str(tmp_path / "one"))
        run("qemu-img", "convert", "-l", name, "-O", "raw", str(images["default"]), str(tmp_path / "two"))
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("what", ["leaks", "all"])
def test_an_image_whose_l1_table_is_not_there_is_left_as_it_is(
        tmp_path: Path, images: dict[str, Path], what: Repair) -> None:
    path = tmp_path / "image"
    shutil.copy(images["default"], path)
    image = Damage(path)
    image.put(AT_L1 + 4, 1 << 40)
    image.save()
    repaired = our_repair(path, what)
    assert repaired.corruptions
    assert not repaired.corruptions_fixed + repaired.leaks_fixed
    assert path.read_bytes() == image.data


def test_more_tables_than_memory_is_for_are_refused(images: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_L2_TABLES", 2)
    with pytest.raises(ImageError, match="number of L2 tables"):
        our_check(images["default"])


def test_more_tables_of_bitmaps_than_there_is_time_for_are_a_damage(
        images: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_BITMAP_TABLES", 8)
    assert our_check(images["default"]).corruptions == 1


def test_the_dirty_bit_goes_when_all_is_repaired(tmp_path: Path, images: dict[str, Path]) -> None:
    path = tmp_path / "image"
    shutil.copy(images["default"], path)
    image = Damage(path)
    image.put(72, DIRTY | CORRUPT)
    image.save()
    assert our_check(path).clean
    assert our_repair(path, "leaks").clean
    assert Damage(path).header.incompatible == DIRTY | CORRUPT
    assert our_repair(path, "all").clean
    assert Damage(path).header.incompatible == 0
