"""Persistent dirty bitmaps: what an image keeps of its bitmaps while nobody uses it.

    directory ──► a table for each bitmap ──► clusters of bits; a table entry 0 is all zeroes, 1 all ones

While the image is open for writing the stored bits are out of date, and the flag ``in_use`` says so: `mark_in_use` is
to be called, and be durable, before the first write to the disk, and `store` when all writing is over. A bitmap that
has the flag when it is loaded was not stored in order: it is told of, without bits, and kept as it is until somebody
removes it. The same holds for one with extra data that must be understood and is not. ``auto`` bitmaps follow
the disk's changes from the first write on; others are disabled.

The feature bit is reset while the directory changes: after a crash in the middle the image has no bitmaps (and leaks),
but never wrong ones. Synchronous: run these in threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec

from blockstep.block.bitmap import Bitmap
from blockstep.drivers.qcow2.bitmap_limits import MOST_BITS, bitmap_bytes, check_directory, check_entries
from blockstep.drivers.qcow2.check import Checker, Read
from blockstep.drivers.qcow2.edit import Editor
from blockstep.drivers.qcow2.format import (
    AT_AUTOCLEAR,
    AUTO,
    BITMAPS,
    EXT_BITMAPS,
    EXTRA_COMPATIBLE,
    IN_USE,
    OFFSET,
    RAW_EXTERNAL,
    BitmapEntry,
    BitmapsExtension,
    Header,
    build_bitmaps,
    build_bitmaps_extension,
    build_header,
    decode_table,
    encode_table,
    fitting,
    parse_bitmaps,
    parse_bitmaps_extension,
)
from blockstep.drivers.qcow2.repair import Sync, Write
from blockstep.errors import ImageError, OptionError


class StoredBitmap(msgspec.Struct, frozen=True):
    """A bitmap as an image has it."""

    name: str
    granularity: int  #: bytes
    auto: bool
    in_use: bool = False  #: was not stored in order
    bitmap: Bitmap | None = None  #: None: cannot be used
    entry: BitmapEntry | None = None  #: as it is in the image; None: not there yet

    @property
    def usable(self) -> bool:
        return self.bitmap is not None


def entries_of(read: Read, length: int) -> list[BitmapEntry]:
    """The bitmap directory of an image; empty if it has none, or none that is valid. Raises ImageError."""
    checker = Checker(read, length, lambda text: None)
    return _directory(checker)


def _directory(checker: Checker) -> list[BitmapEntry]:
    where = parse_bitmaps_extension(checker.header) if checker.header.autoclear & BITMAPS else None
    if where is None:
        return []
    if where.directory_offset + where.directory_size > checker.end << checker.header.cluster_bits:
        raise ImageError("bitmap_directory_offset", where.directory_offset, "inside of the file")
    entries = parse_bitmaps(checker.header, where, checker.read(where.directory_offset, where.directory_size))
    check_entries(checker.header, entries)
    return entries


def load(read: Read, length: int, names: Sequence[str] | None = None) -> list[StoredBitmap]:
    """The bitmaps of the image in a file of ``length`` bytes, with their bits (only of ``names``, if given).

    Raises ImageError, also if they have more than `MOST_BITS` together, and what ``read`` raises.
    """
    checker = Checker(read, length, lambda text: None)
    entries = _directory(checker)
    wanted = {each.name for each in entries if not each.flags & IN_USE and (names is None or each.name in names)}
    size = sum(bitmap_bytes(checker.header.size, 1 << each.granularity_bits) for each in entries if each.name in wanted)
    if size > MOST_BITS:
        raise ImageError("bitmaps", size, f"at most {MOST_BITS} bytes together")
    return [_load(checker, each, each.name in wanted) for each in entries]


def _load(checker: Checker, entry: BitmapEntry, bits: bool) -> StoredBitmap:
    found = StoredBitmap(entry.name, 1 << entry.granularity_bits, bool(entry.flags & AUTO), bool(entry.flags & IN_USE),
                         None, entry)
    if not bits or found.in_use or (entry.extra and not entry.flags & EXTRA_COMPATIBLE):
        return found
    header = checker.header
    size = bitmap_bytes(header.size, found.granularity)
    bitmap = Bitmap(header.size, found.granularity)
    table = decode_table(checker.read(entry.table_offset, entry.table_size * 8))
    with memoryview(bitmap.bits) as view:
        for index, place in enumerate(table):
            begin = index << header.cluster_bits
            part = min(header.cluster_size, size - begin)
            if place == 1:
                view[begin:begin + part] = b"\xff" * part
            elif place & ~OFFSET or place & (header.cluster_size - 1) or place >> header.cluster_bits >= checker.end:
                raise ImageError("bitmap table entry", place, "0, 1, or a cluster in the file")
            elif place:
                data = checker.read(place, part)
                if data != bytes(part):
                    view[begin:begin + part] = data
        tail = -(-header.size // found.granularity) & 7
        if tail and size:
            view[size - 1] &= (1 << tail) - 1
    return msgspec.structs.replace(found, bitmap=bitmap)


def mark_in_use(read: Read, length: int, write: Write, sync: Sync) -> None:
    """Say of all bitmaps that their stored bits are out of date. Durable at return; before the disk's first write."""
    checker = Checker(read, length, lambda text: None)
    entries = _directory(checker)
    where = parse_bitmaps_extension(checker.header)
    if not entries or where is None:
        return
    at = where.directory_offset
    for each in entries:
        write(at + 12, (each.flags | IN_USE).to_bytes(4, "big"))
        at += len(build_bitmaps([each]))
    sync()


