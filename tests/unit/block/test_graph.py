"""The control half of the graph: changes happen wholly or not at all, and under live I/O."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockstep.drivers  # noqa: F401
from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import Driver, Prepared
from blockstep.block.graph import Change, Graph
from blockstep.block.io import Backend
from blockstep.block.node import NodeOptions
from blockstep.block.permissions import ALL, READ, WRITE, Permission, Role
from blockstep.block.registry import register
from blockstep.block.snapshot import prepare_snapshot
from blockstep.errors import GraphError, NodeNotFound, OperationBlocked, OptionError, PermissionConflict, told
from blockstep.qmp.errors import describe
from tests.disks import Ram, RamOptions, faulty, ram


def picture(graph: Graph) -> dict[str, Any]:
    """All that a change may touch, comparable."""
    return {name: {
        "children": [(edge.name, edge.node.name, edge.taken, edge.shared) for edge in node.children.values()],
        "parents": sorted((edge.parent.description, edge.name, edge.taken, edge.shared) for edge in node.parents),
        "read_only": node.read_only,
    } for name, node in graph.nodes.items()}


# --- open and close ---


class UnwillingOptions(RamOptions, tag="test-unwilling"):
    """A disk that cannot be closed in order, nor opened if it has a backing node."""


@register
class Unwilling(Ram):
    driver: ClassVar[str] = "test-unwilling"
    Options = UnwillingOptions

    async def open(self) -> None:
        if "backing" in self.children:
            raise OSError(errno.EMEDIUMTYPE, f"{self.name} does not open")
        await super().open()

    async def close(self) -> None:
        raise OSError(errno.EIO, f"{self.name} does not close")


def test_an_opening_that_fails_tells_its_own_error_first_and_then_that_of_closing_its_children() -> None:
    async def main() -> None:
        graph = Graph()
        with pytest.raises(OSError, match="top does not open") as caught:
            await graph.open({"driver": "test-unwilling", "node-name": "top",
                              "backing": {"driver": "test-unwilling", "node-name": "below"}})
        assert told(caught.value) == "top does not open; and then: below does not close"
        assert describe(caught.value) == ("GenericError", told(caught.value))
        assert not graph.everything()

    asyncio.run(main())


def test_all_that_goes_wrong_in_closing_is_told_the_first_of_it_first() -> None:
    async def main() -> None:
        graph = Graph()
        await graph.open({"driver": "test-unwilling", "node-name": "below"})
        top = await graph.open({"driver": "test-ram", "node-name": "top", "backing": "below"})
        top.close = graph.nodes["below"].close  # type: ignore[method-assign]
        graph.nodes["below"].owned = False
        with pytest.raises(OSError, match="below does not close") as caught:
            await graph.close(top)
        assert told(caught.value) == "below does not close; and then: below does not close"
        assert not graph.everything()

    asyncio.run(main())


class SlowOptions(RamOptions, tag="test-slow"):
    """A disk that takes until it is let go to open, and to close."""


@register
class Slow(Ram):
    driver: ClassVar[str] = "test-slow"
    Options = SlowOptions

    go: ClassVar[asyncio.Event]
    begun: ClassVar[asyncio.Event]

    async def open(self) -> None:
        await self._wait()
        await super().open()

    async def close(self) -> None:
        await self._wait()
        await super().close()

    async def _wait(self) -> None:
        self.begun.set()
        await self.go.wait()
        self.go.clear()


def test_a_node_is_found_by_nobody_before_it_is_open_and_from_its_closing_on() -> None:
    async def main() -> None:
        graph = Graph()
        Slow.go, Slow.begun = asyncio.Event(), asyncio.Event()

        async def meanwhile(doing: asyncio.Future[Any]) -> None:
            await Slow.begun.wait()
            Slow.begun.clear()
            with pytest.raises(NodeNotFound):
                graph.find("disk")
            with pytest.raises(NodeNotFound):
                await graph.open({"driver": "raw", "node-name": "user", "file": "disk"})
            with pytest.raises(OptionError, match="no other node has"):
                await graph.open({"driver": "test-ram", "node-name": "disk"})
            assert graph.nodes == {}
            assert [node.name for node in graph.everything()] == ["disk"]
            Slow.go.set()
            await doing

        await meanwhile(asyncio.ensure_future(graph.open({"driver": "test-slow", "node-name": "disk"})))
        await meanwhile(asyncio.ensure_future(graph.close(graph.find("disk"))))
        assert graph.everything() == []
        await ram(graph, "disk")

    asyncio.run(main())


class SlowFlush(Ram):
    """A disk whose flushes wait until it is let go."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.go, self.begun = asyncio.Event(), asyncio.Event()

    async def flush(self) -> None:
        self.begun.set()
        await self.go.wait()
        await super().flush()


