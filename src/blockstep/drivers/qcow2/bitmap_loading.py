"""The bitmaps of an image that is being opened: their bits, and which clusters they take.

Bits of a bitmap with ``in_use`` are not read: they were not stored in order. Its table is, when the image is opened for
writing, so that its clusters can be given back; what is wrong in it is left alone then, as nothing depends on it.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import Final, NamedTuple

import msgspec

from blockstep.block.bitmap import Bitmap
from blockstep.block.node import Child
from blockstep.drivers.qcow2.bitmap_limits import MOST_BITS, MOST_TABLES, bitmap_bytes, check_entries
from blockstep.drivers.qcow2.format import (
    BITMAPS,
    EXTRA_COMPATIBLE,
    IN_USE,
    OFFSET,
    BitmapEntry,
    Header,
    decode_table,
    parse_bitmaps,
    parse_bitmaps_extension,
)
from blockstep.drivers.qcow2.refcounts import read_file
from blockstep.errors import ImageError

#: Bytes that are read at a time.
_PIECE: Final = 1 << 20


class Kept(NamedTuple):
    """A bitmap as the image has it. ``clusters``: those of its table and its bits."""

    entry: BitmapEntry
    clusters: array[int]


class Found(msgspec.Struct):
    """All bitmaps of an image. ``bits``: of those that can be used."""

    directory: range = range(0)  #: clusters
    kept: dict[str, Kept] = msgspec.field(default_factory=dict)
    bits: dict[str, Bitmap] = msgspec.field(default_factory=dict)

    def clusters(self) -> Iterable[int]:
        """All clusters that they take."""
        return chain(self.directory, *(each.clusters for each in self.kept.values()))


async def load_bitmaps(file: Child, header: Header, unusable_tables: bool) -> Found:
    """The bitmaps of the image in ``file``; none if it has none, or none that are valid.

    Raises ImageError that names the field (as `check` does; and for more bits than `MOST_BITS`), and OSError.
    """
    where = parse_bitmaps_extension(header) if header.autoclear & BITMAPS else None
    if where is None:
        return Found()
    if where.directory_offset + where.directory_size > file.node.length:
        raise ImageError("bitmap_directory_offset", where.directory_offset, "inside of the file")
    bits = header.cluster_bits
    entries = parse_bitmaps(header, where, await read_file(file, where.directory_offset, where.directory_size))
    check_entries(header, entries)
    first = where.directory_offset >> bits
    found = Found(range(first, first + -(-where.directory_size >> bits)))
    room, tables = MOST_BITS, MOST_TABLES
    for entry in entries:
        usable = not entry.flags & IN_USE and (not entry.extra or bool(entry.flags & EXTRA_COMPATIBLE))
        room -= bitmap_bytes(header.size, 1 << entry.granularity_bits) if usable else 0
        tables -= entry.table_size * 8
        if room < 0 or tables < 0:
            raise ImageError("bitmaps", "more of them", f"at most {MOST_BITS} bytes together, and {MOST_TABLES} bytes "
                                                        "of tables: remove some (blockstep img bitmap --remove)")
        if usable:
            found.bits[entry.name] = bitmap = Bitmap(header.size, 1 << entry.granularity_bits)
            places = await _places(file, header, entry)
            await _read_bits(file, bits, places, bitmap)
        else:
            places = array("Q")
            if unusable_tables:
                try:
                    places = await _places(file, header, entry)
                except ImageError:
                    places = array("Q")
        found.kept[entry.name] = Kept(entry, _clusters(entry, places, bits))
    return found


async def _places(file: Child, header: Header, entry: BitmapEntry) -> array[int]:
    """The table of a bitmap. Raises ImageError for an entry that is wrong."""
    if entry.table_offset + entry.table_size * 8 > file.node.length:
        raise ImageError("bitmap_table_offset", entry.table_offset, "inside of the file")
    table = decode_table(await read_file(file, entry.table_offset, entry.table_size * 8))
    for place in table:
        if place > 1 and (place & ~OFFSET or place & (header.cluster_size - 1) or place >= file.node.length):
            raise ImageError("bitmap table entry", place, "0, 1, or a cluster in the file")
    return table


async def _read_bits(file: Child, bits: int, table: array[int], bitmap: Bitmap) -> None:
    with memoryview(bitmap.bits) as view:
        size = -(-bitmap.length // bitmap.granularity) + 7 >> 3
        index = 0
        while index < len(table):
            place, begin = table[index], index << bits
            count = 1  # neighbours in the file together
            while (count << bits < _PIECE and index + count < len(table)
                   and table[index + count] == (place + (count << bits) if place > 1 else place)):
                count += 1
            end = min(size, begin + (count << bits))
            if place == 1:
                view[begin:end] = b"\xff" * (end - begin)
            elif place:
                data = await read_file(file, place, end - begin)
                if data.strip(b"\0"):
                    view[begin:end] = data
            index += count
            await asyncio.sleep(0)
        tail = -(-bitmap.length // bitmap.granularity) & 7
        if tail and size:
            view[size - 1] &= (1 << tail) - 1


def _clusters(entry: BitmapEntry, table: array[int], bits: int) -> array[int]:
    first = entry.table_offset >> bits
    found = array("Q", range(first, first + -(-len(table) * 8 >> bits)))
    found.extend(place >> bits for place in table if place > 1)
    return found
