"""Clusters packed and unpacked; what pretends to be packed costs no more than a cluster."""

from __future__ import annotations

import random
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blockstep.drivers.qcow2.compressed import compress, decompress
from blockstep.drivers.qcow2.format import ZLIB, ZSTD
from blockstep.units import KiB, MiB

SIZE = 64 * KiB
KINDS = pytest.mark.parametrize("kind", [ZLIB, ZSTD], ids=["zlib", "zstd"])


def zlib_bomb(length: int) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return b"".join([packer.compress(bytes(length)), packer.flush()])


@KINDS
@given(words=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5), tail=st.binary(max_size=600))
def test_what_is_packed_unpacks(kind: int, words: list[bytes], tail: bytes) -> None:
    data = (b"".join(words) * SIZE)[:SIZE]
    packed = compress(kind, data)
    assert packed is not None
    assert len(packed) < SIZE
    assert decompress(kind, packed + tail, SIZE) == data


@KINDS
def test_what_does_not_become_shorter_is_not_packed(kind: int) -> None:
    assert compress(kind, random.Random(0).randbytes(SIZE)) is None


@KINDS
@given(data=st.binary(max_size=2000))
def test_anything_else_is_an_error(kind: int, data: bytes) -> None:
    try:
        assert len(decompress(kind, data, 512)) == 512
    except ValueError:
        pass


@KINDS
def test_a_cluster_that_ends_early_is_an_error(kind: int) -> None:
    packed = compress(kind, bytes(SIZE))
    assert packed is not None
    for data in (packed, packed[:len(packed) // 2], b""):
        with pytest.raises(ValueError):
            decompress(kind, data, SIZE + 1)


@KINDS
def test_a_bomb_is_unpacked_up_to_a_cluster(kind: int) -> None:
    bomb = zlib_bomb(256 * MiB) if kind == ZLIB else zstandard.ZstdCompressor().compress(bytes(256 * MiB))
    tracemalloc.start()
    try:
        assert decompress(kind, bomb, SIZE) == bytes(SIZE)
        assert tracemalloc.get_traced_memory()[1] < MiB
    finally:
        tracemalloc.stop()


def test_a_window_that_would_take_the_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    bomb = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = bomb.compress(bytes(MiB)) + bomb.flush()
    with pytest.raises(ValueError, match="memory"):
        decompress(ZSTD, data, SIZE)
