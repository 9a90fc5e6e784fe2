"""Writing compressed clusters: packed in a thread, and put into the file without gaps, at any byte.

    clusters of the file   |aaaaaaabbb|bbbcccccccdd|dd...      a: 1 use, and one of b; the second has b, c and d
                            ^entries of a, b, c, d say where each begins and in how many sectors it is

A cluster of the file may have data of many of the disk's, and counts them; it is free when all of them are gone. The
refcounts are saved before the L2 entries, as for all clusters. What does not become shorter is written as it is.

Packed data is never changed in its place: who writes into such a cluster gives it an ordinary one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from blockstep.aio.pool import in_thread
from blockstep.block.driver import Buffer, not_supported
from blockstep.drivers.qcow2.compressed import compress
from blockstep.drivers.qcow2.copying import Copier
from blockstep.drivers.qcow2.format import EXTERNAL_DATA, compressed_entry


class Packer(Copier):
    """The part of the driver that writes compressed data."""

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """See `Driver`."""
        if self.header.incompatible & EXTERNAL_DATA:
            raise not_supported("compressed clusters in an image with an external data file")
        end = offset + len(data)
        if offset & self._within or (end & self._within and end != self.length):
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: whole clusters can be compressed, and no others")
        try:
            await self._running(self._pack_and_write(offset, data))
        finally:
            for watcher in self.watchers:
                watcher.wrote(offset, len(data))

    async def _pack_and_write(self, offset: int, data: Buffer) -> None:
        stop = -(-(offset + len(data)) >> self._bits) << self._bits
        pieces = await in_thread(_pack, self.header.compression_type, data, self.cluster_size)
        token = self._lock.try_take(offset, stop) or await self._lock.take(offset, stop)
        try:
            await self._write_pieces(offset, data, pieces)
        finally:
            self._lock.give_back(token)

    async def _write_pieces(self, offset: int, data: Buffer, pieces: Sequence[bytes | None]) -> None:
        view, size = memoryview(data), self.cluster_size
        at = 0
        while at < len(pieces):
            place = offset + at * size
            room = self._mask + 1 - ((place >> self._bits) & self._mask)  # up to the end of the L2 table
            row = [piece for piece in _row(pieces[at:at + room]) if piece is not None]
            if row:
                await self._write_row(place, row)
                at += len(row)
            else:
                await self._write_locked(place, view[at * size:(at + 1) * size])
                at += 1

    async def _write_row(self, offset: int, row: list[bytes]) -> None:
        """Neighbouring clusters, of one L2 table."""
        index, sizes = offset >> self._l2_shift, [len(piece) for piece in row]
        await self._tables.own(index)
        places = await self._refcounts.allocate_bytes(sizes)
        try:
            entries = []
            for place, length in zip(places, sizes, strict=True):
                entry = compressed_entry(place, length, self._bits)
                if entry is None:
                    raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}: the file is too long for compressed data")
                entries.append(entry)
            for place, packed in _joined(places, row):
                await self.file.pwrite(place, packed)
            await self._tables.own(index)
        except BaseException:
            await self._refcounts.release_bytes(places, sizes)
            raise
        for entry in entries:
            self._unpacked.pop(entry, None)  # of what was there before
        self._tables.change(index, (offset >> self._bits) & self._mask, entries)


def _pack(kind: int, data: Buffer, size: int) -> list[bytes | None]:
    """Each cluster packed, or None; the last one filled up with zeroes."""
    view = memoryview(data)
    clusters = (view[at:at + size] for at in range(0, len(data), size))
    return [compress(kind, each if len(each) == size else bytes(each).ljust(size, b"\0")) for each in clusters]


def _row(pieces: Sequence[bytes | None]) -> Sequence[bytes | None]:
    """Those before the first that cannot be packed."""
    return pieces[:pieces.index(None)] if None in pieces else pieces


def _joined(places: Sequence[int], row: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Pieces that lie behind each other in one write."""
    found: list[tuple[int, list[bytes]]] = []
    end = -1
    for place, piece in zip(places, row, strict=True):
        if place != end:
            found.append((place, []))
        found[-1][1].append(piece)
        end = place + len(piece)
    return [(place, b"".join(pieces)) for place, pieces in found]
