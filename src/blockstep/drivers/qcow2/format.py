"""What the bytes of a qcow2 image mean: headers, table entries, snapshots, bitmaps. Nothing here does I/O.

    cluster 0: header, extensions, backing file name
    header ──► refcount table ──► refcount blocks: how many use each cluster
           ──► L1 table ──► L2 tables ──► data clusters
           ──► snapshot table ──► an L1 table each
           ──► (extension) bitmap directory ──► bitmap tables ──► bitmap data

All numbers are big-endian, all offsets are bytes in the file. Whoever parses checks each field before it is used, and
raises `ImageError` with the name that the format's public document has for the field. The limits that bound memory
are QEMU's (its images are what is read here): L1 tables 32 MiB, refcount table 8 MiB, 65536 snapshots, 1 KiB of extra
data in a snapshot, 65535 bitmaps, a backing file name of 1023 bytes.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Mapping
from functools import cache

from blockstep.errors import ImageError
from blockstep.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

MAGIC: Final = b"QFI\xfb"
CLUSTER_BITS: Final = (9, 21)
V2_LENGTH: Final = 72
V3_LENGTH: Final = 104

# Incompatible features.
DIRTY: Final = 1
CORRUPT: Final = 2
EXTERNAL_DATA: Final = 4
COMPRESSION_TYPE: Final = 8
EXTENDED_L2: Final = 16
KNOWN_INCOMPATIBLE: Final = 31
# Compatible features.
LAZY_REFCOUNTS: Final = 1
# Autoclear features.
BITMAPS: Final = 1
RAW_EXTERNAL: Final = 2

#: Header fields at their place in the file, for those who change a few of them.
AT_INCOMPATIBLE: Final = 72
AT_AUTOCLEAR: Final = 88
AT_SIZE: Final = 24
AT_L1: Final = 36  #: l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters: `TABLES`
TABLES: Final = struct.Struct(">IQQI")
SIZE: Final = struct.Struct(">QI")  #: what lies `AT_SIZE`: size, crypt_method

# Header extensions.
EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_ENCRYPTION: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441

# Entries of L1 and L2 tables.
COPIED: Final = 1 << 63  #: the refcount is 1: may be written in place
COMPRESSED: Final = 1 << 62
ZERO: Final = 1  #: standard L2 entries of version 3
OFFSET: Final = (1 << 56) - 512  #: bits 9 to 55
L1_RESERVED: Final = ((1 << 63) - 1) & ~OFFSET
L2_RESERVED: Final = ((1 << 62) - 1) & ~OFFSET & ~ZERO
#: Host offsets must be below.
MOST_OFFSET: Final = 1 << 56

ZLIB: Final = 0
ZSTD: Final = 1
COMPRESSION_NAMES: Final = {ZLIB: "zlib", ZSTD: "zstd"}

MOST_L1: Final = 32 << 20  #: bytes
MOST_REFCOUNT_TABLE: Final = 8 << 20  #: bytes
MOST_SNAPSHOTS: Final = 65536
MOST_SNAPSHOT_TABLE: Final = 64 << 20  #: bytes
MOST_EXTRA: Final = 1024  #: bytes of extra data of a snapshot
MOST_NAME: Final = 1023  #: bytes of a backing file name
MOST_BITMAPS: Final = 65535
MOST_BITMAP_DIRECTORY: Final = 64 << 20  #: bytes

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_BITMAP: Final = struct.Struct(">QIIBBHI")
_BITMAP_EXTENSION: Final = struct.Struct(">IIQQ")

#: (kind: 0 incompatible, 1 compatible, 2 autoclear; bit; name): what a new image says about its features.
FEATURE_NAMES: Final = ((0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 2, "external data file"),
                        (0, 3, "compression type"), (0, 4, "extended L2 entries"), (1, 0, "lazy refcounts"),
                        (2, 0, "bitmaps"), (2, 1, "raw external data"))


class Extension(Record):
    """A header extension as it is; those nobody here knows are kept."""

    kind: int
    data: bytes


class Header(Record):
    """The header of an image, checked. `parse_header` and `build_header` are its two directions."""

    version: int
    cluster_bits: int
    size: int  #: of the disk, bytes
    l1_size: int  #: entries
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int = 0
    snapshots_offset: int = 0
    crypt_method: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = V3_LENGTH
    compression_type: int = ZLIB
    backing_file: str | None = None
    extensions: tuple[Extension, ...] = ()
    more: bytes = b""  #: fields after compression_type that are not known here, as they are

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def l2_bits(self) -> int:
        """An L2 table has 2 ** this entries."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def block_bits(self) -> int:
        """A refcount block has 2 ** this entries."""
        return self.cluster_bits + 3 - self.refcount_order

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def most_refcount(self) -> int:
        """The largest refcount that an entry can hold."""
        return (1 << self.refcount_bits) - 1

    @property
    def l1_needed(self) -> int:
        """The entries that an L1 table must have for the disk's size."""
        return entries_for(self.size, self.cluster_bits, self.l2_bits)

    @property
    def backing_format(self) -> str | None:
        data = self.extension(EXT_BACKING_FORMAT)
        return None if data is None else _text(data, "backing file format")

    @property
    def data_file(self) -> str | None:
        data = self.extension(EXT_DATA_FILE)
        return None if data is None else _text(data, "external data file name")

    def extension(self, kind: int) -> bytes | None:
        """The data of the extension of that kind."""
        return next((each.data for each in self.extensions if each.kind == kind), None)

    def with_extension(self, kind: int, data: bytes | None) -> Header:
        """The same header with that extension in the place of the one of its kind, or behind all (None: without)."""
        if data is None:
            return self.replaced(extensions=tuple(each for each in self.extensions if each.kind != kind))
        new = Extension(kind, data)
        if self.extension(kind) is None:
            return self.replaced(extensions=(*self.extensions, new))
        return self.replaced(extensions=tuple(new if each.kind == kind else each for each in self.extensions))


