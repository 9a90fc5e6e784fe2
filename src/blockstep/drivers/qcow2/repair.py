"""Repair of an image: leaks are given back, or everything is made consistent.

    leaks   refcounts that are too high are lowered; nothing else is touched
    all     1. entries of L1 and L2 tables that cannot be right are cleared (what they led to is lost), snapshots
               without an L1 table are dropped, bitmaps that are damaged are given up (the autoclear bit is reset)
            2. refcounts become what is counted; if their table or a block is damaged or missing, new ones are written
               behind the end of what is in use, and then the header is changed
            3. marks of exclusive use become what the refcounts say
            4. the bits for dirty and corrupt are reset, if the image is clean now

Data is worth more than structures that can be counted anew: where a refcount block and a cluster of data overlap, the
data stays. Where data and a table overlap, the table stays, and the data that was in its place is lost in any case.

An image whose active L1 table is not in the file is left as it is: all of its data would count as leaked.

Killed in the middle, a repair leaves an image that the next one repairs: the header's bits are reset last.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Final, Literal

from blockstep.drivers.qcow2.check import Checker, CheckResult, Fixer, Read, Report
from blockstep.drivers.qcow2.counts import Counts
from blockstep.drivers.qcow2.format import (
    AT_AUTOCLEAR,
    AT_INCOMPATIBLE,
    AT_L1,
    BITMAPS,
    CORRUPT,
    DIRTY,
    MOST_REFCOUNT_TABLE,
    TABLES,
    Header,
    build_snapshots,
    encode_block,
    encode_table,
)
from blockstep.errors import ImageError

Write = Callable[[int, bytes], None]
Sync = Callable[[], None]
Repair = Literal["leaks", "all"]

_U64: Final = struct.Struct(">Q")
#: Where the header has the number and the place of the snapshots.
_AT_SNAPSHOTS: Final = 60
_SNAPSHOTS: Final = struct.Struct(">IQ")


def repair(read: Read, length: int, write: Write, sync: Sync, what: Repair, report: Report = lambda text: None,
           ) -> CheckResult:
    """Check the image in a file of ``length`` bytes, repair it, and check it again.

    The result is that of the last check, and says how much less there is to complain about. ``write`` may be called
    for what is behind the end of the file. At return everything is durable.

    Raises ImageError as `check.check` does, and what ``read``, ``write`` and ``sync`` raise.
    """
    return _Repair(read, length, write, sync).run(what, report)


class _Repair:
    def __init__(self, read: Read, length: int, write: Write, sync: Sync) -> None:
        self._read, self._length, self._raw_write, self._sync = read, length, write, sync

    def run(self, what: Repair, report: Report) -> CheckResult:
        first = self._checker(report)
        before = first.run()
        pending = first.header.incompatible & (DIRTY | CORRUPT)
        if first.l1_broken or (before.clean and not (pending and what == "all")):
            return before
        if what == "leaks":
            if before.leaks and not first.rebuild:
                self._write_refcounts(first, only_leaks=True)
        elif before.corruptions or before.leaks:
            self._all(first)
        self._sync()
        last = self._checker()
        after = last.run()
        if what == "all" and not after.corruptions and pending:
            self._write(AT_INCOMPATIBLE, _U64.pack(last.header.incompatible & ~(DIRTY | CORRUPT)))
            self._sync()
        after.corruptions_fixed = max(0, before.corruptions - after.corruptions)
        after.leaks_fixed = max(0, before.leaks - after.leaks)
        return after

    def _all(self, first: Checker) -> None:
        if first.snapshots_broken:
            self._rewrite_snapshots(first)
        if first.bitmaps_broken:
            self._write(AT_AUTOCLEAR, _U64.pack(first.header.autoclear & ~BITMAPS))
        entries = self._checker(fixer=Fixer(self._write, entries=True))
        entries.run()
        if entries.taken:
            self._checker(fixer=Fixer(self._write, entries=True, taken=entries.taken)).run()
        self._sync()
        counted = self._checker()
        counted.run()
        if counted.rebuild or any(number not in counted.blocks for number, block in counted.counts.items()
                                  if any(block)):
            self._rebuild(counted)
        else:
            self._write_refcounts(counted)
        self._sync()
        self._checker(fixer=Fixer(self._write, marks=True)).run()

    def _checker(self, report: Report = lambda text: None, fixer: Fixer | None = None) -> Checker:
        return Checker(self._read, self._length, report, fixer)

    def _write(self, offset: int, data: bytes) -> None:
        self._raw_write(offset, data)
        self._length = max(self._length, offset + len(data))

    def _rewrite_snapshots(self, checker: Checker) -> None:
        """The snapshots that can be read, in a table of its own: the old place may be too short, or taken."""
        header, table = checker.header, b""
        if checker.snapshots:
            table = build_snapshots([each if each.disk_size is not None or header.version == 2 else
                                     each.replaced(disk_size=header.size) for each in checker.snapshots])
        place = self._new_place(header, len(table)) if table else 0
        if table:
            self._write(place, table)
            self._sync()
        self._write(_AT_SNAPSHOTS, _SNAPSHOTS.pack(len(checker.snapshots), place))

    def _new_place(self, header: Header, size: int) -> int:
        """Whole clusters behind the end of the file, which is brought to a cluster's boundary and beyond them."""
        place = -(-self._length >> header.cluster_bits) << header.cluster_bits
        end = place + (-(-size >> header.cluster_bits) << header.cluster_bits)
        self._write(end - 1, b"\0")
        return place

    # --- refcounts ---

    def _write_refcounts(self, checker: Checker, only_leaks: bool = False) -> None:
        header = checker.header
        for number in sorted(checker.blocks):
            stored, counted = checker.stored[number], checker.counts[number]
            if only_leaks:
                lower = array(stored.typecode, map(min, stored, counted))
                if lower != stored:
                    self._write(checker.blocks[number], encode_block(header, lower))
            elif counted != stored:
                _clip(header, counted)
                self._write(checker.blocks[number], encode_block(header, counted))

    def _rebuild(self, checker: Checker) -> None:
        start = -(-self._length >> checker.header.cluster_bits)
        _, table = new_refcounts(checker.header, checker.counts, checker.refcount_clusters, start, self._write,
                                 self._sync)
        self._write(AT_L1, tables_with(checker.header, table))


