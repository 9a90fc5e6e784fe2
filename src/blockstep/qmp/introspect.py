"""The schema of commands and events in QEMU's introspection format, from their declarations.

    entries = schema(commands, events, {"driver": every_drivers_options})

The format is flat: an entry for each command and event names the types of its arguments and its result, and each
type is an entry of its own. Python's types become QEMU's like this:

    str, int, float, bool, None, Any          builtin: str, int, number, bool, null, any
    Literal, Enum                             enum
    list, tuple, set                          array
    Struct                                    object
    Struct | Struct with a tag                object: the members that all have, the tag, and a variant for each
    any other union                           alternate
    dict                                      any: the format has no word for members that are not known before
    Annotated[dict, Meta(extra={"options": N})]  whatever the caller gives for the name N

The last one is for what is parsed later: options of a node, whose drivers are known only when all are imported.

**Optional.** Of arguments, what has a default may be left out. ``T | None = None`` is an optional T: null may be
given for "left out", but that is an extra, not the interface. Of results and events, members that may be UNSET are
optional, and all others are always there.

**Names** of types are those of the classes where there is one; they are for people and may change, as in QEMU.
Commands and members whose name begins with ``x-`` have the feature ``unstable``; more are declared with
``features=`` at the command, ``Meta(extra={"features": [...]})`` at the member, or a class variable ``FEATURES``.

Source: "QMP introspection" in QEMU's QMP reference; "Client JSON Protocol introspection" in its QAPI guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import NODEFAULT, UNSET, UnsetType
from msgspec import inspect as kinds

from blockstep.qmp.schema import Command, EventKind, Result

Direction = Literal["in", "out"]

UNSTABLE: Final = "unstable"
#: The type without members.
EMPTY: Final = "Empty"


class Entry(Result, tag_field="meta-type"):
    """What all entries have."""

    name: str
    features: list[str] | UnsetType = UNSET


class CommandEntry(Entry, tag="command", kw_only=True):
    """A command: ``arg-type`` and ``ret-type`` name the objects that go in and out."""

    arg_type: str
    ret_type: str
    allow_oob: bool | UnsetType = UNSET


class EventEntry(Entry, tag="event", kw_only=True):
    """An event: ``arg-type`` names the object that is its data."""

    arg_type: str


class Member(Result):
    """A member of an object. ``default`` is there, and null, if the member is optional."""

    name: str
    type: str
    default: Any = UNSET
    features: list[str] | UnsetType = UNSET


class Variant(Result):
    """The members of an object in one case of its tag."""

    case: str
    type: str


class ObjectEntry(Entry, tag="object", kw_only=True):
    """An object. ``tag`` names the member that selects one of ``variants``."""

    members: list[Member]
    tag: str | UnsetType = UNSET
    variants: list[Variant] | UnsetType = UNSET


class EnumMember(Result):
    """A value of an enumeration."""

    name: str


class EnumEntry(Entry, tag="enum", kw_only=True):
    """An enumeration. ``values`` has the same names, for clients from before ``members``."""

    members: list[EnumMember]
    values: list[str]


class ArrayEntry(Entry, tag="array", kw_only=True):
    """An array."""

    element_type: str


class AlternateMember(Result):
    """One of the types of an alternate."""

    type: str


class AlternateEntry(Entry, tag="alternate", kw_only=True):
    """One of several types; they can be told apart by their JSON type."""

    members: list[AlternateMember]


class BuiltinEntry(Entry, tag="builtin", kw_only=True):
    """A type that every QMP server has."""

    json_type: Literal["string", "number", "int", "boolean", "null", "object", "array", "value"]


AnyEntry = (CommandEntry | EventEntry | ObjectEntry | EnumEntry | ArrayEntry | AlternateEntry | BuiltinEntry)

_BUILTINS: Final[Mapping[type, tuple[str, Any]]] = {
    kinds.StrType: ("str", "string"), kinds.IntType: ("int", "int"), kinds.FloatType: ("number", "number"),
    kinds.BoolType: ("bool", "boolean"), kinds.NoneType: ("null", "null"),
}
_ARRAYS: Final = (kinds.ListType, kinds.VarTupleType, kinds.SetType, kinds.FrozenSetType)


def schema(commands: Iterable[Command], events: Iterable[EventKind],
           named: Mapping[str, Callable[[], Any]]) -> list[AnyEntry]:
    """The entries: commands, then events, each by name, then the types that they use, in the order of mention.

    ``named`` gives the types that declarations only mention by name; a function, because it is asked when needed.
    """
    types = _Types(named)
    found: list[AnyEntry] = [
        CommandEntry(name=command.name, arg_type=types.name(command.arguments_type, "in"),
                     ret_type=types.name(command.result_type, "out"), allow_oob=command.oob or UNSET,
                     features=_features(command.name, command.features))
        for command in sorted(commands, key=lambda each: each.name)]
    found += [EventEntry(name=event.name, arg_type=types.name(event.type, "out"))
              for event in sorted(events, key=lambda each: each.name)]
    return [*found, *types.entries.values()]


class _Types:
    """The types that were mentioned so far."""

    def __init__(self, named: Mapping[str, Callable[[], Any]]) -> None:
        self.entries: dict[str, AnyEntry] = {}
        self._named = named
        self._structs: dict[tuple[object, ...], str] = {}

    def name(self, annotation: Any, direction: Direction) -> str:
        """The name of the entry for a type as it is annotated; None is the empty object."""
        if annotation in (None, type(None)):
            return self._object(EMPTY, [])
        return self._type(kinds.type_info(annotation), direction)

    def _type(self, kind: kinds.Type, direction: Direction) -> str:
        if isinstance(kind, kinds.Metadata):
            if (reference := (kind.extra or {}).get("options")) is not None:
                return self._reference(reference, direction)
            return self._type(kind.type, direction)
        if isinstance(kind, kinds.StructType):
            return self._struct(kind, direction)
        if isinstance(kind, kinds.UnionType):
            return self._union(kind.types, direction)
        if isinstance(kind, _ARRAYS):
            element = self._type(kind.item_type, direction)
            return self._add(ArrayEntry(name=f"[{element}]", element_type=element))
        if isinstance(kind, kinds.EnumType):
            return self._enum(kind.cls.__name__, [str(each.value) for each in kind.cls])
        if isinstance(kind, kinds.LiteralType):
            return self._enum("|".join(map(str, kind.values)), [str(each) for each in kind.values])
        name, json_type = _BUILTINS.get(type(kind), ("any", "value"))
        return self._add(BuiltinEntry(name=name, json_type=json_type))

    def _reference(self, reference: str, direction: Direction) -> str:
        known = (reference, direction)
        if known not in self._structs:
            self._structs[known] = ""
            kind = kinds.type_info(self._named[reference]())
            structs = kind.types if isinstance(kind, kinds.UnionType) else (kind,)
            self._tagged(known, [each for each in structs if isinstance(each, kinds.StructType)], direction)
        return self._structs[known]

    def _union(self, types: Iterable[kinds.Type], direction: Direction) -> str:
        structs = [each for each in types if isinstance(each, kinds.StructType)]
        others = [each for each in types if not isinstance(each, kinds.StructType)]
        names = [self._type(each, direction) for each in others]
        if len(structs) > 1:
            known = (*(each.cls for each in structs), direction)
            names.append(self._structs.get(known) or self._tagged(known, structs, direction))
        elif structs:
            names.append(self._struct(structs[0], direction))
        if len(names) == 1:
            return names[0]
        return self._add(AlternateEntry(name="|".join(names), members=[AlternateMember(type=each) for each in names]))

    def _struct(self, kind: kinds.StructType, direction: Direction) -> str:
        known = (kind.cls, direction)
        if known not in self._structs:
            name = self._structs[known] = self._free(kind.cls.__name__)
            members = self._members(kind, direction)
            if kind.tag_field is not None:
                tag = self._enum(str(kind.tag), [str(kind.tag)])
                members.insert(0, Member(name=kind.tag_field, type=tag))
            if not members:
                name = self._structs[known] = self._object(EMPTY, [])
            else:
                self._object(name, members, kind.cls)
        return self._structs[known]

    def _tagged(self, known: tuple[object, ...], structs: list[kinds.StructType], direction: Direction) -> str:
        """An object with variants. Its members are those that all of ``structs`` have."""
        name = self._structs[known] = self._free(_common_name([each.cls for each in structs]))
        members = {str(each.tag): self._members(each, direction) for each in structs}
        first, *rest = members.values()
        common = [each for each in first if all(each in others for others in rest)]
        tag_field = str(structs[0].tag_field)
        tag = self._enum(f"{name}.{tag_field}", list(members))
        variants = []
        for each in structs:
            own = [member for member in members[str(each.tag)] if member not in common]
            variant = self._object(self._free(each.cls.__name__) if own else EMPTY, own, each.cls)
            variants.append(Variant(case=str(each.tag), type=variant))
        self._add(ObjectEntry(name=name, members=[Member(name=tag_field, type=tag), *common], tag=tag_field,
                              variants=variants))
        return name

    def _members(self, kind: kinds.StructType, direction: Direction) -> list[Member]:
        found = []
        for field in kind.fields:
            may_be_unset = not field.required and field.default is NODEFAULT and field.default_factory is NODEFAULT
            optional = not field.required if direction == "in" else (
                may_be_unset or (not field.required and kind.cls.__struct_config__.omit_defaults))
            declared, extra = _plain(field.type)
            if direction == "in" and field.default is None and isinstance(declared, kinds.UnionType):
                types = tuple(each for each in declared.types if not isinstance(each, kinds.NoneType))
                name = self._union(types, direction)
            else:
                name = self._type(field.type, direction)
            found.append(Member(name=field.encode_name, type=name, default=None if optional else UNSET,
                                features=_features(field.encode_name, extra.get("features", ()))))
        return found

    def _object(self, name: str, members: list[Member], cls: type | None = None) -> str:
        features = [] if name == EMPTY else list(getattr(cls, "FEATURES", ()))
        return self._add(ObjectEntry(name=name, members=members, features=features or UNSET))

    def _enum(self, name: str, values: list[str]) -> str:
        return self._add(EnumEntry(name=name, members=[EnumMember(name=each) for each in values], values=values))

    def _add(self, entry: AnyEntry) -> str:
        """Keep an entry, once; another one with its name is an error of this module."""
        if self.entries.setdefault(entry.name, entry) != entry:
            raise AssertionError(f"two types are named '{entry.name}'")
        return entry.name

    def _free(self, name: str) -> str:
        """``name``, or that with a number, if another struct has it."""
        taken = {*self.entries, *self._structs.values()}
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}-{number}"
        return free


def _plain(kind: kinds.Type) -> tuple[kinds.Type, Mapping[str, Any]]:
    """A type without its metadata, and what that says beyond msgspec."""
    if isinstance(kind, kinds.Metadata):
        return kind.type, kind.extra or {}
    return kind, {}


def _features(name: str, declared: Iterable[str]) -> list[str] | UnsetType:
    return [*declared, *([UNSTABLE] if name.startswith("x-") else [])] or UNSET


def _common_name(classes: list[type]) -> str:
    """Of the nearest class that all derive from and that says something; or all their names."""
    for base in classes[0].__mro__[1:]:
        if base.__module__ != Result.__module__ and base is not msgspec.Struct and base is not object and all(
                issubclass(each, base) for each in classes):
            return base.__name__
    return "|".join(each.__name__ for each in classes)
