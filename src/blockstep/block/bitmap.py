"""Bitmaps over a disk's clusters.

The bits live in anonymous memory that the kernel gives out page by page when it is first touched, so a bitmap over
a terabyte costs nothing until something is in it, and `clear` hands the pages back at once: clearing takes the
same few microseconds however much is set. All searches run in C (`bitarray`).

`Bitmap` is the set of clusters; `DirtyBitmap` is one that watches a node and has a name. A node keeps its bitmaps in
`Node.bitmaps`; they go when it goes. Whoever works with one says so (`DirtyBitmap.claim`, `DirtyBitmap.show`), and
others are refused meanwhile. Changes come in two halves, `prepare_...` and what that returns, so that several happen
together or not at all: between the halves no write may come, or an abort would forget it.

A *persistent* bitmap is stored by its node's driver when the node is closed, and is there again when it is opened
(`Driver.check_bitmap`, `Driver.keep_bitmaps`). One that could not be stored in order is *inconsistent* then: nobody
knows what it would have to say, so it is shown, and can be removed, and nothing else.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from bitarray import bitarray
from bitarray.util import count_or

from blockstep.aio import Buffer
from blockstep.block.driver import Prepared
from blockstep.errors import OperationBlocked, OptionError, explained

if TYPE_CHECKING:
    from blockstep.block.driver import Driver

#: Bytes of UTF-8 in the name of a bitmap, at most: what the image formats that store them have room for.
LONGEST_NAME: Final = 1023
#: Bits that a `CountedBitmap` counts at a time, as a power of two: some microseconds.
_BLOCK: Final = 16
#: Bytes of a cluster, at least and at most.
_GRANULARITIES: Final = (512, 1 << 31)


class Bitmap:
    """One bit for each cluster of ``granularity`` bytes (a power of two) of ``length`` bytes.

    Making one raises OSError (ENOMEM) that says how much memory there would have to be.
    """

    __slots__ = ("_memory", "bits", "granularity", "length", "shift")

    def __init__(self, length: int, granularity: int) -> None:
        if granularity <= 0 or granularity & (granularity - 1):
            raise OptionError("granularity", granularity, "a power of two")
        self.length = length
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        try:
            self._memory, self.bits = _zeroed(-(-length // granularity))
        except OSError as error:
            raise OSError(error.errno, explained(error.errno or errno.ENOMEM, (
                f"a bitmap over {length} bytes takes {length // granularity // 8} bytes of memory"))) from None

    @classmethod
    def over(cls, memory: Buffer, length: int, granularity: int) -> Bitmap:
        """Bits that lie in ``memory``, of as many whole bytes as they need: set and read, and nothing else."""
        bitmap = cls.__new__(cls)
        bitmap.length, bitmap.granularity, bitmap.shift = length, granularity, granularity.bit_length() - 1
        bitmap.bits = bitarray(buffer=memory, endian="little")
        return bitmap

    def clear(self) -> None:
        """Reset all bits, in constant time."""
        self._memory.madvise(mmap.MADV_DONTNEED)

    def exchange(self) -> Bitmap:
        """Start anew, and return what was set up to now, in constant time."""
        old = Bitmap.__new__(Bitmap)
        old.length, old.granularity, old.shift = self.length, self.granularity, self.shift
        old._memory, old.bits = self._memory, self.bits
        self._memory, self.bits = _zeroed(-(-self.length // self.granularity))
        return old

    def take_over(self, other: Bitmap) -> None:
        """Be what ``other`` is, of the same granularity, in constant time. Nobody uses that one any more."""
        self.length, self._memory, self.bits = other.length, other._memory, other.bits

    def prepare_resize(self, length: int) -> Callable[[], None]:
        """Get the memory to follow a disk to another length; what is new will not be set. Raises OSError (ENOMEM).

        Nothing has changed until the returned function is called, which cannot fail.
        """
        new = Bitmap(length, self.granularity)

        def commit() -> None:
            new.merge(self)
            self.take_over(new)

        return commit

    def resize(self, length: int) -> None:
        """Follow a disk whose length has changed; what is new is not set. Raises OSError; then nothing changed."""
        self.prepare_resize(length)()

    def set(self, offset: int, length: int) -> None:
        """Set the bits of all clusters that the range touches."""
        first, end = offset >> self.shift, (offset + length + self.granularity - 1) >> self.shift
        if end - first == 1:
            self.bits[first] = 1
        else:
            self.bits[first:end] = True

    def reset(self, offset: int, length: int) -> None:
        """Reset the bits of all clusters that lie wholly in the range (the last one may end with the disk)."""
        first = (offset + self.granularity - 1) >> self.shift
        end = len(self.bits) if offset + length >= self.length else (offset + length) >> self.shift
        if first < end:
            self.bits[first:end] = False

    def any(self, offset: int, length: int) -> bool:
        """Whether a cluster that the range touches is set."""
        first, end = offset >> self.shift, (offset + length + self.granularity - 1) >> self.shift
        return self.bits.find(1, first, end) >= 0

    def merge(self, other: Bitmap) -> None:
        """Set what ``other`` has set, as far as this one goes; the granularities may differ."""
        if other.granularity == self.granularity and other.length == self.length:
            self.bits |= other.bits
        else:
            for offset, length in other.dirty():
                if offset >= self.length:
                    break
                self.set(offset, min(length, self.length - offset))

    def count(self) -> int:
        """Bytes in set clusters (the last cluster counts as far as the disk goes)."""
        return self._bytes(self._ones(), self)

    def count_or(self, other: Bitmap) -> int:
        """Bytes in clusters that are set here or in ``other``, of the same length and granularity."""
        return self._bytes(count_or(self.bits, other.bits), self, other)

    def _bytes(self, ones: int, *bitmaps: Bitmap) -> int:
        """What ``ones`` clusters have that are set in any of ``bitmaps``."""
        tail = self.length & (self.granularity - 1)
        cut = tail and any(bitmap.bits[self.length >> self.shift] for bitmap in bitmaps)
        return (ones << self.shift) - (self.granularity - tail if cut else 0)

    def _ones(self) -> int:
        return self.bits.count()

    def next_dirty(self, offset: int, limit: int) -> tuple[int, int] | None:
        """The first run of set clusters from that of ``offset`` on, as (offset, length) of at most ``limit`` bytes.

        None if there is none: also where ``offset`` is the disk's end, which may lie within a cluster.
        """
        start = self.bits.find(1, offset >> self.shift)
        if start < 0 or offset >= self.length:
            return None
        most = start + max(1, limit >> self.shift)
        end = self.bits.find(0, start, most)
        if end < 0:
            end = min(most, len(self.bits))
        begin = start << self.shift
        return begin, min(end << self.shift, self.length) - begin

    def dirty(self) -> Iterator[tuple[int, int]]:
        """All runs of set clusters as (offset, length), in order."""
        for start, end in _runs(self.bits, 0, len(self.bits)):
            begin = start << self.shift
            yield begin, min(end << self.shift, self.length) - begin

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """The range as runs of (length, dirty)."""
        result: list[tuple[int, bool]] = []
        end = offset + length
        bits, shift = self.bits, self.shift
        while offset < end:
            cluster = offset >> shift
            dirty = bool(bits[cluster])
            change = bits.find(not dirty, cluster, (end + self.granularity - 1) >> shift)
            stop = end if change < 0 else min(end, change << shift)
            result.append((stop - offset, dirty))
            offset = stop
        return result


class CountedBitmap(Bitmap):
    """A bitmap that is asked for its `count` again and again while it changes: only what has changed is counted."""

    __slots__ = ("_counted", "_counts", "_stale")

    def __init__(self, length: int, granularity: int) -> None:
        super().__init__(length, granularity)
        self._forget()

    def _forget(self) -> None:
        self._counted = 0
        #: Bits set in each block of 1 << _BLOCK bits, where that is not 0; the blocks that may have changed since.
        self._counts: dict[int, int] = {}
        self._stale: set[int] = set()

    def _ones(self) -> int:
        for block in self._stale:
            now = self.bits.count(1, block << _BLOCK, (block + 1) << _BLOCK)
            self._counted += now - self._counts.pop(block, 0)
            if now:
                self._counts[block] = now
        self._stale.clear()
        return self._counted

    def _touch(self, offset: int, length: int) -> None:
        first, last = offset >> self.shift + _BLOCK, offset + length - 1 >> self.shift + _BLOCK
        if first == last:
            self._stale.add(first)
        else:
            self._stale.update(range(first, last + 1))

    def set(self, offset: int, length: int) -> None:
        super().set(offset, length)
        self._touch(offset, length)

    def reset(self, offset: int, length: int) -> None:
        super().reset(offset, length)
        self._touch(offset, length)

    def merge(self, other: Bitmap) -> None:
        super().merge(other)
        self._touch(0, self.length)

    def clear(self) -> None:
        super().clear()
        self._forget()

    def exchange(self) -> Bitmap:
        self._forget()
        return super().exchange()

    def take_over(self, other: Bitmap) -> None:
        super().take_over(other)
        self._forget()
        self._touch(0, self.length)


class DirtyBitmap(Bitmap):
    """A named bitmap of what has been written to a node since it was cleared."""

    __slots__ = ("busy", "changing", "enabled", "inconsistent", "name", "node", "persistent")

    def __init__(self, node: Driver, name: str, length: int | None = None, granularity: int = 65536, *,
                 persistent: bool = False, inconsistent: bool = False) -> None:
        """Raises OptionError: a name that is empty, too long or taken, a granularity that is no power of two.

        An inconsistent bitmap has the length 0 and records nothing.
        """
        # A name in an image need not be UTF-8; such bytes are surrogates here, as in file names.
        if not 0 < len(name.encode("utf-8", "surrogateescape")) <= LONGEST_NAME:
            raise OptionError("name", name, f"1 to {LONGEST_NAME} bytes long")
        if name in node.bitmaps:
            raise OptionError("name", name, f"one that no other bitmap of node '{node.name}' has")
        super().__init__(0 if inconsistent else node.length if length is None else length, granularity)
        self.node = node
        self.name = name
        self.enabled = not inconsistent
        self.persistent = persistent
        self.inconsistent = inconsistent
        #: The job or operation that uses it now; others are refused.
        self.busy: str | None = None
        #: Whether that one may still give it bits, or take them.
        self.changing = False
        if not inconsistent:
            node.watch(self)
        node.bitmaps[name] = self

    def wrote(self, offset: int, length: int) -> None:
        """A write to the node has ended."""
        if self.enabled:
            if offset + length > self.length:
                self.resize(offset + length)
            self.set(offset, length)

    def remove(self) -> None:
        """Stop watching the node."""
        if self in self.node.watchers:
            self.node.unwatch(self)
        if self.node.bitmaps.get(self.name) is self:  # nobody else has done it
            del self.node.bitmaps[self.name]

    def claim(self, user: str, restores: bool = False) -> Callable[[], None]:
        """Use it, until the returned function is called. ``restores``: it will have all of its bits again then.

        Raises OperationBlocked when somebody else does, and as `check_usable`.
        """
        self.check_usable(changing=not restores)
        return self._claim(user, True)

    def show(self, user: str) -> Callable[[], None]:
        """As `claim`, by one who only looks at it: it goes on recording. Raises as `claim` with ``restores``."""
        self.check_usable(changing=False)
        return self._claim(user, False)

    def _claim(self, user: str, changing: bool) -> Callable[[], None]:
        self.busy, self.changing = user, changing

        def release() -> None:
            self.busy, self.changing = None, False

        return release

    def check_idle(self) -> None:
        """Raises OperationBlocked, saying by whom, when it is in use."""
        if self.busy is not None:
            raise self._blocked(f"it is in use by {self.busy}")

    def check_usable(self, changing: bool = True) -> None:
        """Raises OperationBlocked: in use, inconsistent, or (if ``changing``) stored by a node that is read-only."""
        self.check_idle()
        if self.inconsistent:
            raise self._blocked("it is inconsistent: it was not stored in order, so writes may be missing in it; "
                                "remove it, and let a full backup begin a new one")
        if changing:
            self._check_stored()

    def _check_stored(self) -> None:
        if self.persistent and self.node.read_only:
            raise self._blocked("it is persistent, and the node is read-only, so no change of it could be stored")

    def _blocked(self, reason: str) -> OperationBlocked:
        return OperationBlocked(self.node.name, f"use of bitmap '{self.name}'", reason)

    # --- changes, in two halves; all raise OperationBlocked as `check_usable` does ---

    @classmethod
    def prepare_add(cls, node: Driver, name: str, granularity: int = 65536, enabled: bool = True,
                    persistent: bool = False) -> Prepared:
        """Make one. Raises OptionError: as the class itself does, or for a granularity below 512.

        ``persistent``: also what `Driver.check_bitmap` raises; `Driver.keep_bitmaps` is to follow the commit.
        """
        least, most = _GRANULARITIES
        if not least <= granularity <= most:
            raise OptionError("granularity", granularity, f"a power of two from {least} to {most}")
        if persistent:
            node.check_bitmap(name, granularity)
        bitmap = cls(node, name, granularity=granularity, persistent=persistent)
        bitmap.enabled = enabled
        return Prepared(abort=bitmap.remove)

    def prepare_remove(self) -> Prepared:
        """Forget it; nobody can use it from now on. `Driver.keep_bitmaps` is to follow, if it is persistent."""
        self.check_idle()
        self._check_stored()
        return Prepared(self.remove, self._claim("whoever removes it", True))

    def prepare_clear(self) -> Prepared:
        """Reset all bits."""
        self.check_usable()
        old = self.exchange()
        return Prepared(abort=lambda: self.merge(old))

    def prepare_enabled(self, enabled: bool) -> Prepared:
        """Record writes from now on, or do not."""
        self.check_usable()
        before, self.enabled = self.enabled, enabled

        def abort() -> None:
            self.enabled = before

        return Prepared(abort=abort)

    def prepare_merge(self, others: Sequence[DirtyBitmap]) -> Prepared:
        """Set what any of ``others`` has set. Raises OptionError if one is of a disk of another length."""
        for bitmap in (self, *others):
            bitmap.check_usable(changing=bitmap is self)
            bitmap.fit()
            if bitmap.length != self.length:
                raise OptionError("bitmaps", bitmap.name, f"one over {self.length} bytes, as '{self.name}' is; it is "
                                                          f"over {bitmap.length}")
        before = Bitmap(self.length, self.granularity)
        before.merge(self)
        for bitmap in others:
            self.merge(bitmap)

        def abort() -> None:
            self.clear()
            self.merge(before)

        return Prepared(abort=abort)

    def fit(self) -> None:
        """Follow a node whose length has changed without a write."""
        if not self.inconsistent and self.length != self.node.length:
            self.resize(self.node.length)


def find_bitmap(node: Driver, name: str) -> DirtyBitmap:
    """The bitmap ``name`` of ``node``. Raises OptionError."""
    bitmap: DirtyBitmap | None = node.bitmaps.get(name)
    if bitmap is None:
        raise OptionError("bitmap", name, f"the name of a bitmap of node '{node.name}'")
    return bitmap


def _zeroed(count: int) -> tuple[mmap.mmap, bitarray]:
    memory = mmap.mmap(-1, max(1, (count + 7) // 8), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    bits = bitarray(buffer=memory, endian="little")
    # The buffer is whole bytes, and a bitarray on a foreign buffer keeps that length: what is beyond stays 0.
    return memory, bits


def _runs(bits: bitarray, start: int, end: int) -> Iterator[tuple[int, int]]:
    while (start := bits.find(1, start, end)) >= 0:
        stop = bits.find(0, start, end)
        if stop < 0:
            stop = end
        yield start, stop
        start = stop
