"""Give an image another size."""

from __future__ import annotations

import re
from typing import Final, Literal

from blockstep.block.driver import ZEROES
from blockstep.block.io import Backend
from blockstep.drivers.file import File
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.errors import OptionError
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

    ``shrink``: the user knows that what is beyond the new end is lost. ``preallocation``: of what is added;
    falloc and full make room for it, falloc without writing zeroes where that is possible.
    """
    before = image.length
    if length < before:
        if not shrink:
            raise OptionError("--shrink", False, f"given: all data beyond {length} bytes would be lost")
        if preallocation != "off":
            raise OptionError("--preallocation", preallocation, "off where the image shrinks")
    if isinstance(image.node, Qcow2) and length % SECTOR:
        raise OptionError("size", length, f"a multiple of {SECTOR} in qcow2 images: QEMU does not see the rest")
    is_file = isinstance(image.node, File)
    if preallocation == "metadata":
        raise OptionError("--preallocation", preallocation, "off, falloc or full")
    await image.truncate(length)
    if preallocation == "falloc" and is_file and length > before:
        await image.write_zeroes(before, length - before)
    elif preallocation != "off":
        for offset in range(before, length, len(ZEROES)):
            await image.pwrite(offset, ZEROES[:min(len(ZEROES), length - offset)])
