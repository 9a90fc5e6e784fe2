"""A header changes in steps; a power cut in any of them leaves one that is right."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.drivers.qcow2.create import new_header
from blockstep.drivers.qcow2.format import (
    BITMAPS,
    COMPRESSION_TYPE,
    EXT_BITMAPS,
    ZSTD,
    BitmapsExtension,
    Extension,
    Header,
    build_bitmaps_extension,
    build_header,
    parse_header,
)
from blockstep.drivers.qcow2.header_steps import bitmap_steps, header_steps
from blockstep.errors import ImageError


def extension(number: int) -> bytes:
    return build_bitmaps_extension(BitmapsExtension(number, number * 100, number << 20))


def torn(raw: bytes, offset: int, data: bytes, rnd: random.Random) -> bytes:
    """A write of which any sectors are there."""
    image = bytearray(raw)
    for sector in range(offset // 512, (offset + len(data) - 1) // 512 + 1):
        if rnd.random() < 0.5:
            begin, end = max(offset, sector * 512), min(offset + len(data), (sector + 1) * 512)
            image[begin:end] = data[begin - offset:end - offset]
    return bytes(image)


def said(raw: bytes) -> tuple[str | None, list[Extension], bytes | None]:
    """The backing file's name, the other extensions, and the bitmaps extension if it is valid."""
    header = parse_header(raw)
    return (header.backing_file, [each for each in header.extensions if each.kind != EXT_BITMAPS],
            header.extension(EXT_BITMAPS) if header.autoclear & BITMAPS else None)


@given(name=st.none() | st.integers(1, 1023), more=st.lists(st.integers(0, 400), max_size=3), features=st.booleans(),
       changes=st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=6), bits=st.sampled_from((12, 16)),
       seed=st.integers(0, 1 << 32))
def test_a_power_cut_at_any_step_leaves_all_else_as_it_was(
    name: int | None, more: list[int], features: bool, changes: list[int | None], bits: int, seed: int
) -> None:
    rnd = random.Random(seed)
    header = new_header(1 << 30, cluster_size=1 << bits, backing_file=None if name is None else "n" * name,
                        backing_fmt=None if name is None else "raw")
    kept = header.extensions if features else header.extensions[:1]
    kept += tuple(Extension(0x1000 + number, rnd.randbytes(size)) for number, size in enumerate(more))
    raw = build_header(header.replaced(extensions=kept)).ljust(1 << bits, b"\0")
    for change in changes:
        old = parse_header(raw)
        wanted = None if change is None else extension(change)
        before, after = said(raw), (*said(raw)[:2], wanted)
        for offset, data in bitmap_steps(raw, old, wanted):
            for _ in range(4):
                found = said(torn(raw, offset, data, rnd))
                assert found[:2] == before[:2]
                assert found[2] in (None, before[2], wanted)
            raw = raw[:offset] + data + raw[offset + len(data):]
        assert said(raw) == after


def _header(rnd: random.Random, bits: int) -> bytes:
    """Some header in its cluster."""
    name = rnd.choice((None, "n" * rnd.randrange(1, 20), rnd.choice("xyz") * rnd.randrange(1, 1000)))
    header = new_header(rnd.randrange(1 << 40), cluster_size=1 << bits, version=rnd.choice((2, 3, 3)),
                        backing_file=name, backing_fmt=None if name is None else rnd.choice(("raw", "a long one")))
    if header.version == 3 and rnd.random() < 0.3:
        header = header.replaced(incompatible=COMPRESSION_TYPE, compression_type=ZSTD)
    kept = [*header.extensions, *(Extension(0x1000 + number, rnd.randbytes(rnd.randrange(300)))
                                  for number in rnd.sample(range(9), rnd.randrange(3)))]
    rnd.shuffle(kept)
    return build_header(header.replaced(extensions=tuple(kept[:rnd.randrange(len(kept) + 1)])))


def _meant(raw: bytes) -> Header:
    """What a header says, wherever its extensions begin."""
    return parse_header(raw).replaced(header_length=0, more=b"")


@given(bits=st.sampled_from((12, 16)), seed=st.integers(0, 1 << 32))
def test_a_power_cut_at_any_step_leaves_the_old_header_or_the_new_one(bits: int, seed: int) -> None:
    rnd = random.Random(seed)
    raw, cluster = _header(rnd, bits).ljust(1 << bits, b"\0"), 1 << bits
    for _ in range(3):
        new = _header(rnd, bits)
        steps = header_steps(raw, new)
        old = raw
        for number, (offset, data) in enumerate(steps):
            if offset // 512 != (offset + len(data) - 1) // 512 and offset == 0:
                assert 2 in (parse_header(old).version, parse_header(new.ljust(cluster, b"\0")).version) or bits == 12
            else:
                for _ in range(4):
                    found = torn(raw, offset, data, rnd)
                    assert _meant(found) in (_meant(old), _meant(new.ljust(cluster, b"\0"))), number
                    if rnd.random() < 0.2:  # and another change begins there
                        again = found
                        for place, piece in header_steps(again, new):
                            again = again[:place] + piece + again[place + len(piece):]
                        assert _meant(again) == _meant(new.ljust(cluster, b"\0"))
            raw = raw[:offset] + data + raw[offset + len(data):]
        assert raw[:len(new)] == new
        assert not any(raw[len(new):])


def test_an_extension_that_is_there_changes_by_one_write_to_one_sector() -> None:
    raw = build_header(_with(extension(1))).ljust(65536, b"\0")
    [(offset, data)] = bitmap_steps(raw, parse_header(raw), extension(2))
    assert data == extension(2)
    assert offset // 512 == (offset + 23) // 512


def test_where_there_is_room_only_for_another_order_the_header_is_written_as_a_whole() -> None:
    header = new_header(1 << 20, cluster_size=512, backing_file="n" * 300, backing_fmt="raw")
    raw = build_header(header).ljust(512, b"\0")
    steps = bitmap_steps(raw, header, extension(3))
    assert [offset for offset, _ in steps] == [0, 88]
    for offset, data in steps:
        raw = raw[:offset] + data + raw[offset + len(data):]
    assert said(raw) == ("n" * 300, list(header.extensions), extension(3))
    header = new_header(1 << 20, cluster_size=512, backing_file="n" * 360, backing_fmt="raw")
    with pytest.raises(ImageError, match="fit in 512"):
        bitmap_steps(build_header(header).ljust(512, b"\0"), header, extension(3))


def _with(data: bytes) -> Header:
    header = new_header(1 << 30)
    return header.replaced(autoclear=BITMAPS, extensions=(Extension(EXT_BITMAPS, data), *header.extensions))
