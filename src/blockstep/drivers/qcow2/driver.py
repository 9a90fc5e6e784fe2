"""Driver ``qcow2``: an image in QEMU's format, in its child ``file``, over an optional backing node.

Data is written where it belongs at once, metadata is kept in memory (`tables`, `refcounts`) until a flush, or until too
much of it has changed. **A save** takes a copy of all metadata that has changed, at one moment, and writes it in an
order in which each step may be the last one:

    1  refcount blocks; if there are new ones: flush, then the refcount table (a longer one: flush, then the header)
    2  flush: now the data, and the refcounts of all clusters in use, are on the disk
    3  L2 tables; if L1 changes: flush, then L1
    4  flush
    5  clusters that nothing on the disk refers to any more may be used again; their refcounts follow in the next save

So a crash between two steps leaves clusters that count as used and are not: a leak, nothing else. Refcounts only rise
before a reference appears, and only fall after it is gone. What was not flushed is lost, as on any disk with a cache.

**A write** into a cluster of its own (the COPIED flag) goes there directly, without a lock. All others take the range
of their clusters: new clusters are written whole (what the write leaves out comes from below, or is left as the hole
that it is in a file that has just grown), then the L2 entry changes in memory. Two writes to one cluster take turns.

**Emptying** makes a new, empty set of L1, refcount table and refcount blocks in memory, and a flush writes it into
free clusters and then moves the header to it: one write of 24 bytes. Before, nothing that the image on the disk uses is
touched. It takes the same time however much the image holds. An image with internal snapshots or bitmaps is refused.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

import msgspec

from blockstep.aio.pool import in_thread
from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import FAST, FUA, MAY_UNMAP, ZEROES, Buffer, Driver, Extent, Prepared, not_supported
from blockstep.block.node import LIVE_OPTIONS, Child, NodeOptions, NodeRef
from blockstep.block.permissions import Role
from blockstep.block.registry import register
from blockstep.drivers.qcow2.backing import backing_options
from blockstep.drivers.qcow2.compressed import check_compression, decompress
from blockstep.drivers.qcow2.format import (
    AT_AUTOCLEAR,
    AT_L1,
    BITMAPS,
    COPIED,
    CORRUPT,
    DIRTY,
    EXT_BITMAPS,
    EXTERNAL_DATA,
    MOST_L1,
    OFFSET,
    TABLES,
    ZERO,
    Header,
    compressed_place,
    encode_table,
    entries_for,
    header_span,
    parse_header,
)
from blockstep.drivers.qcow2.refcounts import Refcounts, broken, read_file
from blockstep.drivers.qcow2.tables import Kind, Run, Tables
from blockstep.errors import ImageError, OptionError

_DEFAULT_L2_CACHE: Final = 32 << 20
_DEFAULT_REFCOUNT_CACHE: Final = 4 << 20
#: Bytes that one step of a write allocates at most: bounds what is copied, and how long the range is held.
_PIECE: Final = 2 << 20
#: Unpacked clusters that are kept: requests of 4 KiB to one cluster unpack it once.
_UNPACKED: Final = 4
#: Bytes from which on a cluster is unpacked in a thread.
_LONG_UNPACK: Final = 256 << 10
_EVERYTHING: Final = 1 << 63


class Qcow2Options(NodeOptions, tag="qcow2"):
    """``backing``: the default, ``{}``, is what the header names; None: nothing, whatever the header says."""

    file: NodeRef
    backing: NodeRef | None = msgspec.field(default_factory=dict)
    l2_cache_size: int | None = None
    refcount_cache_size: int | None = None


@register
class Qcow2(Driver):
    """See the module."""

    driver: ClassVar[str] = "qcow2"
    live_options = LIVE_OPTIONS
    Options = Qcow2Options
    options: Qcow2Options
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.STORAGE, "backing": Role.BACKING}
    can_be_emptied: ClassVar[bool] = True
    file: Child
    backing: Child | None = None
    header: Header

    async def _load_header(self) -> Header:
        start = await read_file(self.file, 0, 512)
        span = header_span(start)
        return parse_header(start if span <= len(start) else await read_file(self.file, 0, span))

    async def implied_children(self) -> list[tuple[str, Role, NodeRef]]:
        """The backing node that the header names, where the options do not say."""
        if self.options.backing != {}:
            return []
        try:
            found = backing_options(await self._load_header(), self.file.node)
        except ImageError as error:
            raise OptionError("file", self.file.node.name, f"a qcow2 image that can be used: {error}") from error
        return [] if found is None else [("backing", Role.BACKING, found)]

    async def open(self) -> None:
        try:
            self.header = await self._load_header()
            self._check_readable(self.header)
        except ImageError as error:
            raise OptionError("file", self.file.node.name, f"a qcow2 image that can be used: {error}") from error
        if not self.read_only:
            self._check_writable(self.header)
        for name, size in (("l2-cache-size", self.options.l2_cache_size),
                           ("refcount-cache-size", self.options.refcount_cache_size)):
            if size is not None and size <= 0:
                raise OptionError(name, size, "more than 0 bytes")
        self._use(self.header, *await self._load_tables(self.header))
        self._lock = RangeLock()
        self._saving = asyncio.Lock()
        self._saves = self._good_save = 0
        self._unpacked: dict[int, bytes] = {}
        #: Of make_empty: where its last set of tables lies, (first cluster, count); whether a flush must move there.
        self._slot: tuple[int, int] | None = None
        self._moving = False
        if not self.read_only:
            await self._clear_autoclear()

    async def _load_tables(self, header: Header) -> tuple[Refcounts, Tables]:
        l2_cache = (self.options.l2_cache_size or _DEFAULT_L2_CACHE) >> header.cluster_bits
        refcount_cache = (self.options.refcount_cache_size or _DEFAULT_REFCOUNT_CACHE) >> header.cluster_bits
        refcounts = Refcounts(self.file, header, refcount_cache, self._save)
        tables = Tables(self.file, header, refcounts, l2_cache, self._save)
        await tables.open()
        await refcounts.open()
        refcounts.on_free = self._pass_discard
        return refcounts, tables

    def _use(self, header: Header, refcounts: Refcounts, tables: Tables) -> None:
        self.header, self._refcounts, self._tables = header, refcounts, tables
        self.length, self.cluster_size = header.size, header.cluster_size
        self._l2, self._l2_shift = tables.l2, tables.l2_shift
        self._bits, self._mask, self._within = header.cluster_bits, tables.mask, header.cluster_size - 1
        # With extended entries nothing is plain.
        self._odd = tables.odd if not header.extended_l2 else (1 << 64) - 1

    def _check_readable(self, header: Header) -> None:
        if header.crypt_method:
            kind = "LUKS" if header.crypt_method == 2 else "AES"
            raise ImageError("crypt_method", f"{header.crypt_method} ({kind})", "0: encrypted images cannot be used")
        if header.incompatible & EXTERNAL_DATA:
            raise ImageError("incompatible_features", "external data file", "without it: it cannot be used yet")
        check_compression(header.compression_type)

    def _check_writable(self, header: Header) -> None:
        """Raises OptionError for ``read-only``, so that with auto-read-only the image is opened for reading."""
        for is_so, what in (
                (header.incompatible & DIRTY, "its refcounts were not written when it was closed (the dirty bit); "
                                              "repair it first: blockstep img check --repair all"),
                (header.incompatible & CORRUPT, "it is marked as corrupt; repair it first"),
                (header.extended_l2, "images with extended L2 entries (subclusters) can only be read"),
                (header.autoclear & BITMAPS, "it has persistent bitmaps, which a write would make wrong")):
            if is_so:
                raise OptionError("read-only", False, f"on, for the image '{self.file.node.name}': {what}")

    async def _clear_autoclear(self) -> None:
        if self.header.autoclear:  # of features that are not known here; see _check_writable for bitmaps
            await self.file.pwrite(AT_AUTOCLEAR, bytes(8))
            await self.file.flush()

    async def close(self) -> None:
        """As of all drivers; the metadata is written, so that an image that was closed in order has no leaks."""
        if self.read_only:
            return
        await self._settle()
        await self._refcounts.trim()

    async def _settle(self) -> None:
        """Write all, also the refcounts of what has become free. Nothing is in flight."""
        await self._save()
        await self._refcounts.reclaim()
        await self._save()

    # --- reads ---

    async def pread(self, offset: int, length: int) -> Buffer:
        refcounts = self._refcounts
        turn = refcounts.turn
        refcounts.running[turn] += 1
        try:
            within = offset & self._within
            table = self._l2.get(offset >> self._l2_shift)
            if table is not None and within + length <= self.cluster_size:
                entry = table[(offset >> self._bits) & self._mask]
                if not entry & self._odd and entry & OFFSET:
                    host = (entry & OFFSET) + within
                    if host + length <= refcounts.file_length:
                        return await self.file.pread(host, length)
            return await self._read(offset, length)
        finally:
            refcounts.running[turn] -= 1

    async def _read(self, offset: int, length: int) -> Buffer:
        pieces: list[Buffer] = []
        end = offset + length
        while offset < end:
            for run in await self._tables.runs(offset, end):
                pieces.append(await self._read_run(run, offset))
                offset += run.length
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _read_run(self, run: Run, offset: int) -> Buffer:
        if run.kind is Kind.DATA:
            if run.host + run.length <= self._refcounts.file_length:
                return await self.file.pread(run.host, run.length)
            return await read_file(self.file, run.host, run.length)
        if run.kind is Kind.BELOW:
            return await self._read_below(offset, run.length)
        if run.kind is Kind.PACKED:
            within = offset & self._within
            return (await self._unpack(run.host))[within:within + run.length]
        return _zeroes(run.length)

    async def _read_below(self, offset: int, length: int) -> Buffer:
        there = 0 if self.backing is None else self.backing.node.length - offset
        if self.backing is None or there <= 0:
            return _zeroes(length)
        if there >= length:
            return await self.backing.pread(offset, length)
        return b"".join((await self.backing.pread(offset, there), bytes(length - there)))

    async def _unpack(self, entry: int) -> bytes:
        data = self._unpacked.get(entry)
        if data is None:
            place, span = compressed_place(entry, self._bits)
            if place >= self._refcounts.file_length:
                raise broken(f"a compressed cluster is said to be at {place}")
            packed = await read_file(self.file, place, span)
            kind, size = self.header.compression_type, self.cluster_size
            data = (decompress(kind, packed, size) if size < _LONG_UNPACK
                    else await in_thread(decompress, kind, packed, size))
            while len(self._unpacked) >= _UNPACKED:
                del self._unpacked[next(iter(self._unpacked))]
            self._unpacked[entry] = data
        return data

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        for run in await self._tables.runs(offset, offset + length):
            if run.kind is Kind.BELOW:
                below = 0 if self.backing is None else max(0, min(run.length, self.backing.node.length - offset))
                if below:
                    extents.append(Extent(below, data=False, allocated=False))
                if run.length > below:
                    extents.append(Extent(run.length - below, data=False, zero=True, allocated=False))
            elif run.kind is Kind.ZERO:
                extents.append(Extent(run.length, data=False, zero=True))
            else:
                extents.append(Extent(run.length))
            offset += run.length
        return extents

    async def places(self, offset: int, length: int) -> list[tuple[int, int | None]]:
        """Where a range lies in ``file``: runs of (bytes, offset in it), None for what does not lie there as it is."""
        found: list[tuple[int, int | None]] = []
        end = offset + length
        while offset < end:
            for run in await self._tables.runs(offset, end):
                found.append((run.length, run.host if run.kind is Kind.DATA else None))
                offset += run.length
        return found

    # --- writes ---

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        length = len(data)
        refcounts = self._refcounts
        turn = refcounts.turn
        refcounts.running[turn] += 1
        try:
            within = offset & self._within
            table = self._l2.get(offset >> self._l2_shift)
            if table is not None and within + length <= self.cluster_size:
                entry = table[(offset >> self._bits) & self._mask]
                if entry > COPIED and not entry & self._odd and self._tables.l1[offset >> self._l2_shift] & COPIED:
                    host = (entry & OFFSET) + within
                    if host + length <= refcounts.file_length:
                        await self.file.pwrite(host, data)
                        length = 0
            if length:
                await self._write(offset, data)
        finally:
            refcounts.running[turn] -= 1
        if flags & FUA:
            await self.flush()

    async def _write(self, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        first, stop = offset & ~self._within, -(-end >> self._bits) << self._bits
        view = memoryview(data)
        token = self._lock.try_take(first, stop) or await self._lock.take(first, stop)
        try:
            at = offset
            while at < end:
                at += await self._write_some(at, view[at - offset:min(end - offset, at - offset + _PIECE)])
        finally:
            self._lock.give_back(token)

    async def _write_some(self, offset: int, data: Buffer) -> int:
        """Write a part of ``data``: clusters of one kind, in a row in the file. Returns its length."""
        index = offset >> self._l2_shift
        table = await self._tables.own(index)
        end = min(offset + len(data), (index + 1) << self._l2_shift)
        entry = table[(offset >> self._bits) & self._mask]
        if entry > COPIED and not entry & self._odd:
            return await self._write_in_place(table, offset, data, end)
        # Clusters that need a place; the first and last may need the rest of their content.
        count = 1
        first = (offset >> self._bits) & self._mask
        total = ((end - 1) >> self._bits & self._mask) - first + 1
        while count < total:
            entry = table[first + count]
            if entry > COPIED and not entry & self._odd:
                break
            count += 1
        old = table[first]
        if old > COPIED and not old & (self._odd & ~ZERO):  # a place that is there already, and reads as zeroes
            host, count, virgin, fresh = old & OFFSET, 1, False, False
        else:
            host, count, virgin = await self._refcounts.allocate(count)
            fresh = True
        try:
            return await self._fill(index, offset, data, end, host, count, virgin)
        except BaseException:
            if fresh:
                await self._refcounts.release(host, count)
            raise

    async def _write_in_place(self, table: array[int], offset: int, data: Buffer, end: int) -> int:
        """Clusters of their own, as many as are neighbours in the file."""
        at = (offset >> self._bits) & self._mask
        host = table[at] & OFFSET
        stop = (offset | self._within) + 1
        while stop < end and table[at + 1] == table[at] + self.cluster_size:
            at, stop = at + 1, stop + self.cluster_size
        stop = min(stop, end)
        place = host + (offset & self._within)
        length = stop - offset
        if place + length > self._refcounts.file_length:
            if place >= self._refcounts.file_length + self.cluster_size:
                raise broken(f"data of the disk's byte {offset} is said to be at {place}")
            await self._refcounts.grow(place + length)
        await self.file.pwrite(place, memoryview(data)[:length])
        return length

    async def _fill(self, index: int, offset: int, data: Buffer, end: int, host: int, count: int, virgin: bool) -> int:
        """Write clusters that begin at ``host`` in the file, and let the L2 table refer to them.

        ``virgin``: the file reads as zeroes there; a part that the disk has zeroes in is left as a hole.
        """
        start = offset & ~self._within
        stop = start + count * self.cluster_size
        end = min(end, stop)
        place = host
        head: Buffer = b""
        tail: Buffer = b""
        if offset > start:
            if virgin and await self._reads_as_zeroes(start, offset):
                place += offset - start
            else:
                head = await self._read(start, offset - start)
        if end < stop and not (virgin and await self._reads_as_zeroes(end, stop)):
            there = min(stop, self.length)  # beyond the disk's end there are zeroes
            tail = await self._read(end, there - end) if there > end else b""
            if stop > there:
                tail = b"".join((tail, bytes(stop - there)))
        piece: Buffer = memoryview(data)[:end - offset]
        await self.file.pwrite(place, b"".join((head, piece, tail)) if head or tail else piece)
        await self._tables.own(index)
        first = (offset >> self._bits) & self._mask
        self._tables.change(index, first, [(host + (each << self._bits)) | COPIED for each in range(count)])
        return end - offset

    async def _reads_as_zeroes(self, offset: int, end: int) -> bool:
        """Whether a part of one cluster does, as far as metadata tells."""
        run = (await self._tables.runs(offset, end))[0]
        return run.kind is Kind.ZERO or (
            run.kind is Kind.BELOW and (self.backing is None or self.backing.node.length <= offset))

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        end = offset + length
        first = -(-offset >> self._bits) << self._bits
        last = end if end == self.length else end & ~self._within
        if first < last:
            for begin, stop in ((offset, first), (last, end)):
                if begin < stop:
                    await super().write_zeroes(begin, stop - begin)
            await self._zero(first, last, flags)
        else:
            await super().write_zeroes(offset, length)
        if flags & FUA:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Clusters that are wholly in the range read as zeroes. Version 2 can only say so where nothing is below."""
        end = offset + length
        first = -(-offset >> self._bits) << self._bits
        last = end if end == self.length else end & ~self._within
        if first < last:
            await self._zero(first, last, MAY_UNMAP, advice=True)

    async def _zero(self, start: int, stop: int, flags: int, advice: bool = False) -> None:
        """Whole clusters become zero, by their L2 entries if possible."""
        refcounts = self._refcounts
        turn = refcounts.turn
        refcounts.running[turn] += 1
        token = self._lock.try_take(start, stop) or await self._lock.take(start, stop)
        try:
            while start < stop:
                index = start >> self._l2_shift
                end = min(stop, (index + 1) << self._l2_shift)
                if self.header.version < 3 and self.backing is not None and self.backing.node.length > start:
                    if not advice:
                        if flags & FAST:
                            raise not_supported("fast zeroes in an image of version 2 with a backing file")
                        for at in range(start, end, len(ZEROES)):
                            await self._write_locked(at, _zeroes(min(len(ZEROES), end - at)))
                else:
                    await self._zero_entries(index, start, end, bool(flags & MAY_UNMAP))
                start = end
        finally:
            self._lock.give_back(token)
            refcounts.running[turn] -= 1

    async def _write_locked(self, offset: int, data: Buffer) -> None:
        view, done = memoryview(data), 0
        while done < len(data):
            done += await self._write_some(offset + done, view[done:])

    async def _zero_entries(self, index: int, start: int, end: int, unmap: bool) -> None:
        backed = self.backing is not None and self.backing.node.length > start
        if not self._tables.l1[index] and not backed:
            return
        first = (start >> self._bits) & self._mask
        count = -(-(end - start) >> self._bits)
        flag = ZERO if self.header.version >= 3 else 0
        table = await self._tables.own(index)
        entries: list[int] = []
        for old in table[first:first + count]:
            if not old & OFFSET and not (old or backed):
                entries.append(old)  # nothing there, and zeroes below
            elif flag and not unmap and old > COPIED and not old & (self._odd & ~ZERO):
                entries.append(old | flag)  # keeps its place
            else:
                entries.append(flag)
        self._tables.change(index, first, entries)

    async def _pass_discard(self, offset: int, length: int) -> None:
        if self.options.discard == "unmap" and offset + length <= self.file.node.length:
            await self.file.discard(offset, length)

    # --- saving ---

    async def flush(self) -> None:
        if self.read_only:
            return
        before = self._saves
        tables, refcounts = self._tables, self._refcounts
        if not (tables.dirty or tables.l1_dirty or refcounts.dirty or refcounts.retired or self._moving
                or self._saving.locked()):
            await self.file.flush()
        else:
            async with self._saving:
                if self._good_save <= before:
                    await self._save_now()
        await refcounts.reclaim()

    async def _save(self) -> None:
        """Write all metadata that has changed, in the order of the module's head."""
        async with self._saving:
            await self._save_now()

    async def _save_now(self) -> None:
        self._saves = number = self._saves + 1
        tables, refcounts = self._tables, self._refcounts
        # The moment: from here to the first wait nothing changes, and later changes are the next save's.
        kept = (tables.dirty, tables.l1_dirty, refcounts.dirty, refcounts.table_dirty, refcounts.retired)
        moving, table_moved = self._moving, refcounts.table_moved
        blocks = [refcounts.dirty_bytes(index) for index in sorted(refcounts.dirty)]
        table = self._table_bytes(table_moved)
        l2 = [tables.dirty_bytes(index) for index in sorted(tables.dirty)]
        l1 = [(tables.l1_offset, encode_table(tables.l1))] if moving else tables.l1_bytes()
        place = TABLES.pack(len(tables.l1), tables.l1_offset, refcounts.table_offset,
                            len(refcounts.table) * 8 >> self._bits)
        tables.dirty, tables.l1_dirty = {}, set()
        refcounts.dirty, refcounts.table_dirty, refcounts.retired = {}, set(), []
        try:
            await self._write_all(blocks)
            if moving:
                await self._write_all(table + l2 + l1)
                await self.file.flush()
                await self.file.pwrite(AT_L1, place)
                await self.file.flush()
            else:
                if table:
                    await self.file.flush()
                    await self._write_all(table)
                    if table_moved:
                        await self.file.flush()
                        await self.file.pwrite(AT_L1 + 12, place[12:])
                await self.file.flush()
                if l2 or l1:
                    await self._write_all(l2)
                    if l1:
                        if l2:
                            await self.file.flush()
                        await self._write_all(l1)
                    await self.file.flush()
        except BaseException:
            self._put_back(*kept)
            raise
        if table_moved:
            refcounts.table_moved = False
        if moving:
            await self._moved()
        refcounts.made_durable(kept[4])
        self._good_save = number

    def _table_bytes(self, moved: bool) -> list[tuple[int, bytes]]:
        refcounts = self._refcounts
        if moved:
            return [(refcounts.table_offset, encode_table(refcounts.table))]
        return [(refcounts.table_offset + index * 8, refcounts.table[index].to_bytes(8, "big"))
                for index in sorted(refcounts.table_dirty)]

    def _put_back(self, l2: dict[int, tuple[int, int]], l1: set[int], blocks: dict[int, tuple[int, int]],
                  table: set[int], retired: list[int]) -> None:
        """A save has failed: what it would have written is still to be written."""
        tables, refcounts = self._tables, self._refcounts
        for index, (first, end) in l2.items():
            was = tables.dirty.get(index, (first, end))
            tables.dirty[index] = (min(first, was[0]), max(end, was[1]))
        for index, (first, end) in blocks.items():
            refcounts.touched(index, first, end)
        tables.l1_dirty |= l1
        refcounts.table_dirty |= table
        refcounts.retired = retired + refcounts.retired

    async def _write_all(self, pieces: list[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            if offset + len(data) > self._refcounts.file_length:
                await self._refcounts.grow(offset + len(data))
            await self.file.pwrite(offset, data)

    # --- emptying ---

    async def prepare_empty(self) -> Prepared:
        """See `Driver`."""
        if self.header.snapshot_count or self.header.extension(EXT_BITMAPS) is not None:
            raise not_supported("make_empty of an image with internal snapshots or bitmaps")
        if self.read_only:
            raise OSError(errno.EPERM, f"{os.strerror(errno.EPERM)}: the image is read-only")
        entries = max(1, entries_for(self.length, self._bits, self.header.l2_bits))
        return Prepared(lambda: self._empty(entries))

    def _empty(self, entries: int) -> None:
        refcounts, tables, bits = self._refcounts, self._tables, self._bits
        table_clusters = len(refcounts.table) * 8 >> bits
        l1_clusters = -(-entries * 8 >> bits)
        first, count, reserved = self._place_of_set(table_clusters + l1_clusters)
        blocks = self._blocks_of_set(first, count)
        table = array("Q", bytes(len(refcounts.table) * 8))
        for number, index in enumerate(blocks):
            table[index] = (first + table_clusters + l1_clusters + number) << bits
        refcounts.start_again(table, first << bits, [0, *range(first, first + count)], reserved)
        tables.l1 = array("Q", bytes(entries * 8))
        tables.l1_offset = (first + table_clusters) << bits
        tables.l1_dirty, tables.dirty = set(), {}
        tables.l2.clear()
        self._unpacked.clear()
        self._slot, self._moving = (first, count), True

    def _place_of_set(self, clusters: int) -> tuple[int, int, tuple[int, int]]:
        """Where the new set of tables goes, (first cluster, count), and what is kept free for the next one.

        Two places of the same length, in turns: so the file does not grow with each time. ``clusters``: of the refcount
        table and L1; the refcount blocks that cover the header and the set itself are added.
        """
        refcounts = self._refcounts
        spare = refcounts.reserved
        if self._slot is not None:
            first, count = self._slot if self._moving else (spare[0], spare[1] - spare[0])
            if clusters + len(self._blocks_of_set(first, count)) <= count:
                return first, count, spare if self._moving else (self._slot[0], self._slot[0] + self._slot[1])
        first = refcounts.end
        count = clusters + 1
        # The spare place, behind, may lie across one more border of blocks.
        while clusters + len(self._blocks_of_set(first, 2 * count)) > count:
            count += 1
        return first, count, (first + count, first + 2 * count)

    def _blocks_of_set(self, first: int, count: int) -> list[int]:
        bits = self.header.block_bits
        return sorted({0, *range(first >> bits, ((first + count - 1) >> bits) + 1)})

    async def _moved(self) -> None:
        """The header refers to the new set: what was in use before is free."""
        self._moving = False
        for first, count in self._refcounts.dropped() if self.options.discard == "unmap" else ():
            await self._pass_discard(first << self._bits, count << self._bits)
        self._refcounts.start_is_durable()

    # --- control ---

    async def truncate(self, length: int) -> None:
        """See `Driver`. Durable at return."""
        if self.header.snapshot_count and self.header.version < 3:
            raise not_supported("resize of an image of version 2 with internal snapshots")
        token = self._lock.try_take(0, _EVERYTHING) or await self._lock.take(0, _EVERYTHING)
        try:
            before = self.length
            if length > before:
                await self._lengthen_l1(length)
            await self._settle()
            await self.file.pwrite(24, length.to_bytes(8, "big"))
            await self.file.flush()
            self.length = length
            self.header = replace(self.header, size=length, l1_size=len(self._tables.l1),
                                  l1_table_offset=self._tables.l1_offset)
        finally:
            self._lock.give_back(token)
        if length < before:
            first = -(-length >> self._bits) << self._bits
            if first < before:
                await self._drop(first, before)
        else:
            edge = min(-(-before >> self._bits) << self._bits, length)
            if edge > before and not await self._reads_as_zeroes(before, edge):  # left over in the last cluster
                await super().write_zeroes(before, edge - before)
            below = 0 if self.backing is None else min(self.backing.node.length, length)
            if below > edge:
                await self.write_zeroes(edge, below - edge, MAY_UNMAP)
        await self.flush()

    async def _lengthen_l1(self, length: int) -> None:
        tables, refcounts, bits = self._tables, self._refcounts, self._bits
        needed = entries_for(length, bits, self.header.l2_bits)
        if needed * 8 > MOST_L1:
            raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}: the L1 table would be longer than {MOST_L1} bytes")
        if needed <= len(tables.l1):
            return
        clusters = -(-needed * 8 >> bits)
        offset, _, _ = await refcounts.allocate(clusters, exactly=True)
        await self._save()  # the refcounts; and L1 as it is, so that the header can change alone
        grown = tables.l1[:]
        grown.extend([0] * (needed - len(grown)))
        await self._write_all([(offset, encode_table(grown).ljust(clusters << bits, b"\0"))])
        await self.file.flush()
        await self.file.pwrite(AT_L1, TABLES.pack(needed, offset, 0, 0)[:12])
        await self.file.flush()
        old = range(tables.l1_offset >> bits, (tables.l1_offset >> bits) + -(-len(tables.l1) * 8 >> bits))
        tables.l1, tables.l1_offset = grown, offset
        refcounts.made_durable(list(old))

    async def _drop(self, start: int, stop: int) -> None:
        """Forget the clusters from ``start`` on, which is beyond the end."""
        tables = self._tables
        token = self._lock.try_take(start, stop) or await self._lock.take(start, stop)
        try:
            while start < stop:
                index = start >> self._l2_shift
                end = min(stop, (index + 1) << self._l2_shift)
                if tables.l1[index]:
                    await tables.own(index)
                    first, count = (start >> self._bits) & self._mask, -(-(end - start) >> self._bits)
                    tables.change(index, first, [0] * count)
                start = end
        finally:
            self._lock.give_back(token)

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        prepared = await super().prepare_reopen(options)
        if options["read-only"] and not self.read_only:
            await self._settle()
        elif not options["read-only"] and self.read_only:
            # Who reads keeps no writer out: the image may be another by now.
            header = await self._load_header()
            self._check_writable(header)
            fresh = await self._load_tables(header)
            if header.size != self.length or header.autoclear or await fresh[0].uses_beyond_end():
                raise OptionError("read-only", False, f"on: the image of '{self.name}' was changed by others, in a way "
                                                      "that only opening it anew takes account of")
            return Prepared(lambda: self._reload(header, *fresh))
        return prepared

    def _reload(self, header: Header, refcounts: Refcounts, tables: Tables) -> None:
        self._unpacked.clear()
        self._use(header, refcounts, tables)


def _zeroes(length: int) -> Buffer:
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)