@register
class SlowToFlush(SlowFlush):
    driver: ClassVar[str] = "test-slow-flush"

    class Options(RamOptions, tag="test-slow-flush"):
        pass


def test_a_user_who_has_left_is_left_alone_when_a_change_is_taken_back() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        overlay = await graph.open({"driver": "overlay", "node-name": "overlay", "size": 1 << 16})
        leaving, staying = graph.attach_backend(disk, "leaving"), graph.attach_backend(disk, "staying")
        async with graph.drained(disk):
            prepared = prepare_snapshot(disk, overlay)
            await graph.detach_backend(leaving)
            prepared.abort()
        assert disk.parents == [staying.edge]
        assert not overlay.parents
        await graph.detach_backend(staying)

    asyncio.run(main())


def test_a_change_waits_for_a_flush_in_its_way() -> None:
    async def main() -> None:
        graph = Graph()
        await ram(graph, "disk")
        target = await graph.open({"driver": "test-slow-flush", "node-name": "target"})
        assert isinstance(target, SlowFlush)
        top = await graph.open({"driver": "copy-before-write", "node-name": "filter", "file": "disk",
                                "target": "target"})
        above = await graph.open({"driver": "raw", "node-name": "above", "file": "filter"})
        flushing = asyncio.ensure_future(graph.flush(above))
        await target.begun.wait()
        removing = asyncio.ensure_future(graph.remove_filter(top))
        await asyncio.sleep(0)
        target.go.set()
        await flushing
        await removing
        assert [node.name for node in above.below()] == ["disk"]

    asyncio.run(main())


def test_a_closed_node_gets_no_new_users() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        await graph.close(disk)
        with pytest.raises(NodeNotFound):
            graph.attach_backend(disk, "export e1")
        assert disk.parents == []

    asyncio.run(main())


def test_a_node_cannot_be_its_own_child() -> None:
    async def main() -> None:
        graph = Graph()
        with pytest.raises(NodeNotFound):
            await graph.open({"driver": "overlay", "node-name": "self", "backing": "self", "size": 4096})
        assert graph.everything() == []

    asyncio.run(main())


def test_inline_children_are_opened_with_their_parent_and_closed_with_it() -> None:
    async def main() -> None:
        graph = Graph()
        node = await graph.open({"driver": "blkdebug", "node-name": "top",
                                 "file": {"driver": "throttle", "limits": {}, "node-name": "middle",
                                          "file": {"driver": "test-ram", "node-name": "disk"}}})
        assert {*graph.nodes} == {"top", "middle", "disk"}
        assert [below.name for below in node.below()] == ["middle", "disk"]
        disk = graph.find("disk")
        await graph.close(node)
        assert graph.nodes == {}
        assert isinstance(disk, Ram)
        assert disk.closed

    asyncio.run(main())


def test_a_node_named_by_the_user_outlives_its_parents() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        node = await graph.open({"driver": "blkdebug", "file": "disk"})
        await graph.close(node)
        assert list(graph.nodes) == ["disk"]
        assert not disk.closed

    asyncio.run(main())


def test_a_node_in_use_is_not_closed_and_the_users_are_named() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        user = graph.attach_backend(disk, "export e1")
        with pytest.raises(GraphError, match="export e1"):
            await graph.close(disk)
        await graph.detach_backend(user)
        lift = disk.block_operations("a job is running", "remove")
        with pytest.raises(OperationBlocked, match="a job is running"):
            await graph.close(disk)
        lift()
        await graph.close(disk)
        assert graph.nodes == {}

    asyncio.run(main())


