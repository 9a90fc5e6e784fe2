"""What the two ends of a pair tell each other of their files, also when they are of different versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from blockstep.block.graph import Graph
from blockstep.daemon.disks import with_faults
from blockstep.daemon.files import Files
from blockstep.daemon.following import Following
from blockstep.daemon.ledger import Ledger
from blockstep.daemon.primary_setup import PrimaryConfig
from blockstep.daemon.primary_standby import StandbySide
from blockstep.daemon.standby_link import PrimarysSide
from blockstep.daemon.standby_setup import StandbyConfig
from blockstep.daemon.standby_status import Situation
from blockstep.errors import BlockstepError
from blockstep.jobs.registry import JobRegistry
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.qmp.commands import replication as qmp
from blockstep.replication.registry import ReplicationRegistry

HERE = InetAddress("localhost", 1)
NOWHERE = UnixAddress("none")
GONE = {"disk0": "deleted"}
WORD = [{"name": "disk0", "fault": "deleted"}]

Answer = Mapping[str, Any]


def answer(**disk: Any) -> Answer:
    return {"role": "standby", "state": "replicating", "of-a-later-version": {},
            "disks": [{"name": "disk0", "buffer-used": 0, "buffer-limit": 0, "more": 1, **disk}]}


class Primary:
    """A primary's side of the connection, to a standby that gives these answers, one after the other.

    It keeps what it is asked; before each answer ``meanwhile`` may change the primary's own files.
    """

    def __init__(self, *answers: Answer, meanwhile: Callable[[Files, int], object] = lambda files, asked: None) -> None:
        self.questions: list[Answer] = []
        self.heard: list[dict[str, str]] = []
        self.failed: list[object] = []
        self._answers, self._meanwhile = iter(answers), meanwhile
        self._files = Files(lambda: None)
        config = PrimaryConfig("test", (), HERE, NOWHERE, Path("none"), Path("none"), max_stall=0.0)
        ledger = Ledger(Path("none"), "test", Graph(), {}, self._files)
        self.side = StandbySide(config, Graph(), {}, self._files, ledger,
                                self.failed.append, lambda work: work.close(),
                                lambda: self.heard.append(self.side.faults))

    async def watch(self) -> None:
        """Until there are no more answers: the standby is gone then."""
        control: Any = self
        self.side.control = control
        await self.side._watch(control)

    async def execute(self, command: str, arguments: Answer, *, timeout: float) -> Answer:
        assert command == "pair-query"
        self._meanwhile(self._files, len(self.questions))
        self.questions.append(dict(arguments))
        try:
            return next(self._answers)
        except StopIteration:
            raise ConnectionError("gone") from None

    async def ended(self, limit: float) -> bool:
        return False


def test_a_primary_tells_of_each_change_of_what_its_standby_says() -> None:
    primary = Primary(*(answer(fault=fault) for fault in ("", "moved", "moved", "deleted", "", "")))
    asyncio.run(primary.watch())
    assert primary.heard == [{"disk0": "moved"}, {"disk0": "deleted"}, {}]


def test_what_a_standby_has_said_is_forgotten_with_it() -> None:
    primary = Primary(answer(fault="deleted"))
    asyncio.run(primary.watch())
    assert primary.side.faults == GONE
    primary.side.cut_off()
    assert primary.side.faults == {}


def test_an_answer_that_comes_when_the_standby_has_been_let_go_says_nothing() -> None:
    primary = Primary(answer(fault="deleted"), meanwhile=lambda files, asked: primary.side.cut_off())
    asyncio.run(primary.watch())
    assert (primary.heard, primary.side.faults) == ([], {})


def test_a_primary_says_how_its_files_are_with_each_question() -> None:
    def meanwhile(files: Files, asked: int) -> None:
        files.faults = GONE if asked == 1 else {}

    primary = Primary(*[answer(fault="")] * 3, meanwhile=meanwhile)
    asyncio.run(primary.watch())
    assert primary.questions == [{}, {"faults": []}, {"faults": WORD}, {"faults": []}]


def test_a_standby_of_an_older_version_is_asked_as_it_is_used_to() -> None:
    def meanwhile(files: Files, asked: int) -> None:
        files.faults = GONE

    primary = Primary(*[answer()] * 3, meanwhile=meanwhile)
    asyncio.run(primary.watch())
    assert primary.questions == [{}] * 4
    assert primary.heard == []


class Standby:
    """A standby to which a primary is attached, which is all that it knows."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        config = StandbyConfig("test", (), HERE, NOWHERE, Path("none"), Path("none"), 0, None)
        self.now = Situation(config, lambda: 0.0, Files(lambda: None))
        graph = Graph()
        self.link = PrimarysSide(self.now, graph, ReplicationRegistry(graph, JobRegistry()),
                                 Following(Path("none"), "test", graph, {}, Files(lambda: None), lambda: False),
                                 lambda: self.told.append(self.now.health()),
                                 lambda: self.now.status("", [], []), lambda disk, error: None)
        self.primary: Any = SimpleNamespace(peer="primary")
        self.now.primary = self.primary

    def hears(self, arguments: Answer, monitor: Any = None) -> qmp.PairStatus:
        """The command, as it comes over the wire."""
        args = msgspec.json.decode(msgspec.json.encode(arguments), type=qmp.PairQueryArguments)
        return self.link.heard(args, monitor or self.primary)


def test_a_standby_tells_once_what_its_primary_says_and_once_that_it_is_mended() -> None:
    standby = Standby()
    for faults in ([], WORD, WORD, [], []):
        standby.hears({"faults": faults})
    said = "disk 'disk0' of the primary: deleted; there is no checkpoint yet"
    assert standby.told == [("at-risk", said), ("at-risk", "there is no checkpoint yet")]


def test_a_primary_of_an_older_version_says_nothing() -> None:
    standby = Standby()
    assert standby.hears({}).reason == "there is no checkpoint yet"
    assert standby.told == []


def test_only_the_primary_that_is_attached_is_believed_and_only_as_long_as_it_counts() -> None:
    standby = Standby()
    assert "deleted" not in standby.hears({"faults": WORD}, SimpleNamespace(peer="somebody")).reason
    assert "deleted" in standby.hears({"faults": WORD}).reason
    standby.now.promoted_to = "latest"
    assert standby.now.health() == ("degraded", "it has no standby of its own")
    standby.now.promoted_to, standby.now.primary = "", None
    assert "deleted" not in standby.now.health()[1]


def test_a_primary_that_comes_again_has_said_nothing_yet() -> None:
    async def main() -> None:
        standby = Standby()
        standby.hears({"faults": WORD})
        again: Any = SimpleNamespace(peer="primary", gone=asyncio.Event())
        with pytest.raises(BlockstepError, match="not ready"):  # it has no exports; the primary has its place by then
            await standby.link.attach(qmp.AttachArguments(pair="test", instance="", disks=[]), again)
        assert standby.now.primary is again
        assert "deleted" not in standby.now.health()[1]
        again.gone.set()

    asyncio.run(main())


@pytest.mark.parametrize(("faults", "expected"), [
    ([], ("degraded", "no checkpoint: x was cut")),
    (["x was cut"], ("at-risk", "no checkpoint: x was cut")),
    (["y was cut", "x was cut"], ("at-risk", "y was cut; no checkpoint: x was cut")),
])
def test_a_fault_is_told_once_when_it_is_the_reason_as_well(faults: list[str], expected: tuple[str, str]) -> None:
    assert with_faults(("degraded", "no checkpoint: x was cut"), faults) == expected
