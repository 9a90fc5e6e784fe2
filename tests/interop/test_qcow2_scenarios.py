"""Scenarios for an image format that QEMU's public tests have, where no other test here has the same.

docs/drivers/qcow2-scenarios.md has the whole list, with the place of each.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, RESIZE, WRITE
from blockstep.drivers.qcow2.format import Extension, build_header, parse_header
from blockstep.errors import OptionError
from blockstep.units import GiB, KiB, MiB
from tests.peers import blockstep, need, run
from tests.scenarios import scenario

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io")


def img(*arguments: str | Path, check: bool = True) -> str:
    """``blockstep img ...``: what it prints."""
    done = run(*blockstep("img", *arguments), check=check)
    return done.stdout + done.stderr


def make(path: Path, size: int | str, options: str = "", *more: str | Path) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *more, path, str(size))
    return path


def io(path: Path, *commands: str) -> None:
    run("qemu-io", "-f", "qcow2", *[word for command in commands for word in ("-c", command)], path)


def clean(path: Path) -> None:
    """Both checks find nothing."""
    run("qemu-img", "check", "-f", "qcow2", path)
    img("check", path)


@asynccontextmanager
async def disk(path: Path, **options: Any) -> AsyncIterator[Backend]:
    graph = Graph()
    node = await graph.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **options})
    user = graph.attach_backend(node, "test", READ if node.read_only else READ | WRITE | RESIZE)
    try:
        yield user
    finally:
        await graph.detach_backend(user)
        await graph.close(node)


def test_029_a_snapshot_whose_l1_table_is_shorter_than_the_disks_is_applied(tmp_path: Path) -> None:
    """State of a machine lies behind the disk's end, where QEMU lets the L1 table grow for it."""
    path = make(tmp_path / "a", "16M", "cluster_size=1k")
    io(path, "write -P 1 0 64k")
    img("snapshot", "-c", "foo", path)
    io(path, "write -b 0 4M", "write -P 2 0 64k")
    img("snapshot", "-a", "foo", path)
    io(path, "read -P 1 0 64k")
    clean(path)


def unknown_extension(path: Path) -> Extension:
    """Give the image a header extension that nobody knows."""
    extension = Extension(0x12345678, b"something of another program's")
    data = path.read_bytes()
    header = parse_header(data[:65536])
    begin = build_header(header.replaced(extensions=(*header.extensions, extension)))
    path.write_bytes(begin.ljust(header.cluster_size, b"\0") + data[header.cluster_size:])
    return extension


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_031_an_extension_that_is_not_known_survives_all_that_rewrites_the_header(
        version: str, tmp_path: Path) -> None:
    make(tmp_path / "base", "4M")
    path = make(tmp_path / "a", "4M", f"compat={version}", "-b", tmp_path / "base", "-F", "qcow2")
    extension = unknown_extension(path)

    def kept() -> bool:
        return extension in parse_header(path.read_bytes()[:65536]).extensions

    img("rebase", "-u", "-b", tmp_path / "base", "-F", "qcow2", path)
    assert kept()
    img("resize", "-f", "qcow2", path, "5M")
    assert kept()
    if version == "1.1":
        img("bitmap", "--add", path, "b")
        img("bitmap", "--remove", path, "b")
        assert kept()
    img("snapshot", "-c", "s", path)
    img("snapshot", "-d", "s", path)
    assert kept()
    img("rebase", "-b", "", path)
    assert kept()
    clean(path)


def test_036_features_that_are_not_known(tmp_path: Path) -> None:
    path = make(tmp_path / "a", "1M")

    def set_bit(at: int, bit: int) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            value = int.from_bytes(file.read(8), "big") ^ 1 << bit
            file.seek(at)
            file.write(value.to_bytes(8, "big"))

    async def go() -> None:
        async with disk(path, **{"read-only": True}):
            pass
        assert parse_header(path.read_bytes()[:512]).autoclear == 1 << 63
        async with disk(path) as user:
            await user.pwrite(0, b"x")
        assert parse_header(path.read_bytes()[:512]).autoclear == 0
        assert parse_header(path.read_bytes()[:512]).compatible == 1 << 62

    set_bit(88, 63)
    set_bit(80, 62)
    asyncio.run(go())
    set_bit(72, 61)
    with pytest.raises(OptionError, match=r"incompatible.*61|61.*incompatible"):
        asyncio.run(go())


def test_042_an_image_of_length_zero(tmp_path: Path) -> None:
    path = tmp_path / "a"
    img("create", "-f", "qcow2", path, "0")
    assert '"virtual-size": 0' in img("info", "--output=json", path)
    img("convert", "-f", "qcow2", "-O", "qcow2", path, tmp_path / "b")
    img("compare", "-f", "qcow2", "-F", "qcow2", path, tmp_path / "b")
    img("resize", "-f", "qcow2", path, "1M")
    clean(path)
    clean(tmp_path / "b")


def test_102_a_map_of_an_image_that_was_cut(tmp_path: Path) -> None:
    path = make(tmp_path / "a", "64k")
    io(path, "write 0 64k")
    os.truncate(path, 5 * 65536)
    said = json.loads(img("map", "-f", "qcow2", "--output=json", path))
    assert sum(entry["length"] for entry in said) == 65536
    assert said[0]["present"]


