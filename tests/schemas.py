"""Two answers to query-qmp-schema, compared: where would a client of the second be surprised by the first?

`differences` gives each surprise once, as a place (``block-job-pause.device``, ``blockdev-add[nbd].server``) and a
sentence. Arguments must exist on both sides, with the same optionality, and take what the other takes; results and
events must always have what the other always has, with values that the other can have.

`documented` reads those that are on purpose from a table of a page; the places may have ``*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

Entry = Mapping[str, Any]
Direction = Literal["in", "out"]

_NUMBERS = {"int", "number"}


@dataclass(frozen=True, order=True)
class Difference:
    """``what`` is one of a few sentences, with the value that it is about."""

    where: str
    what: str


@dataclass(frozen=True)
class Row:
    """A line of the table: places and sentences that it covers, and why it is so."""

    where: str
    what: str
    reason: str

    def covers(self, difference: Difference) -> bool:
        return all(fnmatchcase(found, pattern.replace("[", "[[]")) for found, pattern in (
            (difference.where, self.where), (difference.what, self.what)))


def documented(page: Path) -> list[Row]:
    """The rows of the tables of ``page`` that have three columns, of which the first is code."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+?) \| ([^|]+?) \|$", page.read_text(), re.M)
    return [Row(*row) for row in rows]


