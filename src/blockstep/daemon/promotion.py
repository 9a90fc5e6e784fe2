"""The memory of a promotion: a file that says that a standby's disks are live.

A promoted standby refuses its old primary for as long as it runs. If it were started again as a standby, after a
reboot, say, that primary would find it, and copy its stale disks over the live ones. So the promotion is written
down, durably, before anything else of it happens, and a standby that finds the note does not start.

The note says which disks are not merged yet, too: their files are torn if the program ends before that. Room for it is
reserved when the standby starts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from blockstep.aio.posix import sync_parent
from blockstep.errors import OptionError

#: Bytes that are reserved for a note.
_ROOM: Final = 4096


class _Note(msgspec.Struct):
    pair: str = ""
    checkpoint: int = 0
    to: str = ""
    when: str = ""
    #: The disks whose files were not the promoted disks yet.
    unmerged: list[str] = []


def check(note: Path, pair: str) -> None:
    """Raises OptionError if the standby was promoted, and says what to do: also for a note that cannot be read."""
    try:
        said = _read(note)
    except FileNotFoundError:
        return
    when = f" on {said.when}" if said.when else ""
    torn = "".join(f" But the file of '{name}' is a part of the merge and not usable alone." for name in said.unmerged)
    raise OptionError("--state", str(note), (
        f"absent: the standby of pair '{pair}' was promoted{when}, and its disks are live.{torn} Serve them "
        "with 'blockstep primary' or 'blockstep export'; to let a primary overwrite them, remove that file first"))


def spare(path: Path) -> None:
    """Raises OptionError if that is the memory of a promotion, for those who would write something else there."""
    with contextlib.suppress(OSError):
        if _read(path).to:
            raise OptionError("--state", str(path), "another file: in this one a standby has its promotion written "
                              "down, which a primary must not forget")


def reserve(note: Path) -> None:
    """Have the room for a note, durably: a promotion must not fail because a file system is full. Raises OSError."""
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(note, b" " * _ROOM)


def write(note: Path, pair: str, epoch: int, to: str, unmerged: Sequence[str]) -> None:
    """Write the note; it is durable when this returns. ``unmerged``: disks whose files are not the promoted ones yet.

    Raises OSError; then the note is what it was before.
    """
    said = _Note(pair, epoch, to, time.strftime("%Y-%m-%d %H:%M:%S%z"), list(unmerged))
    _write(note, msgspec.json.encode(said) + b"\n")
    os.replace(_new(note), note)
    sync_parent(note)


def take_back(note: Path) -> None:
    """The promotion did not happen."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(note, _new(note))


def give_back(note: Path) -> None:
    """There will be no promotion: the room is not needed any more."""
    with contextlib.suppress(OSError):
        _new(note).unlink()


def _read(note: Path) -> _Note:
    try:
        return msgspec.json.decode(note.read_text(errors="replace"), type=_Note)
    except msgspec.MsgspecError:
        return _Note()


def _new(note: Path) -> Path:
    return note.with_name(note.name + ".new")


def _write(note: Path, content: bytes) -> None:
    """Over what is there, and longer than that only if it has to be."""
    new = _new(note)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, content, 0)
        os.ftruncate(fd, len(content))
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(new)) from None
    finally:
        os.close(fd)
