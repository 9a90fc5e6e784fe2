"""A new image: its parts in the order in which they lie in the file.

    header | refcount table | refcount blocks | L1 table | with preallocation: L2 tables | data clusters

The header is written last, so that a file whose making was cut short is no image.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import replace
from typing import Final, Literal

from blockstep.aio.posix import write_whole
from blockstep.drivers.qcow2.format import (
    COPIED,
    EXT_BACKING_FORMAT,
    LAZY_REFCOUNTS,
    V2_LENGTH,
    Header,
    build_header,
    check_header,
    empty_block,
    encode_block,
    encode_table,
    entries_for,
    feature_table,
)
from blockstep.errors import ImageError, OptionError

Preallocation = Literal["off", "metadata", "falloc", "full"]
_PIECE: Final = 1 << 20


def new_header(size: int, *, version: int = 3, cluster_size: int = 65536, refcount_bits: int = 16,
               lazy_refcounts: bool = False, backing_file: str | None = None, backing_fmt: str | None = None) -> Header:
    """The header of a new image; its tables have no places yet. Raises OptionError that names the option."""
    if cluster_size & (cluster_size - 1) or not 512 <= cluster_size <= 2 << 20:
        raise OptionError("cluster-size", cluster_size, "a power of two from 512 to 2 MiB")
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64) or (version < 3 and refcount_bits != 16):
        raise OptionError("refcount-bits", refcount_bits, "16, or in version 3 a power of two up to 64")
    if lazy_refcounts and version < 3:
        raise OptionError("lazy-refcounts", True, "off in images of version 2")
    if (backing_file is None) != (backing_fmt is None):
        raise OptionError("backing-fmt", backing_fmt, "given if, and only if, there is a backing file")
    bits = cluster_size.bit_length() - 1
    header = Header(version, bits, size, entries_for(size, bits, bits - 3), 3 << bits, 1 << bits, 1,
                    compatible=LAZY_REFCOUNTS if lazy_refcounts else 0,
                    refcount_order=refcount_bits.bit_length() - 1, backing_file=backing_file)
    if version < 3:
        header = replace(header, header_length=V2_LENGTH)
    if backing_fmt is not None:
        header = header.with_extension(EXT_BACKING_FORMAT, backing_fmt.encode())
    try:
        build_header(header)
    except ImageError as error:
        option = "backing-file" if error.field in ("header", "backing_file_size") else "size"
        raise OptionError(option, backing_file if option == "backing-file" else size,
                          f"{error.expected} ({error.field})") from error
    if version >= 3:
        named = replace(header, extensions=(*header.extensions, feature_table()))
        try:
            build_header(named)
        except ImageError:  # small clusters: the names are left out
            return header
        return named
    return header


def write_image(fd: int, header: Header, preallocation: Preallocation) -> None:
    """Make the image in an empty file. Raises OSError. The result is not synced."""
    bits, size = header.cluster_bits, 1 << header.cluster_bits
    l1_clusters = -(-header.l1_size * 8 >> bits)
    data = -(-header.size >> bits) if preallocation != "off" else 0
    l2 = header.l1_size if preallocation != "off" else 0
    rest = 1 + l1_clusters + l2 + data
    blocks = table = 1
    while True:  # until table and blocks cover themselves as well
        total = rest + blocks + table
        wanted = -(-total >> header.block_bits)
        if (blocks, table) == (wanted, -(-wanted * 8 >> bits)):
            break
        blocks, table = wanted, -(-wanted * 8 >> bits)
    header = replace(header, refcount_table_offset=size, refcount_table_clusters=table,
                     l1_table_offset=(1 + table + blocks) << bits)
    check_header(header)
    write_whole(fd, encode_table(array("Q", ((1 + table + index) << bits for index in range(blocks)))), size)
    for index in range(blocks):
        block = empty_block(header)
        used = min(len(block), total - (index << header.block_bits))
        block[:used] = array(block.typecode, [1]) * used
        write_whole(fd, encode_block(header, block), (1 + table + index) << bits)
    first_l2 = 1 + table + blocks + l1_clusters
    if l2:
        write_whole(fd, encode_table(array("Q", ((first_l2 + index) << bits | COPIED for index in range(l2)))),
                    header.l1_table_offset)
    per = 1 << header.l2_bits
    for index in range(l2):
        count = min(per, data - index * per)
        first = (first_l2 + l2 + index * per) << bits
        entries = array("Q", range(first | COPIED, (first | COPIED) + (count << bits), size))
        write_whole(fd, encode_table(entries), (first_l2 + index) << bits)
    os.ftruncate(fd, total << bits)
    if preallocation == "falloc":
        os.posix_fallocate(fd, 0, total << bits)
    elif preallocation == "full":
        end = total << bits
        for offset in range((first_l2 + l2) << bits, end, _PIECE):
            write_whole(fd, bytes(min(_PIECE, end - offset)), offset)
    write_whole(fd, build_header(header), 0)
