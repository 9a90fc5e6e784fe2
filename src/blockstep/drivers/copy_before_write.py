"""Driver ``copy-before-write``: before a range of ``file`` is overwritten, its old content is saved to ``target``.

    writer ──► copy-before-write ──file──► disk
                      └──target──► holds what the disk was when the filter came (a *snapshot*), as far as it changed

Data is saved once, in clusters of ``cluster-size``; which are saved is the bitmap `CopyBeforeWrite.done`. A reader
of the snapshot looks into the target first and, where that holds nothing, into the disk itself, past this filter.
So between a reader that finds nothing in the target and its read of the disk, no write may slip in: readers take
`CopyBeforeWrite.lock` shared over what they read, and a write that has something to save takes it exclusively over
its clusters. A write whose clusters are all saved takes no lock: nobody reads the snapshot from the disk there.

When the old content cannot be saved, ``on-cbw-error`` chooses what breaks: the write (it fails, the snapshot stays
good) or the snapshot (the write goes on, `broken` says why the snapshot is no longer one).

Zeroes are saved as zeroes, which take no room in a target that can keep them so. A request without data (zeroes, a
discard) may cover all of a disk that is mostly holes: those are not read.

Durability: a flush makes the target durable first and the disk second. Nothing orders the save before the
overwrite it precedes: after a crash of the machine the snapshot may be incomplete.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from types import CoroutineType
from typing import ClassVar, Final, Literal

from blockstep.aio.copying import zero_runs
from blockstep.aio.rangelock import RangeLock
from blockstep.block.bitmap import Bitmap
from blockstep.block.driver import FAST, MAY_UNMAP, Buffer, Filter, not_supported
from blockstep.block.node import Child, NodeOptions, NodeRef
from blockstep.block.permissions import ALL, NONE, READ, RESIZE, WRITE, WRITE_UNCHANGED, Permission, Role
from blockstep.block.registry import register
from blockstep.block.status import status_through
from blockstep.errors import OptionError

#: So much is saved at a time: between its read and its write it stays in the processor's cache.
_PIECE: Final = 128 << 10
#: From so many bytes on, a piece is looked at whether it is zeroes: 3 us a MiB where it is not.
_LONG: Final = 64 << 10
#: After so many bytes, some milliseconds if nothing has to be waited for, others have their turn.
_TURN: Final = 4 << 20


class CopyBeforeWriteOptions(NodeOptions, tag="copy-before-write"):
    """``file``: the disk. ``target``: where old content goes. ``cluster-size``: bytes, a power of two."""

    file: NodeRef
    target: NodeRef
    on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write"
    cluster_size: int = 65536


@register
class CopyBeforeWrite(Filter):
    """See the module."""

    driver: ClassVar[str] = "copy-before-write"
    Options = CopyBeforeWriteOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED, "target": Role.TARGET}
    options: CopyBeforeWriteOptions
    target: Child

    async def open(self) -> None:
        if self.target.node.length < self.file.node.length:
            raise OptionError("target", self.target.node.name, f"at least as long as '{self.file.node.name}'")
        #: The clusters that need no saving any more.
        self.done = Bitmap(self.file.node.length, self.options.cluster_size)
        #: Taken shared by those who read the snapshot from the disk; see the module.
        self.lock = RangeLock()
        #: Why the snapshot is not one any more (``break-snapshot``).
        self.broken: OSError | None = None
        #: Called with each failure to save, or to make what was saved durable.
        self.on_error: Callable[[OSError], None] = lambda error: None

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        if not self.parents:  # not in anybody's way yet, or not any more
            return NONE, ALL
        if child.name == "file":
            # Whoever wrote past this filter would change the snapshot.
            return taken | READ, shared & ~(WRITE | RESIZE)
        # The target may have the disk for its backing node: what is written to that is saved here first.
        return READ | WRITE | WRITE_UNCHANGED, ALL

    def forget(self) -> None:
        """The snapshot is of now: nothing is saved yet. Nothing may be in flight. Constant time."""
        self.done.clear()
        self.broken = None

    async def copy(self, offset: int, length: int) -> None:
        """Save the clusters that the range touches, unless they are. Raises OSError, whatever ``on-cbw-error`` says."""
        await self._locked(offset, length, None)

    def begin_write(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        done = self.done
        shift, bits = done.shift, done.bits
        first, end = offset >> shift, (offset + len(data) - 1 >> shift) + 1
        if (bits[first] if end - first == 1 else bits.find(0, first, end) < 0) or self.broken:
            return self.file.begin_write(offset, data)
        start, size = first << shift, (end - first) << shift
        if (size > _PIECE or start + size > done.length or not self.lock.idle
                or (end - first > 1 and bits.find(1, first, end) >= 0)):
            return self.pwrite(offset, data)
        # Clusters none of which is saved, as in most small writes after a checkpoint: mostly nothing comes in between.
        try:
            old = self.file.begin_read(start, size)
            if old.__class__ is CoroutineType:
                return self._save_and_write(first, end, old, None, offset, data)
            saving = self.target.begin_write(start, old)
        except OSError as error:
            self._not_saved(error)
        else:
            if saving is not None:
                return self._save_and_write(first, end, None, saving, offset, data)
        bits[first:end] = True
        return self.file.begin_write(offset, data)

    async def _save_and_write(self, first: int, end: int, reading: Awaitable[Buffer] | None,
                              saving: Awaitable[None] | None, offset: int, data: Buffer) -> None:
        """The same where something has to be waited for: the rest of it. Nobody holds the lock."""
        shift = self.done.shift
        token = self.lock.try_take(first << shift, end << shift)
        try:
            try:
                if reading is not None:
                    saving = self.target.pwrite(first << shift, await reading)
                assert saving is not None
                await saving
            except OSError as error:
                self._not_saved(error)
            self.done.bits[first:end] = True
            await self.file.pwrite(offset, data)
        finally:
            self.lock.give_back(token)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        if self.broken or self._is_saved(offset, len(data)):
            await self.file.pwrite(offset, data, flags)
        else:
            await self._locked(offset, len(data), lambda: self.file.pwrite(offset, data, flags))

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if flags & FAST and not (self.broken or self._is_saved(offset, length)):
            raise not_supported("fast zeroes: old content has to be saved")
        await self._locked(offset, length, lambda: self.file.write_zeroes(offset, length, flags), sparse=True)

    async def discard(self, offset: int, length: int) -> None:
        await self._locked(offset, length, lambda: self.file.discard(offset, length), sparse=True)

    async def flush(self) -> None:
        try:
            await self.target.flush()
        except OSError as error:
            self.on_error(error)
            raise
        await self.file.flush()

    async def truncate(self, length: int) -> None:
        """See `Driver`. Nothing may be in flight: the bitmap of what is saved is replaced.

        The target must be so long already. What is new is not saved, except where the last cluster is: that counts
        as saved as a whole. What is cut off is saved before.
        """
        before = self.length
        if length > self.target.node.length:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: '{self.target.node.name}', which keeps old "
                          f"content, has {self.target.node.length} bytes only")
        if length < before:
            await self._locked(length, before - length, None, sparse=True)
        elif before & (self.done.granularity - 1) and self.done.any(before - 1, 1):
            rest = min(-before & (self.done.granularity - 1), length - before)
            try:
                await self.target.write_zeroes(before, rest)
            except OSError as error:
                self._not_saved(error)
        with self.followed_by([self.done], length):
            await self.file.resize(length)

    def _is_saved(self, offset: int, length: int) -> bool:
        shift = self.done.shift
        return self.done.bits.find(0, offset >> shift, (offset + length - 1 >> shift) + 1) < 0

    async def _locked(self, offset: int, length: int, then: Callable[[], Awaitable[None]] | None,
                      sparse: bool = False) -> None:
        shift = self.done.shift
        first, end = offset >> shift, (offset + length - 1 >> shift) + 1
        token = await self.lock.take(first << shift, end << shift)
        try:
            try:
                if sparse and length > _PIECE:
                    await self._save_holes(first, end)
                await self._save(first, end)
            except OSError as error:
                self._not_saved(error)
            if then:
                await then()
        finally:
            self.lock.give_back(token)

    async def _save_holes(self, first: int, end: int) -> None:
        """Save those of the clusters ``[first, end)`` that are known to be zero. The range is locked."""
        shift = self.done.shift
        offset = first << shift
        for extent in await status_through(self.file.node, offset, min(end << shift, self.done.length) - offset):
            begin, offset = offset, offset + extent.length
            if extent.zero:
                stop = end if offset == self.done.length else offset >> shift
                for start, after in self._not_done(-(-begin // self.done.granularity), stop):
                    at = start << shift
                    await self._saved_zeroes(at, min(after << shift, self.done.length) - at)

    async def _save(self, first: int, end: int) -> None:
        """Save the clusters ``[first, end)`` as far as they are not. The range is locked."""
        shift = self.done.shift
        for start, stop in self._not_done(first, end):
            offset, whole = start << shift, min(stop << shift, self.done.length)
            while offset < whole:
                length = min(max(_PIECE, self.done.granularity), whole - offset)
                data = await self.file.pread(offset, length)
                if length >= _LONG and zero_runs(data, length)[0][1]:
                    await self._saved_zeroes(offset, length)
                else:
                    await self.target.pwrite(offset, data)
                    self.done.set(offset, length)
                offset += length
                if not offset & _TURN - 1:
                    await asyncio.sleep(0)

    async def _saved_zeroes(self, offset: int, length: int) -> None:
        await self.target.write_zeroes(offset, length, MAY_UNMAP)
        self.done.set(offset, length)

    def _not_done(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        bits = self.done.bits
        while first < end and (start := bits.find(0, first, end)) >= 0:
            first = bits.find(1, start, end)
            if first < 0:
                first = end
            yield start, first

    def _not_saved(self, error: OSError) -> None:
        """Old content cannot be saved: break what ``on-cbw-error`` says."""
        self.on_error(error)
        if self.options.on_cbw_error == "break-guest-write":
            raise error
        self.broken = error
