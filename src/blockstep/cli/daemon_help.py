"""What ``blockstep daemon --help`` prints: its options, and those of every driver and object, from their structs."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator

import msgspec
from msgspec import inspect

from blockstep import drivers as _drivers  # noqa: F401  registers them
from blockstep.block.driver import Driver
from blockstep.block.node import NodeOptions
from blockstep.block.registry import driver_names, find_driver
from blockstep.daemon.chardev import SocketOptions, StdioOptions
from blockstep.daemon.startup import MonitorOptions
from blockstep.errors import OptionError
from blockstep.inventory.exports import ExportOptions, ServerOptions
from blockstep.inventory.objects import TYPES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_WIDTH: Final = 100

_HEAD: Final = """\
Usage: blockstep daemon [OPTION VALUE]...
Open disks, export them over NBD, and be told what to do over QMP. Options are carried out in their order.

  --blockdev [driver=]DRIVER,node-name=NAME[,OPTION=VALUE...]     open a node
  --object [qom-type=]TYPE,id=ID[,PROPERTY=VALUE...]              make an object: {types}
  --nbd-server addr.type=unix,addr.path=PATH[,OPTION=VALUE...]    serve NBD clients on a unix socket
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...] ... on a TCP port
  --nbd-server addr.type=fd,addr.str=FD[,...]                     ... on a socket that was handed over (number or name)
  --nbd-server max-connections=0[,...]                            ... on all (other) sockets that were handed over
  --export [type=]nbd,id=ID,node-name=NAME[,OPTION=VALUE...]      export a node
  --chardev socket,id=ID,path=PATH,server=on[,wait=off]           listen on a unix socket
  --chardev socket,id=ID,host=HOST,port=PORT,server=on[,wait=off][,tls-creds=ID]
                                                                  ... on a TCP port
                                                                  without server=on: connect, do not listen
  --chardev stdio,id=ID                                           standard input and output
  --monitor [chardev=]ID[,mode=control][,pretty=on|off]           speak QMP there
  --qmp unix:PATH[,pretty=on|off]                                 --chardev and --monitor in one
  --qmp tcp:HOST:PORT[,tls-creds=ID][,pretty=on|off]              ... on a TCP port
  --qmp stdio[,pretty=on|off]                                     ... on standard input and output
  --pidfile PATH        write the process id to a file when every socket listens
  --daemonize           go into the background when everything is served
  --name NAME           the name that query-name tells
  --help, -h            this; `--blockdev help`, `--blockdev DRIVER,help`, `--object TYPE,help`, ... parts of it
  --version, -V         the version

