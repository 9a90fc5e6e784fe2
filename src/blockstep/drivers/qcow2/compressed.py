"""Compressed clusters: deflate without a header and a window of 4 KiB, or zstd where Python can do that.

Nothing is unpacked beyond a cluster's length, whatever the data says.
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any, Final

from blockstep.drivers.qcow2.format import COMPRESSION_NAMES, ZLIB, ZSTD
from blockstep.drivers.qcow2.refcounts import broken
from blockstep.errors import ImageError

#: Of deflate: the logarithm of the window, negative for data without a header.
_WINDOW: Final = -12
#: Of zstd: the logarithm of the largest window, which is memory.
_ZSTD_WINDOW: Final = 23


def check_compression(kind: int) -> None:
    """Raises ImageError if compressed clusters of that kind cannot be read here."""
    if kind == ZSTD and _zstd() is None:
        raise ImageError("compression_type", COMPRESSION_NAMES[kind],
                         "zlib, where Python has no zstd (3.14 has; else the package 'zstandard' brings it)")


def decompress(kind: int, data: bytes, size: int) -> bytes:
    """The cluster of ``size`` bytes that ``data`` begins with. Raises OSError (EIO) if there is none."""
    try:
        unpacked = zlib.decompressobj(_WINDOW).decompress(data, size) if kind == ZLIB else _unpack_zstd(data, size)
    except Exception as error:  # the packages have an error class of their own each
        raise broken(f"a compressed cluster cannot be unpacked: {error}") from error
    if len(unpacked) != size:
        raise broken(f"a compressed cluster has {len(unpacked)} bytes")
    return unpacked


def _zstd() -> Any:
    for name in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _unpack_zstd(data: bytes, size: int) -> bytes:
    module = _zstd()
    if module.__name__ == "zstandard":
        unpacker = module.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW)
        with unpacker.stream_reader(data, read_across_frames=False) as reader:
            return bytes(reader.read(size))
    options = {module.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
    return bytes(module.ZstdDecompressor(options=options).decompress(data, size))
