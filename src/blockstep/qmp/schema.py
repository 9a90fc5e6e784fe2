"""Commands and events, each declared once.

    commands = Registry()

    class Resize(Arguments):
        node_name: Annotated[str, Meta(description="The node to resize.")]
        size: int

    @commands.command("block_resize")
    async def block_resize(context: Context, args: Resize) -> None:
        \"\"\"Change the length of a node.\"\"\"

From that one declaration come the decoding and checking of arguments with errors that name the argument, the
answer to ``query-commands``, the reference page and the schema: name, arguments (names as on the wire, types,
defaults, descriptions), result type, and the docstring. Nothing is registered globally: each area has a
`Registry`, and whoever composes the program adds them together.

A command gets the ``context`` that the server was made with and its arguments. It may name a third parameter,
``monitor``, to learn who asks (`Monitor`). It returns anything that msgspec can encode; None is the empty object.
Members that are absent from a result are `msgspec.UNSET`.

Events are structs; their fields are the event's data. ``rate_limit`` is the least time in seconds between two of
the same event (the same values in the fields named by ``per``); of those held back only the newest is sent.

Names: fields are written in Python's way and go over the wire in kebab-case, as QEMU's newer commands have it;
where QEMU has an underscore, give ``msgspec.field(name=...)``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, Protocol, TypeVar, get_type_hints

import msgspec

from blockstep.qmp.errors import CommandError
from blockstep.units import LEAST, MOST


class Arguments(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """Base of the arguments of a command; by itself, no arguments."""


class Result(msgspec.Struct, rename="kebab", kw_only=True):
    """Base of results. Optional members have the type ``T | UnsetType`` and the default UNSET."""


class Event(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """Base of events. Declare one with `Registry.event`. Members that may be absent are as those of a `Result`."""

    kind: ClassVar[EventKind]


class Monitor(Protocol):
    """Who sent a command."""

    @property
    def commands(self) -> Mapping[str, Command]:
        """What this monitor may execute."""

    @property
    def events(self) -> Mapping[str, EventKind]:
        """What this monitor may be sent."""

    @property
    def peer(self) -> str:
        """Where it connects from, for people."""

    @property
    def gone(self) -> asyncio.Event:
        """Set when its connection has ended."""

    def abort(self) -> None:
        """Cut its connection off."""


class EventKind(msgspec.Struct, frozen=True):
    """An event's declaration."""

    name: str
    rate_limit: float
    per: tuple[str, ...]
    type: type[Event]
    doc: str


class Argument(msgspec.Struct, frozen=True):
    """One argument of a command, as a reader of the reference wants it. ``type`` is the Python type."""

    name: str
    type: Any
    required: bool
    default: Any
    doc: str


class Command:
    """A command's declaration.

    ``oob``: may be executed out of band, that is, at once and beside others. ``features``: words of QEMU's for what
    clients should know before they use it (``deprecated``); what begins with ``x-`` is ``unstable`` anyway.
    """

    def __init__(self, name: str, run: Callable[..., Awaitable[Any]], oob: bool = False,
                 features: Iterable[str] = ()) -> None:
        self.name, self.oob, self.features = name, oob, tuple(features)
        self.module = run.__module__
        self._run = run
        parameters = run.__code__.co_varnames[:run.__code__.co_argcount + run.__code__.co_kwonlyargcount]
        if len(parameters) < 2:
            raise TypeError(f"{name}: a command takes (context, args), and monitor if it likes")
        self._wants_monitor = "monitor" in parameters
        self.arguments_type: Any = _evaluated(run, parameters[1])

    @functools.cached_property
    def _decoder(self) -> msgspec.json.Decoder[Any]:  # when it is needed: there are many, and programs start often
        return msgspec.json.Decoder(self.arguments_type)

    @property
    def doc(self) -> str:
        """What it does, in words."""
        return inspect.getdoc(self._run) or ""

    @property
    def result_type(self) -> Any:
        """The type of the result, for the schema."""
        return get_type_hints(self._run, include_extras=True).get("return", Any)

    @property
    def arguments(self) -> list[Argument]:
        """The arguments in their order; of a tagged union, those of all its alternatives."""
        kind = msgspec.inspect.type_info(self.arguments_type)
        kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
        found: dict[str, Argument] = {}
        for struct in kinds:
            for field in getattr(struct, "fields", ()):
                meta = field.type if isinstance(field.type, msgspec.inspect.Metadata) else None
                doc = (meta.extra_json_schema or {}).get("description", "") if meta else ""
                found.setdefault(field.encode_name, Argument(
                    field.encode_name, meta.type if meta else field.type, field.required, field.default, doc))
        return list(found.values())

    def decode(self, arguments: bytes | msgspec.Raw) -> Any:
        """The arguments, checked. Raises CommandError that names the argument that is wrong."""
        try:
            decoded = self._decoder.decode(arguments)
        except msgspec.ValidationError as error:
            raise CommandError(explain(str(error))) from None
        except (msgspec.DecodeError, ValueError) as error:
            raise CommandError(f"the arguments are no valid JSON: {error}") from None
        except RecursionError:
            raise CommandError("the arguments nest too deeply") from None
        _check_values(decoded, "")
        return decoded

    def run(self, context: Any, args: Any, monitor: Monitor) -> Awaitable[Any]:
        """Start the command."""
        if self._wants_monitor:
            return self._run(context, args, monitor=monitor)
        return self._run(context, args)


