"""Whether an image is consistent: every use of every cluster is counted anew and compared with what the image says.

    header, L1 tables ──► L2 tables ──► data ──► bitmaps ──► refcount table and blocks     (the order of counting)
    counted > stored: corruption: a cluster in use could be given out a second time
    counted < stored: leak: lost space, nothing worse

Each L2 table is read once, however many snapshots share it, and counts as often as it is shared. Within a table, what
is zero is skipped, and runs of clusters that follow each other in the file are recognized, by comparisons of whole
blocks, as one addition and one multiplication of large numbers; only what is left is looked at entry by entry.

An entry that cannot be right (reserved bits, no cluster boundary, outside of the file, compressed and marked as
exclusive) is a corruption and is not followed. A table whose place is taken already is one too, and is not read, so
that the work is bounded by the size of the file whatever the entries say. Metadata has to be the only user of its
clusters; an L2 table may be shared by L1 entries, a data cluster by L2 entries.

The check reads through a function and never writes; `repair` does, and uses this module with a `Fixer`. Both are
synchronous: run them in a thread. Nobody may write to the image meanwhile.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

from bitarray import bitarray

from blockstep.drivers.qcow2.counts import Counts
from blockstep.drivers.qcow2.format import (
    BITMAPS,
    COMPRESSED,
    COPIED,
    EXTERNAL_DATA,
    L1_RESERVED,
    L2_RESERVED,
    MOST_BITMAP_DIRECTORY,
    MOST_OFFSET,
    MOST_SNAPSHOT_TABLE,
    OFFSET,
    RAW_EXTERNAL,
    ZERO,
    Snapshot,
    Subclusters,
    compressed_place,
    decode_block,
    decode_table,
    encode_table,
    header_span,
    parse_bitmaps,
    parse_bitmaps_extension,
    parse_header,
    parse_snapshots,
)
from blockstep.errors import ImageError
from blockstep.units import GiB, MiB

Buffer = bytes | bytearray | memoryview
#: (offset, length) -> exactly that many bytes; never called for what is not wholly inside of the file.
Read = Callable[[int, int], Buffer]
Report = Callable[[str], None]

#: Bytes of all L1 tables of snapshots together, at most.
MOST_SNAPSHOT_L1: Final = GiB
#: Entries of an L2 table that are looked at together, at least and at most (powers of two).
_FEWEST, _MOST = 16, 1024
#: So many are worth the attempt to take them as one run.
_RUN: Final = 64
_BITMAP_RESERVED: Final = ~OFFSET


@dataclass(slots=True)
class CheckResult:
    """What a check found. Without corruptions, leaks and check errors the image is clean."""

    #: The end of the last cluster in use, bytes.
    image_end_offset: int = 0
    #: Clusters of the disk; of them allocated, compressed, and not where the one before would lead to.
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    corruptions: int = 0
    leaks: int = 0
    #: What could not be checked.
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.leaks or self.check_errors)

    def as_json(self, filename: str) -> dict[str, int | str]:
        """The fields as ``qemu-img check --output=json`` names them; those it leaves out at 0 are left out."""
        found: dict[str, int | str] = {
            "image-end-offset": self.image_end_offset, "total-clusters": self.total_clusters,
            "check-errors": self.check_errors, "filename": filename, "format": "qcow2"}
        for name in ("allocated_clusters", "fragmented_clusters", "compressed_clusters", "corruptions", "leaks",
                     "corruptions_fixed", "leaks_fixed"):
            value = getattr(self, name)
            if value:
                found[name.replace("_", "-")] = value
        return found


def check(read: Read, length: int, report: Report = lambda text: None) -> CheckResult:
    """Check the image in a file of ``length`` bytes, and ``report`` each finding in a sentence.

    Raises ImageError when there is nothing to check (the header is wrong, a feature is unknown, the image is
    encrypted, or it would take too much memory), and what ``read`` raises.
    """
    return Checker(read, length, report).run()


@dataclass(slots=True)
class Fixer:
    """How a `Checker` changes what it finds wrong in tables."""

    #: (offset, data); nothing is durable before the caller says so.
    write: Callable[[int, bytes], None]
    #: Entries that cannot be right are cleared: an L2 table or a cluster is lost, and reads as zeroes where it can.
    entries: bool = False
    #: The marks of exclusive use are set as the stored refcounts say.
    marks: bool = False
    #: L2 entries that point into these clusters are cleared.
    taken: frozenset[int] = field(default=frozenset())


class Checker:
    """One pass over an image. `run` is called once; then the fields tell what was counted."""

    def __init__(self, read: Read, length: int, report: Report, fixer: Fixer | None = None) -> None:
        self._read, self._length, self._report, self._fix = read, length, report, fixer
        start = self.read(0, min(length, 24))
        self.header: Final = parse_header(self.read(0, min(length, header_span(start))))
        if self.header.crypt_method:
            raise ImageError("crypt_method", self.header.crypt_method, "0: encrypted images are not supported")
        header = self.header
        self.result: Final = CheckResult(total_clusters=-(-header.size >> header.cluster_bits))
        self.end: Final = -(-length >> header.cluster_bits)  #: clusters of the file
        self.counts: Final = Counts(header)
        self.stored: Final = Counts(header)
        self.blocks: Final[dict[int, int]] = {}  #: number of a refcount block -> its offset
        #: The refcount table and its blocks cannot be used: they are damaged, or lie where something else does.
        self.rebuild = False
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
        self._metadata: list[tuple[int, int, int]] = []  # (cluster, how many, how often it is used)
        self._external = bool(header.incompatible & EXTERNAL_DATA)
        self._raw = bool(header.autoclear & RAW_EXTERNAL)
        self._low = header.cluster_size - 1
        self._bad = (L2_RESERVED | ZERO | COMPRESSED | self._low) & ~COPIED
        self._zeroes = bytes(header.cluster_size)

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
            self._l2_table(table, weight, 0)
        return self.counts

    def read_snapshots(self) -> list[Snapshot]:
        """The snapshot table, before or after `run`. Raises ImageError if it is wrong."""
        header = self.header
        if not header.snapshot_count:
            return []
        room = min(MOST_SNAPSHOT_TABLE, max(0, self._length - header.snapshots_offset))
        return parse_snapshots(header, self._prefix(header.snapshots_offset, room))[0]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, and zeroes behind its end."""
        inside = max(0, min(length, self._length - offset))
        data = bytes(self._read(offset, inside)) if inside else b""
        return data if inside == length else data.ljust(length, b"\0")

    # --- counting ---

    def _corrupt(self, text: str) -> None:
        self.result.corruptions += 1
        self._report(f"corruption: {text}")

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
        for index, entry in enumerate(decode_table(self.read(place, size * 8))):
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
            else:
                tables[offset] = tables.get(offset, 0) + 1
                if active and ((refs := self.stored.of(cluster)) == 1) != entry >> 63:
                    self._corrupt(f"{what}, entry {index}: {entry:#x} does not fit to the refcount {refs}")
                    right = offset | (COPIED if refs == 1 else 0)
            if self._fix and right != entry and (self._fix.marks if right else self._fix.entries):
                self._fix.write(place + index * 8, right.to_bytes(8, "big"))
        return tables

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
                best = parse_snapshots(replace(self.header, snapshot_count=middle), data)
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
        tables = dict(active)
        for each in self.snapshots:
            for offset, times in self._l1_table(each.l1_table_offset, each.l1_size,
                                                f"L1 table of snapshot {each.id!r}").items():
                tables[offset] = tables.get(offset, 0) + times
        for offset, weight in tables.items():
            self.counts.add(offset >> bits, weight)
            self._metadata.append((offset >> bits, 1, weight))
        for offset, weight in tables.items():
            self._l2_table(offset, weight, active.get(offset, 0))

    # --- L2 tables ---

    def _l2_table(self, place: int, weight: int, active: int) -> None:
        raw = self.read(place, self.header.cluster_size)
        if raw == self._zeroes:
            return
        values = decode_table(raw)
        table = _Table(place, weight, active, values)
        if self.header.extended_l2:
            self._extended(table, raw)
        elif self._external or (self._fix and self._fix.taken):
            for index, entry in enumerate(values):
                if entry:
                    self._entry(table, index, entry)
        else:
            self._standard(table, raw)
        if active:
            self.result.allocated_clusters += table.allocated * active
            self.result.fragmented_clusters += table.fragmented * active
            self.result.compressed_clusters += table.compressed * active
        if self._fix and table.changed:
            self._fix.write(place, encode_table(values))

    def _standard(self, table: _Table, raw: bytes) -> None:
        values = table.values
        bits = bitarray(buffer=raw, endian="big")
        total, at, window = len(values), 0, _FEWEST
        bad, end, shift = self._bad, self.end, self.header.cluster_bits
        counts, stored, weight, active = self.counts, self.stored, table.weight, table.active
        block_bits, mask = counts.bits, (1 << counts.bits) - 1
        while True:
            at = bits.find(1, at << 6) >> 6
            if at < 0:
                return
            if window >= _RUN and (run := self._run(table, raw, at, min(window, total - at))):
                at += run
                window = min(window * 2, _MOST)
                continue
            part = values[at:at + window]
            full = True
            for index, entry in enumerate(part, at):
                if not entry:
                    full = False
                    continue
                cluster = (entry & OFFSET) >> shift
                if entry & bad or not 0 < cluster < end:
                    self._entry(table, index, entry)
                    continue
                if weight == 1:
                    try:
                        counts[cluster >> block_bits][cluster & mask] += 1
                    except OverflowError:
                        counts.add(cluster)
                else:
                    counts.add(cluster, weight)
                if active:
                    table.allocated += 1
                    if cluster != table.next and table.next:
                        table.fragmented += 1
                    table.next = cluster + 1
                    if (cluster >> block_bits in stored and stored[cluster >> block_bits][cluster & mask] == 1) \
                            != entry >> 63:
                        self._mark(table, index, entry, cluster)
            at += len(part)
            if at >= total:
                return
            window = min(window * 2, _MOST) if full else _FEWEST

    def _extended(self, table: _Table, raw: bytes) -> None:
        """A table whose entries have a second word, for subclusters."""
        values = table.values
        bits = bitarray(buffer=raw, endian="big")
        total, at, window = len(values) // 2, 0, _FEWEST
        while (at := bits.find(1, at << 7) >> 7) >= 0:
            if window >= _RUN and (run := self._run(table, raw, at, min(window, total - at), 2)):
                at += run
                window = min(window * 2, _MOST)
                continue
            end = min(at + window, total)
            full = True
            for index in range(at * 2, end * 2, 2):
                if values[index] or values[index + 1]:
                    self._entry(table, index, values[index], values[index + 1])
                else:
                    full = False
            if end == total:
                return
            at = end
            window = min(window * 2, _MOST) if full and not (self._fix and self._fix.taken) else _FEWEST

    def _run(self, table: _Table, raw: bytes, at: int, room: int, words: int = 1) -> int:
        """Take entries from ``at`` on as one run: of zero clusters, or of clusters one behind the other.

        Returns how many; 0: they are something else. Entries of two words form one if their subclusters are the same.
        """
        count = 1 << room.bit_length() - 1
        first = table.values[at * words]
        size = words * 8
        part = raw[at * size:(at + count) * size]
        if words == 1 and first == ZERO and self.header.version == 3:
            return count if part == _zero_entries(count) else 0
        cluster = (first & OFFSET) >> self.header.cluster_bits
        if first & self._bad or not 0 < cluster <= self.end - count:
            return 0
        if words == 2 and not Subclusters.parse(table.values[at * 2 + 1]).valid:
            return 0
        ones, steps = _ramp(count, self.header.cluster_size, words)
        if int.from_bytes(part, "big") != int.from_bytes(part[:size], "big") * ones + steps:
            return 0
        if table.active:
            if not first & COPIED or not self.stored.all_are(cluster, count, 1):
                return 0
            table.allocated += count
            if table.next and table.next != cluster:
                table.fragmented += 1
            table.next = cluster + count
        self.counts.add_run(cluster, count, table.weight)
        return count

    def _entry(self, table: _Table, index: int, entry: int, bitmap: int | None = None) -> None:
        """Any entry, checked to the letter."""
        if entry & COMPRESSED:
            self._compressed(table, index, entry, bitmap or 0)
            return
        shift = self.header.cluster_bits
        offset = entry & OFFSET
        wrong = ""
        if entry & L2_RESERVED or (entry & ZERO and (bitmap is not None or self.header.version == 2)):
            wrong = "has reserved bits set"
        elif bitmap is not None and not Subclusters.parse(bitmap).valid:
            wrong = "has subclusters that are allocated and zero"
        elif not offset and bitmap and bitmap & 0xFFFFFFFF and not (self._external and entry & COPIED):
            wrong = "has allocated subclusters and no cluster"
        elif offset & self._low:
            wrong = "is not at a cluster boundary"
        elif entry & COPIED and not offset and not self._external:
            wrong = "has no offset"
        elif not self._external and offset >> shift >= self.end:
            wrong = "is outside of the file"
        if wrong or (self._fix and offset >> shift in self._fix.taken and not self._external and offset):
            self._corrupt(f"L2 table at {table.place:#x}, entry {index}: {entry:#x} {wrong or 'is metadata'}")
            self._clear(table, index)
            return
        if not offset and not (self._external and entry & COPIED):
            return
        if self._external:
            self._external_entry(table, index, entry)
            return
        cluster = offset >> shift
        self.counts.add(cluster, table.weight)
        if table.active:
            table.allocated += 1
            if table.next and table.next != cluster:
                table.fragmented += 1
            table.next = cluster + 1
            if (self.stored.of(cluster) == 1) != entry >> 63:
                self._mark(table, index, entry, cluster)

    def _external_entry(self, table: _Table, index: int, entry: int) -> None:
        cluster = (entry & OFFSET) >> self.header.cluster_bits
        if table.active:
            table.allocated += 1
            if table.next and table.next != cluster:
                table.fragmented += 1
            table.next = cluster + 1

    def _compressed(self, table: _Table, index: int, entry: int, bitmap: int) -> None:
        place, size = compressed_place(entry & (COMPRESSED - 1), self.header.cluster_bits)
        end = place + size
        shift = self.header.cluster_bits
        first, last = place >> shift, end - 1 >> shift
        wrong = ""
        if entry & COPIED:
            wrong = "is compressed and marked as exclusive"
        elif bitmap:
            wrong = "is compressed and has subclusters"
        elif self._external:
            wrong = "is compressed in an image with external data"
        elif end >= MOST_OFFSET or end - self._length >= self.header.cluster_size or first >= self.end:
            wrong = "is outside of the file"
        elif not first:
            wrong = "is in the header"
        if wrong or (self._fix and any(each in self._fix.taken for each in range(first, last + 1))):
            self._corrupt(f"L2 table at {table.place:#x}, entry {index}: {entry:#x} {wrong or 'is metadata'}")
            self._clear(table, index)
            return
        for cluster in range(first, min(last + 1, self.end)):
            self.counts.add(cluster, table.weight)
        if table.active:
            table.allocated += 1
            table.compressed += 1
            table.fragmented += 1

    def _mark(self, table: _Table, index: int, entry: int, cluster: int) -> None:
        refs = self.stored.of(cluster)
        self._corrupt(f"L2 table at {table.place:#x}, entry {index}: {entry:#x} does not fit to the refcount {refs}")
        if self._fix and self._fix.marks:
            table.values[index] = entry & ~COPIED | (COPIED if refs == 1 else 0)
            table.changed = True

    def _clear(self, table: _Table, index: int) -> None:
        if not self._fix or not self._fix.entries:
            return
        table.changed = True
        if self.header.extended_l2:
            table.values[index], table.values[index + 1] = 0, 0xFFFFFFFF << 32
        else:
            table.values[index] = ZERO if self.header.version == 3 else 0

    def _check_taken(self) -> None:
        """Metadata of which data is a second user."""
        taken: list[int] = []
        for first, count, weight in self._metadata:
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
            raise ImageError("refcount_table_offset", header.refcount_table_offset, "inside of the file")
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


class _Table:
    """An L2 table while it is looked at."""

    __slots__ = ("active", "allocated", "changed", "compressed", "fragmented", "next", "place", "values", "weight")

    def __init__(self, place: int, weight: int, active: int, values: array[int]) -> None:
        self.place, self.weight, self.active, self.values = place, weight, active, values
        self.allocated = self.fragmented = self.compressed = 0
        self.next = 0  # the cluster that would follow the last one; 0: none yet
        self.changed = False


@cache
def _ramp(count: int, step: int, words: int) -> tuple[int, int]:
    """Of a table of ``count`` entries, as one number: each entry 1, and the first word of entry k ``step`` times k."""
    shifts = range((count - 1) * 64 * words, -1, -64 * words)
    step <<= 64 * (words - 1)
    return sum(1 << shift for shift in shifts), sum(step * k << shift for k, shift in enumerate(shifts))


@cache
def _zero_entries(count: int) -> bytes:
    return ZERO.to_bytes(8, "big") * count
