"""Declarations become QEMU's introspection format."""

from __future__ import annotations

import asyncio
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest
from msgspec import UNSET, Meta, UnsetType

from blockstep.block.node import NodeOptions, NodeRef
from blockstep.qmp.commands import introspection
from blockstep.qmp.introspect import schema
from blockstep.qmp.schema import Arguments, Event, Registry, Result
from blockstep.qmp.server import Server
from tests.unit.qmp.support import REGISTRY, VERSION, Context, dial, hang_up

Entry = dict[str, Any]


class Colour(Enum):
    """An enum of Python's."""

    RED = "red"
    GREEN = "green"


class Inner(msgspec.Struct, rename="kebab"):
    """A nested struct that goes in and out."""

    size_limit: int
    note: str | UnsetType = UNSET
    count: int = 0


class Everything(Arguments):
    """Arguments with every kind of type."""

    text: str
    number: float
    flag: bool
    mode: Literal["on", "off"] = "on"
    colour: Colour = Colour.RED
    sizes: list[int] = msgspec.field(default_factory=list)
    inner: Inner | None = None
    either: int | str = 0
    none_too: str | UnsetType | None = UNSET
    free: dict[str, int] = msgspec.field(default_factory=dict)
    x_tuned: Annotated[int, Meta(ge=1)] = 1
    old: Annotated[int, Meta(extra={"features": ["deprecated"]})] = 1


class Everywhere(Result):
    """A result."""

    inner: Inner
    perhaps: int | UnsetType = UNSET
    null_if_none: int | None = None
    given_anyway: int = 3


class Action(Arguments, tag_field="type"):
    """What all actions have."""

    name: str


class Add(Action, tag="add"):
    """One action."""

    FEATURES: ClassVar[tuple[str, ...]] = ("quick",)
    size: int = 0


class Remove(Action, tag="remove"):
    """An action with nothing of its own."""


class Fork(NodeOptions, tag="fork"):
    """Options with children."""

    children: list[NodeRef]


class Leaf(NodeOptions, tag="leaf"):
    """Options without."""

    length: int = 0


class Only(msgspec.Struct, tag_field="kind", tag="only"):
    """A tagged struct outside of a union."""


commands = Registry()


@commands.command("all", oob=True, features=["deprecated"])
async def everything(context: Any, args: Everything) -> Everywhere:
    """Takes all."""
    raise NotImplementedError


@commands.command("x-act")
async def act(context: Any, args: Add | Remove) -> list[Only]:
    """Takes one of two."""
    raise NotImplementedError


@commands.command("node-add")
async def node_add(context: Any, args: Annotated[dict[str, Any], Meta(extra={"options": "driver"})]) -> None:
    """Takes options."""


@commands.event("HAPPENED")
class Happened(Event):
    """An event."""

    node_name: str
    why: str | UnsetType = UNSET


@pytest.fixture(scope="module")
def entries() -> dict[str, Entry]:
    found = schema(commands, commands.events.values(), {"driver": lambda: Fork | Leaf})
    plain: list[Entry] = msgspec.json.decode(msgspec.json.encode(found))
    by_name = {each["name"]: each for each in plain}
    assert len(by_name) == len(plain)
    return by_name


def members(entry: Entry) -> dict[str, tuple[str, bool]]:
    """Name -> (type, whether it is optional)."""
    for each in entry["members"]:
        assert each.get("default") is None
    return {each["name"]: (each["type"], "default" in each) for each in entry["members"]}


def test_a_command_names_its_types_and_says_what_is_special(entries: dict[str, Entry]) -> None:
    assert entries["all"] == {"name": "all", "meta-type": "command", "arg-type": "Everything",
                              "ret-type": "Everywhere", "allow-oob": True, "features": ["deprecated"]}
    assert entries["x-act"]["features"] == ["unstable"]
    assert "allow-oob" not in entries["x-act"]
    assert entries["HAPPENED"] == {"name": "HAPPENED", "meta-type": "event", "arg-type": "Happened"}