_C = TypeVar("_C", bound=Callable[..., Awaitable[Any]])
_E = TypeVar("_E", bound=type[Event])


class Registry:
    """The commands and events of one area, or of the program: `Registry.of` adds areas together."""

    def __init__(self) -> None:
        self.commands: dict[str, Command] = {}
        self.events: dict[str, EventKind] = {}

    @classmethod
    def of(cls, *areas: Registry) -> Registry:
        """One registry of several. Raises ValueError if two declare the same name."""
        whole = cls()
        for area in areas:
            for command in area.commands.values():
                whole._add(whole.commands, command)
            for event in area.events.values():
                whole._add(whole.events, event)
        return whole

    def command(self, name: str, *, oob: bool = False, features: Iterable[str] = ()) -> Callable[[_C], _C]:
        """Declare the decorated ``async def f(context, args)`` as command ``name``; see `Command`."""

        def declare(run: _C) -> _C:
            self._add(self.commands, Command(name, run, oob, features))
            return run

        return declare

    def event(self, name: str, *, rate_limit: float = 0.0, per: Iterable[str] = ()) -> Callable[[_E], _E]:
        """Declare the decorated `Event` struct as event ``name``. ``per`` names Python fields."""

        def declare(struct: _E) -> _E:
            struct.kind = EventKind(name, rate_limit, tuple(per), struct, inspect.getdoc(struct) or "")
            self._add(self.events, struct.kind)
            return struct

        return declare

    def offered(self, allow: frozenset[str] | None) -> Mapping[str, Command]:
        """The commands that a listener offers: all, or those in ``allow``. Raises KeyError for an unknown name."""
        if allow is None:
            return self.commands
        return {name: self.commands[name] for name in sorted(allow)}

    def __iter__(self) -> Iterator[Command]:
        return iter(self.commands.values())

    @staticmethod
    def _add(table: dict[str, Any], item: Command | EventKind) -> None:
        if item.name in table:
            raise ValueError(f"'{item.name}' is declared twice")
        table[item.name] = item


def _evaluated(run: Callable[..., Any], parameter: str) -> Any:
    """The annotation of one parameter; the others may name what exists only for the type checker."""
    annotation = run.__annotations__.get(parameter)
    if isinstance(annotation, str):
        closure = inspect.getclosurevars(run).nonlocals if run.__closure__ else {}
        annotation = eval(annotation, run.__globals__, dict(closure))
    if annotation is None:
        raise TypeError(f"{run.__qualname__}: parameter '{parameter}' needs a type")
    return annotation


# -- msgspec's sentences in ours ---------------------------------------------------------------------------------

_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_TYPES: Final = {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false",
                 "object": "an object", "array": "an array", "null": "null"}


def explain(sentence: str) -> str:
    """msgspec's sentence about a wrong value, as one about an argument. An unknown sentence is passed on."""
    match = _AT.match(sentence)
    assert match is not None
    what, path = match["what"], (match["path"] or "").removeprefix(".")
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"argument '{_joined(path, found[1])}' is missing"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return f"argument '{_joined(path, found[1])}' is not known"
    whose = f"argument '{path}'" if path else "the value of 'arguments'"
    if found := re.fullmatch(r"Invalid (?:enum )?value (.*)", what, re.DOTALL):
        return f"{whose} cannot be {found[1]}"
    if found := re.fullmatch(r"Expected `([^`]*)`(.*?)(?:, got `([^`]*)`)?", what, re.DOTALL):
        right = " or ".join(_TYPES.get(name, f"`{name}`") for name in found[1].split(" | "))
        wrong = f", not {_TYPES.get(found[3], found[3])}" if found[3] else ""
        return f"{whose} must be {right}{found[2]}{wrong}"
    return f"{whose}: {what}"


def _check_values(value: Any, path: str) -> None:
    """Raises CommandError for what QMP does not have, and nobody can use: an integer of more than 64 bits, a NUL."""
    if isinstance(value, str):
        if "\0" in value:
            raise CommandError(f"argument '{path}' must be a string without NUL")
    elif isinstance(value, int):
        if not LEAST <= value <= MOST:
            raise CommandError(f"argument '{path}' must be an integer {'<= ' if value > 0 else '>= '}"
                               f"{MOST if value > 0 else LEAST}")
    elif isinstance(value, msgspec.Struct):
        for name, field in zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True):
            _check_values(getattr(value, field), _joined(path, name))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_values(item, _joined(path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_values(item, f"{path}[{index}]")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