@pytest.mark.parametrize(("options", "error"), [
    ({"driver": "nonsense"}, OptionError),
    ({}, OptionError),
    ({"driver": "test-ram", "node-name": "taken"}, OptionError),
    ({"driver": "test-ram", "node-name": "9lives"}, OptionError),
    ({"driver": "test-ram", "size": "big"}, OptionError),
    ({"driver": "test-ram", "colour": "red"}, OptionError),
    ({"driver": "blkdebug", "file": "absent"}, NodeNotFound),
    ({"driver": "quorum", "vote-threshold": 1, "children": [{"driver": "test-ram"}, "absent"]}, NodeNotFound),
    ({"driver": "quorum", "vote-threshold": 9, "children": [{"driver": "test-ram"}]}, OptionError),
    ({"driver": "test-storage", "file": {"driver": "test-ram", "read-only": True}}, GraphError),
])
def test_a_failed_open_leaves_nothing_behind(options: dict[str, Any], error: type[Exception]) -> None:
    async def main() -> None:
        graph = Graph()
        await ram(graph, "taken")
        before = picture(graph)
        with pytest.raises(error):
            await graph.open(options)
        assert picture(graph) == before

    asyncio.run(main())


class StorageOptions(NodeOptions, tag="test-storage"):
    file: str | dict[str, Any]


@register
class Storage(Driver):
    """A format, as far as permissions go: it writes to its file, and nobody else may."""

    driver: ClassVar[str] = "test-storage"
    Options = StorageOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.STORAGE}

    async def open(self) -> None:
        self.length = self.children["file"].node.length


# --- permissions ---


def test_a_conflict_names_both_users_the_node_and_the_permission() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        graph.attach_backend(disk, "export e1", READ, ALL & ~WRITE)
        with pytest.raises(PermissionConflict) as caught:
            graph.attach_backend(disk, "job j1", READ | WRITE)
        error = caught.value
        assert (error.node, error.wanted_by, error.refused_by, error.permission) == \
            ("disk", "job j1", "export e1", "write")

    asyncio.run(main())


def test_a_conflict_far_below_refuses_the_user_above() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        await graph.open({"driver": "blkdebug", "node-name": "middle", "file": "disk"})
        top = await graph.open({"driver": "blkdebug", "node-name": "top", "file": "middle"})
        graph.attach_backend(disk, "reader", READ, READ)
        before = picture(graph)
        with pytest.raises(PermissionConflict, match="reader"):
            graph.attach_backend(top, "writer", READ | WRITE)
        assert picture(graph) == before
        graph.attach_backend(top, "another reader", READ)

    asyncio.run(main())


def test_permissions_go_down_while_somebody_needs_them() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        top = await graph.open({"driver": "blkdebug", "file": "disk"})
        assert disk.parents[0].taken == Permission(0)
        user = graph.attach_backend(top, "user", READ | WRITE)
        assert disk.parents[0].taken == READ | WRITE
        await graph.detach_backend(user)
        assert disk.parents[0].taken == Permission(0)

    asyncio.run(main())


def test_a_read_only_node_has_no_writers() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk", 4096, **{"read-only": True})
        with pytest.raises(GraphError, match=r"read-only.*writer"):
            graph.attach_backend(disk, "writer", WRITE)
        top = await graph.open({"driver": "blkdebug", "file": "disk"})
        with pytest.raises(GraphError, match="read-only"):
            graph.attach_backend(top, "writer", WRITE)

    asyncio.run(main())


# --- changes ---


def test_cycles_are_refused() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        top = await graph.open({"driver": "blkdebug", "file": "disk"})
        before = picture(graph)
        with pytest.raises(GraphError, match="below"):
            with graph.change() as change:
                change.attach(disk, "backing", Role.BACKING, top)
        with pytest.raises(GraphError, match="below"):
            with graph.change() as change:
                change.move(top.children["file"], top)
        with pytest.raises(GraphError, match="already"):
            with graph.change() as change:
                change.attach(top, "file", Role.FILTERED, disk)
        assert picture(graph) == before

    asyncio.run(main())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(("attach", "detach", "move", "replace", "read-only", "take")),
                          st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8))
