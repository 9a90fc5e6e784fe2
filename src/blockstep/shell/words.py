"""A line of the shell, and the QMP command that it says.

    block_resize node-name=disk size=67108864
    blockdev-add driver=raw node-name=disk file.driver=file file.filename=/srv/disk.img
    blockdev-add node-name=q driver=quorum vote-threshold=1 children.0=a children.1=b
    nbd-server-start addr={"type": "unix", "data": {"path": "/run/x"}}
    {"execute": "query-status"}

A word is ``KEY=VALUE``. Dots in the key lead into objects; keys ``0``, ``1``, ... make a list. A value that begins
with ``{``, ``[`` or ``"`` is JSON, and may hold blanks; in ``'...'`` it is a string as it stands. Anything else ends
at the next blank and is a number, ``true``, ``false`` or ``null`` if it looks like one and the argument takes such;
otherwise a string. Where only true and false are taken, ``on`` and ``off`` will do. A line that begins with ``{`` is a
whole request.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from blockstep.errors import BlockstepError
from blockstep.shell.catalogue import Catalogue

_BARE: Final = re.compile(r"[^\s]*")
_KEY: Final = re.compile(r"[^\s={}\[\]\"']+")
_SWITCHES: Final = {"on": True, "yes": True, "off": False, "no": False}
#: Parts that a key may have.
_DEEPEST: Final = 64


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number there")


_JSON: Final = json.JSONDecoder(parse_constant=_no_number)


class WordError(BlockstepError):
    """A line is no command: nothing was sent. Says where and why."""


class Request(msgspec.Struct, frozen=True):
    """What a line says."""

    command: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    out_of_band: bool = False


class _Text(msgspec.Struct, frozen=True):
    """A value without quotes: what it is, its type decides."""

    text: str


def parse(line: str, catalogue: Catalogue) -> Request:
    """The request of a line that is not blank. Raises WordError."""
    line = line.strip()
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise WordError(f"column {error.start + 1}: this is no text in UTF-8") from None
    if line.startswith("{"):
        return _whole(line)
    head = _BARE.match(line)
    assert head is not None
    command = catalogue.command(head[0])
    position, given = head.end(), dict[str, Any]()
    while (position := _skip_blanks(line, position)) < len(line):
        key, value, position = _word(line, position)
        _put(given, key, value)
    return Request(command, _typed(given, catalogue.arguments(command), catalogue))


def given_words(line: str) -> dict[str, Any]:
    """The arguments that a line before the cursor gives, as far as they can be understood; all values as texts."""
    given: dict[str, Any] = {}
    position = len(line.split(maxsplit=1)[0]) if line.strip() else 0
    try:
        while (position := _skip_blanks(line, position)) < len(line):
            key, value, position = _word(line, position)
            _put(given, key, value.text if isinstance(value, _Text) else value)
    except WordError:
        pass
    return given


def start_of_word(line: str) -> int | None:
    """Where the word begins that ends with the line, if that is a bare one; None inside of JSON or quotes."""
    head = _BARE.match(line)
    assert head is not None
    position = head.end()
    if position == len(line):
        return 0
    try:
        while True:
            start = _skip_blanks(line, position)
            if start == len(line):
                return start
            _, value, position = _word(line, start, partial=True)
            if position == len(line) and isinstance(value, _Text):
                return start
    except WordError:
        return None


def _whole(line: str) -> Request:
    try:
        request = _JSON.decode(line)
    except (ValueError, RecursionError) as error:
        raise WordError(f"this is no JSON: {error}") from None
    for key in ("execute", "exec-oob"):
        if isinstance(request.get(key), str) and isinstance(request.get("arguments", {}), dict):
            return Request(request[key], request.get("arguments", {}), key == "exec-oob")
    raise WordError('a request is {"execute": COMMAND, "arguments": {...}}')


def _skip_blanks(line: str, position: int) -> int:
    while position < len(line) and line[position].isspace():
        position += 1
    return position


def _word(line: str, start: int, partial: bool = False) -> tuple[str, Any, int]:
    """Key, value (bare: `_Text`) and end of the word at ``start``. ``partial``: the last one needs no value."""
    key = _KEY.match(line, start)
    end = key.end() if key else start
    if key is None or line[end:end + 1] != "=":
        if partial and end == len(line):
            return key[0] if key else "", _Text(""), end
        raise WordError(f"column {start + 1}: KEY=VALUE is needed, not {line[start:].split()[0]!r}")
    return key[0], *_value(line, end + 1)


def _value(line: str, start: int) -> tuple[Any, int]:
    first = line[start:start + 1]
    if first == "'":
        end = line.find("'", start + 1)
        if end < 0:
            raise WordError(f"column {start + 1}: the ' has no end")
        value: Any = line[start + 1:end]
        end += 1
    elif first in ("{", "[", '"'):
        try:
            value, end = _JSON.raw_decode(line, start)
        except (ValueError, RecursionError) as error:
            raise WordError(f"column {start + 1}: this is no JSON: {error}") from None
    else:
        bare = _BARE.match(line, start)
        assert bare is not None
        return _Text(bare[0]), bare.end()
    if end < len(line) and not line[end].isspace():
        raise WordError(f"column {end + 1}: a blank is needed after the value")
    return value, end


def _put(given: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".", _DEEPEST)
    if "." in last:
        raise WordError(f"a key has {_DEEPEST} parts at most")
    where = given
    for part in path:
        where = where.setdefault(part, {})
        if not isinstance(where, dict):
            raise WordError(f"{key}: '{part}' has a value already")
    if last in where:
        raise WordError(f"{key} is given twice")
    if not last:
        raise WordError(f"{key}: the last part of the key is empty")
    where[last] = value


def _typed(value: Any, type: str, catalogue: Catalogue) -> Any:
    """Names as the schema has them, lists where keys are numbers, bare values as their type wants them."""
    if isinstance(value, _Text):
        return _literal(value.text, type, catalogue)
    if not isinstance(value, dict) or not value:
        return value
    if _are_numbers(value):
        return [_element(value[str(index)], str(index), type, catalogue) for index in range(len(value))]
    known = {name: one.text if isinstance(one, _Text) else one for name, one in value.items()}
    result: dict[str, Any] = {}
    for name, one in value.items():
        member = catalogue.member(type, name, known)
        result[member.name if member else name] = _typed(one, member.type if member else "", catalogue)
    return result


def _element(value: Any, index: str, type: str, catalogue: Catalogue) -> Any:
    member = catalogue.member(type, index, {})
    return _typed(value, member.type if member else "", catalogue)


def _are_numbers(keys: Mapping[str, Any]) -> bool:
    return set(keys) == {str(index) for index in range(len(keys))}


def _literal(text: str, type: str, catalogue: Catalogue) -> Any:
    if type and text in _SWITCHES and not catalogue.takes(type, "string"):
        return _SWITCHES[text]
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and math.isinf(value):
        return text
    kind = {bool: "boolean", int: "int", float: "number"}.get(value.__class__, "null")
    if catalogue.takes(type, kind) or (kind == "int" and catalogue.takes(type, "number")):
        return value
    return text
