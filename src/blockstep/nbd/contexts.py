"""What block status says: the extents of each metadata context.

    base:allocation              STATE_HOLE: occupies no storage; STATE_ZERO: reads as zeroes
    qemu:allocation-depth        layers down to the one that holds it; 0: none does, 1: the node itself, ...
    qemu:dirty-bitmap:NAME       STATE_DIRTY: written to since the bitmap was cleared

A reply may say less than was asked, but always something. We stop after `MAX_EXTENTS` extents, which bounds the reply
however large and fragmented the range is, and look at storage in windows, so that a long range is not walked to its
end first, and others have their turn between them. Neighbours of the same kind are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from blockstep.block.driver import Extent
from blockstep.nbd import constants as c
from blockstep.nbd.export import Export
from blockstep.nbd.turns import let_others

Extents = list[tuple[int, int]]

#: How many extents a reply has at most for each context.
MAX_EXTENTS: Final = 1 << 14
#: How many bytes storage is asked for at a time: at first, and at the most, where there are few extents.
_FIRST_WINDOW: Final = 8 << 20
_WINDOW: Final = 128 << 20
#: After so many extents, some milliseconds, others have their turn.
_MANY: Final = 256
#: Compact replies have 32-bit lengths; kept whole pages.
_COMPACT_LIMIT: Final = (1 << 32) - 4096


async def extents_of(export: Export, contexts: Sequence[str], offset: int, length: int, only_one: bool,
                     extended: bool) -> list[Extents]:
    """For each of ``contexts`` the extents of the range, from ``offset`` on, each list not empty.

    ``only_one`` (REQ_ONE): one extent each. ``extended``: lengths may have 64 bits.
    """
    most = 1 if only_one else MAX_EXTENTS
    if not extended:
        length = min(length, _COMPACT_LIMIT)
    layers: list[Extent] | None = None
    answers = []
    for name in contexts:
        if name.startswith(c.QEMU_DIRTY_BITMAP):
            answers.append(_merge(_bitmap(export, name, offset, length), most))
            continue
        if layers is None:
            layers = await _layers(export, offset, length, most)
        flags = _depth if name == c.QEMU_ALLOCATION_DEPTH else _allocation
        answers.append(_merge([(extent.length, flags(extent)) for extent in layers], most))
    return answers


async def _layers(export: Export, offset: int, length: int, most: int) -> list[Extent]:
    result: list[Extent] = []
    end, window = offset + length, _FIRST_WINDOW
    while offset < end and len(result) <= most:
        extents = await export.backend.block_status(offset, min(window, end - offset))
        for extent in extents:
            result.append(extent)
            offset += extent.length
        if len(extents) >= _MANY:
            await let_others()
        else:
            window = min(2 * window, _WINDOW)
    return result


def _bitmap(export: Export, name: str, offset: int, length: int) -> Extents:
    bitmap = export.bitmaps.get(name.removeprefix(c.QEMU_DIRTY_BITMAP))
    if bitmap is None:  # it was removed since the client selected it: anything may be dirty
        return [(length, c.STATE_DIRTY)]
    result: Extents = []
    end = offset + length
    recorded = min(end, bitmap.length)  # it may be one of a backing node, which is shorter
    while offset < recorded and len(result) <= MAX_EXTENTS:
        for size, dirty in bitmap.extents(offset, min(_WINDOW, recorded - offset)):
            result.append((size, c.STATE_DIRTY if dirty else 0))
            offset += size
    if recorded <= offset < end:
        result.append((end - offset, c.STATE_DIRTY))
    return result


def _allocation(extent: Extent) -> int:
    return (0 if extent.data else c.STATE_HOLE) | (c.STATE_ZERO if extent.zero else 0)


def _depth(extent: Extent) -> int:
    return extent.depth


def _merge(extents: Extents, most: int) -> Extents:
    """Join neighbours with the same flags, and keep the first ``most``."""
    result: Extents = []
    length = 0
    last = extents[0][1]
    for size, flags in extents:
        if flags != last:
            result.append((length, last))
            if len(result) == most:
                return result
            length, last = 0, flags
        length += size
    result.append((length, last))
    return result
