"""Where the disk's clusters are: the L1 table, and a cache of L2 tables.

All tables are kept decoded, an L2 table under its index in the L1 table. Those that changed stay until they are saved;
of the others the oldest go when there are more than the cache holds. **Nobody keeps a table across a wait**: it may
have gone meanwhile, and a change of it would be lost. So a change is: `own`, then at once `change`.

**Extended entries** are kept as two tables of equal length: the first words in `Tables.l2`, as if they were standard
entries, and the second words, which say it of 32 subclusters, in `Tables.maps`. A first word has the flag PARTIAL,
which no file has, unless all subclusters are allocated: so an entry without any flag is plain data in all images.

**With an external data file** the entries of clusters with a place have the COPIED flag, and the place is the disk's
own offset, as the format demands; a table that says otherwise is refused when it is loaded. Place 0 is one too. If the
file is raw, it holds all of the disk, and what entries leave out is read from it as well.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from enum import Enum
from itertools import repeat
from typing import Final, NamedTuple

from blockstep.block.node import Child
from blockstep.drivers.qcow2.format import (
    COMPRESSED,
    COPIED,
    EXTERNAL_DATA,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET,
    RAW_EXTERNAL,
    ZERO,
    Header,
    Subclusters,
    compressed_place,
    decode_table,
    encode_table,
)
from blockstep.drivers.qcow2.refcounts import Refcounts, read_file

#: Entries of 8 bytes in a sector: the least that is written of a table.
_UNIT: Final = 64
#: Of an entry in memory: not all subclusters are allocated; see the module.
PARTIAL: Final = 2
#: What the second word of an extended entry says: all subclusters are allocated, or read as zeroes.
ALLOCATED: Final = (1 << 32) - 1
ZEROED: Final = ALLOCATED << 32
#: Two pieces of compressed data may begin in one sector.
_ALL: Final = (1 << 64) - 1


class Kind(Enum):
    """What a run of the disk is."""

    DATA = "data"  #: at `Run.host`
    ZERO = "zero"
    PACKED = "packed"  #: compressed; `Run.host` is its L2 entry
    BELOW = "below"  #: the backing node's, or zeroes


class Run(NamedTuple):
    """Neighbouring bytes of one kind; those of DATA are neighbours in the file as well."""

    kind: Kind
    host: int
    length: int


class Tables:
    """L1 and L2 of the disk. ``save`` is called when too many tables wait for being saved."""

    def __init__(self, file: Child, header: Header, refcounts: Refcounts, most: int,
                 save: Callable[[], Awaitable[None]]) -> None:
        self._file, self._refcounts, self._most, self._save = file, refcounts, max(4, most), save
        self.bits = header.cluster_bits
        self.l2_shift = header.cluster_bits + header.l2_bits
        self.mask = (1 << header.l2_bits) - 1
        self._version = header.version
        self.extended = header.extended_l2
        self.external = bool(header.incompatible & EXTERNAL_DATA)
        self._raw = bool(header.autoclear & RAW_EXTERNAL)
        #: An entry that is not compressed has a place if it has one of these bits.
        self.placed = OFFSET | COPIED if self.external else OFFSET
        self.l1: array[int] = array("Q")
        self.l1_offset = header.l1_table_offset
        self._l1_size = header.l1_size
        self.l1_dirty: set[int] = set()
        self.l2: dict[int, array[int]] = {}
        self.maps: dict[int, array[int]] = {}  #: with extended entries: the subclusters, for each table of `l2`
        self.dirty: dict[int, tuple[int, int]] = {}  #: of L2 tables: the items that changed, [first, end)
        self.saving: dict[int, tuple[int, int]] = {}  #: those that a save is writing, perhaps not yet to the file
        self._known = bytearray()  #: of each L2 table: whether the guard has seen its entries
        self._loading = asyncio.Lock()
        self._owning = asyncio.Lock()
        #: Bits that the entry of a cluster with plain data does not have: see the hot paths.
        self.odd = COMPRESSED | L2_RESERVED | ZERO | ((1 << self.bits) - 1)

    async def open(self) -> None:
        """Load the L1 table."""
        self.l1 = decode_table(await read_file(self._file, self.l1_offset, self._l1_size * 8))

    async def table(self, index: int) -> array[int] | None:
        """An L2 table; None: there is none, nothing is allocated."""
        table = self.l2.get(index)
        if table is not None or not self.l1[index]:
            return table
        async with self._loading:
            while True:
                table = self.l2.get(index)
                entry = self.l1[index]
                if table is not None or not entry:
                    return table
                offset = entry & OFFSET
                if offset & ((1 << self.bits) - 1) or entry & L1_RESERVED or not (
                        0 < offset < self._refcounts.file_length):
                    raise self._refcounts.broken(f"L2 table {index} is said to be at {entry:#x}")
                await self._make_room()
                loaded = decode_table(await read_file(self._file, offset, 1 << self.bits))
                if self.l1[index] == entry and index not in self.l2:
                    guard = self._refcounts.guard
                    if guard is not None and not self._is_known(index):
                        wrong = guard.claim_entries(loaded[::2] if self.extended else loaded, self.external)
                        if wrong:
                            await self._refcounts.damaged(f"L2 table {index}: {wrong.what}", wrong.offset, wrong.length)
                        self._known[index] = 1
                    self._take_in(index, loaded)

    def _is_known(self, index: int) -> bool:
        self._known.extend(bytes(max(0, len(self.l1) - len(self._known))))
        return bool(self._known[index])

    def _take_in(self, index: int, table: array[int]) -> None:
        if self.extended:
            self.maps[index] = maps = table[1::2]
            table = table[::2]
            for at, bitmap in enumerate(maps):
                entry = table[at]
                if entry and not entry & COMPRESSED:
                    if entry & PARTIAL:  # reserved: the next bit stays, for `_check_entry` to find
                        table[at] |= PARTIAL << 1
                    if bitmap != ALLOCATED:
                        table[at] |= PARTIAL
        if self.external:
            start = index << self.l2_shift
            for at, (place, entry) in enumerate(zip(range(start, start + (1 << self.l2_shift), 1 << self.bits), table,
                                                    strict=True)):
                if entry & ZERO and not entry & (OFFSET | COMPRESSED) and not self.extended:
                    table[at] &= ~COPIED  # it has no place
                elif entry & (OFFSET | COMPRESSED | COPIED):
                    if entry & (OFFSET | COMPRESSED) != place:
                        self.maps.pop(index, None)
                        raise self._refcounts.broken(f"the L2 entry of the disk's byte {place} is {entry:#x}, and data "
                                                     "in an external file lies where the disk has it")
                    table[at] |= COPIED
        self.l2[index] = table

    async def _make_room(self) -> None:
        while len(self.l2) >= self._most:
            clean = next((each for each in self.l2 if each not in self.dirty and each not in self.saving), None)
            if clean is None:
                await self._save()
            else:
                del self.l2[clean]
                self.maps.pop(clean, None)

    def clear(self) -> None:
        """Forget all L2 tables, also those that were changed."""
        self.l2.clear()
        self.maps.clear()
        self.dirty = {}

    async def own(self, index: int) -> array[int]:
        """The L2 table, in memory now and in a place of its own, so that it may be changed before the next wait."""
        while True:
            if self.l1[index] & COPIED:
                table = self.l2.get(index) or await self.table(index)
                if self.l1[index] & COPIED and index in self.l2:
                    return self.l2[index]
                continue
            async with self._owning:
                if self.l1[index] & COPIED:
                    continue
                await self._make_room()
                table = await self.table(index)  # if it is shared: nobody changes it meanwhile, it is not ours
                maps = self.maps.get(index)
                offset, _, _ = await self._refcounts.allocate(1)
                old = self.l1[index]
                if table is None:
                    table = array("Q", bytes(8 << self.l2_shift - self.bits))
                    maps = table[:] if self.extended else None
                self.l2.setdefault(index, table)
                if maps is not None:
                    self.maps.setdefault(index, maps)
                self._is_known(index)
                self._known[index] = 1
                self.l1[index] = offset | COPIED
                self.l1_dirty.add(index)
                self.dirty[index] = (0, len(table))
                if old:
                    self._refcounts.retired.append((old & OFFSET) >> self.bits)

    def change(self, index: int, first: int, entries: array[int] | list[int], maps: list[int] | None = None) -> None:
        """Put entries into a table that `own` has just returned; what the old ones referred to is retired.

        With extended entries: first words without PARTIAL, and the second words (None: all 0).
        """
        table = self.l2[index]
        for at, entry in enumerate(entries, first):
            old = table[at]
            if old and (old ^ entry) & (OFFSET | COMPRESSED if not old & COMPRESSED else _ALL):
                self._retire(old)
            table[at] = entry
        if self.extended:
            bitmaps = self.maps[index]
            for at, bitmap in zip(range(first, first + len(entries)), maps or repeat(0), strict=False):
                bitmaps[at] = bitmap
                if bitmap != ALLOCATED and table[at] and not table[at] & COMPRESSED:
                    table[at] |= PARTIAL
        end = first + len(entries)
        was = self.dirty.get(index)
        self.dirty[index] = (first, end) if was is None else (min(first, was[0]), max(end, was[1]))

    async def drop(self, index: int) -> bool:
        """Forget a table and what it refers to; a snapshot that shares it keeps it. False: there is none."""
        table = await self.table(index)
        if table is None:
            return False
        for entry in filter(None, table):
            self._retire(entry)
        self._refcounts.retired.append((self.l1[index] & OFFSET) >> self.bits)
        self.l1[index] = 0
        self.l1_dirty.add(index)
        del self.l2[index]
        self.maps.pop(index, None)
        self.dirty.pop(index, None)
        return True

    def _retire(self, entry: int) -> None:
        if self.external:  # there nothing is counted
            return
        clusters, guard = clusters_of(entry, self.bits), self._refcounts.guard
        if guard is not None and clusters and not entry & COPIED:
            if guard.taken(clusters.start, len(clusters)):
                return  # it is another's, and stays
            guard.leave(clusters)
        self._refcounts.retired.extend(clusters)

    def dirty_bytes(self, index: int) -> tuple[int, bytes]:
        """Where in the file, and what, is to be written of an L2 table that changed."""
        first, end = self.dirty[index]
        first, end = first // _UNIT * _UNIT, -(-end // _UNIT) * _UNIT
        table = self.l2[index][first:end]
        if self.extended:
            words = array("Q", bytes(16 * len(table)))
            words[::2] = array("Q", [entry if entry & COMPRESSED else entry & ~PARTIAL for entry in table])
            words[1::2] = self.maps[index][first:end]
            return (self.l1[index] & OFFSET) + first * 16, encode_table(words)
        return (self.l1[index] & OFFSET) + first * 8, encode_table(table)

    def l1_bytes(self) -> list[tuple[int, bytes]]:
        """What is to be written of the L1 table."""
        pieces = []
        for unit in sorted({index // _UNIT for index in self.l1_dirty}):
            data = encode_table(self.l1[unit * _UNIT:(unit + 1) * _UNIT])
            pieces.append((self.l1_offset + unit * _UNIT * 8, data))
        return pieces

    # --- looking up ---

    async def runs(self, offset: int, end: int) -> list[Run]:
        """What the range is, at least a part of it from ``offset`` on: up to the end of an L2 table with entries."""
        found: list[Run] = []
        start = offset
        while offset < end:
            index = offset >> self.l2_shift
            stop = min(end, (index + 1) << self.l2_shift)
            table = self.l2.get(index) or await self.table(index)
            if table is None:
                _add(found, Run(Kind.BELOW, 0, stop - offset))
            elif self.extended:
                self._subcluster_runs(found, index, offset, stop)
            else:
                self._runs(found, table, offset, stop)
            offset = stop
            if table is not None:
                break
        return [Run(Kind.DATA, start, offset - start)] if self._raw else found

    def _runs(self, found: list[Run], table: array[int], offset: int, stop: int) -> None:
        bits, size, mask, odd, placed = self.bits, 1 << self.bits, self.mask, self.odd, self.placed
        while offset < stop:
            entry = table[(offset >> bits) & mask]
            within = offset & (size - 1)
            length = min(size - within, stop - offset)
            if not entry & odd:
                _add(found, Run(Kind.DATA, (entry & OFFSET) + within, length) if entry & placed else
                     Run(Kind.BELOW, 0, length))
            elif entry & COMPRESSED:
                found.append(Run(Kind.PACKED, entry, length))
            else:
                self._check_entry(entry, offset)
                _add(found, Run(Kind.ZERO, 0, length))
            offset += length

    def _check_entry(self, entry: int, offset: int) -> None:
        """An entry of no plain kind: only the zero flag of version 3, or PARTIAL, may be the reason."""
        reserved = L2_RESERVED | (1 << self.bits) - 1 & OFFSET
        if entry & reserved & ~(PARTIAL if self.extended else 0) or (
                entry & ZERO and (self._version < 3 or self.extended)):
            raise self._refcounts.broken(f"the L2 entry of the disk's byte {offset} is {entry:#x}")

    def _subcluster_runs(self, found: list[Run], index: int, offset: int, stop: int) -> None:
        bits, size, unit = self.bits, 1 << self.bits, 1 << (self.bits - 5)
        table, maps = self.l2[index], self.maps[index]
        while offset < stop:
            at, within = (offset >> bits) & self.mask, offset & (size - 1)
            length = min(size - within, stop - offset)
            entry = table[at]
            if not entry & self.odd and entry & self.placed:
                _add(found, Run(Kind.DATA, (entry & OFFSET) + within, length))
                offset += length
                continue
            if entry & COMPRESSED:
                found.append(Run(Kind.PACKED, entry, length))
                offset += length
                continue
            subclusters = self.subclusters(index, at)
            if not maps[at] or maps[at] == ZEROED:
                _add(found, Run(Kind.ZERO if maps[at] else Kind.BELOW, 0, length))
                offset += length
                continue
            cluster_end = offset + length
            while offset < cluster_end:
                within = offset & (size - 1)
                length = min(unit - (within & (unit - 1)), cluster_end - offset)
                bit = 1 << (within >> (bits - 5))
                if subclusters.allocated & bit:
                    _add(found, Run(Kind.DATA, (entry & OFFSET) + within, length))
                else:
                    _add(found, Run(Kind.ZERO if subclusters.zero & bit else Kind.BELOW, 0, length))
                offset += length

    def subclusters(self, index: int, at: int) -> Subclusters:
        """Of an entry that is not compressed, of a table in memory. Raises OSError (EIO) if it cannot be right."""
        entry, offset = self.l2[index][at], (index << self.l2_shift) + (at << self.bits)
        self._check_entry(entry, offset)
        subclusters = Subclusters.parse(self.maps[index][at])
        if not subclusters.valid or (subclusters.allocated and not entry & self.placed):
            raise self._refcounts.broken(f"the subclusters of the disk's byte {offset} are "
                                         f"{subclusters.allocated:#x} allocated and {subclusters.zero:#x} zero")
        return subclusters


def clusters_of(entry: int, bits: int) -> range:
    """The clusters of the file that an L2 entry refers to."""
    if entry & COMPRESSED:
        offset, length = compressed_place(entry, bits)
        return range(offset >> bits, ((offset + length - 1) >> bits) + 1)
    cluster = (entry & OFFSET) >> bits
    return range(cluster, cluster + 1 if cluster else cluster)


def _add(found: list[Run], run: Run) -> None:
    if found:
        last = found[-1]
        if last.kind is run.kind and last.host + (last.length if run.kind is Kind.DATA else 0) == run.host:
            found[-1] = Run(run.kind, last.host, last.length + run.length)
            return
    found.append(run)
