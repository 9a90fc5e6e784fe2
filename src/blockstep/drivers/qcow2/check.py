"""Whether an image is consistent: every use of every cluster is counted anew and compared with what the image says.

    header, L1 tables ──► L2 tables ──► data ──► bitmaps ──► refcount table and blocks     (the order of counting)
    counted > stored: corruption: a cluster in use could be given out a second time
    counted < stored: leak: lost space, nothing worse

How L2 tables are read is in `check_tables`. A table whose place is taken already is a corruption and is not read,
so that the work is bounded by the size of the file whatever the entries say. Metadata has to be the only user of
its clusters; an L2 table may be shared by L1 entries, a data cluster by L2 entries.

The check reads through a function and never writes; `repair` does, and uses this module with a `Fixer`. Both are
synchronous: run them in a thread. Nobody may write to the image meanwhile.
"""

from __future__ import annotations

from array import array
from collections import Counter
from itertools import chain

from blockstep.drivers.qcow2.bitmap_limits import check_entries
from blockstep.drivers.qcow2.check_tables import CheckResult, Fixer, Read, Report, TableChecker
from blockstep.drivers.qcow2.counts import Counts
from blockstep.drivers.qcow2.format import (
    BITMAPS,
    COPIED,
    L1_RESERVED,
    MOST_BITMAP_DIRECTORY,
    MOST_SNAPSHOT_TABLE,
    OFFSET,
    Snapshot,
    decode_block,
    decode_table,
    parse_bitmaps,
    parse_bitmaps_extension,
    parse_snapshots,
)
from blockstep.errors import ImageError
from blockstep.units import GiB, MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["CheckResult", "Checker", "Fixer", "Read", "Report", "check"]

#: Bytes of all L1 tables of snapshots together, at most.
MOST_SNAPSHOT_L1: Final = GiB
#: Bytes of all tables of bitmaps together, at most: 65535 of them, in holes of a file, would take hours to read.
MOST_BITMAP_TABLES: Final = GiB
#: L2 tables, at most: each takes about 100 bytes of memory. The disk alone has up to 4 million.
MOST_L2_TABLES: Final = 1 << 23
_BITMAP_RESERVED: Final = ~OFFSET


def check(read: Read, length: int, report: Report = lambda text: None) -> CheckResult:
    """Check the image in a file of ``length`` bytes, and ``report`` each finding in a sentence.

    Raises ImageError when there is nothing to check (the header is wrong, a feature is unknown, the image is
    encrypted, or it would take too much memory), and what ``read`` raises.
    """
    return Checker(read, length, report).run()


