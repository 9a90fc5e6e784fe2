"""The file of an overlay: a header, which clusters are held, and the clusters.

    offset       bytes      what
    0            4096       header, written once
    4096         4096       state slot 0 \\  of the two, the valid one with the higher generation counts;
    8192         4096       state slot 1 /  a new state goes to the other slot
    map 0        map size   one bit per cluster, least significant bit of the first byte is cluster 0: 1 is held
    map 1        map size   the same; the state says which of the two counts
    data offset  length     cluster n at data offset + n * cluster size; holes are zeroes

    header: magic "BLKSTPOV", u32 version 1, u32 cluster size, u64 data offset, u64 map 0, u64 map 1, u64 map size,
            u32 CRC-32 of all before it
    state:  magic "BLKSTPST", u64 generation, u64 length, u32 which map, u32 CRC-32 of all before it
    Numbers are little-endian. What is not named is zero, and ignored by readers of version 1.

**Crash safety.** While one state lasts, bits of its map are only ever set, and a bit is written after its cluster's
data has been synced. So a map page may reach the disk torn or not at all: any mixture of an old and a new page is
a map in which each set bit has its data, and what is missing was never flushed. Pages need no checksums for that.
Bits are only taken back in a new state (emptied, resized), by this order:

    write the other map whole ─► sync it, and all data ─► write the other state slot ─► sync

Until the slot is whole on the disk its checksum fails and the old state counts, with its map untouched; the data
under the old map's bits must therefore stay as it is or be overwritten by what the guest wrote later, and is given
back to the filesystem only after the last sync.

The maps are sized for `room` bytes of disk, and sparse; a disk that would outgrow them needs a new image.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from typing import Final

from blockstep.aio.locking import Locking
from blockstep.aio.posix import (
    OpenFile,
    data_runs,
    length_of,
    naming,
    punch_hole,
    read_padded,
    read_whole,
    set_length,
    sync_parent,
    write_whole,
)
from blockstep.block.bitmap import Bitmap
from blockstep.errors import noting
from blockstep.units import MiB, TiB

_HEADER: Final = struct.Struct("<8sIIQQQQ")
_STATE: Final = struct.Struct("<8sQQI")
_CRC: Final = struct.Struct("<I")
_MAGIC, _STATE_MAGIC, _VERSION = b"BLKSTPOV", b"BLKSTPST", 1
_BLOCK: Final = 4096

#: Bytes of a map that are written together; one is 32768 clusters.
PAGE: Final = 4096
#: log2 of the clusters of a page.
PAGE_SHIFT: Final = 15


def room(length: int) -> int:
    """How far a disk of ``length`` bytes may grow in its image."""
    return max(4 * length, TiB)


class OverlayImage:
    """An open image. All methods wait for the device: call them in threads, one at a time."""

    cluster_size: int
    #: Where the disk begins in the file.
    data_offset: int
    #: The disk's length in the state that counts.
    length: int
    #: The number of that state.
    generation: int
    _map: int

    def __init__(self, filename: str, *, writable: bool, locking: Locking, length: int | None = None,
                 cluster_size: int = 0) -> None:
        """Open an image. With ``length``, make it (of ``cluster_size``) if there is no file or an empty one.

        Raises OSError that names the file: EINVAL when it is not an overlay image or is damaged.
        """
        self.file = OpenFile(filename, writable=writable, locking=locking, create=length is not None)
        try:
            if length is not None and not length_of(self.file.fd):
                try:
                    with naming(filename):
                        self._create(length, cluster_size)
                except OSError as error:
                    with noting(error):
                        os.ftruncate(self.file.fd, 0)
                    raise
            self._load()
        except BaseException:
            self.file.close()
            raise
        #: The error of a sync that failed: what was written before it may be lost, and syncing again cannot tell.
        self.lost: OSError | None = None

    @property
    def fd(self) -> int:
        return self.file.fd

    def close(self) -> None:
        self.file.close()

    # --- the map ---

    def load_map(self) -> Bitmap:
        """The clusters that are held."""
        bitmap = Bitmap(self.length, self.cluster_size)
        begin = self._maps[self._map]
        position = 0
        with memoryview(bitmap.bits) as view:
            for run, data in data_runs(self.fd, begin, begin + len(view)):
                if data:
                    view[position:position + run] = read_whole(self.fd, run, begin + position)
                position += run
        return bitmap

    def sync(self, pages: dict[int, bytes], durable: bool = True) -> None:
        """Make all data durable, then ``pages`` of the map (page number -> bytes)."""
        self._sync(durable)
        if pages:
            self._write_pages(self._map, pages)
            self._sync(durable)

    def sync_new_state(self, pages: dict[int, bytes], length: int, durable: bool = True) -> None:
        """Make all data durable, then a new state whose map is ``pages`` and zeroes elsewhere."""
        other = 1 - self._map
        self._erase(self._maps[other])
        self._write_pages(other, pages)
        self._sync(durable)
        write_whole(self.fd, _state(self.generation + 1, length, other), _slot(self.generation + 1))
        self._sync(durable)
        self.generation += 1
        self._map, self.length = other, length

    def check_room(self, length: int) -> None:
        """Raises OSError (EFBIG) if a disk of that length has no place in the maps."""
        if length > self._map_size * 8 * self.cluster_size:
            raise OSError(errno.EFBIG, "the overlay image was made for a smaller disk: make a new one",
                          self.file.filename)

    def _write_pages(self, which: int, pages: dict[int, bytes]) -> None:
        for number in sorted(pages):
            write_whole(self.fd, pages[number], self._maps[which] + number * PAGE)

    def _erase(self, begin: int) -> None:
        if not punch_hole(self.fd, begin, self._map_size):
            position = begin
            for run, data in data_runs(self.fd, begin, begin + self._map_size):
                for at in range(position, position + run if data else position, MiB):
                    write_whole(self.fd, bytes(min(MiB, position + run - at)), at)
                position += run

    def _sync(self, durable: bool) -> None:
        if self.lost:
            raise self.lost
        if durable:
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                self.lost = error
                raise

    # --- header and state ---

    def _create(self, length: int, cluster_size: int) -> None:
        fd = self.fd
        map_size = _up(-(-room(length) // cluster_size) // 8, PAGE)
        maps = [3 * _BLOCK, 3 * _BLOCK + map_size]
        data_offset = _up(maps[1] + map_size, max(MiB, cluster_size))
        write_whole(fd, _state(1, length, 0), _slot(1))
        set_length(fd, data_offset + length, self.file.filename)
        os.fsync(fd)
        # The header comes last: a file without it is no image, and is not taken for an empty one.
        header = _HEADER.pack(_MAGIC, _VERSION, cluster_size, data_offset, *maps, map_size)
        write_whole(fd, header + _CRC.pack(zlib.crc32(header)), 0)
        os.fsync(fd)
        sync_parent(self.file.filename)

    def _load(self) -> None:
        header = read_padded(self.fd, _HEADER.size + _CRC.size, 0)
        magic, version, self.cluster_size, self.data_offset, map0, map1, self._map_size = _HEADER.unpack_from(header)
        if magic != _MAGIC:
            raise self._bad("is not an overlay image")
        if version != _VERSION:
            raise self._bad(f"is an overlay image of version {version}, and only {_VERSION} is known")
        if _CRC.unpack_from(header, _HEADER.size)[0] != zlib.crc32(header[:_HEADER.size]):
            raise self._bad("is damaged: the checksum of its header is wrong")
        self._maps = map0, map1
        states = [state for slot in (0, 1) if (state := _parse_state(read_padded(self.fd, _BLOCK, _slot(slot))))]
        if not states:
            raise self._bad("is damaged: neither of its two states has a right checksum")
        self.generation, self.length, self._map = max(states)

    def _bad(self, what: str) -> OSError:
        return OSError(errno.EINVAL, what, self.file.filename)


def _state(generation: int, length: int, which: int) -> bytes:
    state = _STATE.pack(_STATE_MAGIC, generation, length, which)
    return (state + _CRC.pack(zlib.crc32(state))).ljust(_BLOCK, b"\0")


def _parse_state(block: bytes | bytearray | memoryview) -> tuple[int, int, int] | None:
    magic, generation, length, which = _STATE.unpack_from(block)
    right = _CRC.unpack_from(block, _STATE.size)[0] == zlib.crc32(block[:_STATE.size])
    return (generation, length, which) if right and magic == _STATE_MAGIC and which in (0, 1) else None


def _slot(generation: int) -> int:
    return _BLOCK + (generation & 1) * _BLOCK


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
