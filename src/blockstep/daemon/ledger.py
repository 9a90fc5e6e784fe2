"""What a standby may lack, in memory that outlives the primary: a file for its start after its process has died.

A link remembers what was written since the last checkpoint that is durable on the standby. That would be gone with the
process, and both ends would have to read all of their disks and compare them. So it keeps books here as well: a bit
for each cluster, set before the disk is written, in a file in memory (tmpfs) that is mapped, so that a bit costs no
call. The file begins with a line that says whose bits they are, by which names a standby may know that, and which
disks.

    line │ bits of a disk │ bits of the next ...

What the death of a process leaves is the state after some instruction of its. So the order of the steps is what counts:
a bit before its write; the number of a checkpoint that is durable before the bits that it takes away.

It is of use only as long as the kernel lives, which has what the disks' files were told: there is none for formats that
keep something in the process, nor where no directory in memory is, nor for block devices (`blockstep.daemon.pulse`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from blockstep.aio.pool import in_thread
from blockstep.aio.posix import in_memory, naming
from blockstep.block.bitmap import Bitmap
from blockstep.block.graph import Graph
from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.files import Files
from blockstep.daemon.good_end import DiskEnd, boot, disk_end, same_disks
from blockstep.daemon.primary_setup import PrimaryDisk
from blockstep.daemon.pulse import Pulse, stamp, unchanged
from blockstep.replication.link import GRANULARITY

_PAGE: Final = mmap.PAGESIZE


class Books(msgspec.Struct):
    """The line. The files have the stamps of `blockstep.daemon.pulse`."""

    pair: str
    #: By which name a standby may know this run, or the one where it goes on.
    instance: str = ""
    #: The bits are of what was written since this checkpoint; and the last number that was given to one.
    durable: int = 0
    asked: int = 0
    disks: dict[str, DiskEnd] = {}
    lengths: dict[str, int] = {}
    boot: str = ""


class Ledger:
    """The books of a primary, at ``path``. Until `begin` they are in memory of its own only."""

    def __init__(self, path: Path, pair: str, graph: Graph, disks: Mapping[str, PrimaryDisk], files: Files) -> None:
        self.path, self._graph, self._disks, self._files = path, graph, disks, files
        self._new = path.with_name(path.name + ".new")
        self._pulse = Pulse(path, files)
        self._given_up = False
        self._books = Books(pair)
        self._fd = -1

    async def begin(self) -> None:
        """Begin a file with what the links remember. There is none where there can be none, and after an OSError."""
        memory = await self._prepared()
        if memory is None:
            self.path.unlink(missing_ok=True)  # what another process has left
            return
        # From here on nothing can be written until there is a file that says what was written before.
        at = _first(self._books)
        for name, length in self._books.lengths.items():
            link = self._disks[name].link
            link.ledger = Bitmap.over(memoryview(memory)[at:at + _size(length)], length, GRANULARITY)
            for bitmap in link.lacking():
                link.ledger.merge(bitmap)
            at += _room(length)
        os.pwrite(self._fd, _line(self._books), 0)
        os.replace(self._new, self.path)
        self._pulse.start()

    async def _prepared(self) -> mmap.mmap | None:
        await self._files.look()
        if self._given_up or self._files.faults:
            return None
        ends = {name: disk_end(disk.spec, self._graph.find(f"{name}-disk")) for name, disk in self._disks.items()}
        disks = {name: end for name, end in ends.items() if end and end.format == "raw"}
        if len(disks) < len(ends):
            return None
        self._books.disks = disks
        self._books.lengths = {name: disk.link.length for name, disk in self._disks.items()}
        return await in_thread(self._make)

    def _make(self) -> mmap.mmap | None:
        """A file under another name, without its line."""
        try:
            stamp(self._books.disks)
            self._books.boot = boot()
        except OSError:  # a device
            return None
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._new.unlink(missing_ok=True)
        fd = os.open(self._new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if in_memory(fd):
                size = _whole(self._books)
                with naming(str(self._new)):
                    os.posix_fallocate(fd, 0, size)  # a page that is missing when it is touched would end the process
                memory = mmap.mmap(fd, size)
                self._fd, fd = fd, -1
                return memory
            return None
        finally:
            if fd >= 0:
                os.close(fd)
                self._new.unlink()

    def note(self, *, instance: str | None = None, durable: int | None = None, asked: int | None = None) -> None:
        """What is known by another name or number from here on."""
        books = self._books
        books.instance = books.instance if instance is None else instance
        books.durable = books.durable if durable is None else durable
        books.asked = books.asked if asked is None else asked
        if self._fd >= 0:
            os.pwrite(self._fd, _line(books), 0)

    def forget(self) -> None:
        """There is no file any more that was begun here. Raises OSError that names it; then it is kept."""
        if self._fd < 0:  # what lies there may be another process's
            return
        self.path.unlink(missing_ok=True)  # first: from here on bits may be missing in it
        for disk in self._disks.values():
            disk.link.ledger = None
        os.close(self._fd)
        self._fd = -1
        self._pulse.stop()

    def give_up(self) -> None:
        """Likewise, for the life of this process: a disk may have lost what it was told. Raises OSError."""
        self._given_up = True
        self.forget()

    async def close(self) -> None:
        """The end, in good order. Raises OSError that names the file."""
        try:
            self.forget()
        finally:
            await self._pulse.close()


def read(path: Path, pair: str, disks: Sequence[DiskSpec]) -> tuple[Books, dict[str, Bitmap]] | None:
    """The books that a process has left, if there are any, and all is as they say; else None."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if os.fstat(fd).st_uid != os.geteuid():  # in /tmp, say
                return None
            data = file.read()
        books = msgspec.json.decode(data.partition(b"\n")[0], type=Books)
        same = (books.pair, books.boot, _whole(books)) == (pair, boot(), len(data)) and same_disks(books.disks, disks)
        if not same or not unchanged(path, books.boot, books.disks):
            return None
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None
    bits: dict[str, Bitmap] = {}
    at = _first(books)
    for name, length in books.lengths.items():
        bits[name] = Bitmap(length, GRANULARITY)
        bits[name].merge(Bitmap.over(data[at:at + _size(length)], length, GRANULARITY))
        at += _room(length)
    return books, bits


def _line(books: Books) -> bytes:
    return msgspec.json.encode(books) + b"\n"


def _first(books: Books) -> int:
    """Where the bits begin: the line has room to grow by some names and numbers."""
    fixed = len(msgspec.json.encode([books.pair, books.disks, books.lengths]))
    return (fixed // _PAGE + 2) * _PAGE


def _whole(books: Books) -> int:
    """Bytes of the file."""
    return _first(books) + sum(map(_room, books.lengths.values()))


def _size(length: int) -> int:
    """Bytes of the bits of a disk."""
    return -(-length // GRANULARITY // 8) or 1


def _room(length: int) -> int:
    """And with what is free up to the next page."""
    return -(-_size(length) // _PAGE) * _PAGE
