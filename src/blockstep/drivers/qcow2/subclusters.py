"""Writing where L2 entries are extended: a cluster is 32 subclusters, each allocated, zero, or the backing node's.

What is written allocates the subclusters that it touches, and copies at most the rest of the first and of the last one.
The others of a new cluster stay what they are; only if the old cluster is shared, or compressed, what it holds comes
along, because a cluster has one place. Zeroes and discards go by subclusters too, except in compressed clusters.
"""

from __future__ import annotations

from collections.abc import Iterator

from blockstep.block.driver import Buffer
from blockstep.drivers.qcow2.format import COMPRESSED, COPIED, Subclusters
from blockstep.drivers.qcow2.saving import Saver
from blockstep.drivers.qcow2.tables import ALLOCATED, PARTIAL, ZEROED, Kind


class SubclusterWriter(Saver):
    """The part of the driver that writes to images with extended L2 entries; all of it under the lock of the range."""

    async def _fill_subclusters(self, index: int, offset: int, data: Buffer, end: int, host: int, count: int,
                                virgin: bool, new: bool) -> int:
        """As `Writer._fill`. ``new``: nothing of what the clusters hold is at ``host`` yet."""
        tables, unit = self._tables, self._unit
        start = offset & ~self._within
        end = min(end, start + count * self.cluster_size)
        left, right = offset & -unit, -(-end // unit) * unit
        first = (offset >> self._bits) & self._mask
        old = [self._subclusters(index, first + each) for each in range(count)]
        maps: list[int] = []
        copied: list[tuple[int, int]] = []
        for each, bitmap in enumerate(old):
            allocated, zero = bitmap.allocated, bitmap.zero
            cluster = start + each * self.cluster_size
            touched = self._touched(cluster, left, right)
            if new:
                copied += ((cluster + low, cluster + high) for low, high in self._ranges(allocated & ~touched))
            maps.append(Subclusters(allocated | touched, zero & ~touched).build())
        head, tail = offset > left, end < right
        if not new:  # what is there of the first and the last subcluster stays
            head = head and not old[0].allocated >> (left - start) // unit & 1
            tail = tail and not old[0].allocated >> (right - start) // unit - 1 & 1
        if head and virgin and await self._reads_as_zeroes(left, offset):
            head = False
        if tail and virgin and await self._reads_as_zeroes(end, right):
            tail = False
        pieces: list[Buffer] = [memoryview(data)[:end - offset]]
        if head:
            pieces.insert(0, await self._read(left, offset - left))
        if tail:
            pieces.append(await self._read_padded(end, right))
        place = (left if head else offset) - start + host
        await self._data.pwrite(place, b"".join(pieces) if len(pieces) > 1 else pieces[0])
        for low, high in copied:
            if held := await self._read_padded(low, high):
                await self._data.pwrite(low - start + host, held)
        await tables.own(index)
        tables.change(index, first, [(host + (each << self._bits)) | COPIED for each in range(count)], maps)
        return end - offset

    def _subclusters(self, index: int, at: int) -> Subclusters:
        if self._tables.l2[index][at] & COMPRESSED:
            return Subclusters(ALLOCATED, 0)
        return self._tables.subclusters(index, at)

    def _touched(self, cluster: int, start: int, end: int) -> int:
        """The subclusters of a cluster that lie between two borders of subclusters."""
        low = max(start - cluster, 0) // self._unit
        high = min((end - cluster) // self._unit, 32)
        return (1 << high) - (1 << low)

    def _ranges(self, bitmap: int) -> Iterator[tuple[int, int]]:
        """The subclusters in a bitmap as ranges of bytes, from the cluster's start on."""
        low = 0
        while bitmap >> low:
            low += ((bitmap >> low) & -(bitmap >> low)).bit_length() - 1
            ones = ~(bitmap >> low)
            high = low + (ones & -ones).bit_length() - 1
            yield low * self._unit, high * self._unit
            low = high

    async def _read_padded(self, offset: int, end: int) -> Buffer:
        """A part of a cluster; beyond the disk's end there are zeroes, and nothing if an external file ends there."""
        there = min(end, self.length)
        data = await self._read(offset, there - offset) if there > offset else b""
        return data if there == end or self.data_file is not None else b"".join((data, bytes(end - max(there, offset))))

    async def _reads_as_zeroes(self, offset: int, end: int) -> bool:
        """Whether a part of one cluster does, as far as metadata tells."""
        for run in await self._tables.runs(offset, end):
            if run.kind is not Kind.ZERO and not (
                    run.kind is Kind.BELOW and self._below() <= offset):
                return False
            offset += run.length
        return True

    async def _zero_subclusters(self, index: int, start: int, end: int, unmap: bool) -> list[tuple[int, int]]:
        """As `Writer._zero_entries`. Returns the ranges that must be written: parts of compressed clusters."""
        tables = self._tables
        backed = self._hides(start)
        if not tables.l1[index] and not backed:
            return []
        table = await tables.own(index)
        first = (start >> self._bits) & self._mask
        stop = end if end < self.length else -(-end // self.cluster_size) * self.cluster_size
        entries: list[int] = []
        maps: list[int] = []
        written: list[tuple[int, int]] = []
        for each, cluster in enumerate(range(start & ~self._within, end, self.cluster_size)):
            entry, bitmap = table[first + each], tables.maps[index][first + each]
            touched = self._touched(cluster, start, stop)
            if entry & COMPRESSED and touched != ALLOCATED:
                written.append((max(cluster, start), min(cluster + self.cluster_size, end)))
            elif entry & COMPRESSED:
                entry, bitmap = 0, ZEROED
            elif entry or bitmap or backed:
                old = tables.subclusters(index, first + each)
                bitmap = Subclusters(old.allocated & ~touched, old.zero | touched).build()
                if unmap and not bitmap & ALLOCATED:
                    entry = 0
            entries.append(entry & ~PARTIAL if not entry & COMPRESSED else entry)
            maps.append(bitmap)
        tables.change(index, first, entries, maps)
        return written
