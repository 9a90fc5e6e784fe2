"""Several images one behind the other, read as one disk: the sources of a conversion.

It hangs in no graph: its images do, and it is a user of none of them but through the doors that they came with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from blockstep.block.driver import Buffer, Driver, Extent
from blockstep.block.io import Backend
from blockstep.block.node import NodeOptions
from blockstep.block.permissions import ALL, READ


def joined(images: Sequence[Backend]) -> Backend:
    """One user for all of them, in this order; of one image the image itself."""
    return images[0] if len(images) == 1 else Backend("img", _Joined(images), READ, ALL)


class _Joined(Driver):
    driver: ClassVar[str] = "joined"

    def __init__(self, images: Sequence[Backend]) -> None:
        super().__init__("joined", NodeOptions(read_only=True))
        self._images = tuple(images)
        self.length = sum(image.length for image in images)

    async def pread(self, offset: int, length: int) -> Buffer:
        parts = [await image.pread(start, count) for image, start, count in self._parts(offset, length)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [extent._replace(allocated=True, depth=1) for image, start, count in self._parts(offset, length)
                for extent in await image.block_status(start, count)]

    def raw_range(self, offset: int, length: int) -> tuple[int, int] | None:
        (image, start, _), *more = self._parts(offset, length)
        return None if more else image.node.raw_range(start, length)

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Backend, int, int]]:
        """The range as (image, offset in it, length)."""
        for image in self._images:
            count = min(length, image.length - offset)
            if count > 0:
                yield image, offset, count
                offset, length = offset + count, length - count
            if not length:
                return
            offset -= image.length
