"""A new image: its parts in the order in which they lie in the file.

    header | refcount table | refcount blocks | L1 table | with preallocation: L2 tables | data clusters

The header is written last, so that a file whose making was cut short is no image. An external data file has the data
clusters; if it is raw the image has all L2 tables, so that each cluster is what the data file has there.
"""

from __future__ import annotations

import errno
import os
from array import array
from contextlib import closing
from typing import Final, Literal

from blockstep.aio.posix import OpenFile, is_block_device, length_of, naming, set_length, write_whole, zero_range
from blockstep.drivers.qcow2.format import (
    COMPRESSION_TYPE,
    COPIED,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXTENDED_L2,
    EXTERNAL_DATA,
    LAZY_REFCOUNTS,
    RAW_EXTERNAL,
    V2_LENGTH,
    ZSTD,
    Header,
    build_header,
    check_header,
    empty_block,
    encode_block,
    encode_table,
    entries_for,
    feature_table,
)
from blockstep.drivers.qcow2.tables import ALLOCATED
from blockstep.errors import ImageError, OptionError

Preallocation = Literal["off", "metadata", "falloc", "full"]
_PIECE: Final = 1 << 20


def new_header(size: int, *, version: int = 3, cluster_size: int = 65536, refcount_bits: int = 16,
               lazy_refcounts: bool = False, backing_file: str | None = None, backing_fmt: str | None = None,
               extended_l2: bool = False, data_file: str | None = None, data_file_raw: bool = False,
               compression_type: Literal["zlib", "zstd"] = "zlib") -> Header:
    """The header of a new image; its tables have no places yet. Raises OptionError that names the option."""
    if cluster_size & (cluster_size - 1) or not 512 <= cluster_size <= 2 << 20:
        raise OptionError("cluster-size", cluster_size, "a power of two from 512 to 2 MiB")
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64) or (version < 3 and refcount_bits != 16):
        raise OptionError("refcount-bits", refcount_bits, "16, or in version 3 a power of two up to 64")
    if lazy_refcounts and version < 3:
        raise OptionError("lazy-refcounts", True, "off in images of version 2")
    if (backing_file is None) != (backing_fmt is None):
        raise OptionError("backing-fmt", backing_fmt, "given if, and only if, there is a backing file")
    if compression_type != "zlib" and version < 3:
        raise OptionError("compression-type", compression_type, "zlib in images of version 2")
    _check_features(version, cluster_size, extended_l2, data_file, data_file_raw, backing_file)
    bits = cluster_size.bit_length() - 1
    incompatible = (EXTENDED_L2 if extended_l2 else 0) | (EXTERNAL_DATA if data_file else 0)
    header = Header(version, bits, size, entries_for(size, bits, bits - (4 if extended_l2 else 3)), 3 << bits,
                    1 << bits, 1, incompatible=incompatible, autoclear=RAW_EXTERNAL if data_file_raw else 0,
                    compatible=LAZY_REFCOUNTS if lazy_refcounts else 0,
                    refcount_order=refcount_bits.bit_length() - 1, backing_file=backing_file)
    if version < 3:
        header = header.replaced(header_length=V2_LENGTH)
    if compression_type == "zstd":
        header = header.replaced(incompatible=incompatible | COMPRESSION_TYPE, compression_type=ZSTD)
    if backing_fmt is not None:
        header = header.with_extension(EXT_BACKING_FORMAT, backing_fmt.encode())
    if data_file is not None:
        header = header.with_extension(EXT_DATA_FILE, os.fsencode(data_file))
    try:
        build_header(header)
    except ImageError as error:
        option = "backing-file" if error.field in ("header", "backing_file_size") else "size"
        raise OptionError(option, backing_file if option == "backing-file" else size,
                          f"{error.expected} ({error.field})") from error
    if version >= 3:
        named = header.replaced(extensions=(*header.extensions, feature_table()))
        try:
            build_header(named)
        except ImageError:  # small clusters: the names are left out
            return header
        return named
    return header


def is_data_file_name(name: str) -> bool:
    """Whether an image can call its external data file so: it is a file, and neither a node nor behind a network."""
    return bool(name) and "://" not in name and not name.startswith(("json:", "file:"))


