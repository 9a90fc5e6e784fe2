"""The forms in which a server replies; pure.

What was negotiated picks the form once, for the whole connection:

    SIMPLE       nothing: 16 bytes, then the data of a read
    STRUCTURED   STRUCTURED_REPLY: chunks for reads, block status and errors; other successes stay simple replies,
                 which the protocol allows and which are shorter
    EXTENDED     EXTENDED_HEADERS: chunks for everything, with the request's offset and 64-bit lengths

A read is always answered with data, in one chunk: to send a hole as one it would have to be known before the read that
it is one, and asking costs each read more than the rare hole saves. Clients that copy ask for block status first.

Every function takes the request's cookie and offset first. Those that announce data return only the header: the
data goes to the socket as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from struct import Struct
from typing import Final

import msgspec

from blockstep.nbd import constants as c
from blockstep.nbd.wire import CHUNK, EXTENDED_CHUNK, SIMPLE_REPLY

_DATA: Final = Struct(">IHHQIQ")  # CHUNK, then the offset of the data
_EXTENDED_DATA: Final = Struct(">IHHQQQQ")  # EXTENDED_CHUNK, then the offset of the data
_ERROR: Final = Struct(">IH")

#: (length, flags) of consecutive runs of bytes.
Extents = Iterable[tuple[int, int]]


class Form(msgspec.Struct, frozen=True):
    """One of the three forms of replies."""

    #: ``done(cookie, offset)``: success, no more to say.
    done: Callable[[int, int], bytes]
    #: ``nothing(cookie, offset)``: a successful read of no bytes. Structured replies to reads are never simple ones.
    nothing: Callable[[int, int], bytes]
    #: ``read(cookie, offset, length)``: header of a whole successful read; ``length`` bytes follow.
    read: Callable[[int, int, int], bytes]
    #: ``error(cookie, offset, error, message)``: failure of any request, with one of the protocol's errors.
    error: Callable[[int, int, int, str], bytes]
    #: ``chunk(cookie, offset, type, payload, last)``: any other chunk; not for simple replies.
    chunk: Callable[[int, int, int, bytes, bool], bytes]
    #: Whether there are chunks at all.
    chunks: bool = True


_simple = SIMPLE_REPLY.pack
_chunk = CHUNK.pack
_extended = EXTENDED_CHUNK.pack
_data = _DATA.pack
_extended_data = _EXTENDED_DATA.pack


def _simple_done(cookie: int, offset: int) -> bytes:
    return _simple(0x67446698, 0, cookie)


def _simple_read(cookie: int, offset: int, length: int) -> bytes:
    return _simple(0x67446698, 0, cookie)


def _simple_error(cookie: int, offset: int, error: int, message: str) -> bytes:
    return _simple(0x67446698, error, cookie)


def _simple_chunk(cookie: int, offset: int, type: int, payload: bytes, last: bool) -> bytes:
    raise AssertionError("a simple reply has no chunks")


def _structured_nothing(cookie: int, offset: int) -> bytes:
    return _chunk(c.STRUCTURED_REPLY_MAGIC, 1, c.REPLY_TYPE_NONE, cookie, 0)


def _structured_read(cookie: int, offset: int, length: int) -> bytes:
    return _data(0x668E33EF, 1, 1, cookie, length + 8, offset)


def _structured_error(cookie: int, offset: int, error: int, message: str) -> bytes:
    return _structured_chunk(cookie, offset, c.REPLY_TYPE_ERROR, _error_payload(error, message), True)


def _structured_chunk(cookie: int, offset: int, type: int, payload: bytes, last: bool) -> bytes:
    return _chunk(c.STRUCTURED_REPLY_MAGIC, last, type, cookie, len(payload)) + payload


def _extended_done(cookie: int, offset: int) -> bytes:
    return _extended(0x6E8A278C, 1, 0, cookie, offset, 0)


def _extended_read(cookie: int, offset: int, length: int) -> bytes:
    return _extended_data(0x6E8A278C, 1, 1, cookie, offset, length + 8, offset)


def _extended_error(cookie: int, offset: int, error: int, message: str) -> bytes:
    return _extended_chunk(cookie, offset, c.REPLY_TYPE_ERROR, _error_payload(error, message), True)


def _extended_chunk(cookie: int, offset: int, type: int, payload: bytes, last: bool) -> bytes:
    return _extended(c.EXTENDED_REPLY_MAGIC, last, type, cookie, offset, len(payload)) + payload


def _error_payload(error: int, message: str) -> bytes:
    # The limit may have cut a character in two: the second round drops its beginning.
    text = message.encode("utf-8", "replace")[:c.MAX_STRING].decode("utf-8", "ignore").encode()
    return _ERROR.pack(error, len(text)) + text


def status_payload(context: int, extents: Extents, extended: bool) -> bytes:
    """The payload of a BLOCK_STATUS chunk, or BLOCK_STATUS_EXT if ``extended``. At least one extent."""
    fields = list(chain.from_iterable(extents))
    if extended:
        return Struct(f">II{len(fields)}Q").pack(context, len(fields) // 2, *fields)
    return Struct(f">I{len(fields)}I").pack(context, *fields)


SIMPLE: Final = Form(_simple_done, _simple_done, _simple_read, _simple_error, _simple_chunk, chunks=False)
STRUCTURED: Final = Form(_simple_done, _structured_nothing, _structured_read, _structured_error, _structured_chunk)
EXTENDED: Final = Form(_extended_done, _extended_done, _extended_read, _extended_error, _extended_chunk)
