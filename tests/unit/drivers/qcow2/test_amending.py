"""Refcounts of another width, and images of version 3 that become ones of version 2: killed anywhere, and checked."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.drivers.qcow2.counts import Counts
from blockstep.drivers.qcow2.downgrade import as_version_2, expand_zeroes
from blockstep.drivers.qcow2.edit import Editor
from blockstep.drivers.qcow2.format import build_header, parse_header
from blockstep.errors import ImageError
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import KINDS, Damage, make, our_check, our_repair, qemu_check, write

pytestmark = pytest.mark.interop

Access = tuple[Any, ...]


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need("qemu-img", "qemu-io")


class Killed(Exception):
    """No further write is made."""


@contextmanager
def opened(path: Path, most: int = 1 << 30) -> Iterator[Access]:
    """What the functions want, for at most so many writes."""
    with open(path, "r+b", buffering=0) as file:
        fd, left = file.fileno(), most

        def put(offset: int, data: bytes) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            assert os.pwrite(fd, data, offset) == len(data)

        yield lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size, put, lambda: None


def widen(access: Access, bits: int = 64) -> None:
    Editor(*access).set_refcount_order(bits.bit_length() - 1)


def to_version_2(access: Access) -> None:
    expand_zeroes(*access)
    read, _, put, _ = access
    header = parse_header(read(0, 1 << 21))
    put(0, build_header(as_version_2(header)).ljust(len(build_header(header)), b"\0"))


def contents(path: Path) -> list[bytes]:
    """Of the disk, and of its snapshots."""
    raw, found = path.with_suffix(".raw"), []
    for options in ((), ("-l", "first"), ("-l", "second")):
        run("qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw", str(path), str(raw))
        found.append(raw.read_bytes())
    return found


def clean(path: Path) -> bool:
    found = qemu_check(path)
    return found is not None and not (found.get("corruptions") or found.get("leaks") or found["check-errors"])


def over_a_base(path: Path, options: str = "compat=1.1") -> Path:
    """An image over another one, where the disk and its snapshots share clusters of zeroes, with a place or not."""
    base = path.with_name("base")
    base.write_bytes(random.Random(7).randbytes(8 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", str(base), "-F", "raw", str(path), "9M")
    write(path, "write -P 3 1M 512k", "write -z 1M 256k", "write -z 4M 1M", "write -P 4 8M 64k")
    run("qemu-img", "snapshot", "-c", "first", str(path))
    write(path, "write -z 1280k 128k", "write -P 5 4M 64k", "write -z 6M 512k")
    run("qemu-img", "snapshot", "-c", "second", str(path))
    write(path, "write -P 6 6M 64k")
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("items", [1, 3, 255])
def test_counts_of_another_width_are_the_same(bits: int, items: int) -> None:
    header = parse_header(build_header(_header().replaced(refcount_order=3)))
    counts = Counts(header)
    rnd = random.Random(bits * items)
    clusters = {rnd.randrange(3 << counts.bits): rnd.randrange(1, 2) for _ in range(items)}
    for cluster, value in clusters.items():
        counts.add(cluster, value)
    new = counts.recast(header.replaced(refcount_order=bits.bit_length() - 1))
    assert {cluster: new.of(cluster) for cluster in clusters} == clusters
    assert sum(sum(block) for block in new.values()) == sum(clusters.values())
    assert new.end() == counts.end()


def _header() -> Any:
    from blockstep.drivers.qcow2.create import new_header

    return new_header(1 << 20, cluster_size=512).replaced(l1_table_offset=1024)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("v2", "external", "refcount-1"))])
def test_refcounts_of_another_width(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path / "image", kind)
    before, most = contents(image), most_refcount(image)
    for bits in (64, 32, 8, 4, 2, 16) if kind != "2M" else (64, 8, 16):
        if most >= 1 << bits:
            there = image.read_bytes()
            with opened(image) as access, pytest.raises(ImageError, match="refcount of the cluster"):
                widen(access, bits)
            assert image.read_bytes() == there
            continue
        with opened(image) as access:
            widen(access, bits)
        assert clean(image)
        assert our_check(image).clean
        assert contents(image) == before
        assert Damage(image).header.refcount_bits == bits
    write(image, "write -P 70 0 2M", "write -P 71 6M 1M")
    assert clean(image)
    assert contents(image)[1:] == before[1:]


def most_refcount(path: Path) -> int:
    with opened(path) as access:
        return max(max(block) for block in Editor(*access).refcounts.values())


def test_what_is_one_bit_and_back_leaves_the_file_as_long(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "refcount-1")
    size = image.stat().st_size
    for bits in (64, 1, 64, 1):
        with opened(image) as access:
            widen(access, bits)
        assert clean(image)
    assert image.stat().st_size <= size + (16 << 12)


@pytest.mark.parametrize("kind", ["default", "512", "2M", "lazy", "metadata"])
def test_an_image_of_version_2_reads_as_before(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path / "image", kind)
    for name in ("b0", "b1"):
        run("qemu-img", "bitmap", "--remove", str(image), name)
    _is_downgraded(image)


@pytest.mark.parametrize("options", ["compat=1.1", "cluster_size=512", "cluster_size=4k", "cluster_size=2M"])
def test_zeroes_hide_the_backing_image_in_version_2_too(tmp_path: Path, options: str) -> None:
    image = over_a_base(tmp_path / "image", options)
    with image.open("ab") as file:  # behind what is in use there may be anything
        file.write(random.Random(8).randbytes(3 << 20))
    _is_downgraded(image)


def _is_downgraded(image: Path) -> None:
    before = contents(image)
    with opened(image) as access:
        to_version_2(access)
    assert Damage(image).header.version == 2
    assert clean(image)
    assert our_check(image).clean
    assert contents(image) == before
    write(image, "write -P 70 64k 2M", "write -P 71 4M 1M")
    assert clean(image)
    assert contents(image)[1:] == before[1:]


def test_zeroes_without_a_backing_image_are_given_back(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "64M")
    write(image, "write -P 1 0 1M", "write -z 0 512k", "write -z 2M 60M")
    with opened(image) as access:
        to_version_2(access)
    assert clean(image)
    assert our_check(image).allocated_clusters == 8


@pytest.mark.parametrize(("kind", "field"), [
    ("subclusters", "extended L2"), ("external", "external data"), ("zstd", "compression_type"), ("default", "bitmap"),
])
def test_what_version_2_does_not_know_is_refused(tmp_path: Path, kind: str, field: str) -> None:
    image = make(tmp_path / "image", kind)
    if kind == "zstd":
        for name in ("b0", "b1"):
            run("qemu-img", "bitmap", "--remove", str(image), name)
    _is_refused(image, field)


def test_snapshots_of_other_sizes_are_refused_in_version_2(tmp_path: Path) -> None:
    image = over_a_base(tmp_path / "image")
    run("qemu-img", "resize", "-q", "-f", "qcow2", str(image), "10M")
    _is_refused(image, "size in snapshot '1'")


def _is_refused(image: Path, said: str) -> None:
    before = image.read_bytes()
    with opened(image) as access, pytest.raises(ImageError, match=said):
        expand_zeroes(*access)
    assert image.read_bytes() == before


@pytest.mark.parametrize("change", [widen, to_version_2])
def test_killed_anywhere_nothing_is_lost(tmp_path: Path, change: Callable[[Access], None]) -> None:
    good = over_a_base(tmp_path / "image", "cluster_size=16k")
    before = contents(good)
    steps, done = 0, False
    while not done:
        image = tmp_path / "killed"
        shutil.copy(good, image)
        with opened(image, steps) as access:
            try:
                change(access)
                done = True
            except Killed:
                pass
        steps += 1
        found = our_check(image)
        assert not found.corruptions or Damage(image).header.incompatible
        assert not found.leaks or change is to_version_2
        assert contents(image) == before
        assert our_repair(image, "all").clean
        assert clean(image)
        assert contents(image) == before
    assert steps > (3 if change is widen else 12)
