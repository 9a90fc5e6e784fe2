"""Driver ``qcow2``: an image in QEMU's format, in its child ``file``, over an optional backing node.

Its data lies in ``file`` as well, unless the image has an external data file, the child ``data-file``.

Data is written where it belongs at once, metadata is kept in memory (`tables`, `refcounts`) until a flush, or until too
much of it has changed. The driver is one class in storeys, each in a file with its theory at the head:

    Reader ◄── Saver ◄── Writer ◄── Resizer ◄──┐
                 ▲         ▲                   ├── Emptier ◄───────────┐
                 │         └─────── Copier ◄───│────────── Packer ◄────┼── Qcow2: opened, closed, reopened
                 └────── Keeper, of bitmaps ◄──┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import msgspec

from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import Driver, Prepared
from blockstep.block.node import LIVE_OPTIONS, NodeOptions, NodeRef
from blockstep.block.permissions import Role
from blockstep.block.registry import register
from blockstep.drivers.qcow2.backing import backing_options
from blockstep.drivers.qcow2.bitmap_loading import Found
from blockstep.drivers.qcow2.data_file import check_data_file, check_header, data_file_options
from blockstep.drivers.qcow2.emptying import Emptier
from blockstep.drivers.qcow2.format import (
    AT_AUTOCLEAR,
    AT_INCOMPATIBLE,
    BITMAPS,
    CORRUPT,
    DIRTY,
    RAW_EXTERNAL,
    Header,
    header_span,
    parse_header,
)
from blockstep.drivers.qcow2.guard import guard_of
from blockstep.drivers.qcow2.packing import Packer
from blockstep.drivers.qcow2.refcounts import Refcounts, read_file
from blockstep.drivers.qcow2.repairing import repair_file
from blockstep.drivers.qcow2.shown import check_read_only, show
from blockstep.drivers.qcow2.tables import Tables
from blockstep.errors import ImageError, OptionError

_DEFAULT_L2_CACHE: Final = 32 << 20
_DEFAULT_REFCOUNT_CACHE: Final = 4 << 20


class Qcow2Options(NodeOptions, tag="qcow2"):
    """``backing``: the default, ``{}``, is what the header names; None: nothing, whatever the header says.

    ``data_file``: the external data file, of images that have one; the default, ``{}``, is what the header names.
    """

    file: NodeRef
    backing: NodeRef | None = msgspec.field(default_factory=dict)
    data_file: NodeRef = msgspec.field(default_factory=dict)
    snapshot: str | None = None
    l2_cache_size: int | None = None
    refcount_cache_size: int | None = None


@register
class Qcow2(Emptier, Packer):
    """See the module."""

    driver: ClassVar[str] = "qcow2"
    live_options = LIVE_OPTIONS
    Options = Qcow2Options
    options: Qcow2Options
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.STORAGE, "backing": Role.BACKING,
                                              "data_file": Role.STORAGE}
    can_be_emptied: ClassVar[bool] = True

    async def _load_header(self) -> Header:
        start = await read_file(self.file, 0, 512)
        span = header_span(start)
        header = parse_header(start if span <= len(start) else await read_file(self.file, 0, span))
        return await show(self.file, header, self.options.snapshot)

    @property
    def _image_name(self) -> str:
        """How errors call the image: by its file, if the user has not named the node of that."""
        node = self.file.node
        filename = getattr(node.options, "filename", None)
        return filename if isinstance(filename, str) and node.name.startswith("#") else node.name

    def shown_as(self) -> Driver:
        return self.file.node

    def occupied(self) -> int | None:
        return self.file.node.occupied()

    async def implied_children(self) -> list[tuple[str, Role, NodeRef]]:
        """The backing node and the external data file that the header names, where the options do not say."""
        try:
            return self._implied_by(await self._load_header())
        except ImageError as error:
            raise OptionError("file", self._image_name, f"a qcow2 image that can be used: {error}") from error

    def _implied_by(self, header: Header) -> list[tuple[str, Role, NodeRef]]:
        backing = backing_options(header, self.file.node) if self.options.backing == {} else None
        data = data_file_options(header, self.file.node) if self.options.data_file == {} else None
        found: list[tuple[str, Role, NodeRef]] = []
        if backing is not None:
            found.append(("backing", Role.BACKING, backing))
        if data is not None:
            found.append(("data-file", Role.STORAGE, data))
        return found

    async def open(self) -> None:
        try:
            self.header = await self._load_header()
            self._check_readable(self.header)
        except ImageError as error:
            raise OptionError("file", self._image_name, f"a qcow2 image that can be used: {error}") from error
        check_data_file(self.header, self.file, self.data_file, self.backing)
        if not self.read_only:
            self._check_writable(self.header)
            if self.header.incompatible & DIRTY:
                self.header = await self._repaired()
        for name, size in (("l2-cache-size", self.options.l2_cache_size),
                           ("refcount-cache-size", self.options.refcount_cache_size)):
            if size is not None and size <= 0:
                raise OptionError(name, size, "more than 0 bytes")
        self._told = False
        self._use(self.header, *await self._load_tables(self.header, guarded=not self.read_only))
        self._lock = RangeLock()
        self._saving = asyncio.Lock()
        self._keeping = asyncio.Lock()
        self._saves = self._good_save = 0
        self._unpacked: dict[int, bytes] = {}
        self._slot = self._taken = None
        self._moving = self._header_in_doubt = False
        try:
            found = await self._load_bitmaps(self.header, not self.read_only)
            self._check_places(found, self._refcounts, self._tables)
            self._guard_bitmaps(found, self._refcounts)
        except ImageError as error:
            raise OptionError("file", self._image_name, f"a qcow2 image that can be used: {error}; its bitmaps can "
                                                       "be given up: blockstep img check --repair all") from error
        self._found, self._doubtful = found, []
        if not self.read_only:
            await self._clear_autoclear()
            await self._mark_bitmaps()
        self._take(found)

    async def _load_tables(self, header: Header, guarded: bool) -> tuple[Refcounts, Tables]:
        l2_cache = (self.options.l2_cache_size or _DEFAULT_L2_CACHE) >> header.cluster_bits
        refcount_cache = (self.options.refcount_cache_size or _DEFAULT_REFCOUNT_CACHE) >> header.cluster_bits
        refcounts = Refcounts(self.file, header, refcount_cache, self._save)
        tables = Tables(self.file, header, refcounts, l2_cache, self._save)
        await tables.open()
        await refcounts.open()
        refcounts.on_free = self._pass_discard
        if guarded:
            try:
                refcounts.guard = await guard_of(self.file, header, tables.l1, refcounts.table)
            except ImageError as error:
                raise OptionError("read-only", False, f"on, for the image '{self._image_name}': its metadata "
                                                      f"overlaps: {error}") from error
            refcounts.on_damage = self._mark_corrupt
        refcounts.on_broken = self._tell_broken
        return refcounts, tables

    @staticmethod
    def _guard_bitmaps(found: Found, refcounts: Refcounts) -> None:
        if refcounts.guard is not None:
            for cluster in found.clusters():
                refcounts.guard.claim(cluster, 1, "bitmaps")

    async def _mark_corrupt(self, what: str, offset: int | None, length: int | None) -> None:
        """Let everybody repair the image before it is written to again. What is in order can be used meanwhile."""
        if self.header.version >= 3 and not self.header.incompatible & CORRUPT:
            self.header = self.header.replaced(incompatible=self.header.incompatible | CORRUPT)
            try:
                async with self._saving:
                    await self.file.pwrite(AT_INCOMPATIBLE, self.header.incompatible.to_bytes(8, "big"))
                    await self.file.flush()
            except OSError:  # the next one tries again
                self.header = self.header.replaced(incompatible=self.header.incompatible & ~CORRUPT)
                return
            self._tell_broken(what, offset, length, fatal=True)

    def _tell_broken(self, what: str, offset: int | None, length: int | None, fatal: bool = False) -> None:
        """Once, and once more (``fatal``) when the image has been marked."""
        if not self._told or fatal:
            self._told = True
            data: dict[str, Any] = {"device": "", "node-name": self.name, "msg": what, "fatal": fatal}
            if offset is not None:
                data["offset"] = offset
            if length is not None:
                data["size"] = length
            self.report("BLOCK_IMAGE_CORRUPTED", data)

    def _check_readable(self, header: Header) -> None:
        if header.crypt_method:
            kind = "LUKS" if header.crypt_method == 2 else "AES"
            raise ImageError("crypt_method", f"{header.crypt_method} ({kind})", "0: encrypted images cannot be used")
        check_header(header)

    def _check_writable(self, header: Header) -> None:
        """Raises OptionError for ``read-only``, so that with auto-read-only the image is opened for reading."""
        check_read_only(self.options.snapshot)
        if header.incompatible & CORRUPT:
            raise OptionError("read-only", False, f"on, for the image '{self._image_name}': it is marked as "
                                                  "corrupt; repair it first: blockstep img check --repair all")

    async def _repaired(self) -> Header:
        """Repair an image that is dirty. Raises OptionError for ``read-only``; OSError."""
        try:
            result = await repair_file(self.file)
            header = await self._load_header()
            if header.incompatible & DIRTY:
                raise ImageError("image", f"{result.corruptions} corruptions", "one that can be repaired")
        except ImageError as error:
            raise OptionError("read-only", False, f"on, for the image '{self._image_name}': it was not closed in "
                                                  f"order (the dirty bit), and cannot be repaired: {error}") from error
        data: dict[str, Any] = {"node-name": self.name, "corruptions-fixed": result.corruptions_fixed,
                                "leaks-fixed": result.leaks_fixed}
        if isinstance(name := getattr(self.file.node.options, "filename", None), str):
            data["filename"] = name
        self.report("BLOCK_IMAGE_REPAIRED", data)
        return header

    async def _clear_autoclear(self) -> None:
        known = self.header.autoclear & (BITMAPS | RAW_EXTERNAL)
        if self.header.autoclear != known:
            await self.file.pwrite(AT_AUTOCLEAR, known.to_bytes(8, "big"))
            await self.file.flush()
            self.header = self.header.replaced(autoclear=known)

    async def close(self) -> None:
        """As of all drivers; the metadata is written, so that an image that was closed in order has no leaks."""
        if self.read_only:
            return
        lost: OSError | None = None
        try:
            await self._store_bitmaps()
        except OSError as error:
            lost = error
        try:
            await self._settle()
            await self._refcounts.trim()
        except OSError as error:
            raise lost or error from error
        if lost is not None:
            raise lost

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        prepared = await super().prepare_reopen(options)
        if options["read-only"] and not self.read_only:
            return await self._prepare_read_only()
        if not options["read-only"] and self.read_only:
            return await self._prepare_writable()
        return prepared

    async def _prepare_read_only(self) -> Prepared:
        for bitmap in self._persistent():
            if bitmap.changing:
                raise OptionError("read-only", True, f"off while {bitmap.busy} uses bitmap '{bitmap.name}'")
        try:
            await self._store_bitmaps()
            await self._settle()
            await self._refcounts.trim()
        except BaseException:
            await self._mark_or_refuse()
            raise
        aborted = False

        def abort() -> None:
            nonlocal aborted
            aborted = True

        async def finish() -> None:
            if aborted:
                await self._mark_or_refuse()

        return Prepared(abort=abort, finish=finish)

    async def _prepare_writable(self) -> Prepared:
        # Who reads keeps no writer out: the image may be another by now.
        changed = OptionError("read-only", False, f"on: the image of '{self.name}' was changed by others, in a way "
                                                  "that only opening it anew takes account of")
        header = await self._load_header()
        self._check_readable(header)
        self._check_writable(header)
        check_data_file(header, self.file, self.data_file, self.backing)
        if header.incompatible & DIRTY or self._implied_by(header) != self._implied_by(self.header):
            raise changed
        fresh = await self._load_tables(header, guarded=True)
        unknown = header.autoclear & ~(BITMAPS | RAW_EXTERNAL)
        if header.size != self.length or unknown or await fresh[0].uses_beyond_end():
            raise changed
        try:
            found = await self._load_bitmaps(header, True)
            self._check_places(found, *fresh)
            self._guard_bitmaps(found, fresh[0])
        except ImageError as error:
            raise OptionError("read-only", False, f"on: {error}") from error
        if self._clash(found):
            raise changed

        def commit() -> None:
            self._unpacked.clear()
            self._slot = self._taken = None
            self._use(header, *fresh)
            self._take(found)

        return Prepared(commit, finish=self._mark_or_refuse)
