"""Change the options of a qcow2 image that lie in its header, in its place.

What can be changed is `CHANGES`; the size is changed as by `resize`. An option with the value that it has already is no
change, whichever it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from blockstep.aio.pool import in_thread
from blockstep.block.driver import Driver
from blockstep.drivers.qcow2.format import (
    CORRUPT,
    DIRTY,
    LAZY_REFCOUNTS,
    RAW_EXTERNAL,
    V3_LENGTH,
    Header,
    build_header,
    feature_table,
    header_span,
    parse_header,
)
from blockstep.drivers.qcow2.snapshots import list_snapshots
from blockstep.errors import ImageError, OptionError
from blockstep.images.opened import ImageName, opened
from blockstep.images.resize import resize
from blockstep.images.whole import WholeFile, whole_file, whole_qcow2
from blockstep.keyval import SWITCH
from blockstep.units import parse_size

#: What can be changed, and what it is, for people.
CHANGES: Final = {
    "compat": "1.1 (v3), of an image of version 0.10 (v2)",
    "data_file_raw": "off: the external data file need not be the disk any more",
    "lazy_refcounts": "on or off: let others postpone the update of refcounts; of version 1.1",
    "refcount_bits": "what it is",
    "size": "a greater length of the disk",
}
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


async def amend(image: ImageName, options: Mapping[str, str]) -> None:
    """Make the changes, in the order of `CHANGES`. Durable at return. Nobody else may have the image open.

    Raises OptionError, OSError and ImageError; nothing was changed then, except what comes before a size that failed.
    """
    filename = await whole_qcow2(image)
    if not options:
        raise OptionError("-o", None, "given: what shall be changed")
    for word in options:
        if word in ("backing_file", "backing_fmt"):
            raise OptionError("-o", word, "left to 'rebase'")
        if word not in CHANGES:
            raise OptionError("-o", word, "one of " + ", ".join(CHANGES))
    size = parse_size(options["size"], "-o size") if "size" in options else None
    await in_thread(_change, filename, options)
    if size is not None:
        async with opened(image, writable=True) as disk:
            _check_size(disk.node, size)
            await resize(disk, size)


def _check_size(node: Driver, size: int) -> None:
    if size < node.length:
        raise OptionError("-o size", size, f"{node.length} or more: to make a disk smaller there is 'resize --shrink'")


def _change(filename: str, options: Mapping[str, str]) -> None:
    with whole_file(filename, writable=True) as file:
        header = read_header(file)
        if header.incompatible & (DIRTY | CORRUPT):
            raise ImageError("incompatible_features", "dirty or corrupt", "without them: blockstep img check --repair")
        changed = amended(header, options)
        if changed.version > header.version and any(
                one.disk_size is None for one in list_snapshots(file.read, file.length)):
            raise OptionError("-o compat", options["compat"], "0.10: a snapshot has no disk size, as 1.1 demands")
        if changed != header:
            write_header(file, changed)


def amended(header: Header, options: Mapping[str, str]) -> Header:
    """The header with the changes, but for the size. Raises OptionError."""
    if "compat" in options:
        version = _VERSIONS.get(options["compat"])
        if version is None or version < header.version:
            raise OptionError("-o compat", options["compat"], "1.1 (v3), or what it is: the other way is not possible")
        if version > header.version:
            header = _with_names(replace(header, version=version, header_length=V3_LENGTH))
    if options.get("refcount_bits", str(header.refcount_bits)) != str(header.refcount_bits):
        raise OptionError("-o refcount_bits", options["refcount_bits"], f"{header.refcount_bits}, as it is")
    if "lazy_refcounts" in options:
        lazy = _switch("lazy_refcounts", options)
        if lazy and header.version < 3:
            raise OptionError("-o lazy_refcounts", options["lazy_refcounts"], "off in images of version 0.10")
        header = replace(header, compatible=header.compatible & ~LAZY_REFCOUNTS | (LAZY_REFCOUNTS if lazy else 0))
    if "data_file_raw" in options:
        raw = _switch("data_file_raw", options)
        if raw and not header.autoclear & RAW_EXTERNAL:
            raise OptionError("-o data_file_raw", options["data_file_raw"], "off, of an image that exists")
        if not raw:
            header = replace(header, autoclear=header.autoclear & ~RAW_EXTERNAL)
    return header


def _with_names(header: Header) -> Header:
    named = replace(header, extensions=(*header.extensions, feature_table()))
    try:
        build_header(named)
    except ImageError:  # small clusters: the names are left out
        return header
    return named


def _switch(word: str, options: Mapping[str, str]) -> bool:
    if options[word] not in SWITCH:
        raise OptionError(f"-o {word}", options[word], "on or off")
    return SWITCH[options[word]]


def read_header(file: WholeFile) -> Header:
    """The header of the image in a file. Raises ImageError and OSError."""
    span = header_span(bytes(file.read(0, min(24, file.length))))
    return parse_header(bytes(file.read(0, min(span, file.length))))


def write_header(file: WholeFile, changed: Header) -> None:
    """Write a header over the one that is there. Durable at return. Raises OSError and ImageError."""
    header = read_header(file)
    data = build_header(changed)
    # All that the old header and its name may have left behind it.
    span = max(len(data), len(build_header(header)))
    file.write(0, data.ljust(min(span, header.cluster_size), b"\0"))
    file.sync()
