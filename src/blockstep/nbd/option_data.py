"""What clients put into the options of the handshake, taken apart and checked. Pure.

Each function takes the whole data of one option and raises `Refused` with the error reply that the protocol names
for what is wrong with it.

Source: the protocol document, "Option types" and "Metadata querying".
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from blockstep.nbd import constants as c

_U32: Final = Struct(">I")
_U16: Final = Struct(">H")


class Refused(Exception):
    """The option gets the error reply ``reply`` with ``message``; the handshake goes on."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply, self.message = reply, message


def parse_info(data: bytes) -> tuple[str, tuple[int, ...]]:
    """INFO and GO: name length u32, name, number of requests u16, requests u16 each."""
    if len(data) < 6:
        raise Refused(c.REP_ERR_INVALID, "the option is too short")
    size = _U32.unpack_from(data)[0]
    if size > len(data) - 6:
        raise Refused(c.REP_ERR_INVALID, "the name is longer than the option")
    count = _U16.unpack_from(data, 4 + size)[0]
    if len(data) != 6 + size + 2 * count:
        raise Refused(c.REP_ERR_INVALID, "the option has not the length that its information requests need")
    return parse_text(data[4:4 + size]), Struct(f">{count}H").unpack_from(data, 6 + size)


def parse_queries(data: bytes) -> tuple[str, list[str]]:
    """LIST and SET_META_CONTEXT: name length u32, name, number u32, then length u32 and text of each query."""
    name, position = _take_text(data, 0)
    if len(data) - position < 4:
        raise Refused(c.REP_ERR_INVALID, "the option is too short")
    count = _U32.unpack_from(data, position)[0]
    position += 4
    if count > (len(data) - position) // 4:
        raise Refused(c.REP_ERR_INVALID, "the option has not the length that its queries need")
    queries = []
    for _ in range(count):
        query, position = _take_text(data, position)
        queries.append(query)
    if position != len(data):
        raise Refused(c.REP_ERR_INVALID, "there is something behind the last query")
    return name, queries


def _take_text(data: bytes, position: int) -> tuple[str, int]:
    if len(data) - position < 4:
        raise Refused(c.REP_ERR_INVALID, "the option is too short")
    size = _U32.unpack_from(data, position)[0]
    position += 4
    if size > len(data) - position:
        raise Refused(c.REP_ERR_INVALID, "a string is longer than the option")
    return parse_text(data[position:position + size]), position + size


def parse_text(data: bytes) -> str:
    """A string of the protocol: UTF-8 without NUL, at most 4096 bytes."""
    if len(data) > c.MAX_STRING:
        raise Refused(c.REP_ERR_TOO_BIG, f"a string may have at most {c.MAX_STRING} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Refused(c.REP_ERR_INVALID, "a string is not valid UTF-8") from None
    if "\0" in text:
        raise Refused(c.REP_ERR_INVALID, "a string has a NUL character")
    return text


def matches(name: str, query: str) -> bool:
    """Whether a query of LIST_META_CONTEXT finds a context: by its name, or by its namespace with nothing after."""
    return name == query or (query.endswith(":") and name.startswith(query))
