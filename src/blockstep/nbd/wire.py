"""The messages of the transmission phase: bytes to plain tuples and back. No socket, no state.

Replies are taken apart in `blockstep.nbd.reply_table`; what is in the payload of a chunk is parsed here.

Decoders work on a *batch*: all that one receive brought. They take a view of the bytes and the range in it that is
not yet decoded, and return

    (messages, position, need, error)

    messages   list of plain tuples, in order
    position   where the first byte stands that belongs to none of them
    need       how many bytes the incomplete message there still lacks, as far as one can tell
               (at least 1; exact once its header is there)
    error      a ProtocolError if the bytes at ``position`` can be no message: the messages before it are good,
               after it the connection is of no use. Otherwise None.

Payloads are slices of the view, not copies: whoever keeps one keeps the buffer.

All integers on the wire are big-endian and unsigned. Source: the protocol document, "Transmission", and branch
``extension-ext-header`` for the extended headers.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from blockstep.errors import ProtocolError
from blockstep.nbd import constants as c

#: (type, flags, cookie, offset, length, payload). ``length`` is the header's: of the payload if there is one.
Request = tuple[int, int, int, int, int, memoryview | None]
Requests = tuple[list[Request], int, int, ProtocolError | None]

#: magic u32, flags u16, type u16, cookie u64, offset u64, length u32
REQUEST: Final = Struct(">IHHQQI")
#: magic u32, flags u16, type u16, cookie u64, offset u64, length u64
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
#: magic u32, error u32, cookie u64
SIMPLE_REPLY: Final = Struct(">IIQ")
#: magic u32, flags u16, type u16, cookie u64, payload length u32
CHUNK: Final = Struct(">IHHQI")
#: magic u32, flags u16, type u16, cookie u64, offset of the request u64, payload length u64
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")

_HOLE: Final = Struct(">QI")  # offset, hole size
_ERROR: Final = Struct(">IH")  # error, message length; then the message, and for ERROR_OFFSET the offset u64
_QUERY: Final = Struct(">Q")  # effect length; then context ids, u32 each
_PAIR_32: Final = Struct(">II")  # length and flags of an extent; also context id and count of a BLOCK_STATUS_EXT
_PAIR_64: Final = Struct(">QQ")
_U64: Final = Struct(">Q")
_CONTEXT: Final = Struct(">I")


# Requests, as the server reads them.

def decode_requests(data: memoryview, position: int, end: int, max_payload: int = c.MAX_PAYLOAD) -> Requests:
    """Decode compact requests from ``data[position:end]``.

    Only WRITE has a payload, of ``length`` bytes. One of more than ``max_payload`` bytes is an error: it cannot be
    skipped without reading it, so the protocol lets the server drop the connection.
    """
    requests: list[Request] = []
    unpack = REQUEST.unpack_from
    while end - position >= 28:
        magic, flags, type, cookie, offset, length = unpack(data, position)
        if magic != 0x25609513:
            return requests, position, 1, ProtocolError(f"request with magic {magic:#010x}")
        if type != 1:
            requests.append((type, flags, cookie, offset, length, None))
            position += 28
            continue
        after = position + 28 + length
        if after > end:
            if length > max_payload:
                return requests, position, 1, _too_long(length, max_payload)
            return requests, position, after - end, None
        requests.append((1, flags, cookie, offset, length, data[position + 28:after]))
        position = after
    return requests, position, 28 - (end - position), None


def decode_extended_requests(data: memoryview, position: int, end: int,
                             max_payload: int = c.MAX_PAYLOAD) -> Requests:
    """Decode extended requests from ``data[position:end]``.

    There is a payload, of ``length`` bytes, if the flags have CMD_FLAG_PAYLOAD_LEN, whatever the type, and with every
    WRITE, which is returned without the flag: a client must set it, but QEMU's (seen up to 11.1) does not.
    """
    requests: list[Request] = []
    unpack = EXTENDED_REQUEST.unpack_from
    while end - position >= 32:
        magic, flags, type, cookie, offset, length = unpack(data, position)
        if magic != 0x21E41C71:
            return requests, position, 1, ProtocolError(f"extended request with magic {magic:#010x}")
        if type == 1:
            flags &= ~c.CMD_FLAG_PAYLOAD_LEN
        elif not flags & c.CMD_FLAG_PAYLOAD_LEN:
            requests.append((type, flags, cookie, offset, length, None))
            position += 32
            continue
        after = position + 32 + length
        if after > end:
            if length > max_payload:
                return requests, position, 1, _too_long(length, max_payload)
            return requests, position, after - end, None
        requests.append((type, flags, cookie, offset, length, data[position + 32:after]))
        position = after
    return requests, position, 32 - (end - position), None


def _too_long(length: int, limit: int) -> ProtocolError:
    return ProtocolError(f"a payload of {length} bytes is more than the maximum, {limit}")


def parse_status_query(payload: memoryview) -> tuple[int, tuple[int, ...]]:
    """The payload of a BLOCK_STATUS with CMD_FLAG_PAYLOAD_LEN: effect length and context ids.

    Raises ProtocolError if it has not 8 + 4 n bytes. Whether the ids are known is the server's to say.
    """
    count, odd = divmod(len(payload) - 8, 4)
    if count < 0 or odd:
        raise ProtocolError(f"a block status payload of {len(payload)} bytes")
    return _QUERY.unpack_from(payload)[0], Struct(f">{count}I").unpack_from(payload, 8)


def encode_request(type: int, flags: int, cookie: int, offset: int, length: int, extended: bool) -> bytes:
    """A request's header. ``length`` is the payload's if one follows (WRITE, or CMD_FLAG_PAYLOAD_LEN)."""
    if extended:
        return EXTENDED_REQUEST.pack(c.EXTENDED_REQUEST_MAGIC, flags, type, cookie, offset, length)
    return REQUEST.pack(c.REQUEST_MAGIC, flags, type, cookie, offset, length)


def encode_status_query(length: int, ids: Sequence[int]) -> bytes:
    """The payload that asks BLOCK_STATUS for ``length`` bytes and only the contexts ``ids``."""
    return _QUERY.pack(length) + Struct(f">{len(ids)}I").pack(*ids)


# What is in the payload of a chunk. Each raises ProtocolError if the payload has not the shape of its type.

def parse_hole(payload: memoryview | None) -> tuple[int, int]:
    """OFFSET_HOLE: offset in the export, and how many bytes there are zeroes."""
    if payload is None or len(payload) != 12:
        raise ProtocolError("a hole chunk must have 12 bytes")
    offset, length = _HOLE.unpack(payload)
    if not length:
        raise ProtocolError("a hole of no bytes")
    return offset, length


def parse_error(payload: memoryview | None, with_offset: bool = False) -> tuple[int, str, int | None]:
    """ERROR or, ``with_offset``, ERROR_OFFSET: the error, the server's message, the offset.

    Unknown error chunks begin like ERROR and may have more at their end. A message that is no UTF-8 is patched.
    """
    tail = 8 if with_offset else 0
    if payload is None or len(payload) < 6 + tail:
        raise ProtocolError("an error chunk without an error")
    error, size = _ERROR.unpack_from(payload)
    if not error or size > len(payload) - 6 - tail:
        raise ProtocolError("an error chunk with no error, or a message longer than itself")
    message = bytes(payload[6:6 + size]).decode("utf-8", "replace")
    return error, message, _U64.unpack_from(payload, 6 + size)[0] if with_offset else None


def parse_status(payload: memoryview | None, extended: bool = False) -> tuple[int, list[tuple[int, int]]]:
    """BLOCK_STATUS or, ``extended``, BLOCK_STATUS_EXT: context id, and (length, flags) of each extent."""
    head, size, pair = (8, 16, _PAIR_64) if extended else (4, 8, _PAIR_32)
    if payload is None or len(payload) < head + size or (len(payload) - head) % size:
        raise ProtocolError("a status chunk of the wrong size")
    if extended and _PAIR_32.unpack_from(payload)[1] != (len(payload) - head) // size:
        raise ProtocolError("a status chunk with another number of extents than it says")
    extents: list[tuple[int, int]] = list(pair.iter_unpack(payload[head:]))
    if not all(length for length, _ in extents):
        raise ProtocolError("a status chunk with an extent of no bytes")
    return _CONTEXT.unpack_from(payload)[0], extents
