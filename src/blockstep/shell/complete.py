"""What may come next in a line of the shell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

from blockstep.shell.catalogue import Catalogue
from blockstep.shell.words import given_words, start_of_word

#: Words of the shell itself.
OWN: Final = {"help": "commands, or the arguments of one", "exit": "leave the shell"}

#: Things of the server that have names, and the values that are such names.
Things = Literal["nodes", "jobs", "exports"]
_NODES: Final = {"node-name", "device", "node", "parent", "target", "source", "base-node", "top-node", "overlay",
                 "replaces", "root-node"}


class Candidate(NamedTuple):
    """A word, or the rest of one up to ``=`` or ``.``; and what it is, for people."""

    text: str
    about: str = ""


class Completion(NamedTuple):
    """``candidates`` may replace the line from ``start`` on; so may the names of all ``things``, behind ``typed``."""

    start: int
    candidates: list[Candidate]
    things: Things | None = None


def complete(line: str, catalogue: Catalogue) -> Completion:
    """What may stand at the end of ``line``, the text before the cursor."""
    start = start_of_word(line)
    if start is None or line.startswith("{"):
        return Completion(len(line), [])
    word = line[start:]
    if not start:
        own = [Candidate(name, about) for name, about in OWN.items()]
        return Completion(0, matching(word, [*map(Candidate, catalogue.commands), *own]))
    head, *_ = line.split(maxsplit=1)
    if head == "help":
        return Completion(start, matching(word, map(Candidate, catalogue.commands)))
    command = catalogue.command(head)
    type, given = catalogue.arguments(command), given_words(line[:start])
    key, equals, value = word.partition("=")
    *path, last = key.split(".")
    for part in path:
        member = catalogue.member(type, part, given)
        type, given = member.type if member else "", _inside(given, part)
    if equals:
        return _values(len(line) - len(value), value, command, type, last, given, catalogue)
    lead = len(key) - len(last)
    return Completion(start + lead, matching(last, _keys(type, given, catalogue)))


def matching(prefix: str, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that begin with ``prefix``, whatever stands in either for ``-`` or ``_``."""
    plain = prefix.replace("_", "-")
    return [one for one in candidates if one.text.replace("_", "-").startswith(plain)]


def explain(command: str, catalogue: Catalogue) -> str:
    """A command's arguments, one a line; empty if the server does not tell them."""
    members = catalogue.members(catalogue.arguments(command), {})
    width = max((len(member.name) for member in members), default=0)
    lines = [f"  {member.name:<{width}}  {_about(member.type, member.optional, catalogue)}" for member in members]
    return "\n".join(lines)


def _keys(type: str, given: dict[str, Any], catalogue: Catalogue) -> list[Candidate]:
    """The members that are not given yet: ``name=`` for a value, ``name.`` for what has members."""
    found = []
    for member in catalogue.members(type, given):
        about = _about(member.type, member.optional, catalogue)
        nested = catalogue.is_nested(member.type)
        if member.name not in given and (not nested or catalogue.is_reference(member.type)):
            found.append(Candidate(member.name + "=", about))
        if nested and isinstance(given.get(member.name, {}), dict):
            found.append(Candidate(member.name + ".", about))
    return found


def _values(start: int, value: str, command: str, type: str, name: str, given: dict[str, Any],
            catalogue: Catalogue) -> Completion:
    member = catalogue.member(type, name, given)
    if member is None:
        return Completion(start, [])
    words = matching(value, map(Candidate, catalogue.words(member.type)))
    if catalogue.is_reference(member.type):
        return Completion(start, words, "nodes")
    if not catalogue.takes(member.type, "string"):
        return Completion(start, words)
    return Completion(start, words, _things(command, member.name))


def _things(command: str, name: str) -> Things | None:
    """Whose names a string argument takes, as far as the names of command and argument tell."""
    if command.endswith("-add"):
        return "nodes" if name in ("device", "node") or (name == "node-name" and command != "blockdev-add") else None
    if name == "id":
        return "jobs" if command.startswith("job-") else "exports" if command.startswith("block-export") else None
    if name == "device" and command.startswith("block-job-"):
        return "jobs"
    return "nodes" if name in _NODES else None


def _inside(given: dict[str, Any], part: str) -> dict[str, Any]:
    inner = given.get(part)
    return inner if isinstance(inner, dict) else {}


def _about(type: str, optional: bool, catalogue: Catalogue) -> str:
    what = catalogue.describe(type)
    return f"[{what}]" if optional else what