def test_whatever_a_change_did_its_failure_takes_back(steps: list[tuple[str, int, int]]) -> None:
    """Random steps, then a failure; also steps that are refused by themselves."""

    def step(graph: Graph, change: Change, kind: str, first: int, second: int) -> None:
        nodes = list(graph.nodes.values())
        one, other = nodes[first % len(nodes)], nodes[second % len(nodes)]
        edges = [edge for node in nodes for edge in node.children.values()]
        if kind == "attach":
            change.attach(one, f"extra{second}", Role.DATA, other)
        elif kind == "detach" and edges:
            change.detach(edges[first % len(edges)])
        elif kind == "move" and edges:
            change.move(edges[first % len(edges)], other)
        elif kind == "replace":
            change.replace(one, other)
        elif kind == "read-only":
            change.set_read_only(one, not one.read_only)
        elif one.parents:
            change.take(one.parents[0], READ | WRITE, READ)

    async def main() -> None:
        graph = Graph()
        for name in ("a", "b"):
            await ram(graph, name)
        await graph.open({"driver": "quorum", "node-name": "q", "children": ["a", "b"], "vote-threshold": 1})
        top = await graph.open({"driver": "blkdebug", "node-name": "top", "file": "q"})
        user = graph.attach_backend(top, "user", READ | WRITE)
        before = picture(graph)
        with pytest.raises((ZeroDivisionError, GraphError)):
            with graph.change() as change:
                for kind, first, second in steps:
                    step(graph, change, kind, first, second)
                change.finish()
                raise ZeroDivisionError
        assert picture(graph) == before
        await user.pwrite(0, b"still works")
        assert await user.pread(0, 5) == b"still"

    asyncio.run(main())


def test_replace_leaves_the_filters_own_edge() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        user = graph.attach_backend(disk, "user", READ)
        top = await graph.open({"driver": "blkdebug", "node-name": "top", "file": "disk"})
        with graph.change() as change:
            change.replace(disk, top)
        assert user.node is top
        assert top.children["file"].node is disk

    asyncio.run(main())


# --- filters under live I/O ---


def test_filters_come_and_go_under_live_io() -> None:
    async def main() -> None:
        graph = Graph()
        door, disk = await faulty(graph, "door")
        user = graph.attach_backend(door, "guest", READ | WRITE)
        written = 0
        stop = False

        async def guest(lane: int) -> None:
            nonlocal written
            while not stop:
                data = bytes((written & 255,)) * 100
                await user.pwrite(lane * 100, data)
                assert await user.pread(lane * 100, 100) == data
                written += 1
                await asyncio.sleep(0)

        guests = [asyncio.create_task(guest(lane)) for lane in range(4)]
        for turn in range(5):
            door.suspend("write", "held")
            await door.suspended("held")
            inserting = asyncio.create_task(graph.insert_filter({"driver": "blkdebug", "node-name": f"f{turn}",
                                                                 "file": "door"}, door))
            for _ in range(3):
                await asyncio.sleep(0)
            assert user.node is door, "the filter came while a request was in flight"
            door.resume("held")
            node = await inserting
            assert user.node is node
            for _ in range(5):
                await asyncio.sleep(0)
            await graph.remove_filter(node)
            assert user.node is door
            assert f"f{turn}" not in graph.nodes
        stop = True
        await asyncio.gather(*guests)
        assert written > 20
        assert len(disk.requests) == 2 * written

    asyncio.run(main())


def test_a_filter_that_cannot_be_inserted_leaves_the_graph_and_is_closed() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        user = graph.attach_backend(disk, "guest", READ | WRITE)
        before = picture(graph)
        with pytest.raises(GraphError):  # a read-only filter under a writer
            await graph.insert_filter({"driver": "blkdebug", "node-name": "f", "file": "disk", "read-only": True}, disk)
        assert picture(graph) == before
        await user.pwrite(0, b"x")

    asyncio.run(main())


# --- reopen ---


class ReopenOptions(RamOptions, tag="test-reopen"):
    pass


