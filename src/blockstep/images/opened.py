"""What the user calls an image, as a node of a graph and a user of it.

    name                         is
    PATH                         a regular file or a block device
    nbd://..., nbd+unix://...    an export
    json:{...}, --image-opts     the options of a node, as the drivers' pages have them; then there is no format
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from blockstep.aio.pool import in_thread
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import NONE, READ, RESIZE, WRITE
from blockstep.errors import OptionError, noting
from blockstep.images import AUTO, FORMATS, CacheMode, is_address, is_options
from blockstep.inventory.event_lines import tell_changes
from blockstep.keyval import parse

#: Beginnings of files -> format.
_MAGIC: Final = {b"QFI\xfb": "qcow2", b"BLKSTPOV": "overlay"}


class ImageName(msgspec.Struct, frozen=True):
    """What the user said of one image. ``option`` is how its format is given, for errors."""

    name: str
    format: str | None = None
    image_opts: bool = False
    cache: CacheMode = "writeback"
    option: str = "-f"

    @property
    def is_options(self) -> bool:
        """Whether ``name`` is the options of a node."""
        return self.image_opts or is_options(self.name)

    def as_file(self) -> ImageName:
        """The same image as a format in a file, where the options of a node say no more than that.

        Raises OptionError for what are no options.
        """
        if not self.is_options:
            return self
        options = self._parsed()
        file = options.get("file")
        if not isinstance(file, dict) or options.keys() != {"driver", "file"} or file.keys() != {"driver", "filename"}:
            return self
        if file["driver"] != "file" or options["driver"] not in FORMATS:
            return self
        return msgspec.structs.replace(self, name=file["filename"], format=options["driver"], image_opts=False)

    def _parsed(self) -> dict[str, Any]:
        """Of a name that is the options of a node: these. Raises OptionError."""
        return _with_drivers(parse(self.name, "--image-opts"))

    @property
    def is_file(self) -> bool:
        """Whether ``name`` is a path."""
        return not self.is_options and not is_address(self.name)

    async def format_known(self) -> str:
        """The format: the one that was given, or with ``auto`` the one that the content looks like.

        Raises OptionError if none was given, or one that does not exist; OSError if the file cannot be read.
        """
        if self.format == AUTO:
            return await in_thread(probe, self.name) if self.is_file else "raw"
        if self.format not in FORMATS:
            known = f"one of {', '.join(FORMATS)}, or {AUTO}: what '{self.name}' looks like"
            raise OptionError(self.option, self.format, known if self.format else f"given: {known}")
        return self.format

    async def node_options(self, writable: bool = False) -> dict[str, Any]:
        """The options of its node."""
        options: dict[str, Any]
        if self.is_options:
            if self.image_opts and self.format not in (None, AUTO):
                raise OptionError(self.option, self.format, "left out with --image-opts: the options say what it is")
            options = self._parsed()
            if not options:
                raise OptionError("--image-opts", self.name, "the options of a node: driver=...")
        else:
            kind = await self.format_known()
            place = ({"driver": "file", "filename": self.name} if self.is_file else
                     {"driver": "nbd", "uri": self.name})
            options = {**place} if kind == "raw" else {"driver": kind, "file": place}
        cache = {"direct": self.cache in ("none", "directsync"), "no-flush": self.cache == "unsafe"}
        if any(cache.values()):
            options.setdefault("cache", {name: value for name, value in cache.items() if value})
        options.setdefault("read-only", not writable)
        if writable:
            options.setdefault("discard", "unmap")
        return options


def _with_drivers(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a node, and of those below it where a file name says what it is: driver ``file``."""
    found = {name: _with_drivers(value) if isinstance(value, dict) else value for name, value in options.items()}
    for child in found.values():
        if isinstance(child, dict) and "filename" in child:
            child.setdefault("driver", "file")
    return found


def probe(filename: str) -> str:
    """The format that a file looks like. What looks like none is raw. Raises OSError."""
    with open(filename, "rb", buffering=0) as file:
        begin = file.read(max(map(len, _MAGIC)))
    return next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), "raw")


@asynccontextmanager
async def opened(image: ImageName, *, writable: bool = False, resizable: bool = False, graph: Graph | None = None,
                 **more: Any) -> AsyncIterator[Backend]:
    """The image, open inside the section, in ``graph`` or one of its own. ``more``: further options of its node.

    After a section that wrote and went well, everything is durable (unless the cache mode is unsafe). Raises
    OptionError and OSError, as the driver does, naming the file.
    """
    from blockstep import drivers  # noqa: F401  makes them known

    graph = graph if graph is not None else Graph()
    if tell_changes not in graph.listeners:
        graph.listeners.append(tell_changes)
    options = await image.node_options(writable)
    node = await graph.open({**options, **more}, strict=not image.is_options)
    try:
        taken = READ | (WRITE if writable else NONE) | (RESIZE if resizable else NONE)
        backend = graph.attach_backend(node, "img", taken)
        try:
            yield backend
            if writable:
                await backend.flush()
        finally:
            await graph.detach_backend(backend)
    except BaseException as error:
        with noting(error):
            await _close(graph, node)
        raise
    await _close(graph, node)


async def _close(graph: Graph, node: Driver) -> None:
    if graph.nodes.get(node.name) is node:
        await graph.close(node)