def new_refcounts(header: Header, counts: Counts, old: list[tuple[int, int]], start: int, write: Write,
                      sync: Sync, room: int = 0) -> tuple[dict[int, int], tuple[int, int]]:
    """Write refcounts to a new place, from cluster ``start`` on, behind everything that is in use.

    ``counts`` are what they say, and follow; ``old`` is where the old ones are (first cluster, how many), which is free
    afterwards. ``room``: so many more clusters behind them are covered. Returns the offsets of the blocks by number,
    and the first cluster and the clusters of the table. Durable at return; the header refers to the old ones still.
    """
    bits = header.cluster_bits
    for first, count in old:
        for cluster in range(first, first + count):
            counts[cluster >> counts.bits][cluster & ((1 << counts.bits) - 1)] = 0
    used = {number for number, block in counts.items() if any(block)}
    numbers, table_clusters = _layout(header, start, used, room)
    if table_clusters << bits > MOST_REFCOUNT_TABLE:
        raise ImageError("refcount_table_clusters", table_clusters, f"at most {MOST_REFCOUNT_TABLE} bytes")
    counts.add_run(start, table_clusters + len(numbers))
    table = array("Q", bytes(table_clusters << bits))
    for index, number in enumerate(numbers):
        table[number] = (start + table_clusters + index) << bits
        block = counts[number]
        _clip(header, block)
        write(table[number], encode_block(header, block))
    write(start << bits, encode_table(table))
    sync()
    return {number: table[number] for number in numbers}, (start, table_clusters)


def tables_with(header: Header, table: tuple[int, int]) -> bytes:
    """What lies `AT_L1` in a header that refers to another refcount table: its first cluster, and how many."""
    return TABLES.pack(header.l1_size, header.l1_table_offset, table[0] << header.cluster_bits, table[1])


def _layout(header: Header, start: int, used: set[int], room: int) -> tuple[list[int], int]:
    """The refcount blocks and the clusters of the table, if they lie at cluster ``start``: they count themselves."""
    numbers, table_clusters = set(used), 1
    while True:
        end = start + table_clusters + len(numbers) + room
        own = range(start >> header.block_bits, (end - 1 >> header.block_bits) + 1)
        wanted = numbers | set(own)
        clusters = max(1, -(-(max(wanted) + 1) * 8 >> header.cluster_bits))
        if wanted == numbers and clusters == table_clusters:
            return sorted(numbers), table_clusters
        numbers, table_clusters = wanted, clusters


def _clip(header: Header, block: array[int]) -> None:
    """More users than a refcount can say: the most it can."""
    if max(block) > header.most_refcount:
        block[:] = array(block.typecode, [min(each, header.most_refcount) for each in block])