def entries_for(size: int, cluster_bits: int, l2_bits: int) -> int:
    """How many L1 entries (L2 tables) a disk of ``size`` bytes needs."""
    return -(-size >> (cluster_bits + l2_bits)) if size >= 0 else 0


def is_qcow2(start: bytes) -> bool:
    """Whether a file that begins with these bytes says that it is a qcow2 image of version 2 or 3."""
    return len(start) >= 8 and start[:4] == MAGIC and int.from_bytes(start[4:8], "big") in (2, 3)


def header_span(start: bytes) -> int:
    """The bytes that `parse_header` wants to see, the first cluster, from the first 24 bytes or more of the file."""
    if not is_qcow2(start):
        raise ImageError("magic", start[:8].hex(), "that of a qcow2 image of version 2 or 3")
    bits = int.from_bytes(start[20:24], "big")
    if len(start) < 24 or not CLUSTER_BITS[0] <= bits <= CLUSTER_BITS[1]:
        raise ImageError("cluster_bits", bits, "from 9 to 21")
    return int(1 << bits)


def parse_header(data: bytes) -> Header:
    """The header at the begin of ``data``: the first cluster, or all of a file that is shorter.

    Raises ImageError that names the field. Dirty, corrupt and encrypted images parse: what may be done with them is for
    the caller to say; incompatible features that nobody knows are refused here, by their names if the image has them.
    """
    span = header_span(data)
    if len(data) < V2_LENGTH:
        raise ImageError("header", len(data), "72 bytes or more")
    data = bytes(data[:span])
    (_, version, backing_offset, backing_size, bits, size, crypt, l1_size, l1_offset, table_offset, table_clusters,
     snapshots, snapshots_offset) = _V2.unpack_from(data)
    incompatible = compatible = autoclear = 0
    order, length, compression, more = 4, V2_LENGTH, ZLIB, b""
    if version == 3:
        if len(data) < V3_LENGTH:
            raise ImageError("header", len(data), "104 bytes or more in version 3")
        incompatible, compatible, autoclear, order, length = _V3.unpack_from(data, V2_LENGTH)
        if length < V3_LENGTH or length % 8 or length > len(data):
            raise ImageError("header_length", length, "a multiple of 8 from 104 up to the cluster size")
        if length > V3_LENGTH:
            compression, more = data[V3_LENGTH], data[V3_LENGTH + 1:length]
    extensions = _parse_extensions(data, length, backing_offset or len(data))
    unknown = incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        raise ImageError("incompatible_features", _feature_names(unknown, extensions), "features that are known here")
    if order > 6:
        raise ImageError("refcount_order", order, "from 0 to 6")
    if bool(incompatible & COMPRESSION_TYPE) != bool(compression) or compression not in COMPRESSION_NAMES:
        raise ImageError("compression_type", compression, "0 (zlib), or 1 (zstd) together with its feature bit")
    if crypt > 2:
        raise ImageError("crypt_method", crypt, "0, 1 or 2")
    if incompatible & EXTENDED_L2 and bits < 14:
        raise ImageError("cluster_bits", bits, "14 or more with extended L2 entries")
    if autoclear & RAW_EXTERNAL and not incompatible & EXTERNAL_DATA:
        raise ImageError("autoclear_features", autoclear, "without the raw bit where there is no external data file")
    header = Header(version, bits, size, l1_size, l1_offset, table_offset, table_clusters, snapshots,
                    snapshots_offset if snapshots else 0, crypt, incompatible, compatible, autoclear, order, length,
                    compression, _backing_name(data, backing_offset, backing_size), extensions, more)
    check_header(header)
    return header