def store(read: Read, length: int, write: Write, sync: Sync, bitmaps: Sequence[StoredBitmap]) -> None:
    """Make ``bitmaps`` those of the image, in place of those that it has; those without bits are kept as they are.

    Bits are stored with ``in_use`` reset. Durable at return. Raises OptionError (names, sizes), and ImageError: what
    `edit.Editor` refuses, version 2, too many.
    """
    editor = Editor(read, length, write, sync)
    header = editor.header
    _check(header, bitmaps)
    old = _directory(editor.checker)
    where = parse_bitmaps_extension(header) if header.autoclear & BITMAPS else None
    kept = {each.entry.table_offset for each in bitmaps if each.bitmap is None and each.entry is not None}
    editor.begin()
    entries = [_store(editor, each) for each in bitmaps]
    directory = build_bitmaps(entries)
    place = editor.place(len(directory)) if entries else 0
    editor.save()
    if entries:
        editor.write(place, directory)
    editor.sync()
    others = header.autoclear & RAW_EXTERNAL
    editor.write(AT_AUTOCLEAR, others.to_bytes(8, "big"))
    editor.sync()
    extension = BitmapsExtension(len(entries), len(directory), place)
    editor.set_header(editor.header.replaced(autoclear=others).with_extension(
        EXT_BITMAPS, build_bitmaps_extension(extension) if entries else None))
    editor.sync()
    if entries:
        editor.write(AT_AUTOCLEAR, (BITMAPS | others).to_bytes(8, "big"))
        editor.sync()
    if where is not None:
        editor.free_run(where.directory_offset, where.directory_size)
    for each in old:
        if each.table_offset not in kept:
            table = decode_table(editor.read(each.table_offset, each.table_size * 8))
            editor.free_run(each.table_offset, each.table_size * 8)
            editor.free((entry & OFFSET) >> header.cluster_bits for entry in table if entry & OFFSET)
    editor.end()


def _check(header: Header, bitmaps: Sequence[StoredBitmap]) -> None:
    if header.version < 3:
        raise ImageError("version", header.version, "3 for an image that has bitmaps")
    if bitmaps:  # before anything has changed: it has to fit
        build_header(fitting(header.with_extension(EXT_BITMAPS, build_bitmaps_extension(BitmapsExtension(1, 0, 0)))))
    names = [each.name for each in bitmaps]
    for each in bitmaps:
        if not 0 < len(each.name.encode("utf-8", "surrogateescape")) <= 1023 or names.count(each.name) > 1:
            raise OptionError("bitmap", each.name, "a name of 1 to 1023 bytes, that no other bitmap has")
        if each.bitmap is None and each.entry is None:
            raise OptionError("bitmap", each.name, "one that has bits, or is in the image")
        if each.bitmap is not None:
            if each.bitmap.length != header.size or not 9 <= each.bitmap.shift <= 31:
                raise OptionError("bitmap", each.name, f"over {header.size} bytes, of a granularity from 512 to 2 GiB")
            bitmap_bytes(header.size, each.bitmap.granularity)
    check_directory(names)


def _store(editor: Editor, wanted: StoredBitmap) -> BitmapEntry:
    """Write a bitmap's table and bits where nothing is."""
    if wanted.bitmap is None:
        assert wanted.entry is not None
        return wanted.entry
    header = editor.header
    size = bitmap_bytes(header.size, wanted.bitmap.granularity)
    table = array("Q", bytes(8 * -(-size >> header.cluster_bits)))
    with memoryview(wanted.bitmap.bits) as view:
        for index in range(len(table)):
            data = bytes(view[index << header.cluster_bits:min((index + 1) << header.cluster_bits, size)])
            if data != bytes(len(data)):
                table[index] = editor.place(header.cluster_size)
                editor.write(table[index], data.ljust(header.cluster_size, b"\0"))
    place = editor.place(len(table) * 8) if table else 0
    if table:
        editor.write(place, encode_table(table))
    extra = wanted.entry.extra if wanted.entry is not None else b""
    flags = (AUTO if wanted.auto else 0) | (EXTRA_COMPATIBLE if extra else 0)
    return BitmapEntry(place, len(table), flags, wanted.bitmap.shift, wanted.name, 1, extra)
