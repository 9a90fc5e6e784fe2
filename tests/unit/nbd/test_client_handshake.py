"""The client's handshake against servers of all ages and manners, fed byte by byte and whole."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.errors import OptionError, PeerRefused, ProtocolError
from blockstep.nbd import constants as c
from blockstep.nbd.client_handshake import (
    ClientHandshake,
    ExportInfo,
    HandshakeState,
    TlsMode,
    list_exports,
    open_export,
)

GREETING = struct.pack(">QQH", c.INIT_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
ANSWERED = struct.pack(">I", c.FLAG_C_FIXED_NEWSTYLE | c.FLAG_C_NO_ZEROES)
SIZE, FLAGS = 1 << 20, c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH
EXPORT = struct.pack(">HQH", c.INFO_EXPORT, SIZE, FLAGS)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", c.OPTION_MAGIC, number, len(data)) + data


def ack(number: int) -> bytes:
    return reply(number, c.REP_ACK)


def refuse(number: int, kind: int = c.REP_ERR_UNSUP, text: bytes = b"") -> bytes:
    return reply(number, kind, text)


def block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">HIII", c.INFO_BLOCK_SIZE, minimum, preferred, maximum)


def go(*infos: bytes) -> bytes:
    return b"".join(reply(c.OPT_GO, c.REP_INFO, info) for info in (EXPORT, *infos)) + ack(c.OPT_GO)


class Server:
    """Answers each option from a table; what is not in it is not known to the server."""

    def __init__(self, answers: dict[int, bytes], greeting: bytes = GREETING) -> None:
        self.answers, self.greeting = answers, greeting
        self.asked: list[int] = []

    def talk(self, handshake: ClientHandshake[Any], chunk: int) -> None:
        to_client, to_server = self.greeting, b""
        greeted = False
        while handshake.state is not HandshakeState.DONE:
            if handshake.state is HandshakeState.STARTING_TLS:
                to_server += handshake.tls_started()
            assert to_client or to_server, "both sides wait"
            while to_client and handshake.state is HandshakeState.HAGGLING:
                piece, to_client = to_client[:chunk], to_client[chunk:]
                to_server += handshake.receive(piece)
            if not greeted and len(to_server) >= 4:
                to_server, greeted = to_server[4:], True
            while greeted and len(to_server) >= 16:
                magic, number, length = struct.unpack_from(">QII", to_server)
                assert magic == c.OPTION_MAGIC
                to_server = to_server[16 + length:]
                self.asked.append(number)
                to_client += self.answers.get(number, refuse(number))


def connect(answers: dict[int, bytes], chunk: int = 1 << 20, greeting: bytes = GREETING, name: str = "disk",
            **options: Any) -> tuple[ExportInfo, list[int]]:
    server = Server(answers, greeting)
    handshake = ClientHandshake(lambda send: open_export(send, name, **options))
    server.talk(handshake, chunk)
    return handshake.result, server.asked


MODERN = {
    c.OPT_EXTENDED_HEADERS: ack(c.OPT_EXTENDED_HEADERS),
    c.OPT_STRUCTURED_REPLY: ack(c.OPT_STRUCTURED_REPLY),
    c.OPT_SET_META_CONTEXT: reply(c.OPT_SET_META_CONTEXT, c.REP_META_CONTEXT, b"\0\0\0\7base:allocation")
    + ack(c.OPT_SET_META_CONTEXT),
    c.OPT_GO: go(block_size(512, 4096, 1 << 20), struct.pack(">H", c.INFO_DESCRIPTION) + b"a disk"),
}


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_a_modern_server_gives_all(chunk: int) -> None:
    info, asked = connect(MODERN, chunk, contexts=["base:allocation", "x:y"])
    assert info == ExportInfo("disk", SIZE, FLAGS, "a disk", 512, 4096, 1 << 20, {"base:allocation": 7},
                              structured=True, extended=True)
    assert asked == [c.OPT_EXTENDED_HEADERS, c.OPT_SET_META_CONTEXT, c.OPT_GO]


def test_without_extended_headers_structured_replies_are_asked_for() -> None:
    answers = {**MODERN}
    del answers[c.OPT_EXTENDED_HEADERS]
    info, asked = connect(answers, contexts=["base:allocation"])
    assert (info.structured, info.extended) == (True, False)
    assert asked == [c.OPT_EXTENDED_HEADERS, c.OPT_STRUCTURED_REPLY, c.OPT_SET_META_CONTEXT, c.OPT_GO]


def test_without_structured_replies_no_context_is_asked_for() -> None:
    info, asked = connect({c.OPT_GO: go()}, contexts=["base:allocation"])
    assert (info.structured, info.contexts) == (False, {})
    assert c.OPT_SET_META_CONTEXT not in asked


@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_without_go_the_name_is_sent_plainly(zeroes: bool, chunk: int) -> None:
    greeting = struct.pack(">QQH", c.INIT_MAGIC, c.OPTION_MAGIC,
                           c.FLAG_FIXED_NEWSTYLE | (0 if zeroes else c.FLAG_NO_ZEROES))
    info, asked = connect({c.OPT_EXPORT_NAME: EXPORT[2:] + bytes(124 * zeroes)}, chunk, greeting)
    assert (info.size, info.flags) == (SIZE, FLAGS)
    assert asked[-2:] == [c.OPT_GO, c.OPT_EXPORT_NAME]


def test_a_server_before_fixed_newstyle_is_asked_nothing_but_the_name() -> None:
    _, asked = connect({c.OPT_EXPORT_NAME: EXPORT[2:] + bytes(124)},
                       greeting=struct.pack(">QQH", c.INIT_MAGIC, c.OPTION_MAGIC, 0))
    assert asked == [c.OPT_EXPORT_NAME]


def test_tls_comes_first_and_is_noted() -> None:
    info, asked = connect({**MODERN, c.OPT_STARTTLS: ack(c.OPT_STARTTLS)}, tls=TlsMode.REQUIRED)
    assert info.tls
    assert asked[0] == c.OPT_STARTTLS


def test_optional_tls_does_without() -> None:
    info, _ = connect(MODERN, tls=TlsMode.OPTIONAL)
    assert not info.tls


@pytest.mark.parametrize(("answers", "options", "hint"), [
    (MODERN, {"tls": TlsMode.REQUIRED}, "refuses TLS"),
    ({c.OPT_GO: refuse(c.OPT_GO, c.REP_ERR_UNKNOWN, b"nope")}, {}, "no such export (nope)"),
    ({n: refuse(n, c.REP_ERR_TLS_REQD) for n in MODERN}, {}, "requires TLS"),
    ({c.OPT_GO: refuse(c.OPT_GO, c.REP_ERR_SHUTDOWN)}, {}, "shutting down"),
    ({c.OPT_GO: go(block_size(4096, 4096, 1 << 20)).replace(EXPORT, struct.pack(">HQH", 0, 4097, 1))}, {},
     "no multiple"),
])
def test_a_refusal_says_why(answers: dict[int, bytes], options: dict[str, Any], hint: str) -> None:
    with pytest.raises(PeerRefused) as caught:
        connect(answers, **options)
    assert hint in str(caught.value)


def test_oldstyle_is_refused_by_name() -> None:
    with pytest.raises(PeerRefused, match="oldstyle"):
        connect({}, greeting=struct.pack(">QQQ", c.INIT_MAGIC, c.OLDSTYLE_MAGIC, 1))


@pytest.mark.parametrize("answer", [
    go()[:20].replace(b"\0\3\xe8\x89", b"\0\3\xe8\x88"),
    reply(c.OPT_LIST, c.REP_ACK),
    reply(c.OPT_GO, c.REP_ACK),
    reply(c.OPT_GO, c.REP_ACK, b"x"),
    reply(c.OPT_GO, c.REP_SERVER, b"\0\0\0\0") + ack(c.OPT_GO),
    reply(c.OPT_GO, c.REP_INFO, EXPORT[:-1]) + ack(c.OPT_GO),
    reply(c.OPT_GO, c.REP_INFO, struct.pack(">HQH", 0, 1 << 63, 0)) + ack(c.OPT_GO),
    go(block_size(0, 4096, 4096)), go(block_size(3, 4096, 4096)), go(block_size(1 << 17, 1 << 17, 1 << 20)),
    go(block_size(512, 256, 4096)), go(block_size(512, 512, 100)), go(struct.pack(">H", c.INFO_NAME) + b"\xff"),
    struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_GO, c.REP_INFO, 1 << 20),
    go() + b"more",
])
def test_broken_answers_to_go_break_the_connection(answer: bytes) -> None:
    with pytest.raises(ProtocolError):
        connect({c.OPT_GO: answer})


@pytest.mark.parametrize("contexts", [
    b"\0\0\0\1base:allocation", b"\0\0\0\2base:allocation",
])
def test_a_context_selected_twice_breaks_the_connection(contexts: bytes) -> None:
    twice = (reply(c.OPT_SET_META_CONTEXT, c.REP_META_CONTEXT, b"\0\0\0\1base:allocation")
             + reply(c.OPT_SET_META_CONTEXT, c.REP_META_CONTEXT, contexts) + ack(c.OPT_SET_META_CONTEXT))
    with pytest.raises(ProtocolError):
        connect({**MODERN, c.OPT_SET_META_CONTEXT: twice}, contexts=["base:allocation"])


def test_plain_bytes_behind_the_answer_to_starttls_are_an_injection() -> None:
    with pytest.raises(ProtocolError):
        connect({c.OPT_STARTTLS: ack(c.OPT_STARTTLS) + ack(c.OPT_GO)}, tls=TlsMode.REQUIRED)


@pytest.mark.parametrize("name", ["x" * 4097, "a\0b", "\ud800"])
def test_impossible_names_are_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(OptionError):
        ClientHandshake(lambda send: open_export(send, name))


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_server_lists_its_exports_with_details(chunk: int) -> None:
    server = Server({
        c.OPT_LIST: reply(c.OPT_LIST, c.REP_SERVER, b"\0\0\0\1atext") + reply(c.OPT_LIST, c.REP_SERVER, b"\0\0\0\0")
        + ack(c.OPT_LIST),
        c.OPT_STRUCTURED_REPLY: ack(c.OPT_STRUCTURED_REPLY),
        c.OPT_INFO: reply(c.OPT_INFO, c.REP_INFO, EXPORT) + ack(c.OPT_INFO),
        c.OPT_LIST_META_CONTEXT: reply(c.OPT_LIST_META_CONTEXT, c.REP_META_CONTEXT, b"\0\0\0\0base:allocation")
        + ack(c.OPT_LIST_META_CONTEXT)})
    handshake = ClientHandshake(list_exports)
    server.talk(handshake, chunk)
    assert [(info.name, info.description, info.size) for info in handshake.result] == [("a", "text", SIZE),
                                                                                      ("", "", SIZE)]
    assert list(handshake.result[0].contexts) == ["base:allocation"]


def test_an_export_that_went_away_while_listing_keeps_its_name() -> None:
    server = Server({c.OPT_LIST: reply(c.OPT_LIST, c.REP_SERVER, b"\0\0\0\1a") + ack(c.OPT_LIST),
                     c.OPT_INFO: refuse(c.OPT_INFO, c.REP_ERR_UNKNOWN)})
    handshake = ClientHandshake(list_exports)
    server.talk(handshake, 1 << 20)
    assert [(info.name, info.flags) for info in handshake.result] == [("a", 0)]


def test_a_server_that_lists_for_ever_is_dropped() -> None:
    handshake = ClientHandshake(list_exports)
    handshake.receive(GREETING)
    with pytest.raises(ProtocolError, match="more than"):
        while True:
            handshake.receive(reply(c.OPT_LIST, c.REP_SERVER, b"\0\0\0\0") * 1000)


scripts = st.sampled_from([
    lambda send: open_export(send, "disk", contexts=["base:allocation"]),
    lambda send: open_export(send, "disk", tls=TlsMode.OPTIONAL),
    list_exports])
pieces = st.one_of(
    st.binary(max_size=40),
    st.builds(reply, st.integers(0, 12), st.sampled_from([1, 2, 3, 4, c.REP_ERR_UNSUP, c.REP_ERR_TLS_REQD]),
              st.one_of(st.binary(max_size=20), st.just(EXPORT))),
    st.sampled_from([*MODERN.values()]))


@given(script=scripts, answers=st.lists(pieces, max_size=12))
def test_garbage_is_a_result_or_an_error_of_ours(script: Callable[..., Any], answers: list[bytes]) -> None:
    handshake: ClientHandshake[Any] = ClientHandshake(script)
    try:
        handshake.receive(GREETING)
        for answer in answers:
            if handshake.state is HandshakeState.HAGGLING:
                handshake.receive(answer)
            elif handshake.state is HandshakeState.STARTING_TLS:
                handshake.tls_started()
    except (ProtocolError, PeerRefused):
        pass


def test_the_bytes_of_the_first_options_are_those_of_the_document() -> None:
    handshake = ClientHandshake(lambda send: open_export(send, "d", extended=False, structured=False))
    assert handshake.receive(GREETING) == ANSWERED + option(
        c.OPT_GO, b"\0\0\0\1d" + struct.pack(">HHHH", 3, c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE))


def test_many_long_replies_to_one_option_are_no_way_to_fill_our_memory() -> None:
    flood = reply(c.OPT_GO, c.REP_INFO, struct.pack(">H", 99) + bytes(60_000)) * 1000
    with pytest.raises(ProtocolError, match="in all"):
        Server({c.OPT_GO: flood}).talk(ClientHandshake(lambda send: open_export(send, "")), 1 << 16)
