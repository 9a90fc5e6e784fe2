"""Which clusters of the file are in use: refcounts, finding free clusters, and giving clusters back.

A cluster that is no longer referred to goes through three stations before it can be used again:

    retired   the table that referred to it has changed in memory
    durable   ... and on the disk: a crash cannot bring the reference back (`Saved` by the driver)
    free      and every request that began before has ended: nobody reads or writes there any more

Requests are counted for that in two turns (`running`): one counts those that begin now, the other those that began
before the last change of turns. When the older is empty, the turns change, and what was durable at the last change is
free. A request that never waits is never in the way.

Blocks are kept in memory decoded, those that changed until they are saved, the others up to the limit of the cache.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from blockstep.block.node import Child
from blockstep.drivers.qcow2.format import (
    EXTERNAL_DATA,
    MOST_OFFSET,
    MOST_REFCOUNT_TABLE,
    OFFSET,
    Header,
    decode_block,
    decode_table,
    empty_block,
    encode_block,
)

if TYPE_CHECKING:
    from blockstep.drivers.qcow2.guard import Guard

#: The file grows in steps; `Refcounts.trim` takes back what was not needed.
_STEP: Final = 16 << 20
#: Runs of clusters whose refcounts are lowered in one turn of the event loop.
_AT_ONCE: Final = 256


async def read_file(file: Child, offset: int, length: int) -> bytes:
    """Bytes of the file; what lies beyond its end reads as zeroes."""
    there = max(0, min(length, file.node.length - offset))
    data = bytes(await file.pread(offset, there)) if there else b""
    return data.ljust(length, b"\0")


class Refcounts:
    """The refcounts of one image. ``save`` is called when too many blocks wait for being saved."""

    def __init__(self, file: Child, header: Header, most_blocks: int, save: Callable[[], Awaitable[None]]) -> None:
        self._file, self._header, self._most, self._save = file, header, max(4, most_blocks), save
        self._bits, self._per = header.cluster_bits, header.block_bits
        self.table: array[int] = array("Q")
        self.table_offset = header.refcount_table_offset
        self.blocks: dict[int, array[int]] = {}
        self.dirty: dict[int, tuple[int, int]] = {}  #: block -> the clusters in it that changed, [first, end)
        self.saving: dict[int, tuple[int, int]] = {}  #: those that a save is writing, perhaps not yet to the file
        self.table_dirty: set[int] = set()
        self.table_moved = False
        self._distinct = False  # the blocks of the table: looked at before the first allocation
        self._lock = asyncio.Lock()
        self._growing = asyncio.Lock()
        self._cursor = 1
        #: Where the next compressed data goes (bytes), in a cluster that has some already; 0: in no such.
        self._packing = 0
        self.file_length = file.node.length
        #: Up to where data can be read and written as it is: there, or anywhere in an external data file.
        self.data_length = self.file_length if not header.incompatible & EXTERNAL_DATA else MOST_OFFSET
        self._first_length = self.file_length
        #: From here on (bytes) the file was never written to: it reads as zeroes.
        self.virgin = -(-self.file_length >> self._bits) << self._bits
        self._high = 0
        #: While the image is open for writing.
        self.guard: Guard | None = None
        #: Called before a request fails that met metadata that cannot be right: with what is wrong, and where in the
        #: file, (offset, length), as far as that can be said.
        self.on_broken: Callable[[str, int | None, int | None], None] | None = None
        #: The same, if it met a cluster with two users.
        self.on_damage: Callable[[str, int | None, int | None], Awaitable[None]] | None = None
        self.running = [0, 0]
        self.turn = 0
        self.retired: list[int] = []
        self._durable: list[int] = []
        self._waiting: list[int] = []  # durable, and the turns have changed since
        #: Called with (offset, length) of clusters that are about to be free.
        self.on_free: Callable[[int, int], Awaitable[None]] | None = None
        #: While make_empty is not durable: clusters that the image on the disk uses; `index` -> block, None: unknown.
        self.before: tuple[array[int], dict[int, array[int]]] | None = None
        #: Clusters that are not given out though nobody uses them: [first, end).
        self.reserved = (0, 0)

    async def open(self) -> None:
        """Load the table."""
        length = self._header.refcount_table_clusters << self._bits
        self.table = decode_table(await read_file(self._file, self.table_offset, length))

    async def block(self, index: int) -> array[int] | None:
        """A block as it is in memory, loaded if it is not; None: all of its clusters are free. Under the lock."""
        block = self.blocks.get(index)
        if block is not None:
            return block
        entry = self.table[index] if index < len(self.table) else 0
        if not entry:
            return None
        if entry & ((1 << self._bits) - 1) or entry & ~OFFSET or entry >= self.file_length:
            raise self.broken(f"refcount block {index} is said to be at {entry:#x}")
        while len(self.blocks) >= self._most:
            clean = next((each for each in self.blocks if each not in self.dirty and each not in self.saving), None)
            if clean is None:
                await self._save()
            else:
                del self.blocks[clean]
        block = decode_block(self._header, await read_file(self._file, entry, 1 << self._bits))
        self.blocks[index] = block
        return block

    async def of(self, cluster: int) -> int:
        """The refcount of a cluster."""
        async with self._lock:
            return await self._count(cluster)

    async def uses_beyond_end(self) -> bool:
        """Whether clusters behind the file's end, as far as the file's node knows it, are in use."""
        first = -(-self.file_length >> self._bits)
        async with self._lock:
            for index in range(first >> self._per, len(self.table)):
                if self.table[index] >= self.file_length:
                    return True
                block = await self.block(index)
                if block is not None and any(block[max(0, first - (index << self._per)):]):
                    return True
        return False

    async def allocate(self, wanted: int, exactly: bool = False) -> tuple[int, int, bool]:
        """Take free clusters in a row, ``wanted`` of them or (unless ``exactly``) fewer.

        Returns the offset in bytes, the clusters, and whether the file reads as zeroes there. They have the refcount 1
        in memory. Raises OSError: ENOSPC, or what reading the refcounts raised.
        """
        async with self._lock:
            await self._reclaim()
            cluster, count = await self._find(wanted, exactly)
            await self._check_free(cluster, count)
            end = (cluster + count) << self._bits
            if end > self.file_length:
                await self.grow(end)
            virgin = cluster << self._bits >= self.virgin
            await self._change(cluster, count)
            if self.guard is not None:
                self.guard.claimed.add(cluster, count)
            if not exactly:
                self._cursor = cluster + count
            return cluster << self._bits, count, virgin

    async def allocate_bytes(self, sizes: Sequence[int]) -> list[int]:
        """Take places for compressed data, each piece at most a cluster: at any byte, each behind the last if possible.

        A cluster counts the pieces that it has a part of. Returns the offsets in bytes. Raises as `allocate` does.
        """
        places: list[int] = []
        async with self._lock:
            await self._reclaim()
            try:
                for size in sizes:
                    place = await self._place_bytes(size)
                    places.append(place)
            except BaseException:
                await self._lower_bytes(places, sizes)
                raise
        return places

    async def _place_bytes(self, size: int) -> int:
        at = self._packing
        first, room = at >> self._bits, -at & ((1 << self._bits) - 1)
        if room and not 0 < await self._count(first) < self._header.most_refcount:
            room = 0
        if room < size:
            cluster, _ = await self._find(1, exactly=True)
            await self._check_free(cluster, 1)
            await self.grow((cluster + 1) << self._bits)
            await self._change(cluster, 1)
            self._cursor = cluster + 1
            if not room or cluster != first + 1:
                at, room = cluster << self._bits, 0
        if room:
            block = await self.block(first >> self._per)
            assert block is not None
            index = first & ((1 << self._per) - 1)
            block[index] += 1
            self.touched(first >> self._per, index, index + 1)
        self._packing = at + size if (at + size) & ((1 << self._bits) - 1) else 0
        return at

    async def _count(self, cluster: int) -> int:
        block = await self.block(cluster >> self._per)
        return 0 if block is None else block[cluster & ((1 << self._per) - 1)]

    async def _check_free(self, cluster: int, count: int) -> None:
        if self.guard is not None and self.guard.taken(cluster, count):
            await self.damaged(f"of the {count} clusters from {cluster << self._bits:#x} on, which count as free, "
                               "some are in use", cluster << self._bits, count << self._bits)

    async def damaged(self, what: str, offset: int | None = None, length: int | None = None) -> NoReturn:
        """Note that the image has clusters with two users, in that range of the file. Raises OSError (EIO)."""
        if self.on_damage is not None:
            await self.on_damage(what, offset, length)
        raise self.broken(f"{what}; repair it: blockstep img check --repair all", offset, length)

    def broken(self, what: str, offset: int | None = None, length: int | None = None) -> OSError:
        """The error of a request that met metadata that cannot be right; it is told of."""
        if self.on_broken is not None:
            self.on_broken(what, offset, length)
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: the image is broken: {what}")

    async def _find(self, wanted: int, exactly: bool) -> tuple[int, int]:
        per, mask = self._per, (1 << self._per) - 1
        if not self._distinct:  # a search through one full block, a million times, would not come to an end
            entries = [entry for entry in self.table if entry]
            if len(set(entries)) != len(entries):
                raise self.broken("the refcount table has a block twice")
            self._distinct = True
        cursor = self._cursor
        start = run = 0  # the row found so far
        while cursor < MOST_OFFSET >> self._bits:
            if self.reserved[0] <= cursor < self.reserved[1]:
                cursor, run = self.reserved[1], 0
                continue
            index = cursor >> per
            await self._know_before(index)
            block = self.blocks.get(index) or await self.block(index)
            if block is None:
                if not await self._new_block(index):
                    cursor, run = (index + 1) << per, 0
                continue
            at = cursor & mask
            if block[at] or self._used_before(cursor):
                if run and not exactly:
                    return start, run
                run = 0
                try:
                    cursor = (index << per) + (block.index(0, at) if block[at] else at + 1)
                except ValueError:
                    cursor = (index + 1) << per
                continue
            if not run:
                start = cursor
            run += 1
            cursor += 1
            if run == wanted:
                return start, run
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: no cluster is free")

    async def _know_before(self, index: int) -> None:
        """While make_empty is not durable: load the old block, so that `_used_before` can tell."""
        if self.before is not None:
            table, blocks = self.before
            if index < len(table) and table[index] and index not in blocks:
                blocks[index] = decode_block(self._header, await read_file(self._file, table[index], 1 << self._bits))

    def _used_before(self, cluster: int) -> bool:
        if self.before is None:
            return False
        table, blocks = self.before
        index = cluster >> self._per
        if index >= len(table) or not table[index]:
            return False
        block = blocks.get(index)
        return block is None or bool(block[cluster & ((1 << self._per) - 1)])

    async def _change(self, cluster: int, count: int) -> None:
        """Give clusters that are free the refcount 1."""
        while count:
            index, at = cluster >> self._per, cluster & ((1 << self._per) - 1)
            part = min(count, (1 << self._per) - at)
            block = await self.block(index)
            assert block is not None
            for each in range(at, at + part):
                block[each] = 1
            self.touched(index, at, at + part)
            cluster, count = cluster + part, count - part
        self._passed(cluster)

    def touched(self, index: int, first: int, end: int) -> None:
        """Clusters ``first`` to ``end`` of a block have changed."""
        was = self.dirty.get(index)
        self.dirty[index] = (first, end) if was is None else (min(first, was[0]), max(end, was[1]))

    async def grow(self, end: int) -> None:
        """Make the file longer if it ends before ``end``. Raises OSError (ENOSPC if it cannot grow)."""
        async with self._growing:
            if end <= self.file_length:
                return
            length = end + _STEP
            try:
                await self._file.resize(length)
            except OSError as error:
                if error.errno != errno.ENOTSUP:
                    raise
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: the image's place cannot grow") from error
            self._ends_at(length)

    async def reach(self, end: int) -> None:
        """As `grow`, for data in a cluster that is in use already: the last one, in a file that ends inside of it."""
        if end > self.data_length:
            await self.grow(end)
            self._high = max(self._high, end)

    def _ends_at(self, length: int) -> None:
        self.file_length = length
        if self.data_length != MOST_OFFSET:
            self.data_length = length

    async def _new_block(self, index: int) -> bool:
        """Cover clusters that no block covers yet: the new block lies at the first of them that can be used.

        Returns whether there is one, or the table had to grow before.
        """
        if index >= len(self.table):
            await self._grow_table(index)
            return True
        await self._know_before(index)
        cluster = max(index << self._per, 1)
        while self._used_before(cluster) or self.reserved[0] <= cluster < self.reserved[1] or (
                self.guard is not None and self.guard.taken(cluster)):
            cluster += 1
        if cluster >> self._per != index:
            return False
        while len(self.blocks) >= self._most and len(self.dirty) >= self._most:
            await self._save()
        await self.grow((cluster + 1) << self._bits)
        self._add_block(index, cluster)
        return True

    def _add_block(self, index: int, cluster: int) -> None:
        block = empty_block(self._header)
        block[cluster & ((1 << self._per) - 1)] = 1
        self.blocks[index] = block
        self.table[index] = cluster << self._bits
        self.table_dirty.add(index)
        self.touched(index, 0, 1 << self._per)
        self._passed(cluster + 1)
        if self.guard is not None:
            self.guard.claimed.add(cluster)

    def _passed(self, end: int) -> None:
        self._high = max(self._high, end << self._bits)
        self.virgin = max(self.virgin, end << self._bits)

    @property
    def end(self) -> int:
        """The cluster from which on none was ever in use."""
        return -(-max(self._first_length, self._high) >> self._bits)

    async def _grow_table(self, index: int) -> None:
        """A longer table, behind all that the old one covers; the blocks that cover the place come with it."""
        per = 1 << self._per
        old, old_offset = self.table, self.table_offset
        place = len(old) << self._per  # nothing is known of clusters from here on: all are free
        clusters = len(old) * 8 >> self._bits
        entries = (1 << self._bits) // 8
        while True:  # until the blocks for the place of the table and of themselves fit in it
            clusters += max(1, clusters // 2)
            blocks = -(-clusters // (per - 1)) + 1
            if clusters * entries >= max(len(old) + blocks, index + 1):
                break
        if clusters << self._bits > MOST_REFCOUNT_TABLE:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: the refcount table has its greatest length")
        if self.guard is not None:
            if self.guard.taken(place, blocks + clusters):
                await self.damaged(f"clusters from {place << self._bits:#x} on, which no refcount tells of, are in use",
                                   place << self._bits, (blocks + clusters) << self._bits)
            self.guard.claimed.add(place, blocks + clusters)
        await self.grow((place + blocks + clusters) << self._bits)
        table = old[:]
        table.extend([0] * (clusters * entries - len(old)))
        self.table = table
        for each in range(blocks):
            number = len(old) + each
            block = empty_block(self._header)
            for at in range(per):
                if (number << self._per) + at < place + blocks + clusters:
                    block[at] = 1
            self.blocks[number] = block
            table[number] = (place + each) << self._bits
            self.touched(number, 0, per)
        self.table_offset = (place + blocks) << self._bits
        self.table_moved = True
        self.table_dirty.clear()
        self._passed(place + blocks + clusters)
        first = old_offset >> self._bits
        self.retired.extend(range(first, first + (len(old) * 8 >> self._bits)))

    # --- giving back ---

    async def release(self, offset: int, count: int) -> None:
        """Give back clusters from `allocate` that nothing refers to, in memory or on the disk, and nobody uses."""
        async with self._lock:
            await self._lower(range(offset >> self._bits, (offset >> self._bits) + count))

    async def release_bytes(self, places: Sequence[int], sizes: Sequence[int]) -> None:
        """As `release`, of what `allocate_bytes` gave."""
        async with self._lock:
            await self._lower_bytes(places, sizes)

    async def _lower_bytes(self, places: Sequence[int], sizes: Sequence[int]) -> None:
        for place, size in zip(places, sizes, strict=False):
            await self._lower(range(place >> self._bits, ((place + size - 1) >> self._bits) + 1))

    def made_durable(self, clusters: list[int]) -> None:
        """The references to clusters that were retired are gone from the disk as well."""
        self._durable += clusters

    async def reclaim(self) -> None:
        """Free what can be."""
        if self._durable or self._waiting:
            async with self._lock:
                await self._reclaim()

    async def _reclaim(self) -> None:
        for _ in range(2):
            if not (self._durable or self._waiting) or self.running[1 - self.turn]:
                return
            free, self._waiting, self._durable = self._waiting, self._durable, []
            self.turn = 1 - self.turn
            if free:
                await self._lower(free)

    async def _lower(self, clusters: Iterable[int]) -> None:
        free: list[tuple[int, int]] = []
        for number, (first, count) in enumerate(_runs(clusters, 1 << self._per), 1):
            block = await self.block(first >> self._per)
            if block is not None:
                free += self._lower_run(first, count, block)
            if not number % _AT_ONCE:
                await asyncio.sleep(0)
        if self.on_free is not None:
            for first, count in merged(free):
                await self.on_free(first << self._bits, count << self._bits)
        if free:
            self._cursor = max(1, min(self._cursor, min(first for first, _ in free)))

    def _lower_run(self, first: int, count: int, block: array[int]) -> list[tuple[int, int]]:
        """Lower the refcounts of neighbours in one block. Returns what is free now."""
        at, guard = first & ((1 << self._per) - 1), self.guard
        if count > 1:
            if block[at:at + count] != array(block.typecode, [1]) * count or (
                    guard is not None and guard.kept.any(first, count)):
                return [each for cluster in range(first, first + count) for each in self._lower_run(cluster, 1, block)]
        elif not block[at] or (guard is not None and block[at] == 1 and guard.kept.any(first)):
            return []  # or a snapshot's, with a refcount that is wrong
        self.touched(first >> self._per, at, at + count)
        if block[at] > 1:
            block[at] -= 1
            return []
        block[at:at + count] = array(block.typecode, bytes(block.itemsize * count))
        if guard is not None:
            guard.claimed.remove(first, count)
        if first <= self._packing >> self._bits < first + count:
            self._packing = 0
        return [(first, count)]

    async def trim(self) -> None:
        """Take back the end of the file that was not needed."""
        length = max(self._first_length, self._high)
        if length < self.file_length:
            await self._file.resize(length)
            self._ends_at(length)

    # --- emptying ---

    def start_again(self, table: array[int], offset: int, used: Iterable[int], reserved: tuple[int, int]) -> None:
        """From now on only the clusters ``used`` are in use, and ``table`` names the blocks that they need.

        What the image on the disk uses is left alone until `start_is_durable`.
        """
        if self.before is None:
            self.before = (self.table, self.blocks)
        self.table, self.table_offset, self.table_moved = table, offset, True
        self.blocks = {index: empty_block(self._header) for index, entry in enumerate(table) if entry}
        self.dirty = dict.fromkeys(self.blocks, (0, 1 << self._per))
        for cluster in used:
            self.blocks[cluster >> self._per][cluster & ((1 << self._per) - 1)] = 1
            self._passed(cluster + 1)
        if self.guard is not None:
            self.guard.start_again(used)
        self.table_dirty.clear()
        self.retired, self._durable, self._waiting = [], [], []
        self.reserved = reserved
        self._cursor, self._packing = 1, 0

    def dropped(self) -> list[tuple[int, int]]:
        """The clusters that were in use before `start_again`, and are neither now nor reserved, as rows.

        Of the blocks in memory.
        """
        if self.before is None:
            return []
        free: list[int] = []
        begin, end = self.reserved
        for index, old in self.before[1].items():
            new = self.blocks.get(index)
            if new is not None or not self.table[index]:
                first = index << self._per
                free += [first + at for at, count in enumerate(old)
                         if count and not (new and new[at]) and not begin <= first + at < end]
        return rows(free)

    def start_is_durable(self) -> None:
        """What was in use before `start_again` may be used again."""
        self.before = None
        self._cursor = 1

    def dirty_bytes(self, index: int) -> tuple[int, bytes]:
        """Where in the file, and what, is to be written of a block that changed (in whole sectors)."""
        first, end = self.dirty[index]
        unit = max(1, (512 << 3) >> self._header.refcount_order)
        first, end = first // unit * unit, -(-end // unit) * unit
        data = encode_block(self._header, self.blocks[index][first:end])
        return self.table[index] + (first << self._header.refcount_order >> 3), data


def rows(clusters: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours together: (first, count)."""
    return merged([(cluster, 1) for cluster in clusters])


def merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs that follow each other together, in their order."""
    found: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if found and found[-1][0] + found[-1][1] == first:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((first, count))
    return found


def _runs(clusters: Iterable[int], per: int) -> Iterator[tuple[int, int]]:
    """Those that follow each other, as (first, count), none across a multiple of ``per``."""
    first = end = -1
    for cluster in clusters:
        if cluster != end or not cluster % per:
            if first >= 0:
                yield first, end - first
            first = cluster
        end = cluster + 1
    if first >= 0:
        yield first, end - first
