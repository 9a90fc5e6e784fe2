"""Reading: runs of the L2 tables, each from where it lies: the data file, the backing node, compressed data, nowhere.

A read of plain data inside of one cluster, whose L2 table is in memory, goes straight to the data file (`begin_read`),
which is ``file`` itself unless the image has an external one; so does one of allocated subclusters. All others take the
way through `Tables.runs`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from types import CoroutineType
from typing import Any, Final, TypeVar

from blockstep.aio.pool import in_thread
from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import ZEROES, Buffer, Driver, Extent
from blockstep.block.node import Child
from blockstep.drivers.qcow2.compressed import decompress
from blockstep.drivers.qcow2.format import COPIED, OFFSET, RAW_EXTERNAL, ZERO, Header, compressed_place
from blockstep.drivers.qcow2.refcounts import Refcounts, read_file
from blockstep.drivers.qcow2.tables import PARTIAL, Kind, Run, Tables

T = TypeVar("T")

#: Beyond any disk's end.
EVERYTHING: Final = 1 << 63
#: Unpacked clusters that are kept: requests of 4 KiB to one cluster unpack it once.
_UNPACKED: Final = 4
#: Bytes from which on a cluster is unpacked in a thread.
_LONG_UNPACK: Final = 256 << 10


class Reader(Driver):
    """The part of the driver that reads, and what all parts have."""

    file: Child
    backing: Child | None = None
    data_file: Child | None = None
    #: Where plain data lies: ``data_file``, or else ``file``.
    _data: Child
    header: Header
    _refcounts: Refcounts
    _tables: Tables
    #: Ranges of the disk whose clusters are being allocated, cleared or copied.
    _lock: RangeLock
    _unpacked: dict[int, bytes]
    #: Nothing shows through from here on: the backing node ended there when the disk grew, and may have grown since.
    _below_end: int = EVERYTHING
    #: Zeroes are noted also where nothing is below: the image is about to have another backing image.
    notes_all_zeroes: bool = False

    def _below(self) -> int:
        """Bytes of the backing node that show through, from the beginning."""
        return 0 if self.backing is None else min(self.backing.node.length, self._below_end)

    def _hides(self, start: int) -> bool:
        """Whether zeroes from there on have to hide something."""
        return self.notes_all_zeroes or self._below() > start

    #: Bytes that can be zero, or the backing node's, on their own: a cluster or a subcluster.
    _unit: int
    #: Whether the external data file is to read as the disk at any moment.
    _raw_data: bool

    def _use(self, header: Header, refcounts: Refcounts, tables: Tables) -> None:
        self.header, self._refcounts, self._tables = header, refcounts, tables
        self.length, self.cluster_size = header.size, header.cluster_size
        self._l2, self._l2_shift = tables.l2, tables.l2_shift
        self._bits, self._mask, self._within = header.cluster_bits, tables.mask, header.cluster_size - 1
        self._odd = tables.odd
        self._unit = header.cluster_size >> (5 if header.extended_l2 else 0)
        #: An entry that is not odd has a place of its own from here on.
        self._least = COPIED if tables.external else COPIED + 1
        #: The flag of an entry with a place that may not be written to as it is: some of it reads as something else.
        self._of_place = PARTIAL if header.extended_l2 else ZERO
        self._raw_data = bool(header.autoclear & RAW_EXTERNAL)
        self._data = self.data_file or self.file

    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]:
        within = offset & self._within
        table = self._l2.get(offset >> self._l2_shift)
        if table is not None and within + length <= self.cluster_size:
            entry = table[(offset >> self._bits) & self._mask]
            if not entry & self._odd and entry & OFFSET:
                host = (entry & OFFSET) + within
                if host + length <= self._refcounts.data_length:
                    found = self._data.begin_read(host, length)
                    return self._running(found) if found.__class__ is CoroutineType else found
        if self._tables.extended and (host := self._place(offset, length, own=False)) >= 0:
            found = self._data.begin_read(host, length)
            return self._running(found) if found.__class__ is CoroutineType else found
        return self._running(self._read(offset, length))

    async def pread(self, offset: int, length: int) -> Buffer:
        found = Reader.begin_read(self, offset, length)
        return await found if found.__class__ is CoroutineType else found  # type: ignore[return-value]

    async def _running(self, request: Awaitable[T]) -> T:
        """Do a request that may wait: what it uses is not given to others meanwhile."""
        refcounts = self._refcounts
        turn = refcounts.turn
        refcounts.running[turn] += 1
        try:
            return await request
        finally:
            refcounts.running[turn] -= 1

    def _place(self, offset: int, length: int, own: bool) -> int:
        """Where a range inside of one cluster lies, if all of its subclusters are allocated; else -1.

        ``own``: only if the cluster, and the L2 table, may be written to.
        """
        index, within = offset >> self._l2_shift, offset & self._within
        table = self._l2.get(index)
        if table is None or within + length > self.cluster_size:
            return -1
        tables = self._tables
        at = (offset >> self._bits) & self._mask
        entry = table[at]
        if entry & self._odd != PARTIAL or not entry & tables.placed:
            return -1
        shift = self._bits - 5
        wanted = (2 << (within + length - 1 >> shift)) - (1 << (within >> shift))
        if tables.maps[index][at] & (wanted << 32 | wanted) != wanted:
            return -1
        if own and not entry & tables.l1[index] & COPIED:
            return -1
        host = (entry & OFFSET) + within
        return host if host + length <= self._refcounts.data_length else -1

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
            if run.host + run.length <= self._refcounts.data_length:
                return await self._data.pread(run.host, run.length)
            return await read_file(self._data, run.host, run.length)
        if run.kind is Kind.BELOW:
            return await self._read_below(offset, run.length)
        if run.kind is Kind.PACKED:
            within = offset & self._within
            return (await self._unpack(run.host))[within:within + run.length]
        return zeroes(run.length)

    async def _read_below(self, offset: int, length: int) -> Buffer:
        there = self._below() - offset
        if self.backing is None or there <= 0:
            return zeroes(length)
        if there >= length:
            return await self.backing.pread(offset, length)
        return b"".join((await self.backing.pread(offset, there), bytes(length - there)))

    async def _unpack(self, entry: int) -> bytes:
        data = self._unpacked.get(entry)
        if data is None:
            place, span = compressed_place(entry, self._bits)
            if place >= self._refcounts.file_length:
                raise self._refcounts.broken(f"a compressed cluster is said to be at {place:#x}", place, span)
            packed = await read_file(self.file, place, span)
            kind, size = self.header.compression_type, self.cluster_size
            try:
                data = (decompress(kind, packed, size) if size < _LONG_UNPACK
                        else await in_thread(decompress, kind, packed, size))
            except ValueError as error:
                raise self._refcounts.broken(f"the compressed cluster at {place:#x} cannot be unpacked: {error}",
                                             place, span) from error
            while len(self._unpacked) >= _UNPACKED:
                del self._unpacked[next(iter(self._unpacked))]
            self._unpacked[entry] = data
        return data

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        for run in await self._tables.runs(offset, offset + length):
            if run.kind is Kind.BELOW:
                below = max(0, min(run.length, self._below() - offset))
                if below:
                    extents.append(Extent(below, data=False, allocated=False))
                if run.length > below:
                    hides = offset + below >= self._below_end
                    extents.append(Extent(run.length - below, data=False, zero=True, allocated=hides))
            elif run.kind is Kind.ZERO:
                extents.append(Extent(run.length, data=False, zero=True))
            elif run.kind is Kind.DATA and self.data_file is not None:
                extents += await self._status_of_data(run.host, run.length)
            else:
                extents.append(Extent(run.length))
            offset += run.length
        return extents

    async def _status_of_data(self, place: int, length: int) -> list[Extent]:
        """What an external data file says of a run: its holes are zeroes."""
        extents: list[Extent] = []
        end = place + length
        while place < end:
            for extent in await self._data.block_status(place, end - place):
                extents.append(Extent(extent.length, data=extent.data, zero=extent.zero))
                place += extent.length
        return extents

    async def places(self, offset: int, length: int) -> list[tuple[int, int | None]]:
        """Where a range lies in the data file: runs of (bytes, offset in it), None for what does not lie as it is."""
        found: list[tuple[int, int | None]] = []
        end = offset + length
        while offset < end:
            for run in await self._tables.runs(offset, end):
                found.append((run.length, run.host if run.kind is Kind.DATA else None))
                offset += run.length
        return found


def zeroes(length: int) -> Buffer:
    """So many of them."""
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)
