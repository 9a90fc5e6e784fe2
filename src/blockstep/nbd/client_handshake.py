"""The client's half of the handshake: bytes in, bytes out, no socket.

A client drives the haggling: one option at a time, each answered to its end before the next. So the handshake is
written as what it is, a script, and the two scripts of this module are its table of states:

    open an export                             list exports
    ──────────────                             ────────────
    greeting                                   greeting
    STARTTLS            unless TLS is off      STARTTLS          unless TLS is off
    EXTENDED_HEADERS    if not: ▼              LIST
    STRUCTURED_REPLY    if not: simple         STRUCTURED_REPLY
    SET_META_CONTEXT    if contexts wanted     INFO, LIST_META_CONTEXT     of each
    GO                  if not: ▼              ABORT
    EXPORT_NAME         no sizes, no reasons

A server of any age will do, as long as it speaks the newstyle handshake: each step that it does not know is
skipped. What cannot be had otherwise is an error: TLS where it is required, the export itself.

`ClientHandshake` runs a script. Its owner calls `receive` with what came and sends what that returns, until
`state` is not HAGGLING any more:

    HAGGLING ──► STARTING_TLS ── owner upgrades the socket, tls_started() ──► HAGGLING ──► DONE: `result`

Bytes that come where the protocol has none (behind the answer to STARTTLS: an injection; behind the end) break
the protocol. Every reply is bounded, so that no server can fill our memory.

Errors: ProtocolError, the peer broke the protocol: drop the connection. PeerRefused, it said no: send `ABORT`,
then drop it.

Source: proto.md, "Handshake phase", "TLS support", "Option types".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterable, Sequence
from enum import Enum
from typing import Final, Generic, TypeAlias, TypeVar

import msgspec

from blockstep.errors import OptionError, PeerRefused, ProtocolError
from blockstep.nbd import constants as c

T = TypeVar("T")

#: The longest option reply that we read, in bytes: far more than any that the protocol describes.
MAX_REPLY: Final = 64 << 10
#: The most replies to one option.
MAX_REPLIES: Final = 10_000
#: The most bytes in all replies to one option.
MAX_ANSWER: Final = 16 << 20

_GREETING: Final = struct.Struct(">QQ")
_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_LENGTH: Final = struct.Struct(">I")
_EXPORT: Final = struct.Struct(">QH")
_BLOCK_SIZE: Final = struct.Struct(">III")

#: What a client sends before it leaves a handshake that it does not finish.
ABORT: Final = _OPTION.pack(c.OPTION_MAGIC, c.OPT_ABORT, 0)

_REASONS: Final = {
    c.REP_ERR_UNSUP: "it does not know the option",
    c.REP_ERR_POLICY: "its policy forbids it",
    c.REP_ERR_INVALID: "it calls the request invalid",
    c.REP_ERR_PLATFORM: "its platform lacks it",
    c.REP_ERR_TLS_REQD: "it requires TLS",
    c.REP_ERR_UNKNOWN: "it has no such export",
    c.REP_ERR_SHUTDOWN: "it is shutting down",
    c.REP_ERR_BLOCK_SIZE_REQD: "it requires the client to honour its block sizes",
    c.REP_ERR_TOO_BIG: "the request or the answer is too big",
    c.REP_ERR_EXT_HEADER_REQD: "it requires extended headers",
}


class TlsMode(Enum):
    """What a client does about TLS."""

    OFF = "off"  #: never ask for it
    OPTIONAL = "optional"  #: ask, and go on in the clear if the server has none: open to a downgrade
    REQUIRED = "required"  #: refuse a server without it


class HandshakeState(Enum):
    """Whose turn it is."""

    HAGGLING = "haggling"  #: the server's: feed what comes to `ClientHandshake.receive`
    STARTING_TLS = "starting-tls"  #: the owner's: upgrade the socket, then `ClientHandshake.tls_started`
    DONE = "done"  #: `ClientHandshake.result` is there


class ExportInfo(msgspec.Struct):
    """What a server says about an export."""

    name: str
    #: Bytes.
    size: int = 0
    #: Transmission flags, ``constants.FLAG_*``.
    flags: int = 0
    description: str = ""
    #: Requests must be aligned to this; a power of 2, at most 64 KiB.
    minimum_block: int = 1
    #: Requests aligned to this are efficient.
    preferred_block: int = 4096
    #: The longest read or write.
    maximum_payload: int = c.MAX_PAYLOAD
    #: Metadata contexts: the id of each that was selected; 0 for all when they were only listed.
    contexts: dict[str, int] = msgspec.field(default_factory=dict)
    #: Replies come in chunks (always so with extended headers).
    structured: bool = False
    extended: bool = False
    tls: bool = False


class _StartTls:
    """What a script yields instead of a byte count when the socket is to be upgraded."""


_START_TLS: Final = _StartTls()
#: Yields how many bytes it wants and is sent them; returns the result.
Script: TypeAlias = Generator[int | _StartTls, bytes, T]


class ClientHandshake(Generic[T]):
    """Runs one of the scripts: ``ClientHandshake(lambda send: open_export(send, "disk"))``."""

    def __init__(self, script: Callable[[Callable[[bytes], None]], Script[T]]) -> None:
        self.state = HandshakeState.HAGGLING
        self._result: T | None = None
        self._received = bytearray()
        self._outgoing: list[bytes] = []
        self._script = script(self._outgoing.append)
        self._wanted = 0
        self._step(None)

    @property
    def result(self) -> T:
        """What the script returned. Only in state DONE."""
        assert self.state is HandshakeState.DONE
        return self._result  # type: ignore[return-value]

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take what came from the server, in pieces of any size. Returns what is to be sent now, maybe nothing.

        Raises ProtocolError or PeerRefused; the handshake is over then.
        """
        assert self.state is HandshakeState.HAGGLING
        received = self._received
        received += data
        while self.state is HandshakeState.HAGGLING and len(received) >= self._wanted:
            piece = bytes(received[:self._wanted])
            del received[:self._wanted]
            self._step(piece)
        if received and self.state is not HandshakeState.HAGGLING:
            raise ProtocolError(f"the server sent {len(received)} bytes where it has nothing to say")
        return self._take_outgoing()

    def tls_started(self) -> bytes:
        """The socket is encrypted now. Returns what is to be sent next."""
        assert self.state is HandshakeState.STARTING_TLS
        self.state = HandshakeState.HAGGLING
        self._step(b"")
        return self._take_outgoing()

    def _step(self, piece: bytes | None) -> None:
        try:
            wanted = next(self._script) if piece is None else self._script.send(piece)
        except StopIteration as stop:
            self._result = stop.value
            self.state = HandshakeState.DONE
            return
        if isinstance(wanted, _StartTls):
            self.state = HandshakeState.STARTING_TLS
        else:
            self._wanted = wanted

    def _take_outgoing(self) -> bytes:
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        return data