def check_header(header: Header) -> None:
    """The limits of sizes and places of the tables. Raises ImageError that names the field."""
    mask = header.cluster_size - 1
    for name, offset in (("l1_table_offset", header.l1_table_offset if header.l1_size else 0),
                         ("refcount_table_offset", header.refcount_table_offset),
                         ("snapshots_offset", header.snapshots_offset)):
        if offset & mask or offset >= MOST_OFFSET:
            raise ImageError(name, offset, f"a multiple of the cluster size, {mask + 1}, below 2 ** 56")
    if header.size >= 1 << 63:
        raise ImageError("size", header.size, "below 2 ** 63")
    if header.l1_size * 8 > MOST_L1 or header.l1_size < header.l1_needed:
        raise ImageError("l1_size", header.l1_size, f"from {header.l1_needed}, for the disk's size, to {MOST_L1 // 8}")
    if header.l1_size and not header.l1_table_offset:
        raise ImageError("l1_table_offset", 0, "behind the header")
    if not header.refcount_table_offset:
        raise ImageError("refcount_table_offset", 0, "behind the header")
    if not 0 < header.refcount_table_clusters <= max(1, MOST_REFCOUNT_TABLE >> header.cluster_bits):
        raise ImageError("refcount_table_clusters", header.refcount_table_clusters,
                         f"from 1 to {max(1, MOST_REFCOUNT_TABLE >> header.cluster_bits)}")
    if header.snapshot_count > MOST_SNAPSHOTS:
        raise ImageError("nb_snapshots", header.snapshot_count, f"at most {MOST_SNAPSHOTS}")
    if header.snapshot_count and not header.snapshots_offset:
        raise ImageError("snapshots_offset", 0, "behind the header")


def build_header(header: Header) -> bytes:
    """The begin of the file, up to the end of the backing file's name.

    Raises ImageError if it does not fit into the first cluster; nothing else may lie there, so the caller may write
    it over what is there and zero the rest of the cluster.
    """
    check_header(header)
    parts = [b""]
    length = V2_LENGTH
    if header.version == 3:
        length = max(header.header_length, 112 if header.compression_type or header.more else V3_LENGTH)
        parts = [_V3.pack(header.incompatible, header.compatible, header.autoclear, header.refcount_order, length)]
        if length > V3_LENGTH:
            parts.append(bytes([header.compression_type]) + header.more.ljust(length - V3_LENGTH - 1, b"\0"))
    for each in header.extensions:
        parts.append(_EXTENSION.pack(each.kind, len(each.data)) + each.data + bytes(-len(each.data) % 8))
    parts.append(_EXTENSION.pack(EXT_END, 0))
    rest = b"".join(parts)
    name = b"" if header.backing_file is None else header.backing_file.encode("utf-8", "surrogateescape")
    if len(name) > MOST_NAME:
        raise ImageError("backing_file_size", len(name), f"at most {MOST_NAME}")
    name_offset = V2_LENGTH + len(rest) if name else 0
    if V2_LENGTH + len(rest) + len(name) > header.cluster_size:
        raise ImageError("header", V2_LENGTH + len(rest) + len(name), f"bytes that fit in {header.cluster_size}")
    return _V2.pack(MAGIC, header.version, name_offset, len(name), header.cluster_bits, header.size,
                    header.crypt_method, header.l1_size, header.l1_table_offset, header.refcount_table_offset,
                    header.refcount_table_clusters, header.snapshot_count, header.snapshots_offset) + rest + name


def fitting(header: Header) -> Header:
    """The header; where it is too long for its cluster, without the names of features, which are for people."""
    try:
        build_header(header)
    except ImageError:
        return header.with_extension(EXT_FEATURE_NAMES, None)
    return header


