"""Driver ``file``: a regular file or a block device of this host.

A request is made in the event loop where it ends at once, and in a thread where it would wait:

    read             page cache (RWF_NOWAIT), again when the device has had its time, then a thread (`aio.cold`)
    write            page cache; a thread while the kernel makes writers wait, and for FUA (RWF_DSYNC)
    flush            fdatasync in a thread
    zeroes, discard  fallocate in a thread; few zeroes that need no hole are written
    cache.direct     everything in threads, from aligned buffers; a misaligned write reads the blocks at its ends,
                     merges and writes them, one such request per range at a time

How the calls are chosen: `blockstep.aio.posix`. Nothing is promised between overlapping requests in flight.

**Durability.** A write is durable after the next flush, or at once with FUA. When the kernel fails to write pages
back it reports that once, to one fdatasync, and forgets the data: to try again would report success. So after a
failed flush (or a FUA write that failed in the device) this node's flushes and FUA writes fail with that error
until it is closed and opened again, and its user knows that what was written since the last good flush is
uncertain. Of two syncs in flight one is told, and which of them is heard of first is chance: so flushes come one
after the other (those that wait share the next one), a FUA write's success counts when no flush is in flight any more,
and a failure is written down in the thread that met it. What is left is a FUA write beside a FUA write: the one that
was told would have to be held up, between the kernel and the next line, until the other has been answered.
``cache.no-flush`` gives all of that up: flush and FUA then mean nothing.

A file that somebody has shortened fails reads of what is missing (EIO); it does not read as zeroes.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from types import CoroutineType
from typing import Any, ClassVar, Final, Literal

from blockstep.aio.cold import ColdReads
from blockstep.aio.copying import clone, copy_pieces
from blockstep.aio.locking import Locking
from blockstep.aio.pool import in_thread, made_in_thread
from blockstep.aio.posix import (
    INLINE,
    EndOfFile,
    Fault,
    OpenFile,
    Reader,
    Writer,
    data_runs,
    is_block_device,
    length_of,
    punch_hole,
    quick_io,
    read_whole,
    set_length,
    write_whole,
    zero_range,
)
from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import FAST, FUA, MAY_UNMAP, ZEROES, Buffer, Driver, Extent, Prepared, not_supported
from blockstep.block.node import LIVE_OPTIONS, NodeOptions
from blockstep.block.registry import register
from blockstep.errors import OptionError, noting

#: So many zeroes are written rather than handed to a thread for fallocate.
_FEW_ZEROES: Final = 64 << 10
#: Extents of one answer of block_status.
_MOST_EXTENTS: Final = 1024
#: Errors of a write that say nothing about what was written earlier.
_OWN_FAULT: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.EBADF, errno.EPERM}
_BLKSSZGET: Final = 0x1268  # <linux/fs.h>


class FileOptions(NodeOptions, tag="file"):
    """``filename``; ``locking``: keep out other writers (``auto``: where the filesystem can)."""

    filename: str
    locking: Locking = "auto"
    # QEMU's, of no effect: how requests are made is chosen here; see the module.
    aio: Literal["threads", "native", "io_uring"] = "threads"
    aio_max_batch: int = 0
    drop_cache: bool = True
    x_check_cache_dropped: bool = False


class HostDeviceOptions(FileOptions, tag="host_device"):
    """As ``file``."""


@register
class File(Driver):
    """See the module."""

    driver: ClassVar[str] = "file"
    live_options = LIVE_OPTIONS - {"cache.direct"} | {"aio", "aio-max-batch", "drop-cache", "x-check-cache-dropped"}
    Options = FileOptions
    options: FileOptions

    fd: int
    _file: OpenFile
    _read: Reader
    _write: Writer

    async def open(self) -> None:
        options = self.options
        self._file = await made_in_thread(OpenFile.close, OpenFile, options.filename, writable=not self.read_only,
                                          direct=options.cache.direct, locking=options.locking)
        self.fd = self._file.fd
        try:
            self.length = length_of(self.fd)
            self._is_device = is_block_device(self.fd)
            self._choose_calls()
        except OSError as error:
            with noting(error):
                await self.close()
            raise
        self._lost: OSError | None = None
        # Flushes: one at a time, numbered when they begin; the last one that ended well.
        self._flushing = asyncio.Lock()
        self._flushes = self._good_flush = 0
        self._lock = RangeLock()

    def _choose_calls(self) -> None:
        self._read, self._write = quick_io(self.fd)
        self._cold = ColdReads(self._read)
        self._alignment = _direct_alignment(self.fd, self._is_device) if self._file.direct else 1

    @property
    def is_direct(self) -> bool:
        """Whether requests have to be in whole blocks."""
        return self._alignment > 1

    async def close(self) -> None:
        await in_thread(self._file.close)

    # --- data ---

    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]:
        if length <= INLINE:
            data = self._read(self.fd, length, offset)
            if len(data) == length:
                return data
        return self._read_waiting(offset, length)

    async def pread(self, offset: int, length: int) -> Buffer:
        found = File.begin_read(self, offset, length)
        return await found if found.__class__ is CoroutineType else found  # type: ignore[return-value]

    async def _read_waiting(self, offset: int, length: int) -> Buffer:
        try:
            if self._alignment > 1:
                return await in_thread(_read_direct, self.fd, length, offset, self._alignment)
            if length > INLINE:
                return await in_thread(read_whole, self.fd, length, offset)
            return await self._cold.read(self.fd, length, offset)
        except EndOfFile:
            raise self._file.shortened(self.length) from None

    def begin_write(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        if len(data) <= INLINE and self._write(self.fd, data, offset) == len(data):
            return None
        return self._write_waiting(offset, data, 0)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        if flags or len(data) > INLINE or self._write(self.fd, data, offset) != len(data):
            await self._write_waiting(offset, data, flags)

    async def _write_waiting(self, offset: int, data: Buffer, flags: int) -> None:
        durable = flags & FUA and not self.options.cache.no_flush
        if durable and self._lost:
            raise self._lost
        sync = os.RWF_DSYNC if durable else 0
        if self._alignment > 1:
            await self._pwrite_direct(offset, data, sync)
        else:
            await self._writing(write_whole, self.fd, data, offset, sync)
        if durable:
            if self._flushing.locked():
                async with self._flushing:
                    pass
            if self._lost:  # meanwhile: it may have been about these pages
                raise self._lost

    async def _pwrite_direct(self, offset: int, data: Buffer, sync: int) -> None:
        start = offset & -self._alignment
        end = -(-(offset + len(data)) // self._alignment) * self._alignment
        token = self._lock.try_take(start, end) or await self._lock.take(start, end)
        try:
            if end > self.length:  # the last block is not whole: O_DIRECT cannot write it
                await self._writing(_write_through_cache, self.fd, data, offset, sync)
            else:
                await self._writing(_write_direct, self.fd, data, offset, start, end, self._alignment, sync)
        finally:
            self._lock.give_back(token)

    async def flush(self) -> None:
        if self.options.cache.no_flush or self.read_only:
            return
        before = self._flushes
        async with self._flushing:
            if not self._lost and self._good_flush <= before:  # none has begun since that was good
                self._flushes = number = self._flushes + 1
                await in_thread(self._noting, (), os.fdatasync, self.fd)
                self._good_flush = number
        if self._lost:
            raise self._lost

    async def _writing(self, call: Callable[..., None], *args: Any) -> None:
        """A write in a thread; the last argument says whether it syncs."""
        if args[-1]:
            await in_thread(self._noting, _OWN_FAULT, call, *args)
        else:
            await in_thread(call, *args)

    def _noting(self, harmless: Collection[int], call: Callable[..., None], *args: Any) -> None:
        """A call that syncs, in its thread: note its failure before anybody hears of another's success."""
        try:
            call(*args)
        except OSError as error:
            if error.errno not in harmless:
                self._lost = error
            raise

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        unmap = flags & MAY_UNMAP and self.options.discard == "unmap"
        if length <= _FEW_ZEROES and not unmap:
            await self.pwrite(offset, ZEROES[:length], flags & FUA)
            return
        if self._alignment > 1:
            token = self._lock.try_take(offset, offset + length) or await self._lock.take(offset, offset + length)
            try:
                done = await in_thread(self._zero, offset, length, flags)
            finally:
                self._lock.give_back(token)
        else:
            done = await in_thread(self._zero, offset, length, flags)
        if not done:
            await super().write_zeroes(offset, length, flags)
        elif flags & FUA:
            await self.flush()

    def _zero(self, offset: int, length: int, flags: int) -> bool:
        if flags & MAY_UNMAP and self.options.discard == "unmap" and punch_hole(self.fd, offset, length):
            return True
        # A device that cannot do it by itself has the kernel write zeroes: it does not say so beforehand.
        if not (self._is_device and flags & FAST) and zero_range(self.fd, offset, length):
            return True
        # No way to keep the space: a hole is better than slow zeroes, if the caller can do with one.
        return bool(flags & MAY_UNMAP) and punch_hole(self.fd, offset, length)

    async def discard(self, offset: int, length: int) -> None:
        if self.options.discard == "unmap":
            await in_thread(punch_hole, self.fd, offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        if self._is_device:
            return [Extent(length)]
        try:
            return await in_thread(file_status, self.fd, offset, length)
        except EndOfFile:
            raise self._file.shortened(self.length) from None

    def shown_as(self) -> str:
        return self.options.filename

    def occupied(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def storage_fault(self) -> Fault | None:
        return self._file.fault(lambda: self.length)

    def raw_range(self, offset: int, length: int) -> tuple[int, int] | None:
        return self.fd, offset

    async def clone_in(self, of: tuple[int, int], offset: int, length: int) -> bool:
        return await in_thread(clone, of, (self.fd, offset), length)

    async def copy_in(self, of: tuple[int, int], offset: int, length: int,
                      piece: int) -> list[tuple[int, bool]] | None:
        if self.is_direct:
            return None
        return await in_thread(copy_pieces, of, (self.fd, offset), length, piece)

    # --- control ---

    async def truncate(self, length: int) -> None:
        """See `Driver`. A block device can only be given the length that it has got itself by other means."""
        if self._is_device:
            if length_of(self.fd) != length:
                raise not_supported(f"resize of the block device '{self.options.filename}' of {length_of(self.fd)} "
                                    f"bytes to {length} bytes")
            if length > self.length:
                await self.write_zeroes(self.length, length - self.length, MAY_UNMAP)
            self.length = length
            return
        before, self.length = self.length, min(self.length, length)  # never more than the file has
        try:
            await in_thread(set_length, self.fd, length, self.options.filename)
        except OSError:
            self.length = before
            raise
        self.length = length

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        direct = self._file.direct
        for option, value in options.items():
            if option == "cache.direct":
                direct = bool(value)
            elif option != "read-only":
                raise OptionError(option, value, "left alone: only read-only and cache.direct can be changed")
        if (not options["read-only"], direct) == (self._file.writable, self._file.direct):
            return Prepared()
        swap, abort = await made_in_thread(
            lambda made: made[1](), self._file.prepare_reopen, not options["read-only"], direct)

        def commit() -> None:
            swap()
            self._choose_calls()

        return Prepared(commit, abort)


@register
class HostDevice(File):
    """QEMU's name for a `File` that is a block device; regular files are refused."""

    driver: ClassVar[str] = "host_device"
    Options = HostDeviceOptions

    async def open(self) -> None:
        await super().open()
        if not self._is_device:
            error = OptionError("filename", self.options.filename, "a block device; for regular files there is 'file'")
            with noting(error):
                await self.close()
            raise error


def file_status(fd: int, offset: int, length: int) -> list[Extent]:
    """Where a file has data and where holes; waits for the filesystem's metadata. Raises EndOfFile."""
    extents: list[Extent] = []
    for run, data in data_runs(fd, offset, offset + length):
        extents.append(Extent(run, data=data, zero=not data))
        offset += run
        if len(extents) == _MOST_EXTENTS:
            break
    if extents[-1].zero and os.fstat(fd).st_size < offset:
        raise EndOfFile(errno.EIO, f"the file ends before {offset} bytes")
    return extents


# --- O_DIRECT: offsets, lengths and buffers in whole blocks ---


def _direct_alignment(fd: int, is_device: bool) -> int:
    """The block size for O_DIRECT: the smallest that is known to work."""
    if is_device:
        size: int = struct.unpack("@i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
        return size
    if os.fstat(fd).st_size >= 1024:
        with memoryview(mmap.mmap(-1, 4096)) as view:
            try:
                os.preadv(fd, (view[512:1024],), 512)
                return 512
            except OSError:
                pass
    return 4096


def _read_direct(fd: int, length: int, offset: int, alignment: int) -> Buffer:
    start = offset & -alignment
    end = -(-(offset + length) // alignment) * alignment
    view = memoryview(mmap.mmap(-1, end - start))
    if _fill(fd, view, start) < offset - start + length:
        raise EndOfFile(errno.EIO, "the file ends before what is read")
    return view[offset - start:offset - start + length]


def _fill(fd: int, view: memoryview, offset: int) -> int:
    """Read into all of ``view``, and return how much; what lies beyond the end of the file is left alone."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, (view[done:],), offset + done)
        done += count
        if not count or count & 511:  # an odd count is the end of the file
            break
    return done


def _write_direct(fd: int, data: Buffer, offset: int, start: int, end: int, alignment: int, sync: int) -> None:
    view = memoryview(mmap.mmap(-1, end - start))
    if offset > start:
        _fill(fd, view[:alignment], start)
    if offset + len(data) < end and (end - start > alignment or offset == start):
        _fill(fd, view[-alignment:], end - alignment)
    view[offset - start:offset - start + len(data)] = data
    write_whole(fd, view, start, sync)


def _write_through_cache(fd: int, data: Buffer, offset: int, sync: int) -> None:
    cached = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_whole(cached, data, offset, sync)
    finally:
        os.close(cached)
