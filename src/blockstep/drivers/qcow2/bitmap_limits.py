"""What the bitmaps of an image may be, all together: what the directory says is checked before it is believed."""

from __future__ import annotations

from collections.abc import Sequence

from blockstep.drivers.qcow2.format import IN_USE, MOST_BITMAP_DIRECTORY, MOST_BITMAPS, BitmapEntry, Header
from blockstep.errors import ImageError
from blockstep.units import GiB, MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: Bytes of one bitmap, at most.
MOST_BITMAP: Final = 512 * MiB
#: Bytes of all bitmaps that an open image has in memory.
MOST_BITS: Final = GiB
#: Bytes of the tables of bitmaps that are read when an image is opened.
MOST_TABLES: Final = 32 * MiB


def bitmap_bytes(length: int, granularity: int) -> int:
    """The bytes of a bitmap over a disk of ``length`` bytes. Raises ImageError if they are too many."""
    size = -(-length // granularity) + 7 >> 3
    if size > MOST_BITMAP:
        raise ImageError("bitmap", size, f"at most {MOST_BITMAP} bytes; use a larger granularity")
    return size


def check_entries(header: Header, entries: Sequence[BitmapEntry]) -> None:
    """Raises ImageError for a name that is there twice, and for a bitmap with bits that are not as long as the disk."""
    if len({each.name for each in entries}) < len(entries):
        raise ImageError("bitmap name", "twice in the directory", "there once")
    for each in entries:
        if not each.flags & IN_USE:
            size = -(-bitmap_bytes(header.size, 1 << each.granularity_bits) >> header.cluster_bits)
            if each.table_size != size:
                raise ImageError("bitmap_table_size", each.table_size, f"{size} for this disk")


def check_directory(names: Sequence[str]) -> None:
    """Raises ImageError if there are too many bitmaps, or their names are too long for a directory."""
    if len(names) > MOST_BITMAPS:
        raise ImageError("nb_bitmaps", len(names), f"at most {MOST_BITMAPS}")
    if sum(24 + len(name.encode("utf-8", "surrogateescape")) + 7 for name in names) > MOST_BITMAP_DIRECTORY:
        raise ImageError("bitmap_directory_size", "the names together", f"less than {MOST_BITMAP_DIRECTORY} bytes")
