"""The check of images with external data files: where their L2 entries lead to, which qemu-img does not look at."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.qcow2.format import COMPRESSED, COPIED, OFFSET, ZERO
from blockstep.drivers.qcow2.repair import repair
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import Damage, our_check, our_repair, qemu_check, write

pytestmark = pytest.mark.interop

KiB, MiB = 1024, 1 << 20

KINDS = {
    "plain": "",
    "raw": ",data_file_raw=on",
    "subclusters": ",extended_l2=on",
    "raw subclusters": ",data_file_raw=on,extended_l2=on,preallocation=metadata",
}
#: What the entry of cluster 1, which is at 0x10000, says.
WRONG = {
    "elsewhere": COPIED | 0x20000,
    "elsewhere and shared": 0x20000,
    "at the begin": COPIED,
    "between clusters": COPIED | 0x10200,
    "far away": COPIED | 1 << 40,
    "reserved bits": COPIED | 0x10010,
    "compressed": COMPRESSED | 0x50000,
}


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need("qemu-img", "qemu-io")


def make(path: Path, options: str) -> bytes:
    """An image with something in its first clusters. Returns what the disk has."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={path}.data{options}", str(path), "4M")
    write(path, "write -P 1 0 64k", "write -P 2 64k 64k", "write -P 3 1M 128k", "write -P 4 3M 1k")
    return content(path)


def content(path: Path) -> bytes:
    raw = path.with_name("content")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw))
    return raw.read_bytes()


def qemu_reads(path: Path, offset: int) -> bool:
    done = subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", f"read {offset} 512", str(path)],
                          capture_output=True, check=False)
    return done.returncode == 0


def we_read(path: Path, offset: int) -> bytes | OSError:
    async def go() -> bytes | OSError:
        graph = Graph()
        node = await graph.open({"driver": "qcow2", "node-name": "disk", "read-only": True, "file": {
            "driver": "file", "filename": str(path)}})
        user = graph.attach_backend(node, "test", READ)
        try:
            return bytes(await user.pread(offset, 512))
        except OSError as error:
            return error
        finally:
            await graph.detach_backend(user)
            await graph.close(node)

    return asyncio.run(go())


def damage(path: Path, entry: int) -> None:
    image = Damage(path)
    image.put(image.entries()[1], entry)
    image.save()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_an_entry_that_is_wrong_is_found_and_put_right_where_it_is_clear_what_it_was(
        kind: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    before = make(path, KINDS[kind])
    assert our_check(path).as_json(str(path)) == qemu_check(path)
    damage(path, WRONG[wrong])
    assert our_check(path).corruptions == 1
    if wrong != "reserved bits":
        assert not qemu_reads(path, 64 * KiB)
        assert isinstance(we_read(path, 64 * KiB), OSError)
    assert our_repair(path, "leaks").corruptions == 1
    repaired = our_repair(path, "all")
    assert (repaired.clean, repaired.corruptions_fixed) == (True, 1)
    assert our_check(path).as_json(str(path)) == qemu_check(path)
    if wrong == "compressed" and "raw" not in kind:  # nobody knows what there was
        before = before[:64 * KiB] + bytes(64 * KiB) + before[128 * KiB:]
    assert content(path) == before
    assert we_read(path, 64 * KiB) == before[64 * KiB:][:512]


@pytest.mark.parametrize("kind", ["plain", "raw"])
def test_a_zero_cluster_at_a_wrong_place_stays_zero_unless_the_data_file_is_the_disk(
        kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    before = make(path, KINDS[kind])
    damage(path, COPIED | 0x20000 | ZERO)
    assert not qemu_reads(path, 64 * KiB)
    assert our_check(path).corruptions == 1
    assert our_repair(path, "all").clean
    assert content(path) == (before if kind == "raw" else before[:64 * KiB] + bytes(64 * KiB) + before[128 * KiB:])


def test_zero_clusters_that_have_no_place_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, "")
    for entry in (ZERO, ZERO | COPIED):
        damage(path, entry)
        assert our_check(path).as_json(str(path)) == qemu_check(path)
        assert we_read(path, 64 * KiB) == bytes(512)


def test_a_write_into_a_zero_cluster_that_is_marked_and_has_no_place_goes_where_the_disk_has_it(
        tmp_path: Path) -> None:
    path = tmp_path / "image"
    before = make(path, "")
    damage(path, ZERO | COPIED)

    async def go() -> None:
        graph = Graph()
        node = await graph.open({"driver": "qcow2", "node-name": "disk", "file": {
            "driver": "file", "filename": str(path)}})
        user = graph.attach_backend(node, "test", READ | WRITE)
        await user.pwrite(100 * KiB, b"word")
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    assert our_check(path).clean
    disk = bytearray(before[:64 * KiB] + bytes(64 * KiB) + before[128 * KiB:])
    disk[100 * KiB:100 * KiB + 4] = b"word"
    assert content(path) == disk


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_mark_of_exclusive_use_is_found_as_by_qemu_img(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    before = make(path, KINDS[kind])
    damage(path, 0x10000)
    assert our_check(path).as_json(str(path)) == qemu_check(path)
    assert our_check(path).corruptions == 1
    assert our_repair(path, "all").clean
    assert content(path) == before


@pytest.mark.parametrize("kind", ["plain", "raw", "subclusters"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_table_that_two_parts_of_the_disk_lead_to_stays_with_the_one_whose_data_it_has(
        part: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={path}.data{KINDS[kind]}", str(path), "1G")
    write(path, "write 0 64k", "write 1M 128k", "write -P 7 600M 300k", "write -P 8 300M 70k", "write 900M 1k")
    image = Damage(path)
    parts = 2 if kind != "subclusters" else 4
    first, second = (image.l1 + 8 * each for each in (0, parts - 1 if part == 0 else 1))
    kept, lost = (first, second) if part == 0 else (second, first)
    image.put(lost, image.u64(kept))
    image.save()
    assert our_check(path).corruptions
    assert our_repair(path, "all").clean
    again = Damage(path)
    assert (again.u64(kept), again.u64(lost)) == (image.u64(kept), 0)
    table = image.u64(kept) & OFFSET
    assert again.data[table:table + 64 * KiB] == image.data[table:table + 64 * KiB]


def test_a_repair_that_is_cut_off_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "image"
    before = make(path, KINDS["raw"])
    image = Damage(path)
    for at, entry in zip(image.entries(), WRONG.values(), strict=False):
        image.put(at, entry)
    image.refcount(2, 0)
    damaged = bytes(image.data)

    for most in range(100):
        file, left = bytearray(damaged), most

        def write_some(offset: int, data: bytes) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            file[offset:offset + len(data)] = data  # noqa: B023  used in this turn only

        try:
            repair(lambda offset, length: file[offset:offset + length], len(file),  # noqa: B023
                   write_some, lambda: None, "all")
        except KeyboardInterrupt:
            pass
        path.write_bytes(file)
        assert our_repair(path, "all").clean
        assert content(path) == before
        if left >= 0:
            return
    raise AssertionError("too many writes")


@pytest.mark.parametrize("options", ["", ",data_file_raw=on", ",extended_l2=on"])
def test_data_that_is_elsewhere_is_not_taken_for_clusters_of_the_image(options: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o",
        f"data_file={path}.data,preallocation=metadata{options}", str(path), "64G")
    assert our_check(path).as_json(str(path)) == qemu_check(path)
