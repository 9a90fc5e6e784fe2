"""When files are looked at, and what becomes of what is seen."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstep.aio.posix import Fault
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.daemon import files as module
from blockstep.daemon.files import Files

WELL, MOVED, DELETED = None, Fault("moved", False), Fault("deleted", True)
SHORTENED = Fault("shortened", True, torn=True)


class Storage(Driver):
    """A node whose file is in a state that the test sets."""

    def __init__(self) -> None:
        self.name, self.children = "disk", {}
        self.gone = False
        self.fault: Callable[[], Fault | None] = lambda: WELL

    def storage_fault(self) -> Fault | None:
        return self.fault()


def test_they_are_looked_at_every_few_seconds_without_being_asked(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.001)
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))

    async def main() -> None:
        seen = asyncio.Event()
        files = Files(seen.set)
        graph = Graph()
        files.watch("disk", await graph.open({"driver": "file", "node-name": "disk", "filename": str(path)}))
        path.unlink()
        await asyncio.wait_for(seen.wait(), 10)
        assert "was deleted" in files.faults["disk"]
        await files.close()
        await graph.close(graph.find("disk"))

    asyncio.run(main())


def test_a_fault_is_told_once_and_one_that_lasts_for_good() -> None:
    async def main() -> None:
        told: list[dict[str, str]] = []
        storage, files = Storage(), Files(lambda: told.append(files.faults))
        files.watch("disk", storage)
        for fault in (WELL, MOVED, MOVED, WELL, DELETED, DELETED, WELL):
            storage.fault = lambda fault=fault: fault
            await files.look()
        await files.close()
        assert told == [{"disk": "moved"}, {}, {"disk": "deleted"}]

    asyncio.run(main())


def test_what_is_torn_counts_for_more_than_what_is_deleted_and_for_good() -> None:
    async def main() -> None:
        storage, files = Storage(), Files(lambda: None)
        files.watch("disk", storage)
        said = []
        for fault in (DELETED, MOVED, SHORTENED, DELETED, WELL):
            storage.fault = lambda fault=fault: fault
            await files.look()
            said.append((files.faults["disk"], list(files.torn.values())))
        await files.close()
        assert said == [("deleted", [])] * 2 + [("shortened", ["shortened"])] * 3

    asyncio.run(main())


def test_nothing_is_asked_in_the_event_loop() -> None:
    async def main() -> None:
        asked = []
        storage, files = Storage(), Files(lambda: None)

        def moved() -> Fault | None:
            asked.append(threading.current_thread())
            return MOVED

        storage.fault = moved
        files.watch("disk", storage)
        await files.look()
        await files.close()
        assert files.faults == {"disk": "moved"}
        assert threading.main_thread() not in asked

    asyncio.run(main())


def test_a_filesystem_that_hangs_holds_up_nobody_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.001)
    answers, looks = threading.Event(), []

    def hangs() -> Fault | None:
        looks.append(threading.current_thread())
        answers.wait(10)
        return MOVED

    async def main() -> None:
        storage, files = Storage(), Files(lambda: None)
        storage.fault = hangs
        files.watch("disk", storage)
        for _ in range(5):
            await files.look()
        assert (len(looks), files.faults) == (1, {})  # and no thread more than one
        answers.set()
        await files.close()
        assert files.faults == {"disk": "moved"}

    asyncio.run(main())


def test_a_filesystem_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.001)
    answers, told = threading.Event(), []

    def hangs() -> Fault | None:
        answers.wait(10)
        return MOVED

    async def main() -> None:
        storage, files = Storage(), Files(lambda: told.append(files.faults))
        storage.fault = hangs
        files.watch("disk", storage)
        try:
            await asyncio.wait_for(files.close(), 5)
        finally:
            answers.set()

    asyncio.run(main())
    assert told == []  # nor afterwards: the disk may be closed


def test_nodes_that_come_and_go_are_each_a_disk_and_a_new_one_of_a_name_is_a_new_one() -> None:
    async def main() -> None:
        told: list[dict[str, str]] = []
        nodes: dict[str, Driver] = {}
        one, other, again = Storage(), Storage(), Storage()
        one.fault, other.fault = lambda: DELETED, lambda: MOVED
        files = Files(lambda: told.append(files.faults))
        files.watch_each(nodes)
        for change in (lambda: nodes.update(a=one), lambda: nodes.update(b=other), lambda: nodes.update(a=again)):
            change()
            await files.look()
        await files.close()
        assert told == [{"a": "deleted"}, {"a": "deleted", "b": "moved"}, {"b": "moved"}]

    asyncio.run(main())


def test_a_node_that_is_closed_while_it_is_looked_at_has_no_fault() -> None:
    async def main() -> None:
        storage, other, files = Storage(), Storage(), Files(lambda: None)

        def closing() -> Fault | None:
            storage.gone = True
            return DELETED

        storage.fault, other.fault = closing, lambda: MOVED
        files.watch_each({"a": storage, "b": other})
        await files.look()
        await files.close()
        assert files.faults == {"b": "moved"}

    asyncio.run(main())
