"""Give an image another size."""

from __future__ import annotations

import re
from typing import Final, Literal

from blockstep.block.driver import ZEROES
from blockstep.block.io import Backend
from blockstep.drivers.file import File
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.drivers.qcow2.format import RAW_EXTERNAL
from blockstep.errors import OptionError, noting
from blockstep.images.create import SECTOR
from blockstep.units import parse_size

Preallocation = Literal["off", "metadata", "falloc", "full"]

_RELATIVE: Final = re.compile(r"([+-]?)(.*)")


def wanted_size(text: str, length: int) -> int:
    """``SIZE``, ``+SIZE`` or ``-SIZE`` for an image of ``length`` bytes. Raises OptionError."""
    match = _RELATIVE.fullmatch(text)
    assert match
    size = parse_size(match[2], "size") * (-1 if match[1] == "-" else 1)
    wanted = length + size if match[1] else size
    if wanted <= 0:
        raise OptionError("size", text, f"more than 0 bytes in the end; the image has {length}")
    return wanted


async def resize(image: Backend, length: int, shrink: bool = False, preallocation: Preallocation = "off") -> None:
    """Give it ``length`` bytes. What is added reads as zeroes. Raises OptionError and OSError.

    ``shrink``: the user knows that what is beyond the new end is lost. ``preallocation``: of what is added; falloc and
    full make room for it, falloc without writing zeroes where that is possible, and metadata gives it places without
    room, in qcow2 images. If that fails the image has its old length again.
    """
    before = image.length
    if length < before and not shrink:
        raise OptionError("--shrink", False, f"given: all data beyond {length} bytes would be lost")
    if length <= before and preallocation != "off":
        raise OptionError("--preallocation", preallocation, "off where the image does not grow")
    if isinstance(image.node, Qcow2) and length % SECTOR:
        raise OptionError("size", length, f"a multiple of {SECTOR} in qcow2 images: QEMU does not see the rest")
    if preallocation == "metadata" and not isinstance(image.node, Qcow2):
        raise OptionError("--preallocation", preallocation, "off, falloc or full: only qcow2 images have it")
    await image.truncate(length)
    try:
        await _preallocate(image, before, preallocation)
    except BaseException as error:
        with noting(error):
            await image.truncate(before)
        raise


async def _preallocate(image: Backend, start: int, preallocation: Preallocation) -> None:
    """Of what was added from ``start`` on."""
    node, end = image.node, image.length
    raw = isinstance(node, File) or (isinstance(node, Qcow2) and bool(node.header.autoclear & RAW_EXTERNAL))
    if preallocation == "falloc" and raw:
        await image.write_zeroes(start, end - start)
    elif preallocation in ("metadata", "falloc") and isinstance(node, Qcow2) and not raw:
        edge = min(-(-start // node.cluster_size) * node.cluster_size, end)
        if start < edge:
            await image.pwrite(start, bytes(edge - start))
        await node.preallocate(edge, holes=preallocation == "metadata")
        await image.flush()
    elif preallocation in ("falloc", "full"):
        for offset in range(start, end, len(ZEROES)):
            await image.pwrite(offset, ZEROES[:min(len(ZEROES), end - offset)])
