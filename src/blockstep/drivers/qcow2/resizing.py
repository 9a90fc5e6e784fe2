"""Resizing: the disk becomes longer or shorter, durably, whatever its clusters hold.

What is added reads as zeroes, and does before the header has the new length: what the last cluster still has of an
earlier, longer disk is cleared, and what a resize that was cut short left behind the end is forgotten. What the backing
node has there is hidden, also what it comes to have there when it grows later. That lasts until the image is closed or
emptied: no field of the format could say so. An L1 table that is too short is replaced, which is one write of the
header.
An external data file is never shorter than the disk: it grows before, and shrinks afterwards.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from blockstep.block.driver import MAY_UNMAP, not_supported
from blockstep.block.node import Child
from blockstep.drivers.qcow2.format import (
    AT_L1,
    AT_SIZE,
    COMPRESSED,
    COPIED,
    MOST_L1,
    TABLES,
    encode_table,
    entries_for,
)
from blockstep.drivers.qcow2.reading import EVERYTHING, zeroes
from blockstep.drivers.qcow2.tables import ALLOCATED
from blockstep.drivers.qcow2.writing import Writer
from blockstep.errors import noting

#: Bytes of the disk that are given a place in one step: bounds how long the range is held.
_PIECE: Final = 64 << 20


class Resizer(Writer):
    """The part of the driver that resizes."""

    async def truncate(self, length: int) -> None:
        """See `Driver`. Durable at return."""
        if self.header.snapshot_count and self.header.version < 3:
            raise not_supported("resize of an image of version 2 with internal snapshots")
        token = self._lock.try_take(0, EVERYTHING) or await self._lock.take(0, EVERYTHING)
        try:
            if length > self.length:
                await self._lengthen(length)
            else:
                await self._shorten(length)
        finally:
            self._lock.give_back(token)

    async def _lengthen(self, length: int) -> None:
        before, data = self.length, self.data_file
        file_length = data.node.length if data else 0
        try:
            if data is not None:
                await self._lengthen_data(data, before, length)
            await self._lengthen_l1(length)
            if self._raw_data:
                await self._allocate_all(before, length)
            else:
                await self._clear(before, length)
            await self._settle()
            await self._write_size(length)
        except BaseException as error:
            with noting(error):
                if self._header_in_doubt:
                    await self._save()
                if data is not None and data.node.length != file_length:
                    await self._shorten_data(data, file_length)
            raise
        if self.backing is not None and self._below() < length:
            self._below_end = self._below()

    async def _clear(self, before: int, length: int) -> None:
        """Let what is behind the disk's end, up to ``length``, read as zeroes."""
        start = -(-before >> self._bits) << self._bits
        edge = min(start, length)
        if edge > before and not await self._reads_as_zeroes(before, edge):  # left over in the last cluster
            await self._write_locked(before, zeroes(edge - before))
        await self._drop(start, length)
        below = -(-min(self._below(), length) >> self._bits) << self._bits
        if below > start:
            await self._zero_locked(start, below, 0)

    async def _shorten(self, length: int) -> None:
        before = self.length
        await self._settle()
        await self._write_size(length)
        await self._drop(length, before)
        if self.data_file is not None:
            await self._shorten_data(self.data_file, length)
        await self.flush()

    async def _write_size(self, length: int) -> None:
        """Durable at return. If it fails the disk keeps its length, and the next save puts the header right."""
        await self._write_field(AT_SIZE, length.to_bytes(8, "big"))
        self.length = length
        self.header = self.header.replaced(size=length, l1_size=len(self._tables.l1),
                              l1_table_offset=self._tables.l1_offset)
        self._header_in_doubt = False

    async def _write_field(self, offset: int, data: bytes) -> None:
        async with self._saving:
            try:
                await self.file.pwrite(offset, data)
                await self.file.flush()
            except BaseException:
                self._header_in_doubt = True
                raise

    async def _lengthen_data(self, data: Child, before: int, length: int) -> None:
        """Let the external data file reach to the disk's new end; a raw one reads as zeroes there."""
        there = min(data.node.length, length)
        if self._raw_data and there > before:
            await data.write_zeroes(before, there - before, MAY_UNMAP)
        if there < length:
            try:
                await data.resize(length)
            except OSError as error:
                if error.errno != errno.ENOTSUP:
                    raise
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: the data file cannot grow") from error

    async def _shorten_data(self, data: Child, length: int) -> None:
        try:
            await data.resize(length)
        except OSError as error:
            if error.errno != errno.ENOTSUP:  # what cannot be cut off, a device, is longer than the disk then
                raise

    async def _lengthen_l1(self, length: int) -> None:
        tables, refcounts, bits = self._tables, self._refcounts, self._bits
        needed = entries_for(length, bits, self.header.l2_bits)
        if needed * 8 > MOST_L1:
            raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}: the L1 table would be longer than {MOST_L1} bytes")
        if needed <= len(tables.l1):
            return
        clusters = -(-needed * 8 >> bits)
        offset, _, _ = await refcounts.allocate(clusters, exactly=True)
        try:
            await self._save()  # the refcounts; and L1 as it is, so that the header can change alone
            grown = tables.l1[:]
            grown.extend([0] * (needed - len(grown)))
            await self._write_all([(offset, encode_table(grown).ljust(clusters << bits, b"\0"))])
            await self.file.flush()
        except BaseException:
            await refcounts.release(offset, clusters)
            raise
        await self._write_field(AT_L1, TABLES.pack(needed, offset, 0, 0)[:12])
        old = range(tables.l1_offset >> bits, (tables.l1_offset >> bits) + -(-len(tables.l1) * 8 >> bits))
        tables.l1, tables.l1_offset = grown, offset
        refcounts.made_durable(list(old))

    async def preallocate(self, start: int, holes: bool) -> None:
        """Give each cluster from ``start`` on that has no place one in the file, in which it reads as zeroes.

        ``start``: the clusters from there on are zero: a disk has just grown. ``holes``: the places are holes of the
        file where that is possible; otherwise they have room. Durable with the next flush. Raises OSError as writing.
        """
        start = -(-start >> self._bits) << self._bits
        while start < self.length:
            end = min(self.length, start + _PIECE, ((start >> self._l2_shift) + 1) << self._l2_shift)
            token = self._lock.try_take(start, end) or await self._lock.take(start, end)
            try:
                await self._running(self._preallocate(start, end, holes))
            finally:
                self._lock.give_back(token)
            start = end

    async def _preallocate(self, start: int, end: int, holes: bool) -> None:
        """A range of one L2 table."""
        tables, index = self._tables, start >> self._l2_shift
        first = (start >> self._bits) & self._mask
        stop = first + (-(-(end - start) >> self._bits))
        while first < stop:
            table = await tables.own(index)
            if table[first] & (tables.placed | COMPRESSED):
                first += 1
                continue
            count = 1
            while first + count < stop and not table[first + count] & (tables.placed | COMPRESSED):
                count += 1
            host, virgin = (index << self._l2_shift) + (first << self._bits), False
            length = min(count << self._bits, self.length - host)
            if self.data_file is None:
                host, count, virgin = await self._refcounts.allocate(count)
                length = count << self._bits
            try:
                if not (virgin and holes):
                    await self._data.write_zeroes(host, length, MAY_UNMAP if holes else 0)
                await tables.own(index)
            except BaseException:
                if self.data_file is None:
                    await self._refcounts.release(host, count)
                raise
            places = range(host | COPIED, (host | COPIED) + (count << self._bits), self.cluster_size)
            tables.change(index, first, list(places), [ALLOCATED] * count)
            first += count

    async def _drop(self, start: int, stop: int) -> None:
        """Forget the clusters between the disk's end and ``stop``: a crash or an error may have left some there."""
        tables = self._tables
        start, stop = -(-start >> self._bits) << self._bits, min(stop, len(tables.l1) << self._l2_shift)
        while start < stop:
            index = start >> self._l2_shift
            end = min(stop, (index + 1) << self._l2_shift)
            first, count = (start >> self._bits) & self._mask, -(-(end - start) >> self._bits)
            table = await tables.table(index)
            if table is not None and (any(table[first:first + count]) or (
                    tables.extended and any(tables.maps[index][first:first + count]))):
                await tables.own(index)
                tables.change(index, first, [0] * count)
            start = end
