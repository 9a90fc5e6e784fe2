"""An internal snapshot shown as if it were the disk: the same image with another L1 table and size, read-only."""

from __future__ import annotations

from typing import Final

from blockstep.block.node import Child
from blockstep.drivers.qcow2.format import (
    BITMAPS,
    EXT_BITMAPS,
    MOST_SNAPSHOT_TABLE,
    Header,
    Snapshot,
    parse_snapshots,
)
from blockstep.drivers.qcow2.refcounts import read_file
from blockstep.drivers.qcow2.snapshots import find_snapshot
from blockstep.errors import ImageError, OptionError

_FIRST: Final = 1 << 20


async def read_snapshots(file: Child, header: Header) -> list[Snapshot]:
    """The snapshots of the image in ``file``. Raises ImageError and OSError."""
    size = _FIRST
    while True:
        data = await read_file(file, header.snapshots_offset, size)
        try:
            return parse_snapshots(header, data)[0]
        except ImageError:
            if header.snapshots_offset + size >= file.node.length or size >= MOST_SNAPSHOT_TABLE:
                raise
            size *= 8


async def show(file: Child, header: Header, wanted: str | None) -> Header:
    """The header with the snapshot of that id, or else of that name, in place of the disk; None: as it is.

    Raises OptionError, ImageError and OSError.
    """
    if wanted is None:
        return header
    found = find_snapshot(await read_snapshots(file, header) if header.snapshot_count else [], wanted)
    size = header.size if found.disk_size is None else found.disk_size
    shown = header.replaced(size=size, l1_size=found.l1_size, l1_table_offset=found.l1_table_offset,
                    autoclear=header.autoclear & ~BITMAPS).with_extension(EXT_BITMAPS, None)
    if shown.l1_size < shown.l1_needed:
        raise ImageError("snapshot l1_size", found.l1_size, f"from {shown.l1_needed}, for a disk of {size} bytes")
    return shown


def check_read_only(wanted: str | None) -> None:
    """Raises OptionError if a snapshot is shown: it cannot be written."""
    if wanted is not None:
        raise OptionError("read-only", False, f"on, to show the snapshot '{wanted}'")