def test_every_type_that_is_mentioned_is_there(entries: dict[str, Entry]) -> None:
    for entry in entries.values():
        mentioned = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        if entry["meta-type"] in ("object", "alternate"):
            mentioned += [each["type"] for each in (*entry["members"], *entry.get("variants", ()))]
        assert set(mentioned) <= set(entries)


def test_arguments_have_types_and_what_has_a_default_is_optional(entries: dict[str, Entry]) -> None:
    assert members(entries["Everything"]) == {
        "text": ("str", False), "number": ("number", False), "flag": ("bool", False), "mode": ("off|on", True),
        "colour": ("Colour", True), "sizes": ("[int]", True), "inner": ("Inner", True), "either": ("int|str", True),
        "none-too": ("str|null", True), "free": ("any", True), "x-tuned": ("int", True), "old": ("int", True)}
    assert entries["Colour"]["values"] == ["red", "green"]
    assert entries["Colour"]["members"] == [{"name": "red"}, {"name": "green"}]
    assert entries["int|str"]["members"] == [{"type": "int"}, {"type": "str"}]
    assert entries["number"] == {"name": "number", "meta-type": "builtin", "json-type": "number"}
    features = {each["name"]: each.get("features") for each in entries["Everything"]["members"]}
    assert (features["x-tuned"], features["old"], features["text"]) == (["unstable"], ["deprecated"], None)


def test_of_results_only_what_may_be_unset_is_optional(entries: dict[str, Entry]) -> None:
    assert members(entries["Everywhere"]) == {
        "inner": ("Inner-2", False), "perhaps": ("int", True), "null-if-none": ("int|null", False),
        "given-anyway": ("int", False)}
    assert members(entries["Inner"])["count"] == ("int", True)
    assert members(entries["Inner-2"])["count"] == ("int", False)
    assert members(entries["Happened"]) == {"node-name": ("str", False), "why": ("str", True)}


def test_tagged_structs_become_an_object_with_variants(entries: dict[str, Entry]) -> None:
    action = entries[entries["x-act"]["arg-type"]]
    assert action["tag"] == "type"
    assert members(action) == {"type": ("Action.type", False), "name": ("str", False)}
    assert action["variants"] == [{"case": "add", "type": "Add"}, {"case": "remove", "type": "Empty"}]
    assert entries["Action.type"]["values"] == ["add", "remove"]
    assert members(entries["Add"]) == {"size": ("int", True)}
    assert entries["Add"]["features"] == ["quick"]
    assert entries["Empty"] == {"name": "Empty", "meta-type": "object", "members": []}
    assert members(entries["Only"]) == {"kind": ("only", False)}


def test_options_of_nodes_are_those_of_all_drivers_and_hold_each_other(entries: dict[str, Entry]) -> None:
    options = entries[entries["node-add"]["arg-type"]]
    assert options["name"] == "NodeOptions"
    assert {"driver", "node-name", "read-only"} <= set(members(options))
    assert options["variants"] == [{"case": "fork", "type": "Fork"}, {"case": "leaf", "type": "Leaf"}]
    assert members(entries["Fork"]) == {"children": ("[str|NodeOptions]", False)}
    assert entries["str|NodeOptions"]["members"] == [{"type": "str"}, {"type": "NodeOptions"}]


def test_a_monitor_is_told_what_it_may_do(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = Server(Registry.of(REGISTRY, introspection.commands), Context(), version=VERSION)
        try:
            await server.start_unix(tmp_path / "all")
            await server.start_unix(tmp_path / "few", allow=frozenset({"query-qmp-schema", "echo"}))
            for path, expected in (("all", {*REGISTRY.commands}), ("few", {"echo"})):
                peer = await dial(tmp_path / path)
                await peer.negotiate()
                answer: list[Entry] = (await peer.ask({"execute": "query-qmp-schema"}))["return"]
                offered = {each["name"] for each in answer if each["meta-type"] == "command"}
                assert offered == {*expected, "query-qmp-schema", "qmp_capabilities"}
                assert {"TICK", "SHUTDOWN"} <= {each["name"] for each in answer if each["meta-type"] == "event"}
        finally:
            await hang_up()
            await server.stop()

    asyncio.run(scenario())
