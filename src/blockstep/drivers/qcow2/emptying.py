"""Emptying: a new, empty set of L1, refcount table and refcount blocks is made in memory.

A flush writes it into free clusters and then moves the header to it: one write of 24 bytes. Before, nothing that the
image on the disk uses is touched. It takes the same time however much the image holds. An image with internal snapshots
or bitmaps is refused.

What an external data file holds has no other place to go: what is written after the emptying lies where the old image
had its data, so a crash before the flush leaves the old image with some of the new data. A raw one is refused: it has
to read as the disk, and zeroing it takes time.
"""

from __future__ import annotations

import errno
import os
from array import array

from blockstep.block.driver import Prepared, not_supported
from blockstep.drivers.qcow2.format import EXT_BITMAPS, entries_for
from blockstep.drivers.qcow2.reading import EVERYTHING
from blockstep.drivers.qcow2.saving import Saver


class Emptier(Saver):
    """The part of the driver that empties."""

    #: Where the last set of tables lies, (first cluster, count).
    _slot: tuple[int, int] | None

    async def prepare_empty(self) -> Prepared:
        """See `Driver`."""
        if self.header.snapshot_count or self.header.extension(EXT_BITMAPS) is not None:
            raise not_supported("make_empty of an image with internal snapshots or bitmaps")
        if self._raw_data:
            raise not_supported("make_empty of an image with a raw external data file, which would have to be zeroed")
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
        tables.l1_dirty = set()
        tables.clear()
        self._unpacked.clear()
        self._below_end = EVERYTHING
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