def open_export(send: Callable[[bytes], None], name: str, *, tls: TlsMode = TlsMode.OFF,
                contexts: Sequence[str] = (), structured: bool = True, extended: bool = True,
                ) -> Script[ExportInfo]:
    """The script that ends in the transmission phase of export ``name``.

    ``contexts`` are the metadata contexts to select (those that the server lacks are missing in the result);
    ``structured`` and ``extended`` say what to ask for. Raises OptionError for a name that the protocol cannot
    carry, in the constructor of the handshake.
    """
    haggler = _Haggler(send)
    encode_string(name)
    for context in contexts:
        encode_string(context)
    info = ExportInfo(name)
    yield from haggler.greet()
    info.tls = yield from haggler.start_tls(tls)
    if haggler.fixed:
        if extended:
            info.extended = yield from haggler.ask(c.OPT_EXTENDED_HEADERS)
        info.structured = info.extended
        if structured and not info.extended:
            info.structured = yield from haggler.ask(c.OPT_STRUCTURED_REPLY)
        if contexts and info.structured:
            info.contexts = yield from haggler.set_contexts(name, contexts)
        went = yield from haggler.get_info(c.OPT_GO, info)
    else:
        went = False
    if not went:
        if info.extended:
            raise ProtocolError("the server has extended headers but no GO")
        yield from haggler.export_name(info)
    if info.size % info.minimum_block:
        raise PeerRefused(f"the size of export '{name}', {info.size} bytes, is no multiple of its minimum block "
                          f"size, {info.minimum_block} bytes: its end could not be reached")
    return info


def list_exports(send: Callable[[bytes], None], *, tls: TlsMode = TlsMode.OFF,
                 details: bool = True) -> Script[list[ExportInfo]]:
    """The script that lists the exports of a server and says good-bye.

    With ``details``, each export is asked for its size, flags and metadata contexts; one that the server does
    not tell about (it may have gone meanwhile, or need TLS) keeps flags 0.
    """
    haggler = _Haggler(send)
    yield from haggler.greet()
    in_tls = yield from haggler.start_tls(tls)
    if not haggler.fixed:
        raise PeerRefused("the server's handshake is too old to list exports")
    exports = yield from haggler.list_names()
    structured = details and (yield from haggler.ask(c.OPT_STRUCTURED_REPLY))
    for export in exports if details else ():
        export.tls = in_tls
        try:
            yield from haggler.get_info(c.OPT_INFO, export)
            if structured:
                export.contexts = yield from haggler.list_contexts(export.name)
        except PeerRefused:
            export.flags = 0
    send(ABORT)
    return exports


