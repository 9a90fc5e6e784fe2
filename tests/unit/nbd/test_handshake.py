"""The server's half of the handshake, as bytes and events."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.nbd import constants as c
from blockstep.nbd.handshake import (
    MAX_OPTION,
    MAX_OPTIONS,
    MAX_SKIP,
    Close,
    Go,
    Send,
    ServerHandshake,
    StartTls,
    State,
    TlsMode,
)
from tests.unit.nbd.storage import info, option_bytes, queries

FLAGS = struct.pack(">I", 3)
DISK_FLAGS = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH


@dataclass(eq=False)
class Disk:
    name: str
    description: str = ""
    length: int = 1000
    block_sizes: tuple[int, int, int] = (1, 4096, 1 << 25)
    flags: int = DISK_FLAGS
    contexts: list[str] = field(default_factory=lambda: ["base:allocation", "qemu:allocation-depth",
                                                         "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"])

    def context_names(self) -> list[str]:
        return self.contexts


class Disks:
    def __init__(self, *disks: Disk) -> None:
        self.disks = {disk.name: disk for disk in disks}

    def find(self, name: str) -> Disk | None:
        return self.disks.get(name)

    def list(self) -> list[Disk]:
        return list(self.disks.values())


DISKS = Disks(Disk("a", "the first"), Disk("b"))


def machine(tls: TlsMode = "off", greeted: bool = True) -> ServerHandshake[Disk]:
    handshake = ServerHandshake(DISKS, tls)
    if greeted:
        assert handshake.receive(FLAGS) == []
    return handshake


def replies(events: list[Any]) -> list[tuple[int, bytes]]:
    """(reply type, data) of all replies in the events."""
    data = b"".join(event.data for event in events if isinstance(event, Send))
    result = []
    while data:
        magic, _, kind, length = struct.unpack_from(">QIII", data)
        assert magic == c.OPTION_REPLY_MAGIC
        result.append((kind, data[20:20 + length]))
        data = data[20 + length:]
    return result


def kinds(events: list[Any]) -> list[int]:
    return [kind for kind, _ in replies(events)]


def last_error(events: list[Any]) -> Close:
    assert isinstance(events[-1], Close)
    return events[-1]


# --- each option, when all is well ---

def test_list_names_all_exports_with_their_descriptions() -> None:
    got = replies(machine().receive(option_bytes(c.OPT_LIST)))
    assert got == [(c.REP_SERVER, b"\0\0\0\1athe first"), (c.REP_SERVER, b"\0\0\0\1b"), (c.REP_ACK, b"")]


def test_go_tells_size_and_flags_and_ends_the_handshake() -> None:
    handshake = machine()
    events = handshake.receive(option_bytes(c.OPT_GO, info("a")) + b"rest")
    assert replies(events) == [(c.REP_INFO, struct.pack(">HQH", 0, 1000, DISK_FLAGS)), (c.REP_ACK, b"")]
    assert events[-1] == Go(DISKS.disks["a"], False, False, ())
    assert handshake.state is State.TRANSMISSION
    assert handshake.rest == b"rest"


def test_info_tells_what_is_asked_for_and_goes_on() -> None:
    handshake = machine()
    events = handshake.receive(option_bytes(c.OPT_INFO, info("a", 1, 2, 3, 99)))
    assert replies(events)[1:] == [
        (c.REP_INFO, b"\0\1a"), (c.REP_INFO, b"\0\2the first"),
        (c.REP_INFO, struct.pack(">HIII", 3, 1, 4096, 1 << 25)), (c.REP_ACK, b"")]
    assert handshake.state is State.OPTIONS


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124), (0, 124)])
def test_export_name_pads_with_zeroes_unless_the_client_declined_them(flags: int, padding: int) -> None:
    handshake = machine(greeted=False)
    events = handshake.receive(struct.pack(">I", flags) + option_bytes(c.OPT_EXPORT_NAME, b"b"))
    assert events == [Send(struct.pack(">QH", 1000, DISK_FLAGS) + bytes(padding)),
                      Go(DISKS.disks["b"], False, False, ())]


def test_abort_is_acknowledged_and_ends_in_good_order() -> None:
    events = machine().receive(option_bytes(c.OPT_ABORT, b"ignored"))
    assert kinds(events) == [c.REP_ACK]
    assert last_error(events).error is None


def test_structured_replies_bring_df_and_extended_headers_take_precedence() -> None:
    handshake = machine()
    assert kinds(handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))) == [c.REP_ACK]
    assert kinds(handshake.receive(option_bytes(c.OPT_EXTENDED_HEADERS))) == [c.REP_ACK]
    assert kinds(handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))) == [c.REP_ERR_EXT_HEADER_REQD]
    events = handshake.receive(option_bytes(c.OPT_GO, info("a")))
    assert struct.unpack(">HQH", replies(events)[0][1])[2] == DISK_FLAGS | c.FLAG_SEND_DF
    assert events[-1] == Go(DISKS.disks["a"], True, True, ())


@pytest.mark.parametrize(("asked", "found"), [
    ([], ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]),
    (["base:"], ["base:allocation"]),
    (["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]),
    (["qemu:dirty-bitmap:b1", "x-unknown:y", "nonsense"], ["qemu:dirty-bitmap:b1"]),
])
def test_contexts_are_listed_by_name_and_by_namespace(asked: list[str], found: list[str]) -> None:
    handshake = machine()
    handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))
    got = replies(handshake.receive(option_bytes(c.OPT_LIST_META_CONTEXT, queries("a", *asked))))
    assert got == [*((c.REP_META_CONTEXT, b"\0\0\0\0" + name.encode()) for name in found), (c.REP_ACK, b"")]


@pytest.mark.parametrize(("asked", "selected"), [
    ([], ()),
    (["base:allocation"], ("base:allocation",)),
    (["qemu:dirty-bitmap:", "base:"], ()),
    (["qemu:dirty-bitmap:b0", "base:allocation", "base:other"], ("base:allocation", "qemu:dirty-bitmap:b0")),
])
def test_contexts_are_selected_by_their_whole_name(asked: list[str], selected: tuple[str, ...]) -> None:
    handshake = machine()
    handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))
    got = replies(handshake.receive(option_bytes(c.OPT_SET_META_CONTEXT, queries("a", *asked))))
    assert [data for kind, data in got if kind == c.REP_META_CONTEXT] == [
        struct.pack(">I", number) + name.encode() for number, name in enumerate(selected)]
    assert handshake.receive(option_bytes(c.OPT_GO, info("a")))[-1].contexts == selected


def test_contexts_of_another_export_do_not_count() -> None:
    handshake = machine()
    handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))
    handshake.receive(option_bytes(c.OPT_SET_META_CONTEXT, queries("b", "base:allocation")))
    assert handshake.receive(option_bytes(c.OPT_GO, info("a")))[-1].contexts == ()


def test_a_failed_selection_drops_the_earlier_one() -> None:
    handshake = machine()
    handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))
    handshake.receive(option_bytes(c.OPT_SET_META_CONTEXT, queries("a", "base:allocation")))
    assert kinds(handshake.receive(option_bytes(c.OPT_SET_META_CONTEXT, queries("no")))) == [c.REP_ERR_UNKNOWN]
    assert handshake.receive(option_bytes(c.OPT_GO, info("a")))[-1].contexts == ()


# --- refusals after which the handshake goes on ---

@pytest.mark.parametrize(("option", "data", "reply"), [
    (c.OPT_PEEK_EXPORT, b"", c.REP_ERR_UNSUP),
    (4711, b"whatever", c.REP_ERR_UNSUP),
    (c.OPT_STARTTLS, b"", c.REP_ERR_POLICY),
    (c.OPT_LIST, b"x", c.REP_ERR_INVALID),
    (c.OPT_STRUCTURED_REPLY, b"x", c.REP_ERR_INVALID),
    (c.OPT_EXTENDED_HEADERS, b"x", c.REP_ERR_INVALID),
    (c.OPT_GO, b"", c.REP_ERR_INVALID),
    (c.OPT_GO, info("a")[:-1], c.REP_ERR_INVALID),
    (c.OPT_GO, info("a") + b"x", c.REP_ERR_INVALID),
    (c.OPT_INFO, struct.pack(">IH", 500, 0), c.REP_ERR_INVALID),
    (c.OPT_INFO, struct.pack(">I2sH", 2, b"\xff\xff", 0), c.REP_ERR_INVALID),
    (c.OPT_INFO, info("a\0"), c.REP_ERR_INVALID),
    (c.OPT_INFO, info("a" * 4097), c.REP_ERR_TOO_BIG),
    (c.OPT_GO, info("no"), c.REP_ERR_UNKNOWN),
    (c.OPT_LIST_META_CONTEXT, queries("a"), c.REP_ERR_INVALID),
    (c.OPT_SET_META_CONTEXT, queries("a"), c.REP_ERR_INVALID),
    (c.OPT_INFO, bytes(MAX_OPTION + 1), c.REP_ERR_TOO_BIG),
    (4711, bytes(MAX_OPTION + 1), c.REP_ERR_UNSUP),
])
def test_a_refused_option_names_the_reason_and_the_next_one_works(option: int, data: bytes, reply: int) -> None:
    handshake = machine()
    events = handshake.receive(option_bytes(option, data) + option_bytes(c.OPT_LIST))
    assert kinds(events) == [reply, c.REP_SERVER, c.REP_SERVER, c.REP_ACK]
    assert replies(events)[0][1].decode()


@pytest.mark.parametrize("data", [
    b"", queries("a")[:-1], queries("a", "base:")[:-1], queries("a", "base:") + b"x",
    struct.pack(">I1sI", 1, b"a", 1 << 30), struct.pack(">II", 0, 1) + struct.pack(">I", 9)])
def test_a_malformed_context_query_is_invalid(data: bytes) -> None:
    handshake = machine()
    handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))
    assert kinds(handshake.receive(option_bytes(c.OPT_SET_META_CONTEXT, data))) == [c.REP_ERR_INVALID]


@pytest.mark.parametrize("option", [c.OPT_LIST, c.OPT_GO, 4711])
def test_in_shutdown_every_option_but_abort_is_refused(option: int) -> None:
    handshake = machine()
    handshake.shutting_down = True
    assert kinds(handshake.receive(option_bytes(option))) == [c.REP_ERR_SHUTDOWN]
    assert kinds(handshake.receive(option_bytes(c.OPT_ABORT))) == [c.REP_ACK]


# --- errors that end the connection ---

@pytest.mark.parametrize("data", [
    struct.pack(">I", 4),
    FLAGS + b"IHAVEOPX" + bytes(8),
    FLAGS + option_bytes(c.OPT_EXPORT_NAME, b"no"),
    FLAGS + option_bytes(c.OPT_EXPORT_NAME, b"\xff"),
    FLAGS + option_bytes(c.OPT_EXTENDED_HEADERS) + option_bytes(c.OPT_EXPORT_NAME, b"a"),
    FLAGS + struct.pack(">QII", c.OPTION_MAGIC, c.OPT_LIST, MAX_SKIP + 1),
    FLAGS + option_bytes(c.OPT_LIST) * (MAX_OPTIONS + 1),
    struct.pack(">I", 0) + option_bytes(c.OPT_LIST),
])
def test_what_has_no_reply_ends_the_connection_with_an_error(data: bytes) -> None:
    handshake = machine(greeted=False)
    assert last_error(handshake.receive(data)).error is not None
    assert handshake.state is State.CLOSED
    assert handshake.receive(option_bytes(c.OPT_LIST)) == []


# --- TLS ---

def test_before_required_tls_everything_else_is_refused() -> None:
    for option in (c.OPT_LIST, c.OPT_GO, c.OPT_INFO, c.OPT_STRUCTURED_REPLY, 4711):
        assert kinds(machine("required").receive(option_bytes(option))) == [c.REP_ERR_TLS_REQD]
    assert last_error(machine("required").receive(option_bytes(c.OPT_EXPORT_NAME, b"a"))).error is not None
    assert kinds(machine("required").receive(option_bytes(c.OPT_ABORT))) == [c.REP_ACK]


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_starttls_forgets_what_was_negotiated(mode: TlsMode) -> None:
    handshake = machine(mode)
    handshake.receive(option_bytes(c.OPT_STRUCTURED_REPLY))
    events = handshake.receive(option_bytes(c.OPT_STARTTLS))
    assert kinds(events) == [c.REP_ACK]
    assert events[-1] == StartTls()
    handshake.tls_started()
    assert kinds(handshake.receive(option_bytes(c.OPT_STARTTLS))) == [c.REP_ERR_INVALID]
    assert handshake.receive(option_bytes(c.OPT_GO, info("a")))[-1] == Go(DISKS.disks["a"], False, False, ())


def test_plain_bytes_behind_starttls_are_not_believed() -> None:
    events = machine("optional").receive(option_bytes(c.OPT_STARTTLS) + option_bytes(c.OPT_STRUCTURED_REPLY))
    assert last_error(events).error is not None


def test_optional_tls_serves_without_it() -> None:
    assert isinstance(machine("optional").receive(option_bytes(c.OPT_GO, info("a")))[-1], Go)


# --- pieces and garbage ---

SESSION = FLAGS + b"".join([
    option_bytes(c.OPT_LIST), option_bytes(77, b"x" * 100), option_bytes(c.OPT_STRUCTURED_REPLY),
    option_bytes(c.OPT_SET_META_CONTEXT, queries("a", "base:allocation", "qemu:")),
    option_bytes(c.OPT_INFO, info("a", 0, 1, 2, 3)), option_bytes(c.OPT_GO, info("a"))])


def test_byte_by_byte_gives_what_the_whole_gives() -> None:
    one, other = machine(greeted=False), machine(greeted=False)
    whole = one.receive(SESSION)
    pieces = [event for byte in SESSION for event in other.receive(bytes([byte]))]
    assert pieces == whole
    assert isinstance(whole[-1], Go)


def test_an_option_that_is_too_big_is_skipped_in_pieces_and_not_kept() -> None:
    handshake = machine()
    handshake.receive(struct.pack(">QII", c.OPTION_MAGIC, c.OPT_LIST, 1 << 20))
    for _ in range(16):
        handshake.receive(bytes(1 << 16))
        assert len(handshake.rest) == 0
    assert kinds(handshake.receive(option_bytes(c.OPT_LIST)))[-1] == c.REP_ACK


@given(st.integers(0, len(SESSION)), st.binary(max_size=60), st.integers(1, 50))
def test_garbage_never_raises_and_pieces_do_not_matter(cut: int, junk: bytes, size: int) -> None:
    data = SESSION[:cut] + junk + SESSION[cut:]
    one, other = machine(greeted=False), machine(greeted=False)
    whole = one.receive(data)
    pieces = [event for start in range(0, len(data), size) for event in other.receive(data[start:start + size])]
    assert [repr(event) for event in pieces] == [repr(event) for event in whole]
    assert one.state is other.state
