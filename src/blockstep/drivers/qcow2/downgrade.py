"""An image of version 3 that is to become one of version 2: what that version cannot say goes, or is refused.

Version 2 has no clusters that read as zeroes without being there. Where no backing image would show through, such a
cluster is not allocated any more; else it becomes one of data, new ones that lie behind all that is in use and are
holes in a file::

    dirty bit ─► refcounts of the new clusters ─► L2 tables ─► refcounts of those that they had ─► clean

Killed anywhere it is an image of version 3, which reads as before. The header is left for the caller to write, with
`as_version_2`. Synchronous: run it in a thread.
"""

from __future__ import annotations

from array import array
from typing import Final

from blockstep.drivers.qcow2.check import Read
from blockstep.drivers.qcow2.edit import Editor
from blockstep.drivers.qcow2.format import (
    BITMAPS,
    COMPRESSED,
    COMPRESSION_TYPE,
    COPIED,
    EXT_BITMAPS,
    EXT_FEATURE_NAMES,
    EXTENDED_L2,
    EXTERNAL_DATA,
    OFFSET,
    V2_LENGTH,
    ZERO,
    ZLIB,
    Header,
    decode_table,
    encode_table,
    parse_bitmaps_extension,
)
from blockstep.drivers.qcow2.repair import Sync, Write
from blockstep.errors import ImageError

#: Of a snapshot's saved machine, in version 2.
_MOST_VM_STATE: Final = (1 << 32) - 1


def as_version_2(header: Header) -> Header:
    """The same header in version 2, without what has no place there. Its refcounts must have 16 bits."""
    header = header.replaced(version=2, header_length=V2_LENGTH, incompatible=0, compatible=0, autoclear=0,
                     compression_type=ZLIB, more=b"")
    return header.with_extension(EXT_FEATURE_NAMES, None).with_extension(EXT_BITMAPS, None)


def expand_zeroes(read: Read, length: int, write: Write, sync: Sync) -> None:
    """Replace the clusters that version 2 does not know, in the disk and in all snapshots. Durable at return.

    Raises ImageError, and changes nothing: what `edit.Editor` refuses, and what version 2 has no place for.
    """
    editor = Editor(read, length, write, sync)
    _check(editor)
    tables = _l2_tables(editor)
    zeroes = [table for table in tables if _look(editor, table)]
    if not zeroes:
        return
    editor.begin()
    freed: list[int] = []
    for table in zeroes:
        freed += _expand(editor, table, tables[table])
    editor.sync()
    editor.free(freed)
    editor.end()


def _check(editor: Editor) -> None:
    header = editor.header
    for bit, name in ((EXTENDED_L2, "extended L2 entries"), (EXTERNAL_DATA, "an external data file")):
        if header.incompatible & bit:
            raise ImageError("incompatible_features", name, "without, in version 0.10")
    if header.autoclear & BITMAPS and parse_bitmaps_extension(header) is not None:
        raise ImageError("autoclear_features", "bitmaps", "without, in version 0.10: blockstep img bitmap --remove")
    for each in editor.checker.read_snapshots():
        if each.disk_size != header.size:
            raise ImageError(f"size in snapshot {each.id!r}", each.disk_size, f"{header.size}, as now, in version 0.10")
        if each.vm_state_size > _MOST_VM_STATE:
            raise ImageError(f"VM state in snapshot {each.id!r}", each.vm_state_size, "below 4 GiB in version 0.10")


def _l2_tables(editor: Editor) -> dict[int, int]:
    """The L2 tables of the disk and its snapshots: offset -> how often each is used."""
    found: dict[int, int] = {}
    places = [(each.l1_table_offset, each.l1_size) for each in editor.checker.read_snapshots()]
    for offset, size in ((editor.header.l1_table_offset, editor.header.l1_size), *places):
        for entry in decode_table(editor.read(offset, size * 8)):
            if entry & OFFSET:
                found[entry & OFFSET] = found.get(entry & OFFSET, 0) + 1
    return found


def _look(editor: Editor, table: int) -> bool:
    """Whether an L2 table has clusters of zeroes. Raises ImageError for one that is compressed with zstd."""
    header, raw = editor.header, editor.read(table, editor.header.cluster_size)
    zstd = bool(header.incompatible & COMPRESSION_TYPE)
    if not raw[7::8].strip(b"\0") and not zstd:
        return False
    values = decode_table(raw)
    if zstd and any(entry & COMPRESSED for entry in values):
        raise ImageError("compression_type", header.compression_type, "0 (zlib) in version 0.10")
    return bool(_zeroes(values))


def _zeroes(values: array[int]) -> list[int]:
    return [index for index, entry in enumerate(values) if entry & (ZERO | COMPRESSED) == ZERO]


def _expand(editor: Editor, table: int, users: int) -> list[int]:
    """Replace the clusters of zeroes of one table. Returns the clusters that its users had there, each for each."""
    header = editor.header
    values = decode_table(editor.read(table, header.cluster_size))
    zeroes = _zeroes(values)
    place, mark = 0, COPIED if users == 1 else 0
    if header.backing_file is not None:
        place = editor.place_zeroes(len(zeroes) << header.cluster_bits)
        editor.refcounts.add_run(place >> header.cluster_bits, len(zeroes), users - 1)
        editor.save()
    freed: list[int] = []
    for number, index in enumerate(zeroes):
        had = (values[index] & OFFSET) >> header.cluster_bits
        freed += [had] * users if had else []
        values[index] = place + (number << header.cluster_bits) | mark if place else 0
    editor.write(table, encode_table(values))
    return freed
