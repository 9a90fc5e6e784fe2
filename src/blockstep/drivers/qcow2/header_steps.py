"""How a header changes, so that a power cut in between leaves the old one or the new one.

A disk writes sectors, and of several any may be there after a power cut. So a change comes in steps, of which each is
durable before the next, and the steps that count lie in one sector each. A whole header (`header_steps`)::

    fields | extensions, name                     (free)      if what lies in the later sectors does not change, or one
                                                              of the two ends before: the first sector is that step
    fields | extensions, name        | the new extensions, name          1  the new ones are copied behind all
    fields | (a long header)         | the new extensions, name          2  the new fields, with a header_length up to
    fields | the new extensions, ... | the new extensions, name             the copy; 3  now their own place is free
    fields | the new extensions, name | (free)                           4  the new fields as they are to be

The bitmaps extension alone (`bitmap_steps`)::

    ... | END | name of the backing file          1  the name is copied behind all (if it is in the way)
    ... | END | (free) ....... | name             2  the header's field refers to the copy
    ... | END | data, END .... | name             3  data and a new end, behind the end that still holds
    ... | bitmaps, data, END   | name             4  the old end becomes the extension's head: 8 bytes

Going is step 4 backwards. While it changes across two sectors, the autoclear bit says that it is not valid.
"""

from __future__ import annotations

import struct
from typing import Final

from blockstep.drivers.qcow2.format import (
    AT_AUTOCLEAR,
    BITMAPS,
    EXT_BITMAPS,
    EXT_END,
    V2_LENGTH,
    V3_LENGTH,
    Header,
    build_header,
    fitting,
    parse_header,
)

_SECTOR: Final = 512
_HEAD: Final = struct.Struct(">II")
_NAME: Final = struct.Struct(">QI")
#: Where the header has the place and the length of the backing file's name.
_AT_NAME: Final = 8
_AT_LENGTH: Final = 100  #: header_length, in version 3
_LENGTH: Final = struct.Struct(">I")
#: The fields that are known here end, with the compression type and what it is filled up with.
_FIELDS: Final = V3_LENGTH + 8

Step = tuple[int, bytes]  #: offset, what is written there; then it is made durable


def header_steps(raw: bytes, new: bytes) -> list[Step]:
    """The steps from the header in the first cluster ``raw`` to ``new``, as `build_header` makes it.

    Where there is no room for them, in version 2 or in a small cluster, it is one write of several sectors.
    """
    end = _end(raw)
    span = max(end, len(new))
    whole = new.ljust(span, b"\0")
    if whole[_SECTOR:] == raw[_SECTOR:span]:
        return [(0, whole[:_SECTOR])]
    both = min(end, len(new))
    if new[_SECTOR:both] == raw[_SECTOR:both]:
        at = max(_SECTOR, both)
        rest = [(at, whole[at:])] if span > at else []
        return [*rest, (0, whole[:_SECTOR])] if len(new) > end else [(0, whole[:_SECTOR]), *rest]
    copy = -(-span // 8) * 8
    begin = parse_header(new.ljust(len(raw), b"\0")).header_length
    name, size = _NAME.unpack_from(new, _AT_NAME)
    if begin < V3_LENGTH or begin > _FIELDS or copy + len(new) - begin > len(raw):
        return [(0, whole)]
    fields = bytearray(new[:begin].ljust(_SECTOR, b"\0"))
    _NAME.pack_into(fields, _AT_NAME, name + copy - begin if name else 0, size)
    _LENGTH.pack_into(fields, _AT_LENGTH, copy)
    return [(copy, new[begin:]), (0, bytes(fields)), (_SECTOR, whole[_SECTOR:]), (0, whole[:_SECTOR]),
            (copy, bytes(len(new) - begin))]


def _end(raw: bytes) -> int:
    """Where what the header in the first cluster ``raw`` uses ends."""
    header = parse_header(raw)
    offset, size = _NAME.unpack_from(raw, _AT_NAME)
    return max(_places(raw, header)[1] + _HEAD.size, int(offset + size))


def bitmap_steps(raw: bytes, old: Header, extension: bytes | None) -> list[Step]:
    """The steps from the header ``old``, in the first cluster ``raw``, to one with that extension (None: without).

    Raises ImageError if it has no room.
    """
    valid = bool(old.autoclear & BITMAPS)
    off = [_autoclear(old.autoclear & ~BITMAPS)] if valid else []
    on = [_autoclear(old.autoclear | BITMAPS)]
    mine, end = _places(raw, old)
    if extension is None:
        if mine is None:
            return off
        if mine[0] + 8 + -(-mine[1] // 8) * 8 == end:
            return [*off, (mine[0], _HEAD.pack(EXT_END, 0))]
        return [*off, *header_steps(_without_bit(raw, old), build_header(
            old.replaced(autoclear=old.autoclear & ~BITMAPS).with_extension(EXT_BITMAPS, None)))]
    if mine is not None and mine[1] == len(extension):
        at = mine[0] + 8
        if valid and at // _SECTOR == (at + len(extension) - 1) // _SECTOR:
            return [(at, extension)]
        return [*off, (at, extension), *on]
    if mine is None and (steps := _insertion(raw, old, end, extension)):
        return [*steps, *on]
    whole = old.replaced(autoclear=old.autoclear & ~BITMAPS).with_extension(EXT_BITMAPS, extension)
    return [*off, *header_steps(_without_bit(raw, old), build_header(fitting(whole))), *on]


def _insertion(raw: bytes, old: Header, end: int, extension: bytes) -> list[Step]:
    """The four steps of the module's head; none if there is no room for them."""
    data = extension + bytes(-len(extension) % 8) + _HEAD.pack(EXT_END, 0)
    stop = end + 8 + len(data)
    offset, size = _NAME.unpack_from(raw, _AT_NAME)
    steps: list[Step] = []
    if offset and offset < stop and offset + size > end:
        place = -(-max(stop, offset + size) // 8) * 8
        if place + size > len(raw):
            return []
        steps = [(place, raw[offset:offset + size]), (_AT_NAME, _NAME.pack(place, size))]
    if stop > len(raw) or (offset and offset <= end and not steps):  # or a name before the end: nobody writes it so
        return []
    return [*steps, (end + 8, data), (end, _HEAD.pack(EXT_BITMAPS, len(extension)))]


def _places(raw: bytes, header: Header) -> tuple[tuple[int, int] | None, int]:
    """Where the bitmaps extension is, (offset, length of its data), and where the extensions end."""
    at = header.header_length if header.version >= 3 else V2_LENGTH
    mine: tuple[int, int] | None = None
    for each in header.extensions:
        if each.kind == EXT_BITMAPS:
            mine = at, len(each.data)
        at += 8 + -(-len(each.data) // 8) * 8
    return mine, at


def _without_bit(raw: bytes, old: Header) -> bytes:
    offset, data = _autoclear(old.autoclear & ~BITMAPS)
    return raw[:offset] + data + raw[offset + len(data):] if old.version >= 3 else raw


def _autoclear(value: int) -> Step:
    return AT_AUTOCLEAR, value.to_bytes(8, "big")
