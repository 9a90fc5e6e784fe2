"""docs/qmp.md: the reference of the control socket, from the declarations of commands and events.

An area is a registry; its section begins with the docstring of its module. Descriptions come from ``Meta`` at the
fields, or from ``#:`` comments above or behind them; a paragraph of a docstring that begins with "Errors:" says which
classes of error, other than GenericError, a command has, and when. A struct that one place alone mentions is shown
there, all others in a section at the end.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from string import Template
from typing import Any

import msgspec
from markdown_text import GENERATED, cell, paragraphs, table
from msgspec import NODEFAULT
from msgspec import inspect as kinds

from blockstep.daemon.storage import AREAS
from blockstep.qmp import monitor, wire
from blockstep.qmp.commands import replication
from blockstep.qmp.schema import Arguments, Command, EventKind, Registry

#: Titles of areas, by the name of their module, in the order of the page; others follow, under their own names.
TITLES = {
    "core": "The program", "introspection": "What a monitor can do", "run_state": "Run state", "objects": "Objects",
    "nodes": "Nodes", "query_nodes": "Looking at nodes", "exports": "The NBD server and its exports",
    "jobs": "Jobs", "block_jobs": "Block jobs", "copying": "Copying disks", "snapshots": "Snapshots",
    "transaction": "Transactions", "bitmaps": "Dirty bitmaps", "colo": "Replication in the daemon", "yank": "Yank",
    "human": "The human monitor's commands", "replication": "A pair",
}


def page() -> str:
    """The text of docs/qmp.md."""
    pair = (replication.commands,)
    areas = sorted([*AREAS, *pair], key=_order)
    first = _render(areas, _Types(Counter()))
    return "\n".join([GENERATED, _HEAD, _contents(areas), *_render(areas, _Types(first.mentions)).parts])


class _Rendered:
    def __init__(self, parts: list[str], mentions: Counter[str]) -> None:
        self.parts, self.mentions = parts, mentions


def _render(areas: Sequence[Registry], types: _Types) -> _Rendered:
    parts = [text for area in areas for text in _area(area, types)]
    parts += ["## Between the two ends\n", _PEER_HEAD,
              *(_command(command, types) for command in _by_name(replication.peer_commands.commands))]
    sections = [*types.sections()]
    if sections:
        parts += ["## Types\n", *sections]
    return _Rendered(parts, types.mentions)


# --- areas ---


def _area(area: Registry, types: _Types) -> Iterator[str]:
    yield f"## {_title(area)}\n"
    yield paragraphs(_introduction(area))
    for command in _by_name(area.commands):
        yield _command(command, types)
    for event in _by_name(area.events):
        yield _event(event, types)


def _module(area: Registry) -> str:
    for command in area.commands.values():
        return command.module
    return next(iter(area.events.values())).type.__module__


def _title(area: Registry) -> str:
    name = _module(area).rpartition(".")[2]
    return TITLES.get(name, name.replace("_", " ").capitalize())


def _order(area: Registry) -> tuple[int, str]:
    name = _module(area).rpartition(".")[2]
    return (list(TITLES).index(name) if name in TITLES else len(TITLES) - 1, name)


def _introduction(area: Registry) -> str:
    """The docstring of the area's module, without its sources and its pictures."""
    doc = inspect.cleandoc(sys.modules[_module(area)].__doc__ or "")
    return "\n\n".join(part for part in doc.split("\n\n")
                       if not part.startswith(("Source:", " ")) and "`blockstep." not in part)


def _contents(areas: Iterable[Registry]) -> str:
    anchors = _Anchors()
    lines = ["| area | commands | events |", "| --- | --- | --- |"]
    for area in areas:
        title = anchors.link(_title(area))
        commands = ", ".join(anchors.link(name, f"`{name}`") for name in sorted(area.commands))
        events = ", ".join(anchors.link(name, f"`{name}`") for name in sorted(area.events))
        lines.append(f"| {title} | {commands} | {events} |")
    return "\n".join(lines) + "\n"