@scenario
async def test_105_the_largest_disks(tmp_path: Path) -> None:
    path = tmp_path / "a"
    img("create", "-f", "qcow2", "-o", "cluster_size=2M", path, "1024P")
    async with disk(path) as user:
        for offset in (0, user.length // 2 - 1, user.length - 5):
            await user.pwrite(offset, b"there")
        await user.flush()
        assert bytes(await user.pread(user.length - 10, 10)) == bytes(5) + b"there"
    assert json.loads(run("qemu-img", "info", "--output=json", path).stdout)["virtual-size"] == 1 << 60


@scenario
async def test_107_the_rest_of_a_new_l1_table_is_zeroes(tmp_path: Path) -> None:
    path = make(tmp_path / "a", "64k")
    async with disk(path) as user:
        await user.pwrite(0, b"x" * 65536)
    data = path.read_bytes()
    place = parse_header(data[:65536]).l1_table_offset
    assert any(data[place:place + 8])
    assert not any(data[place + 8:place + 65536])


@pytest.mark.parametrize(("size", "writes"), [("64512k", ((62 * MiB, 1025 * KiB), (64 * MiB, MiB))),
                                              ("64513k", ((63 * MiB, 130 * KiB),))])
def test_121_a_refcount_table_that_grows_in_a_full_image(
        size: str, writes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    path = make(tmp_path / "a", size, "preallocation=metadata,cluster_size=1k")
    img("resize", "-f", "qcow2", path, "65M")

    async def go() -> None:
        async with disk(path) as user:
            for offset, length in writes:
                await user.pwrite(offset, b"x" * length)

    asyncio.run(go())
    clean(path)


def test_250_shrinking_gives_back_more_than_2_gib_at_once(tmp_path: Path) -> None:
    path = make(tmp_path / "a", "2100M", "cluster_size=1M,preallocation=metadata")
    io(path, "discard 0 10M", "discard 2090M 10M", "write 2090M 10M", "write 0 10M")
    before = path.stat().st_blocks * 512
    img("resize", "-f", "qcow2", "--shrink", path, "5M")
    assert before - path.stat().st_blocks * 512 >= 14 * MiB
    clean(path)


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("version", ["0.10", "1.1"])
@scenario
async def test_290_a_discard_reads_as_zeroes_or_where_that_cannot_be_said_does_nothing(
        version: str, backed: bool, tmp_path: Path) -> None:
    make(tmp_path / "base", "128k")
    io(tmp_path / "base", "write -P 255 0 128k")
    below = ["-b", tmp_path / "base", "-F", "qcow2"] if backed else []
    path = make(tmp_path / "a", "128k", f"compat={version}", *below)
    async with disk(path, discard="unmap") as user:
        await user.pwrite(0, b"\x01" * 128 * KiB)
        await user.discard(0, 128 * KiB)
        expected = b"\x01" if backed and version == "0.10" else b"\0"
        assert bytes(await user.pread(0, 128 * KiB)) == expected * 128 * KiB
    clean(path)


@scenario
async def test_305_of_a_write_whose_second_allocation_fails_nothing_is_left(tmp_path: Path) -> None:
    """The refcount block of the second cluster cannot be where the table says."""
    path = make(tmp_path / "a", "1M", "refcount_bits=64,cluster_size=1k")
    io(path, "write -P 1 0 124k", "discard 121k 1k", "discard 123k 1k")
    data = bytearray(path.read_bytes())
    place = parse_header(bytes(data[:1024])).refcount_table_offset
    data[place + 14] = 6
    path.write_bytes(data)
    async with disk(path) as user:
        before = bytes(await user.pread(0, 124 * KiB))
        with pytest.raises(OSError) as error:
            await user.pwrite(121 * KiB, b"x" * 3 * KiB)
        assert error.value.errno == errno.EIO
        after = bytes(await user.pread(0, 124 * KiB))
        assert after[:121 * KiB] == before[:121 * KiB]
        assert after[122 * KiB:123 * KiB] in (before[122 * KiB:123 * KiB], b"x" * KiB)


def test_313_zeroes_are_merged_into_more_refcount_blocks_than_the_cache_holds(tmp_path: Path) -> None:
    """Of 512 clusters each, one less for an L2 table and the block itself; four of them, and one cluster."""
    size = (510 * 4 + 1 - 3) * 4096
    base = make(tmp_path / "base", size, "cluster_size=4096,refcount_bits=64")
    io(base, f"write -P 1 0 {size}")
    top = make(tmp_path / "top", size, "cluster_size=4096,refcount_bits=64", "-b", base, "-F", "qcow2")
    io(top, f"write -z 0 {size}")
    img("commit", top)
    clean(base)
    clean(top)
    io(base, f"read -P 0 0 {size}")


def test_a_commit_at_the_border_of_2_gib_goes_where_it_should(tmp_path: Path) -> None:
    """097 and 176: a chain of three, with a snapshot in the one that is merged."""
    size = 2100 * MiB
    base = make(tmp_path / "base", size)
    middle = make(tmp_path / "middle", size, "", "-b", base, "-F", "qcow2")
    top = make(tmp_path / "top", size, "", "-b", middle, "-F", "qcow2")
    border = 2 * GiB
    io(base, f"write -P 1 {border - 192 * KiB} 192k")
    io(middle, f"write -P 2 {border - 128 * KiB} 128k")
    io(top, f"write -P 3 {border - 64 * KiB} 64k")
    img("commit", "-b", base, top)
    io(base, f"read -P 1 {border - 192 * KiB} 64k", f"read -P 2 {border - 128 * KiB} 64k",
       f"read -P 3 {border - 64 * KiB} 64k")
    for image in (base, middle, top):
        clean(image)
