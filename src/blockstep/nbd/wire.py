"""The messages of the transmission phase: bytes to plain tuples and back. No socket, no state.

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

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Final

from blockstep.errors import ProtocolError
from blockstep.nbd import constants as c

#: (type, flags, cookie, offset, length, payload). ``length`` is the header's: of the payload if there is one.
Request = tuple[int, int, int, int, int, memoryview | None]
Requests = tuple[list[Request], int, int, ProtocolError | None]

#: (type, flags, cookie, error, payload). A simple reply has the type SIMPLE, flags REPLY_FLAG_DONE, and its error;
#: a chunk has error 0 whatever its type, and its payload undecoded: see `parse_error` and its neighbours.
Reply = tuple[int, int, int, int, memoryview | None]
Replies = tuple[list[Reply], int, int, ProtocolError | None]

#: The type of a simple reply in a `Reply`; no chunk has it.
SIMPLE: Final = -1

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
_NO_READS: Final[Mapping[int, int]] = {}

#: What a chunk may have around its variable part: BLOCK_STATUS_EXT's 8 bytes, an error's message and offset.
_CHUNK_OVERHEAD: Final = 8 + 6 + c.MAX_STRING + 8


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

    There is a payload, of ``length`` bytes, exactly if the flags have CMD_FLAG_PAYLOAD_LEN, whatever the type.
    """
    requests: list[Request] = []
    unpack = EXTENDED_REQUEST.unpack_from
    while end - position >= 32:
        magic, flags, type, cookie, offset, length = unpack(data, position)
        if magic != 0x21E41C71:
            return requests, position, 1, ProtocolError(f"extended request with magic {magic:#010x}")
        if not flags & c.CMD_FLAG_PAYLOAD_LEN:
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


# Replies, as the client reads them.

def decode_replies(data: memoryview, position: int, end: int, read_lengths: Mapping[int, int] = _NO_READS,
                   max_payload: int = c.MAX_PAYLOAD) -> Replies:
    """Decode simple replies and structured chunks from ``data[position:end]``.

    A simple reply does not say whether data follows: ``read_lengths`` gives the length of each read in flight, by
    cookie. Leave it out when structured replies were negotiated, for then a read has none.
    """
    replies: list[Reply] = []
    simple, chunk = SIMPLE_REPLY.unpack_from, CHUNK.unpack_from
    while end - position >= 16:
        magic, error, cookie = simple(data, position)
        if magic == 0x67446698:
            length = read_lengths.get(cookie, 0) if read_lengths and not error else 0
            after = position + 16 + length
            if after > end:
                return replies, position, after - end, None
            replies.append((SIMPLE, 1, cookie, error, data[position + 16:after] if length else None))
            position = after
            continue
        if magic != 0x668E33EF:
            return replies, position, 1, ProtocolError(f"reply with magic {magic:#010x}")
        if end - position < 20:
            return replies, position, 20 - (end - position), None
        magic, flags, type, cookie, length = chunk(data, position)
        after = position + 20 + length
        if after > end:
            if length > max_payload + _CHUNK_OVERHEAD:
                return replies, position, 1, _too_long(length, max_payload)
            return replies, position, after - end, None
        replies.append((type, flags, cookie, 0, data[position + 20:after] if length else None))
        position = after
    return replies, position, 16 - (end - position), None


def decode_extended_replies(data: memoryview, position: int, end: int,
                            max_payload: int = c.MAX_PAYLOAD) -> Replies:
    """Decode extended chunks from ``data[position:end]``. The request's offset in them is left out."""
    replies: list[Reply] = []
    unpack = EXTENDED_CHUNK.unpack_from
    while end - position >= 32:
        magic, flags, type, cookie, _, length = unpack(data, position)
        if magic != 0x6E8A278C:
            return replies, position, 1, ProtocolError(f"extended reply with magic {magic:#010x}")
        after = position + 32 + length
        if after > end:
            if length > max_payload + _CHUNK_OVERHEAD:
                return replies, position, 1, _too_long(length, max_payload)
            return replies, position, after - end, None
        replies.append((type, flags, cookie, 0, data[position + 32:after] if length else None))
        position = after
    return replies, position, 32 - (end - position), None


# What is in the payload of a chunk. Each raises ProtocolError if the payload has not the shape of its type.

def parse_data(payload: memoryview | None) -> tuple[int, memoryview]:
    """OFFSET_DATA: offset in the export, and the data, at least one byte."""
    if payload is None or len(payload) < 9:
        raise ProtocolError("a data chunk without data")
    return _U64.unpack_from(payload)[0], payload[8:]


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