All but the last five may be given several times. A value may be JSON instead: --blockdev '{{"driver": ...}}'.
Otherwise: a comma in a value is written ',,'; a.b=X is the member b of a; a.0=X, a.1=Y are a list."""


def full_help() -> str:
    """All of it."""
    parts = [_HEAD.format(types=", ".join(TYPES))]
    parts.append("Options of every driver:\n" + _rows(_common()))
    parts += [_driver(name) for name in driver_names()]
    parts += [_object(name) for name in TYPES]
    parts.append(f"--chardev stdio:\n{_rows(_fields(StdioOptions, ()))}")
    parts += [f"--{option}:\n{_rows(_fields(kind, ()))}" for option, kind in _OTHERS.items()]
    return "\n\n".join(parts)


def option_help(option: str, what: str) -> str:
    """Of one option, or of one driver or type of it. Raises OptionError for one that is not there."""
    if option == "blockdev":
        return f"{_driver(what)}\n\nand, as every driver:\n{_rows(_common())}" if what else "\n".join(
            f"{name:<20} {_first_line(find_driver(name))}" for name in driver_names())
    if option == "object":
        if what and what not in TYPES:
            raise OptionError("--object", what, f"one of {', '.join(TYPES)}")
        return _object(what) if what else "\n".join(TYPES)
    return _rows(_fields(_OTHERS["chardev" if option == "qmp" else option], ()))


_OTHERS: Final[dict[str, Any]] = {
    "nbd-server": ServerOptions, "export": ExportOptions, "chardev": SocketOptions, "monitor": MonitorOptions}


def _driver(name: str) -> str:
    driver = find_driver(name)
    rows = list(_fields(driver.Options, msgspec.structs.fields(NodeOptions)))
    return f"--blockdev {name}: {_first_line(driver)}" + (f"\n{_rows(rows)}" if rows else "")


def _object(name: str) -> str:
    return f"--object {name}:\n{_rows(_fields(TYPES[name], ()))}"


def _first_line(driver: type[Driver]) -> str:
    """Of what the driver's module says, without the driver's name."""
    line = (sys.modules[driver.__module__].__doc__ or "").strip().partition("\n")[0]
    return line.partition(": ")[2] or line


def _common() -> list[tuple[str, str, str]]:
    return list(_fields(NodeOptions, ()))


def _rows(rows: list[tuple[str, str, str]] | Iterator[tuple[str, str, str]]) -> str:
    return "\n".join(_row(name, kind, doc) for name, kind, doc in rows)


def _row(name: str, kind: str, doc: str) -> str:
    left = f"  {name}={kind}"
    if not doc:
        return left
    lines = textwrap.wrap(doc, _WIDTH - 40)
    if len(left) < 39:
        lines[0] = f"{left:<40}{lines[0]}"
        return ("\n" + " " * 40).join(lines)
    return ("\n" + " " * 40).join([left, *lines])


def _fields(struct: Any, without: tuple[msgspec.structs.FieldInfo, ...], prefix: str = "",
            tag: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, what it takes, description with the default) of every option, members of members with their dots."""
    left_out = {field.encode_name for field in without}
    info = inspect.type_info(struct) if not isinstance(struct, inspect.StructType) else struct
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        if field.encode_name not in left_out:
            for name, kind, doc in _field(f"{prefix}{field.encode_name}", field):
                yield name, kind, " ".join(filter(None, (tag, doc)))


def _field(name: str, field: inspect.Field) -> Iterator[tuple[str, str, str]]:
    doc, kinds = "", [field.type]
    if isinstance(field.type, inspect.Metadata):
        doc, kinds = (field.type.extra_json_schema or {}).get("description", ""), [field.type.type]
    kinds = [one.type if isinstance(one, inspect.Metadata) else one for kind in kinds
             for one in (kind.types if isinstance(kind, inspect.UnionType) else (kind,))]
    structs = [one for one in kinds if isinstance(one, inspect.StructType)]
    plain = [word for one in kinds if (word := _word(one))]
    said = " ".join(filter(None, (doc, _default(field))))
    if plain:
        yield name, "|".join(dict.fromkeys(plain)).replace("TEXT|.OPTIONS", "NODE|.OPTIONS"), said
    if len(structs) > 1 or (structs and structs[0].tag_field):
        yield f"{name}.{structs[0].tag_field}", "|".join(str(one.tag) for one in structs), said
    for struct in structs:
        tag = f"with {struct.tag_field}={struct.tag}" if struct.tag_field else ""
        yield from _fields(struct, (), f"{name}.", tag)


def _word(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.LiteralType):
        return "|".join(str(value) for value in kind.values)
    if isinstance(kind, inspect.ListType):
        return "LIST"
    return _WORDS.get(type(kind), "")


_WORDS: Final[dict[type[inspect.Type], str]] = {
    inspect.StrType: "TEXT", inspect.IntType: "N", inspect.FloatType: "NUMBER", inspect.BoolType: "on|off",
    inspect.DictType: ".OPTIONS", inspect.AnyType: "VALUE"}


def _default(field: inspect.Field) -> str:
    if field.required:
        return "(required)"
    default = field.default
    if default in (None, "", msgspec.UNSET, msgspec.NODEFAULT):
        return ""
    return f"({'on' if default else 'off'})" if isinstance(default, bool) else f"({default})"