class Schema:
    """An answer to query-qmp-schema."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {entry["name"]: entry for entry in entries}

    def of(self, meta_type: str) -> dict[str, Entry]:
        """The commands, or the events."""
        return {name: entry for name, entry in self.entries.items() if entry["meta-type"] == meta_type}


def differences(ours: Schema, theirs: Schema) -> set[Difference]:
    """What is in ``theirs`` and not in ``ours``, or different there; and our arguments that they do not have."""
    return set(_Comparison(ours, theirs).run())


class _Comparison:
    def __init__(self, ours: Schema, theirs: Schema) -> None:
        self.ours, self.theirs = ours, theirs
        self._seen: set[tuple[str, str, Direction]] = set()

    def run(self) -> Iterator[Difference]:
        for kind in ("command", "event"):
            mine, others = self.ours.of(kind), self.theirs.of(kind)
            for name in sorted(others.keys() - mine.keys()):
                yield Difference(name, f"no such {kind}")
            for name in sorted(others.keys() & mine.keys()):
                yield from self._callable(mine[name], others[name])

    def _callable(self, mine: Entry, other: Entry) -> Iterator[Difference]:
        name = mine["name"]
        for feature in other.get("features", ()):
            if feature not in mine.get("features", ()):
                yield Difference(name, f"no feature {feature}")
        if other.get("allow-oob", False) and not mine.get("allow-oob", False):
            yield Difference(name, "not out of band")
        into: Direction = "in" if mine["meta-type"] == "command" else "out"
        yield from self._type(name, mine["arg-type"], other["arg-type"], into)
        if mine["meta-type"] == "command":
            yield from self._type(f"{name}()", mine["ret-type"], other["ret-type"], "out")

    def _type(self, where: str, mine: str, other: str, way: Direction) -> Iterator[Difference]:
        if (mine, other, way) in self._seen:
            return
        self._seen.add((mine, other, way))
        a, b = self.ours.entries[mine], self.theirs.entries[other]
        if "alternate" in (a["meta-type"], b["meta-type"]):
            yield from self._alternate(where, a, b, way)
        elif a["meta-type"] != b["meta-type"]:
            yield Difference(where, f"{_shown(a)} for {_shown(b)}")
        elif a["meta-type"] == "builtin":
            json = (a["json-type"], b["json-type"])
            if json[0] != json[1] and not (way == "in" and json == ("number", "int")):
                yield Difference(where, f"{json[0]} for {json[1]}")
        elif a["meta-type"] == "array":
            yield from self._type(f"{where}[]", a["element-type"], b["element-type"], way)
        elif a["meta-type"] == "enum":
            yield from self._enum(where, a["values"], b["values"], way)
        else:
            yield from self._object(where, a, b, way)

    def _alternate(self, where: str, a: Entry, b: Entry, way: Direction) -> Iterator[Difference]:
        mine = {_json_type(self.ours, name): name for name in _alternatives(a)}
        others = {_json_type(self.theirs, name): name for name in _alternatives(b)}
        for json in sorted(mine.keys() | others.keys()):
            if json not in mine:
                if way == "in":
                    yield Difference(where, f"cannot be {json}")
            elif json not in others:
                yield Difference(where, f"can also be {json}")
            else:
                yield from self._type(where, mine[json], others[json], way)

    def _enum(self, where: str, mine: list[str], others: list[str], way: Direction) -> Iterator[Difference]:
        if way == "in":
            for value in sorted(set(others) - set(mine)):
                yield Difference(where, f"no value {value}")
        for value in sorted(set(mine) - set(others)):
            yield Difference(where, f"also value {value}")

    def _object(self, where: str, a: Entry, b: Entry, way: Direction) -> Iterator[Difference]:
        mine, others = _members(a), _members(b)
        if a.get("tag") == b.get("tag"):
            # What all cases have on one side may be in each case on the other.
            inner = {*self._flat(self.ours, a)} - {*mine}, {*self._flat(self.theirs, b)} - {*others}
            mine_here = {name: member for name, member in mine.items() if name not in inner[1]}
            others_here = {name: member for name, member in others.items() if name not in inner[0]}
            yield from self._members(where, mine_here, others_here, way)
            cases = _cases(a), _cases(b)
            for case in sorted(cases[0].keys() & cases[1].keys()):
                yield from self._case(f"{where}[{case}]", (cases[0][case], _less(mine, mine_here)),
                                      (cases[1][case], _less(others, others_here)), way)
            return
        # One of the two tells its cases apart, and the other does not: all members count as those of one object.
        yield from self._members(where, self._flat(self.ours, a), self._flat(self.theirs, b), way)

    def _case(self, where: str, mine: tuple[str, dict[str, Entry]], others: tuple[str, dict[str, Entry]],
              way: Direction) -> Iterator[Difference]:
        """The members of one case, with those that only one side has in every case."""
        a, b = self.ours.entries[mine[0]], self.theirs.entries[others[0]]
        if mine[1] or others[1]:
            yield from self._members(where, {**_members(a), **mine[1]}, {**_members(b), **others[1]}, way)
        elif (mine[0], others[0], way) not in self._seen:
            self._seen.add((mine[0], others[0], way))
            yield from self._object(where, a, b, way)

    def _flat(self, schema: Schema, entry: Entry) -> dict[str, Entry]:
        found = _members(entry)
        for name in _cases(entry).values():
            for member in self._flat(schema, schema.entries[name]).values():
                found.setdefault(member["name"], {**member, "default": None})
        return found

    def _members(self, where: str, mine: Mapping[str, Entry], others: Mapping[str, Entry],
                 way: Direction) -> Iterator[Difference]:
        for name in sorted(mine.keys() | others.keys()):
            place = f"{where}.{name}"
            if name not in others:
                if way == "in":
                    required = "" if "default" in mine[name] else ", and is required"
                    yield Difference(place, f"is an addition{required}")
            elif name not in mine:
                if way == "in" or "default" not in others[name]:
                    yield Difference(place, "is missing")
            else:
                optional, theirs_optional = "default" in mine[name], "default" in others[name]
                if way == "in" and optional != theirs_optional:
                    yield Difference(place, "is optional" if optional else "is required")
                if way == "out" and optional and not theirs_optional:
                    yield Difference(place, "may be absent")
                yield from self._type(place, mine[name]["type"], others[name]["type"], way)


def _members(entry: Entry) -> dict[str, Entry]:
    return {member["name"]: member for member in entry["members"]}


def _less(all_of: dict[str, Entry], without: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: member for name, member in all_of.items() if name not in without}


def _cases(entry: Entry) -> dict[str, str]:
    return {variant["case"]: variant["type"] for variant in entry.get("variants", ())}


def _alternatives(entry: Entry) -> list[str]:
    if entry["meta-type"] == "alternate":
        return [member["type"] for member in entry["members"]]
    return [entry["name"]]


def _json_type(schema: Schema, name: str) -> str:
    entry = schema.entries[name]
    json = str(entry.get("json-type", {"enum": "string"}.get(entry["meta-type"], entry["meta-type"])))
    return "int" if json == "number" else json


def _shown(entry: Entry) -> str:
    return str(entry["json-type"] if entry["meta-type"] == "builtin" else entry["meta-type"])
