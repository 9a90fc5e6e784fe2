"""How often each cluster of an image is used: what a check counts, and what the refcount blocks say.

A `Counts` keeps one array for each refcount block that is not all zeroes, with the item size of the image's refcounts
(a byte at least), so that a block read from the image and a block counted compare in one operation. Memory follows
what is in use, not the length of the file, and ends at a stated limit: a file of a few kilobytes can claim clusters
all over 64 PiB.
"""

from __future__ import annotations

from array import array

from blockstep.drivers.qcow2.format import Header, empty_block
from blockstep.errors import ImageError
from blockstep.units import GiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: Bytes of memory that the arrays of one `Counts` take at most, and a check has two. With clusters of 64 KiB and
#: refcounts of 16 bits that is a file of 32 TiB.
MOST_MEMORY: Final = GiB


class Counts(dict[int, "array[int]"]):
    """Number of a refcount block -> the counts of its clusters. Blocks come into being, all zeroes, when asked for."""

    def __init__(self, header: Header) -> None:
        super().__init__()
        self.bits: Final = header.block_bits
        self._mask = (1 << self.bits) - 1
        self._empty = empty_block(header)
        self._block_size = len(self._empty) * self._empty.itemsize
        self._most = (1 << 8 * self._empty.itemsize) - 1
        #: Clusters whose count is more than an item can hold; their items hold the most.
        self.overflown: set[int] = set()

    def __missing__(self, number: int) -> array[int]:
        if (len(self) + 1) * self._block_size > max(MOST_MEMORY, self._block_size):
            raise ImageError("number of refcount blocks that clusters in use need", f"more than {len(self)}",
                             f"at most that, for a check in {MOST_MEMORY} bytes of memory")
        block = self[number] = self._empty[:]
        return block

    def of(self, cluster: int) -> int:
        """The count of a cluster."""
        block = self.get(cluster >> self.bits)
        return block[cluster & self._mask] if block is not None else 0

    def add(self, cluster: int, weight: int = 1) -> None:
        """Count ``weight`` uses more of a cluster."""
        block = self[cluster >> self.bits]
        try:
            block[cluster & self._mask] += weight
        except OverflowError:
            block[cluster & self._mask] = self._most
            self.overflown.add(cluster)

    def add_run(self, first: int, count: int, weight: int = 1) -> None:
        """Count ``weight`` uses more of ``count`` clusters from ``first`` on."""
        for number, begin, end in self._pieces(first, count):
            block = self[number]
            zeroes = self._empty[:end - begin]
            if block[begin:end] == zeroes and weight <= self._most:
                block[begin:end] = array(block.typecode, [weight]) * (end - begin)
            else:
                for cluster in range((number << self.bits) + begin, (number << self.bits) + end):
                    self.add(cluster, weight)

    def recast(self, header: Header) -> Counts:
        """The same counts, of which none is too large, for refcounts of another width."""
        new = Counts(header)
        for number, block in self.items():
            first = number << self.bits
            for at, begin, end in new._pieces(first, len(block)):
                part = block[(at << new.bits) + begin - first:(at << new.bits) + end - first]
                if any(part):
                    new[at][begin:end] = array(new._empty.typecode, part)
        return new

    def all_are(self, first: int, count: int, value: int) -> bool:
        """Whether the counts of ``count`` clusters from ``first`` on are all ``value``."""
        if value > self._most:
            return False
        for number, begin, end in self._pieces(first, count):
            block = self.get(number)
            if block is None:
                if value:
                    return False
            elif block[begin:end] != array(block.typecode, [value]) * (end - begin):
                return False
        return True

    def end(self) -> int:
        """The number behind the last cluster that is in use."""
        for number in sorted(self, reverse=True):
            block = self[number]
            used = len(block.tobytes().rstrip(b"\0"))
            if used:
                return (number << self.bits) + -(-used // block.itemsize)
        return 0

    def _pieces(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """The blocks of a run: (number, first item, item behind the last)."""
        end = first + count
        return [(number, max(first - (number << self.bits), 0), min(end - (number << self.bits), self._mask + 1))
                for number in range(first >> self.bits, (end - 1 >> self.bits) + 1 if count else first >> self.bits)]
