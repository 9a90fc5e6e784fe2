"""The server's half of the handshake: bytes in, events out. No socket, no clock.

    FLAGS ── client flags ──► OPTIONS ◄──────────────┐
                               │  │  │  any option    │
                               │  │  └────────────────┘ replies, errors among them, as Send events
                               │  └─ STARTTLS ─► TLS ── tls_started() ──► OPTIONS, with nothing kept
                               ├─ GO, EXPORT_NAME ─► TRANSMISSION
                               └─ ABORT, an error with no reply ─► CLOSED

An option is looked up in a table (`_RULES`) that says what must hold before its handler sees it; what the table
refuses is refused with the error that the protocol names. The server is in one of the protocol's three TLS modes:
"off" (NOTLS), "required" (FORCEDTLS), or "optional" (SELECTIVETLS, without exports that are TLS-only).

Bounds: an option's data may have `MAX_OPTION` bytes; what is longer is skipped, unread, and answered with TOO_BIG
up to `MAX_SKIP` bytes, after which the peer is dropped; a connection has at most `MAX_OPTIONS` options.

Source: the protocol document, "Handshake phase", "TLS support", "Option types".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from typing import Final, Generic, Literal, Protocol, TypeVar

import msgspec

from blockstep.errors import ProtocolError
from blockstep.nbd import constants as c
from blockstep.nbd.option_data import Refused, matches, parse_info, parse_queries, parse_text

MAX_OPTION: Final = 64 << 10
MAX_SKIP: Final = 32 << 20
MAX_OPTIONS: Final = 1024

TlsMode = Literal["off", "optional", "required"]

_GREETING: Final = Struct(">QQH")
_CLIENT_FLAGS: Final = Struct(">I")
_OPTION: Final = Struct(">QII")
_OPTION_REPLY: Final = Struct(">QIII")
_U32: Final = Struct(">I")
_U16: Final = Struct(">H")
_EXPORT: Final = Struct(">QH")
_INFO_EXPORT: Final = Struct(">HQH")
_INFO_BLOCK_SIZE: Final = Struct(">HIII")


class Offer(Protocol):
    """What the handshake must know of an export."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """Minimum and preferred block size, maximum payload."""
    @property
    def flags(self) -> int:
        """Transmission flags, without those that depend on what the client negotiated."""
    def context_names(self) -> Sequence[str]:
        """The metadata contexts that can be selected."""


E = TypeVar("E", bound=Offer)
E_co = TypeVar("E_co", bound=Offer, covariant=True)


class Catalogue(Protocol[E_co]):
    """The exports that a server has at this moment."""

    def find(self, name: str) -> E_co | None:
        """The export with this name; the empty name may mean a default export."""
    def list(self) -> Iterable[E_co]:
        """All that may be shown."""


class State(enum.Enum):
    """Where a handshake stands; the drawing is at the head of the module."""

    FLAGS = enum.auto()
    OPTIONS = enum.auto()
    TLS = enum.auto()
    TRANSMISSION = enum.auto()
    CLOSED = enum.auto()


class Send(msgspec.Struct, frozen=True):
    """Send these bytes."""

    data: bytes


class StartTls(msgspec.Struct, frozen=True):
    """After all that was sent: begin TLS, then call `ServerHandshake.tls_started`."""


class Go(msgspec.Struct, Generic[E], frozen=True):
    """The transmission phase begins. What follows in `ServerHandshake.rest` belongs to it."""

    export: E
    structured: bool
    extended: bool
    contexts: tuple[str, ...]  #: selected metadata contexts; the index in it is the context id


class Close(msgspec.Struct, frozen=True):
    """After all that was sent: close. ``error`` is None when the client asked for it."""

    error: ProtocolError | None = None


class _Rule(msgspec.Struct, frozen=True):
    handler: str
    takes_data: bool = False
    before_tls: bool = False  # allowed in mode "required" before TLS
    in_shutdown: bool = False


_RULES: Final = {
    c.OPT_EXPORT_NAME: _Rule("_export_name", takes_data=True),
    c.OPT_ABORT: _Rule("_abort", takes_data=True, before_tls=True, in_shutdown=True),
    c.OPT_LIST: _Rule("_list"),
    c.OPT_STARTTLS: _Rule("_starttls", before_tls=True),
    c.OPT_INFO: _Rule("_info", takes_data=True),
    c.OPT_GO: _Rule("_go", takes_data=True),
    c.OPT_STRUCTURED_REPLY: _Rule("_structured_reply"),
    c.OPT_EXTENDED_HEADERS: _Rule("_extended_headers"),
    c.OPT_LIST_META_CONTEXT: _Rule("_list_meta_context", takes_data=True),
    c.OPT_SET_META_CONTEXT: _Rule("_set_meta_context", takes_data=True),
}


class ServerHandshake(Generic[E]):
    """One connection's handshake.

    Send `greeting` first. Then give all that is received to `receive` and do what the events say, in order; a
    `StartTls`, `Go` or `Close` is the last of its list.
    """

    def __init__(self, exports: Catalogue[E], tls: TlsMode = "off") -> None:
        self.state = State.FLAGS
        #: What was received and not used.
        self.rest = bytearray()
        #: Refuse all options but ABORT: the server is about to stop.
        self.shutting_down = False
        self._exports = exports
        self._tls_mode = tls
        self._is_tls = False
        self._fixed = False
        self._no_zeroes = False
        self._count = 0
        self._skip = 0
        self._events: list[Send | StartTls | Go[E] | Close] = []
        self._forget()

    def _forget(self) -> None:
        self._structured = self._extended = False
        self._contexts_of: E | None = None
        self._contexts: tuple[str, ...] = ()

    @staticmethod
    def greeting() -> bytes:
        """What the server sends first."""
        return _GREETING.pack(c.INIT_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)

    def receive(self, data: bytes | memoryview) -> list[Send | StartTls | Go[E] | Close]:
        """Take in bytes, in whatever pieces they come. Never raises."""
        self._events = []
        self.rest += data
        if self.state is State.FLAGS and len(self.rest) >= _CLIENT_FLAGS.size:
            self._take_flags()
        while self.state is State.OPTIONS and self._take_option():
            pass
        return self._events

    def tls_started(self) -> None:
        """The TLS handshake has succeeded. All that was negotiated before it is forgotten."""
        assert self.state is State.TLS
        self._is_tls = True
        self._forget()
        self.state = State.OPTIONS

    # Framing.

    def _take_flags(self) -> None:
        flags = _CLIENT_FLAGS.unpack_from(self.rest)[0]
        del self.rest[:_CLIENT_FLAGS.size]
        if flags & ~(c.FLAG_C_FIXED_NEWSTYLE | c.FLAG_C_NO_ZEROES):
            self._drop(f"unknown client flags {flags:#x}")
            return
        self._fixed = bool(flags & c.FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & c.FLAG_C_NO_ZEROES)
        self.state = State.OPTIONS

    def _take_option(self) -> bool:
        """Handle one option, or skip a part of one. False: more bytes are needed."""
        if self._skip:
            skipped = min(self._skip, len(self.rest))
            del self.rest[:skipped]
            self._skip -= skipped
            if self._skip:
                return False
        if len(self.rest) < _OPTION.size:
            return False
        magic, option, size = _OPTION.unpack_from(self.rest)
        if magic != c.OPTION_MAGIC:
            return self._drop(f"option with magic {magic:#018x}")
        too_big = size > MAX_OPTION
        if size > MAX_SKIP or (too_big and option == c.OPT_EXPORT_NAME):
            return self._drop(f"option {option} with {size} bytes of data")
        if not too_big and len(self.rest) < _OPTION.size + size:
            return False
        self._count += 1
        if self._count > MAX_OPTIONS:
            return self._drop(f"more than {MAX_OPTIONS} options")
        data = bytes(self.rest[_OPTION.size:_OPTION.size + size]) if not too_big else None
        del self.rest[:_OPTION.size + (0 if too_big else size)]
        self._skip = size if too_big else 0
        self._dispatch(option, data)
        return True

    def _dispatch(self, option: int, data: bytes | None) -> None:
        """Look the option up and run its handler. ``data`` is None if it was too big to take."""
        rule = _RULES.get(option)
        try:
            self._check(option, rule, data)
            assert rule is not None
            assert data is not None
            handler: Callable[[int, bytes], None] = getattr(self, rule.handler)
            handler(option, data)
        except Refused as refused:
            if option == c.OPT_EXPORT_NAME:
                self._drop(f"EXPORT_NAME: {refused.message}")
            else:
                self._reply(option, refused.reply, refused.message.encode())

    def _check(self, option: int, rule: _Rule | None, data: bytes | None) -> None:
        if not self._fixed and option != c.OPT_EXPORT_NAME:
            self._drop(f"option {option} without fixed newstyle")
            raise Refused(c.REP_ERR_INVALID, "fixed newstyle was not negotiated")
        if self._tls_mode == "required" and not self._is_tls and not (rule and rule.before_tls):
            raise Refused(c.REP_ERR_TLS_REQD, "this server requires TLS")
        if self.shutting_down and not (rule and rule.in_shutdown):
            raise Refused(c.REP_ERR_SHUTDOWN, "the server is shutting down")
        if rule is None:
            raise Refused(c.REP_ERR_UNSUP, f"option {option} is not known")
        if data is None:
            raise Refused(c.REP_ERR_TOO_BIG, f"an option may have at most {MAX_OPTION} bytes of data")
        if data and not rule.takes_data:
            raise Refused(c.REP_ERR_INVALID, "this option has no data")

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        if self.state is not State.CLOSED:
            self._events.append(Send(_OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, option, reply, len(data)) + data))

    def _drop(self, why: str) -> bool:
        self.state = State.CLOSED
        self._events.append(Close(ProtocolError(why)))
        return False

    # One handler for each option.

    def _abort(self, option: int, data: bytes) -> None:
        self._reply(option, c.REP_ACK)
        self.state = State.CLOSED
        self._events.append(Close())

    def _starttls(self, option: int, data: bytes) -> None:
        if self._is_tls:
            raise Refused(c.REP_ERR_INVALID, "TLS is on already")
        if self._tls_mode == "off":
            raise Refused(c.REP_ERR_POLICY, "this server has no TLS")
        if self.rest:
            # Whatever came before TLS began may have been put there by somebody on the path.
            self._drop("bytes after STARTTLS, before its reply")
            return
        self._reply(option, c.REP_ACK)
        self.state = State.TLS
        self._events.append(StartTls())

    def _list(self, option: int, data: bytes) -> None:
        for export in self._exports.list():
            name = export.name.encode()
            self._reply(option, c.REP_SERVER, _U32.pack(len(name)) + name + export.description.encode())
        self._reply(option, c.REP_ACK)

    def _structured_reply(self, option: int, data: bytes) -> None:
        if self._extended:
            raise Refused(c.REP_ERR_EXT_HEADER_REQD, "extended headers were negotiated")
        self._structured = True
        self._reply(option, c.REP_ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        self._structured = self._extended = True
        self._reply(option, c.REP_ACK)

    def _export_name(self, option: int, data: bytes) -> None:
        if self._extended:
            raise Refused(c.REP_ERR_INVALID, "extended headers need GO")
        export = self._find(parse_text(data))
        answer = _EXPORT.pack(export.length, self._flags(export, option))
        self._events.append(Send(answer if self._no_zeroes else answer + bytes(124)))
        self._begin(export)

    def _go(self, option: int, data: bytes) -> None:
        export = self._info(option, data)
        self._begin(export)

    def _info(self, option: int, data: bytes) -> E:
        name, wanted = parse_info(data)
        export = self._find(name)
        self._reply(option, c.REP_INFO, _INFO_EXPORT.pack(c.INFO_EXPORT, export.length, self._flags(export, option)))
        if c.INFO_NAME in wanted:
            self._reply(option, c.REP_INFO, _U16.pack(c.INFO_NAME) + export.name.encode())
        if c.INFO_DESCRIPTION in wanted and export.description:
            self._reply(option, c.REP_INFO, _U16.pack(c.INFO_DESCRIPTION) + export.description.encode())
        if c.INFO_BLOCK_SIZE in wanted:
            self._reply(option, c.REP_INFO, _INFO_BLOCK_SIZE.pack(c.INFO_BLOCK_SIZE, *export.block_sizes))
        self._reply(option, c.REP_ACK)
        return export

    def _list_meta_context(self, option: int, data: bytes) -> None:
        export, queries = self._parse_contexts(data)
        for name in export.context_names():
            if not queries or any(matches(name, query) for query in queries):
                self._reply(option, c.REP_META_CONTEXT, _U32.pack(0) + name.encode())
        self._reply(option, c.REP_ACK)

    def _set_meta_context(self, option: int, data: bytes) -> None:
        self._contexts_of, self._contexts = None, ()
        export, queries = self._parse_contexts(data)
        self._contexts_of = export
        self._contexts = tuple(name for name in export.context_names() if name in queries)
        for number, name in enumerate(self._contexts):
            self._reply(option, c.REP_META_CONTEXT, _U32.pack(number) + name.encode())
        self._reply(option, c.REP_ACK)

    # What the handlers share.

    def _find(self, name: str) -> E:
        export = self._exports.find(name)
        if export is None:
            raise Refused(c.REP_ERR_UNKNOWN, f"there is no export named '{name}'")
        return export

    def _flags(self, export: E, option: int) -> int:
        flags = export.flags | c.FLAG_HAS_FLAGS
        if self._structured:
            flags |= c.FLAG_SEND_DF
        if self._extended and (option == c.OPT_INFO or (self._contexts_of is export and self._contexts)):
            flags |= c.FLAG_BLOCK_STATUS_PAYLOAD
        return flags

    def _begin(self, export: E) -> None:
        self.state = State.TRANSMISSION
        contexts = self._contexts if self._contexts_of is export else ()
        self._events.append(Go(export, self._structured, self._extended, contexts))

    def _parse_contexts(self, data: bytes) -> tuple[E, list[str]]:
        if not self._structured:
            raise Refused(c.REP_ERR_INVALID, "metadata contexts need structured replies or extended headers")
        name, queries = parse_queries(data)
        return self._find(name), queries
