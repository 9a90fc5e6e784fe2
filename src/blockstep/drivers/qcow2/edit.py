"""Changes of a whole image by one who has it for himself: clusters taken and given back, and the header.

An `Editor` begins with a full check: what is to be changed must be consistent, and the refcounts are in memory then.
While it is at work the dirty bit is set (version 3 has one), so that after a crash everybody repairs before writing:

    begin: dirty bit ─► refcounts go up ─► new tables ─► sync ─► header ─► sync ─► refcounts go down ─► end

so refcounts are too high at worst. Synchronous: run it in a thread.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from typing import Final

from blockstep.drivers.qcow2.check import Checker, Fixer, Read
from blockstep.drivers.qcow2.counts import Counts
from blockstep.drivers.qcow2.format import (
    AT_AUTOCLEAR,
    AT_INCOMPATIBLE,
    AT_L1,
    BITMAPS,
    CORRUPT,
    DIRTY,
    RAW_EXTERNAL,
    TABLES,
    V3_LENGTH,
    Header,
    build_header,
    encode_block,
    fitting,
)
from blockstep.drivers.qcow2.header_steps import header_steps
from blockstep.drivers.qcow2.repair import Sync, Write, new_refcounts, tables_with
from blockstep.errors import ImageError
from blockstep.units import MiB

#: Where the header of version 3 has refcount_order.
_AT_ORDER: Final = 96
_U64: Final = struct.Struct(">Q")


class Editor:
    """An image that is being changed. After an error it is left dirty, for a repair to finish."""

    def __init__(self, read: Read, length: int, write: Write, sync: Sync) -> None:
        """Check the image in a file of ``length`` bytes.

        Raises ImageError: what `check.check` refuses; corruptions; the dirty bit.
        """
        self._read, self._length, self._write, self.sync = read, length, write, sync
        checker = self.checker = Checker(read, length, lambda text: None)
        if checker.run().corruptions or checker.header.incompatible & (DIRTY | CORRUPT):
            raise ImageError("image", f"{checker.result.corruptions} corruptions", "consistent: repair it first")
        self.header: Header = checker.header
        self.refcounts: Final[Counts] = checker.stored
        self._blocks = dict(checker.blocks)
        self._structures = list(checker.refcount_clusters)
        self._table_entries = (self.header.refcount_table_clusters << self.header.cluster_bits) // 8
        self._changed: set[int] = set()

    def begin(self) -> None:
        """Before the first change."""
        if self.header.version == 3:
            self.write(AT_AUTOCLEAR, _U64.pack(self.header.autoclear & (BITMAPS | RAW_EXTERNAL)))
            self.write(AT_INCOMPATIBLE, _U64.pack(self.header.incompatible | DIRTY))
            self.sync()

    def end(self) -> None:
        """Refcounts are written, marks of exclusive use are set by them, and all is durable."""
        self.save()
        Checker(self._read, self._length, lambda text: None, Fixer(self._write, marks=True)).run()
        self.sync()
        if self.header.version == 3:
            self.write(AT_INCOMPATIBLE, _U64.pack(self.header.incompatible))
            self.sync()

    def write(self, offset: int, data: bytes) -> None:
        """Write to the file."""
        self._write(offset, data)
        self._length = max(self._length, offset + len(data))

    def read(self, offset: int, length: int) -> bytes:
        """Read from the file as it is now; zeroes behind its end."""
        inside = max(0, min(length, self._length - offset))
        return (bytes(self._read(offset, inside)) if inside else b"").ljust(length, b"\0")

    def references(self, l1_offset: int, l1_size: int) -> Counts:
        """What an L1 table uses: L2 tables and data clusters."""
        return Checker(self._read, self._length, lambda text: None).count_l1(l1_offset, l1_size)

    def set_header(self, header: Header) -> None:
        """Write another header, in steps; the dirty bit stays. Durable at return."""
        self.header = header
        new = build_header(fitting(header.replaced(incompatible=header.incompatible | DIRTY)))
        for offset, data in header_steps(self.read(0, header.cluster_size), new):
            self.write(offset, data)
            self.sync()

    # --- refcounts ---

    def raise_by(self, used: Counts) -> None:
        """Count what is used once more. Raises ImageError, and changes nothing, if refcounts cannot say that."""
        most = self.header.most_refcount
        sums: dict[int, list[int]] = {}
        for number, block in used.items():
            sums[number] = [one + other for one, other in zip(self.refcounts[number], block, strict=True)]
            if max(sums[number]) > most:
                raise ImageError("refcount_order", self.header.refcount_order, f"for refcounts above {most}")
        for number, values in sums.items():
            self.refcounts[number] = array(self.refcounts[number].typecode, values)
            self._changed.add(number)

    def lower_by(self, used: Counts) -> None:
        """The opposite."""
        for number, block in used.items():
            stored = self.refcounts[number]
            self.refcounts[number] = array(stored.typecode, [
                one - other for one, other in zip(stored, block, strict=True)])
            self._changed.add(number)

    def free(self, clusters: Iterable[int]) -> None:
        """Take one from the refcounts of clusters."""
        bits, mask = self.refcounts.bits, (1 << self.refcounts.bits) - 1
        for cluster in clusters:
            self.refcounts[cluster >> bits][cluster & mask] -= 1
            self._changed.add(cluster >> bits)

    def free_run(self, offset: int, size: int) -> None:
        """Take one from the refcounts of the clusters that ``size`` bytes at ``offset`` take."""
        bits = self.header.cluster_bits
        self.free(range(offset >> bits, (offset >> bits) + -(-size >> bits)))

    def place(self, size: int) -> int:
        """Take free clusters in a row for ``size`` bytes, behind all that are in use. Returns the offset."""
        header, bits = self.header, self.header.cluster_bits
        count = -(-size >> bits)
        start = max(self.refcounts.end(), 1)
        while True:
            wanted = range(start >> self.refcounts.bits, (start + count - 1 >> self.refcounts.bits) + 1)
            missing = [number for number in wanted if number not in self._blocks]
            if not missing:
                break
            if missing[-1] < self._table_entries:
                number = missing[0]  # a block at the first cluster of those that it covers, or behind what is in use
                place = max(start, number << self.refcounts.bits)
                if place >> self.refcounts.bits == number:
                    self._new_block(number, place)
                    start = place + 1
                    continue
            self.save()
            self._blocks, table = new_refcounts(header, self.refcounts, self._structures, start, self.write,
                                                self.sync, room=count + 1)
            self.write(AT_L1, tables_with(header, table))
            self.sync()
            self._structures = [table, *((offset >> bits, 1) for offset in self._blocks.values())]
            self._table_entries = (table[1] << bits) // 8
            self.header = header.replaced(refcount_table_offset=table[0] << bits, refcount_table_clusters=table[1])
            header = self.header
            start = self.refcounts.end()
        self.refcounts.add_run(start, count)
        self._changed.update(range(start >> self.refcounts.bits, (start + count - 1 >> self.refcounts.bits) + 1))
        self.write((start + count << bits) - 1, b"\0")
        return start << bits

    def _new_block(self, number: int, cluster: int) -> None:
        bits = self.header.cluster_bits
        self.refcounts.add(cluster)
        self._blocks[number] = cluster << bits
        self._structures.append((cluster, 1))
        self.write(cluster << bits, encode_block(self.header, self.refcounts[number]))
        self.sync()
        self.write(self.header.refcount_table_offset + number * 8, _U64.pack(cluster << bits))

    def place_zeroes(self, size: int) -> int:
        """As `place`; the clusters read as zeroes."""
        before = self._length  # what is behind it is a hole
        offset = self.place(size)
        for at in range(offset, min(before, offset + size), MiB):
            self.write(at, bytes(min(MiB, before - at, offset + size - at)))
        return offset

    def set_refcount_order(self, order: int) -> None:
        """Give the refcounts another width. Durable at return; before and after it one write of the header.

        Neither needs `begin`, nor `end`. Raises ImageError, and changes nothing, if they cannot say all that they say.
        """
        header = self.header.replaced(refcount_order=order)
        for number, block in self.refcounts.items():
            if max(block) > header.most_refcount:
                cluster = (number << self.refcounts.bits) + block.index(max(block))
                raise ImageError(f"refcount of the cluster at {cluster << header.cluster_bits}", max(block),
                                 f"at most {header.most_refcount} for a width of {header.refcount_bits} bits")
        counts = self.refcounts.recast(header)
        start = max(counts.end(), 1)
        _, table = new_refcounts(header, counts, self._structures, start, self.write, self.sync)
        fields = bytearray(self.read(0, V3_LENGTH))
        fields[AT_L1:AT_L1 + TABLES.size] = tables_with(header, table)
        _U64.pack_into(fields, AT_AUTOCLEAR, header.autoclear & (BITMAPS | RAW_EXTERNAL))
        fields[_AT_ORDER:_AT_ORDER + 4] = order.to_bytes(4, "big")
        self.write(0, bytes(fields))
        self.sync()

    def save(self) -> None:
        """Write the refcounts that changed, durably."""
        for number in sorted(self._changed):
            self.write(self._blocks[number], encode_block(self.header, self.refcounts[number]))
        self._changed.clear()
        self.sync()
