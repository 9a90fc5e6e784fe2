"""Copy images, one behind the other, into a new image or an existing one.

    source 0 ─┐
    source 1 ─┼─ joined ── BlockCopy ──► target: where a new one reads as zeroes anyway nothing is written
    ...      ─┘

A new target comes under its name when all of it is there and durable (`blockstep.images.files`). A target that
exists (``create=False``) is written in place: who interrupts that leaves a mixture.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import msgspec

from blockstep.aio.pool import in_thread
from blockstep.block.bitmap import Bitmap
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.status import backing_of
from blockstep.drivers.create import lies_in
from blockstep.errors import OptionError
from blockstep.images.bitmap import add_bitmaps, usable_bitmaps
from blockstep.images.compare import Progress, no_progress
from blockstep.images.copying import ImageCopy, Salvage
from blockstep.images.create import COMPAT, Creation
from blockstep.images.files import made_anew
from blockstep.images.joined import joined
from blockstep.images.opened import ImageName, opened
from blockstep.images.snapshot import snapshot_id
from blockstep.images.whole import whole_qcow2
from blockstep.jobs.block_copy import Control, Pass
from blockstep.jobs.pace import SpeedLimit
from blockstep.units import KiB, MiB

#: Most and least of ``sparse`` that qemu-img takes.
SPARSE: Final = (512, 16 << 20)
SPARSE_DEFAULT: Final = 4 * KiB
_GRANULARITY: Final = 64 * KiB
#: Of what lies in a file as it is as much as this goes through a thread at once, if the image is long enough to keep
#: several busy.
_THREAD_CHUNK: Final = 16 * MiB
_PIECES: Final = 16


class Conversion(msgspec.Struct, frozen=True):
    """What to do. ``sparse``: so many bytes of zeroes become a hole; 0: none does, the target is fully allocated.

    ``zeroed``: the target that exists reads as zeroes. ``offload``: let the kernel copy from file to file, where
    zeroes are not looked for. ``rate``: bytes a second; 0: no limit. ``bitmaps``: copy the persistent ones as well;
    ``skip_bitmap`` is told of those that are inconsistent; None: that is an error.
    ``compressed``: pack what is written. ``backing``, ``backing_format``: the image that shows through in the target,
    with the content of the source's own; only what the source itself holds is written. ``salvage``: is told of what
    cannot be read, and zeroes are there then; None: that is an error. ``snapshot``: of the source, an internal one
    instead of the disk: its id or its name, or ``snapshot.id=...`` and ``snapshot.name=...``.
    """

    sources: Sequence[ImageName]
    target: ImageName
    create: bool = True
    options: Mapping[str, str] = msgspec.field(default_factory=dict)
    zeroed: bool = False
    sparse: int = SPARSE_DEFAULT
    offload: bool = False
    workers: int = 8
    rate: int = 0
    bitmaps: bool = False
    skip_bitmap: Callable[[str], None] | None = None
    compressed: bool = False
    backing: str | None = None
    backing_format: str | None = None
    salvage: Salvage | None = None
    snapshot: str | None = None

    @property
    def backed(self) -> bool:
        """Whether the target has a backing image."""
        return self.backing is not None or "backing_file" in self.options

    def check(self) -> None:
        """Raises OptionError for what makes no sense together."""
        if self.sparse and (self.sparse % 512 or not SPARSE[0] <= self.sparse <= SPARSE[1]):
            raise OptionError("-S", self.sparse, "0, or a multiple of 512 up to 16777216")
        if self.offload and self.sparse != SPARSE_DEFAULT:
            raise OptionError("-S", self.sparse, "left out with -C: the kernel copies without looking for zeroes")
        if self.bitmaps and (len(self.sources) != 1 or self.target.format != "qcow2"):
            raise OptionError("--bitmaps", True, "left out, except from one qcow2 image to another")
        if self.bitmaps and self.create and COMPAT.get(self.options.get("compat", "1.1")) == "v2":
            raise OptionError("--bitmaps", True, "left out: images of version 0.10 have none")
        if self.skip_bitmap is not None and not self.bitmaps:
            raise OptionError("--skip-broken-bitmaps", True, "given with --bitmaps")
        if self.zeroed and self.create:
            raise OptionError("--target-is-zero", True, "given with -n: a new image is zero anyway")
        if not 1 <= self.workers <= 16:
            raise OptionError("-m", self.workers, "from 1 to 16")
        if self.backed and len(self.sources) != 1:
            raise OptionError("-B", self.backing, "left out with several images: which one should it be the base of?")
        if self.backed and self.zeroed:
            raise OptionError("--target-is-zero", True, "left out where the target has a backing image")
        if self.snapshot is not None and len(self.sources) != 1:
            raise OptionError("-l", self.snapshot, "left out with several images: of which one should it be?")
        if self.salvage is not None and self.offload:
            raise OptionError("--salvage", True, "left out with -C: the kernel stops where nothing can be read")
        if self.compressed:
            self._check_compressed()
        if self.options and not self.create:
            raise OptionError("-o", dict(self.options), "left out with -n: no image is made")

    def _check_compressed(self) -> None:
        if self.target.format not in ("qcow2", None):
            raise OptionError("-c", True, f"left out: {self.target.format} images cannot be compressed")
        data_file = next((value for word, value in self.options.items() if word.replace("-", "_") == "data_file"), None)
        if data_file is not None:
            raise OptionError("-o data_file", data_file, "left out with -c: there, data lies as it is")
        if self.offload:
            raise OptionError("-C", True, "left out with -c: the kernel does not compress")
        if self.options.get("preallocation", "off") != "off":
            raise OptionError("-o preallocation", self.options["preallocation"], "off with -c")


async def convert(conversion: Conversion, progress: Progress = no_progress) -> None:
    """Do it. Raises OptionError and OSError; a new target is not there then, and neither after a cancellation."""
    conversion.check()
    bitmaps = await in_thread(usable_bitmaps, await whole_qcow2(conversion.sources[0]),
                              conversion.skip_bitmap) if conversion.bitmaps else []
    graph = Graph()
    async with AsyncExitStack() as stack:
        shown: dict[str, Any] = {}
        if conversion.snapshot is not None:
            shown["snapshot"] = await snapshot_id(conversion.sources[0], conversion.snapshot)
        source = joined([await stack.enter_async_context(opened(source, graph=graph, **shown))
                         for source in conversion.sources])
        total = source.length
        target = conversion.target
        if target.is_file and lies_in(graph, target.name):
            raise OptionError("TARGET", target.name, "another file than those that are read")
        if conversion.create:
            target = await stack.enter_async_context(_made(conversion, total, graph))
        written = Graph()
        async with opened(target, graph=written, writable=True) as into:
            for node in written.everything():
                place = getattr(node.options, "filename", None)
                if not node.read_only and isinstance(place, str) and lies_in(graph, place):
                    raise OptionError("TARGET", conversion.target.name, "another file than those that are read")
            if into.length < total:
                raise OptionError("target", conversion.target.name, f"of at least {total} bytes, and not {into.length}")
            if total:
                await _copy(conversion, source, into, _Progress(progress, total, conversion.rate))
        if bitmaps:
            await in_thread(add_bitmaps, await whole_qcow2(target), bitmaps)
        progress(total, total)


@asynccontextmanager
async def _made(conversion: Conversion, size: int, sources: Graph) -> AsyncIterator[ImageName]:
    target = conversion.target
    if not target.is_file or target.format is None:
        raise OptionError("-n", False, f"given: '{target.name}' cannot be made here, only written to")
    if os.path.exists(target.name) and not os.path.isfile(target.name):
        raise OptionError("-n", False, f"given: '{target.name}' is no regular file, and is written in its place")
    wanted = await Creation(target.format, target.name, size, conversion.options, conversion.backing,
                            conversion.backing_format, option="-O").checked()
    wanted.check_unused(sources, "that are read")
    async with made_anew(target.name, durable=target.cache != "unsafe", beside=wanted.files_beside()) as path:
        await in_thread(wanted.create, path)
        yield msgspec.structs.replace(target, name=path)


class _Progress(Control):
    """Counts for all sources together, and keeps to the rate."""

    def __init__(self, progress: Progress, total: int, rate: int = 0) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._limit = SpeedLimit(rate)
        progress(0, total)

    async def throttle(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        delay = self._limit.wait(loop.time())
        self._limit.charge(loop.time(), count)  # the next one waits for this one, too
        await asyncio.sleep(delay)

    def copied(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


async def _copy(conversion: Conversion, source: Backend, into: Backend, control: Control) -> None:
    length = source.length
    granularity = max(_GRANULARITY, into.node.cluster_size) if conversion.compressed else _GRANULARITY
    todo = Bitmap(length, granularity)
    todo.set(0, length)
    piece = _piece(conversion, into)
    backed = conversion.backed
    zero = (conversion.create or conversion.zeroed) and conversion.sparse and not backed
    written = Bitmap(length, 1 << (piece.bit_length() - 1)) if zero else None
    in_threads = not conversion.rate and not conversion.compressed
    chunk = max(MiB, min(_THREAD_CHUNK, length // _PIECES // MiB * MiB)) if in_threads else MiB
    engine = ImageCopy(source.edge, into.edge, (source, into), control, granularity=granularity,
                       workers=conversion.workers, detect_zeroes=bool(conversion.sparse), written=written,
                       offload=conversion.offload, piece=piece or granularity, chunk=chunk, in_threads=in_threads,
                       base=backing_of(source.node) if backed else None, allocated_only=backed,
                       full=not conversion.sparse, compressed=conversion.compressed, salvage=conversion.salvage)
    await engine.copy(Pass(todo))


def _piece(conversion: Conversion, into: Backend) -> int:
    """Zeroes within a cluster save nothing in formats that have clusters."""
    if conversion.target.format == "raw" or not conversion.sparse:
        return conversion.sparse
    if conversion.compressed:
        return into.node.cluster_size
    return max(conversion.sparse, into.node.cluster_size)
