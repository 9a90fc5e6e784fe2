"""Saving: the metadata that has changed is written, in an order in which each step may be the last one.

A save takes a copy of all metadata that has changed, at one moment, and writes it:

    1  refcount blocks; if there are new ones: flush, then the refcount table (a longer one: flush, then the header)
    2  flush: now the data, and the refcounts of all clusters in use, are on the disk
    3  L2 tables; if L1 changes: flush, then L1
    4  flush
    5  clusters that nothing on the disk refers to any more may be used again; their refcounts follow in the next save

So a crash between two steps leaves clusters that count as used and are not: a leak, nothing else. Refcounts only rise
before a reference appears, and only fall after it is gone. What was not flushed is lost, as on any disk with a cache.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from blockstep.drivers.qcow2.format import AT_L1, AT_SIZE, SIZE, TABLES, encode_table
from blockstep.drivers.qcow2.reading import Reader


class Saver(Reader):
    """The part of the driver that saves."""

    #: Held by a save, and by whoever else changes the header: what is read of it, or known, is as it is on the disk.
    _saving: asyncio.Lock
    #: How many saves have begun; the last that went well.
    _saves: int
    _good_save: int
    #: Whether a save moves the header to the set of tables that `emptying` has made.
    _moving: bool
    #: A resize has failed: the header may have a length of the disk, or name an L1 table, that are not ours. The next
    #: save puts it right, before anything that is written only to ours is said to be durable.
    _header_in_doubt: bool

    async def flush(self) -> None:
        if self.read_only:
            return
        before = self._saves
        tables, refcounts = self._tables, self._refcounts
        if not (tables.dirty or tables.l1_dirty or refcounts.dirty or refcounts.retired or self._moving
                or self._header_in_doubt or self._saving.locked()):
            await self._data.flush()
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
        moving, table_moved, in_doubt = self._moving, refcounts.table_moved, self._header_in_doubt
        blocks = [refcounts.dirty_bytes(index) for index in sorted(refcounts.dirty)]
        table = self._table_bytes(table_moved)
        l2 = [tables.dirty_bytes(index) for index in sorted(tables.dirty)]
        l1 = [(tables.l1_offset, encode_table(tables.l1))] if moving else tables.l1_bytes()
        place = TABLES.pack(len(tables.l1), tables.l1_offset, refcounts.table_offset,
                            len(refcounts.table) * 8 >> self._bits)
        tables.saving, refcounts.saving = tables.dirty, refcounts.dirty
        tables.dirty, tables.l1_dirty = {}, set()
        refcounts.dirty, refcounts.table_dirty, refcounts.table_moved, refcounts.retired = {}, set(), False, []
        try:
            if in_doubt:
                fields = SIZE.pack(self.length, 0) + place[:12]  # one write: they have to fit together
                await self.file.pwrite(AT_SIZE, fields if not moving else fields[:8])
            await self._write_all(blocks)
            if moving:
                await self._write_all(table + l2 + l1)
                await self._flush_all()
                await self.file.pwrite(AT_L1, place)
                await self.file.flush()
            else:
                if table:
                    await self.file.flush()
                    await self._write_all(table)
                    if table_moved:
                        await self.file.flush()
                        await self.file.pwrite(AT_L1 + 12, place[12:])
                await self._flush_all()
                if l2 or l1:
                    await self._write_all(l2)
                    if l1:
                        if l2:
                            await self.file.flush()
                        await self._write_all(l1)
                    await self.file.flush()
        except BaseException:
            self._put_back(*kept)
            refcounts.table_moved |= table_moved
            raise
        finally:
            tables.saving, refcounts.saving = {}, {}
        if in_doubt:
            self._header_in_doubt = False
        refcounts.made_durable(kept[4])
        self._good_save = number
        if moving:
            await self._moved()

    async def _flush_all(self) -> None:
        """Make durable what was written, data as well."""
        if self.data_file is not None:
            await self.data_file.flush()
        await self.file.flush()

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
            if index not in tables.l2:  # dropped meanwhile
                continue
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

    async def _settle(self) -> None:
        """Write all, also the refcounts of what has become free. Nothing is in flight."""
        await self._save()
        await self._refcounts.reclaim()
        await self._save()

    async def _moved(self) -> None:
        """The header refers to the new set of `emptying`: what was in use before is free."""
        self._moving = False
        try:
            for first, count in self._refcounts.dropped() if self.options.discard == "unmap" else ():
                await self._pass_discard(first << self._bits, count << self._bits)
        finally:  # also when the flush is cancelled here: what is to be spared next time is this set
            self._refcounts.start_is_durable()

    async def _pass_discard(self, offset: int, length: int) -> None:
        """Of what is free. That it cannot be done is no error of the request that happens to find it free."""
        if self.options.discard == "unmap" and offset + length <= self.file.node.length:
            with suppress(OSError):
                await self.file.discard(offset, length)
