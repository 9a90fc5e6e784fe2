"""Keeping: persistent bitmaps of an open image.

    opened     the bits are loaded, the bitmaps record; for writing: ``in_use`` is set on the disk, for all of them
    one comes  or goes: a new directory, in which all have ``in_use`` (`keep_bitmaps`)
    closed     bits and tables go into free clusters; then a new directory without ``in_use``

Made read-only is as closed, made writable as opened. A directory always goes into free clusters, and then the header
refers to it, which is one write to one sector, but for the first bitmap and the last (`header_steps`). So after a
crash all bitmaps are as they were before the last step or after it, or there are none, and leaks. Bits that could
have missed a write are never believed.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

from blockstep.block.bitmap import DirtyBitmap
from blockstep.drivers.qcow2.bitmap_limits import MOST_BITS, bitmap_bytes, check_directory
from blockstep.drivers.qcow2.bitmap_loading import Found, Kept, load_bitmaps
from blockstep.drivers.qcow2.format import (
    AUTO,
    BITMAPS,
    EXT_BITMAPS,
    EXTRA_COMPATIBLE,
    IN_USE,
    OFFSET,
    BitmapEntry,
    BitmapsExtension,
    Header,
    build_bitmaps,
    build_bitmaps_extension,
    build_header,
    encode_table,
    fitting,
    parse_header,
)
from blockstep.drivers.qcow2.header_steps import bitmap_steps
from blockstep.drivers.qcow2.refcounts import Refcounts, read_file
from blockstep.drivers.qcow2.saving import Saver
from blockstep.drivers.qcow2.tables import Tables
from blockstep.errors import ImageError, OptionError

#: Bytes of bits that are written at a time.
_PIECE: Final = 1 << 20
_WRITES: Final = ("pwrite", "begin_write", "write_compressed", "copy_in", "write_zeroes", "discard", "truncate")


class Keeper(Saver):
    """The part of the driver that keeps bitmaps."""

    #: The bitmaps as the disk has them.
    _found: Found
    #: What the disk may have instead, with all marked, since the header could not be written.
    _doubtful: list[Found]
    #: Held while the directory changes, and between the halves of emptying.
    _keeping: asyncio.Lock

    def _persistent(self) -> list[DirtyBitmap]:
        return [each for each in self.bitmaps.values() if isinstance(each, DirtyBitmap) and each.persistent]

    # --- loading ---

    async def _load_bitmaps(self, header: Header, writable: bool) -> Found:
        """Raises ImageError, OSError."""
        found = await load_bitmaps(self.file, header, writable)
        clusters = array("Q", found.clusters())
        if len(set(clusters)) != len(clusters):
            raise ImageError("bitmaps", "use a cluster twice", "in clusters of their own")
        return found

    def _check_places(self, found: Found, refcounts: Refcounts, tables: Tables) -> None:
        """Raises ImageError if bitmaps lie where other metadata does."""
        bits = tables.bits
        mine = set(found.clusters())
        others = [range(1)]
        for offset, table in ((tables.l1_offset, tables.l1), (refcounts.table_offset, refcounts.table)):
            others.append(range(offset >> bits, (offset >> bits) + -(-len(table) * 8 >> bits)))
        entries = ((entry & OFFSET) >> bits for entry in chain(refcounts.table, tables.l1))
        if mine and not mine.isdisjoint(chain(*others, entries)):
            raise ImageError("bitmaps", "overlap other metadata", "in clusters of their own")

    def _clash(self, found: Found) -> bool:
        """Whether a bitmap that somebody uses is another by now, or a name is taken by a bitmap that is not stored."""
        for name, each in self.bitmaps.items():
            if not each.persistent:
                clash = name in found.kept
            else:
                bits = found.bits.get(name)
                clash = each.busy is not None and (bits is None or bits.granularity != each.granularity)
            if clash:
                return True
        return False

    def _take(self, found: Found) -> None:
        """Show them as bitmaps of the node; those that it has already, of an earlier time, become what they are now."""
        for bitmap in self._persistent():
            kept = found.kept.get(bitmap.name)
            if kept is None or bitmap.granularity != 1 << kept.entry.granularity_bits or (
                    bitmap.inconsistent == (bitmap.name in found.bits)):
                bitmap.remove()
        for name, kept in found.kept.items():
            bits = found.bits.get(name)
            bitmap = self.bitmaps.get(name) or DirtyBitmap(
                self, name, granularity=1 << kept.entry.granularity_bits, persistent=True, inconsistent=bits is None)
            if bits is not None:
                bitmap.take_over(bits)
                bitmap.enabled = bool(kept.entry.flags & AUTO)
        found.bits.clear()
        self._found = found

    async def _mark_bitmaps(self) -> None:
        """Say on the disk that the stored bits are out of date. Durable at return."""
        kept = self._found.kept
        for other in self._doubtful:
            await self.file.pwrite(other.directory[0] << self._bits, _directory(other.kept))
            await self.file.flush()
        if all(each.entry.flags & IN_USE for each in kept.values()):
            return
        for name, each in kept.items():
            kept[name] = _in_use(each)
        await self.file.pwrite(self._found.directory[0] << self._bits, _directory(kept))
        await self.file.flush()

    # --- what may come ---

    def check_bitmap(self, name: str, granularity: int) -> None:
        others = [each for each in self._persistent() if not each.inconsistent]
        reason = ("the node is read-only" if self.read_only else "images of version 2 have no bitmaps"
                  if self.header.version < 3 else "the disk has no bytes" if not self.length else None)
        if reason is None:
            try:
                check_directory([name, *(each.name for each in self._persistent())])
                units = granularity, *(each.granularity for each in others)
                bits = sum(bitmap_bytes(self.length, each) for each in units)
                if bits > MOST_BITS:
                    raise ImageError("bitmaps", bits, f"at most {MOST_BITS} bytes together")
                build_header(fitting(_with_bitmaps(self.header, BitmapsExtension(1, 0, 0))))
            except ImageError as error:
                reason = str(error)
        if reason is not None:
            raise OptionError("persistent", True, f"off: node '{self.name}' cannot store the bitmap: {reason}")

    async def truncate(self, length: int) -> None:
        for bitmap in self._persistent():
            try:
                if not bitmap.inconsistent and not bitmap_bytes(length, bitmap.granularity):
                    raise ImageError("size", length, "more than 0")
            except ImageError as error:
                raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}: bitmap '{bitmap.name}' could not be stored: "
                                           f"{error}") from error
        await super().truncate(length)

    # --- storing ---

    async def keep_bitmaps(self) -> None:
        async with self._keeping:
            live = self._persistent()
            if {each.name for each in live} == self._found.kept.keys() and not self._doubtful:
                return
            fresh: list[tuple[int, int]] = []
            try:
                kept = {each.name: self._found.kept.get(each.name) or await self._write_table(each, None, fresh)
                        for each in live}
                await self._move_directory(kept, fresh)
            except BaseException:
                await self._give_back(fresh)
                raise

    async def _store_bitmaps(self) -> None:
        """Store all bits. Raises OSError; then the disk says that they are out of date, as before."""
        async with self._keeping:
            kept: dict[str, Kept] = {}
            fresh: list[tuple[int, int]] = []
            live = self._persistent()
            if not live and not self._found.kept and not self._doubtful:
                return
            try:
                for bitmap in live:
                    old = self._found.kept.get(bitmap.name)
                    if not bitmap.inconsistent:
                        bitmap.fit()
                        kept[bitmap.name] = await self._write_bits(bitmap, old, fresh)
                    elif old is not None:
                        kept[bitmap.name] = old
                await self._move_directory(kept, fresh)
            except OSError as error:
                await self._give_back(fresh)
                names = ", ".join(f"'{each.name}'" for each in live)
                raise OSError(error.errno, f"the bitmaps {names} of node '{self.name}' could not be stored, and are "
                                           f"inconsistent from now on: {error.strerror or error}") from error
            except BaseException:
                await self._give_back(fresh)
                raise

    async def _write_bits(self, bitmap: DirtyBitmap, old: Kept | None, fresh: list[tuple[int, int]]) -> Kept:
        refcounts, size = self._refcounts, self.cluster_size
        count = -(-bitmap_bytes(self.length, bitmap.granularity) >> self._bits)
        table = array("Q", bytes(8 * count))
        bits, wanted = bitmap.bits, []
        found = bits.find(1)
        while found >= 0:
            wanted.append(found // (size * 8))
            found = bits.find(1, (wanted[-1] + 1) * size * 8)
        at = 0
        while at < len(wanted):
            offset, part, _ = await refcounts.allocate(min(len(wanted) - at, max(1, _PIECE >> self._bits)))
            fresh.append((offset, part))
            with memoryview(bits) as view:
                data = b"".join(bytes(view[index * size:(index + 1) * size]).ljust(size, b"\0")
                                for index in wanted[at:at + part])
            for number, index in enumerate(wanted[at:at + part]):
                table[index] = offset + number * size
            await self.file.pwrite(offset, data)
            await asyncio.sleep(0)
            at += part
        return await self._write_table(bitmap, old, fresh, table)

    async def _write_table(self, bitmap: DirtyBitmap, old: Kept | None, fresh: list[tuple[int, int]],
                           table: array[int] | None = None) -> Kept:
        """``table``: where the bits are; None: nowhere, and the bitmap is in use."""
        flags = (AUTO if bitmap.enabled else 0) | (IN_USE if table is None else 0)
        if table is None:
            table = array("Q", bytes(8 * -(-bitmap_bytes(self.length, bitmap.granularity) >> self._bits)))
        clusters = -(-len(table) * 8 >> self._bits)
        offset, _, _ = await self._refcounts.allocate(clusters, exactly=True)
        fresh.append((offset, clusters))
        await self.file.pwrite(offset, encode_table(table).ljust(clusters << self._bits, b"\0"))
        extra = old.entry.extra if old is not None else b""
        entry = BitmapEntry(offset, len(table), flags | (EXTRA_COMPATIBLE if extra else 0), bitmap.shift,
                            bitmap.name, extra=extra)
        first = offset >> self._bits
        used = array("Q", range(first, first + clusters))
        used.extend(place >> self._bits for place in table if place)
        return Kept(entry, used)

    async def _move_directory(self, kept: dict[str, Kept], fresh: list[tuple[int, int]]) -> None:
        """Make ``kept`` the bitmaps of the image. Durable at return. ``fresh``: emptied when the disk may have it."""
        directory, place, clusters = _directory(kept), 0, 0
        if kept:
            clusters = -(-len(directory) >> self._bits)
            place, _, _ = await self._refcounts.allocate(clusters, exactly=True)
            fresh.append((place, clusters))
            await self.file.pwrite(place, directory.ljust(clusters << self._bits, b"\0"))
        await self._save()  # the refcounts; and all that was written is durable
        fresh.clear()
        places = range(place >> self._bits, (place >> self._bits) + clusters)
        if kept:
            self._doubtful.append(Found(places, {name: _in_use(each) for name, each in kept.items()}))
        await self._change_header(BitmapsExtension(len(kept), len(directory), place) if kept else None)
        old = self._bitmap_clusters()
        self._found, self._doubtful = Found(places, kept), []
        self._refcounts.made_durable(sorted(old - self._bitmap_clusters()))

    def _bitmap_clusters(self) -> set[int]:
        """The clusters of the bitmaps that the disk has, or may have."""
        return {cluster for found in (self._found, *self._doubtful) for cluster in found.clusters()}

    async def _give_back(self, fresh: Iterable[tuple[int, int]]) -> None:
        for offset, count in fresh:
            await self._refcounts.release(offset, count)

    async def _change_header(self, extension: BitmapsExtension | None) -> None:
        data = None if extension is None else build_bitmaps_extension(extension)
        async with self._saving:
            raw = await read_file(self.file, 0, self.cluster_size)
            old = parse_header(raw)
            for offset, piece in bitmap_steps(raw, old, data):
                await self.file.pwrite(offset, piece)
                await self.file.flush()
            new = _with_bitmaps(old, extension)
            self.header = self.header.replaced(extensions=new.extensions, autoclear=new.autoclear)

    # --- what cannot be marked must not be written ---

    async def _mark_or_refuse(self) -> None:
        """Before writes go on after the node was made, or was nearly made, read-only."""
        try:
            await self._mark_bitmaps()
        except OSError as error:
            self._refuse_writes(error)
        else:
            if "pwrite" in vars(self):
                self._accept_writes()

    def _refuse_writes(self, error: OSError) -> None:
        """Bitmaps could not be marked as in use: a write would make them wrong, and nobody would know."""

        async def refuse(*_: Any) -> None:
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: node '{self.name}' cannot be written to, since its "
                                     f"bitmaps could not be marked: {error.strerror or error}")

        vars(self).update(dict.fromkeys(_WRITES, refuse))
        self._rebind()

    def _accept_writes(self) -> None:
        for name in _WRITES:
            vars(self).pop(name, None)
        self._rebind()


def _in_use(kept: Kept) -> Kept:
    return Kept(kept.entry.replaced(flags=kept.entry.flags | IN_USE), kept.clusters)


def _directory(kept: dict[str, Kept]) -> bytes:
    return build_bitmaps([each.entry for each in kept.values()])


def _with_bitmaps(header: Header, extension: BitmapsExtension | None) -> Header:
    return header.replaced(autoclear=header.autoclear & ~BITMAPS | (BITMAPS if extension else 0)).with_extension(
        EXT_BITMAPS, None if extension is None else build_bitmaps_extension(extension))
