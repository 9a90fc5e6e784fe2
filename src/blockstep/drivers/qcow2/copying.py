"""Copies past the event loop, of clusters that lie in a row in the file, and into clusters that have no place yet.

Into these a thread reads, looks for zeroes and writes. The places are taken before anybody knows what is zero; those
that turn out not to be needed are given back, and since nothing refers to them before the copy has ended, a crash
leaves no more than leaks, as with every write.
"""

from __future__ import annotations

from array import array

from blockstep.aio.copying import copy_pieces
from blockstep.aio.pool import in_thread
from blockstep.aio.posix import write_whole
from blockstep.drivers.file import File
from blockstep.drivers.qcow2.format import COPIED, EXTERNAL_DATA, OFFSET
from blockstep.drivers.qcow2.writing import Writer

Runs = list[tuple[int, bool]]


class Copier(Writer):
    """The part of the driver that takes in what lies in other files."""

    def raw_range(self, offset: int, length: int) -> tuple[int, int] | None:
        """See `Driver`. Of an image that is open for reading only: no cluster is freed and used again meanwhile."""
        if not self.read_only or not length:
            return None
        host = end = -1
        at, stop = offset & ~self._within, offset + length
        while at < stop:
            index, first = at >> self._l2_shift, (at >> self._bits) & self._mask
            count = min(-(-(stop - at) >> self._bits), self._mask + 1 - first)
            table = self._l2.get(index)
            entry = table[first] if table is not None else 0
            if table is None or entry & self._odd or not entry & OFFSET or end not in (-1, entry & OFFSET):
                return None
            size = self.cluster_size
            if table[first:first + count] != array("Q", range(entry, entry + count * size, size)):
                return None
            if host < 0:
                host = entry & OFFSET
            end = (entry & OFFSET) + count * size
            at += count * size
        place = host + (offset & self._within)
        return None if place + length > self._refcounts.data_length else self._data.node.raw_range(place, length)

    async def copy_in(self, of: tuple[int, int], offset: int, length: int, piece: int) -> Runs | None:
        """See `Driver`. Whole clusters without a place only, of an image in a plain file."""
        end = offset + length
        file = self.file.node
        if (self.header.extended_l2 or self.header.incompatible & EXTERNAL_DATA or offset & self._within
                or (end & self._within and end != self.length) or piece & self._within
                or not isinstance(file, File) or file.watchers or file.is_direct):
            return None
        return await self._running(self._copy_in(file, of, offset, end, piece))

    async def _copy_in(self, file: File, of: tuple[int, int], offset: int, end: int, piece: int) -> Runs | None:
        stop = -(-end >> self._bits) << self._bits
        token = self._lock.try_take(offset, stop) or await self._lock.take(offset, stop)
        try:
            if not await self._has_no_place(offset, end):
                return None
            runs: Runs = []
            at = offset
            while at < end:
                for run in await self._copy_some(file, (of[0], of[1] + at - offset), at, end, piece):
                    runs.append(run)
                    at += run[0]
            return runs
        finally:
            self._lock.give_back(token)

    async def _has_no_place(self, offset: int, end: int) -> bool:
        while offset < end:
            index = offset >> self._l2_shift
            stop = min(end, (index + 1) << self._l2_shift)
            table = await self._tables.table(index)
            if table is not None:
                first = (offset >> self._bits) & self._mask
                if any(table[first:first + (-(-(stop - offset) >> self._bits))]):
                    return False
            offset = stop
        return True

    async def _copy_some(self, file: File, of: tuple[int, int], offset: int, end: int, piece: int) -> Runs:
        """As many clusters as find a place in a row, of one L2 table."""
        index = offset >> self._l2_shift
        end = min(end, (index + 1) << self._l2_shift)
        await self._tables.own(index)
        host, count, virgin = await self._refcounts.allocate(-(-(end - offset) >> self._bits))
        length = min(end - offset, count << self._bits)
        try:
            runs = await in_thread(copy_pieces, of, (file.fd, host), length, piece)
            if length < count << self._bits and not virgin and not runs[-1][1]:
                await in_thread(write_whole, file.fd, bytes((count << self._bits) - length), host + length)
            await self._tables.own(index)
        except BaseException:
            await self._refcounts.release(host, count)
            raise
        first = (offset >> self._bits) & self._mask
        for size, zero in runs:
            clusters = -(-size >> self._bits)
            if zero:
                await self._refcounts.release(host, clusters)
            else:
                await self._tables.own(index)
                entries = range(host | COPIED, (host | COPIED) + (clusters << self._bits), self.cluster_size)
                self._tables.change(index, first, list(entries))
            first, host = first + clusters, host + (clusters << self._bits)
        return runs