@register
class Reopened(Ram):
    """Keeps a record of what `Graph.reopen` asked of it, and fails when told."""

    driver: ClassVar[str] = "test-reopen"
    Options = ReopenOptions
    record: ClassVar[list[str]] = []
    fail: ClassVar[set[str]] = set()

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        await asyncio.sleep(0)
        self.record.append(f"prepare {self.name}")
        if self.name in self.fail:
            raise OSError(errno.EROFS, "a read-only file system")
        return Prepared(lambda: self.record.append(f"commit {self.name}"),
                        lambda: self.record.append(f"abort {self.name}"))


async def three(graph: Graph) -> list[Driver]:
    Reopened.record.clear()
    Reopened.fail.clear()
    return [await graph.open({"driver": "test-reopen", "node-name": name, "read-only": True}) for name in "abc"]


def test_several_nodes_are_reopened_together() -> None:
    async def main() -> None:
        graph = Graph()
        nodes = await three(graph)
        await graph.reopen([(node, {"read-only": False}) for node in nodes])
        assert [node.read_only for node in nodes] == [False] * 3
        assert Reopened.record == [f"prepare {n}" for n in "abc"] + [f"commit {n}" for n in "abc"]

    asyncio.run(main())


@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_one_node_that_cannot_be_reopened_keeps_all_as_they_were(failing: str) -> None:
    async def main() -> None:
        graph = Graph()
        nodes = await three(graph)
        Reopened.fail.add(failing)
        with pytest.raises(OSError):
            await graph.reopen([(node, {"read-only": False}) for node in nodes])
        assert [node.read_only for node in nodes] == [True] * 3
        prepared = "abc"["abc".index("a"):"abc".index(failing)]
        assert [entry for entry in Reopened.record if "abort" in entry] == [f"abort {n}" for n in reversed(prepared)]
        assert not any("commit" in entry for entry in Reopened.record)

    asyncio.run(main())


def test_a_reopen_that_permissions_forbid_keeps_all_as_they_were() -> None:
    async def main() -> None:
        graph = Graph()
        nodes = await three(graph)
        await graph.reopen([(node, {"read-only": False}) for node in nodes])
        graph.attach_backend(nodes[1], "writer", WRITE)
        Reopened.record.clear()
        with pytest.raises(GraphError, match="writer"):
            await graph.reopen([(node, {"read-only": True}) for node in nodes])
        assert [node.read_only for node in nodes] == [False] * 3
        assert Reopened.record == [f"prepare {n}" for n in "abc"] + [f"abort {n}" for n in "cba"]

    asyncio.run(main())


def test_nobody_sees_a_reopen_half_done() -> None:
    async def main() -> None:
        graph = Graph()
        nodes = await three(graph)
        reopening = asyncio.create_task(graph.reopen([(node, {"read-only": False}) for node in nodes]))
        while not reopening.done():
            assert len({node.read_only for node in nodes}) == 1
            await asyncio.sleep(0)
        await reopening

    asyncio.run(main())


class BusyOptions(ReopenOptions, tag="test-busy"):
    pass


@register
class Busy(Reopened):
    """Its requests take a turn of the loop; it remembers how many were under way when a reopening took effect."""

    driver: ClassVar[str] = "test-busy"
    Options = BusyOptions
    under_way = 0

    async def pread(self, offset: int, length: int) -> Any:
        self.under_way += 1
        await asyncio.sleep(0)
        self.under_way -= 1
        return await super().pread(offset, length)

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        await asyncio.sleep(0)
        return Prepared(lambda: self.record.append(f"commit {self.name} with {self.under_way} under way"))


async def keep_reading(backend: Backend) -> None:
    while True:
        await backend.pread(0, 512)


def test_nothing_is_in_flight_in_a_node_when_its_reopening_takes_effect() -> None:
    async def main() -> None:
        graph = Graph()
        nodes = [await graph.open({"driver": "test-busy", "node-name": name}) for name in "ab"]
        Reopened.record.clear()
        top = await graph.open({"driver": "throttle", "limits": {}, "file": "b"})
        backends = [graph.attach_backend(node, "reader") for node in (nodes[0], top) for _ in range(2)]
        readers = [asyncio.create_task(keep_reading(backend)) for backend in backends]
        for read_only in (True, False):
            await asyncio.sleep(0)
            assert [backend.in_flight for backend in backends] == [1] * 4
            await graph.reopen([(node, {"read-only": read_only}) for node in nodes])
        assert Reopened.record == [f"commit {name} with 0 under way" for name in "abab"]
        await asyncio.sleep(0)
        assert [backend.in_flight for backend in backends] == [1] * 4, "and then they go on"
        for reader in readers:
            reader.cancel()

    asyncio.run(main())


