"""The messages of the transmission phase: whole, byte by byte, and garbage."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockstep.errors import ProtocolError
from blockstep.nbd import constants as c
from blockstep.nbd import forms, wire

DECODERS: dict[str, Callable[..., Any]] = {
    "compact": wire.decode_requests,
    "extended": wire.decode_extended_requests,
}

COMPACT = b"".join([
    wire.encode_request(c.CMD_READ, 0, 1, 4096, 8192, False),
    wire.encode_request(c.CMD_WRITE, c.CMD_FLAG_FUA, 2, 1 << 40, 5, False) + b"hello",
    wire.encode_request(c.CMD_FLUSH, 0, 3, 0, 0, False),
    wire.encode_request(c.CMD_WRITE, 0, 4, 0, 0, False),
    wire.encode_request(c.CMD_DISC, 0, 5, 0, 0, False)])
EXTENDED = b"".join([
    wire.encode_request(c.CMD_WRITE, c.CMD_FLAG_PAYLOAD_LEN, 2, 7, 5, True) + b"hello",
    wire.encode_request(c.CMD_TRIM, 0, 3, 0, 1 << 40, True),
    wire.encode_request(c.CMD_WRITE, c.CMD_FLAG_FUA, 6, 0, 5, True) + b"QEMU!",
    wire.encode_request(c.CMD_BLOCK_STATUS, c.CMD_FLAG_PAYLOAD_LEN, 4, 0, 12, True)
    + wire.encode_status_query(1 << 33, [2])])

STREAMS = {"compact": COMPACT, "extended": EXTENDED}


def plain(messages: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [tuple(bytes(field) if isinstance(field, memoryview) else field for field in message)
            for message in messages]


def decode_in_pieces(decoder: Callable[..., Any], data: bytes, sizes: list[int]) -> list[tuple[Any, ...]]:
    """Feed pieces; the result, with the error as the last element if there is one."""
    messages: list[tuple[Any, ...]] = []
    position = end = 0
    for size in [*sizes, len(data)]:
        end = min(len(data), end + size)
        batch, position, need, error = decoder(memoryview(data)[:end], position, end)
        messages += plain(batch)
        if error is not None:
            return [*messages, (str(error),)]
        assert need > 0
    return messages


@pytest.mark.parametrize("kind", STREAMS)
def test_pieces_give_what_the_whole_gives(kind: str) -> None:
    data, decoder = STREAMS[kind], DECODERS[kind]
    whole, position, _, error = decoder(memoryview(data), 0, len(data))
    assert position == len(data)
    assert error is None
    assert decode_in_pieces(decoder, data, [1] * len(data)) == plain(whole)


def test_compact_requests_carry_their_fields() -> None:
    requests, _, _, _ = wire.decode_requests(memoryview(COMPACT), 0, len(COMPACT))
    assert plain(requests) == [
        (c.CMD_READ, 0, 1, 4096, 8192, None),
        (c.CMD_WRITE, c.CMD_FLAG_FUA, 2, 1 << 40, 5, b"hello"),
        (c.CMD_FLUSH, 0, 3, 0, 0, None),
        (c.CMD_WRITE, 0, 4, 0, 0, b""),
        (c.CMD_DISC, 0, 5, 0, 0, None)]


def test_an_extended_request_has_a_payload_if_it_is_a_write_or_has_the_flag() -> None:
    requests, _, _, _ = wire.decode_extended_requests(memoryview(EXTENDED), 0, len(EXTENDED))
    assert [payload is not None for *_, payload in requests] == [True, False, True, True]
    assert [flags for _, flags, *_ in requests] == [0, 0, c.CMD_FLAG_FUA, c.CMD_FLAG_PAYLOAD_LEN]
    payload = requests[-1][5]
    assert payload is not None
    assert wire.parse_status_query(payload) == (1 << 33, (2,))


def test_need_is_exact_once_the_header_is_there() -> None:
    write = wire.encode_request(c.CMD_WRITE, 0, 1, 0, 1000, False)
    _, position, need, _ = wire.decode_requests(memoryview(write + b"12345"), 0, 33)
    assert (position, need) == (0, 995)
    _, _, need, _ = wire.decode_requests(memoryview(write), 0, 20)
    assert need == 8


def test_payloads_are_slices_of_what_was_received() -> None:
    data = bytearray(COMPACT)
    requests, _, _, _ = wire.decode_requests(memoryview(data), 0, len(data))
    payload = requests[1][5]
    assert payload is not None
    assert payload.obj is data


@pytest.mark.parametrize(("decoder", "header"), [
    (wire.decode_requests, wire.encode_request(c.CMD_WRITE, 0, 1, 0, 101, False)),
    (wire.decode_extended_requests, wire.encode_request(c.CMD_TRIM, c.CMD_FLAG_PAYLOAD_LEN, 1, 0, 1 << 60, True)),
    (wire.decode_extended_requests, wire.encode_request(c.CMD_WRITE, 0, 1, 0, 101, True)),
])
def test_a_payload_above_the_maximum_is_an_error_before_it_comes(decoder: Callable[..., Any], header: bytes) -> None:
    good = header[:]
    messages, position, _, error = decoder(memoryview(good), 0, len(good), 100)
    assert (messages, position) == ([], 0)
    assert isinstance(error, ProtocolError)


def test_requests_before_a_broken_one_are_good() -> None:
    data = COMPACT[:28] + b"junk" * 7
    requests, position, _, error = wire.decode_requests(memoryview(data), 0, len(data))
    assert len(requests) == 1
    assert position == 28
    assert "0x6a756e6b" in str(error)


def test_what_the_forms_write_the_parsers_read() -> None:
    def payload(chunk: bytes) -> memoryview:
        return memoryview(chunk)[wire.CHUNK.size:]

    assert bytes(payload(forms.STRUCTURED.read(2, 4096, 3) + b"abc")) == struct.pack(">Q", 4096) + b"abc"
    assert wire.parse_error(payload(forms.STRUCTURED.error(3, 0, c.EIO, "bad disk"))) == (c.EIO, "bad disk", None)
    assert wire.parse_status(memoryview(forms.status_payload(0, [(5, 3)], False))) == (0, [(5, 3)])
    assert wire.parse_hole(memoryview(struct.pack(">QI", 1 << 40, 9))) == (1 << 40, 9)
    assert wire.parse_status(memoryview(forms.status_payload(4, [(1 << 40, 1), (2, 0)], True)), True) == (
        4, [(1 << 40, 1), (2, 0)])


def test_a_long_message_is_cut_between_characters() -> None:
    reply = forms.STRUCTURED.error(1, 0, c.EIO, "é" * 4000)
    error, message, _ = wire.parse_error(memoryview(reply)[20:])
    assert error == c.EIO
    assert message == "é" * 2048


@pytest.mark.parametrize("kind", DECODERS)
@given(st.data())
def test_garbage_is_a_value_or_a_protocol_error(kind: str, data: st.DataObject) -> None:
    stream = STREAMS[kind]
    cut = data.draw(st.integers(0, len(stream)))
    junk = stream[:cut] + data.draw(st.binary(max_size=80)) + stream[cut:]
    sizes = data.draw(st.lists(st.integers(0, 40), max_size=20))
    assert decode_in_pieces(DECODERS[kind], junk, sizes) == decode_in_pieces(DECODERS[kind], junk, [])


@given(st.binary(max_size=64))
@example(struct.pack(">IH", 5, 600) + b"short")
def test_garbage_in_a_chunk_is_a_value_or_a_protocol_error(payload: bytes) -> None:
    for parse in (wire.parse_hole, wire.parse_error, wire.parse_status,
                  lambda data: wire.parse_error(data, True), lambda data: wire.parse_status(data, True),
                  wire.parse_status_query):
        try:
            parse(memoryview(payload))
        except ProtocolError:
            pass
