"""A writer whose disks can be told apart after every single write, and the proof that goes with it.

The writer keeps one sequence over all disks: it sends a write, waits until it is acknowledged, and sends the next,
to any disk. The n-th write fills a block with the number n. So the state of all disks together is told by one
number, how many of the writes they have seen, and disks at two different points in time are in no such state.

The proof believes nobody: from the original images and the list of writes it works out what every byte must be
after n writes, where n is the highest number that is found, and compares digests.

    writes = NumberedWrites([original0, original1])
    await writes.write_until(stop, clients)                  # in a task of its own
    low = writes.acknowledged; ...checkpoint...; high = writes.sent
    n = writes.prove([chunks0, chunks1])                     # raises NotAState
    assert low <= n <= high
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from blockstep.errors import BlockstepError
from blockstep.nbd.client import Client
from blockstep.units import MiB

#: Bytes of a write; disks are at least this long.
BLOCK: Final = 4096
_MARK: Final = struct.Struct(">8sQII")  # magic, number of the write, disk, filler
_MAGIC: Final = b"blkstep!"


class NotAState(BlockstepError):
    """The disks are not what they were after any number of writes."""


class NumberedWrites:
    """The writer and what it knows. ``originals``: the images of the disks before the first write."""

    def __init__(self, originals: Sequence[Path], seed: int = 20) -> None:
        self.originals = list(originals)
        self.sizes = [path.stat().st_size for path in originals]
        self.writes: list[tuple[int, int]] = []  #: (disk, offset) in their order; the n-th carries the number n + 1
        self.acknowledged = 0
        self.slowest = 0.0  #: seconds that a write took at the most; may be reset
        self.error: OSError | None = None  #: what ended `write_until`
        self._random = random.Random(seed)

    @property
    def sent(self) -> int:
        """How many writes were sent, acknowledged or not."""
        return len(self.writes)

    async def write(self, clients: Sequence[Client]) -> None:
        """The next write. ``clients``: one for each disk. Raises OSError; the disks may have it or not then."""
        disk = self._random.randrange(len(clients))
        offset = self._random.randrange(self.sizes[disk] // BLOCK) * BLOCK
        self.writes.append((disk, offset))
        started = time.monotonic()
        await clients[disk].pwrite(offset, self.block(disk, self.sent))
        self.acknowledged = self.sent
        self.slowest = max(self.slowest, time.monotonic() - started)

    async def write_until(self, stop: asyncio.Event, clients: Sequence[Client]) -> None:
        """Write on until ``stop`` is set, or a write fails: that is the end of the sequence, see `error`."""
        try:
            while not stop.is_set():
                await self.write(clients)
        except OSError as error:
            self.error = error

    @staticmethod
    def block(disk: int, number: int) -> bytes:
        """What the write with this number writes."""
        return _MARK.pack(_MAGIC, number, disk, 0) * (BLOCK // _MARK.size) + bytes(BLOCK % _MARK.size)

    def prove(self, disks: Sequence[Iterable[bytes]]) -> int:
        """After how many writes the disks are what they are.

        Each disk comes in chunks of whole blocks (the last may be shorter). Raises NotAState.
        """
        found = [_look_at(chunks) for chunks in disks]
        seen = max(number for _, number in found)
        if seen > self.sent:
            raise NotAState(f"a write with the number {seen} was found, but only {self.sent} were sent")
        for disk, (digest, _) in enumerate(found):
            if digest != self.expected(disk, seen):
                raise NotAState(f"disk {disk} ({self.originals[disk].stem}) is not what it was after {seen} writes, "
                                f"the latest that was found: its digest is {digest}, and should be "
                                f"{self.expected(disk, seen)}")
        return seen

    def expected(self, disk: int, seen: int) -> str:
        """The digest (SHA-256) of a disk after the first ``seen`` writes."""
        last = {offset: number for number, (where, offset) in enumerate(self.writes[:seen], 1) if where == disk}
        digest = hashlib.sha256()
        with open(self.originals[disk], "rb") as file:
            for start in range(0, self.sizes[disk], MiB):
                chunk = bytearray(file.read(MiB))
                for offset in range(start, start + len(chunk), BLOCK):
                    if offset in last:
                        chunk[offset - start : offset - start + BLOCK] = self.block(disk, last[offset])
                digest.update(chunk)
        return digest.hexdigest()


def _look_at(chunks: Iterable[bytes]) -> tuple[str, int]:
    """The digest of a disk, and the highest number of a write that is found on it."""
    digest, highest = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        for offset in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk.startswith(_MAGIC, offset):
                highest = max(highest, _MARK.unpack_from(chunk, offset)[1])
    return digest.hexdigest(), highest


def make_image(path: Path, size: int, seed: int) -> None:
    """Make a disk image: the first quarter of every 4 MiB is random data, the rest holes."""
    source = random.Random(seed)
    with open(path, "xb") as file:
        file.truncate(size)
        for start in range(0, size, 4 * MiB):
            file.seek(start)
            file.write(source.randbytes(min(MiB, size - start)))
