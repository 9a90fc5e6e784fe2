"""What a standby holds already is not sent to it again: before everything is copied, both ends compare digests.

    primary ──pair-digests──► standby: "from there on so many bytes are zeroes, then come clusters with these digests"
       └── looks at the same range of its own disk; what differs is copied

This is for a standby of which nobody knows what it lacks: after a crash of the primary's host, when an old primary
becomes the standby of its successor, or when the disk's content was brought there in another way. It costs reading both
disks; over the network go 16 bytes for each 64 KiB. A hole of the standby's is passed in one step.

The digest is BLAKE2b with 128 bits, and a key that is new for each comparison: who writes to the disks cannot prepare
two contents that are taken for the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

from blockstep.aio import Buffer
from blockstep.aio.copying import zero_runs
from blockstep.aio.pool import in_thread
from blockstep.block.driver import Extent
from blockstep.block.io import Backend, enter, leave
from blockstep.block.status import status_through
from blockstep.units import GiB, MiB

#: Bytes of the disk for which there is one digest; the last cluster ends with the disk.
CLUSTER: Final = 65536
#: Bytes of a digest, and of the key.
SIZE: Final = 16
#: The digest of a cluster of zeroes, however long it is.
_ZEROES: Final = bytes(SIZE)
#: Bytes of a disk whose digests are told at once, at the most; a multiple of what is read at once.
WINDOW: Final = 16 * MiB
#: Bytes of a disk whose block status is asked at once, at the most.
STATUS: Final = GiB
#: Bytes that are read at once, and how many times at a time.
_PIECE: Final = MiB
_PIECES: Final = 4


class Content(NamedTuple):
    """What a disk holds from some offset on."""

    #: So many bytes are known to read as zeroes, in whole clusters.
    zeroes: int
    #: Of the clusters that follow, `SIZE` bytes each.
    digests: bytes

    def told(self, length: int) -> int:
        """Bytes of which it tells, of a range of ``length``. Raises ValueError if it cannot be an answer to that."""
        clusters, rest = divmod(len(self.digests), SIZE)
        told = self.zeroes + clusters * CLUSTER
        whole = self.zeroes == length or not self.zeroes % CLUSTER
        if rest or not whole or not 0 <= self.zeroes <= length or not 0 < told < length + CLUSTER:
            raise ValueError(f"{self.zeroes} bytes of zeroes and {len(self.digests)} of digests, for {length} bytes")
        return min(told, length)


async def content(user: Backend, offset: int, length: int, key: bytes) -> Content:
    """What the node of ``user`` holds in a range, as far as it is told at once: at least a cluster.

    The range begins with a cluster and ends with one, or with the disk. Raises OSError.
    """
    begins = await _piece(user, offset, min(length, _PIECE), key)
    if not any(begins) and (zeroes := await _zeroes(user, offset, length)):
        return Content(zeroes, b"")
    return Content(0, await digests(user, offset, min(length, WINDOW), key))


async def digests(user: Backend, offset: int, length: int, key: bytes) -> bytes:
    """The digests of the clusters of a range. Raises OSError."""
    found: list[bytes] = []
    pieces = [(at, min(_PIECE, offset + length - at)) for at in range(offset, offset + length, _PIECE)]
    for first in range(0, len(pieces), _PIECES):
        ends = await asyncio.gather(*(_piece(user, at, count, key) for at, count in pieces[first:first + _PIECES]),
                                    return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
            found.append(end)
    return b"".join(found)


async def data(user: Backend, offset: int, length: int) -> list[tuple[int, int]]:
    """The parts of a range, as (offset, length), that are not known to read as zeroes. Raises OSError.

    Of at most `STATUS` bytes: a disk may be in any number of parts.
    """
    found = []
    for extent in await _status(user, offset, length):
        if not extent.zero:
            found.append((offset, extent.length))
        offset += extent.length
    return found


def differing(one: bytes, other: bytes) -> Iterator[int]:
    """The numbers of the clusters whose digests, of as many clusters, are not the same."""
    if one != other:
        for at in range(0, len(one), SIZE):
            if one[at:at + SIZE] != other[at:at + SIZE]:
                yield at // SIZE


async def _zeroes(user: Backend, offset: int, length: int) -> int:
    """Bytes at the beginning of a range that are known to read as zeroes, in whole clusters."""
    found, window = 0, WINDOW
    while found < length:
        for extent in await _status(user, offset + found, min(window, length - found)):
            if not extent.zero:
                return found // CLUSTER * CLUSTER
            found += extent.length
        window = min(window * 16, STATUS)
    return found


async def _status(user: Backend, offset: int, length: int) -> list[Extent]:
    await enter(user)
    try:
        return await status_through(user.node, offset, length)
    finally:
        leave(user)


async def _piece(user: Backend, offset: int, length: int, key: bytes) -> bytes:
    """Is read without the question where data is: some file systems count pages to answer that."""
    await enter(user)
    try:
        return await in_thread(_digests, await user.edge.pread(offset, length), key)
    finally:
        leave(user)


def _digests(data: Buffer, key: bytes) -> bytes:
    found, start = [], 0
    with memoryview(data) as view:
        for length, zero in zero_runs(data, CLUSTER):
            found += [_ZEROES if zero else blake2b(view[at:at + CLUSTER], digest_size=SIZE, key=key).digest()
                      for at in range(start, start + length, CLUSTER)]
            start += length
    return b"".join(found)
