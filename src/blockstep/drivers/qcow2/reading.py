"""Reading: runs of the L2 tables, each from where it lies: the file, the backing node, compressed data, nowhere.

A read of plain data inside of one cluster, whose L2 table is in memory, goes straight to the file (`begin_read`);
all others take the way through `Tables.runs`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from types import CoroutineType
from typing import Any, Final, ParamSpec, TypeVar

from blockstep.aio.pool import in_thread
from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import ZEROES, Buffer, Driver, Extent
from blockstep.block.node import Child
from blockstep.drivers.qcow2.compressed import decompress
from blockstep.drivers.qcow2.format import OFFSET, Header, compressed_place
from blockstep.drivers.qcow2.refcounts import Refcounts, broken, read_file
from blockstep.drivers.qcow2.tables import Kind, Run, Tables

P = ParamSpec("P")
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
    header: Header
    _refcounts: Refcounts
    _tables: Tables
    #: Ranges of the disk whose clusters are being allocated, cleared or copied.
    _lock: RangeLock
    _unpacked: dict[int, bytes]
    #: Nothing shows through from here on: the backing node ended there when the disk grew, and may have grown since.
    _below_end: int = EVERYTHING

    def _below(self) -> int:
        """Bytes of the backing node that show through, from the beginning."""
        return 0 if self.backing is None else min(self.backing.node.length, self._below_end)

    def _use(self, header: Header, refcounts: Refcounts, tables: Tables) -> None:
        self.header, self._refcounts, self._tables = header, refcounts, tables
        self.length, self.cluster_size = header.size, header.cluster_size
        self._l2, self._l2_shift = tables.l2, tables.l2_shift
        self._bits, self._mask, self._within = header.cluster_bits, tables.mask, header.cluster_size - 1
        # With extended entries nothing is plain.
        self._odd = tables.odd if not header.extended_l2 else (1 << 64) - 1

    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]:
        within = offset & self._within
        table = self._l2.get(offset >> self._l2_shift)
        if table is not None and within + length <= self.cluster_size:
            entry = table[(offset >> self._bits) & self._mask]
            if not entry & self._odd and entry & OFFSET:
                host = (entry & OFFSET) + within
                if host + length <= self._refcounts.file_length:
                    found = self.file.begin_read(host, length)
                    if found.__class__ is not CoroutineType:
                        return found
                    found.close()
                    return self._running(self.file.pread, host, length)
        return self._running(self._read, offset, length)

    async def pread(self, offset: int, length: int) -> Buffer:
        found = Reader.begin_read(self, offset, length)
        return await found if found.__class__ is CoroutineType else found  # type: ignore[return-value]

    async def _running(self, request: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do a request that may wait: what it uses is not given to others meanwhile."""
        refcounts = self._refcounts
        turn = refcounts.turn
        refcounts.running[turn] += 1
        try:
            return await request(*args, **kwargs)
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
                below = max(0, min(run.length, self._below() - offset))
                if below:
                    extents.append(Extent(below, data=False, allocated=False))
                if run.length > below:
                    hides = offset + below >= self._below_end
                    extents.append(Extent(run.length - below, data=False, zero=True, allocated=hides))
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


def zeroes(length: int) -> Buffer:
    """So many of them."""
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)
