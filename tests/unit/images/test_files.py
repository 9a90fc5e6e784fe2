"""Files come under their names when they are complete."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from blockstep.aio.posix import OpenFile
from blockstep.images.files import made_anew


def make(name: Path, content: bytes, error: BaseException | None = None) -> None:
    async def work() -> None:
        async with made_anew(str(name)) as path:
            Path(path).write_bytes(content)
            if error is not None:
                raise error

    asyncio.run(work())


def test_a_new_file_has_its_name_at_the_end(tmp_path: Path) -> None:
    make(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_what_fails_or_is_interrupted_leaves_nothing_and_the_old_file_as_it_was(
        tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_bytes(b"old")
    for name in ("a", "b"):
        with pytest.raises(type(error)):
            make(tmp_path / name, b"half", error)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_replaced_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("a")
    make(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["n" * 255, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 127])
def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path, name: str) -> None:
    make(tmp_path / name, b"new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_somebody_writes_to_is_left_to_him(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    writer = OpenFile(str(tmp_path / "a"), writable=True)
    try:
        with pytest.raises(OSError) as caught:
            make(tmp_path / "a", b"new")
    finally:
        writer.close()
    assert caught.value.errno == errno.EBUSY
    assert (tmp_path / "a").read_bytes() == b"old"


def test_an_error_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        make(tmp_path / "none" / "a", b"new")
    assert caught.value.filename == str(tmp_path / "none" / "a")


def test_what_is_no_regular_file_is_written_in_its_place(tmp_path: Path) -> None:
    async def work() -> str:
        async with made_anew("/dev/null") as path:
            return path

    assert asyncio.run(work()) == "/dev/null"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        make(tmp_path, b"")
