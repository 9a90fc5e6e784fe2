"""One QMP connection as a state machine that sees no socket.

    NEGOTIATING ──qmp_capabilities──► COMMANDS

The server sends `Session.greeting`, feeds what it receives, and asks for `next()`: either a `Reply`, bytes to be
sent as they are (errors in the input, the answer to the negotiation), or a `Call`, a command with its arguments
checked, whose result the server encodes with `Call.succeeded` or `Call.failed`. Replies and calls come in the
order of the requests and must be answered in it, except calls that are ``oob``: those are to be run at once.

In NEGOTIATING every command but ``qmp_capabilities`` is refused with CommandNotFound, and in COMMANDS that one
is. Events are for peers in COMMANDS only; `Reply.opens` marks the reply behind which they may begin.

What is refused before a command is looked up, with GenericError: input that is no JSON, or no object; unknown
members; no ``execute``; a name that is no string; arguments that are no object. ``id`` is echoed whenever the
input was an object.

Source: QMP specification, sections "Server Greeting", "Capabilities", "Issuing Commands", "Out-of-band
execution".
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, Raw

from blockstep.qmp import wire
from blockstep.qmp.errors import CommandError, describe
from blockstep.qmp.schema import Arguments, Command

NEGOTIATE: Final = "qmp_capabilities"
OOB: Final = "oob"


class State(Enum):
    """Where a connection is."""

    NEGOTIATING = "negotiating"
    COMMANDS = "commands"


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    execute: Any = UNSET
    exec_oob: Any = msgspec.field(name="exec-oob", default=UNSET)
    arguments: Raw | msgspec.UnsetType = UNSET
    id: Any = UNSET


class Negotiation(Arguments):
    """Arguments of qmp_capabilities."""

    enable: list[Literal["oob"]] = msgspec.field(default_factory=list)


class Reply(msgspec.Struct, frozen=True):
    """Bytes to send. ``opens``: from here on the peer may get events."""

    data: bytes
    opens: bool = False


class Call(msgspec.Struct, frozen=True):
    """A command to run. ``oob``: at once, before what is queued."""

    command: Command
    args: Any
    id: Any
    oob: bool

    def succeeded(self, result: Any) -> bytes:
        """The reply. Raises what msgspec raises when the result cannot be encoded."""
        return wire.encode_return(result, self.id)

    def failed(self, error: BaseException) -> bytes:
        """The reply for an error that the command raised."""
        return wire.encode_error(*describe(error), self.id)


async def _negotiate(context: object, args: Negotiation) -> None:
    """Choose capabilities and enter command mode."""


#: So that it is checked and listed like any other.
NEGOTIATION: Final = Command(NEGOTIATE, _negotiate)

#: What decoding raises for text that is no JSON (the text may also be no UTF-8, or nest beyond Python's limit).
_NO_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_decode_request = msgspec.json.Decoder(_Request).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode


class Session:
    """The server's side of one connection.

    ``commands`` is what this peer may execute, ``version`` the greeting's, ``capabilities`` what it may enable.
    """

    def __init__(self, commands: Mapping[str, Command], version: Any = None,
                 capabilities: tuple[str, ...] = (OOB,), splitter: wire.Splitter | None = None) -> None:
        self.state = State.NEGOTIATING
        self.enabled: frozenset[str] = frozenset()
        self.greeting = wire.encode_greeting(version if version is not None else {}, capabilities)
        self._commands, self._capabilities = commands, capabilities
        self._splitter = splitter or wire.Splitter()

    @property
    def buffered(self) -> int:
        """Bytes received and not asked for yet."""
        return self._splitter.buffered

    def feed(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self._splitter.feed(data)

    def next(self) -> Call | Reply | None:
        """The next thing to do, or None until more bytes come."""
        text = self._splitter.next()
        if text is None:
            return None
        if isinstance(text, wire.Malformed):
            return Reply(wire.encode_error("GenericError", text.reason))
        try:
            request = _parse(text)
        except _BadRequest as error:
            return Reply(wire.encode_error(error.error_class, error.description, error.id))
        try:
            return self._dispatch(request)
        except CommandError as error:
            return Reply(wire.encode_error(error.error_class, error.description, request.id))

    def _dispatch(self, request: _Request) -> Call | Reply:
        oob = request.exec_oob is not UNSET
        if oob and OOB not in self.enabled:
            raise CommandError("'exec-oob' is not possible: the capability 'oob' was not enabled")
        name = request.exec_oob if oob else request.execute
        if self.state is State.NEGOTIATING:
            return self._negotiate(request)
        command = self._commands.get(name)
        if name == NEGOTIATE and not oob:
            NEGOTIATION.decode(_arguments(request))  # wrong arguments are the first thing wrong with it
            raise CommandError("the capabilities have been negotiated already", "CommandNotFound")
        if command is None:
            raise CommandError(f"there is no command '{name}' here", "CommandNotFound")
        if oob and not command.oob:
            raise CommandError(f"command '{name}' cannot be executed out of band")
        return Call(command, command.decode(_arguments(request)), request.id, oob)

    def _negotiate(self, request: _Request) -> Reply:
        if request.execute != NEGOTIATE:
            raise CommandError(f"the connection is still in capabilities negotiation: send '{NEGOTIATE}' first",
                               "CommandNotFound")
        enable = NEGOTIATION.decode(_arguments(request)).enable
        for capability in enable:
            if capability not in self._capabilities:
                raise CommandError(f"argument 'enable': the capability '{capability}' is not offered")
        self.enabled = frozenset(enable)
        self.state = State.COMMANDS
        return Reply(wire.encode_return(None, request.id), opens=True)


def _arguments(request: _Request) -> bytes | Raw:
    return b"{}" if request.arguments is UNSET else request.arguments


class _BadRequest(CommandError):
    """A request whose shape is wrong; the id is there if one could be found."""

    def __init__(self, description: str, identity: Any = UNSET) -> None:
        super().__init__(description)
        self.id = identity


def _parse(text: bytes) -> _Request:
    """A request whose shape is right. Raises _BadRequest."""
    try:
        request = _decode_request(text)
    except msgspec.ValidationError:
        raise _bad(text) from None
    except _NO_JSON:
        if (quoted := wire.requote(text)) == text:
            raise _BadRequest("the input is no valid JSON") from None
        try:
            request = _decode_request(quoted)
        except msgspec.ValidationError:
            raise _bad(quoted) from None
        except _NO_JSON:
            raise _BadRequest("the input is no valid JSON") from None
    if (fault := _fault(request)) is not None:
        raise _BadRequest(fault, request.id)
    return request


def _bad(text: bytes) -> _BadRequest:
    """What is wrong with a text that is JSON but no request."""
    try:
        members = _decode_object(text)
    except (*_NO_JSON, msgspec.ValidationError) as error:
        return _BadRequest(f"this is no request: {error}" if text[:1] == b"{" else "a request must be a JSON object")
    unknown = sorted(set(members) - {"execute", "exec-oob", "arguments", "id"})
    return _BadRequest(f"a request has no member '{unknown[0]}'" if unknown else "this is no request",
                       members.get("id", UNSET))


def _fault(request: _Request) -> str | None:
    name = request.execute
    if request.exec_oob is not UNSET:
        if name is not UNSET:
            return "a request has either 'execute' or 'exec-oob', not both"
        name = request.exec_oob
    if name is UNSET:
        return "a request needs the member 'execute'"
    if not isinstance(name, str):
        return "the name of the command must be a string"
    if isinstance(request.arguments, Raw) and not bytes(request.arguments).startswith(b"{"):
        return "the value of 'arguments' must be an object"
    return None
