"""Replies of all forms, whole and byte by byte, from servers that behave and from those that do not."""

import errno
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.errors import ConnectionLost, ProtocolError
from blockstep.nbd import constants as c
from blockstep.nbd.reply_table import LONG, LongBuffers, Read, ReplyTable, Status

FORMS = ["simple", "structured", "extended"]
CHUNKED = FORMS[1:]
READ_AT = 8192


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, error, cookie) + data


def chunk(form: str, cookie: int, kind: int, payload: bytes = b"", done: bool = True, offset: int = READ_AT) -> bytes:
    if form == "extended":
        return struct.pack(">IHHQQQ", c.EXTENDED_REPLY_MAGIC, done, kind, cookie, offset, len(payload)) + payload
    return struct.pack(">IHHQI", c.STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload)) + payload


def data(form: str, cookie: int, content: bytes, at: int = READ_AT, done: bool = True) -> bytes:
    return chunk(form, cookie, c.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", at) + content, done)


def hole(form: str, cookie: int, length: int, at: int = READ_AT, done: bool = True) -> bytes:
    return chunk(form, cookie, c.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", at, length), done)


def error(form: str, cookie: int, code: int, text: bytes = b"", done: bool = True, at: int | None = None) -> bytes:
    tail = b"" if at is None else struct.pack(">Q", at)
    return chunk(form, cookie, c.REPLY_TYPE_ERROR if at is None else c.REPLY_TYPE_ERROR_OFFSET,
                 struct.pack(">IH", code, len(text)) + text + tail, done)


class Table(ReplyTable):
    """A table with requests in it: ``got`` has what they ended with."""

    def __init__(self, form: str) -> None:
        super().__init__(form == "structured", form == "extended")
        self.got: dict[int, Any] = {}

    def write(self, cookie: int) -> None:
        self.pending[cookie] = lambda error: self.got.update({cookie: error})

    def read(self, cookie: int, length: int) -> None:
        self.pending[cookie] = Read(READ_AT, length, lambda read: self.got.update(
            {cookie: read.error if read.error else bytes(read.data or b"")}))
        self.long_reads += length > LONG

    def status(self, cookie: int, *contexts: int) -> None:
        self.pending[cookie] = Status(READ_AT, frozenset(contexts), lambda status: self.got.update(
            {cookie: status.error or status.result}))

    def feed(self, stream: bytes, piece: int = 1 << 30) -> None:
        while stream:
            buffer = self.get_buffer()
            count = min(len(buffer), piece, len(stream))
            buffer[:count] = stream[:count]
            stream = stream[count:]
            self.received(count)


pieces = pytest.mark.parametrize("piece", [1, 7, 1 << 30])


@pieces
@pytest.mark.parametrize("form", FORMS)
def test_acknowledgements_come_in_any_order(form: str, piece: int) -> None:
    table = Table(form)
    for cookie in range(5):
        table.write(cookie)
    table.feed(b"".join(chunk(form, cookie, c.REPLY_TYPE_NONE) if form == "extended" else simple(cookie)
                        for cookie in (3, 1, 4, 0)), piece)
    assert table.got == dict.fromkeys((3, 1, 4, 0))
    assert list(table.pending) == [2]


@pieces
@pytest.mark.parametrize("length", [1, 4096, LONG + 1, 300_000])
@pytest.mark.parametrize("form", FORMS)
def test_reads_of_any_length_between_acknowledgements(form: str, length: int, piece: int) -> None:
    if piece < 100 < length:
        piece = 4097
    table = Table(form)
    content = bytes(i * 7 % 256 for i in range(length))
    stream = b""
    for cookie in range(0, 6, 2):
        table.read(cookie, length)
        table.write(cookie + 1)
        stream += simple(cookie, 0, content) if form == "simple" else data(form, cookie, content)
        stream += chunk(form, cookie + 1, c.REPLY_TYPE_NONE) if form == "extended" else simple(cookie + 1)
    table.feed(stream, piece)
    assert table.got == {0: content, 1: None, 2: content, 3: None, 4: content, 5: None}
    assert (table.long_reads, table.pending) == (0, {})


@pieces
@pytest.mark.parametrize("form", CHUNKED)
def test_a_read_in_interleaved_chunks_is_put_together(form: str, piece: int) -> None:
    table = Table(form)
    table.read(1, 10)
    table.read(2, 4)
    table.feed(data(form, 1, b"xyz", READ_AT + 7, False) + data(form, 2, b"ab", READ_AT, False)
               + hole(form, 1, 4, READ_AT + 3, False) + data(form, 1, b"abc", READ_AT, False)
               + hole(form, 2, 2, READ_AT + 2) + chunk(form, 1, c.REPLY_TYPE_NONE), piece)
    assert table.got == {1: b"abc\0\0\0\0xyz", 2: b"ab\0\0"}


@pieces
@pytest.mark.parametrize("form", CHUNKED)
def test_status_of_several_contexts(form: str, piece: int) -> None:
    table = Table(form)
    table.status(1, 5, 9)
    if form == "extended":
        kind, first = c.REPLY_TYPE_BLOCK_STATUS_EXT, struct.pack(">IIQQQQ", 5, 2, 4096, 3, 1 << 40, 0)
        second = struct.pack(">IIQQ", 9, 1, 7, 1 << 33)
        expected: Any = {5: [(4096, 3), (1 << 40, 0)], 9: [(7, 1 << 33)]}
    else:
        kind, first = c.REPLY_TYPE_BLOCK_STATUS, struct.pack(">IIIII", 5, 4096, 3, 8192, 0)
        second = struct.pack(">III", 9, 7, 1)
        expected = {5: [(4096, 3), (8192, 0)], 9: [(7, 1)]}
    table.feed(chunk(form, 1, kind, second, False) + chunk(form, 1, kind, first), piece)
    assert table.got == {1: expected}


@pytest.mark.parametrize("form", CHUNKED)
def test_a_long_status_is_received_in_place(form: str) -> None:
    table = Table(form)
    table.status(1, 1)
    count = 50_000
    payload = (struct.pack(">II", 1, count) + struct.pack(">QQ", 512, 1) * count if form == "extended"
               else struct.pack(">I", 1) + struct.pack(">II", 512, 1) * count)
    kind = c.REPLY_TYPE_BLOCK_STATUS_EXT if form == "extended" else c.REPLY_TYPE_BLOCK_STATUS
    table.feed(chunk(form, 1, kind, payload), 10_000)
    assert len(table.got[1][1]) == count


@pieces
@pytest.mark.parametrize("form", CHUNKED)
def test_errors_carry_number_and_text(form: str, piece: int) -> None:
    table = Table(form)
    table.write(1)
    table.read(2, 8)
    table.status(3, 1)
    table.write(4)
    table.feed(error(form, 1, c.ENOSPC, b"disk full", done=False) + chunk(form, 1, c.REPLY_TYPE_NONE)
               + data(form, 2, b"abcd", done=False) + error(form, 2, c.EIO, b"bad", at=READ_AT + 4)
               + error(form, 3, 12345) + chunk(form, 4, 0x9999, struct.pack(">IH", c.EPERM, 1) + b"xfuture"), piece)
    assert {cookie: got.errno for cookie, got in table.got.items()} == {
        1: errno.ENOSPC, 2: errno.EIO, 3: errno.EINVAL, 4: errno.EPERM}
    assert "disk full" in str(table.got[1])
    assert not table.pending


def test_simple_errors_have_no_data() -> None:
    table = Table("simple")
    table.read(1, 100_000)
    table.write(2)
    table.feed(simple(1, c.EIO) + simple(2, c.ENOTSUP), 1)
    assert {cookie: got.errno for cookie, got in table.got.items()} == {1: errno.EIO, 2: errno.ENOTSUP}
    assert table.long_reads == 0


def test_a_simple_error_to_block_status_is_allowed() -> None:
    table = Table("structured")
    table.status(1, 1)
    table.feed(simple(1, c.EIO))
    assert table.got[1].errno == errno.EIO


def test_shutdown_is_noticed() -> None:
    table = Table("structured")
    table.write(1)
    table.feed(error("structured", 1, c.ESHUTDOWN))
    assert isinstance(table.got[1], ConnectionLost)
    assert table.shutting_down


@pytest.mark.parametrize("form", CHUNKED)
@pytest.mark.parametrize("sin", [
    lambda f: chunk(f, 77, c.REPLY_TYPE_NONE),
    lambda f: simple(77),
    lambda f: simple(2),
    lambda f: simple(2, c.EIO),
    lambda f: simple(3),
    lambda f: chunk(f, 2, c.REPLY_TYPE_NONE),
    lambda f: chunk(f, 1, c.REPLY_TYPE_NONE, done=False),
    lambda f: chunk(f, 1, c.REPLY_TYPE_NONE, b"x"),
    lambda f: data(f, 2, b"123456789"),
    lambda f: data(f, 2, b"12", READ_AT - 1),
    lambda f: data(f, 2, b"12", READ_AT + 7),
    lambda f: data(f, 2, b""),
    lambda f: data(f, 2, b"1234"),
    lambda f: data(f, 2, b"1234", done=False) + data(f, 2, b"1234", READ_AT + 3),
    lambda f: data(f, 2, b"12345678", done=False) + hole(f, 2, 1),
    lambda f: hole(f, 2, 0),
    lambda f: hole(f, 2, 9),
    lambda f: chunk(f, 2, c.REPLY_TYPE_OFFSET_HOLE, b"short"),
    lambda f: data(f, 1, b"12345678"),
    lambda f: hole(f, 1, 8),
    lambda f: chunk(f, 2, 3),
    lambda f: chunk(f, 1, 7, bytes(8)),
    lambda f: chunk(f, 3, c.REPLY_TYPE_NONE),
    lambda f: chunk(f, 3, 5 + (f == "structured"), bytes(24)),
    lambda f: chunk(f, 3, 5 + (f == "extended"), bytes(9)),
    lambda f: chunk(f, 3, 5, struct.pack(">III", 1, 0, 0)),
    lambda f: chunk(f, 3, 6, struct.pack(">IIQQ", 1, 1, 0, 0)),
    lambda f: chunk(f, 3, 6, struct.pack(">IIQQ", 1, 2, 5, 0)),
    lambda f: chunk(f, 3, 5, struct.pack(">III", 8, 512, 0)),
    lambda f: error(f, 1, 0),
    lambda f: chunk(f, 1, c.REPLY_TYPE_ERROR, b"short"),
    lambda f: chunk(f, 1, c.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 9) + b"x"),
    lambda f: chunk(f, 1, c.REPLY_TYPE_ERROR, bytes(100_000)),
    lambda f: struct.pack(">IIQ", 0x12345678, 0, 1),
    lambda f: chunk("extended" if f == "structured" else "structured", 1, c.REPLY_TYPE_NONE) + bytes(20),
])
def test_sins_break_the_connection(form: str, sin: Any) -> None:
    table = Table(form)
    table.write(1)
    table.read(2, 8)
    table.status(3, 1)
    with pytest.raises(ProtocolError):
        table.feed(sin(form))
    table.fail_all(lambda: ConnectionLost("test"))
    assert set(table.got) == {1, 2, 3}, "every request has ended, once"


def test_an_extended_chunk_for_another_offset_breaks_the_connection() -> None:
    table = Table("extended")
    table.read(1, 8)
    with pytest.raises(ProtocolError):
        table.feed(chunk("extended", 1, c.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", READ_AT) + bytes(4), offset=1))


def test_a_long_buffer_is_used_again_only_when_nobody_refers_to_it() -> None:
    buffers = LongBuffers()
    first = buffers.take(100_000)
    view = memoryview(first)[:10]
    assert buffers.take(100_000) is not first
    address = id(first)
    del first
    assert id(buffers.take(100_000)) != address
    del view
    assert address in {id(buffer) for buffer in [buffers.take(100_000) for _ in range(3)]}


def test_long_buffers_keep_no_more_than_their_limit() -> None:
    buffers = LongBuffers()
    for length in range(1 << 20, (1 << 20) + 100):
        buffers.take(length)
    assert sum(map(len, buffers._kept)) <= LongBuffers.BYTES


def test_fail_all_in_the_middle_of_a_long_read() -> None:
    table = Table("structured")
    table.read(1, 100_000)
    table.feed(data("structured", 1, bytes(100_000))[:50_000], 4096)
    table.fail_all(lambda: ConnectionLost("cut"))
    assert isinstance(table.got[1], ConnectionLost)


messages = st.one_of(
    st.binary(max_size=40),
    st.builds(simple, st.integers(0, 4), st.sampled_from([0, 0, 5, 108]), st.binary(max_size=9)),
    st.builds(data, st.sampled_from(CHUNKED), st.integers(0, 4), st.binary(max_size=10),
              st.integers(READ_AT - 1, READ_AT + 9), st.booleans()),
    st.builds(hole, st.sampled_from(CHUNKED), st.integers(0, 4), st.integers(0, 10),
              st.integers(READ_AT - 1, READ_AT + 9), st.booleans()),
    st.builds(error, st.sampled_from(CHUNKED), st.integers(0, 4), st.integers(0, 200), st.binary(max_size=5),
              st.booleans(), st.none() | st.integers(0, 1 << 40)),
    st.builds(chunk, st.sampled_from(CHUNKED), st.integers(0, 4), st.integers(0, 8), st.binary(max_size=30),
              st.booleans()))


@given(form=st.sampled_from(FORMS), stream=st.lists(messages, max_size=10), piece=st.sampled_from([1, 5, 1 << 20]))
def test_garbage_ends_every_request_once(form: str, stream: list[bytes], piece: int) -> None:
    table = Table(form)
    ended: list[int] = []
    table.pending[1] = lambda error: ended.append(1)
    table.pending[2] = Read(READ_AT, 8, lambda read: ended.append(2))
    if form != "simple":
        table.pending[3] = Status(READ_AT, frozenset([1]), lambda status: ended.append(3))
    wanted = sorted(table.pending)
    try:
        table.feed(b"".join(stream), piece)
    except ProtocolError:
        pass
    table.fail_all(lambda: ConnectionLost("test"))
    assert sorted(ended) == wanted


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("form", CHUNKED)
def test_a_read_in_thousands_of_chunks_does_not_cost_their_square(form: str, order: int) -> None:
    table, count = Table(form), 20_000
    table.read(1, count)
    for number in list(range(count))[::order]:
        table.feed(data(form, 1, bytes([number % 251]), READ_AT + number, done=False))
    read = table.pending[1]
    assert isinstance(read, Read)
    assert len(read._parts) == 1
    table.feed(chunk(form, 1, c.REPLY_TYPE_NONE))
    assert table.got[1] == bytes(number % 251 for number in range(count))


@pytest.mark.parametrize("form", CHUNKED)
def test_a_read_in_scattered_crumbs_is_no_way_to_fill_our_memory(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockstep.nbd.reply_table.MAX_PARTS", 10)
    table = Table(form)
    table.read(1, 100)
    with pytest.raises(ProtocolError, match="scattered"):
        for number in range(0, 100, 2):
            table.feed(data(form, 1, b"x", READ_AT + number, done=False))
