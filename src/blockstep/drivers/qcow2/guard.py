"""Which clusters have their one user: so that nothing that a disk's user writes meets metadata, whatever tables say.

A write goes in place where an L2 entry has the mark of exclusive use (COPIED). An image that was made for the purpose,
or is damaged, has such entries for clusters of tables. So while an image is open for writing, each cluster that is
known to have one user is *claimed*, and can be claimed only once:

    when                                      claimed are
    the image is opened                       header, L1, refcount table and blocks, snapshot table, L1 of snapshots,
                                              bitmaps, and the L2 tables that one L1 entry leads to
    an L2 table is loaded, the first time     the clusters that its entries say are exclusive
    a cluster is given out                    that one; it must not be claimed, whatever its refcount says
    a cluster is free (its refcount falls)    it no longer is

A table with an entry for a claimed cluster is refused, entries without the mark too: a write would take one from the
refcount of what is not its own. So is one that claims what an entry without the mark has left (`Guard.leave`): that
becomes free, or is a snapshot's. L2 tables that are shared, or belong to snapshots, may be met more than once, but not
as data (`Guard.shared`), and those of snapshots never become free (`Guard.kept`). So no table is ever written to as
data, overwritten by another, or given out as free. A cluster of data that two L2 entries claim is found as well.

Bits are kept in chunks that come into being with the first claim, at most `MOST_CHUNKS`. A table is looked at once
while the image is open, however often it leaves the cache: nobody else writes to the image.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

from bitarray import bitarray

from blockstep.block.node import Child
from blockstep.drivers.qcow2.format import (
    COMPRESSED,
    COPIED,
    MOST_SNAPSHOT_TABLE,
    OFFSET,
    Header,
    Snapshot,
    decode_table,
    parse_snapshots,
)
from blockstep.drivers.qcow2.refcounts import read_file
from blockstep.drivers.qcow2.tables import clusters_of
from blockstep.errors import ImageError
from blockstep.units import GiB, MiB

_CHUNK_BITS: Final = 15
#: Of 4 KiB each: 256 MiB, enough for 128 TiB with clusters of 64 KiB.
MOST_CHUNKS: Final = 65536
#: Bytes of the L1 tables of all snapshots together.
_MOST_SNAPSHOT_L1: Final = GiB


class Wrong(NamedTuple):
    """What is wrong with a table, and the range in the file that it is about, if there is one."""

    what: str
    offset: int | None = None
    length: int | None = None


class Clusters:
    """A set of clusters, a bit each. Raises OSError (EFBIG) when it would become too large."""

    def __init__(self) -> None:
        self._chunks: dict[int, bitarray] = {}

    def any(self, first: int, count: int = 1) -> bool:
        """Whether one of them is in it."""
        for number, begin, end in _pieces(first, count):
            chunk = self._chunks.get(number)
            if chunk is not None and chunk.find(1, begin, end) >= 0:
                return True
        return False

    def add(self, first: int, count: int = 1) -> None:
        for number, begin, end in _pieces(first, count):
            chunk = self._chunks.get(number)
            if chunk is None:
                if len(self._chunks) >= MOST_CHUNKS:
                    raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}: clusters in use are spread over more than "
                                               f"{MOST_CHUNKS << _CHUNK_BITS} clusters")
                chunk = self._chunks[number] = bitarray(1 << _CHUNK_BITS)
            chunk[begin:end] = 1

    def remove(self, first: int, count: int = 1) -> None:
        for number, begin, end in _pieces(first, count):
            chunk = self._chunks.get(number)
            if chunk is not None:
                chunk[begin:end] = 0

    def clear(self) -> None:
        self._chunks.clear()


def _pieces(first: int, count: int) -> Iterable[tuple[int, int, int]]:
    """The chunks of a run of clusters, with the begin and the end in each."""
    begin = first & ((1 << _CHUNK_BITS) - 1)
    if begin + count <= 1 << _CHUNK_BITS:
        return ((first >> _CHUNK_BITS, begin, begin + count),)
    return _many_pieces(first, count)


def _many_pieces(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    while count > 0:
        begin = first & ((1 << _CHUNK_BITS) - 1)
        part = min(count, (1 << _CHUNK_BITS) - begin)
        yield first >> _CHUNK_BITS, begin, begin + part
        first, count = first + part, count - part


def _rows(clusters: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours in a sorted list together: (first, count)."""
    if not clusters:
        return
    first = clusters[0]
    expected = first + 1
    for cluster in clusters[1:]:
        if cluster != expected:
            yield first, expected - first
            first = cluster
        expected = cluster + 1
    yield first, expected - first