class _Anchors:
    """Links to headings, in the order of the page: a second heading of the same name has a number."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def link(self, heading: str, text: str | None = None) -> str:
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = self._seen[anchor]
        self._seen[anchor] += 1
        return f"[{text or heading}](#{anchor}{f'-{number}' if number else ''})"


def _by_name(table: dict[str, Any]) -> list[Any]:
    return [table[name] for name in sorted(table)]


# --- commands and events ---


def _command(command: Command, types: _Types) -> str:
    text, errors = _without_errors(command.doc)
    notes = [f"*{word.capitalize()}.*" if word == "deprecated" else f"Feature: `{word}`." for word in command.features]
    notes += ["*Unstable.*"] if command.name.startswith("x-") else []
    notes += ["*May be executed out of band.*"] if command.oob else []
    parts = [f"### {command.name}\n", paragraphs(text)]
    if notes:
        parts.append(" ".join(notes) + "\n")
    parts += _arguments(command, types)
    parts += _returns(command, types)
    if errors:
        parts.append(paragraphs(f"**Errors.** {errors}"))
    return "\n".join(parts)


def _without_errors(doc: str) -> tuple[str, str]:
    """A docstring without the paragraph of errors, and that."""
    parts = inspect.cleandoc(doc).split("\n\n")
    errors = [part.removeprefix("Errors:").strip() for part in parts if part.startswith("Errors:")]
    return "\n\n".join(part for part in parts if not part.startswith("Errors:")), " ".join(errors)


def _arguments(command: Command, types: _Types) -> Iterator[str]:
    kind = kinds.type_info(command.arguments_type)
    if isinstance(kind, kinds.Metadata):
        yield f"Arguments: {types.name(kind)}.\n"
        return
    structs = kind.types if isinstance(kind, kinds.UnionType) else (kind,)
    for struct in structs:
        assert isinstance(struct, kinds.StructType)
        if len(structs) > 1:
            yield f"With `{struct.tag_field}` = `{struct.tag}`: {_first_line(struct.cls)}\n"
        elif (inspect.getdoc(struct.cls) or "").startswith("Arguments of ") and (doc := _beyond_title(struct.cls)):
            yield paragraphs(doc)
        if struct.fields:
            yield types.members(struct, arguments=True)


def _returns(command: Command, types: _Types) -> Iterator[str]:
    if command.result_type in (None, type(None)):
        return
    shown = types.name(kinds.type_info(command.result_type), here=True)
    tables = [*types.shown_here()]
    yield f"Returns: {shown}{':' if tables else '.'}\n"
    yield from tables


def _event(kind: EventKind, types: _Types) -> str:
    parts = [f"### {kind.name}\n", paragraphs(kind.doc)]
    if kind.rate_limit:
        each = " for each " + " and ".join(name.replace("_", "-") for name in kind.per) if kind.per else ""
        parts.append(f"*At most one in {kind.rate_limit:g} s{each}; of more, the newest is sent.*\n")
    struct = kinds.type_info(kind.type)
    assert isinstance(struct, kinds.StructType)
    if struct.fields:
        parts.append(types.members(struct))
    return "\n".join(parts)


def _first_line(cls: type) -> str:
    return _code((inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "))


def _beyond_title(cls: type) -> str:
    """A docstring without the sentence that only says whose arguments or result it is."""
    said = re.sub(r"^((Arguments|Result) of [\w-]+(, and [^.:]*)?|One [\w ]+, in the result of [\w-]+)[.:]\s*", "",
                  inspect.getdoc(cls) or "")
    return said[:1].upper() + said[1:]


# --- types ---

#: What is said of a struct whose table follows.
_HERE = "an object"


class _Types:
    """The struct types that were mentioned. ``counts``: how often each is, from an earlier run."""

    def __init__(self, counts: Counter[str]) -> None:
        self.mentions: Counter[str] = Counter()
        self._counts = counts
        self._later: dict[str, kinds.StructType] = {}
        self._here: list[kinds.StructType] = []
        self._done: set[str] = set()

    def name(self, kind: kinds.Type, here: bool = False) -> str:
        """A type as the reader wants it; a struct is linked to its section, or will be shown ``here``."""
        if isinstance(kind, kinds.Metadata):
            if (kind.extra or {}).get("options"):
                return "options of [a driver](drivers/README.md)"
            return self.name(kind.type, here)
        if isinstance(kind, kinds.StructType):
            return self._struct(kind, here)
        if isinstance(kind, kinds.UnionType):
            return " or ".join(dict.fromkeys(self.name(each, here) for each in kind.types))
        if isinstance(kind, kinds.ListType | kinds.VarTupleType):
            item = self.name(kind.item_type, here)
            return f"list of {'objects' if item == _HERE else item}"
        if isinstance(kind, kinds.DictType):
            return f"object with {self.name(kind.value_type, here)} for each key"
        if isinstance(kind, kinds.LiteralType):
            return " \\| ".join(f"`{value}`" for value in kind.values)
        if isinstance(kind, kinds.EnumType):
            return " \\| ".join(f"`{each.value}`" for each in kind.cls)
        return {kinds.IntType: "integer", kinds.StrType: "string", kinds.FloatType: "number",
                kinds.BoolType: "boolean", kinds.BytesType: "string, base64",
                kinds.NoneType: "null"}.get(type(kind), "anything")

    def _struct(self, kind: kinds.StructType, here: bool) -> str:
        name = kind.cls.__name__
        if not kind.fields and not kind.tag_field:
            return "an empty object"
        self.mentions[name] += 1
        if here and self._counts[name] == 1 and name not in self._done:
            self._done.add(name)
            self._here.append(kind)
            return _HERE
        self._later[name] = kind
        return f"[{name}](#{name.lower()})"

    def shown_here(self) -> Iterator[str]:
        """The tables of those that `name` said would be shown here."""
        shown, self._here = self._here, []
        for kind in shown:
            if doc := _beyond_title(kind.cls):
                yield paragraphs(doc)
            yield self.members(kind)

    def sections(self) -> Iterator[str]:
        """A section for each of the others, also of those that are met on the way."""
        while rest := sorted(self._later.keys() - self._done):
            self._done.add(rest[0])
            kind = self._later[rest[0]]
            parts = [f"### {rest[0]}\n", paragraphs(inspect.getdoc(kind.cls) or "")]
            if kind.fields or kind.tag_field:
                parts.append(self.members(kind, arguments=issubclass(kind.cls, Arguments)))
            yield "\n".join(parts)

    def members(self, kind: kinds.StructType, arguments: bool = False) -> str:
        """The table of a struct's members."""
        notes = _field_notes(kind.cls)
        rows = []
        if kind.tag_field:
            rows.append((f"`{kind.tag_field}`", f"`{kind.tag}`", "required", ""))
        for field in kind.fields:
            declared = field.type.type if isinstance(field.type, kinds.Metadata) else field.type
            if field.default is None and isinstance(declared, kinds.UnionType) and arguments:
                without = tuple(each for each in declared.types if not isinstance(each, kinds.NoneType))
                declared = without[0] if len(without) == 1 else kinds.UnionType(without)
            extra = (field.type.extra or {}) if isinstance(field.type, kinds.Metadata) else {}
            name = self.name(field.type if "options" in extra else declared)
            words = [*(f"{word.capitalize()}." for word in extra.get("features", ())), _description(field, notes)]
            rows.append((f"`{field.encode_name}`", name, _default(field), cell(" ".join(words))))
        if arguments:
            return table(("argument", "type", "default", "meaning"), rows)
        plain = [(name, shown, cell(" ".join(filter(None, [
            "Optional." if default == "optional" else "", meaning]))))
            for name, shown, default, meaning in rows]
        return table(("member", "type", "meaning"), plain)


