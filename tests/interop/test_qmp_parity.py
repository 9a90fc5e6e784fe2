"""What QEMU's own schema says of its commands and events, and what ours says of ours: the differences are on a page.

The page is docs/qmp-differences.md. A difference that it does not list fails, and so does a row without a difference.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.daemon import daemon
from tests.docs.story import ROOT
from tests.schemas import Difference, Schema, differences, documented

pytestmark = pytest.mark.interop

PAGE = ROOT / "docs" / "qmp-differences.md"
#: The version of QEMU that the page is about; others have more or fewer arguments.
VERSION = (7, 2)
#: Commands and events of the emulator, beyond those of the storage daemon, that are about disks.
OF_DISKS = re.compile(r"(?<!ram)block|nbd|drive|job|xen-|colo|yank|snapshot|eject|query-(name|status)|^(stop|cont)$")
EVENTS_OF_DISKS = re.compile(r"BLOCK|JOB|QUORUM|COLO|STOP|RESUME|SHUTDOWN")


def of_qemu(directory: Path) -> tuple[Schema, Schema]:
    """The schemas of the storage daemon and of the emulator."""
    peers.need("qemu-storage-daemon", "qemu-system-x86_64")
    path = directory / "qsd.qmp"
    with peers.monitored(["qemu-storage-daemon", "--chardev", f"socket,id=c,path={path},server=on,wait=off",
                          "--monitor", "chardev=c"], path) as (qmp, _):
        version = qmp.greeting["version"]["qemu"]
        storage = qmp.execute("query-qmp-schema")
    if (version["major"], version["minor"]) != VERSION:
        pytest.skip(f"the page is about QEMU {VERSION[0]}.{VERSION[1]}")
    with peers.qemu_system(directory) as emulator:
        return Schema(storage), Schema(emulator.execute("query-qmp-schema"))


def of_blockstep(directory: Path) -> Schema:
    async def ask() -> Any:
        async with daemon(directory) as d:
            return await d.qmp("query-qmp-schema")

    return Schema(asyncio.run(ask()))


def in_scope(difference: Difference, storage: Schema) -> bool:
    wanted = {"no such command": OF_DISKS, "no such event": EVENTS_OF_DISKS}.get(difference.what)
    return wanted is None or difference.where in storage.entries or bool(wanted.search(difference.where))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> set[Difference]:
    directory = tmp_path_factory.mktemp("parity")
    storage, emulator = of_qemu(directory)
    ours = of_blockstep(directory)
    return {each for theirs in (storage, emulator) for each in differences(ours, theirs) if in_scope(each, storage)}


def test_every_difference_from_qemu_has_its_reason_on_the_page(found: set[Difference]) -> None:
    rows = documented(PAGE)
    unlisted = [f"{each.where}: {each.what}" for each in sorted(found) if not any(row.covers(each) for row in rows)]
    assert not unlisted, "\n".join(unlisted)


def test_the_page_lists_nothing_that_is_as_in_qemu(found: set[Difference]) -> None:
    idle = [f"{row.where}: {row.what}" for row in documented(PAGE) if not any(row.covers(each) for each in found)]
    assert not idle, "\n".join(idle)


def smallest(schema: Schema, name: str, preferred: dict[str, str]) -> Any:
    """The smallest value of a type: required members only, of things that do not exist."""
    entry = schema.entries[name]
    if entry["meta-type"] == "object":
        value = {member["name"]: smallest(schema, member["type"], preferred)
                 for member in entry["members"] if "default" not in member}
        if "tag" in entry:
            case = preferred.get(entry["tag"], value[entry["tag"]])
            value[entry["tag"]] = case
            inner = {variant["case"]: variant["type"] for variant in entry["variants"]}
            value.update(smallest(schema, inner[case], preferred) if case in inner else {})
        return value
    if entry["meta-type"] == "array":
        return [smallest(schema, entry["element-type"], preferred)]
    if entry["meta-type"] == "alternate":
        return smallest(schema, entry["members"][-1]["type"], preferred)
    if entry["meta-type"] == "enum":
        return entry["values"][0]
    return {"string": "nobody", "boolean": True, "null": None, "value": "nobody"}.get(entry["json-type"], 1)


#: Cases that both have; commands that end the program, or of which the table says that they differ.
CASES = {"driver": "null-co", "qom-type": "secret", "type": "nbd"}
NOT_ASKED = {"quit", "qmp_capabilities"}


def outcome(qmp: peers.QMP, command: str, arguments: dict[str, Any]) -> str:
    try:
        qmp.ask(command, arguments)
    except RuntimeError as error:
        return str(error).removeprefix(f"{command}: ").partition(":")[0]
    return "success"


def test_commands_about_what_does_not_exist_are_refused_with_the_same_class(tmp_path: Path) -> None:
    peers.need("qemu-system-x86_64")
    path = tmp_path / "ours"
    with peers.qemu_system(tmp_path) as theirs, peers.started(
            peers.blockstep("daemon", "--qmp", f"unix:{path}"), path):
        ours = peers.QMP(path)
        schema = Schema(theirs.execute("query-qmp-schema"))
        shared = schema.of("command").keys() & Schema(ours.execute("query-qmp-schema")).of("command").keys()
        different = []
        for command in sorted(shared - NOT_ASKED):
            arguments = smallest(schema, schema.entries[command]["arg-type"], CASES)
            answers = outcome(ours, command, arguments), outcome(theirs, command, arguments)
            if answers[0] != answers[1]:
                different.append(f"{command} {arguments}: {answers[0]} for {answers[1]}")
        ours.close()
    assert not different, "\n".join(different)
