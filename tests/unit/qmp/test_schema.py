"""One declaration gives the checking, the errors, and the reference of a command."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest

from blockstep.errors import ConnectionLost, JobNotFound, NodeNotFound, OptionError
from blockstep.qmp.commands import replication
from blockstep.qmp.errors import CommandError, describe
from blockstep.qmp.schema import Arguments, Event, Registry, explain
from tests.unit.qmp.support import REGISTRY, registry


class File(msgspec.Struct, tag_field="driver", tag="file", rename="kebab", forbid_unknown_fields=True):
    """One alternative."""

    filename: str


class Raw(msgspec.Struct, tag_field="driver", tag="raw", rename="kebab", forbid_unknown_fields=True):
    """The other one."""

    file: File
    offset: int = 0


class Everything(Arguments):
    """Arguments with every kind of type."""

    node_name: str
    mode: Literal["primary", "secondary"] = "primary"
    sizes: list[int] = msgspec.field(default_factory=list)
    on: bool = True
    either: int | str = 0


commands = Registry()


@commands.command("all")
async def everything(context: Any, args: Everything) -> None:
    """Takes all."""


@commands.command("add")
async def add(context: Any, args: File | Raw) -> None:
    """Takes one of two."""


@pytest.mark.parametrize(("command", "arguments", "sentence"), [
    ("all", b"{}", "argument 'node-name' is missing"),
    ("all", b'{"node-name": 5}', "argument 'node-name' must be a string, not an integer"),
    ("all", b'{"node-name": null}', "argument 'node-name' must be a string, not null"),
    ("all", b'{"node-name": "a", "node_name": "b"}', "argument 'node_name' is not known"),
    ("all", b'{"node-name": "a", "sizes": [1, "x"]}', "argument 'sizes[1]' must be an integer, not a string"),
    ("all", b'{"node-name": "a\\u0000"}', "argument 'node-name' must be a string without NUL"),
    ("all", b'{"node-name": "a", "sizes": [1, 9223372036854775808]}',
     "argument 'sizes[1]' must be an integer <= 9223372036854775807"),
    ("all", b'{"node-name": "a", "either": -9223372036854775809}',
     "argument 'either' must be an integer >= -9223372036854775808"),
    ("add", b'{"driver": "raw", "file": {"driver": "file", "filename": "f"}, "offset": 1' + b"0" * 30 + b"}",
     "argument 'offset' must be an integer <= 9223372036854775807"),
    ("all", b'{"node-name": "a", "sizes": {}}', "argument 'sizes' must be an array, not an object"),
    ("all", b'{"node-name": "a", "mode": "third"}', "argument 'mode' cannot be 'third'"),
    ("all", b'{"node-name": "a", "on": 1}', "argument 'on' must be true or false, not an integer"),
    ("all", b'{"node-name": "a", "either": 1.5}', "argument 'either' must be an integer or a string, not a number"),
    ("add", b"{}", "argument 'driver' is missing"),
    ("add", b'{"driver": "tape"}', "argument 'driver' cannot be 'tape'"),
    ("add", b'{"driver": "raw", "file": {"driver": "file"}}', "argument 'file.filename' is missing"),
])
def test_an_error_names_the_argument(command: str, arguments: bytes, sentence: str) -> None:
    with pytest.raises(CommandError) as caught:
        commands.commands[command].decode(arguments)
    assert (caught.value.error_class, caught.value.description) == ("GenericError", sentence)


@pytest.mark.parametrize("arguments", [b'{"node-name": "\xff"}', b'{"node-name": "\\ud800"}', b'{"node-name": '])
def test_arguments_that_are_no_json_are_an_error_of_the_peer(arguments: bytes) -> None:
    with pytest.raises(CommandError):
        commands.commands["all"].decode(arguments)


def test_the_range_of_a_number_is_said() -> None:
    with pytest.raises(CommandError, match="'times' must be an integer <= 3"):
        REGISTRY.commands["echo"].decode(b'{"node-name": "a", "times": 9}')


def test_an_unknown_sentence_is_passed_on() -> None:
    assert explain("Something new - at `$.a.b`") == "argument 'a.b': Something new"


def test_the_reference_knows_names_defaults_and_descriptions() -> None:
    echo = REGISTRY.commands["echo"]
    assert echo.doc == "Say it again."
    assert [(each.name, each.required, each.doc) for each in echo.arguments] == [
        ("node-name", True, "What to say."), ("times", False, "")]
    assert echo.result_type.__name__ == "Echoed"
    assert [each.name for each in commands.commands["add"].arguments] == ["filename", "file", "offset"]


def test_areas_are_added_together_and_a_name_is_declared_once() -> None:
    assert {"echo", "query-version"} <= set(REGISTRY.commands)
    assert {"TICK", "SHUTDOWN"} <= set(REGISTRY.events)
    with pytest.raises(ValueError, match="twice"):
        Registry.of(registry, registry)
    with pytest.raises(ValueError, match="'echo' is declared twice"):
        registry.command("echo")(everything)


def test_a_listener_may_offer_less_but_not_what_does_not_exist() -> None:
    assert set(REGISTRY.offered(frozenset({"echo"}))) == {"echo"}
    with pytest.raises(KeyError):
        REGISTRY.offered(frozenset({"ecko"}))


def test_a_command_without_arguments_type_is_refused_when_it_is_declared() -> None:
    with pytest.raises(TypeError, match="context, args"):
        @commands.command("short")
        async def short(context: Any) -> None: ...


def test_fields_of_events_are_in_kebab_case() -> None:
    @commands.event("NODE")
    class Node(Event):
        """An event."""

        node_name: str

    assert msgspec.json.encode(Node(node_name="a")) == b'{"node-name":"a"}'
    assert (Node.kind.name, Node.kind.doc) == ("NODE", "An event.")


@pytest.mark.parametrize(("error", "error_class"), [
    (NodeNotFound("a"), "DeviceNotFound"), (JobNotFound("a"), "DeviceNotActive"),
    (CommandError("no", "CommandNotFound"), "CommandNotFound"), (OptionError("a", 1, "2"), "GenericError"),
    (ConnectionLost("gone"), "GenericError"), (TimeoutError(), "GenericError"), (KeyError("a"), "GenericError")])
def test_every_error_has_a_class_and_a_description(error: Exception, error_class: str) -> None:
    found, description = describe(error)
    assert found == error_class
    assert description
    assert description.startswith("internal error") == isinstance(error, KeyError)


@pytest.mark.parametrize(("command", "arguments", "sentence"), [
    ("pair-attach", {"disks": [{"name": "a", "size": 1 << 63}]}, "'disks[0].size' must be an integer <= 922"),
    ("pair-attach", {"disks": [{"name": "a", "size": -1}]}, "'disks[0].size' must be an integer >= 0"),
    ("pair-attach", {"silence": -1}, "'silence' must be a number >= 0"),
    ("pair-resize", {"disk": "a", "size": 1 << 63, "now": 0}, "'size' must be an integer <= 922"),
    ("pair-resize", {"disk": "a", "size": 0, "now": -1}, "'now' must be an integer >= 0"),
    ("pair-checkpoint", {"epoch": 0}, "'epoch' must be an integer >= 1"),
])
def test_what_a_primary_may_send_has_bounds(command: str, arguments: dict[str, Any], sentence: str) -> None:
    if command == "pair-attach":
        arguments = {"pair": "p", "instance": "i", "disks": [], **arguments}
    with pytest.raises(CommandError) as caught:
        replication.peer_commands.commands[command].decode(msgspec.json.encode(arguments))
    assert sentence in caught.value.description