def _description(field: kinds.Field, notes: dict[str, str]) -> str:
    said = (field.type.extra_json_schema or {}) if isinstance(field.type, kinds.Metadata) else {}
    return str(said.get("description", "")) or notes.get(field.name, "")


def _default(field: kinds.Field) -> str:
    if field.required:
        return "required"
    if field.default is NODEFAULT:
        value = None if field.default_factory is NODEFAULT else field.default_factory()
        if value is None:
            return "optional"
        return "its defaults" if isinstance(value, msgspec.Struct) else f"`{json.dumps(value)}`"
    if field.default is None:
        return "none"
    return f"`{field.default if isinstance(field.default, str) and field.default else json.dumps(field.default)}`"


def _field_notes(cls: type) -> dict[str, str]:
    """The ``#:`` comments above fields, or behind them; those of base classes too."""
    notes: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not issubclass(each, msgspec.Struct) or each.__module__.startswith(("msgspec", "blockstep.qmp.schema")):
            continue
        try:
            lines = inspect.getsource(each).splitlines()
        except OSError:  # made from another declaration
            continue
        pending: list[str] = []
        for line in lines:
            text, _, behind = line.strip().partition("  #: ")
            if text.startswith("#:"):
                pending.append(text[2:].strip())
                continue
            if (found := re.match(r"(\w+)\s*:", text)) and (pending or behind):
                notes[found[1]] = " ".join([*pending, behind]).strip()
            pending = []
    return notes