def feature_table() -> Extension:
    """The extension that names the features, for programs that do not know them."""
    return Extension(EXT_FEATURE_NAMES, b"".join(bytes((kind, bit)) + name.encode().ljust(46, b"\0")
                                                 for kind, bit, name in FEATURE_NAMES))


def _parse_extensions(data: bytes, at: int, end: int) -> tuple[Extension, ...]:
    found: list[Extension] = []
    end = min(end, len(data))
    while at + 8 <= end:
        kind, length = _EXTENSION.unpack_from(data, at)
        if kind == EXT_END:
            break
        if length > end - at - 8:
            raise ImageError(f"header extension {kind:#010x}", length, "an extension that ends before the cluster does")
        if any(each.kind == kind for each in found) and kind in (EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE):
            raise ImageError(f"header extension {kind:#010x}", "twice", "there at most once")
        found.append(Extension(kind, data[at + 8:at + 8 + length]))
        at += 8 + length + (-length % 8)
    return tuple(found)


def _feature_names(bits: int, extensions: tuple[Extension, ...]) -> str:
    table = next((each.data for each in extensions if each.kind == EXT_FEATURE_NAMES), b"")
    names: Mapping[int, str] = {table[at + 1]: table[at + 2:at + 48].rstrip(b"\0").decode("utf-8", "replace")
                                for at in range(0, len(table) - 47, 48) if table[at] == 0}
    return ", ".join(names.get(bit) or f"bit {bit}" for bit in range(64) if bits >> bit & 1)


def _backing_name(data: bytes, offset: int, size: int) -> str | None:
    if not offset:
        return None
    if size > MOST_NAME or offset > len(data) or size > len(data) - offset:
        raise ImageError("backing_file_size", size, f"at most {MOST_NAME} bytes, inside of the first cluster")
    return _text(data[offset:offset + size], "backing file name") if size else None


def _text(data: bytes, what: str) -> str:
    if b"\0" in data:
        raise ImageError(what, data, "without bytes of value 0")
    return data.decode("utf-8", "surrogateescape")


# --- tables ---


def decode_table(data: bytes | bytearray | memoryview) -> array[int]:
    """A table of 8-byte entries (L1, L2, refcount table, bitmap table)."""
    table = array("Q", bytes(data))
    if sys.byteorder == "little":
        table.byteswap()
    return table


def encode_table(table: array[int]) -> bytes:
    """The bytes of a table."""
    if sys.byteorder == "little":
        table = table[:]
        table.byteswap()
    return table.tobytes()


_BLOCK_CODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}


def empty_block(header: Header) -> array[int]:
    """A refcount block of zeroes."""
    code = _BLOCK_CODES.get(header.refcount_order, "B")
    return array(code, bytes(array(code).itemsize << header.block_bits))


def decode_block(header: Header, data: bytes | bytearray | memoryview) -> array[int]:
    """A refcount block: one item for each cluster, also where several share a byte (lowest bits first)."""
    order = header.refcount_order
    if order < 3:
        spread = _spread(order)
        return array("B", b"".join([spread[byte] for byte in bytes(data)]))
    block = array(_BLOCK_CODES[order], bytes(data))
    if sys.byteorder == "little":
        block.byteswap()
    return block


def encode_block(header: Header, block: array[int]) -> bytes:
    """The bytes of a refcount block (or of an aligned part of one)."""
    order = header.refcount_order
    if order < 3:
        bits, per = 1 << order, 8 >> order
        whole = bytes(block)
        return bytes(sum(value << (index * bits) for index, value in enumerate(whole[at:at + per]))
                     for at in range(0, len(whole), per))
    if sys.byteorder == "little":
        block = block[:]
        block.byteswap()
    return block.tobytes()


@cache
def _spread(order: int) -> list[bytes]:
    """Of each byte: the refcounts that share it."""
    return [bytes(byte >> (index << order) & ((1 << (1 << order)) - 1) for index in range(8 >> order))
            for byte in range(256)]


