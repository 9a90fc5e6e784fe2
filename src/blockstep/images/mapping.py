"""Which layer of an image holds which bytes, and where in its file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from blockstep.block.driver import Driver, Extent
from blockstep.block.io import Backend
from blockstep.block.status import backing_of
from blockstep.drivers.file import File
from blockstep.inventory.filenames import filename_of
from blockstep.units import GiB

_WINDOW: Final = GiB
#: Less is not cut for the sake of an offset: the smallest cluster of any format.
_SMALLEST: Final = 512


class MapEntry(NamedTuple):
    """A run of bytes that has one origin. The field names are those of qemu-img's JSON."""

    start: int
    length: int  #: bytes
    depth: int  #: layers above the one that decides; 0: the image itself
    present: bool  #: held by a layer
    zero: bool
    data: bool
    offset: int | None = None  #: in ``filename``; None: not as it is, or nowhere
    filename: str | None = None

    def as_json(self) -> dict[str, int | bool]:
        """As qemu-img prints it."""
        found = {name: getattr(self, name) for name in self._fields[:6]}
        return found if self.offset is None else {**found, "offset": self.offset}


async def map_image(image: Backend, start: int = 0, length: int | None = None) -> AsyncIterator[MapEntry]:
    """The entries of a range, in order; neighbours differ. Raises OSError."""
    end = image.length if length is None else min(image.length, start + length)
    layers = _layers(image.node)
    borders = sorted({node.length for node in layers if node.length < image.length})
    last: MapEntry | None = None
    while start < end:
        stop = min([end, start + _WINDOW, *(border for border in borders if border > start)])
        for extent in await image.block_status(start, stop - start):
            for entry in _entries(layers, start, extent):
                if last is not None and _continues(last, entry):
                    last = last._replace(length=last.length + entry.length)
                else:
                    if last is not None:
                        yield last
                    last = entry
            start += extent.length
    if last is not None:
        yield last


def _layers(node: Driver) -> list[Driver]:
    layers = [node]
    while (below := backing_of(layers[-1])) is not None:
        layers.append(below)
    return layers


def _entries(layers: list[Driver], start: int, extent: Extent) -> list[MapEntry]:
    if not extent.depth:  # nobody holds it: the lowest layer that reaches so far was the last to be asked
        depth = max(number for number, node in enumerate(layers) if number == 0 or node.length > start)
        return [MapEntry(start, extent.length, depth, False, extent.zero, extent.data)]
    depth = extent.depth - 1
    entry = MapEntry(start, extent.length, depth, True, extent.zero, extent.data)
    if extent.zero and not _is_file(layers[depth]):
        return [entry]
    return _located(entry, layers[depth])


def _located(entry: MapEntry, node: Driver) -> list[MapEntry]:
    """The entry with the place of its bytes, in as many pieces as it lies in."""
    place = node.raw_range(entry.start, entry.length)
    if place is not None:
        return [entry._replace(offset=place[1], filename=filename_of(node))]
    unit = max(node.cluster_size, _SMALLEST)
    middle = (entry.start + entry.length // 2) // unit * unit
    if middle <= entry.start:
        middle += unit
    if middle >= entry.start + entry.length:
        return [entry._replace(filename=filename_of(node))]
    low = _located(entry._replace(length=middle - entry.start), node)
    high = _located(entry._replace(start=middle, length=entry.start + entry.length - middle), node)
    if _continues(low[-1], high[0]):
        high[0] = low[-1]._replace(length=low[-1].length + high[0].length)
        low.pop()
    return low + high


def _is_file(node: Driver) -> bool:
    while node.is_filter and "file" in node.children:
        node = node.children["file"].node
    return isinstance(node, File)


def _continues(one: MapEntry, two: MapEntry) -> bool:
    where = None if one.offset is None else one.offset + one.length
    return one[2:6] == two[2:6] and where == two.offset and one.filename == two.filename
