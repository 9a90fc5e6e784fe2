"""Images that are broken on purpose, by somebody who knows the format.

A *sound* image is one of those that qemu-img makes in a matrix of options, with data, snapshots, bitmaps and compressed
clusters in it. A case changes some of its places: fields of the header, its extensions, entries of L1, L2 and refcount
tables, refcounts, the snapshot table, the bitmap directory; or flips, moves, cuts and lengthens without regard to what
it hits. All of it follows from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from blockstep.drivers.qcow2.check import Checker
from blockstep.drivers.qcow2.format import (
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_DATA_FILE,
    OFFSET,
    Header,
    build_header,
    parse_header,
)
from tests.peers import run
from tests.unit.drivers.qcow2.images import make

_PLAIN: Final = " without bitmaps"
#: Kinds of `images.KINDS`, the ordinary ones more often.
KINDS: Final = ("default", f"default{_PLAIN}", f"default{_PLAIN}", "v2", "v2-small", "v2-small", "512", f"512{_PLAIN}",
                f"512{_PLAIN}", f"lazy{_PLAIN}", "subclusters", f"subclusters-16k{_PLAIN}", "zstd",
                f"refcount-1{_PLAIN}", "refcount-4", f"refcount-8{_PLAIN}", f"refcount-64{_PLAIN}", f"2M{_PLAIN}",
                "external", f"external{_PLAIN}", "external-raw", f"external-raw{_PLAIN}", "external-subclusters",
                f"external-subclusters{_PLAIN}")
#: Of an image ``image`` the external data file, which is beside it.
DATA_FILE: Final = "image.data"

#: (offset, bytes) of the fields of the header.
HEADER: Final = ((0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4),
                 (60, 4), (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1))
_EXTENSIONS: Final = (0, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE, 0x6803F857, 0x0537BE77, 0x12345678)

Place = tuple[int, int]  #: offset in the file, bytes


@dataclass(frozen=True)
class Sound:
    """A sound image, and where in it the meaning lies: name of a structure -> places of its fields."""

    kind: str
    data: bytes
    header: Header
    places: dict[str, list[Place]]


@cache
def sound(kind: str) -> Sound:
    """Made once in a process. Needs qemu-img and qemu-io."""
    with TemporaryDirectory() as directory:
        path = make(Path(directory) / "image", kind.removesuffix(_PLAIN))
        for name in ("b0", "b1") if kind.endswith(_PLAIN) else ():
            run("qemu-img", "bitmap", "--remove", str(path), name)
        data = _with_data_file_beside(path.read_bytes())
    checker = Checker(lambda offset, length: data[offset:offset + length], len(data), lambda text: None)
    checker.run()
    return Sound(kind, data, checker.header, _places(data, checker))


def _with_data_file_beside(data: bytes) -> bytes:
    header = parse_header(data)
    if header.data_file is None:
        return data
    start = build_header(header.with_extension(EXT_DATA_FILE, DATA_FILE.encode()))
    return start.ljust(header.cluster_size, b"\0") + data[header.cluster_size:]


def _places(data: bytes, checker: Checker) -> dict[str, list[Place]]:
    header, size = checker.header, checker.header.cluster_size

    def words(offset: int, length: int, width: int = 8) -> list[Place]:
        return [(at, width) for at in range(offset, min(offset + length, len(data) - width + 1), width)]

    def u64(at: int) -> int:
        return int.from_bytes(data[at:at + 8], "big")

    found = {"header": [place for place in HEADER if sum(place) <= header.header_length],
             "extensions": words(header.header_length & ~7, 256, 4),
             "l1": words(header.l1_table_offset, header.l1_size * 8),
             "refcount table": words(header.refcount_table_offset, 64)}
    tables = [u64(at) & OFFSET for at, _ in found["l1"]]
    found["l2"] = [place for table in tables if table for place in words(table, size)]
    used = [place for place in found["l2"] if u64(place[0])]
    if used:
        found["l2 in use"] = used
    blocks = [u64(at) for at, _ in found["refcount table"]]
    found["refcounts"] = [place for block in blocks if block for place in words(block, min(size, 1024), 2)]
    if header.snapshots_offset:
        found["snapshots"] = words(header.snapshots_offset, 200, 4)
        table = u64(header.snapshots_offset)
        found["snapshot l1"] = words(table, header.l1_size * 8)
    if (extension := header.extension(EXT_BITMAPS)) is not None:
        directory = int.from_bytes(extension[16:24], "big")
        found["bitmap directory"] = words(directory, 80, 4)
        found["bitmap table"] = words(u64(directory), 64)
    return {name: places for name, places in found.items() if places}


def mutated(rnd: random.Random) -> tuple[bytearray, str]:
    """A broken image, and what was done to it."""
    image = sound(rnd.choice(KINDS))
    data = bytearray(image.data)
    told = [image.kind]
    for _ in range(rnd.choice((1, 1, 1, 2, 2, 3, 5))):
        change = rnd.choice(_CHANGES)
        told.append(f"{change.__name__.strip('_')} {change(data, image, rnd)}")
    return data, "; ".join(told)


def _a_place(image: Sound, rnd: random.Random) -> tuple[str, int, int]:
    name = rnd.choice(tuple(image.places))
    return (name, *rnd.choice(image.places[name]))


def _set(data: bytearray, image: Sound, rnd: random.Random) -> str:
    """A field gets a value from a border, or one that another field has."""
    name, at, width = _a_place(image, rnd)
    old = int.from_bytes(data[at:at + width], "big")
    size, most = image.header.cluster_size, (1 << 8 * width) - 1
    _, other, other_width = _a_place(image, rnd)
    value = rnd.choice((
        0, 1, most, most >> 1, (most >> 1) + 1, old + 1, old - 1, old ^ 1, old + size, old - size, old << 1, old >> 1,
        len(data), len(data) & -size, -(-len(data) // size) * size, rnd.randrange(len(data)),
        rnd.randrange(len(data)) & -size, 1 << rnd.randrange(8 * width), most ^ (1 << rnd.randrange(8 * width)),
        rnd.getrandbits(8 * width), old | 1 << 63, old | 1 << 62, (old & OFFSET) | 1 << 62 | rnd.getrandbits(8) << 54,
        int.from_bytes(data[other:other + other_width], "big"))) & most
    data[at:at + width] = value.to_bytes(width, "big")[-max(0, min(width, len(data) - at)):] if at < len(data) else b""
    return f"{name} at {at}: {old:#x} is {value:#x}"


def _flip(data: bytearray, image: Sound, rnd: random.Random) -> str:
    name, at, width = _a_place(image, rnd) if rnd.random() < 0.7 else ("anything", rnd.randrange(len(data)), 1)
    at = min(at + rnd.randrange(width), len(data) - 1)
    bit = rnd.randrange(8)
    data[at] ^= 1 << bit
    return f"{name} at {at}, bit {bit}"


def _move(data: bytearray, image: Sound, rnd: random.Random) -> str:
    """A piece of one structure comes to lie in another, perhaps from another image."""
    other = sound(rnd.choice(KINDS)) if rnd.random() < 0.3 else image
    source, begin, _ = _a_place(other, rnd)
    target, at, _ = _a_place(image, rnd)
    count = rnd.choice((4, 8, 16, 64, 512, image.header.cluster_size))
    piece = other.data[begin:begin + count]
    at = min(at, len(data))
    data[at:at + len(piece)] = piece
    return f"{count} bytes of {other.kind}'s {source} at {begin} to {target} at {at}"


def _swap(data: bytearray, image: Sound, rnd: random.Random) -> str:
    size = image.header.cluster_size
    one, two = (rnd.randrange(max(1, len(data) // size)) * size for _ in range(2))
    first, second = data[one:one + size].ljust(size, b"\0"), data[two:two + size].ljust(size, b"\0")
    data[one:one + size], data[two:two + size] = second, first
    return f"clusters {one // size} and {two // size}"


def _cut(data: bytearray, image: Sound, rnd: random.Random) -> str:
    """At any place, between clusters, in a structure, in the header."""
    length = rnd.choice((rnd.randrange(len(data)), rnd.randrange(len(data)) & -image.header.cluster_size,
                         _a_place(image, rnd)[1], rnd.randrange(120)))
    del data[max(length, 1):]
    return f"to {len(data)} bytes"


def _lengthen(data: bytearray, image: Sound, rnd: random.Random) -> str:
    count = rnd.choice((1, 511, 512, image.header.cluster_size, 1 << 20))
    data.extend(rnd.choice((bytes(count), rnd.randbytes(count))))
    return f"by {count}"


def _extend_header(data: bytearray, image: Sound, rnd: random.Random) -> str:
    """An extension of any kind and length begins where the header ends."""
    at = image.header.header_length
    kind = rnd.choice(_EXTENSIONS)
    length = rnd.choice((0, 1, 8, 16, 24, 255, 1 << 16, (1 << 32) - 1))
    piece = kind.to_bytes(4, "big") + length.to_bytes(4, "big") + rnd.randbytes(min(length, rnd.choice((0, 24, 64))))
    data[at:at + len(piece)] = piece
    return f"kind {kind:#x}, {length} bytes"


def _name_backing(data: bytearray, image: Sound, rnd: random.Random) -> str:
    name = rnd.choice((b"image", b"./image", b"json:{}", b'json:{"driver":"qcow2","file":"x"}', b"nothing", b"/",
                       b"\xff", b"json:" + b"[" * 900, b"nbd://localhost:1", b"a" * 1023))
    at = rnd.choice((112, 400, image.header.header_length, image.header.cluster_size - len(name)))
    if at > 0 and rnd.random() < 0.5:  # a format beside it, so that it comes so far
        data[104:104 + 8] = data[104:112]
        piece = EXT_BACKING_FORMAT.to_bytes(4, "big") + (5).to_bytes(4, "big") + b"qcow2\0\0\0" + bytes(8)
        begin = image.header.header_length
        data[begin:begin + len(piece)] = piece
    data[max(at, 0):max(at, 0) + len(name)] = name
    data[8:20] = max(at, 0).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    return f"{name[:20]!r} at {at}"


_CHANGES: Final[tuple[Callable[[bytearray, Sound, random.Random], str], ...]] = (
    _set, _set, _set, _set, _set, _flip, _flip, _move, _move, _swap, _cut, _lengthen, _extend_header, _name_backing)
