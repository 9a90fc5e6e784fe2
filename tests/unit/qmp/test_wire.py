"""The lexer gives out what was sent, however it is cut, and gets in step again after anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.qmp import wire
from blockstep.qmp.wire import Malformed, Splitter, requote

REQUEST = b'{"execute":"query-name","id":7}'


def taken(splitter: Splitter) -> list[bytes | Malformed]:
    found = []
    while (value := splitter.next()) is not None:
        found.append(value)
    return found


def split(*pieces: bytes, **limits: int) -> list[bytes | Malformed]:
    splitter = Splitter(**limits)
    found = []
    for piece in pieces:
        splitter.feed(piece)
        found += taken(splitter)
    return found


def bytewise(data: bytes, **limits: int) -> list[bytes | Malformed]:
    return split(*(data[i:i + 1] for i in range(len(data))), **limits)


def kinds(data: bytes) -> str:
    """``v`` for a value, ``e`` for an error."""
    return "".join("e" if isinstance(item, Malformed) else "v" for item in split(data))


@pytest.mark.parametrize("data", [
    REQUEST, REQUEST + b"\n", b"\r\n\t " + REQUEST,
    b'{"execute":\n "query-name",\r\n"id": [1,\n{"}": "]"}]}',
    b'{"a": "\\"}{", "b": "\\\\"}', b"{'execute': '}'}", b'{"a": -1.5e+3, "b": [true, false, null], "c": {}}',
    '{"a": "ünï}\U0001f600"}'.encode(),
])
def test_a_value_is_found_whole_and_byte_by_byte(data: bytes) -> None:
    assert split(data) == bytewise(data) == [data.strip()]


def test_several_values_on_one_line_are_several_values() -> None:
    assert split(REQUEST * 2 + b" " + REQUEST + b"\n") == [REQUEST] * 3


def test_a_scalar_ends_where_the_next_byte_shows_it() -> None:
    assert split(b"5") == []
    assert split(b"5", b"6 ") == [b"56"]
    assert split(b'true"a"') == [b"true", b'"a"']


def test_nothing_is_given_out_before_the_last_bracket() -> None:
    assert split(REQUEST[:-1]) == []


@pytest.mark.parametrize(("data", "expected"), [
    (b"}" + REQUEST, "vv"),  # a value, though none that the session takes
    (b"]\n" + REQUEST, "vv"),
    (b'{"a":1]' + REQUEST, "vv"),
    (b'"abc\n' + REQUEST, "ev"),
    (b"X " + REQUEST, "ev"),
    (b"X Y Z\n" + REQUEST, "ev"),
    (b'{"execute": "x" \xff' + REQUEST, "ev"),
    (b"\xff\xff" + REQUEST, "eev"),
    (b"\x00" + REQUEST, "ev"),
    (b'{"execute": "\xfe' + REQUEST, "ev"),
    (b"01 " + REQUEST, "ev"),
    (b"-\n" + REQUEST, "ev"),
    (b"1. " + REQUEST, "ev"),
    (b"{X" + REQUEST, "ev"),
    (b'"\\\n' + REQUEST, "ev"),
])
def test_the_stream_is_in_step_again_after(data: bytes, expected: str) -> None:
    assert kinds(data) == expected
    assert split(data)[-1] == REQUEST
    assert bytewise(data) == split(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
tokens = st.sampled_from([REQUEST, *(bytes([byte]) for byte in b'{}[],:"\'\\xX5-0.eE+ \n\r\t\x00\x01/\xfe\xff\xc3'),
                          b"true", b'"a"', b"'b'", b"1e5", b'"\\n"'])


@given(st.lists(st.dictionaries(st.text(), json_values), max_size=4), st.booleans(), st.sampled_from([None, 2]),
       st.data())
def test_any_objects_in_any_pieces(objects: list[dict[str, Any]], escaped: bool, indent: int | None,
                                   data: st.DataObject) -> None:
    texts = [json.dumps(value, ensure_ascii=escaped, indent=indent).encode() for value in objects]
    stream = b"\n".join(texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert split(*pieces) == texts


@given(st.lists(tokens, max_size=30).map(b"".join) | st.binary(max_size=200))
def test_garbage_gives_the_same_in_one_piece_and_byte_by_byte(garbage: bytes) -> None:
    assert split(garbage, max_bytes=40, max_depth=4) == bytewise(garbage, max_bytes=40, max_depth=4)


@given(st.lists(tokens, max_size=30).map(b"".join) | st.binary(max_size=200))
def test_a_newline_and_an_ff_end_any_garbage(garbage: bytes) -> None:
    assert split(garbage, b"\n\xff" + REQUEST)[-1] == REQUEST


def test_a_request_beyond_the_limit_costs_one_error_and_its_line() -> None:
    long = b'{"execute": "' + b"x{" * 100
    for data in (long + b'"} ' + REQUEST + b"\n" + REQUEST, long + b"\xff" + REQUEST):
        found = split(data, max_bytes=100)
        assert len(found) == 2 + data.count(b"\n\xff")
        assert isinstance(found[0], Malformed)
        assert "100 bytes" in found[0].reason
        assert found[-1] == REQUEST
        assert bytewise(data, max_bytes=100) == found


def test_a_request_as_long_as_the_limit_is_taken() -> None:
    assert split(REQUEST, max_bytes=len(REQUEST)) == [REQUEST]
    assert isinstance(split(REQUEST, max_bytes=len(REQUEST) - 1)[0], Malformed)


@pytest.mark.parametrize("start", [b'"', b'{"a": "', b"[", b"1", b"a", b" ", b"X"])
def test_64_mib_without_a_newline_take_no_memory(start: bytes) -> None:
    splitter = Splitter()
    chunk = {b"[": b"[]," * 20000, b"1": b"1" * 65536}.get(start, b"a" * 65536 if start != b" " else b" " * 65536)
    splitter.feed(start)
    errors = most = 0
    for _ in range((64 << 20) // len(chunk)):
        splitter.feed(chunk)
        errors += len(taken(splitter))
        most = max(most, len(splitter._buffer))
    assert most <= wire.MAX_BYTES + 2 * len(chunk)
    assert errors == (start != b" ")
    splitter.feed(b"\n" + REQUEST)
    assert taken(splitter) == [REQUEST]


def test_nesting_beyond_the_limit_costs_one_error_and_its_line() -> None:
    found = split(b"[" * 100_000 + b"]\n" + REQUEST)
    assert len(found) == 2
    assert isinstance(found[0], Malformed)
    assert found[1] == REQUEST


def test_trickled_input_is_not_scanned_again() -> None:
    # A megabyte of string in single bytes: quadratic work would take hours.
    splitter = Splitter()
    splitter.feed(b'{"a": "')
    for _ in range(200_000):
        splitter.feed(b"x")
        assert splitter.next() is None
    splitter.feed(b'"}')
    assert len(taken(splitter)[0]) == 200_009  # type: ignore[arg-type]


@pytest.mark.parametrize(("quoted", "expected"), [
    (b"{'a': 'it\\'s \"x\"'}", {"a": 'it\'s "x"'}), (b'{"a": "it\\\'s"}', {"a": "it's"}),
    (b"{'a': \"'\", 'b': '\\n\\u00e9'}", {"a": "'", "b": "\né"}), (b"{'': ''}", {"": ""}),
    (b"{'a': '\\\\'}", {"a": "\\"})])
def test_single_quotes_become_json(quoted: bytes, expected: object) -> None:
    assert json.loads(requote(quoted)) == expected


@given(json_values)
def test_requoting_leaves_json_alone(value: Any) -> None:
    text = json.dumps(value).encode()
    assert requote(text) == text


@given(json_values)
def test_output_is_ascii_in_one_line_and_means_the_same(value: Any) -> None:
    line = wire.encode_return(value, value)
    assert line.isascii()
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"return": {} if value is None else value, "id": value}


def test_an_event_says_when_to_the_microsecond() -> None:
    assert json.loads(wire.encode_event("STOP", None, 1_700_000_000_123_456_789)) == {
        "event": "STOP", "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456}}
    assert json.loads(wire.encode_event("X", {"a": "é"}, 0))["data"] == {"a": "é"}


def test_bytes_that_are_no_utf8_come_through_as_escaped_surrogates() -> None:
    line = wire.encode_return({"name": "\udce2b", "é": [1]}, 7)
    assert line.isascii()
    assert json.loads(line) == {"return": {"name": "\udce2b", "é": [1]}, "id": 7}
