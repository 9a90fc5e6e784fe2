"""Compressed clusters: deflate without a header and a window of 4 KiB, or zstd.

Nothing is unpacked beyond a cluster's length, whatever the data says. The packages give the interpreter's lock free
while they work, so that threads pack on several cores.
"""

from __future__ import annotations

import zlib
from typing import Final

from blockstep.block.driver import Buffer
from blockstep.drivers.qcow2.format import ZLIB

#: Of deflate: the logarithm of the window, negative for data without a header.
_WINDOW: Final = -12
#: Of zstd: the largest window that is unpacked, which is memory.
_ZSTD_WINDOW: Final = 8 << 20


def compress(kind: int, data: Buffer) -> bytes | None:
    """A cluster packed; None if that is no shorter."""
    if kind == ZLIB:
        packer = zlib.compressobj(wbits=_WINDOW)
        packed = packer.compress(data) + packer.flush()
    else:
        import zstandard  # where it is needed: few images are packed with it

        packed = zstandard.ZstdCompressor().compress(data)
    return packed if len(packed) < len(data) else None


def decompress(kind: int, data: bytes, size: int) -> bytes:
    """The cluster of ``size`` bytes that ``data`` begins with. Raises ValueError if there is none."""
    try:
        unpacked = zlib.decompressobj(_WINDOW).decompress(data, size) if kind == ZLIB else _unpack_zstd(data, size)
    except zlib.error as error:
        raise ValueError(error) from error
    if len(unpacked) != size:
        raise ValueError(f"it has {len(unpacked)} bytes")
    return unpacked


def _unpack_zstd(data: bytes, size: int) -> bytes:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    try:
        with unpacker.stream_reader(data, read_across_frames=False) as reader:
            return reader.read(size)
    except zstandard.ZstdError as error:
        raise ValueError(error) from error
