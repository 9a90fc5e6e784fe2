"""What a qcow2 image says of itself, as qemu-img's JSON has it."""

from __future__ import annotations

import os
from typing import Any

from blockstep.block.node import Child
from blockstep.drivers.qcow2.format import (
    AUTO,
    BITMAPS,
    COMPRESSION_NAMES,
    CORRUPT,
    DIRTY,
    IN_USE,
    LAZY_REFCOUNTS,
    RAW_EXTERNAL,
    Header,
    Snapshot,
    header_span,
    parse_bitmaps,
    parse_bitmaps_extension,
    parse_header,
)
from blockstep.drivers.qcow2.shown import read_snapshots


async def qcow2_fields(file: Child, filename: str) -> tuple[dict[str, Any], Header]:
    """The fields of the image in ``file``, and its header. Raises ImageError and OSError."""
    start = await _read(file, 0, 24)
    header = parse_header(await _read(file, 0, header_span(start)))
    found: dict[str, Any] = {}
    if header.snapshot_count:
        found["snapshots"] = [snapshot_fields(one) for one in await read_snapshots(file, header)]
    if header.backing_format is not None:
        found["backing-filename-format"] = header.backing_format
    found |= {"virtual-size": header.size, "filename": filename, "cluster-size": header.cluster_size,
              "format": "qcow2"}
    if (size := file.node.occupied()) is not None:
        found["actual-size"] = size
    if header.crypt_method:
        found["encrypted"] = True
    found["format-specific"] = {"type": "qcow2", "data": await _specific(file, header)}
    if header.backing_file is not None:
        found |= {"full-backing-filename": full_name(header.backing_file, filename),
                  "backing-filename": header.backing_file}
    found["dirty-flag"] = bool(header.incompatible & DIRTY)
    return found, header


def full_name(backing: str, filename: str) -> str:
    """The name of a backing image, seen from where ``filename`` is."""
    if ":" in backing.split("/")[0]:
        return backing
    return os.path.join(os.path.dirname(filename), backing)


def snapshot_fields(one: Snapshot) -> dict[str, Any]:
    """An internal snapshot."""
    found: dict[str, Any] = {} if one.icount in (None, (1 << 64) - 1) else {"icount": one.icount}
    return {**found, "vm-clock-nsec": one.vm_clock % 10 ** 9, "name": one.name, "date-sec": one.seconds,
            "date-nsec": one.nanoseconds, "vm-clock-sec": one.vm_clock // 10 ** 9, "id": one.id,
            "vm-state-size": one.vm_state_size}


async def _specific(file: Child, header: Header) -> dict[str, Any]:
    compression = COMPRESSION_NAMES[header.compression_type]
    if header.version == 2:
        return {"compat": "0.10", "compression-type": compression, "refcount-bits": header.refcount_bits}
    found: dict[str, Any] = {"compat": "1.1", "compression-type": compression,
                             "lazy-refcounts": bool(header.compatible & LAZY_REFCOUNTS)}
    if bitmaps := await _bitmaps(file, header):
        found["bitmaps"] = bitmaps
    found["refcount-bits"] = header.refcount_bits
    if header.data_file is not None:
        found |= {"data-file": header.data_file, "data-file-raw": bool(header.autoclear & RAW_EXTERNAL)}
    return {**found, "corrupt": bool(header.incompatible & CORRUPT), "extended-l2": header.extended_l2}


async def _bitmaps(file: Child, header: Header) -> list[dict[str, Any]]:
    where = parse_bitmaps_extension(header) if header.autoclear & BITMAPS else None
    if where is None:
        return []
    entries = parse_bitmaps(header, where, await _read(file, where.directory_offset, where.directory_size))
    return [{"flags": [name for flag, name in ((IN_USE, "in-use"), (AUTO, "auto")) if one.flags & flag],
             "name": one.name, "granularity": 1 << one.granularity_bits} for one in entries]


async def _read(file: Child, offset: int, length: int) -> bytes:
    """Up to ``length`` bytes: fewer at the end of the file."""
    length = max(0, min(length, file.node.length - offset))
    return bytes(await file.pread(offset, length)) if length else b""
