"""Compressed writes beside other requests, with QEMU's opinion of the image and of what it reads as."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstep.block.io import Backend
from blockstep.units import KiB
from tests.interop.test_qcow2_driver import (
    SIZE,
    check,
    content,
    cuts,
    disk,
    image_options,
    log_of,
    made,
    some_requests,
)
from tests.peers import need

pytestmark = pytest.mark.interop
need("qemu-img")

OPTIONS = ("compat=1.1", "compat=0.10", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=4k,refcount_bits=1",
           "compat=1.1,cluster_size=4k,refcount_bits=2", "compat=1.1,cluster_size=2M",
           "compat=1.1,cluster_size=16k,compression_type=zstd", "compat=1.1,compression_type=zstd",
           "compat=1.1,extended_l2=on", "compat=1.1,extended_l2=on,cluster_size=16k,compression_type=zstd")


def compressible(rnd: random.Random, length: int) -> bytes:
    """Some of it is not."""
    return b"".join(rnd.choice((rnd.randbytes(512), bytes([rnd.randrange(256)]) * 512, b"word" * 128))
                    if rnd.random() < 0.3 else b"\x07" * 512 for _ in range(length // 512 + 1))[:length]


async def packed(user: Backend, model: bytearray, rnd: random.Random, most: int = 6) -> None:
    """A compressed write of some clusters."""
    unit = user.node.cluster_size
    start = rnd.randrange(-(-len(model) // unit)) * unit
    data = compressible(rnd, min(unit * rnd.randrange(1, most + 1), len(model) - start))
    await user.node.write_compressed(start, data)
    model[start:start + len(data)] = data


def figures(path: Path) -> dict[str, int]:
    """Of qemu-img check."""
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)], capture_output=True,
                          text=True, check=False)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_compressed_writes_among_others(
    options: str, backed: bool, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    path, rnd = tmp_path_factory.mktemp("image") / "disk.qcow2", random.Random(seed)
    model = made(path, options, base=rnd.randbytes(SIZE // 2 + 77) if backed else None)

    async def go() -> None:
        for _ in range(2):  # the second time in an image that has some
            async with disk(image_options(path, **{"l2-cache-size": 4096, "refcount-cache-size": 4096})) as user:
                for _ in range(10):
                    await packed(user, model, rnd)
                    await some_requests(user, model, rnd, 2)
                assert bytes(await user.pread(0, SIZE)) == model

    asyncio.run(go())
    check(path)
    assert content(path) == model


def test_clusters_are_packed_without_gaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = made(path, "compat=1.1")
    model[:] = (b"all of it the same, a bit longer than nothing " * SIZE)[:SIZE]

    async def go() -> None:
        async with disk(image_options(path)) as user:
            await user.node.write_compressed(0, model)

    asyncio.run(go())
    check(path)
    assert content(path) == model
    assert path.stat().st_size <= 6 * 64 * KiB  # header, tables, and one cluster for all seventeen
    assert figures(path)["compressed-clusters"] == SIZE // (64 * KiB)


def test_what_is_freed_is_not_filled_up_further(tmp_path: Path) -> None:
    """The cluster that compressed data went to last is given to somebody else when its data is gone."""
    path, rnd = tmp_path / "disk.qcow2", random.Random(1)
    model = made(path, "compat=1.1")
    unit = 64 * KiB

    async def go() -> None:
        async with disk(image_options(path)) as user:
            for turn in range(6):
                await user.node.write_compressed(0, data := bytes([turn]) * unit)
                model[:unit] = data
                await user.flush()
                await user.discard(0, unit)
                model[:unit] = bytes(unit)
                for _ in range(3):
                    await user.flush()
                at = unit * (1 + 2 * turn)
                model[at:at + unit] = data = rnd.randbytes(unit)
                await user.pwrite(at, data)
            await user.node.write_compressed(0, data := b"\x09" * unit)
            model[:unit] = data

    asyncio.run(go())
    check(path)
    assert content(path) == model


def test_two_pieces_in_one_sector_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = made(path, "compat=1.1")
    unit = 64 * KiB

    async def go() -> None:
        async with disk(image_options(path)) as user:
            for turn in range(1, 9):  # each a few bytes long
                await user.node.write_compressed(0, bytes([turn]) * unit)
                assert bytes(await user.pread(0, unit)) == bytes([turn]) * unit
        model[:unit] = b"\x08" * unit

    asyncio.run(go())
    check(path)
    assert content(path) == model


def test_only_whole_clusters_are_compressed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = made(path, "compat=1.1", size=SIZE + 512)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            for offset, length in ((512, 64 * KiB), (0, 512), (SIZE, 256)):
                with pytest.raises(OSError) as caught:
                    await user.node.write_compressed(offset, bytes(length))
                assert caught.value.errno == errno.EINVAL
            await user.node.write_compressed(SIZE, b"e" * 512)
        model[SIZE:] = b"e" * 512

    asyncio.run(go())
    check(path)
    assert content(path) == model


@pytest.mark.parametrize("options", ["compat=1.1,cluster_size=4k", "compat=0.10,cluster_size=4k",
                                     "compat=1.1,cluster_size=4k,refcount_bits=2,compression_type=zstd"])
def test_a_power_cut_at_any_write_leaves_leaks_at_worst(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(options)
    model = made(path, options)
    before = path.read_bytes()
    flushed: list[tuple[int, bytes]] = [(0, bytes(model))]

    async def requests(user: Backend, log: Any) -> None:
        for _ in range(6):
            for _ in range(3):
                await packed(user, model, rnd)
                await some_requests(user, model, rnd, 1)
            await user.flush()
            flushed.append((log._entries, bytes(model)))

    log_of(path, requests, **{"l2-cache-size": 4096, "refcount-cache-size": 4096})
    cut = tmp_path / "cut.qcow2"
    ends = dict(flushed)
    for count, image in cuts(path, before, rnd, 50, ends):
        cut.write_bytes(image)
        check(cut, 3)
        if count in ends:
            assert content(cut) == ends[count], f"after {count} entries"