class _Haggler:
    """The steps of the scripts."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        #: The server speaks the fixed newstyle handshake: it knows options beside EXPORT_NAME.
        self.fixed = False
        self._zeroes = True

    def greet(self) -> Script[None]:
        magic, style = _GREETING.unpack((yield _GREETING.size))
        if magic != c.INIT_MAGIC:
            raise ProtocolError("the peer is no NBD server: its greeting does not begin with NBDMAGIC")
        if style == c.OLDSTYLE_MAGIC:
            raise PeerRefused("the server offers only the oldstyle handshake, which has no export names, no "
                              "options and no errors; blockstep needs the newstyle one (nbd-server since 2.9)")
        if style != c.OPTION_MAGIC:
            raise ProtocolError(f"the server's greeting has the unknown style {style:#x}")
        flags = int.from_bytes((yield 2), "big")
        self.fixed = bool(flags & c.FLAG_FIXED_NEWSTYLE)
        self._zeroes = not flags & c.FLAG_NO_ZEROES
        self._send(_LENGTH.pack((c.FLAG_C_FIXED_NEWSTYLE if self.fixed else 0)
                                | (0 if self._zeroes else c.FLAG_C_NO_ZEROES)))

    def start_tls(self, mode: TlsMode) -> Script[bool]:
        if mode is TlsMode.OFF:
            return False
        refusal = None
        if not self.fixed:
            refusal = "its handshake is too old"
        else:
            try:
                yield from self._simple(c.OPT_STARTTLS)
            except _Refusal as error:
                refusal = error.reason
        if refusal is None:
            yield _START_TLS
            return True
        if mode is TlsMode.REQUIRED:
            raise PeerRefused(f"the server refuses TLS, which is required: {refusal}")
        return False

    def ask(self, option: int) -> Script[bool]:
        """An option without data. Returns whether the server agreed."""
        try:
            yield from self._simple(option)
        except _Refusal as error:
            if error.kind == c.REP_ERR_TLS_REQD:
                raise PeerRefused("the server requires TLS") from None
            return False
        return True

    def list_names(self) -> Script[list[ExportInfo]]:
        exports = []
        try:
            for kind, data in (yield from self._option(c.OPT_LIST)):
                if kind != c.REP_SERVER:
                    raise _unexpected(c.OPT_LIST, kind)
                name, rest = _take_string(data)
                exports.append(ExportInfo(_text(name), description=_text(rest)))
        except _Refusal as error:
            raise PeerRefused(f"the server does not list its exports: {error.reason}") from None
        return exports

    def set_contexts(self, name: str, contexts: Sequence[str]) -> Script[dict[str, int]]:
        try:
            selected = yield from self._contexts(c.OPT_SET_META_CONTEXT, name, contexts)
        except _Refusal:
            return {}
        result: dict[str, int] = {}
        for identifier, context in selected:
            if context in result or identifier in result.values():
                raise ProtocolError(f"the server selected metadata context '{context}' twice")
            if context in contexts:
                result[context] = identifier
        return result

    def list_contexts(self, name: str) -> Script[dict[str, int]]:
        try:
            return {context: 0 for _, context in (yield from self._contexts(c.OPT_LIST_META_CONTEXT, name, ()))}
        except _Refusal:
            return {}

    def _contexts(self, option: int, name: str, contexts: Sequence[str]) -> Script[list[tuple[int, str]]]:
        data = _string(name) + _LENGTH.pack(len(contexts)) + b"".join(map(_string, contexts))
        result = []
        for kind, reply in (yield from self._option(option, data)):
            if kind != c.REP_META_CONTEXT or len(reply) < 4:
                raise _unexpected(option, kind)
            result.append((_LENGTH.unpack_from(reply)[0], _text(reply[4:])))
        return result

    def get_info(self, option: int, info: ExportInfo) -> Script[bool]:
        """INFO or GO: fill in ``info``. False: the server does not know the option."""
        requests = struct.pack(">HHHH", 3, c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE)
        wanted = info.name
        try:
            replies = yield from self._option(option, _string(wanted) + requests)
        except _Refusal as error:
            if error.kind == c.REP_ERR_UNSUP:
                return False
            raise PeerRefused(f"the server does not open export '{wanted}': {error.reason}") from None
        seen = set()
        for kind, data in replies:
            if kind != c.REP_INFO or len(data) < 2:
                raise _unexpected(option, kind)
            what = int.from_bytes(data[:2], "big")
            seen.add(what)
            _read_info(info, what, data[2:])
        if c.INFO_EXPORT not in seen:
            raise ProtocolError(f"the server opened export '{wanted}' without telling its size")
        return True

    def export_name(self, info: ExportInfo) -> Script[None]:
        name = encode_string(info.name)
        self._send(_OPTION.pack(c.OPTION_MAGIC, c.OPT_EXPORT_NAME, len(name)) + name)
        _read_info(info, c.INFO_EXPORT, (yield _EXPORT.size))
        if self._zeroes:
            yield 124

    def _simple(self, option: int) -> Script[None]:
        for kind, _ in (yield from self._option(option)):
            raise _unexpected(option, kind)

    def _option(self, option: int, data: bytes = b"") -> Script[Iterable[tuple[int, bytes]]]:
        """Send an option. Returns its replies but the final ACK, or raises _Refusal for a final error."""
        self._send(_OPTION.pack(c.OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        total = 0
        while True:
            magic, answered, kind, length = _REPLY.unpack((yield _REPLY.size))
            if magic != c.OPTION_REPLY_MAGIC:
                raise ProtocolError(f"an option reply begins with {magic:#x}")
            if answered != option:
                raise ProtocolError(f"the server answers option {answered}; option {option} was sent")
            total += length
            if length > MAX_REPLY or total > MAX_ANSWER:
                raise ProtocolError(f"an option reply of {length} bytes, of {total} in all")
            payload = (yield length) if length else b""
            if kind & c.REP_FLAG_ERROR:
                raise _Refusal(kind, payload)
            if kind == c.REP_ACK:
                if length:
                    raise ProtocolError("an ACK with data")
                return replies
            replies.append((kind, payload))
            if len(replies) > MAX_REPLIES:
                raise ProtocolError(f"more than {MAX_REPLIES} replies to one option")


class _Refusal(Exception):
    """An option ended in an error reply; the scripts decide what that means."""

    def __init__(self, kind: int, message: bytes) -> None:
        self.kind = kind
        self.reason = _REASONS.get(kind, f"error {kind & ~c.REP_FLAG_ERROR}")
        if message:
            self.reason += f" ({message[:c.MAX_STRING].decode('utf-8', 'replace')})"
        super().__init__(self.reason)


def _read_info(info: ExportInfo, what: int, data: bytes) -> None:
    if what == c.INFO_EXPORT:
        _need(len(data) == _EXPORT.size, "export")
        info.size, info.flags = _EXPORT.unpack(data)
        _need(info.size < 1 << 63, "size")
    elif what == c.INFO_NAME:
        info.name = _text(data)
    elif what == c.INFO_DESCRIPTION:
        info.description = _text(data)
    elif what == c.INFO_BLOCK_SIZE:
        _need(len(data) == _BLOCK_SIZE.size, "block size")
        minimum, preferred, maximum = _BLOCK_SIZE.unpack(data)
        _need(0 < minimum <= 65536 and minimum & minimum - 1 == 0, "minimum block size")
        _need(preferred >= minimum and preferred & preferred - 1 == 0, "preferred block size")
        _need(maximum >= minimum, "maximum payload")
        info.minimum_block, info.preferred_block = minimum, preferred
        info.maximum_payload = min(maximum, c.MAX_PAYLOAD) & -minimum


def encode_string(text: str) -> bytes:
    """A string of the protocol in UTF-8. Raises OptionError if it is too long or has a NUL."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = b"\0"
    if len(data) > c.MAX_STRING or b"\0" in data:
        raise OptionError("export", text, f"at most {c.MAX_STRING} bytes of UTF-8 without a NUL")
    return data


def _string(text: str) -> bytes:
    data = encode_string(text)
    return _LENGTH.pack(len(data)) + data


def _take_string(data: bytes) -> tuple[bytes, bytes]:
    _need(len(data) >= 4, "string")
    end = 4 + _LENGTH.unpack_from(data)[0]
    _need(end <= len(data), "string")
    return data[4:end], data[end:]


def _text(data: bytes) -> str:
    _need(len(data) <= c.MAX_STRING, "string")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError("the server sent a string that is no UTF-8") from None


def _need(good: bool, what: str) -> None:
    if not good:
        raise ProtocolError(f"the server told an impossible {what}")


def _unexpected(option: int, kind: int) -> ProtocolError:
    return ProtocolError(f"the server answered option {option} with a reply of the wrong kind or size ({kind:#x})")
