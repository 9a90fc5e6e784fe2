"""Commands whose words are read here when they are right, and by typer when they are not.

A command is a function whose parameters have an `Option`, an `Argument` or `Order` in their annotations. Typer, which
makes the help and the errors, takes a tenth of a second to be imported, several times what a short command does. So
the words are first read by `parsed`, which knows options, their short forms together (``-pq``), values behind them
(``-fraw``, ``--format=raw``) and arguments anywhere between them. At the first word that it does not understand it
gives up, and `typer_app` makes of the same annotations what can explain it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType

from blockstep.forms import Annotated, Literal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import typer


class Option:
    """``names``: as ``-f``, ``--format``; without one it is called as the parameter, and a switch can be turned off as
    well (``--no-format``). ``noted``: see `Order`."""

    def __init__(self, *names: str, metavar: str | None = None, help: str = "", noted: bool = False) -> None:
        self.names, self.metavar, self.help, self.noted = names, metavar, help, noted


class Argument:
    """A word without a dash. Of a list parameter: all of them."""

    def __init__(self, metavar: str, help: str = "") -> None:
        self.metavar, self.help = metavar, help


class Order(list[str]):
    """The parameter of this type gets the names of the parameters whose options are ``noted``, as they were given."""


Command = Callable[..., "int | None"]


class _NotUnderstood(Exception):
    pass


class _Parameter:
    """``kind``: bool, int, str, Path or the tuple of the words that are possible; ``many``: a list of them."""

    def __init__(self, name: str, annotation: Any) -> None:
        self.name = name
        kind, self.info = annotation.__args__
        if isinstance(kind, UnionType):
            kind = next(one for one in kind.__args__ if one is not NoneType)
        self.many = _form(kind) is list
        if self.many:
            kind = kind.__args__[0]
        self.kind = kind.__args__ if _form(kind) is Literal else kind

    def value(self, text: str) -> Any:
        if isinstance(self.kind, tuple):
            if text not in self.kind:
                raise _NotUnderstood
            return text
        try:
            return self.kind(text)
        except ValueError:
            raise _NotUnderstood from None


def _form(kind: Any) -> Any:
    """What ``kind`` is a form of, as list of ``list[str]``; None if of nothing."""
    return getattr(kind, "__origin__", None)


def _annotations(command: Command) -> dict[str, Any]:
    """The annotations of a command as values, as `typing.get_type_hints` finds them. What they name is imported."""
    return {name: eval(text, command.__globals__) for name, text in command.__annotations__.items()}


def parsed(command: Command, words: Sequence[str], dashed: bool = False) -> dict[str, Any] | None:
    """What ``command`` is to be called with; None: typer has to look at it. ``dashed``: ``-1`` is an argument."""
    try:
        return _Reader(command, dashed).read(list(words))
    except _NotUnderstood:
        return None


class _Reader:
    def __init__(self, command: Command, dashed: bool) -> None:
        self._dashed = dashed
        self._command = command
        self._options: dict[str, _Parameter] = {}
        self._off: set[str] = set()
        self._arguments: list[_Parameter] = []
        self._order = ""
        for name, annotation in _annotations(command).items():
            if annotation is Order:
                self._order = name
            elif _form(annotation) is Annotated:
                parameter = _Parameter(name, annotation)
                if isinstance(parameter.info, Argument):
                    self._arguments.append(parameter)
                    continue
                word = name.replace("_", "-")
                for option in parameter.info.names or (f"--{word}",):
                    self._options[option] = parameter
                if parameter.kind is bool and not parameter.info.names:
                    self._options[f"--no-{word}"] = parameter
                    self._off.add(f"--no-{word}")

    def read(self, words: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        order = Order()
        rest: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                rest += words
                break
            if len(word) < 2 or word[0] != "-" or (self._dashed and word[1].isdigit()):
                rest.append(word)
                continue
            name, value = word, None
            if word.startswith("--"):
                if "=" in word:
                    name, _, value = word.partition("=")
            elif len(word) > 2:
                name, value = word[:2], word[2:]
            parameter = self._options.get(name)
            if parameter is None:
                raise _NotUnderstood
            if parameter.kind is bool:
                if value is not None:
                    if word.startswith("--"):
                        raise _NotUnderstood
                    words.insert(0, f"-{value}")
                found[parameter.name] = name not in self._off
            else:
                if value is None:
                    if not words:
                        raise _NotUnderstood
                    value = words.pop(0)
                given = parameter.value(value)
                found[parameter.name] = [*found.get(parameter.name, []), given] if parameter.many else given
            if parameter.info.noted and found[parameter.name] and parameter.name not in order:
                order.append(parameter.name)
        if self._order:
            found[self._order] = order
        self._take(rest, found)
        return found

    def _take(self, rest: list[str], found: dict[str, Any]) -> None:
        """The arguments; those that are missing have to have a default."""
        for parameter in self._arguments:
            if parameter.many:
                if rest:
                    found[parameter.name], rest = [parameter.value(word) for word in rest], []
            elif rest:
                found[parameter.name] = parameter.value(rest.pop(0))
        if rest or self._missing(found):
            raise _NotUnderstood

    def _missing(self, found: Mapping[str, Any]) -> bool:
        code = self._command.__code__
        names = code.co_varnames[:code.co_argcount]
        required = names[:len(names) - len(self._command.__defaults__ or ())]
        return any(name not in found for name in required)


def typer_app(name: str, help: str, commands: Mapping[str, Command], dashed: Sequence[str] = ()) -> typer.Typer:
    """The commands for typer. ``dashed``: of these, words that begin with a dash may be arguments."""
    import typer

    app = typer.Typer(name=name, no_args_is_help=True, rich_markup_mode=None, help=help)
    for word, command in commands.items():
        settings = {"ignore_unknown_options": True} if word in dashed else None
        app.command(word, context_settings=settings)(for_typer(command))
    return app


def for_typer(command: Command) -> Command:
    """The same command; one with a parameter for the order inside of another that keeps it."""
    import inspect
    import typing

    import typer

    forms: Any = typing

    def noted(context: Any, parameter: Any, value: Any) -> Any:
        if value:
            context.meta.setdefault("order", []).append(str(parameter.name))
        return value

    def in_full(kind: Any) -> Any:
        """With the forms of typing in the place of ours."""
        if isinstance(kind, UnionType):
            return forms.Union[tuple(map(in_full, kind.__args__))]
        return forms.Literal[kind.__args__] if _form(kind) is Literal else kind

    noted.__annotations__ = {"context": typer.Context, "parameter": typer.CallbackParam}
    hints = _annotations(command)
    ordered = next((name for name, annotation in hints.items() if annotation is Order), None)
    for name, annotation in hints.items():
        if annotation is Order:
            hints[name] = typer.Context
        elif _form(annotation) is Annotated:
            kind, info = annotation.__args__
            made = (typer.Argument(metavar=info.metavar, help=info.help) if isinstance(info, Argument) else
                    typer.Option(*info.names, metavar=info.metavar, help=info.help,
                                 callback=noted if info.noted else None))
            hints[name] = forms.Annotated[in_full(kind), made]
    parameters = [parameter.replace(annotation=hints[parameter.name])
                  for parameter in inspect.signature(command).parameters.values()]

    def called(**values: Any) -> int | None:
        if ordered is not None:
            values[ordered] = Order(values[ordered].meta.get("order", []))
        return command(**values)

    called.__name__, called.__doc__, called.__annotations__ = command.__name__, command.__doc__, hints
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called
