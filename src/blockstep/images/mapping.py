"""Which layer of an image holds which bytes, and where in its file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from blockstep.block.driver import Driver, Extent
from blockstep.block.io import Backend
from blockstep.block.status import backing_of
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.images.qcow2 import full_name
from blockstep.inventory.filenames import filename_of
from blockstep.units import GiB

_WINDOW: Final = GiB


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
    borders = sorted({node.length for node, _ in layers if node.length < image.length})
    last: MapEntry | None = None
    while start < end:
        stop = min([end, start + _WINDOW, *(border for border in borders if border > start)])
        for extent in await image.block_status(start, stop - start):
            for entry in await _entries(layers, start, extent):
                if last is not None and _continues(last, entry):
                    last = last._replace(length=last.length + entry.length)
                else:
                    if last is not None:
                        yield last
                    last = entry
            start += extent.length
    if last is not None:
        yield last


Layer = tuple[Driver, str]


def _layers(node: Driver) -> list[Layer]:
    """The layers with the names of their files, which are seen from where the first one is."""
    layers = [(node, filename_of(node))]
    while (below := backing_of(layers[-1][0])) is not None:
        above, name = layers[-1]
        given = above.header.backing_file if isinstance(above, Qcow2) and above.options.backing == {} else None
        layers.append((below, full_name(given, name) if given else filename_of(below)))
    return [(layer, _data_name(layer, name)) for layer, name in layers]


def _data_name(node: Driver, name: str) -> str:
    """The name of the file that has a layer's data, ``name`` being that of its image."""
    if not isinstance(node, Qcow2) or node.data_file is None:
        return name
    given = node.header.data_file if node.options.data_file == {} else None
    return full_name(given, name) if given else filename_of(node.data_file.node)


async def _entries(layers: list[Layer], start: int, extent: Extent) -> list[MapEntry]:
    if not extent.depth:  # nobody holds it: the last layer that was asked is the one above the first that ends before
        depth = next((number - 1 for number, (node, _) in enumerate(layers) if number and node.length <= start),
                     len(layers) - 1)
        return [MapEntry(start, extent.length, depth, False, extent.zero, extent.data)]
    node, name = layers[extent.depth - 1]
    entries = []
    for length, place in await _places(node.unfiltered(), start, extent.length):
        entries.append(MapEntry(start, length, extent.depth - 1, True, extent.zero, extent.data, place, name))
        start += length
    return entries


async def _places(node: Driver, start: int, length: int) -> list[tuple[int, int | None]]:
    """Runs of (bytes, where they are in the node's file)."""
    if isinstance(node, Qcow2):
        return await node.places(start, length)
    place = node.raw_range(start, length)
    return [(length, None if place is None else place[1])]


def _continues(one: MapEntry, two: MapEntry) -> bool:
    where = None if one.offset is None else one.offset + one.length
    return one[2:6] == two[2:6] and where == two.offset and one.filename == two.filename
