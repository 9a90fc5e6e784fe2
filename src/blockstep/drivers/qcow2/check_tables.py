"""The tables of a check: what one L2 table uses.

What is zero is skipped, and runs of clusters that follow each other in the file are recognized, by comparisons of whole
blocks, as one addition and one multiplication of large numbers; only what is left is looked at entry by entry. Each
table is read once, however many snapshots share it, and counts as often as it is shared.

An entry that cannot be right (reserved bits, no cluster boundary, outside of the file, compressed and marked as
exclusive) is a corruption and is not followed.

With an external data file an entry says nothing that is not known: data lies where the disk has it, in clusters of its
own. So each table has its place on the disk (``start``), and an entry that says otherwise is put right by a repair; if
the data file is raw then any that is wrong is, since the file holds all of the disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache

from bitarray import bitarray

from blockstep.aio import Buffer
from blockstep.drivers.qcow2.counts import Counts
from blockstep.drivers.qcow2.format import (
    COMPRESSED,
    COPIED,
    EXTERNAL_DATA,
    L2_RESERVED,
    MOST_OFFSET,
    OFFSET,
    RAW_EXTERNAL,
    ZERO,
    Subclusters,
    compressed_place,
    decode_table,
    encode_table,
    header_span,
    parse_header,
)
from blockstep.errors import ImageError
from blockstep.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: (offset, length) -> exactly that many bytes; never called for what is not wholly inside of the file.
Read = Callable[[int, int], Buffer]
Report = Callable[[str], None]

#: Entries of an L2 table that are looked at together, at least and at most (powers of two).
_FEWEST, _MOST = 16, 1024
#: So many are worth the attempt to take them as one run.
_RUN: Final = 64
#: What the second word of an extended entry says: all subclusters are allocated.
_ALLOCATED: Final = (1 << 32) - 1


class CheckResult:
    """What a check found. Without corruptions, leaks and check errors the image is clean."""

    def __init__(self, total_clusters: int) -> None:
        #: The end of the last cluster in use, bytes.
        self.image_end_offset = 0
        #: Clusters of the disk; of them allocated, compressed, and not where the one before would lead to.
        self.total_clusters = total_clusters
        self.allocated_clusters = 0
        self.compressed_clusters = 0
        self.fragmented_clusters = 0
        self.corruptions = 0
        self.leaks = 0
        #: What could not be checked.
        self.check_errors = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0

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


class Fixer(Record):
    """How a `Checker` changes what it finds wrong in tables."""

    #: (offset, data); nothing is durable before the caller says so.
    write: Callable[[int, bytes], None]
    #: Entries that cannot be right are cleared: an L2 table or a cluster is lost, and reads as zeroes where it can.
    #: Those of data in an external file are put right where it is clear what they should be.
    entries: bool = False
    #: The marks of exclusive use are set as the stored refcounts say.
    marks: bool = False
    #: L2 entries that point into these clusters are cleared.
    taken: frozenset[int] = frozenset()


class TableChecker:
    """What a check knows of the image, and how it looks at L2 tables."""

    def __init__(self, read: Read, length: int, report: Report, fixer: Fixer | None = None) -> None:
        self._read, self._length, self._report, self._fix = read, length, report, fixer
        start = self.read(0, min(length, 24))
        self.header: Final = parse_header(self.read(0, min(length, header_span(start))))
        if self.header.crypt_method:
            raise ImageError("crypt_method", self.header.crypt_method, "0: encrypted images are not supported")
        header = self.header
        self.result: Final = CheckResult(-(-header.size >> header.cluster_bits))
        self.end: Final = -(-length >> header.cluster_bits)  #: clusters of the file
        self.counts: Final = Counts(header)
        self.stored: Final = Counts(header)
        self._external = bool(header.incompatible & EXTERNAL_DATA)
        self._raw_data = bool(header.autoclear & RAW_EXTERNAL)
        self._low = header.cluster_size - 1
        self._bad = (L2_RESERVED | ZERO | COMPRESSED | self._low) & ~COPIED
        self._zeroes = bytes(header.cluster_size)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, and zeroes behind its end."""
        inside = max(0, min(length, self._length - offset))
        data = bytes(self._read(offset, inside)) if inside else b""
        return data if inside == length else data.ljust(length, b"\0")

    def _corrupt(self, text: str) -> None:
        self.result.corruptions += 1
        self._report(f"corruption: {text}")

    def l2_table(self, place: int, weight: int, active: int, start: int = 0) -> None:
        """Count what an L2 table refers to, ``weight`` times; it has ``active`` references from the active L1 table.

        ``start``: the byte of the disk that its first entry is for; of use with external data only.
        """
        raw = self.read(place, self.header.cluster_size)
        if raw == self._zeroes:
            return
        values = decode_table(raw)
        table = _Table(place, weight, active, values, start)
        if self.header.extended_l2 or self._external or (self._fix and self._fix.taken):
            self._any(table, raw)
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

    def _any(self, table: _Table, raw: bytes) -> None:
        """A table of any kind; with extended entries, those have a second word, for subclusters."""
        values, words = table.values, 2 if self.header.extended_l2 else 1
        bits = bitarray(buffer=raw, endian="big")
        shift = 5 + words
        total, at, window = len(values) // words, 0, _FEWEST
        while (at := bits.find(1, at << shift) >> shift) >= 0:
            if window >= _RUN and (run := self._run(table, raw, at, min(window, total - at), words)):
                at += run
                window = min(window * 2, _MOST)
                continue
            end = min(at + window, total)
            full = True
            for index in range(at * words, end * words, words):
                if any(values[index:index + words]):
                    self._entry(table, index, values[index], values[index + 1] if words == 2 else None)
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
        if self._external:
            if first != self._home(table, at * words) | COPIED:
                return 0
        elif first & self._bad or not 0 < cluster <= self.end - count:
            return 0
        if words == 2 and not Subclusters.parse(table.values[at * 2 + 1]).valid:
            return 0
        ones, steps = _ramp(count, self.header.cluster_size, words)
        if int.from_bytes(part, "big") != int.from_bytes(part[:size], "big") * ones + steps:
            return 0
        if table.active:
            if not self._external and not (first & COPIED and self.stored.all_are(cluster, count, 1)):
                return 0
            table.allocated += count
            if table.next and table.next != cluster:
                table.fragmented += 1
            table.next = cluster + count
        if not self._external:
            self.counts.add_run(cluster, count, table.weight)
        return count

    def _entry(self, table: _Table, index: int, entry: int, bitmap: int | None = None) -> None:
        """Any entry, checked to the letter."""
        if entry & COMPRESSED:
            self._compressed(table, index, entry, bitmap or 0)
            return
        shift = self.header.cluster_bits
        offset = entry & OFFSET
        placed = offset or (self._external and entry & COPIED and not entry & ZERO)
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
        elif self._external and placed and offset != self._home(table, index):
            wrong = f"is not at {self._home(table, index):#x}, where the disk has it"
        if wrong or (self._fix and offset >> shift in self._fix.taken and not self._external and offset):
            self._corrupt(f"L2 table at {table.place:#x}, entry {index}: {entry:#x} {wrong or 'is metadata'}")
            self._clear(table, index)
            return
        if not placed:
            return
        cluster = offset >> shift
        if not self._external:
            self.counts.add(cluster, table.weight)
        if table.active:
            table.allocated += 1
            if table.next and table.next != cluster:
                table.fragmented += 1
            table.next = cluster + 1
            if (self._external or self.stored.of(cluster) == 1) != entry >> 63:
                self._mark(table, index, entry, cluster)

    def _home(self, table: _Table, index: int) -> int:
        """Where the disk, and so an external data file, has the cluster of an entry."""
        return table.start + (index >> self.header.extended_l2 << self.header.cluster_bits)

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
        refs = 1 if self._external else self.stored.of(cluster)
        self._corrupt(f"L2 table at {table.place:#x}, entry {index}: {entry:#x} does not fit to the refcount {refs}")
        if self._fix and self._fix.marks:
            table.values[index] = entry & ~COPIED | (COPIED if refs == 1 else 0)
            table.changed = True

    def _clear(self, table: _Table, index: int) -> None:
        if not self._fix or not self._fix.entries:
            return
        table.changed = True
        entry, extended = table.values[index], self.header.extended_l2
        if self._raw_data:
            table.values[index] = self._home(table, index) | COPIED
            if extended:
                table.values[index + 1] = _ALLOCATED
        elif self._external and entry & (OFFSET | COPIED) and not entry & COMPRESSED and (
                not extended or Subclusters.parse(table.values[index + 1]).valid):
            table.values[index] = self._home(table, index) | COPIED | (0 if extended else entry & ZERO)
        elif extended:
            table.values[index], table.values[index + 1] = 0, _ALLOCATED << 32
        else:
            table.values[index] = ZERO if self.header.version == 3 else 0


class _Table:
    """An L2 table while it is looked at."""

    __slots__ = ("active", "allocated", "changed", "compressed", "fragmented", "next", "place", "start", "values",
                 "weight")

    def __init__(self, place: int, weight: int, active: int, values: array[int], start: int) -> None:
        self.place, self.weight, self.active, self.values, self.start = place, weight, active, values, start
        self.allocated = self.fragmented = self.compressed = 0
        self.next = 0  # the cluster that would follow the last one; 0: none yet
        self.changed = False


@cache
def _ramp(count: int, step: int, words: int) -> tuple[int, int]:
    """Of a table of ``count`` entries, as one number: each entry 1, and the first word of entry k ``step`` times k."""
    steps = array("Q", bytes(count * words * 8))
    steps[::words] = array("Q", range(0, count * step, step))
    return int.from_bytes((1).to_bytes(words * 8, "big") * count, "big"), int.from_bytes(encode_table(steps), "big")


@cache
def _zero_entries(count: int) -> bytes:
    return ZERO.to_bytes(8, "big") * count