# --- text ---


def _code(text: str) -> str:
    return text.replace("``", "`")


_HEAD = Template("""\
# QMP

`blockstep daemon`, `blockstep primary` and `blockstep standby` are controlled with QMP, the protocol of QEMU's monitor.
Names, arguments, results and errors are QEMU's wherever QEMU has them; [what differs](qmp-differences.md) is a list
that a test keeps true. Whatever talks to QEMU can talk to these programs: `qemu.qmp`, `qmp-shell`, socat.
`blockstep shell` has completion and history.

The daemon's sockets are those of `--qmp`, or of `--chardev` and `--monitor` ([options](cli.md)); the other two have
`PAIR.primary.qmp` and `PAIR.standby.qmp` in the [runtime directory](cli.md). A unix socket has mode 0600. TCP can be
protected by TLS.

```text
<- {"QMP": {"version": {"qemu": {"major": 7, ...}, "package": "blockstep ..."}, "capabilities": ["oob"]}}
-> {"execute": "qmp_capabilities"}
<- {"return": {}}
-> {"execute": "block_resize", "arguments": {"node-name": "disk", "size": 1073741824}, "id": 1}
<- {"return": {}, "id": 1}
-> {"execute": "block-job-cancel", "arguments": {"device": "backup0"}, "id": 2}
<- {"error": {"class": "DeviceNotActive", "desc": "..."}, "id": 2}
<- {"timestamp": {"seconds": 1700000000, "microseconds": 125}, "event": "STOP"}
```

- **Input** is JSON objects, one behind the other; lines mean nothing. `id` may be any value and comes back with the
  answer. Input that is no JSON gets an error, and what follows is read afresh; the byte 0xFF gets the reader into
  step from anywhere. A request may have $bytes MiB and nest $depth levels deep. Output is ASCII, a line for each answer
  or event.
- **Order.** Requests of one monitor are executed and answered one after the other, also when many are sent ahead.
  Other monitors do not wait for them. With the capability `oob` (`qmp_capabilities` with `"enable": ["oob"]`) some
  commands can be sent as `exec-oob` and are executed at once; $queue requests may be on their way then.
- **Errors** have a class and a description for people, which names the argument that is wrong. After an error nothing
  has changed, unless the command says otherwise.

  | class | when |
  | --- | --- |
  | `CommandNotFound` | there is no such command here, or capabilities have to be negotiated first, or have been |
  | `DeviceNotFound` | some of QEMU's older commands, when there is no such device; others say GenericError |
  | `DeviceNotActive` | `block-job-*`, when there is no such job |
  | `GenericError` | everything else |

- **Events** come to every monitor that has negotiated. Some are limited: of many in a short time the newest is sent
  when the time is over. A monitor for which $backlog MiB wait that it does not read is cut off at the next event.
- **Results and events grow**: ignore members that you do not know. [`query-qmp-schema`](#query-qmp-schema) tells what
  this version has.

An argument with a default may be left out.

## Contents
""").substitute(bytes=wire.MAX_BYTES >> 20, depth=wire.MAX_DEPTH, queue=monitor.QUEUE,
                backlog=monitor.EVENT_BACKLOG >> 20)

_PEER_HEAD = """\
On the control port (the link port + 1) of a standby a primary finds these, and nothing else. They may change with any
version: both ends of a pair must be of the same one.
"""
