"""Emptying: a new, empty set of L1, refcount table and refcount blocks is made in memory.

A flush writes it into free clusters and then moves the header to it: one write of 24 bytes. Before, nothing that the
image on the disk uses is touched. It takes the same time however much the image holds: of its clusters only those of
the bitmaps stay. What it held takes room until that flush; so the storage for the next set is taken with each set, and
an image that has filled its file system can be emptied all the same. With internal snapshots there is no such way;
`Emptier.make_empty` drops one L2 table after the other.

Bitmaps stay as they are, as with QEMU: they tell of writes to the disk, and whether the disk reads as before after the
node was emptied is known to who empties it. After a commit it does.

What an external data file holds has no other place to go: what is written after the emptying lies where the old image
had its data, so a crash before the flush leaves the old image with some of the new data. A raw one is refused: it has
to read as the disk, and zeroing it takes time.
"""

from __future__ import annotations

import errno
import os
from array import array
from contextlib import suppress
from typing import Final

from blockstep.block.driver import Prepared, not_supported
from blockstep.drivers.qcow2.format import entries_for
from blockstep.drivers.qcow2.keeping import Keeper
from blockstep.drivers.qcow2.reading import EVERYTHING
from blockstep.drivers.qcow2.resizing import Resizer

#: Clusters that have become free, of which so many wait for a save: bounds memory.
_MANY: Final = 1 << 16


class Emptier(Keeper, Resizer):
    """The part of the driver that empties."""

    #: Where sets of tables lie: the first cluster, the clusters of one of the two places, which one is the last set's.
    _slot: tuple[int, int, int] | None
    #: The places of which all storage is taken, as in `_slot`.
    _taken: tuple[int, int] | None

    async def prepare_empty(self) -> Prepared:
        """See `Driver`."""
        if self.header.snapshot_count:
            raise not_supported("make_empty at once of an image with internal snapshots")
        self._check_possible()
        entries = max(1, entries_for(self.length, self._bits, self.header.l2_bits))
        await self._keeping.acquire()

        def commit() -> None:
            self._empty(entries)
            self._keeping.release()

        return Prepared(commit, self._keeping.release)

    async def make_empty(self) -> None:
        """See `Driver`. With internal snapshots: takes its time, and an error or a crash may come in the middle."""
        if not self.header.snapshot_count:
            await super().make_empty()
            return
        self._check_possible()
        token = self._lock.try_take(0, EVERYTHING) or await self._lock.take(0, EVERYTHING)
        try:
            for index in range(len(self._tables.l1)):
                if await self._tables.drop(index) and len(self._refcounts.retired) > _MANY:
                    await self._save()
                    await self._refcounts.reclaim()
            self._below_end = EVERYTHING
        finally:
            self._lock.give_back(token)

    async def _moved(self) -> None:
        await super()._moved()
        if self._slot and self._slot[:2] != self._taken:
            first, end = (cluster << self._bits for cluster in self._refcounts.reserved)
            with suppress(OSError):  # then there may be no room for the next one
                await self._refcounts.grow(end)
                await self.file.write_zeroes(first, end - first)
                self._taken = self._slot[:2]

    def _check_possible(self) -> None:
        if self._raw_data:
            raise not_supported("make_empty of an image with a raw external data file, which would have to be zeroed")
        if self.read_only:
            raise OSError(errno.EPERM, f"{os.strerror(errno.EPERM)}: the image is read-only")

    def _empty(self, entries: int) -> None:
        refcounts, tables, bits = self._refcounts, self._tables, self._bits
        kept = sorted(self._bitmap_clusters())
        always = {0, *(cluster >> self.header.block_bits for cluster in kept)}
        table_clusters = len(refcounts.table) * 8 >> bits
        l1_clusters = -(-entries * 8 >> bits)
        while True:
            first, blocks, reserved = self._place_of_set(table_clusters + l1_clusters, always)
            needed = -(-(blocks[-1] + 1) * 8 >> bits)
            if needed <= table_clusters:
                break
            table_clusters = needed  # the set lies behind what the table covers
        end = first + table_clusters + l1_clusters
        table = array("Q", bytes(table_clusters << bits))
        for number, index in enumerate(blocks):
            table[index] = (end + number) << bits
        refcounts.start_again(table, first << bits, [0, *range(first, end + len(blocks)), *kept], reserved)
        tables.l1 = array("Q", bytes(entries * 8))
        tables.l1_offset = (first + table_clusters) << bits
        tables.l1_dirty = set()
        tables.clear()
        self._unpacked.clear()
        self._below_end = EVERYTHING
        self._moving = True

    def _place_of_set(self, clusters: int, always: set[int]) -> tuple[int, list[int], tuple[int, int]]:
        """Where the new set of tables goes, its refcount blocks, and the clusters that are kept free for the next one.

        Two places of the same length, in turns: so the file does not grow with each time. ``clusters``: of the refcount
        table and L1; the refcount blocks, ``always`` and those of the set itself, are added. A set lies at the begin of
        the first place or at the end of the second, so that what is kept free is one row.
        """
        area, count, half = self._slot or (0, 0, 0)
        if not self._moving:
            half = 1 - half
        if clusters + len(self._blocks_of_set(area, 2 * count, always)) > count:
            area, count, half = self._refcounts.end, clusters + 1, 0
            while clusters + len(self._blocks_of_set(area, 2 * count, always)) > count:
                count += 1
        self._slot = area, count, half
        blocks = self._blocks_of_set(area + half * count, count, always)
        length = clusters + len(blocks)
        if half:
            return area + 2 * count - length, blocks, (area, area + 2 * count - length)
        return area, blocks, (area + length, area + 2 * count)

    def _blocks_of_set(self, first: int, count: int, always: set[int]) -> list[int]:
        bits = self.header.block_bits
        return sorted(always.union(range(first >> bits, ((first + count - 1) >> bits) + 1)))