def test_a_reopen_by_one_who_has_drained_the_nodes_leaves_them_drained() -> None:
    async def main() -> None:
        graph = Graph()
        node = await graph.open({"driver": "test-busy", "node-name": "a"})
        backend = graph.attach_backend(node, "reader")
        async with graph.drained(node):
            await graph.reopen([(node, {"read-only": True})])
            reading = asyncio.create_task(backend.pread(0, 512))
            await asyncio.sleep(0)
            assert backend.in_flight == 0
        await reading

    asyncio.run(main())


def test_a_file_is_reopened_under_live_reads(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "disk").write_bytes(content)

    async def main() -> None:
        graph = Graph()
        node = await graph.open({"driver": "file", "node-name": "disk", "filename": str(tmp_path / "disk")})
        backend = graph.attach_backend(node, "reader")
        reads = 0

        async def read(place: int) -> None:
            nonlocal reads
            while reads < 400:
                offset = (place * 7919 + reads * 4096) % (len(content) - 65536)
                assert await backend.pread(offset, 65536) == content[offset:offset + 65536]
                reads += 1
                await asyncio.sleep(0)

        readers = [asyncio.create_task(read(place)) for place in range(8)]
        read_only = False
        while reads < 400:
            read_only = not read_only
            await graph.reopen([(node, {"read-only": read_only})])
            await asyncio.sleep(0)
        await asyncio.gather(*readers)
        await graph.detach_backend(backend)
        await graph.close(node)

    asyncio.run(main())


def test_options_that_cannot_change_are_refused_by_name() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        with pytest.raises(OptionError, match="size"):
            await graph.reopen([(disk, {"size": 5})])

    asyncio.run(main())


# --- operation blockers and events ---


def test_blockers_stack_and_are_lifted_one_by_one() -> None:
    async def main() -> None:
        disk = await ram(Graph(), "disk")
        lift_all = disk.block_operations("replication runs")
        lift_resize = disk.block_operations("a job is running", "resize")
        with pytest.raises(OperationBlocked, match="a job is running"):
            disk.check_operation("resize")
        with pytest.raises(OperationBlocked, match="replication runs"):
            disk.check_operation("snapshot")
        lift_all()
        disk.check_operation("snapshot")
        with pytest.raises(OperationBlocked):
            disk.check_operation("resize")
        lift_resize()
        disk.check_operation("resize")

    asyncio.run(main())


def test_what_a_node_reports_reaches_all_listeners() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        heard: list[tuple[int, str, dict[str, Any]]] = []
        disk.report("NOBODY", {})
        for number in (1, 2):
            def listen(event: str, data: dict[str, Any], number: int = number) -> None:
                heard.append((number, event, data))

            graph.listeners.append(listen)
        disk.report("HELLO", {"from": "disk"})
        assert heard == [(1, "HELLO", {"from": "disk"}), (2, "HELLO", {"from": "disk"})]

    asyncio.run(main())




def test_a_write_that_is_submitted_is_seen_by_those_who_watch_the_node() -> None:
    async def main() -> None:
        graph = Graph()
        node = await graph.open({"driver": "null", "size": 1 << 20})
        backend = graph.attach_backend(node, "user", READ | WRITE)
        bitmap = DirtyBitmap(node, "b", 1 << 20, 65536)
        ends: list[BaseException | None] = []
        backend.edge.submit_write(70000, b"x", 0, ends.append)
        assert ends == [None]
        assert list(bitmap.dirty()) == [(65536, 65536)]
        bitmap.remove()
        bitmap.clear()
        backend.edge.submit_write(0, b"x", 0, ends.append)
        assert ends == [None, None]
        assert list(bitmap.dirty()) == []
        await graph.detach_backend(backend)

    asyncio.run(main())