def _check_features(version: int, cluster_size: int, extended_l2: bool, data_file: str | None, data_file_raw: bool,
                    backing_file: str | None) -> None:
    if extended_l2 and (version < 3 or cluster_size < 16384):
        raise OptionError("extended-l2", True, "off in images of version 2, or with clusters below 16 KiB")
    if data_file is not None and version < 3:
        raise OptionError("data-file", data_file, "left out in images of version 2")
    if data_file is not None and not is_data_file_name(data_file):
        raise OptionError("data-file", data_file, "the name of a file")
    if data_file_raw and data_file is None:
        raise OptionError("data-file-raw", True, "off without a data file")
    if data_file_raw and backing_file is not None:
        raise OptionError("data-file-raw", True, "off with a backing file: the data file holds all of the disk")


def write_image(fd: int, header: Header, preallocation: Preallocation) -> None:
    """Make the image in an empty file. Raises OSError. The result is not synced."""
    bits, size = header.cluster_bits, 1 << header.cluster_bits
    l1_clusters = -(-header.l1_size * 8 >> bits)
    external = bool(header.incompatible & EXTERNAL_DATA)
    if header.autoclear & RAW_EXTERNAL and preallocation == "off":
        preallocation = "metadata"
    data = -(-header.size >> bits) if preallocation != "off" else 0
    l2 = header.l1_size if preallocation != "off" else 0
    blocks, table = _refcount_clusters(header, rest := 1 + l1_clusters + l2 + (0 if external else data))
    total = rest + blocks + table
    header = header.replaced(refcount_table_offset=size, refcount_table_clusters=table,
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
        first = (index * per if external else first_l2 + l2 + index * per) << bits
        entries = array("Q", range(first | COPIED, (first | COPIED) + (count << bits), size))
        if header.extended_l2:
            words = array("Q", [ALLOCATED]) * (2 * count)
            words[::2] = entries
            entries = words
        write_whole(fd, encode_table(entries), (first_l2 + index) << bits)
    os.ftruncate(fd, total << bits)
    if external:
        pass
    elif preallocation == "falloc":
        os.posix_fallocate(fd, 0, total << bits)
    elif preallocation == "full":
        end = total << bits
        for offset in range((first_l2 + l2) << bits, end, _PIECE):
            write_whole(fd, bytes(min(_PIECE, end - offset)), offset)
    write_whole(fd, build_header(header), 0)


def whole_length(header: Header) -> int:
    """The bytes of the file of such an image when all of the disk is allocated."""
    bits = header.cluster_bits
    rest = 1 + -(-header.l1_size * 8 >> bits) + header.l1_size + -(-header.size >> bits)
    return rest + sum(_refcount_clusters(header, rest)) << bits


def _refcount_clusters(header: Header, rest: int) -> tuple[int, int]:
    """The refcount blocks that ``rest`` clusters need, and the clusters of their table."""
    blocks = table = 1
    while True:  # until table and blocks cover themselves as well
        wanted = -(-(rest + blocks + table) >> header.block_bits)
        if (blocks, table) == (wanted, -(-wanted * 8 >> header.cluster_bits)):
            return blocks, table
        blocks, table = wanted, -(-wanted * 8 >> header.cluster_bits)


def write_data_file(path: str, size: int, preallocation: Preallocation, raw: bool) -> None:
    """Make the external data file of a new image: all of it reads as zeroes. Raises OSError that names it.

    A block device has to be long enough; if it is not to be ``raw`` it stays as it is.
    """
    with naming(path), closing(OpenFile(path, writable=True, create=True)) as file:
        fd = file.fd
        if is_block_device(fd):
            if length_of(fd) < size:
                raise OSError(errno.ENOSPC, f"a device of {length_of(fd)} bytes, for a disk of {size}", path)
            if not raw or zero_range(fd, 0, size):
                return
            preallocation = "full"
        else:
            set_length(fd, 0, path)
            set_length(fd, size, path)
        if preallocation == "falloc" and size:
            os.posix_fallocate(fd, 0, size)
        elif preallocation == "full":
            for offset in range(0, size, _PIECE):
                write_whole(fd, bytes(min(_PIECE, size - offset)), offset)
        os.fsync(fd)
