"""What a QMP server offers, as it tells by ``query-qmp-schema``: commands, their arguments, the values of those.

A server without a schema is known by ``query-commands`` alone: its commands complete, their arguments do not.

Names are found whatever stands in them for ``-`` or ``_``: nobody remembers that it is ``block_resize``, but
``block-job-cancel``.

Source: QEMU's QMP reference, "QMP introspection".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

#: An entry of the schema.
Entry = Mapping[str, Any]


class Member(msgspec.Struct, frozen=True):
    """A member of an object: its name, the name of its type, and whether it may be left out."""

    name: str
    type: str
    optional: bool


class Catalogue:
    """A schema (may be empty), or at least the names of commands."""

    def __init__(self, schema: Sequence[Entry], commands: Iterable[str] = ()) -> None:
        self._entries = {(entry["meta-type"] == "command", entry["name"]): entry for entry in schema}
        self._names = {entry["name"] for entry in schema if entry["meta-type"] == "command"} | set(commands)

    @cached_property
    def commands(self) -> list[str]:
        """The names of all commands, sorted."""
        return sorted(self._names)

    def command(self, name: str) -> str:
        """The command that is meant by ``name``; ``name`` itself if there is none such."""
        return same_word(name, self.commands)

    def arguments(self, command: str) -> str:
        """The type of a command's arguments; empty if it is not known."""
        entry = self._entries.get((True, command))
        return "" if entry is None else str(entry["arg-type"])

    def members(self, type: str, given: Mapping[str, Any]) -> list[Member]:
        """The members of an object type, or of the objects among an alternate's types, required ones first.

        ``given``: the values of members that are known. One that tells apart variants (``driver``) brings in the
        members of its variant.
        """
        found: dict[str, Member] = {}
        for entry in self._branches(type):
            if entry["meta-type"] != "object":
                continue
            for member in entry["members"]:
                found[member["name"]] = Member(member["name"], member["type"], "default" in member)
            for variant in entry.get("variants", ()):
                if variant["case"] == given.get(entry["tag"]):
                    found |= {member.name: member for member in self.members(variant["type"], given)}
        return sorted(found.values(), key=lambda member: member.optional)

    def member(self, type: str, name: str, given: Mapping[str, Any]) -> Member | None:
        """The member that is meant by ``name``; by its number, an element of an array."""
        if name.isdigit():
            return next((Member(name, entry["element-type"], False) for entry in self._branches(type)
                         if entry["meta-type"] == "array"), None)
        members = {member.name: member for member in self.members(type, given)}
        return members.get(same_word(name, members))

    def words(self, type: str) -> list[str]:
        """The values of a type that has few: of an enum, and true and false."""
        found: list[str] = []
        for entry in self._branches(type):
            if entry["meta-type"] == "enum":
                found += entry.get("values") or [member["name"] for member in entry["members"]]
            elif entry.get("json-type") == "boolean":
                found += ["true", "false"]
        return found

    def is_nested(self, type: str) -> bool:
        """Whether values of the type may have members or elements."""
        return any(entry["meta-type"] in ("object", "array") for entry in self._branches(type))

    def is_reference(self, type: str) -> bool:
        """Whether a value is an object, or the name of one that exists."""
        return self.is_nested(type) and self.takes(type, "string")

    def takes(self, type: str, json_type: str) -> bool:
        """Whether a value may be of that JSON type (``int`` and ``number`` are numbers). A type not known takes all."""
        entries = self._branches(type)
        return not entries or any(
            entry.get("json-type") in (json_type, "value")
            or (entry["meta-type"] == "enum" and json_type == "string") for entry in entries)

    def describe(self, type: str) -> str:
        """A type in a word or two."""
        entry = self._entries.get((False, type))
        if entry is None:
            return ""
        match entry["meta-type"]:
            case "builtin":
                return str(entry["name"])
            case "array":
                return f"list of {self.describe(entry['element-type'])}"
            case "enum":
                values = self.words(type)
                return "|".join(values) if len(values) <= 6 else "word"
            case "alternate":
                return " or ".join(dict.fromkeys(self.describe(member["type"]) for member in entry["members"]))
        return "object"

    def _branches(self, type: str) -> list[Entry]:
        """The type itself, or those that an alternate joins."""
        entry = self._entries.get((False, type))
        if entry is None:
            return []
        if entry["meta-type"] != "alternate":
            return [entry]
        return [branch for member in entry["members"] for branch in self._branches(member["type"])]


def same_word(name: str, words: Iterable[str]) -> str:
    """``name``, or the word that differs from it in ``-`` and ``_`` alone."""
    found = list(words)
    if name in found:
        return name
    plain = name.replace("_", "-")
    return next((word for word in found if word.replace("_", "-") == plain), name)
