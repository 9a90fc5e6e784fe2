"""Writing: data, zeroes and discards.

A write into a cluster of its own (the COPIED flag) goes there directly, without a lock. All others take the range
of their clusters: new clusters are written whole (what the write leaves out comes from below, or is left as the hole
that it is in a file that has just grown), then the L2 entry changes in memory. Two writes to one cluster take turns.
With extended L2 entries it is subclusters that are written whole: `subclusters`.

**An external data file** has a place for each cluster of the disk, at the disk's own offset: nothing is looked for or
given back there. If it is *raw*, whoever reads it without the image shall see the disk, at any moment: zeroes are
written into it rather than noted in L2 entries, and a discard is passed on to it and changes no entry. All entries say
that the data is there; where another program has left some that do not, they come to do so before the first write.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable
from typing import Final

from blockstep.block.driver import FAST, FUA, MAY_UNMAP, ZEROES, Buffer, not_supported
from blockstep.drivers.qcow2.format import COPIED, OFFSET, ZERO
from blockstep.drivers.qcow2.reading import zeroes
from blockstep.drivers.qcow2.subclusters import SubclusterWriter
from blockstep.drivers.qcow2.tables import ALLOCATED

#: Bytes that one step of a write allocates at most: bounds what is copied, and how long the range is held.
_PIECE: Final = 2 << 20


class Writer(SubclusterWriter):
    """The part of the driver that writes."""

    def begin_write(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        length = len(data)
        within = offset & self._within
        table = self._l2.get(offset >> self._l2_shift)
        if table is not None and within + length <= self.cluster_size:
            entry = table[(offset >> self._bits) & self._mask]
            if entry > COPIED and not entry & self._odd and self._tables.l1[offset >> self._l2_shift] & COPIED:
                host = (entry & OFFSET) + within
                if host + length <= self._refcounts.data_length:
                    writing = self._data.begin_write(host, data)
                    return None if writing is None else self._running(writing)
        if self._tables.extended and (host := self._place(offset, length, own=True)) >= 0:
            writing = self._data.begin_write(host, data)
            return None if writing is None else self._running(writing)
        return self._running(self._write(offset, data))

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        writing = Writer.begin_write(self, offset, data)
        if writing is not None:
            await writing
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
        if entry >= self._least and not entry & self._odd:
            return await self._write_in_place(table, offset, data, end)
        if self._raw_data:
            await self._allocate_all(index << self._l2_shift, min((index + 1) << self._l2_shift, self.length))
            await self._save()  # so that after a crash the disk reads as the data file does
            return await self._write_some(offset, data)
        # Clusters that need a place; the first and last may need the rest of their content.
        count = 1
        first = (offset >> self._bits) & self._mask
        total = ((end - 1) >> self._bits & self._mask) - first + 1
        while count < total:
            entry = table[first + count]
            if entry >= self._least and not entry & self._odd:
                break
            count += 1
        old, virgin = table[first], False
        has_place = old >= self._least and not old & (self._odd & ~self._of_place)
        if has_place:
            host, count = old & OFFSET, 1
            if host >= self._refcounts.data_length:
                raise self._refcounts.broken(f"data of the disk's byte {offset} is said to be at {host:#x}", host)
            await self._refcounts.reach(host + self.cluster_size)
        elif self.data_file is not None:
            host = offset & ~self._within
        else:
            host, count, virgin = await self._refcounts.allocate(count)
        try:
            if self._tables.extended:
                return await self._fill_subclusters(index, offset, data, end, host, count, virgin, not has_place)
            return await self._fill(index, offset, data, end, host, count, virgin)
        except BaseException:
            if not has_place and self.data_file is None:
                await self._refcounts.release(host, count)
            raise

    async def _allocate_all(self, start: int, end: int) -> None:
        """Let the entries of all clusters of a range say that their data is in the external data file."""
        tables = self._tables
        start = -(-start >> self._bits) << self._bits
        while start < end:
            index = start >> self._l2_shift
            stop = min(end, (index + 1) << self._l2_shift)
            await tables.own(index)
            first, places = (start >> self._bits) & self._mask, range(start, stop, self.cluster_size)
            tables.change(index, first, [place | COPIED for place in places], [ALLOCATED] * len(places))
            start = stop

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
        if place >= self._refcounts.data_length + self.cluster_size:
            raise self._refcounts.broken(f"data of the disk's byte {offset} is said to be at {place:#x}", place, length)
        await self._refcounts.reach(place + length)
        await self._data.pwrite(place, memoryview(data)[:length])
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
            tail = await self._read_padded(end, stop)
        piece: Buffer = memoryview(data)[:end - offset]
        await self._data.pwrite(place, b"".join((head, piece, tail)) if head or tail else piece)
        await self._tables.own(index)
        first = (offset >> self._bits) & self._mask
        self._tables.change(index, first, [(host + (each << self._bits)) | COPIED for each in range(count)])
        return end - offset

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        end = offset + length
        first, last = -(-offset // self._unit) * self._unit, end if end == self.length else end & -self._unit
        if self._raw_data:
            await self._data.write_zeroes(offset, length, flags & ~FUA)
        elif first < last:
            for begin, stop in ((offset, first), (last, end)):
                if begin < stop:
                    await super().write_zeroes(begin, stop - begin)
            await self._running(self._zero(first, last, flags))
        else:
            await super().write_zeroes(offset, length)
        if flags & FUA:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Clusters that are wholly in the range read as zeroes. Version 2 can only say so where nothing is below."""
        end = offset + length
        first, last = -(-offset // self._unit) * self._unit, end if end == self.length else end & -self._unit
        if self._raw_data:
            if self.options.discard == "unmap":
                await self._data.discard(offset, length)
        elif first < last:
            await self._running(self._zero(first, last, MAY_UNMAP, advice=True))

    async def _zero(self, start: int, stop: int, flags: int, advice: bool = False) -> None:
        """Whole clusters, or subclusters, become zero, by their L2 entries if possible."""
        first, last = start & ~self._within, -(-stop >> self._bits) << self._bits
        token = self._lock.try_take(first, last) or await self._lock.take(first, last)
        try:
            await self._zero_locked(start, stop, flags, advice)
        finally:
            self._lock.give_back(token)

    async def _zero_locked(self, start: int, stop: int, flags: int, advice: bool = False) -> None:
        while start < stop:
            index = start >> self._l2_shift
            end = min(stop, (index + 1) << self._l2_shift)
            if self.header.version < 3 and self._hides(start):
                if not advice:
                    if flags & FAST:
                        raise not_supported("fast zeroes in an image of version 2 with a backing file")
                    for at in range(start, end, len(ZEROES)):
                        await self._write_locked(at, zeroes(min(len(ZEROES), end - at)))
                start = end
                continue
            if self.data_file is not None and flags & MAY_UNMAP and self.options.discard == "unmap":
                await self._data.discard(start, end - start)
            if self._tables.extended:
                for at, to in await self._zero_subclusters(index, start, end, bool(flags & MAY_UNMAP)):
                    await self._write_locked(at, zeroes(to - at))
            else:
                await self._zero_entries(index, start, end, bool(flags & MAY_UNMAP))
            start = end

    async def _write_locked(self, offset: int, data: Buffer) -> None:
        view, done = memoryview(data), 0
        while done < len(data):
            done += await self._write_some(offset + done, view[done:])

    async def _zero_entries(self, index: int, start: int, end: int, unmap: bool) -> None:
        backed = self._hides(start)
        if not self._tables.l1[index] and not backed:
            return
        first = (start >> self._bits) & self._mask
        count = -(-(end - start) >> self._bits)
        flag = ZERO if self.header.version >= 3 else 0
        table = await self._tables.own(index)
        entries: list[int] = []
        for old in table[first:first + count]:
            if not (old or backed):
                entries.append(old)  # nothing there, and zeroes below
            elif flag and not unmap and old >= self._least and not old & (self._odd & ~ZERO):
                entries.append(old | flag)  # keeps its place
            else:
                entries.append(flag)
        self._tables.change(index, first, entries)
