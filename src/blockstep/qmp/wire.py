"""QMP on the wire: a byte stream into JSON texts, and values into lines.

QMP frames nothing. A request ends where its outermost brace closes: it may span lines, and several may stand on
one line. So the stream is split by a small lexer, not by lines:

    b'{"execute":\\n "stop"}{"exe'  ──►  b'{"execute":\\n "stop"}', and the rest waits

`Splitter` only finds where values end and where the input cannot be JSON any more; whether the text between is
a valid request is the session's matter. It is incremental: nothing is scanned twice, however small the pieces
that arrive are, and it gives out one value at a time, so that whoever is busy leaves the rest as bytes.

Malformed input costs the peer one `Malformed` each and never the connection. How the stream gets in step again
was measured on QEMU 7.2 (the tests compare the two):

- a byte that no JSON token can contain here (a control character in a string, an upper-case letter, 0xFE, 0xFF)
  drops the value that was begun; what follows is skipped up to the next line or structural character;
- 0xFF always has that effect: a client that has lost its place sends it, and ignores the error;
- brackets that close what was never opened end a value at once; so does every scalar outside brackets;
- beyond `max_bytes` or `max_depth` (our limits, below QEMU's) the value is dropped and the rest of the line too.

Two extensions of QEMU's input are accepted because its documentation and scripts use them: strings in single
quotes, and the escape ``\\'``; `requote` turns them into JSON. Output is pure ASCII, one value a line, ended by
CR LF. Left out on purpose: duplicate members are not refused (the last one counts). Where QEMU's lexer is not JSON's
(``0e1`` is two values to it) we keep to JSON.

Source: QMP specification (docs/interop/qmp-spec), sections "General definitions" and "Error".
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any, Final

import msgspec

#: The longest request that a peer may send, in bytes.
MAX_BYTES: Final = 1 << 20
#: How deep a request may nest. Half of Python's default recursion limit, so that decoding it cannot hit that.
MAX_DEPTH: Final = 256
#: The longest number or keyword, in bytes.
_MAX_SCALAR: Final = 1024

_IN_STRING: Final = rb"\x00-\x1f\xfe\xff\\"
_BODY: Final = {
    ord('"'): re.compile(rb'(?:[^"' + _IN_STRING + rb"]++|\\[^\x00-\x1f\xfe\xff])*+"),
    ord("'"): re.compile(rb"(?:[^'" + _IN_STRING + rb"]++|\\[^\x00-\x1f\xfe\xff])*+"),
}
_STRING: Final = rb'"' + _BODY[ord('"')].pattern + rb'"'
_WORD: Final = rb"[a-z]++(?=[^a-z])"
_NUMBER: Final = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+(?=[^0-9.eE])"
#: Everything inside brackets that is neither a bracket nor cut off by the end of the buffer, in one stride.
_QUIET: Final = re.compile(rb"(?:[ \t\r\n,:]++|" + _STRING + rb"|" + _WORD + rb"|" + _NUMBER + rb")*+")
_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_SCALAR: Final = re.compile(rb"[a-z]++|-?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+)?+(?:(?<=[0-9])[eE][+-]?[0-9]*+)?+)?+")
_WHOLE_NUMBER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
#: Where skipping after a lexical error ends: a structural character, or a byte that is none of the text.
_RECOVERY: Final = re.compile(rb"(?:[^{}\[\],:\x00-\x1f\xfe\xff]|\t)*+")
_LINE: Final = re.compile(rb"[^\n\xff]*+")
_QUOTED: Final = re.compile(_STRING + rb"|'" + _BODY[ord("'")].pattern + rb"'")
_QUOTE: Final = re.compile(rb"\\.|\"", re.DOTALL)

_OPEN: Final = frozenset(b"{[")
_CLOSE: Final = frozenset(b"}]")


class Malformed(msgspec.Struct, frozen=True):
    """Input that is no JSON. ``reason`` is a sentence for the peer; the stream goes on behind it."""

    reason: str


class _Step(Enum):
    """What came of one token."""

    GO = 0  # the value goes on
    WAIT = 1  # more bytes are needed
    END = 2  # the value ends here


class Splitter:
    """Cuts a byte stream into the texts of JSON values.

    Memory: at most ``max_bytes`` of an unfinished value, plus what was fed and not yet asked for.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> None:
        self.max_bytes, self.max_depth = max_bytes, max_depth
        self._buffer = bytearray()
        self._start = 0  # of the value that was begun
        self._at = 0  # up to here the buffer has been scanned
        self._braces = self._brackets = 0  # open ones
        self._quote = 0  # inside a string that this byte ends
        self._skip: re.Pattern[bytes] | None = None  # after an error: what to pass over

    @property
    def buffered(self) -> int:
        """Bytes that were fed and are not part of a value given out yet."""
        return len(self._buffer) - self._start

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes of the stream; any split is fine."""
        if self._start:
            del self._buffer[: self._start]
            self._at -= self._start
            self._start = 0
        self._buffer += data

    def next(self) -> bytes | Malformed | None:
        """The next value's text, or what is wrong with the input, or None when more bytes are needed.

        The text of a value has its brackets balanced in number, but may still be no JSON.
        """
        while self._skip is None or self._skipped(self._skip):
            if self._quote:
                found = self._in_string()
            elif self._braces or self._brackets:
                self._at = _QUIET.match(self._buffer, self._at).end()  # type: ignore[union-attr]
                found = self._token()
            else:
                self._start = self._at = _SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
                found = self._token()
            if self._at - self._start > self.max_bytes:
                self._at = self._start + self.max_bytes
                found = self._limit(f"the request is longer than {self.max_bytes} bytes")
            if found is _Step.WAIT:
                return None
            if found is not _Step.GO:
                return self._taken(found)
        return None

    def _skipped(self, pattern: re.Pattern[bytes]) -> bool:
        """Pass over input after an error. Returns whether its end has been found."""
        self._at = self._start = pattern.match(self._buffer, self._at).end()  # type: ignore[union-attr]
        if self._at == len(self._buffer):
            return False
        self._skip = None
        if pattern is _LINE:
            self._at = self._start = self._at + 1  # the newline; a 0xFF has done its work here
        return True

    def _token(self) -> _Step | Malformed:
        """One token at the scan position."""
        buffer, at = self._buffer, self._at
        if at == len(buffer):
            return _Step.WAIT
        byte = buffer[at]
        if byte in _OPEN:
            self._count(byte, 1)
            self._at = at + 1
            if self._braces + self._brackets > self.max_depth:
                return self._limit(f"the request nests deeper than {self.max_depth} levels")
            return _Step.GO
        if byte in _CLOSE:
            self._count(byte, -1)
            self._at = at + 1
            done = min(self._braces, self._brackets) < 0 or not (self._braces or self._brackets)
            return _Step.END if done else _Step.GO
        if byte in b",:":  # inside brackets _QUIET has taken them
            self._at = at + 1
            return _Step.END
        if byte in _BODY:
            self._quote, self._at = byte, at + 1
            return _Step.GO
        return self._scalar()

    def _count(self, byte: int, by: int) -> None:
        if byte in b"{}":
            self._braces += by
        else:
            self._brackets += by

    def _in_string(self) -> _Step | Malformed:
        buffer = self._buffer
        end = self._at = _BODY[self._quote].match(buffer, self._at).end()  # type: ignore[union-attr]
        if end == len(buffer) or (buffer[end] == 0x5C and end + 1 == len(buffer)):
            return _Step.WAIT
        if buffer[end] != self._quote:
            return self._stray(end + (buffer[end] == 0x5C))
        self._quote, self._at = 0, end + 1
        return _Step.GO if self._braces or self._brackets else _Step.END

    def _scalar(self) -> _Step | Malformed:
        """A number or keyword, which ends only where the byte behind it shows that it has ended."""
        buffer, at = self._buffer, self._at
        end = _SCALAR.match(buffer, at).end()  # type: ignore[union-attr]
        if end - at > _MAX_SCALAR:
            return self._limit(f"a number or keyword is longer than {_MAX_SCALAR} bytes")
        if end == len(buffer):
            return _Step.WAIT
        text = bytes(buffer[at:end])
        if not text[:1].islower() and (not _WHOLE_NUMBER.fullmatch(text) or buffer[end] in b"0123456789"):
            return self._stray(end)
        self._at = end
        return _Step.GO if self._braces or self._brackets else _Step.END

    def _stray(self, at: int) -> Malformed:
        """The byte at ``at`` cannot stand there."""
        byte = self._buffer[at]
        shown = repr(chr(byte)) if 0x20 <= byte < 0x7F else f"0x{byte:02X}"
        self._at = at + 1
        self._skip = _RECOVERY
        return Malformed(f"the input is no JSON: {shown} cannot stand here")

    def _limit(self, reason: str) -> Malformed:
        self._skip = _LINE
        return Malformed(f"{reason}; the rest of the line is ignored")

    def _taken(self, found: _Step | Malformed) -> bytes | Malformed:
        """Give out what ends at the scan position; the next value begins there."""
        value = found if isinstance(found, Malformed) else bytes(memoryview(self._buffer)[self._start : self._at])
        self._start = self._at
        self._braces = self._brackets = self._quote = 0
        return value


def requote(text: bytes) -> bytes:
    """QEMU's single-quoted strings, and ``\\'`` in any string, as JSON has them. Other text stays as it is."""

    def string(match: re.Match[bytes]) -> bytes:
        return b'"' + _QUOTE.sub(character, match[0][1:-1]) + b'"'

    def character(match: re.Match[bytes]) -> bytes:
        return {b"\\'": b"'", b'"': b'\\"'}.get(match[0], match[0])

    return _QUOTED.sub(string, text)


_encode = msgspec.json.Encoder().encode


def encode(value: Any) -> bytes:
    """``value`` as JSON in ASCII, without a line's end. Structs, dicts, lists, enums and scalars.

    Raises TypeError or ValueError if it holds what JSON cannot say. Bytes of names that are no UTF-8 (of files, or of
    bitmaps in an image) are lone surrogates, escaped.
    """
    try:
        text = _encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode("ascii")
    if text.isascii():
        return text
    return json.dumps(json.loads(text), separators=(",", ":")).encode("ascii")


def encode_return(result: Any, identity: Any = msgspec.UNSET) -> bytes:
    """The line of a command that succeeded; None is the empty object, as in QEMU."""
    body = b'{"return":' + (b"{}" if result is None else encode(result))
    return body + _identity(identity) + b"}\r\n"


def encode_error(error_class: str, description: str, identity: Any = msgspec.UNSET) -> bytes:
    """The line of a request that failed."""
    error = encode({"class": error_class, "desc": description})
    return b'{"error":' + error + _identity(identity) + b"}\r\n"


def encode_event(name: str, data: Any, nanoseconds: int) -> bytes:
    """The line of an event that happened at ``nanoseconds`` since the epoch. Empty data is left out."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    stamp = b'{"timestamp":{"seconds":%d,"microseconds":%d},"event":%b' % (seconds, rest // 1000, encode(name))
    body = b"{}" if data is None else encode(data)
    return stamp + (b"}\r\n" if body == b"{}" else b',"data":' + body + b"}\r\n")


def encode_greeting(version: Any, capabilities: tuple[str, ...]) -> bytes:
    """The line that opens a connection."""
    return encode({"QMP": {"version": version, "capabilities": capabilities}}) + b"\r\n"


def laid_out(line: bytes) -> bytes:
    """A line that was encoded here, as several lines for people."""
    return msgspec.json.format(line.rstrip(), indent=4) + b"\r\n"


def _identity(identity: Any) -> bytes:
    return b"" if identity is msgspec.UNSET else b',"id":' + encode(identity)
