"""Reads that miss the page cache."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from itertools import count
from pathlib import Path

import pytest

from blockstep.aio.cold import BATCH, LOOK, SMALL, THREADS, ColdReads
from blockstep.aio.posix import EndOfFile


def nothing(fd: int, length: int, offset: int) -> bytes:
    """A device that has nothing for whoever does not wait."""
    return b""


def in_threads() -> ColdReads:
    """For each look at the clock a second has passed: nothing comes in time."""
    return ColdReads(nothing, clock=count().__next__)


def test_each_read_gets_its_own_bytes_however_many_there_are(tmp_path: Path) -> None:
    content = os.urandom(256 * 4096)
    (tmp_path / "disk").write_bytes(content)
    fd = os.open(tmp_path / "disk", os.O_RDONLY)

    async def main() -> None:
        cold = in_threads()
        count = 2 * BATCH * THREADS + 3
        read = await asyncio.gather(*(cold.read(fd, 100 + n, n * 1000) for n in range(count)))
        assert [bytes(data) for data in read] == [content[n * 1000:n * 1000 + 100 + n] for n in range(count)]

    try:
        asyncio.run(main())
    finally:
        os.close(fd)


def test_a_read_beyond_the_end_of_the_file_fails(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"abc")
    fd = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        with pytest.raises(EndOfFile, match="ends at 3 bytes"):
            asyncio.run(in_threads().read(fd, 5, 1))
    finally:
        os.close(fd)


def test_an_error_is_that_of_its_read_and_not_of_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"abc")
    good, bad = os.open(tmp_path / "disk", os.O_RDONLY), os.open(tmp_path / "disk", os.O_WRONLY)

    async def main() -> None:
        cold = in_threads()
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
        cold = in_threads()
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
        cold = in_threads()
        for _ in range(rounds):
            assert await asyncio.gather(*(cold.read(fd, 1, n) for n in range(20))) == [bytes([n]) for n in range(20)]

    try:
        asyncio.run(main())
    finally:
        os.close(fd)


class Device:
    """Has the first of its reads after so many attempts, and then all of them, one at each attempt."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.tried: list[int] = []

    def quick(self, fd: int, length: int, offset: int) -> bytes:
        self.tried.append(offset)
        self.left -= 1
        return b"" if self.left >= 0 else bytes([offset]) * length


def no_threads(fd: int, length: int, offset: int) -> bytes:
    raise AssertionError("a thread was asked")


def test_what_comes_in_time_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockstep.aio.cold.read_whole", no_threads)
    device = Device(after=5)

    async def main() -> None:
        cold = ColdReads(device.quick, clock=lambda: 0.0)
        assert await asyncio.gather(*(cold.read(-1, 2, offset) for offset in (1, 2, 3))) == [
            b"\1\1", b"\2\2", b"\3\3"]
        assert device.tried == [1] * 6 + [2, 3]  # the oldest, until it is there

    asyncio.run(main())


def test_what_does_not_come_in_time_goes_to_a_thread_and_is_not_waited_for_again(
        monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1000))
    monkeypatch.setattr("blockstep.aio.cold.read_whole", lambda fd, length, offset: b"read")
    tried: list[int] = []

    def quick(fd: int, length: int, offset: int) -> bytes:
        tried.append(offset)
        return b""

    async def main() -> None:
        cold = ColdReads(quick, clock=lambda: next(times) * LOOK * 0.6)
        assert await asyncio.gather(cold.read(-1, 4, 1), cold.read(-1, 4, 2)) == [b"read", b"read"]
        assert tried == [1, 1]
        assert await cold.read(-1, 4, 3) == b"read"
        assert tried == [1, 1]  # the next one is not looked out for

    asyncio.run(main())


def test_long_reads_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockstep.aio.cold.read_whole", lambda fd, length, offset: bytes(length))
    device = Device(after=0)
    assert len(asyncio.run(ColdReads(device.quick).read(-1, SMALL + 1, 0))) == SMALL + 1
    assert device.tried == []


def test_an_error_while_looking_is_that_of_its_read() -> None:
    def quick(fd: int, length: int, offset: int) -> bytes:
        if offset == 2:
            raise OSError(errno.EIO, "a bad block")
        return b"data"

    async def main() -> None:
        cold = ColdReads(quick)
        results = await asyncio.gather(*(cold.read(-1, 4, offset) for offset in (1, 2)), return_exceptions=True)
        assert results[0] == b"data"
        assert isinstance(results[1], OSError)

    asyncio.run(main())