def compressed_place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Of a compressed L2 entry: where its data begins, and the bytes from there to the end of its last sector."""
    split = 62 - (cluster_bits - 8)
    offset = entry & ((1 << split) - 1)
    sectors = (entry >> split & ((1 << (62 - split)) - 1)) + 1
    return offset, sectors * 512 - (offset & 511)


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int | None:
    """The L2 entry of compressed data of ``length`` bytes; None: the place is beyond what such an entry can say."""
    split = 62 - (cluster_bits - 8)
    if offset + length > 1 << min(split, 56):
        return None
    return COMPRESSED | (offset + length - 1 >> 9) - (offset >> 9) << split | offset


class Subclusters:
    """The bitmap of an extended L2 entry: bit x of each is subcluster x, 32 in a cluster."""

    __slots__ = ("allocated", "zero")

    def __init__(self, allocated: int, zero: int) -> None:
        self.allocated, self.zero = allocated, zero

    @classmethod
    def parse(cls, bitmap: int) -> Subclusters:
        return cls(bitmap & 0xFFFFFFFF, bitmap >> 32)

    @property
    def valid(self) -> bool:
        """No subcluster is both allocated and zero."""
        return not self.allocated & self.zero

    def build(self) -> int:
        return self.zero << 32 | self.allocated


# --- snapshots ---


class Snapshot(Record):
    """An internal snapshot: an entry of the snapshot table."""

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    seconds: int  #: when it was made, of the Unix epoch
    nanoseconds: int
    vm_clock: int  #: ns
    vm_state_size: int  #: bytes
    disk_size: int | None = None  #: bytes; None: not told, then the image's
    icount: int | None = None
    more: bytes = b""  #: extra data that is not known here, as it is


def parse_snapshots(header: Header, data: bytes) -> tuple[list[Snapshot], int]:
    """The snapshot table at the begin of ``data``, and its length in bytes.

    Raises ImageError if it does not end inside of ``data``, or a field is beyond its limit.
    """
    found: list[Snapshot] = []
    at = 0
    for _ in range(header.snapshot_count):
        if len(data) - at < _SNAPSHOT.size:
            raise ImageError("snapshot table", len(data), "as long as its entries say")
        l1, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = _SNAPSHOT.unpack_from(data, at)
        end = at + _SNAPSHOT.size + extra_size + id_size + name_size
        if extra_size > MOST_EXTRA:
            raise ImageError("snapshot extra_data_size", extra_size, f"at most {MOST_EXTRA}")
        if end > len(data):
            raise ImageError("snapshot table", len(data), "as long as its entries say")
        if l1 & (header.cluster_size - 1) or l1 >= MOST_OFFSET or (l1_size and not l1):
            raise ImageError("snapshot l1_table_offset", l1, "a multiple of the cluster size behind the header")
        if l1_size * 8 > MOST_L1:
            raise ImageError("snapshot l1_size", l1_size, f"at most {MOST_L1 // 8}")
        extra = data[at + _SNAPSHOT.size:at + _SNAPSHOT.size + extra_size]
        values = [int.from_bytes(extra[i:i + 8], "big") for i in range(0, min(24, extra_size) // 8 * 8, 8)]
        texts = data[end - id_size - name_size:end]
        disk_size = values[1] if len(values) > 1 else None
        if disk_size is not None and entries_for(disk_size, header.cluster_bits, header.l2_bits) > l1_size:
            raise ImageError("snapshot virtual disk size", disk_size, f"one that an L1 table of {l1_size} entries has")
        found.append(Snapshot(
            l1, l1_size, texts[:id_size].decode("utf-8", "surrogateescape"),
            texts[id_size:].decode("utf-8", "surrogateescape"), sec, nsec, clock, values[0] if values else state,
            disk_size, values[2] if len(values) > 2 else None, bytes(extra[24:])))
        at = end + (-end % 8)
        if at > MOST_SNAPSHOT_TABLE:
            raise ImageError("snapshot table", at, f"at most {MOST_SNAPSHOT_TABLE} bytes")
    return found, min(at, len(data))


def build_snapshots(snapshots: list[Snapshot]) -> bytes:
    """The bytes of a snapshot table."""
    table = bytearray()
    for each in snapshots:
        extra = each.vm_state_size.to_bytes(8, "big")
        if each.disk_size is not None:
            extra += each.disk_size.to_bytes(8, "big")
            if each.icount is not None:
                extra += each.icount.to_bytes(8, "big") + each.more
        id, name = (text.encode("utf-8", "surrogateescape") for text in (each.id, each.name))
        table += _SNAPSHOT.pack(each.l1_table_offset, each.l1_size, len(id), len(name), each.seconds, each.nanoseconds,
                                each.vm_clock, min(each.vm_state_size, (1 << 32) - 1), len(extra))
        table += extra + id + name
        table += bytes(-len(table) % 8)
    return bytes(table)


# --- bitmaps ---


class BitmapsExtension(Record):
    """Where the bitmap directory is."""

    bitmaps: int  #: how many there are
    directory_size: int  #: bytes
    directory_offset: int


def parse_bitmaps_extension(header: Header) -> BitmapsExtension | None:
    """The bitmaps extension, None if there is none. Raises ImageError."""
    data = header.extension(EXT_BITMAPS)
    if data is None:
        return None
    if len(data) != _BITMAP_EXTENSION.size:
        raise ImageError("bitmaps extension", len(data), f"{_BITMAP_EXTENSION.size} bytes")
    count, reserved, size, offset = _BITMAP_EXTENSION.unpack(data)
    if not 0 < count <= MOST_BITMAPS or reserved:
        raise ImageError("nb_bitmaps", count, f"from 1 to {MOST_BITMAPS}")
    if not _BITMAP.size * count <= size <= MOST_BITMAP_DIRECTORY:
        raise ImageError("bitmap_directory_size", size, f"at most {MOST_BITMAP_DIRECTORY}, 24 or more for each bitmap")
    if not offset or offset & (header.cluster_size - 1) or offset >= MOST_OFFSET:
        raise ImageError("bitmap_directory_offset", offset, "a multiple of the cluster size behind the header")
    return BitmapsExtension(count, size, offset)


def build_bitmaps_extension(extension: BitmapsExtension) -> bytes:
    """The data of the extension."""
    return _BITMAP_EXTENSION.pack(extension.bitmaps, 0, extension.directory_size, extension.directory_offset)


IN_USE: Final = 1
AUTO: Final = 2
EXTRA_COMPATIBLE: Final = 4


class BitmapEntry(Record):
    """An entry of the bitmap directory."""

    table_offset: int
    table_size: int  #: entries
    flags: int  #: IN_USE, AUTO, EXTRA_COMPATIBLE
    granularity_bits: int
    name: str
    kind: int = 1
    extra: bytes = b""


def parse_bitmaps(header: Header, extension: BitmapsExtension, data: bytes) -> list[BitmapEntry]:
    """The bitmap directory. Raises ImageError that names the field."""
    found: list[BitmapEntry] = []
    at = 0
    for _ in range(extension.bitmaps):
        if len(data) - at < _BITMAP.size:
            raise ImageError("bitmap directory", len(data), "as long as its entries say")
        offset, size, flags, kind, bits, name_size, extra_size = _BITMAP.unpack_from(data, at)
        end = at + _BITMAP.size + extra_size + name_size
        if end > len(data):
            raise ImageError("bitmap directory", len(data), "as long as its entries say")
        if offset & (header.cluster_size - 1) or offset >= MOST_OFFSET or (size and not offset):
            raise ImageError("bitmap_table_offset", offset, "a multiple of the cluster size behind the header")
        if size * 8 > MOST_L1:
            raise ImageError("bitmap_table_size", size, f"at most {MOST_L1 // 8}")
        if flags & ~(IN_USE | AUTO | EXTRA_COMPATIBLE):
            raise ImageError("bitmap flags", flags, "without reserved bits")
        if kind != 1:
            raise ImageError("bitmap type", kind, "1: a dirty tracking bitmap")
        if not 9 <= bits <= 31:
            raise ImageError("granularity_bits", bits, "from 9 to 31")
        if not 0 < name_size <= MOST_NAME:
            raise ImageError("bitmap name_size", name_size, f"from 1 to {MOST_NAME}")
        name = data[end - name_size:end].decode("utf-8", "surrogateescape")
        found.append(BitmapEntry(offset, size, flags, bits, name, kind,
                                 bytes(data[at + _BITMAP.size:end - name_size])))
        at = end + (-end % 8)
    if at != extension.directory_size:
        raise ImageError("bitmap_directory_size", extension.directory_size, f"{at}, for these bitmaps")
    return found


def build_bitmaps(entries: list[BitmapEntry]) -> bytes:
    """The bytes of a bitmap directory."""
    directory = bytearray()
    for each in entries:
        name = each.name.encode("utf-8", "surrogateescape")
        directory += _BITMAP.pack(each.table_offset, each.table_size, each.flags, each.kind, each.granularity_bits,
                                  len(name), len(each.extra)) + each.extra + name
        directory += bytes(-len(directory) % 8)
    return bytes(directory)
