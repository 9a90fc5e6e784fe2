"""Internal snapshots: list, create, apply, delete, on an image that nobody else has open.

A snapshot is an L1 table of its own. What it leads to it shares with the disk, and the refcounts say so: the snapshot's
clusters count once more, and the marks of exclusive use in the disk's tables go, so that a write makes a copy.

    create   refcounts of all that the disk uses + 1; a copy of the L1 table; a longer snapshot table
    apply    refcounts of all that the snapshot uses + 1; a copy of its L1 table becomes the disk's; the old one's - 1
    delete   a shorter snapshot table; refcounts of all that the snapshot uses - 1

Each takes one check of the image (see `edit.Editor`, which also says what a crash leaves behind), and the change itself
is one write of a part of the header. An image that has bitmaps which follow the disk's changes (``auto``) can have no
snapshot applied here: they would have to follow that too. Synchronous: run these in threads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from blockstep.drivers.qcow2.bitmaps import entries_of
from blockstep.drivers.qcow2.check import Checker, Read
from blockstep.drivers.qcow2.edit import Editor
from blockstep.drivers.qcow2.format import (
    AT_L1,
    AT_SIZE,
    AUTO,
    COPIED,
    EXTERNAL_DATA,
    MOST_SNAPSHOT_TABLE,
    MOST_SNAPSHOTS,
    SIZE,
    TABLES,
    Snapshot,
    build_snapshots,
    decode_table,
    encode_table,
)
from blockstep.drivers.qcow2.repair import Sync, Write
from blockstep.errors import ImageError, OptionError

#: Where the header has the number and the place of the snapshots.
_AT_SNAPSHOTS: Final = 60
_SNAPSHOTS: Final = struct.Struct(">IQ")


def list_snapshots(read: Read, length: int) -> list[Snapshot]:
    """The snapshots of an image, in the order of its table. Raises ImageError if they cannot be read."""
    checker = Checker(read, length, lambda text: None)
    return checker.read_snapshots()


def find_snapshot(snapshots: Sequence[Snapshot], wanted: str) -> Snapshot:
    """The snapshot with that id, else the first of that name. Raises OptionError."""
    for each in snapshots:
        if each.id == wanted:
            return each
    for each in snapshots:
        if each.name == wanted:
            return each
    raise OptionError("snapshot", wanted, "the id or the name of one that the image has")


def create_snapshot(read: Read, length: int, write: Write, sync: Sync, name: str, *, seconds: int,
                    nanoseconds: int = 0) -> Snapshot:
    """Make a snapshot of the disk as it is, dated ``seconds`` of the Unix epoch. Durable at return.

    Raises OptionError (no name, or one that is in use), and ImageError: what `edit.Editor` refuses, too many
    snapshots, refcounts of too few bits.
    """
    editor = _editor(read, length, write, sync)
    header, snapshots = editor.header, editor.checker.read_snapshots()
    if not name or len(name.encode("utf-8", "surrogateescape")) > 65535:
        raise OptionError("snapshot", name, "a name of 1 to 65535 bytes")
    if any(name in (each.id, each.name) for each in snapshots):
        raise OptionError("snapshot", name, "a name that no snapshot has")
    if len(snapshots) >= MOST_SNAPSHOTS:
        raise ImageError("nb_snapshots", len(snapshots) + 1, f"at most {MOST_SNAPSHOTS}")
    used = editor.references(header.l1_table_offset, header.l1_size)
    editor.raise_by(used)
    editor.begin()
    size = max(header.l1_size * 8, 1)
    place = editor.place(size)
    number = max((int(each.id) for each in snapshots if each.id.isascii() and each.id.isdigit()), default=0) + 1
    snapshot = Snapshot(place, header.l1_size, str(number), name, seconds, nanoseconds, 0, 0, header.size)
    table_place = _place_table(editor, [*snapshots, snapshot])
    editor.save()
    entries = decode_table(editor.read(header.l1_table_offset, header.l1_size * 8))
    editor.write(place, encode_table(entries).ljust(size, b"\0"))
    _switch_table(editor, [*snapshots, snapshot], table_place)
    editor.end()
    return snapshot


def delete_snapshot(read: Read, length: int, write: Write, sync: Sync, wanted: str) -> Snapshot:
    """Delete the snapshot with that id or name. Durable at return. Raises OptionError, and what `edit.Editor` does."""
    editor = _editor(read, length, write, sync)
    snapshots = editor.checker.read_snapshots()
    snapshot = find_snapshot(snapshots, wanted)
    rest = [each for each in snapshots if each is not snapshot]
    used = editor.references(snapshot.l1_table_offset, snapshot.l1_size)
    editor.begin()
    table_place = _place_table(editor, rest)
    editor.save()
    _switch_table(editor, rest, table_place)
    editor.lower_by(used)
    editor.free_run(snapshot.l1_table_offset, snapshot.l1_size * 8)
    editor.end()
    return snapshot


def apply_snapshot(read: Read, length: int, write: Write, sync: Sync, wanted: str) -> Snapshot:
    """Make the disk what it was, also in size, when the snapshot was made. Durable at return.

    Raises OptionError, and ImageError: what `edit.Editor` refuses, bitmaps that would have to follow, refcounts of too
    few bits.
    """
    editor = _editor(read, length, write, sync)
    snapshot = find_snapshot(editor.checker.read_snapshots(), wanted)
    header = editor.header
    if any(each.flags & AUTO for each in entries_of(read, length)):
        raise ImageError("bitmap flags", "auto", "without it in all bitmaps when a snapshot is applied")
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    if snapshot.l1_size < header.replaced(size=size).l1_needed:
        raise ImageError("snapshot l1_size", snapshot.l1_size, "enough for the disk")
    if size != header.size and entries_of(read, length):
        raise ImageError("snapshot virtual disk size", size, f"{header.size}, as bitmaps are for that size")
    old = editor.references(header.l1_table_offset, header.l1_size)
    new = editor.references(snapshot.l1_table_offset, snapshot.l1_size)
    editor.raise_by(new)
    editor.begin()
    bytes_of_l1 = max(snapshot.l1_size * 8, 1)
    place = editor.place(bytes_of_l1)
    editor.save()
    entries = decode_table(editor.read(snapshot.l1_table_offset, snapshot.l1_size * 8))
    for index, entry in enumerate(entries):
        entries[index] = entry & ~COPIED
    editor.write(place, encode_table(entries).ljust(bytes_of_l1, b"\0"))
    editor.sync()
    header = editor.header  # its refcount table may have moved
    editor.write(AT_SIZE, SIZE.pack(size, 0) + TABLES.pack(
        snapshot.l1_size, place, header.refcount_table_offset, header.refcount_table_clusters))
    editor.sync()
    editor.lower_by(old)
    editor.free_run(header.l1_table_offset, header.l1_size * 8)
    editor.end()
    return snapshot


assert AT_SIZE + SIZE.size == AT_L1


def _editor(read: Read, length: int, write: Write, sync: Sync) -> Editor:
    editor = Editor(read, length, write, sync)
    if editor.header.incompatible & EXTERNAL_DATA:
        raise ImageError("incompatible_features", "external data file", "without it: such images have no snapshots")
    return editor


def _place_table(editor: Editor, snapshots: list[Snapshot]) -> int:
    size = len(build_snapshots(snapshots))
    if size > MOST_SNAPSHOT_TABLE:
        raise ImageError("snapshot table", size, f"at most {MOST_SNAPSHOT_TABLE} bytes")
    return editor.place(size) if snapshots else 0


def _switch_table(editor: Editor, snapshots: list[Snapshot], place: int) -> None:
    """Write the table, let the header refer to it, and give the old one back."""
    if snapshots:
        editor.write(place, build_snapshots(snapshots))
    editor.sync()
    editor.write(_AT_SNAPSHOTS, _SNAPSHOTS.pack(len(snapshots), place))
    editor.sync()
    first, count = editor.checker.snapshot_clusters
    editor.free(range(first, first + count))
