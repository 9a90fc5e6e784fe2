"""``dd``: a part of an image, counted in blocks, into a new one.

As with qemu-img ``count`` is counted from the begin of the image, also where ``skip`` leaves some of it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import msgspec

from blockstep.block.graph import Graph
from blockstep.drivers.create import lies_in
from blockstep.errors import OptionError
from blockstep.images.convert import Conversion, convert
from blockstep.images.create import Creation, create
from blockstep.images.opened import ImageName, opened
from blockstep.units import parse_size

_LARGEST = (1 << 31) - 1


class Operands(msgspec.Struct, frozen=True):
    """``source``, ``target``: names. ``block``: bytes. ``count``, ``skip``: blocks; None: all."""

    source: str
    target: str
    block: int = 512
    count: int | None = None
    skip: int = 0


def operands(words: Iterable[str]) -> Operands:
    """``if=``, ``of=``, ``bs=``, ``count=`` and ``skip=``. Raises OptionError."""
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("if", "of", "bs", "count", "skip") or not value:
            raise OptionError("", word, "if=FILE, of=FILE, bs=SIZE, count=N or skip=N")
        given[name] = value
    for name in ("if", "of"):
        if name not in given:
            raise OptionError(name, None, "given")
    block = parse_size(given.get("bs", "512"), "bs")
    if not 0 < block <= _LARGEST:
        raise OptionError("bs", given["bs"], f"from 1 to {_LARGEST}")
    return Operands(given["if"], given["of"], block, parse_size(given["count"], "count") if "count" in given else None,
                    parse_size(given.get("skip", "0"), "skip"))


async def dd(source: ImageName, target: ImageName, wanted: Operands) -> bool:
    """Make ``target``. False: all of the image is skipped, and the target is empty. Raises OptionError and OSError."""
    graph = Graph()
    async with opened(source, graph=graph) as image:
        length = image.length
        if target.is_file and lies_in(graph, target.name):
            raise OptionError("of", target.name, "another file than the one that is read")
    end = length if wanted.count is None else min(length, wanted.count * wanted.block)
    start = wanted.skip * wanted.block
    if start >= end:
        await create(await Creation(target.format or "raw", target.name, 0, option="-O").checked())
        return start <= end
    part = {"driver": "raw", "offset": start, "size": end - start, "file": await source.node_options()}
    await convert(Conversion((ImageName(json.dumps(part), cache=source.cache),), target))
    return True