class Guard:
    """See the module."""

    def __init__(self, header: Header) -> None:
        self._bits = header.cluster_bits
        self.claimed = Clusters()
        #: L2 tables that more than one L1 entry may lead to; of them those of snapshots.
        self.shared = Clusters()
        self.kept = Clusters()
        #: Data that entries without the mark referred to, and do not any more: no other table has it to itself.
        self._left = Clusters()

    def taken(self, first: int, count: int = 1) -> bool:
        """Whether one of these clusters is claimed, or a shared L2 table."""
        return self.claimed.any(first, count) or self.shared.any(first, count)

    def claim(self, first: int, count: int, what: str) -> None:
        """Claim clusters when the image is opened. Raises ImageError."""
        if self.taken(first, count):
            raise ImageError(what, hex(first << self._bits), "where nothing else is: repair it first")
        self.claimed.add(first, count)

    def leave(self, clusters: range) -> None:
        """An entry without the mark refers to them no more. They become free, unless a snapshot has them too."""
        with suppress(OSError):  # more than can be noted
            self._left.add(clusters.start, len(clusters))

    def claim_entries(self, table: array[int], external: bool) -> Wrong | None:
        """Claim what the entries of an L2 table that was loaded say is exclusive.

        Returns what is wrong; if something is then nothing is claimed.
        """
        if external:  # their data is elsewhere
            return None
        bits, claimed = self._bits, []
        wrong: Wrong | None
        exclusive = sorted([(entry & OFFSET) >> bits for entry in table
                            if entry > COPIED and entry & OFFSET and not entry & COMPRESSED])
        try:
            for first, count in _rows(exclusive):
                if self._left.any(first, count):
                    wrong = Wrong("it refers to clusters that nothing else refers to any more")
                    break
                if self.taken(first, count):
                    wrong = self._met(first, count)
                    break
                self.claimed.add(first, count)
                claimed.append((first, count))
            else:
                wrong = self._foreign([entry for entry in table if entry and (entry < COPIED or entry & COMPRESSED)])
        except OSError as error:
            wrong = Wrong(str(error))
        if wrong:
            for each in claimed:
                self.claimed.remove(*each)
        return wrong

    def _foreign(self, entries: list[int]) -> Wrong | None:
        """What is wrong with entries that are shared or compressed."""
        for entry in entries:
            clusters = clusters_of(entry, self._bits)
            if clusters and self.taken(clusters.start, len(clusters)):
                return self._met(clusters.start, len(clusters))
        return None

    def _met(self, first: int, count: int) -> Wrong:
        offset, length = first << self._bits, count << self._bits
        return Wrong(f"its data at {offset:#x} ({length} bytes) has another user", offset, length)

    def start_again(self, used: Iterable[int]) -> None:
        """The image was emptied: only these clusters are in use."""
        for each in (self.claimed, self.shared, self._left):
            each.clear()
        for cluster in used:
            self.claimed.add(cluster)


async def guard_of(file: Child, header: Header, l1: array[int], refcount_table: array[int]) -> Guard:
    """The guard of an image that is opened for writing. Raises ImageError if metadata overlaps, or OSError."""
    guard, bits = Guard(header), header.cluster_bits
    guard.claim(0, 1, "header")
    guard.claim(header.l1_table_offset >> bits, _clusters(header, header.l1_size * 8), "l1_table_offset")
    guard.claim(header.refcount_table_offset >> bits, header.refcount_table_clusters, "refcount_table_offset")
    for entry in filter(None, refcount_table):
        guard.claim((entry & OFFSET) >> bits, 1, "refcount block")
    if header.snapshot_count:
        snapshots, size = await _snapshots(file, header)
        guard.claim(header.snapshots_offset >> bits, _clusters(header, size), "snapshots_offset")
        for snapshot in snapshots:
            guard.claim(snapshot.l1_table_offset >> bits, _clusters(header, snapshot.l1_size * 8),
                        "snapshot l1_table_offset")
        for snapshot in snapshots:
            table = decode_table(await read_file(file, snapshot.l1_table_offset, snapshot.l1_size * 8))
            for cluster in {(entry & OFFSET) >> bits for entry in table if entry & OFFSET}:
                _share(guard, cluster)
                guard.kept.add(cluster)
    exclusive = [(entry & OFFSET) >> bits for entry in l1 if entry & COPIED and entry & OFFSET]
    for cluster in exclusive:
        guard.claim(cluster, 1, "L2 table")
    others = Counter((entry & OFFSET) >> bits for entry in l1 if entry & OFFSET and not entry & COPIED)
    for cluster, times in others.items():
        if times > 1 or guard.kept.any(cluster):
            _share(guard, cluster)
        else:  # only the mark is missing; nobody else stops the table from becoming free
            guard.claim(cluster, 1, "L2 table")
    return guard


def _clusters(header: Header, size: int) -> int:
    return -(-size >> header.cluster_bits)


def _share(guard: Guard, cluster: int) -> None:
    if guard.claimed.any(cluster):
        raise ImageError("L2 table", hex(cluster), "in a cluster that is not other metadata: repair it first")
    guard.shared.add(cluster)


async def _snapshots(file: Child, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshots, and the bytes that their table has."""
    size = MiB
    while True:
        try:
            found, used = parse_snapshots(header, await read_file(file, header.snapshots_offset, size))
            break
        except ImageError:
            if size >= MOST_SNAPSHOT_TABLE:
                raise
            size *= 8
    if sum(each.l1_size for each in found) * 8 > _MOST_SNAPSHOT_L1:
        raise ImageError("snapshot l1_size", sum(each.l1_size for each in found),
                         f"at most {_MOST_SNAPSHOT_L1 // 8} in all snapshots together")
    return found, used
