"""How long the file of a new image would be, with all of a disk in it, or with what another image holds.

    header | refcount table and blocks | L1 | L2 tables | data      for all of the disk: fully allocated
    the same without the clusters that would read as zeroes         required
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from blockstep.block.io import Backend
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.bitmap_limits import bitmap_bytes
from blockstep.drivers.qcow2.create import whole_length
from blockstep.errors import OptionError
from blockstep.images.create import Creation
from blockstep.images.describe import described
from blockstep.images.opened import ImageName, opened
from blockstep.images.snapshot import snapshot_id
from blockstep.units import GiB

_WINDOW: Final = GiB
_SECTOR: Final = 512
#: Of an entry of the directory of bitmaps, without the name.
_ENTRY: Final = 24


class Size(msgspec.Struct, frozen=True):
    """All in bytes. ``bitmaps``: what the source's bitmaps would take; None: one of the two cannot have any."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None

    def as_json(self) -> dict[str, int]:
        """As qemu-img prints it."""
        found = {} if self.bitmaps is None else {"bitmaps": self.bitmaps}
        return {**found, "required": self.required, "fully-allocated": self.fully_allocated}

    def lines(self) -> list[str]:
        """The same for people."""
        last = [] if self.bitmaps is None else [f"bitmaps size: {self.bitmaps}"]
        return [f"required size: {self.required}", f"fully allocated size: {self.fully_allocated}", *last]


class Measurement(msgspec.Struct, frozen=True):
    """What to measure: a new image of ``format`` for a disk of ``size`` bytes, or for what ``source`` holds."""

    format: str
    options: Mapping[str, str] = msgspec.field(default_factory=dict)
    size: int | None = None
    source: ImageName | None = None
    snapshot: str | None = None

    async def measure(self) -> Size:
        """Do it. Raises OptionError and OSError."""
        if (self.size is None) == (self.source is None):
            raise OptionError("--size", self.size, "given, or else an image, and not both")
        if self.format not in ("raw", "qcow2"):
            raise OptionError("-O", self.format, "raw or qcow2")
        if self.source is None:
            assert self.size is not None
            return _size(await self._wanted(self.size), self.size, 0, None)
        shown: dict[str, Any] = {}
        if self.snapshot is not None:
            shown["snapshot"] = await snapshot_id(self.source, self.snapshot)
        async with opened(self.source, **shown) as image:
            wanted = await self._wanted(image.length)
            if not isinstance(wanted, CreateQcow2):
                return _size(wanted, image.length, 0, None)
            data = await _data(image, wanted.cluster_size) if wanted.backing_file is None else None
            length = image.length
        return _size(wanted, length, data, await self._bitmaps(wanted))

    async def _wanted(self, size: int) -> Any:
        options = {word: value for word, value in self.options.items() if word != "size"}
        return await Creation(self.format, "measured", size, options, unsafe=True, option="-O").checked()

    async def _bitmaps(self, wanted: CreateQcow2) -> int | None:
        assert self.source is not None
        if wanted.version == "v2" or self.source.is_options or await self.source.format_known() != "qcow2":
            return None
        fields = (await described(self.source))[0]
        about = fields["format-specific"]["data"]
        if about["compat"] == "0.10":
            return None
        unit, total, directory = wanted.cluster_size, 0, 0
        for one in about.get("bitmaps", ()):
            clusters = -(-bitmap_bytes(fields["virtual-size"], one["granularity"]) // unit)
            total += clusters + -(-clusters * 8 // unit)
            directory += -(-(_ENTRY + len(one["name"].encode())) // 8) * 8
        return (total + -(-directory // unit)) * unit


def _size(wanted: Any, size: int, data: int | None, bitmaps: int | None) -> Size:
    """``data``: clusters that are not zero; None: that is not known, since a backing image shows through."""
    if not isinstance(wanted, CreateQcow2):
        whole = -(-size // _SECTOR) * _SECTOR
        return Size(whole, whole)
    clusters = -(-size // wanted.cluster_size)
    whole = whole_length(wanted.header())
    if data is None or wanted.preallocation in ("falloc", "full"):
        data = clusters
    return Size(whole - (clusters - data) * wanted.cluster_size, whole, bitmaps)


async def _data(image: Backend, unit: int) -> int:
    """The clusters of ``unit`` bytes that have anything but zeroes, as far as block status tells."""
    count = offset = counted = 0  # up to `counted` they are counted
    while offset < image.length:
        for extent in await image.block_status(offset, min(_WINDOW, image.length - offset)):
            if extent.data and not extent.zero:
                first, end = max(offset // unit, counted), -(-(offset + extent.length) // unit)
                count += max(0, end - first)
                counted = max(counted, end)
            offset += extent.length
    return count
