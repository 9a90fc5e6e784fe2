"""Reads that miss the page cache."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from blockstep.aio.cold import BATCH, THREADS, ColdReads


def test_each_read_gets_its_own_bytes_however_many_there_are(tmp_path: Path) -> None:
    content = os.urandom(256 * 4096)
    (tmp_path / "disk").write_bytes(content)
    fd = os.open(tmp_path / "disk", os.O_RDONLY)

    async def main() -> None:
        cold = ColdReads()
        count = 2 * BATCH * THREADS + 3
        read = await asyncio.gather(*(cold.read(fd, 100 + n, n * 1000) for n in range(count)))
        assert [bytes(data) for data in read] == [content[n * 1000:n * 1000 + 100 + n] for n in range(count)]

    try:
        asyncio.run(main())
    finally:
        os.close(fd)


def test_what_lies_beyond_the_end_of_the_file_is_zero(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"abc")
    fd = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        assert bytes(asyncio.run(ColdReads().read(fd, 5, 1))) == b"bc\0\0\0"
    finally:
        os.close(fd)


def test_an_error_is_that_of_its_read_and_not_of_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"abc")
    good, bad = os.open(tmp_path / "disk", os.O_RDONLY), os.open(tmp_path / "disk", os.O_WRONLY)

    async def main() -> None:
        cold = ColdReads()
        results = await asyncio.gather(cold.read(good, 3, 0), cold.read(bad, 3, 0), cold.read(good, 1, 2),
                                       return_exceptions=True)
        assert isinstance(results[1], OSError)
        assert results[1].errno == errno.EBADF
        assert (results[0], results[2]) == (b"abc", b"c")

    try:
        asyncio.run(main())
    finally:
        os.close(good)
        os.close(bad)


def test_on_a_slow_device_a_read_does_not_wait_for_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    first_ended = threading.Event()

    def read_slowly(fd: int, length: int, offset: int) -> bytes:
        if offset:
            assert first_ended.wait(30)
        return bytes([offset]) * length

    monkeypatch.setattr("blockstep.aio.cold.read_whole", read_slowly)
    monkeypatch.setattr("blockstep.aio.cold.REPORT", -1.0)

    async def main() -> None:
        cold = ColdReads()
        first, second = (asyncio.ensure_future(cold.read(-1, 2, offset)) for offset in (0, 1))
        assert await first == b"\0\0"
        first_ended.set()
        assert await second == b"\1\1"

    asyncio.run(main())


@pytest.mark.parametrize("rounds", [3])
def test_it_can_be_used_again_and_again(tmp_path: Path, rounds: int) -> None:
    (tmp_path / "disk").write_bytes(bytes(range(100)))
    fd = os.open(tmp_path / "disk", os.O_RDONLY)

    async def main() -> None:
        cold = ColdReads()
        for _ in range(rounds):
            assert await asyncio.gather(*(cold.read(fd, 1, n) for n in range(20))) == [bytes([n]) for n in range(20)]

    try:
        asyncio.run(main())
    finally:
        os.close(fd)
