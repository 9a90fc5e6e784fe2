"""Give an image another backing image, with the same content or whatever the new one shows.

    old chain ──► differs from the new one where the image holds nothing? ──► written into the image ──► header

What is written may be zeroes where the old chain has nothing: they are there to hide what the new one has.

Until the header names the new backing image, what was written into the image is what the old one shows anyway: whoever
interrupts it has an image that reads as before. *Unsafe* changes the header alone, for a backing image that was moved.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Final

from blockstep.aio.pool import in_thread
from blockstep.block.driver import Buffer
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.drivers.create import lies_in
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.drivers.qcow2.format import EXT_BACKING_FORMAT, RAW_EXTERNAL
from blockstep.errors import OptionError
from blockstep.images import FORMATS
from blockstep.images.amend import read_header, write_header
from blockstep.images.compare import Progress, no_progress
from blockstep.images.opened import ImageName, opened
from blockstep.images.qcow2 import full_name
from blockstep.images.whole import whole_file
from blockstep.units import MiB

_CHUNK: Final = MiB
_WINDOW: Final = 64 * MiB


async def rebase(image: ImageName, backing: str, backing_format: str | None, unsafe: bool = False,
                 progress: Progress = no_progress) -> None:
    """Make ``backing`` (relative to the image; "": none) the backing image. Durable at return.

    Raises OptionError, OSError and ImageError; then the image reads as before.
    """
    image = image.as_file()
    if not image.is_file or await image.format_known() != "qcow2":
        raise OptionError("-f", image.format, "qcow2, and the image a file: others do not name a backing image")
    if backing and backing_format not in FORMATS:
        raise OptionError("-F", backing_format, f"given, as the format of the backing image: {', '.join(FORMATS)}")
    if await in_thread(_is_raw_external, image.name) and backing:
        raise OptionError("-b", backing, "'': with a raw external data file there is no backing image")
    if not unsafe:
        await _write_differences(image, backing, backing_format, progress)
    await in_thread(_change_backing, image.name, backing, backing_format)
    progress(1, 1)


async def _write_differences(image: ImageName, backing: str, backing_format: str | None, progress: Progress) -> None:
    graph = Graph()
    async with AsyncExitStack() as stack:
        new: Backend | None = None
        if backing:
            name = ImageName(full_name(backing, image.name), backing_format, option="-F")
            new = await stack.enter_async_context(opened(name, graph=graph))
            if lies_in(graph, image.name):
                raise OptionError("-b", backing, f"an image that does not lead to '{image.name}' itself")
        top = await stack.enter_async_context(opened(image, graph=graph, writable=True))
        if isinstance(top.node, Qcow2):
            top.node.notes_all_zeroes = True
        offset = 0
        while offset < top.length:
            progress(offset, top.length)
            window = min(_WINDOW, top.length - offset)
            for extent in await top.block_status(offset, window):
                if extent.depth != 1:  # the image itself does not hold it
                    for at in range(offset, offset + extent.length, _CHUNK):
                        await _keep(top, new, at, min(_CHUNK, offset + extent.length - at), extent.zero)
                offset += extent.length


async def _keep(top: Backend, new: Backend | None, offset: int, length: int, zero: bool) -> None:
    """Write what the image shows into the image itself, in the clusters that the new backing image has otherwise."""
    if zero and await _reads_as_zeroes(new, offset, length):
        return
    old: Buffer = await top.pread(offset, length)
    there = bytes(length) if new is None else await _read(new, offset, length)
    unit = top.node.cluster_size
    if old == there:
        return
    start = 0
    while start < length:
        end = min(length, ((offset + start) // unit + 1) * unit - offset)
        piece = memoryview(old)[start:end]
        if piece != memoryview(there)[start:end]:
            if not any(piece):
                await top.write_zeroes(offset + start, end - start)
            else:
                await top.pwrite(offset + start, piece)
        start = end


async def _reads_as_zeroes(new: Backend | None, offset: int, length: int) -> bool:
    if new is None or offset >= new.length:
        return True
    extents = await new.block_status(offset, min(length, new.length - offset))
    return all(extent.zero for extent in extents)


async def _read(image: Backend, offset: int, length: int) -> bytes:
    inside = max(0, min(length, image.length - offset))
    data = bytes(await image.pread(offset, inside)) if inside else b""
    return data.ljust(length, b"\0")


def _change_backing(filename: str, backing: str, backing_format: str | None) -> None:
    kind = backing_format.encode() if backing and backing_format else None
    with whole_file(filename, writable=True) as file:
        header = read_header(file)
        write_header(file, header.with_extension(EXT_BACKING_FORMAT, kind).replaced(backing_file=backing or None))


def _is_raw_external(filename: str) -> bool:
    with whole_file(filename, writable=False) as file:
        return bool(read_header(file).autoclear & RAW_EXTERNAL)
