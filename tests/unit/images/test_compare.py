"""Whether two images read the same, and where they do not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.block.driver import Buffer, Driver, Extent
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.images.compare import Comparison, compare
from blockstep.units import MiB
from tests.unit.images.support import raw, with_images

KiB = 1024


def compared(one: Path, two: Path, strict: bool = False) -> Comparison:
    async def work(first: Backend, second: Backend) -> Comparison:
        return await compare(first, second, strict)

    return with_images(work, one, two)


def test_zeroes_that_are_written_and_holes_are_the_same_unless_strict(tmp_path: Path) -> None:
    one = raw(tmp_path / "one", 3 * MiB, {MiB: bytes(64 * KiB)})
    two = raw(tmp_path / "two", 3 * MiB)
    assert compared(one, two) == Comparison()
    assert compared(one, two, strict=True) == Comparison("status", MiB)
    assert compared(one, one, strict=True).identical


@pytest.mark.parametrize(("one", "two", "expected"), [
    ({MiB + 700: b"x"}, {}, Comparison("content", MiB + 512)),
    ({}, {3 * MiB - 1: b"x"}, Comparison("content", 3 * MiB - 512)),
    ({0: b"a" * MiB}, {0: b"a" * (MiB - 1) + b"b"}, Comparison("content", MiB - 512)),
])
def test_a_difference_is_told_by_its_512_bytes(tmp_path: Path, one: dict[int, bytes], two: dict[int, bytes],
                                               expected: Comparison) -> None:
    assert compared(raw(tmp_path / "one", 3 * MiB, one), raw(tmp_path / "two", 3 * MiB, two)) == expected


def test_what_a_shorter_image_lacks_must_be_zero(tmp_path: Path) -> None:
    short = raw(tmp_path / "short", MiB + 100, {0: b"data"})
    long = raw(tmp_path / "long", 4 * MiB, {0: b"data", 2 * MiB: bytes(KiB)})
    other = raw(tmp_path / "other", 4 * MiB, {0: b"data", 2 * MiB: b"x"})
    assert compared(short, long) == compared(long, short) == Comparison(longer=True)
    assert compared(short, other) == Comparison("content", 2 * MiB, longer=True)
    assert compared(short, long, strict=True) == Comparison("length", longer=True)


def test_an_empty_image_is_like_another(tmp_path: Path) -> None:
    assert compared(raw(tmp_path / "one", 0), raw(tmp_path / "two", 0)).identical


@settings(max_examples=60)
@given(st.lists(st.integers(0, 63), max_size=12), st.lists(st.integers(0, 63), max_size=12),
       st.integers(1, 64), st.integers(1, 64))
def test_it_finds_what_bytes_say(one: list[int], two: list[int], length1: int, length2: int) -> None:
    unit = 128 * KiB

    async def work() -> None:
        graph = Graph()
        contents = []
        backends = []
        for blocks, length in ((one, length1), (two, length2)):
            content = bytearray(length * unit)
            node = await graph.open({"driver": "memory", "size": length * unit})
            backend = graph.attach_backend(node, "test", _everything())
            for block in blocks:
                if block < length:
                    content[block * unit + 5] = 7
                    await backend.pwrite(block * unit + 5, b"\7")
            contents.append(content)
            backends.append(backend)
        told: list[int] = []
        result = await compare(*backends, progress=lambda done, total: told.append(done))
        common = max(map(len, contents))
        first, second = (bytes(content).ljust(common, b"\0") for content in contents)
        different = next((at for at in range(5, common, unit) if first[at] != second[at]), None)
        assert result.identical == (different is None)
        if different is not None:
            assert result.offset == different // 512 * 512
        assert told == sorted(told)

    asyncio.run(work())


def test_a_read_error_is_raised_and_nothing_is_left_in_flight() -> None:
    class Bad(Driver):
        driver = "bad"
        length = 8 * MiB

        async def open(self) -> None: ...

        async def pread(self, offset: int, length: int) -> Buffer:
            await asyncio.sleep(0)
            if offset >= 4 * MiB:
                raise OSError(5, "bad sector")
            return bytes(length)

        async def block_status(self, offset: int, length: int) -> list[Extent]:
            return [Extent(length)]

    async def work() -> None:
        from blockstep.block.node import NodeOptions

        one, two = (Backend(name, Bad(name, NodeOptions()), _everything(), _everything()) for name in ("one", "two"))
        with pytest.raises(OSError, match="bad sector"):
            await compare(one, two)
        assert not one.in_flight
        assert not two.in_flight

    asyncio.run(work())


def _everything():  # type: ignore[no-untyped-def]
    from blockstep.block.permissions import ALL

    return ALL
