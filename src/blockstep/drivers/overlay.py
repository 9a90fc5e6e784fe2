"""Driver ``overlay``: holds the clusters that were written, shows its backing node elsewhere, becomes empty at once.

    cluster is         reads as                           costs
    not held           the backing node, or zeroes        nothing
    held, with data    the data file, same offset         one cluster
    held, zero         zeroes                             nothing

Which is which lies in two bitmaps: *data* and *zero*, disjoint. A cluster's data is in the data file before its bit
is set, so a reader that sees the bit finds the data. The data file is sparse:

* in memory (no ``filename``): a memfd. Beyond ``memory-limit`` new clusters go to an unlinked file in
  ``spill-dir``, or fail with ENOSPC if there is none. Nothing is ever durable.
* in a file: `blockstep.drivers.overlay_image`, which says what is on the disk and what survives a crash. A flush
  makes the data durable, then the map.

``limit`` bounds the clusters with data, wherever they are: beyond it, writes that need a new one get ENOSPC.

**Writes of parts of clusters** complete the cluster from below (read, merge, write) under a range lock; whoever
writes to the same clusters meanwhile waits. All other writes end where they began, without a lock, unless somebody
holds one or the page cache would wait. Overlapping writes take effect one after the other, each as a whole.

**Emptying** replaces the maps (and the data file, in memory) by fresh ones and lets the pool release the old ones:
the same few ten microseconds however much is held. Where the pool is late with that, no more is left to it than the
last ones, and no spill file is begun before the last one is gone. In a file it is durable after the next flush, and
only then the old data is given back to the filesystem, in the background, piece by piece: before, a crash must find it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, Final

from blockstep.aio.locking import Locking
from blockstep.aio.pool import in_background, in_thread, made_in_thread
from blockstep.aio.posix import (
    INLINE,
    EndOfFile,
    Fault,
    Reader,
    Writer,
    punch_hole,
    quick_io,
    read_padded,
    read_whole,
    set_length,
    write_whole,
)
from blockstep.aio.rangelock import RangeLock
from blockstep.block.bitmap import Bitmap
from blockstep.block.driver import FAST, FUA, ZEROES, Buffer, Driver, Extent, Prepared, not_supported
from blockstep.block.node import LIVE_OPTIONS, Child, NodeOptions, NodeRef
from blockstep.block.permissions import Role
from blockstep.block.registry import register
from blockstep.drivers.overlay_image import OverlayImage
from blockstep.drivers.overlay_saver import OverlaySaver
from blockstep.errors import OptionError, noting

_DEFAULT_CLUSTER: Final = 4096
_CLUSTERS: Final = (512, 2 << 20)
#: Holes of more bytes are punched in a thread, also in memory: freeing 1 MiB takes some 50 us.
_LONG_HOLE: Final = 4 << 20
_UNLIMITED: Final = 1 << 63


class OverlayOptions(NodeOptions, tag="overlay"):
    """See the module. ``size``: default the image's, else the backing node's; ``create``: make a missing file."""

    filename: str | None = None
    backing: NodeRef | None = None
    size: int | None = None
    cluster_size: int | None = None
    memory_limit: int | None = None
    spill_dir: str | None = None
    limit: int | None = None
    create: bool = False
    locking: Locking = "auto"
    file: dict[str, str] | None = None  #: {driver: file, filename}: QEMU's way to say where an image is

    def __post_init__(self) -> None:
        if self.file is not None:
            place = {"driver": "file", **self.file}
            if place.keys() != {"driver", "filename"} or place["driver"] != "file" or self.filename is not None:
                raise ValueError("'file' names the image's place by driver=file and filename, and nothing else does")
            self.filename, self.file = place["filename"], None


@register
class Overlay(Driver):
    """See the module."""

    driver: ClassVar[str] = "overlay"
    live_options = LIVE_OPTIONS - {"cache.direct", "cache.no-flush"}
    Options = OverlayOptions
    options: OverlayOptions
    child_roles: ClassVar[dict[str, Role]] = {"backing": Role.BACKING}
    can_be_emptied: ClassVar[bool] = True
    backing: Child | None = None

    _image: OverlayImage | None = None
    _fd: int  #: of the data file
    _base: int  #: where the disk begins in it
    _read: Reader
    _write: Writer

    async def open(self) -> None:
        options = self.options
        self._check(options)
        if options.filename is None:
            self.length = self._wanted_length()
            self._map = Bitmap(self.length, options.cluster_size or _DEFAULT_CLUSTER)
            self._fd, self._base = _memory_file(self.length), 0
        else:
            await self._open_image(options, options.filename)
        self._read, self._write = quick_io(self._fd)
        self._bits = self._map.bits
        self._shift = self._map.shift
        self.cluster_size = 1 << self._shift
        self._zero: Bitmap | None = None
        #: Bytes of clusters with data.
        self.used = _cluster_bytes(self._map)
        self._limit = _UNLIMITED if options.limit is None else options.limit
        self._memory_limit = _UNLIMITED if options.memory_limit is None else options.memory_limit
        self._quick_limit = min(self._limit, self._memory_limit)
        self._spill: int | None = None
        self._spilled: Bitmap | None = None
        self._spilled_bytes = 0
        #: Lets what was emptied last be free soon; and the end of the last spill file.
        self._hasten: Callable[[], None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._lock = RangeLock()
        #: Of an image.
        self._saver = OverlaySaver(self._image, lambda: (self._map, self._zero), self._lock,
                                   durable=not options.cache.no_flush) if self._image else None

    def _check(self, options: OverlayOptions) -> None:
        cluster = options.cluster_size
        if cluster is not None and (cluster & (cluster - 1) or not _CLUSTERS[0] <= cluster <= _CLUSTERS[1]):
            raise OptionError("cluster-size", cluster, "a power of two from 512 to 2 MiB")
        for name, value in (("memory-limit", options.memory_limit), ("spill-dir", options.spill_dir)):
            if value is not None and options.filename is not None:
                raise OptionError(name, value, "absent: it is for overlays in memory, and this one has a filename")
        if options.spill_dir is not None and not os.path.isdir(options.spill_dir):
            raise OptionError("spill-dir", options.spill_dir, "a directory")
        if options.create and options.filename is None:
            raise OptionError("create", True, "absent: without a filename there is no file to make")
        if options.create and self.read_only:
            raise OptionError("create", True, "given with read-only=off: a backing node is read-only by default")
        if options.cache.direct:
            raise OptionError("cache.direct", True, "absent: the overlay's data file is read through the page cache")

    def _wanted_length(self) -> int:
        if self.options.size is not None:
            if self.options.size < 0:
                raise OptionError("size", self.options.size, "0 or more bytes")
            return self.options.size
        if self.backing is None:
            raise OptionError("size", None, "given, where there is no backing node to take it from")
        return self.backing.node.length

    async def _open_image(self, options: OverlayOptions, filename: str) -> None:
        create = options.create and not (os.path.exists(filename) and os.path.getsize(filename))
        image = await made_in_thread(
            OverlayImage.close, OverlayImage, filename, writable=not self.read_only, locking=options.locking,
            length=self._wanted_length() if create else None, cluster_size=options.cluster_size or _DEFAULT_CLUSTER)
        try:
            for name, given, found in (("size", options.size, image.length),
                                       ("cluster-size", options.cluster_size, image.cluster_size)):
                if given not in (None, found):
                    raise OptionError(name, given, f"absent or {found}, as in the image '{filename}'")
            self._map = await in_thread(image.load_map)
        except BaseException as error:
            with noting(error):
                await in_thread(image.close)
            raise
        self._image, self.length = image, image.length
        self._fd, self._base = image.fd, image.data_offset

    async def close(self) -> None:
        """As of all drivers; an image's map is written, so that a file that was closed in order is complete."""
        if self._image is None or self._saver is None:
            if self._closing:
                await self._closing
            for fd in (self._fd, self._spill):
                if fd is not None:
                    await in_thread(os.close, fd)
            return
        await self._saver.stop()
        try:
            if not self.read_only:
                await self._saver.save()
        finally:
            await in_thread(self._image.close)

    # --- reads ---

    async def pread(self, offset: int, length: int) -> Buffer:
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        bits = self._bits
        if bits[first] if first == last else bits.find(0, first, last + 1) < 0:
            if length <= INLINE and self._spilled is None:
                data = self._read(self._fd, length, offset + self._base)
                if len(data) == length:
                    return data
            return await self._read_held(offset, length)
        if first == last or bits.find(1, first, last + 1) < 0:
            backing = self.backing
            if self._zero is None and backing is not None and offset + length <= backing.node.length:
                return await backing.pread(offset, length)
            return await self._read_below(offset, length)
        pieces = []
        for run, held in self._map.extents(offset, length):
            pieces.append(await (self._read_held(offset, run) if held else self._read_below(offset, run)))
            offset += run
        return b"".join(pieces)

    async def _read_held(self, offset: int, length: int) -> Buffer:
        if self._spilled is None:
            if length <= INLINE:
                data = self._read(self._fd, length, offset + self._base)
                if len(data) == length:
                    return data
            try:
                return await in_thread(read_whole, self._fd, length, offset + self._base)
            except EndOfFile:
                if self._image is None:
                    raise
                raise self._image.file.shortened(self._base + self.length) from None
        pieces = []
        for run, spilled in self._spilled.extents(offset, length):
            if spilled:
                assert self._spill is not None
                pieces.append(await in_thread(read_padded, self._spill, run, offset))
            else:
                pieces.append(read_whole(self._fd, run, offset))
            offset += run
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _read_below(self, offset: int, length: int) -> Buffer:
        """Where there is no data here: zeroes where it is zero or nothing is below, else the backing node."""
        if self._zero is not None and self._zero.any(offset, length):
            runs = self._zero.extents(offset, length)
            if len(runs) == 1:
                return _zeroes(length)
            pieces = []
            for run, zero in runs:
                pieces.append(_zeroes(run) if zero else await self._read_below(offset, run))
                offset += run
            return b"".join(pieces)
        if self.backing is None:
            return _zeroes(length)
        there = self.backing.node.length - offset
        if there >= length:
            return await self.backing.pread(offset, length)
        if there <= 0:
            return _zeroes(length)
        return b"".join((await self.backing.pread(offset, there), bytes(length - there)))

    # --- writes ---

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        writing = Overlay.begin_write(self, offset, data)
        if writing is not None:
            await writing
        if flags & FUA:
            await self.flush()

    def begin_write(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        length = len(data)
        end = offset + length
        shift, bits = self._shift, self._bits
        first, last = offset >> shift, (end - 1) >> shift
        if length <= INLINE and self._spilled is None and self._lock.idle:
            # Clusters that get their first data now; -1 if one must be completed from below.
            new = (not bits[first]) if first == last else bits.count(0, first, last + 1)
            if new and (offset & ((1 << shift) - 1) or (end & ((1 << shift) - 1) and end != self.length)):
                new = -1
            if (new >= 0 and self.used + (new << shift) <= self._quick_limit
                    and self._write(self._fd, data, offset + self._base) == length):
                if new:
                    self._got_data(first, last + 1)
                    self.used += new << shift
                return None
        return self._write_locked(offset, data)

    async def _write_locked(self, offset: int, data: Buffer) -> None:
        shift, end = self._shift, offset + len(data)
        first, last = offset >> shift, (end - 1) >> shift
        start, stop = first << shift, min((last + 1) << shift, self.length)
        token = self._lock.try_take(start, stop) or await self._lock.take(start, stop)
        try:
            head = offset - start if not self._bits[first] else 0
            tail = stop - end if not self._bits[last] else 0
            if head or tail:
                data = b"".join((await self._read_below(start, head) if head else b"", data,
                                 await self._read_below(end, tail) if tail else b""))
            await self._put(offset - head, data)
        finally:
            self._lock.give_back(token)

    async def _put(self, offset: int, data: Buffer) -> None:
        """Write whole clusters, or parts of clusters with data. The caller holds the lock."""
        first, last = offset >> self._shift, (offset + len(data) - 1) >> self._shift
        new = self._bits.count(0, first, last + 1) << self._shift
        if self.used + new > self._limit:
            raise _full(f"the overlay '{self.name}' holds its limit of {self._limit} bytes")
        self.used += new
        spill: list[tuple[int, int]] = []
        try:
            if new and self.used - self._spilled_bytes > self._memory_limit:
                if self._closing and not self._closing.done():  # there may not be room for this spill file and the last
                    await asyncio.wait([self._closing])
                spill = self._spill_new(offset, len(data), new)
            await self._write_runs(offset, data)
        except BaseException:
            self.used -= new
            if spill and self._spilled is not None:
                self._spilled_bytes -= new
                for begin, length in spill:
                    self._spilled.reset(begin, length)
            raise
        self._got_data(first, last + 1)

    def _spill_new(self, offset: int, length: int, new: int) -> list[tuple[int, int]]:
        """Send the clusters without data to the spill file: the ranges that go there."""
        if self.options.spill_dir is None:
            raise _full(f"the overlay '{self.name}' holds its memory-limit of {self._memory_limit} bytes, "
                        "and there is no spill-dir")
        if self._spill is None:
            self._spill = _unlinked_file(self.options.spill_dir)
            self._spilled = Bitmap(self.length, 1 << self._shift)
        assert self._spilled is not None
        ranges = []
        for run, held in self._map.extents(offset, length):
            if not held:
                ranges.append((offset, run))
                self._spilled.set(offset, run)
            offset += run
        self._spilled_bytes += new
        return ranges

    async def _write_runs(self, offset: int, data: Buffer) -> None:
        if self._spilled is None:
            if len(data) > INLINE or self._write(self._fd, data, offset + self._base) != len(data):
                await in_thread(write_whole, self._fd, data, offset + self._base)
            return
        view, done = memoryview(data), 0
        for run, spilled in self._spilled.extents(offset, len(data)):
            if spilled:
                assert self._spill is not None
                await in_thread(write_whole, self._spill, view[done:done + run], offset + done)
            else:
                write_whole(self._fd, view[done:done + run], offset + done)
            done += run

    def _got_data(self, first: int, end: int) -> None:
        """The clusters have data now, and it is in the data file."""
        if end - first == 1:
            self._bits[first] = 1
        else:
            self._bits[first:end] = True
        if self._zero is not None:
            self._zero.bits[first:end] = False
        if self._saver is not None:
            self._saver.changed(first, end)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        cluster, end = 1 << self._shift, offset + length
        start = -(-offset // cluster) * cluster
        stop = end if end == self.length else end & -cluster
        if start >= stop:
            await super().write_zeroes(offset, length, flags & ~FAST)
            return
        for begin, piece in ((offset, start - offset), (stop, end - stop)):
            if piece:
                await super().write_zeroes(begin, piece, 0)
        await self._zero_clusters(start, stop, bool(flags & FAST))
        if flags & FUA:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        """What is wholly in the range reads as zeroes: never as an older or newer layer's data."""
        cluster, end = 1 << self._shift, offset + length
        start = -(-offset // cluster) * cluster
        stop = end if end == self.length else end & -cluster
        if start < stop:
            await self._zero_clusters(start, stop)

    async def _zero_clusters(self, start: int, stop: int, fast: bool = False) -> None:
        token = self._lock.try_take(start, stop) or await self._lock.take(start, stop)
        try:
            cluster = 1 << self._shift
            first, end = start >> self._shift, -(-stop // cluster)
            if self._image is not None:
                # What is held and a hole on the disk is zero, also after a crash: the map has one bit a cluster.
                if not await in_thread(punch_hole, self._fd, start + self._base, stop - start):
                    if fast:
                        raise not_supported("fast zeroes, by this filesystem")
                    piece = max(len(ZEROES), cluster)
                    for at in range(start, stop, piece):
                        await self._put(at, _zeroes(min(piece, stop - at)))
                    return
            elif self._bits.find(1, first, end) >= 0:
                if stop - start > _LONG_HOLE:
                    await in_thread(self._free, start, stop - start)
                else:
                    self._free(start, stop - start)
            self.used -= self._bits.count(1, first, end) << self._shift
            if self._spilled is not None:
                self._spilled_bytes -= self._spilled.bits.count(1, first, end) << self._shift
                self._spilled.bits[first:end] = False
            if self._zero is None:
                self._zero = Bitmap(self.length, cluster)
            self._zero.bits[first:end] = True
            self._bits[first:end] = False
            if self._saver is not None:
                self._saver.changed(first, end)
        finally:
            self._lock.give_back(token)

    def _free(self, offset: int, length: int) -> None:
        punch_hole(self._fd, offset, length)
        if self._spill is not None:
            punch_hole(self._spill, offset, length)

    # --- what it holds ---

    def holds(self, offset: int, length: int) -> bool:
        """Whether all clusters that the range touches are held here, with data or zero."""
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        bits = self._bits
        if bits[first] if first == last else bits.find(0, first, last + 1) < 0:
            return True
        zero = self._zero
        return zero is not None and (bits[first:last + 1] | zero.bits[first:last + 1]).all()

    def raw_range(self, offset: int, length: int) -> tuple[int, int] | None:
        if self._spilled is not None or any(not data for _, data in self._map.extents(offset, length)):
            return None
        return self._fd, offset + self._base

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        for run, data in self._map.extents(offset, length):
            if data:
                extents.append(Extent(run))
            elif self._zero is None or not self._zero.any(offset, run):
                extents.append(self._not_held(offset, run))
            else:
                at = offset
                for part, zero in self._zero.extents(offset, run):
                    extents.append(Extent(part, data=False, zero=True) if zero else self._not_held(at, part))
                    at += part
            offset += run
        return extents

    def _not_held(self, offset: int, length: int) -> Extent:
        nothing = self.backing is None or self.backing.node.length <= offset
        return Extent(length, data=False, zero=nothing, allocated=False)

    def shown_as(self) -> str | None:
        return self.options.filename

    def occupied(self) -> int:
        return self.used

    def storage_fault(self) -> Fault | None:
        return self._image.file.fault(lambda: self._base + self.length) if self._image else None

    # --- emptying ---

    async def prepare_empty(self) -> Prepared:
        """See `Driver`. The commit of an image changes nothing on the disk: the next flush does."""
        fresh = Bitmap(self.length, 1 << self._shift)
        fd = self._fd if self._image else _memory_file(self.length)

        def commit() -> None:
            old = None if self._image else self._fd, self._map
            if self._spill is not None:
                self._closing = asyncio.ensure_future(_closed(self._spill))
            self._fd, self._map, self._bits = fd, fresh, fresh.bits
            self._zero = self._spilled = self._spill = None
            self.used = self._spilled_bytes = 0
            if self._saver is not None:
                self._saver.emptied()
            if self._hasten:
                self._hasten()
            self._hasten = in_background(_release, *old)

        def abort() -> None:
            if not self._image:
                os.close(fd)

        return Prepared(commit, abort)

    async def truncate(self, length: int) -> None:
        """See `Driver`. Of an image, durable at return. Also one that was to shrink and did not is as it was."""
        before = self.length
        await self._set_length(length)
        if self.backing is not None and (stop := min(length, self.backing.node.length)) > before:
            try:
                await self.write_zeroes(before, stop - before)
            except BaseException as error:
                with noting(error):
                    await self._set_length(before)
                raise

    async def _set_length(self, length: int) -> None:
        token = self._lock.try_take(0, _UNLIMITED) or await self._lock.take(0, _UNLIMITED)
        try:
            before, maps = self.length, (self._map, self._zero, self._spilled)
            if self._image:
                self._image.check_room(length)
            fresh = (_resized(self._map, length), self._zero and _resized(self._zero, length),
                     self._spilled and _resized(self._spilled, length))
            if length > before:
                await in_thread(self._set_file_length, length)
            try:
                await self._follow(length, fresh)
                if length < before:
                    await in_thread(self._set_file_length, length)
            except BaseException as error:
                with noting(error):
                    await self._follow(before, maps)
                    await in_thread(self._set_file_length, before)
                raise
        finally:
            self._lock.give_back(token)

    async def _follow(self, length: int, maps: tuple[Bitmap, Bitmap | None, Bitmap | None]) -> None:
        self.length, (self._map, self._zero, self._spilled) = length, maps
        self._bits = self._map.bits
        self.used = _cluster_bytes(self._map)
        self._spilled_bytes = _cluster_bytes(self._spilled) if self._spilled else 0
        if self._saver is not None:
            self._saver.resized()
            await self._saver.save()

    def _set_file_length(self, length: int) -> None:
        if self._spill is not None:
            set_length(self._spill, length, f"the spill file of '{self.name}'")
        set_length(self._fd, self._base + length, self.name if self._image is None else self._image.file.filename)

    # --- an image ---

    async def flush(self) -> None:
        """See `Driver`. After a sync that failed, all flushes fail with its error until the image is opened again."""
        if self._saver is not None and not self.options.cache.no_flush and not self.read_only:
            await self._saver.save()

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        prepared = await super().prepare_reopen(options)
        if self._image is None or self._saver is None or options["read-only"] != self._image.file.writable:
            return prepared
        if options["read-only"]:
            await self._saver.save()
        return Prepared(*await made_in_thread(
            lambda made: made[1](), self._image.file.prepare_reopen, not options["read-only"], False))


def _zeroes(length: int) -> Buffer:
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)


def _full(what: str) -> OSError:
    return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {what}")


def _memory_file(length: int) -> int:
    fd = os.memfd_create("blockstep-overlay")
    try:
        set_length(fd, length, "an overlay in memory")
    except OSError:
        os.close(fd)
        raise
    return fd


def _unlinked_file(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # a filesystem without O_TMPFILE, or a reason that mkstemp will say again
        import tempfile

        fd, path = tempfile.mkstemp(dir=directory)
        os.unlink(path)
        return fd


def _resized(bitmap: Bitmap, length: int) -> Bitmap:
    other = Bitmap(length, bitmap.granularity)
    other.merge(bitmap)
    return other


def _cluster_bytes(bitmap: Bitmap) -> int:
    return bitmap.bits.count() << bitmap.shift


async def _closed(spill: int) -> None:
    with contextlib.suppress(OSError):  # what it held is nobody's
        await in_thread(os.close, spill)


def _release(fd: int | None, _bitmap: Bitmap) -> None:
    """Runs in a thread: freeing a gigabyte of memory takes a tenth of a second."""
    if fd is not None:
        os.close(fd)
