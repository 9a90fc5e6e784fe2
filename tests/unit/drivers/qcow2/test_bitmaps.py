"""Persistent bitmaps: stored by QEMU and by us, and loaded by the other one."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from blockstep.block.bitmap import Bitmap
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.qcow2 import bitmaps
from blockstep.drivers.qcow2.bitmaps import StoredBitmap, load, mark_in_use, store
from blockstep.drivers.qcow2.format import EXT_BITMAPS, parse_header
from blockstep.errors import ImageError, OptionError
from blockstep.images.bitmap import BitmapAction, change_bitmap
from blockstep.images.opened import ImageName
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import make, our_check, qemu_check, write
from tests.unit.drivers.qcow2.test_snapshots import opened

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need("qemu-img", "qemu-io")


def loaded(path: Path) -> list[StoredBitmap]:
    with opened(path) as image:
        return load(*image[:2])


def stored(path: Path, *bitmaps: StoredBitmap) -> None:
    with opened(path) as image:
        store(*image, bitmaps)


def runs(bitmap: Bitmap | None) -> list[tuple[int, int]]:
    assert bitmap is not None
    return list(bitmap.dirty())


def info(path: Path) -> list[dict[str, Any]]:
    found = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
    return found["format-specific"]["data"].get("bitmaps", [])


def clean(path: Path) -> bool:
    found = qemu_check(path)
    return found is not None and not (found.get("corruptions") or found.get("leaks") or found["check-errors"])


def test_bits_that_qemu_stored(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    first, second = loaded(image)
    assert (first.name, first.granularity, first.auto, first.in_use) == ("b0", 65536, True, False)
    assert (second.name, second.granularity, second.auto) == ("b1", 512, False)
    assert runs(first.bitmap) == [(1 << 20, 65536)]
    assert runs(second.bitmap) == []


def test_bits_that_we_stored_are_what_qemu_merges(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    first, second = loaded(image)
    ours = Bitmap(8 << 20, 4096)
    ours.set(3 << 20, 1 << 20)
    ours.set(8188 << 10, 4096)
    stored(image, first, second, StoredBitmap("ours", 4096, auto=True, bitmap=ours))
    assert clean(image)
    assert our_check(image).clean
    assert [each["name"] for each in info(image)] == ["b0", "b1", "ours"]
    assert [each["flags"] for each in info(image)] == [["auto"], [], ["auto"]]
    run("qemu-img", "bitmap", "--merge", "ours", str(image), "b0")
    write(image, "write 0 512")
    first, _, third = loaded(image)
    assert runs(third.bitmap) == [(0, 4096), (3 << 20, 1 << 20), (8188 << 10, 4096)]
    assert runs(first.bitmap) == [(0, 65536), (1 << 20, 65536), (3 << 20, 1 << 20), ((8 << 20) - 65536, 65536)]
    assert clean(image)


def test_removing_the_last_gives_everything_back(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    stored(image)
    assert loaded(image) == []
    assert info(image) == []
    assert clean(image)
    stored(image, StoredBitmap("again", 65536, auto=False, bitmap=Bitmap(8 << 20, 65536)))
    assert [each["name"] for each in info(image)] == ["again"]
    assert clean(image)


def test_a_bitmap_in_use_is_told_of_and_kept_without_its_bits(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    with opened(image) as (read, length, put, sync):
        mark_in_use(read, length, put, sync)
    assert [each["flags"] for each in info(image)] == [["in-use", "auto"], ["in-use"]]
    first, second = loaded(image)
    assert (first.in_use, first.usable, second.in_use) == (True, False, True)
    stored(image, first)
    assert [(each["name"], each["flags"]) for each in info(image)] == [("b0", ["in-use", "auto"])]
    assert clean(image)


def test_all_sizes_of_bitmaps_and_clusters(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", str(image), str((40 << 20) + 512))
    bitmap = Bitmap((40 << 20) + 512, 512)
    bitmap.set(0, 16 << 20)
    bitmap.set(40 << 20, 512)
    stored(image, StoredBitmap("fine", 512, auto=True, bitmap=bitmap))
    assert clean(image)
    (found,) = loaded(image)
    assert runs(found.bitmap) == [(0, 16 << 20), (40 << 20, 512)]
    run("qemu-img", "bitmap", "--add", "-g", "1024", str(image), "coarse")
    run("qemu-img", "bitmap", "--merge", "fine", str(image), "coarse")
    assert runs(loaded(image)[1].bitmap) == [(0, 16 << 20), (40 << 20, 512)]


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    good = StoredBitmap("x", 65536, auto=False, bitmap=Bitmap(8 << 20, 65536))
    before = image.read_bytes()
    for bad in ([good, good], [replace(good, name="")], [replace(good, name="x" * 1024)], [replace(good, bitmap=None)],
                [replace(good, bitmap=Bitmap(9 << 20, 65536))]):
        with pytest.raises(OptionError):
            stored(image, *bad)
    old = make(tmp_path / "old", "v2")
    with pytest.raises(ImageError):
        stored(old, good)
    assert image.read_bytes() == before


def test_a_bitmap_whose_name_is_no_utf8_keeps_it_and_the_image_can_be_used(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default")
    data = image.read_bytes()
    place = data.index(b"b0", directory_of(data))
    image.write_bytes(data[:place] + b"\xe20" + data[place + 2:])
    assert [one.name for one in loaded(image)] == ["\udce20", "b1"]

    async def go() -> None:
        graph = Graph()
        node = await graph.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}})
        assert set(node.bitmaps) == {"\udce20", "b1"}
        user = graph.attach_backend(node, "guest", READ | WRITE)
        await user.pwrite(0, b"x" * 4096)
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    assert [one.name for one in loaded(image)] == ["\udce20", "b1"]
    assert clean(image)


def directory_of(data: bytes) -> int:
    """Where the directory of bitmaps is."""
    extension = parse_header(data[:65536]).extension(EXT_BITMAPS)
    assert extension is not None
    return int.from_bytes(extension[16:24], "big")


def test_bits_beyond_the_limit_of_memory_are_refused_unless_they_are_left_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "image", "default")  # 8 MiB: 16 bytes of b0, 2 KiB of b1
    monkeypatch.setattr(bitmaps, "MOST_BITS", 2 << 10)
    with opened(path) as image:
        assert [each.usable for each in load(*image[:2], ["b1"])] == [False, True]
        with pytest.raises(ImageError, match="at most 2048 bytes together"):
            load(*image[:2])
    change = [BitmapAction("merge", "b0")]
    asyncio.run(change_bitmap(ImageName(str(path), "qcow2"), "b0", change, source_image=ImageName(str(path), "qcow2")))
    assert clean(path)
