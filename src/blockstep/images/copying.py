"""The copy engine for images that nobody else uses: it can pack what it writes, and go on where nothing can be read.

Compressed clusters are written whole, so what is there is asked for by clusters: one in which anything is data is data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from blockstep.block.driver import ZEROES, Buffer, Extent
from blockstep.jobs.block_copy import BlockCopy, Failure

#: The least that is read of what cannot be read as a whole.
_SECTOR: Final = 512

#: Told of the offset of each sector that cannot be read, and why.
Salvage = Callable[[int, OSError], None]


class ImageCopy(BlockCopy):
    """``full``: zeroes are written as data. ``compressed``: with `Driver.write_compressed`; granularity and piece are
    multiples of the target's cluster then. ``salvage``: what cannot be read becomes zeroes.
    """

    def __init__(self, *args: Any, full: bool = False, compressed: bool = False, salvage: Salvage | None = None,
                 **more: Any) -> None:
        super().__init__(*args, **more)
        self._full, self._compressed, self._salvage = full, compressed, salvage

    async def _zero(self, offset: int, length: int) -> None:
        if not self._full:
            await super()._zero(offset, length)
            return
        for at in range(offset, offset + length, len(ZEROES)):
            await self._write(at, ZEROES[:min(len(ZEROES), offset + length - at)])

    async def _write(self, offset: int, data: Buffer) -> None:
        if not self._compressed:
            await super()._write(offset, data)
            return
        node, end = self.target.node, offset + len(data)
        last = end & -node.cluster_size if end != node.length else end  # of a target that is longer than the source
        if self.written is not None:
            self.written.set(offset, len(data))
        try:
            if offset < last:
                await node.write_compressed(offset, memoryview(data)[:last - offset])
        except OSError as error:
            raise Failure("write", error) from error
        if last < end:
            await super()._write(max(last, offset), memoryview(data)[max(last - offset, 0):])

    async def _copy(self, offset: int, length: int, hint: Extent) -> None:
        if not self._compressed:
            await super()._copy(offset, length, hint)
            return
        for extent in _by_unit(await self._status(offset, length), self.granularity):
            if extent.zero and (extent.allocated or not self.allocated_only):
                await self._zero(offset, extent.length)
            elif extent.allocated or not self.allocated_only:
                await self._read_and_write(offset, extent.length)
            offset += extent.length

    # --- what cannot be read ---

    async def _status(self, offset: int, length: int) -> list[Extent]:
        try:
            return await super()._status(offset, length)
        except Failure:
            if self._salvage is None:
                raise
            return [Extent(length, depth=0)]  # whatever it is, to read it is never wrong

    async def _read(self, offset: int, length: int) -> Buffer:
        try:
            return await super()._read(offset, length)
        except Failure as failure:
            if self._salvage is None:
                raise
            if length <= _SECTOR:
                self._salvage(offset, failure.error)
                return bytes(length)
        half = -(-length // _SECTOR // 2) * _SECTOR
        return b"".join([await self._read(offset, half), await self._read(offset + half, length - half)])


def _by_unit(extents: list[Extent], unit: int) -> Iterator[Extent]:
    """The same in multiples of ``unit``: zero if all of it is, allocated if any of it is."""
    total = sum(extent.length for extent in extents)
    ends: list[tuple[int, Extent]] = []
    end = 0
    for extent in extents:
        end += extent.length
        ends.append((end, extent))
    found: list[Extent] = []
    number = 0
    for start in range(0, total, unit):
        stop = min(start + unit, total)
        inside = [ends[number][1]]
        while ends[number][0] < stop:
            number += 1
            inside.append(ends[number][1])
        if ends[number][0] == stop:
            number += 1
        zero, allocated = all(each.zero for each in inside), any(each.allocated for each in inside)
        if found and (found[-1].zero, found[-1].allocated) == (zero, allocated):
            found[-1] = found[-1]._replace(length=found[-1].length + stop - start)
        else:
            found.append(Extent(stop - start, data=not zero, zero=zero, allocated=allocated, depth=0))
    yield from found