class Checker(TableChecker):
    """One pass over an image. `run` is called once; then the fields tell what was counted."""

    def __init__(self, read: Read, length: int, report: Report, fixer: Fixer | None = None) -> None:
        super().__init__(read, length, report, fixer)
        self.blocks: Final[dict[int, int]] = {}  #: number of a refcount block -> its offset
        #: The refcount table and its blocks cannot be used: they are damaged, or lie where something else does.
        self.rebuild = False
        #: The active L1 table cannot be read: what the disk has is not known, and nothing can be repaired.
        self.l1_broken = False
        #: (cluster, how many) of the refcount table and of each block, where nothing else is.
        self.refcount_clusters: list[tuple[int, int]] = []
        self.bitmaps_broken = False
        #: The snapshots whose L1 tables can be read; not all, if `snapshots_broken`.
        self.snapshots: list[Snapshot] = []
        self.snapshots_broken = False
        #: (cluster, how many) of the snapshot table.
        self.snapshot_clusters: tuple[int, int] = 0, 0
        #: Clusters of metadata that L2 entries use as well.
        self.taken: frozenset[int] = frozenset()
        self._l2_shift = self.header.cluster_bits + self.header.l2_bits
        self._starts: dict[int, int] = {}  # L2 table -> where on the disk its part begins, with external data
        self._metadata: list[tuple[int, int, int]] = []  # (cluster, how many, how often it is used)
        self._l2_tables: dict[int, int] = {}  # the same of L2 tables: offset -> how often it is used

    def run(self) -> CheckResult:
        """Count everything, compare. Raises as `check` does."""
        self._metadata_run(0, 1, "header")
        self._load_stored()
        self._l1_and_l2_tables()
        self._check_taken()
        self._bitmaps()
        self._refcount_structures()
        self._compare()
        return self.result

    def count_l1(self, offset: int, size: int) -> Counts:
        """Instead of `run`: what the L1 table of ``size`` entries at ``offset`` uses: L2 tables, data; not itself."""
        for table, weight in self._l1_table(offset, size, f"L1 table at {offset:#x}").items():
            self.counts.add(table >> self.header.cluster_bits, weight)
            self.l2_table(table, weight, 0)
        return self.counts

    def read_snapshots(self) -> list[Snapshot]:
        """The snapshot table, before or after `run`. Raises ImageError if it is wrong."""
        header = self.header
        if not header.snapshot_count:
            return []
        room = min(MOST_SNAPSHOT_TABLE, max(0, self._length - header.snapshots_offset))
        return parse_snapshots(header, self._prefix(header.snapshots_offset, room))[0]

    # --- counting ---

    def _metadata_run(self, offset: int, count: int, what: str) -> bool:
        """Count clusters of metadata. False, after a report, if they are not all in the file, or are taken."""
        if not count:
            return True
        first = offset >> self.header.cluster_bits
        if offset & self._low or first + count > self.end:
            self._corrupt(f"{what} at {offset:#x} is not inside of the file, or not at a cluster boundary")
            return False
        if not self.counts.all_are(first, count, 0):
            self._corrupt(f"{what} at {offset:#x} overlaps other metadata or data")
            return False
        self.counts.add_run(first, count)
        self._metadata.append((first, count, 1))
        return True

    def _clusters(self, size: int) -> int:
        return -(-size >> self.header.cluster_bits)

    def _l1_table(self, place: int, size: int, what: str, active: bool = False) -> dict[int, int]:
        """The L2 tables that an L1 table leads to: offset -> how often."""
        tables: dict[int, int] = {}
        entries = decode_table(self.read(place, size * 8))
        homes = self._homes(entries) if self._external else {}
        for index, entry in enumerate(entries):
            if not entry:
                continue
            offset = entry & OFFSET
            cluster = offset >> self.header.cluster_bits
            right = entry
            if entry & L1_RESERVED or offset & self._low or not 0 < cluster < self.end:
                self._corrupt(f"{what}, entry {index}: {entry:#x} is not a place for an L2 table")
                right = 0
            elif self.counts.of(cluster):
                self._corrupt(f"{what}, entry {index}: the L2 table at {offset:#x} overlaps other metadata")
                right = 0
            elif homes.get(offset, index) != index:
                self._corrupt(f"{what}, entry {index}: the L2 table at {offset:#x} is that of entry {homes[offset]}")
                right = 0
            else:
                tables[offset] = tables.get(offset, 0) + 1
                if active and ((refs := self.stored.of(cluster)) == 1) != entry >> 63:
                    self._corrupt(f"{what}, entry {index}: {entry:#x} does not fit to the refcount {refs}")
                    right = offset | (COPIED if refs == 1 else 0)
            if self._fix and right != entry and (self._fix.marks if right else self._fix.entries):
                self._fix.write(place + index * 8, right.to_bytes(8, "big"))
        return tables

    def _homes(self, entries: array[int]) -> dict[int, int]:
        """Of each L2 table of an image with external data, the L1 entry that it belongs to."""
        homes: dict[int, int] = {}
        shared: set[int] = set()
        for index, entry in enumerate(entries):
            if homes.setdefault(entry & OFFSET, index) != index:
                shared.add(entry & OFFSET)
        for offset in shared - {0}:  # it belongs where most of its data lies
            parts = Counter((entry & OFFSET) >> self._l2_shift for entry in decode_table(
                self.read(offset, self.header.cluster_size)) if entry)
            part = max(parts, key=parts.__getitem__, default=0)
            if part < len(entries) and entries[part] & OFFSET == offset:
                homes[offset] = part
        self._starts.update({offset: index << self._l2_shift for offset, index in homes.items()})
        return homes

    def _snapshots(self) -> None:
        header = self.header
        if not header.snapshot_count:
            return
        room = min(MOST_SNAPSHOT_TABLE, max(0, self._length - header.snapshots_offset))
        data = self._prefix(header.snapshots_offset, room)
        try:
            found, size = parse_snapshots(header, data)
        except ImageError as error:
            self._corrupt(f"snapshot table: {error}")
            self.snapshots_broken = True
            found, size = self._first_snapshots(data)
        if not self._metadata_run(header.snapshots_offset, self._clusters(size), "snapshot table"):
            self.snapshots_broken = True
        self.snapshot_clusters = header.snapshots_offset >> header.cluster_bits, self._clusters(size)
        if sum(each.l1_size for each in found) * 8 > MOST_SNAPSHOT_L1:
            raise ImageError("snapshot l1_size", sum(each.l1_size for each in found),
                             f"at most {MOST_SNAPSHOT_L1 // 8} in all snapshots together")
        for each in found:
            if header.version == 3 and each.disk_size is None:
                self._corrupt(f"snapshot {each.id!r} has no disk size, which version 3 demands")
                self.snapshots_broken = True
                if each.l1_size < header.l1_needed:
                    continue
            if self._metadata_run(each.l1_table_offset, self._clusters(each.l1_size * 8),
                                  f"L1 table of snapshot {each.id!r}"):
                self.snapshots.append(each)
            else:
                self.snapshots_broken = True

    def _first_snapshots(self, data: bytes) -> tuple[list[Snapshot], int]:
        """The snapshots before the first that is wrong."""
        good, bad = 0, self.header.snapshot_count
        best: tuple[list[Snapshot], int] = [], 0
        while good + 1 < bad:
            middle = (good + bad) // 2
            try:
                best = parse_snapshots(self.header.replaced(snapshot_count=middle), data)
                good = middle
            except ImageError:
                bad = middle
        return best

    def _prefix(self, offset: int, room: int) -> bytes:
        """A table of unknown size: as much of it as there may be, read in growing steps until it parses."""
        size = min(room, MiB)
        while True:
            data = self.read(offset, size)
            try:
                parse_snapshots(self.header, data)
            except ImageError:
                if size == room:
                    return data
                size = min(room, size * 8)
            else:
                return data

    def _l1_and_l2_tables(self) -> None:
        header, bits = self.header, self.header.cluster_bits
        active: dict[int, int] = {}
        right = self._metadata_run(header.l1_table_offset, self._clusters(header.l1_size * 8), "active L1 table")
        self._snapshots()
        if right:
            active = self._l1_table(header.l1_table_offset, header.l1_size, "active L1 table", active=True)
        self.l1_broken = not right
        tables = self._l2_tables = dict(active)
        for each in self.snapshots:
            for offset, times in self._l1_table(each.l1_table_offset, each.l1_size,
                                                f"L1 table of snapshot {each.id!r}").items():
                tables[offset] = tables.get(offset, 0) + times
            if len(tables) > MOST_L2_TABLES:
                raise ImageError("number of L2 tables", f"more than {MOST_L2_TABLES}", "at most that")
        for offset, weight in tables.items():
            self.counts.add(offset >> bits, weight)
        for offset, weight in tables.items():
            self.l2_table(offset, weight, active.get(offset, 0), self._starts.get(offset, 0))

    def _check_taken(self) -> None:
        """Metadata of which data is a second user."""
        taken: list[int] = []
        bits = self.header.cluster_bits
        l2_tables = ((offset >> bits, 1, weight) for offset, weight in self._l2_tables.items())
        for first, count, weight in chain(self._metadata, l2_tables):
            if not self.counts.all_are(first, count, weight):
                taken += [each for each in range(first, first + count) if self.counts.of(each) != weight]
        for cluster in taken:
            self._corrupt(f"data and metadata overlap at {cluster << self.header.cluster_bits:#x}")
        self.taken = frozenset(taken)

    # --- bitmaps, refcounts ---

    def _bitmaps(self) -> None:
        header = self.header
        if not header.autoclear & BITMAPS:
            return
        try:
            where = parse_bitmaps_extension(header)
            if where is None:
                return
            if not self._metadata_run(where.directory_offset, self._clusters(where.directory_size), "bitmap directory"):
                self.bitmaps_broken = True
                return
            entries = parse_bitmaps(header, where, self.read(where.directory_offset,
                                                             min(where.directory_size, MOST_BITMAP_DIRECTORY)))
            check_entries(header, entries)
            if sum(each.table_size for each in entries) * 8 > MOST_BITMAP_TABLES:
                raise ImageError("bitmap_table_size", "larger", f"at most {MOST_BITMAP_TABLES} bytes all together")
        except ImageError as error:
            self._corrupt(f"bitmap directory: {error}")
            self.bitmaps_broken = True
            return
        before = self.result.corruptions
        for each in entries:
            if not self._metadata_run(each.table_offset, self._clusters(each.table_size * 8),
                                      f"table of bitmap {each.name!r}"):
                continue
            for entry in filter(None, decode_table(self.read(each.table_offset, each.table_size * 8))):
                if entry & _BITMAP_RESERVED and entry != 1:
                    self._corrupt(f"table of bitmap {each.name!r}: {entry:#x} has reserved bits set")
                elif entry != 1:
                    self._metadata_run(entry & OFFSET, 1, f"data of bitmap {each.name!r}")
        self.bitmaps_broken = self.result.corruptions != before

    def _load_stored(self) -> None:
        header = self.header
        seen: set[int] = set()
        size = header.refcount_table_clusters << header.cluster_bits
        if header.refcount_table_offset + size > self.end << header.cluster_bits:
            self.rebuild = True  # `_refcount_structures` tells
            return
        for number, entry in enumerate(decode_table(self.read(header.refcount_table_offset, size))):
            if not entry:
                continue
            if entry & self._low or entry >> header.cluster_bits >= self.end or entry in seen:
                self._corrupt(f"refcount table, entry {number}: {entry:#x} is not a place for a refcount block")
                self.rebuild = True
                continue
            seen.add(entry)
            self.blocks[number] = entry
            if number << header.block_bits < self.end:
                raw = self.read(entry, header.cluster_size)
                if raw != self._zeroes:
                    self.stored[number][:] = decode_block(header, raw)

    def _refcount_structures(self) -> None:
        header = self.header
        parts = [(header.refcount_table_offset, header.refcount_table_clusters, "refcount table")]
        parts += [(offset, 1, f"refcount block {number}") for number, offset in self.blocks.items()]
        for offset, count, what in parts:
            if self._metadata_run(offset, count, what):
                self.refcount_clusters.append((offset >> header.cluster_bits, count))
            else:
                self.rebuild = True

    def _compare(self) -> None:
        result, bits = self.result, self.counts.bits
        for number in sorted(self.stored.keys() | self.counts.keys()):
            stored, counted = self.stored[number], self.counts[number]
            room = max(0, self.end - (number << bits))
            if room < len(stored):  # what is said of clusters behind the end of the file does not count
                stored[room:] = array(stored.typecode, bytes((len(stored) - room) * stored.itemsize))
            if stored != counted:
                for index, (one, other) in enumerate(zip(stored, counted, strict=True)):
                    if one < other:
                        self._corrupt(f"cluster {(number << bits) + index}: refcount {one}, used {other} times")
                    elif one > other:
                        result.leaks += 1
                        self._report(f"leak: cluster {(number << bits) + index}: refcount {one}, used {other} times")
        for cluster in self.counts.overflown:
            self._corrupt(f"cluster {cluster}: used more often than a refcount can say")
        result.image_end_offset = max(self.counts.end(), self.stored.end()) << self.header.cluster_bits
