"""What a thread copies into an image, past the event loop, beside other requests and beside QEMU's opinion."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstep.block.io import Backend
from blockstep.units import KiB
from tests.interop.test_qcow2_driver import SIZE, check, content, disk, image_options, made, some_requests
from tests.peers import need

pytestmark = pytest.mark.interop
need("qemu-img")

OPTIONS = ("compat=1.1", "compat=0.10", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=4k,refcount_bits=1",
           "compat=1.1,cluster_size=2M")


def source(path: Path, rnd: random.Random, length: int = SIZE) -> bytes:
    """A file with data, zeroes, and a hole at its end."""
    data = b"".join(rnd.choice((rnd.randbytes(size), bytes(size)))
                    for size in (512 * rnd.randrange(1, 200) for _ in range(length // 51200 + 1)))
    data = data[:length - rnd.choice((0, 0, 700))]
    path.write_bytes(data)
    os.truncate(path, length)
    return data.ljust(length, b"\0")


async def copied(user: Backend, fd: int, data: bytes, model: bytearray, offset: int, length: int, piece: int) -> bool:
    """Copy a range as a copy job does, and whether a thread could."""
    runs = await user.node.copy_in((fd, offset), offset, length, piece)
    if runs is None:
        return False
    assert sum(count for count, _ in runs) == length
    for count, zero in runs:
        if zero:
            assert piece
            assert not any(data[offset:offset + count])
            await user.write_zeroes(offset, count)
        offset += count
    model[offset - length:offset] = data[offset - length:offset]
    return True


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_copies_beside_other_requests(
    options: str, backed: bool, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    path, rnd = tmp_path_factory.mktemp("image") / "disk.qcow2", random.Random(seed)
    model = made(path, options, base=rnd.randbytes(SIZE // 2 + 77) if backed else None)
    data = source(path.with_name("source"), rnd)

    async def go() -> None:
        async with disk(image_options(path, **{"l2-cache-size": 4096, "refcount-cache-size": 4096})) as user:
            with open(path.with_name("source"), "rb") as file:
                unit = max(user.node.cluster_size, 4 * KiB)
                await some_requests(user, model, rnd, 3)
                starts = list(range(0, SIZE, 4 * unit))
                rnd.shuffle(starts)
                for start in starts:
                    length = min(SIZE - start, unit * rnd.randrange(1, 5))
                    piece = rnd.choice((0, unit, 2 * unit))
                    other = user.pwrite(5, b"beside")
                    model[5:11] = b"beside"
                    if start:  # else both to one place
                        await asyncio.gather(other, copied(user, file.fileno(), data, model, start, length, piece))
                    else:
                        await other
                await some_requests(user, model, rnd, 5)
                assert bytes(await user.pread(0, SIZE)) == model

    asyncio.run(go())
    check(path)
    assert content(path) == model


def test_only_whole_clusters_without_a_place_are_copied_so(tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(0)
    model = made(path, "compat=1.1")
    data = source(tmp_path / "source", rnd)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            with open(tmp_path / "source", "rb") as file:
                unit = user.node.cluster_size
                await user.pwrite(5 * unit, b"x")
                model[5 * unit] = ord("x")
                assert not await copied(user, file.fileno(), data, model, 4 * unit, 2 * unit, 0)
                assert not await copied(user, file.fileno(), data, model, 512, unit, 0)
                assert not await copied(user, file.fileno(), data, model, 0, unit + 512, 0)
                assert not await copied(user, file.fileno(), data, model, 0, unit, 4 * KiB)
                assert await copied(user, file.fileno(), data, model, SIZE - unit, unit, 0)

    asyncio.run(go())
    check(path)
    assert content(path) == model


def test_a_copy_that_fails_leaves_the_range_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = made(path, "compat=1.1", base=b"below" * 1000)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            fd = os.open(tmp_path, os.O_RDONLY)
            with pytest.raises(OSError, match="directory"):
                await user.node.copy_in((fd, 0), 0, SIZE, 0)
            os.close(fd)

    asyncio.run(go())
    check(path)
    assert content(path) == model


@pytest.mark.parametrize("options", [*OPTIONS, "compat=1.1,extended_l2=on", "compat=1.1,data_file=data"])
def test_what_is_said_to_lie_in_a_file_does(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(options)
    model = made(path, options.replace("=data", f"={path}.data"))
    found = 0

    async def write() -> None:
        async with disk(image_options(path)) as user:
            assert user.node.raw_range(0, 512) is None  # while it is written nothing is promised
            model[:SIZE // 2] = data = rnd.randbytes(SIZE // 2)
            await user.pwrite(0, data)
            await some_requests(user, model, rnd, 6)

    async def look() -> None:
        nonlocal found
        async with disk(image_options(path, **{"read-only": True})) as user:
            for _ in range(300):
                offset = rnd.randrange(SIZE)
                length = min(SIZE - offset, rnd.choice((1, 512, 5000, 70_000, 300_000)))
                assert bytes(await user.pread(offset, length)) == model[offset:offset + length]
                place = user.node.raw_range(offset, length)
                if place is not None:
                    found += 1
                    assert os.pread(place[0], length, place[1]) == model[offset:offset + length]

    asyncio.run(write())
    asyncio.run(look())
    assert found > 30
