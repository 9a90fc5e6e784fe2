"""Driver ``blklog``: a filter that logs every change in order, to show what a crash could leave behind.

The log is in the format of Linux's dm-log-writes (see the kernel's ``log-writes.rst``), all numbers little-endian,
so its tools read it:

    sector 0        superblock: magic, version 1, number of entries, sector size
    sector 1 ...    entries, each: one sector with (first sector, number of sectors, flags, data length),
                    then the data of a write, or the text of a mark, filled up to whole sectors

Entries stand in the order in which they took effect. A write is logged after it ended; a flush takes its place in
the log when it *starts*, since that is what it makes durable: the writes that had ended by then. So every prefix of
the log is a state in which a crash may leave a disk that writes in order, and the writes after the last flush of
the prefix may be missing in any combination. `read_log` and `replay` make these states.

Zeroes are logged as data. Requests that do not begin or end with a log sector are widened with what the disk holds
there; discards are narrowed. Overlapping changes take turns, so that the log and the disk agree on the winner.

The log itself is durable after each flush of the node, and after `close`: the superblock, which counts the entries,
is written every ``log-super-update-interval`` entries and then. A request whose log entry cannot be written fails,
and so does every later change; the superblock then stays as it is, and counts no entry that is not there.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, ClassVar, Final, NamedTuple

from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import FUA, Buffer, Filter
from blockstep.block.node import Child, NodeOptions, NodeRef
from blockstep.block.permissions import ALL, READ, RESIZE, WRITE, Permission, Role
from blockstep.block.registry import register
from blockstep.errors import OptionError

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
SUPER: Final = struct.Struct("<QQQI")
ENTRY: Final = struct.Struct("<QQQQ")

FLUSH_FLAG: Final = 1
FUA_FLAG: Final = 2
DISCARD_FLAG: Final = 4
MARK_FLAG: Final = 8

#: By how many bytes the log grows.
_STEP: Final = 1 << 20
#: Bytes of a sector of the log, at least and at most: an entry takes one.
_SECTORS: Final = (512, 8 << 20)


class BlklogOptions(NodeOptions, tag="blklog"):
    """``file``: the child; ``log``: where the log goes, from its first byte on (it must be able to hold it)."""

    file: NodeRef
    log: NodeRef
    log_sector_size: int = 512
    log_append: bool = False  #: go on with the log that is there
    log_super_update_interval: int = 4096


@register
class Blklog(Filter):
    """See the module."""

    driver: ClassVar[str] = "blklog"
    Options = BlklogOptions
    options: BlklogOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED, "log": Role.TARGET}

    log: Child

    def __init__(self, name: str, options: NodeOptions) -> None:
        super().__init__(name, options)
        self._sector = self.options.log_sector_size
        self._entries = 0
        self._end = self._sector  # where the next entry goes, bytes
        self._lock = RangeLock()
        self._super_lock = RangeLock()
        self._grow_lock = RangeLock()
        self._is_torn = False

    async def open(self) -> None:
        size = self._sector
        if not _SECTORS[0] <= size <= _SECTORS[1] or size & (size - 1):
            raise OptionError("log-sector-size", size, "a power of two from 512 to 8 MiB")
        if self.options.log_super_update_interval < 1:
            raise OptionError("log-super-update-interval", self.options.log_super_update_interval, "1 or more")
        if self.options.log_append:
            await self._find_end()
        elif not self.read_only:
            await self._write_super()

    async def close(self) -> None:
        if not self.read_only:
            if not self._is_torn:
                await self._write_super()
            await self.log.flush()

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        if child.role is Role.TARGET:
            return (READ if self.read_only else READ | WRITE | RESIZE), READ
        # A widened request reads the rest of its sectors.
        return (taken | READ if taken & WRITE else taken), shared | (ALL & ~(READ | WRITE | RESIZE))

    # --- requests ---

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        start, end = self._widened(offset, len(data))
        token = await self._lock.take(start, end)
        try:
            await self.file.pwrite(offset, data, flags)
            head, tail = await self._around(offset, len(data))
            entry = self._entry(start, end - start, FUA_FLAG if flags & FUA else 0)
            await self._append(b"".join((entry, head, data, tail)), end - start)
        finally:
            self._lock.give_back(token)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        start, end = self._widened(offset, length)
        token = await self._lock.take(start, end)
        try:
            await self.file.write_zeroes(offset, length, flags)
            head, tail = await self._around(offset, length)
            entry = self._entry(start, end - start, FUA_FLAG if flags & FUA else 0)
            at = self._claim(end - start)
            zeroes_at = at + len(entry) + len(head)
            await self._write_at(zeroes_at + length, tail)  # makes room for all of it
            try:
                await self.log.write_zeroes(zeroes_at, length)
            except OSError:
                self._is_torn = True
                raise
            await self._write_at(at, b"".join((entry, head)))
            await self._update_super()
        finally:
            self._lock.give_back(token)

    async def discard(self, offset: int, length: int) -> None:
        start, end = self._widened(offset, length)
        token = await self._lock.take(start, end)
        try:
            await self.file.discard(offset, length)
            first, last = -(-offset // self._sector) * self._sector, (offset + length) // self._sector * self._sector
            if first < last:
                await self._append(self._entry(first, last - first, DISCARD_FLAG), 0)
        finally:
            self._lock.give_back(token)

    async def flush(self) -> None:
        at = self._claim(0)
        try:
            await self.file.flush()
        except OSError:
            await self._write_at(at, self._mark_entry(b"flush failed"))
            raise
        await self._write_at(at, self._entry(0, 0, FLUSH_FLAG))
        await self._write_super()
        await self.log.flush()

    async def mark(self, text: str) -> None:
        """Put a mark into the log, for people and for `replay`. Raises OptionError if it does not fit a sector."""
        data = text.encode()
        if len(data) > self._sector - ENTRY.size:
            raise OptionError("mark", text, f"at most {self._sector - ENTRY.size} bytes")
        await self._append(self._mark_entry(data), 0)

    # --- the log ---

    def _widened(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self._sector * self._sector, -(-(offset + length) // self._sector) * self._sector

    async def _around(self, offset: int, length: int) -> tuple[Buffer, Buffer]:
        """What the disk holds between the request and the borders of its sectors; zeroes beyond its end."""
        start, end = self._widened(offset, length)
        stop, limit = offset + length, self.file.node.length
        head = await self.file.pread(start, offset - start) if start < offset else b""
        tail = await self.file.pread(stop, min(end, limit) - stop) if stop < min(end, limit) else b""
        return head, bytes(tail) + bytes(end - stop - len(tail))

    def _entry(self, offset: int, length: int, flags: int, data_length: int = 0) -> bytes:
        fields = ENTRY.pack(offset // self._sector, length // self._sector, flags, data_length)
        return _padded(fields, self._sector)

    def _mark_entry(self, text: bytes) -> bytes:
        return _padded(ENTRY.pack(0, 0, MARK_FLAG, len(text)) + text, self._sector)

    def _claim(self, length: int) -> int:
        """The place of the next entry, which has ``length`` bytes after its header."""
        if self._is_torn:
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: an earlier entry of the log could not be written")
        at = self._end
        self._end += self._sector + length
        self._entries += 1
        return at

    async def _append(self, entry: bytes, length: int) -> None:
        await self._write_at(self._claim(length), entry)
        await self._update_super()

    async def _write_at(self, at: int, data: Buffer) -> None:
        end = at + len(data)
        try:
            if end > self.log.node.length:
                await self._grow(end)
            if data:
                await self.log.pwrite(at, data)
        except OSError:
            self._is_torn = True  # readers find an entry by the one before it
            raise

    async def _grow(self, end: int) -> None:
        token = await self._grow_lock.take(0, 1)  # one by one, or the smaller step may come last
        try:
            if end > self.log.node.length:
                await self.log.resize(-(-end // _STEP) * _STEP)
        finally:
            self._grow_lock.give_back(token)

    async def _update_super(self) -> None:
        if self._entries % self.options.log_super_update_interval == 0:
            await self._write_super()

    async def _write_super(self) -> None:
        token = await self._super_lock.take(0, self._sector)
        try:
            await self._write_at(0, _padded(SUPER.pack(MAGIC, VERSION, self._entries, self._sector), self._sector))
        finally:
            self._super_lock.give_back(token)

    async def _find_end(self) -> None:
        magic, version, count, size = SUPER.unpack(await self._read_log(0, SUPER.size))
        if (magic, version, size) != (MAGIC, VERSION, self._sector):
            raise OptionError("log-append", True, f"off: the log is not one with sectors of {self._sector} bytes")
        self._entries = count
        for _ in range(count):
            _, sectors, flags, _ = ENTRY.unpack(await self._read_log(self._end, ENTRY.size))
            self._end += self._sector * (1 + (0 if flags & DISCARD_FLAG else sectors))

    async def _read_log(self, offset: int, length: int) -> Buffer:
        if offset + length > self.log.node.length:
            raise OptionError("log-append", True, f"off: the log ends at {self.log.node.length} bytes, before the "
                                                  "entries that it should have")
        return await self.log.pread(offset, length)


class LogEntry(NamedTuple):
    """One entry of a log. Exactly one of the kinds: write, discard, flush, mark."""

    number: int  #: from 0 on
    offset: int  #: bytes
    length: int  #: bytes
    flags: int
    data: bytes  #: of a write
    mark: str  #: of a mark

    @property
    def is_write(self) -> bool:
        return not self.flags & (DISCARD_FLAG | MARK_FLAG) and self.length > 0


def read_log(log: BinaryIO) -> Iterator[LogEntry]:
    """All entries of a log, in order. Raises ValueError if ``log``, which is read from its beginning, is none."""
    log.seek(0)
    head = log.read(SUPER.size)
    if len(head) < SUPER.size:
        raise ValueError("too short for a write log")
    magic, version, count, size = SUPER.unpack(head)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"no write log: magic {magic:#x}, version {version}")
    at = size
    for number in range(count):
        log.seek(at)
        header = log.read(size)
        if len(header) < size:
            raise ValueError(f"the log ends within entry {number} of {count}")
        sector, sectors, flags, data_length = ENTRY.unpack_from(header)
        length = sectors * size
        data = b"" if flags & (DISCARD_FLAG | MARK_FLAG) else log.read(length)
        mark = header[ENTRY.size:ENTRY.size + data_length].decode(errors="replace") if flags & MARK_FLAG else ""
        yield LogEntry(number, sector * size, length, flags, data, mark)
        at += size + (0 if flags & DISCARD_FLAG else length)


def replay(log: BinaryIO, disk: bytearray, upto: int | None = None) -> None:
    """Do to ``disk`` the writes of the first ``upto`` entries (None: all). Discards leave the data as it is."""
    for entry in read_log(log):
        if upto is not None and entry.number >= upto:
            return
        if entry.is_write:
            length = min(entry.length, len(disk) - entry.offset)
            disk[entry.offset:entry.offset + length] = entry.data[:length]


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)
