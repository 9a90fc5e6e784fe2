"""Files that cannot be made, or cannot have a length: the error names the file, by the name that the user gave it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstep.aio.pool import made_in_thread
from blockstep.aio.posix import OpenFile
from blockstep.block.graph import Graph
from blockstep.daemon.disks import DiskSpec
from blockstep.errors import OptionError

SIZE = 16 << 40


def no_longer_than(most: int) -> Callable[[int, int], None]:
    """ftruncate, of a filesystem that has no longer files."""
    ftruncate = os.ftruncate

    def limited(fd: int, length: int) -> None:
        if length > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        ftruncate(fd, length)

    return limited


@pytest.mark.parametrize("format", ["raw", "overlay"])
def test_a_disk_that_the_filesystem_has_no_room_for_is_named_with_its_length(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.ftruncate", no_longer_than(SIZE - 1))
    path = tmp_path / "disk.img"
    with pytest.raises(OSError, match=r"File too large: it cannot have 1[0-9]{13} bytes: ") as caught:
        asyncio.run(DiskSpec("d", path, SIZE, format).make())
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["raw", "overlay", "qcow2"])
def test_a_disk_that_cannot_be_made_is_named(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fail)
    path = tmp_path / "disk.img"
    with pytest.raises(OSError, match="Input/output error: ") as caught:
        asyncio.run(DiskSpec("d", path, 1 << 20, format).make())
    assert caught.value.filename == str(path)


def test_an_image_that_would_be_longer_than_any_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with pytest.raises(OSError, match=f"it cannot have [0-9]+ bytes: '{path}'"):
        asyncio.run(DiskSpec("d", path, (1 << 63) - 1, "overlay").make())


def test_a_file_that_cannot_grow_is_named_with_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x")

    async def main() -> None:
        graph = Graph()
        node = await graph.open({"driver": "raw", "offset": 1, "file": {"driver": "file", "filename": str(path)}})
        for length in (SIZE, (1 << 63) - 1):  # with the offset, no file can be so long
            with pytest.raises(OSError, match=f"File too large: it cannot have {length + 1} bytes: '{path}'"):
                await node.truncate(length)
        assert node.length == 0

    monkeypatch.setattr("os.ftruncate", no_longer_than(SIZE))
    asyncio.run(main())


def test_a_disk_of_less_than_nothing_is_refused() -> None:
    for driver in ("null", "memory"):
        with pytest.raises(OptionError, match="0 or more bytes"):
            asyncio.run(Graph().open({"driver": driver, "size": -1}))


def test_who_is_cancelled_while_a_file_is_opened_hears_of_that_also_if_it_cannot_be_closed() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun, go = asyncio.Event(), asyncio.Event()

        def make() -> int:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
            return 5

        def undo(made: int) -> None:
            raise OSError(errno.EIO, f"{made} cannot be closed")

        task = asyncio.create_task(made_in_thread(undo, make))
        await begun.wait()
        task.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert caught.value.__notes__ == ["and then: 5 cannot be closed"]

    asyncio.run(main())


@pytest.mark.parametrize("name", ["one\0two", "\ud800"])
def test_a_name_that_no_file_can_have_is_an_error_as_any_other(name: str) -> None:
    """An image may name such a file; in options a byte of value 0 is refused before that."""
    with pytest.raises(OSError, match="no file can have that name"):
        OpenFile(name, writable=False)
    for options in ({"driver": "file"}, {"driver": "overlay", "backing": {"driver": "null", "size": 512}}):
        with pytest.raises((OSError, OptionError), match=r"no file can have that name|should be without NUL"):
            asyncio.run(Graph().open({**options, "filename": name}))
