"""Change the options of a qcow2 image in its place.

What can be changed is `CHANGES`; an option with the value that it has already is no change, whichever it is. Each takes
effect with one write of the header, after all that it needs is durable::

    to 1.1: the header, with its bits ─┐
                                       ├─► width of the refcounts ─► to 0.10: the header ─► size (as `resize`)
    to 0.10: clusters of zeroes go    ─┘
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, NamedTuple

from blockstep.aio.pool import in_thread
from blockstep.aio.posix import naming
from blockstep.drivers.qcow2.create import is_data_file_name
from blockstep.drivers.qcow2.downgrade import as_version_2, expand_zeroes
from blockstep.drivers.qcow2.edit import Editor
from blockstep.drivers.qcow2.format import (
    BITMAPS,
    CORRUPT,
    DIRTY,
    EXT_DATA_FILE,
    LAZY_REFCOUNTS,
    RAW_EXTERNAL,
    V3_LENGTH,
    Header,
    build_header,
    feature_table,
    fitting,
    header_span,
    parse_header,
)
from blockstep.drivers.qcow2.header_steps import header_steps
from blockstep.drivers.qcow2.snapshots import list_snapshots
from blockstep.errors import ImageError, OptionError
from blockstep.images.create import SECTOR
from blockstep.images.opened import ImageName, opened
from blockstep.images.resize import resize
from blockstep.images.whole import WholeFile, whole_file, whole_qcow2
from blockstep.keyval import SWITCH
from blockstep.units import parse_size

#: What can be changed, and what it is, for people.
CHANGES: Final = {
    "compat": "0.10 (v2) or 1.1 (v3)",
    "data_file": "another name of the external data file, which is the same still",
    "data_file_raw": "off: the external data file need not be the disk any more",
    "lazy_refcounts": "on or off: let others postpone the update of refcounts; of version 1.1",
    "refcount_bits": "a power of two up to 64; in images of version 0.10 it is 16",
    "size": "another length of the disk; what is beyond it is lost",
}
_WIDTHS: Final = ("1", "2", "4", "8", "16", "32", "64")
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


async def amend(image: ImageName, options: Mapping[str, str]) -> None:
    """Make the changes, in the order of the module's head. Durable at return. Nobody else may have the image open.

    Raises OptionError, and then nothing was changed; OSError and ImageError, and then those before it were made.
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
    if size is not None and size % SECTOR:
        raise OptionError("size", size, f"a multiple of {SECTOR}: QEMU does not see the rest")
    await in_thread(_change, filename, options, size)
    if size is not None:
        async with opened(image, writable=True, resizable=True) as disk:
            with naming(filename):
                await resize(disk, size, shrink=True)


def _change(filename: str, options: Mapping[str, str], size: int | None) -> None:
    with whole_file(filename, writable=True) as file:
        header = read_header(file)
        if size == 0 != header.size:
            raise OptionError("-o size", size, "more than 0 bytes")
        if header.incompatible & (DIRTY | CORRUPT):
            raise ImageError("incompatible_features", "dirty or corrupt", "without them: blockstep img check --repair")
        changed, bits, older = amended(header, options)
        if changed.version > header.version and any(
                one.disk_size is None for one in list_snapshots(file.read, file.length)):
            raise OptionError("-o compat", options["compat"], "0.10: a snapshot has no disk size, as 1.1 demands")
        if older:
            expand_zeroes(file.read, file.length, file.write, file.sync)
        elif changed != header:
            write_header(file, changed)
        if bits != header.refcount_bits:
            Editor(file.read, file.length, file.write, file.sync).set_refcount_order(bits.bit_length() - 1)
        if older:
            write_header(file, as_version_2(read_header(file)))


class Amended(NamedTuple):
    """``header``: with what is changed in it alone. ``refcount_bits``: those to come. ``older``: to version 2 then."""

    header: Header
    refcount_bits: int
    older: bool


def amended(header: Header, options: Mapping[str, str]) -> Amended:
    """What is to be done, but for the size. Raises OptionError."""
    version = header.version
    if "compat" in options:
        found = _VERSIONS.get(options["compat"])
        if found is None:
            raise OptionError("-o compat", options["compat"], "0.10 (v2) or 1.1 (v3)")
        version = found
    bits = _refcount_bits(header, options, version)
    older = version < header.version
    if version > header.version:
        header = _with_names(header.replaced(version=version, header_length=V3_LENGTH))
    if "lazy_refcounts" in options:
        lazy = _switch("lazy_refcounts", options)
        if lazy and version < 3:
            raise OptionError("-o lazy_refcounts", options["lazy_refcounts"], "off in images of version 0.10")
        header = header.replaced(compatible=header.compatible & ~LAZY_REFCOUNTS | (LAZY_REFCOUNTS if lazy else 0))
    if "data_file" in options:
        name = options["data_file"]
        if header.data_file is None:
            raise OptionError("-o data_file", name, "left out: the image has no external data file")
        if not is_data_file_name(name):
            raise OptionError("-o data_file", name, "the name of a file")
        header = header.with_extension(EXT_DATA_FILE, os.fsencode(name))
    if "data_file_raw" in options:
        raw = _switch("data_file_raw", options)
        if raw and not header.autoclear & RAW_EXTERNAL:
            raise OptionError("-o data_file_raw", options["data_file_raw"], "off, of an image that exists")
        if not raw:
            header = header.replaced(autoclear=header.autoclear & ~RAW_EXTERNAL)
    return Amended(header, bits, older)


def _refcount_bits(header: Header, options: Mapping[str, str], version: int) -> int:
    text = options.get("refcount_bits", str(header.refcount_bits))
    if text not in _WIDTHS:
        raise OptionError("-o refcount_bits", text, "one of " + ", ".join(_WIDTHS))
    if version < 3 and text != "16":
        if "refcount_bits" not in options:
            raise OptionError("-o compat", options["compat"],
                              f"given with refcount_bits=16, where it is {header.refcount_bits}")
        raise OptionError("-o refcount_bits", text, "16 in images of version 0.10")
    return int(text)


def _with_names(header: Header) -> Header:
    named = header.replaced(extensions=(*header.extensions, feature_table()))
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
    """Write a header over the one that is there, in steps. Durable at return. Raises OSError and ImageError.

    Autoclear bits that nobody knows here are reset, as the format demands of who changes an image.
    """
    raw = bytes(file.read(0, read_header(file).cluster_size))
    changed = changed.replaced(autoclear=changed.autoclear & (BITMAPS | RAW_EXTERNAL))
    for offset, data in header_steps(raw, build_header(fitting(changed))):
        file.write(offset, data)
        file.sync()
