"""What the storage daemon declares is whole: every event that is reported, every argument described, all decodable."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

import blockstep
from blockstep.daemon.storage import AREAS
from blockstep.qmp.errors import CommandError
from blockstep.qmp.schema import Command, Registry

WHOLE = Registry.of(*AREAS)
SOURCE = Path(blockstep.__file__).parent
#: Where the core reports events by name.
CORE = ("block", "drivers", "jobs", "inventory", "replication", "nbd")
EVENT = re.compile(r'"((?:BLOCK|JOB|QUORUM|NBD|COLO|REPLICATION)_[A-Z_]*[A-Z]|STOP|RESUME)"')
#: Commands whose arguments are checked before they run; those of the others are options of a driver.
CHECKED_AT_ONCE = [command for command in WHOLE
                   if not isinstance(msgspec.inspect.type_info(command.arguments_type), msgspec.inspect.Metadata)]


def test_every_event_that_the_core_reports_is_declared() -> None:
    named = {name for part in CORE for path in (SOURCE / part).rglob("*.py")
             for name in EVENT.findall(path.read_text())}
    assert {"JOB_STATUS_CHANGE", "QUORUM_REPORT_BAD", "BLOCK_EXPORT_DELETED"} <= named
    assert named - WHOLE.events.keys() == set()


@pytest.mark.parametrize("command", [*WHOLE], ids=lambda command: command.name)
def test_a_command_says_what_it_does_and_what_its_arguments_mean(command: Command) -> None:
    assert command.doc.split("\n\n")[0].rstrip().endswith((".", ":"))
    assert [argument.name for argument in command.arguments if not argument.doc] == []


@pytest.mark.parametrize("command", CHECKED_AT_ONCE, ids=lambda command: command.name)
def test_arguments_that_are_not_known_are_refused_by_name(command: Command) -> None:
    with pytest.raises(CommandError, match=r"'no-such-argument' is not known|is missing"):
        command.decode(b'{"no-such-argument": 1}')


@pytest.mark.parametrize("name", sorted(WHOLE.events))
def test_an_event_can_be_sent(name: str) -> None:
    kind = WHOLE.events[name]
    assert kind.doc
    fields = {field.name for field in msgspec.structs.fields(kind.type)}
    assert set(kind.per) <= fields
