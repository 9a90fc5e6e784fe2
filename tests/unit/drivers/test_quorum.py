"""Quorum: who is asked, who wins, who is reported, and that replicas stay replicas."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blockstep.drivers  # noqa: F401
from blockstep.block.driver import FAST, Driver, Extent
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, RESIZE, WRITE
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.quorum import Missed, Quorum
from blockstep.errors import GraphError, OptionError, PermissionConflict, told
from blockstep.testing.conformance import fails
from tests.disks import Ram, faulty, ram

SIZE = 1 << 16


class Rig:
    """A quorum over blkdebug over disks, a user of it, and the events that it reported."""

    graph: Graph
    node: Quorum
    user: Backend
    doors: list[Blkdebug]
    disks: list[Ram]
    events: list[tuple[str, dict[str, Any]]]

    @classmethod
    async def make(cls, *contents: bytes | int, **options: Any) -> Rig:
        rig = cls()
        rig.graph = Graph()
        rig.events = []
        rig.graph.listeners.append(lambda event, data: rig.events.append((event, data)))
        pairs = [await faulty(rig.graph, f"c{i}", content) for i, content in enumerate(contents)]
        rig.doors, rig.disks = [door for door, _ in pairs], [disk for _, disk in pairs]
        options = {"vote-threshold": 1, "read-pattern": "fifo", **options}
        node = await rig.graph.open({"driver": "quorum", "node-name": "q",
                                     "children": [door.name for door in rig.doors], **options})
        assert isinstance(node, Quorum)
        rig.node = node
        rig.user = rig.graph.attach_backend(node, "guest", READ | WRITE | RESIZE)
        return rig

    def bad(self) -> list[tuple[str, str, str | None]]:
        """(operation, node, error) of all QUORUM_REPORT_BAD."""
        return [(data["type"], data["node-name"], data.get("error"))
                for event, data in self.events if event == "QUORUM_REPORT_BAD"]

    def failures(self) -> int:
        return sum(event == "QUORUM_FAILURE" for event, _ in self.events)


def votes(threshold: int, **options: Any) -> dict[str, Any]:
    return {"vote-threshold": threshold, "read-pattern": "quorum", **options}


# --- options ---


@pytest.mark.parametrize(("options", "option"), [
    ({"vote-threshold": 3}, "vote-threshold"),
    ({"vote-threshold": 0}, "vote-threshold"),
    ({"rewrite-corrupted": True}, "rewrite-corrupted"),
    ({"blkverify": True}, "blkverify"),
    (votes(1, blkverify=True), "blkverify"),
])
def test_a_wrong_combination_of_options_is_named(options: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        asyncio.run(Rig.make(SIZE, SIZE, **options))
    assert caught.value.option == option


def test_children_of_different_lengths_are_refused_by_name() -> None:
    with pytest.raises(GraphError, match="c1"):
        asyncio.run(Rig.make(SIZE, SIZE - 1))


# --- fifo ---


def test_fifo_reads_ask_only_the_first_child_that_can_serve() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE, b"b" * SIZE)
        assert await rig.user.pread(0, 3) == b"aaa"
        assert rig.disks[1].requests == []
        rig.doors[0].fail("read", errno.ENXIO, once=True)
        assert await rig.user.pread(700, 3) == b"bbb"
        assert rig.bad() == [("read", "c0", "No such device or address")]
        data = rig.events[0][1]
        assert (data["sector-num"], data["sectors-count"]) == (1, 1)
        assert await rig.user.pread(0, 3) == b"aaa"

    asyncio.run(main())


def test_a_fifo_read_that_no_child_can_serve_fails() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        for door in rig.doors:
            door.fail("read", errno.EIO)
        await fails(rig.user.pread(0, 512), errno.EIO)
        assert rig.failures() == 1
        assert len(rig.bad()) == 2

    asyncio.run(main())


def test_a_fifo_read_never_returns_what_a_child_has_missed() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        rig.doors[0].fail("write", errno.ENOSPC, once=True)
        await rig.user.pwrite(1000, b"new" * 100)
        assert rig.bad() == [("write", "c0", "No space left on device")]
        assert await rig.user.pread(1000, 300) == b"new" * 100
        assert await rig.user.pread(1299, 2) == b"w\0"
        assert rig.disks[0].requests == []
        assert await rig.user.pread(1300, 10) == bytes(10)
        assert rig.disks[0].requests == [("read", 1300, 10)]
        rig.doors[1].fail("read")
        await fails(rig.user.pread(1100, 10), errno.EIO)
        await rig.user.pwrite(1000, b"old" * 100)  # makes it good
        assert await rig.user.pread(1000, 300) == b"old" * 100

    asyncio.run(main())


def test_a_child_that_fails_a_discard_has_missed_nothing_and_one_that_does_it_is_not_made_good() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE, b"b" * SIZE)
        rig.doors[0].fail("discard", once=True)
        await rig.user.discard(0, 4096)
        assert rig.bad() == [("write", "c0", "Input/output error")]
        assert await rig.user.pread(0, 3) == b"aaa"
        rig.doors[0].fail("write", once=True)
        await rig.user.pwrite(0, b"new")
        rig.doors[1].fail("discard", once=True)
        await rig.user.discard(0, 4096)
        assert await rig.user.pread(0, 3) == b"new"

    asyncio.run(main())


def test_a_single_child_serves_everything_and_is_reported_when_it_fails() -> None:
    async def main() -> None:
        for options in ({}, votes(1)):
            rig = await Rig.make(SIZE, **options)
            await rig.user.pwrite(5, b"data")
            assert await rig.user.pread(5, 4) == b"data"
            rig.doors[0].fail("write", errno.ENOSPC)
            rig.doors[0].fail("read", errno.EBADF)
            rig.doors[0].fail("flush", errno.ENXIO)
            await fails(rig.user.pwrite(5, b"more"), errno.ENOSPC)
            await fails(rig.user.pread(5, 4), errno.EBADF)
            await fails(rig.user.flush(), errno.ENXIO)
            assert [operation for operation, _, _ in rig.bad()] == ["write", "read", "flush"]
            assert rig.failures() == 3

    asyncio.run(main())


# --- votes ---


def test_the_majority_wins_and_the_outvoted_is_reported() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE, b"b" * SIZE, b"b" * SIZE, **votes(2))
        assert await rig.user.pread(512, 1024) == b"b" * 1024
        assert rig.events == [("QUORUM_REPORT_BAD", {"type": "read", "node-name": "c0", "sector-num": 1,
                                                     "sectors-count": 2})]
        assert rig.disks[0].content[512:1536] == b"a" * 1024

    asyncio.run(main())


def test_the_outvoted_is_rewritten_if_asked() -> None:
    async def main() -> None:
        rig = await Rig.make(b"b" * SIZE, b"a" * SIZE, b"b" * SIZE, **votes(2, **{"rewrite-corrupted": True}))
        assert await rig.user.pread(512, 1024) == b"b" * 1024
        assert rig.disks[1].content[512:1536] == b"b" * 1024
        assert rig.disks[1].content[511] == rig.disks[1].content[1536] == ord("a")

    asyncio.run(main())


def test_rewriting_takes_the_right_to_write_even_for_a_reader() -> None:
    async def main() -> None:
        graph = Graph()
        for name in ("a", "b"):
            await ram(graph, name)
        graph.attach_backend(graph.find("a"), "user who wants no writer", READ, READ)
        with pytest.raises(PermissionConflict):
            await graph.open({"driver": "quorum", "node-name": "q", "children": ["a", "b"], **votes(2),
                              "rewrite-corrupted": True})

    asyncio.run(main())


def test_without_a_majority_the_read_fails() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE, b"b" * SIZE, b"c" * SIZE, **votes(2))
        await fails(rig.user.pread(0, 512), errno.EIO)
        assert rig.failures() == 1

    asyncio.run(main())


def test_a_child_that_cannot_be_read_has_no_vote() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE, b"b" * SIZE, b"b" * SIZE, **votes(2))
        rig.doors[0].fail("read", once=True)
        assert await rig.user.pread(0, 10) == b"b" * 10
        rig.doors[0].fail("read", errno.ENXIO)
        rig.doors[1].fail("read", errno.ENXIO)
        await fails(rig.user.pread(0, 10), errno.ENXIO)

    asyncio.run(main())


def test_a_child_has_no_vote_on_what_it_has_missed() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE, SIZE, **votes(1))
        for door in rig.doors[:2]:
            door.fail("write", once=True)
        await rig.user.pwrite(1000, b"new" * 100)
        assert await rig.user.pread(1000, 300) == b"new" * 100  # the two that have it not would agree
        assert not any(disk.requests for disk in rig.disks[:2])
        assert await rig.user.pread(1300, 10) == bytes(10)
        assert all(disk.requests for disk in rig.disks[:2])
        await rig.node.remove_child(rig.graph, "children.1")
        await rig.node.remove_child(rig.graph, "children.2")
        await fails(rig.user.pread(1299, 1), errno.EIO)
        await rig.user.pwrite(1299, b"w")  # makes it good
        assert await rig.user.pread(1299, 1) == b"w"

    asyncio.run(main())


def test_what_a_child_has_missed_is_rewritten_if_asked() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE, **votes(1, **{"rewrite-corrupted": True}))
        rig.doors[0].fail("write", once=True)
        await rig.user.pwrite(512, b"n" * 512)
        assert await rig.user.pread(0, 1024) == bytes(512) + b"n" * 512
        assert rig.disks[0].content == rig.disks[1].content
        rig.doors[1].fail("read")
        assert await rig.user.pread(512, 512) == b"n" * 512

    asyncio.run(main())


def test_blkverify_fails_a_read_at_the_first_difference() -> None:
    async def main() -> None:
        rig = await Rig.make(bytes(SIZE), bytes(700) + b"x" + bytes(SIZE - 701), **votes(2, blkverify=True))
        assert await rig.user.pread(0, 700) == bytes(700)
        error = await fails(rig.user.pread(0, 1024), errno.EIO)
        assert "differ at 700" in str(error)

    asyncio.run(main())


def test_a_voting_read_waits_for_the_write_that_it_overlaps() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE, **votes(2))
        rig.doors[1].suspend("write", "w")
        write = asyncio.create_task(rig.user.pwrite(0, b"x" * 100))
        await rig.doors[1].suspended("w")
        read = asyncio.create_task(rig.user.pread(50, 100))
        apart = await rig.user.pread(100, 100)
        assert apart == bytes(100)
        assert not read.done()
        rig.doors[1].resume("w")
        await write
        assert await read == b"x" * 50 + bytes(50)
        assert rig.events == []

    asyncio.run(main())


# --- writes ---


@pytest.mark.parametrize("operation", ["write", "write_zeroes", "discard", "flush"])
def test_changes_go_to_all_children_before_any_is_waited_for(operation: str) -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE, SIZE)
        for door in rig.doors:
            door.suspend(operation, "held")
        request = asyncio.create_task({
            "write": lambda: rig.user.pwrite(3, b"abc"), "write_zeroes": lambda: rig.user.write_zeroes(3, 3),
            "discard": lambda: rig.user.discard(3, 3), "flush": rig.user.flush,
        }[operation]())  # type: ignore[operator]
        for door in rig.doors:
            await door.suspended("held")
        for door in reversed(rig.doors):
            assert not request.done()
            door.resume("held")
        await request
        assert [len(disk.requests) for disk in rig.disks] == [1, 1, 1]

    asyncio.run(main())


def test_a_write_succeeds_with_enough_children_and_fails_with_the_error_of_most() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE, SIZE, **votes(2))
        rig.doors[0].fail("write", errno.EBADF)
        await rig.user.pwrite(0, b"data")
        assert rig.failures() == 0
        rig.doors[1].fail("write", errno.ENOSPC)
        rig.doors[2].fail("write", errno.ENOSPC)
        await fails(rig.user.pwrite(0, b"data"), errno.ENOSPC)
        assert rig.failures() == 1
        assert [node for _, node, _ in rig.bad()] == ["c0", "c0", "c1", "c2"]

    asyncio.run(main())


def test_a_flush_succeeds_with_a_dead_child_when_enough_are_healthy() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        rig.doors[1].fail("flush")
        await rig.user.flush()
        assert rig.bad() == [("flush", "c1", "Input/output error")]
        rig.doors[0].fail("flush")
        await fails(rig.user.flush(), errno.EIO)

    asyncio.run(main())


def test_a_bug_in_a_child_is_not_outvoted() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)

        async def broken(offset: int, data: bytes, flags: int = 0) -> None:
            raise ZeroDivisionError

        rig.node.children["children.1"].pwrite = broken
        with pytest.raises(ZeroDivisionError):
            await rig.user.pwrite(0, b"x")

    asyncio.run(main())


def test_overlapping_writes_reach_all_children_in_one_order() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        rig.doors[1].suspend("write", "first")
        first = asyncio.create_task(rig.user.pwrite(0, b"1" * 100))
        await rig.doors[1].suspended("first")
        second = asyncio.create_task(rig.user.pwrite(50, b"2" * 100))
        await asyncio.sleep(0)
        assert not second.done()
        rig.doors[1].resume("first")
        await asyncio.gather(first, second)
        assert rig.disks[0].content == rig.disks[1].content
        assert rig.disks[0].content[:150] == b"1" * 50 + b"2" * 100

    asyncio.run(main())


def test_fast_zeroes_fail_only_when_no_child_is_fast() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE, b"a" * SIZE)
        for door in rig.doors:
            door.fail("write_zeroes", errno.ENOTSUP, once=True)
        await fails(rig.user.write_zeroes(0, 100, FAST), errno.ENOTSUP)
        rig.doors[1].fail("write_zeroes", errno.ENOTSUP, once=True)
        await rig.user.write_zeroes(0, 100, FAST)
        assert all(disk.content[:101] == bytes(100) + b"a" for disk in rig.disks)
        assert rig.events == []

    asyncio.run(main())


def test_discards_are_forwarded_unless_reads_vote() -> None:
    async def main() -> None:
        for options, expected in (({}, [("discard", 0, 512)]), (votes(2), [])):
            rig = await Rig.make(SIZE, SIZE, **options)
            await rig.user.discard(0, 512)
            assert [disk.requests for disk in rig.disks] == [expected, expected]

    asyncio.run(main())


def test_truncate_reaches_all_children_or_none() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        await rig.user.truncate(SIZE + 5)
        assert [disk.length for disk in rig.disks] == [SIZE + 5] * 2
        rig.doors[1].fail("truncate", errno.ENOSPC)
        await fails(rig.user.truncate(2 * SIZE), errno.ENOSPC)
        assert [disk.length for disk in rig.disks] == [SIZE + 5] * 2
        assert rig.user.length == SIZE + 5

    asyncio.run(main())


def test_a_child_that_cannot_be_cut_again_is_named_with_the_first_error() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        resize = rig.doors[0].truncate

        async def only_grow(length: int) -> None:
            if length == SIZE:
                raise OSError(errno.EIO, "no way back")
            await resize(length)

        rig.doors[0].truncate = only_grow  # type: ignore[method-assign]
        rig.doors[1].fail("truncate", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left") as caught:
            await rig.user.truncate(2 * SIZE)
        assert "'c0' could not be cut again: no way back" in told(caught.value)

    asyncio.run(main())


# --- status ---


def test_status_is_that_of_the_child_that_would_serve_the_read() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)

        async def half(offset: int, length: int) -> list[Extent]:
            return [Extent(length, False, True)]

        rig.disks[0].block_status = half  # type: ignore[method-assign]
        rig.node.children["children.0"].node.children["file"].bind(rig.disks[0])
        assert await rig.node.block_status(0, 100) == [Extent(100, False, True)]
        rig.doors[0].fail("block_status", once=True)
        assert await rig.node.block_status(0, 100) == [Extent(100, True, False)]
        rig.doors[0].fail("write", once=True)
        await rig.user.pwrite(0, b"only on c1")
        assert await rig.node.block_status(0, 100) == [Extent(100, True, False)]

    asyncio.run(main())


def test_data_in_a_childs_backing_file_is_allocated_in_the_quorum() -> None:
    async def main() -> None:
        graph = Graph()
        await ram(graph, "base", b"b" * SIZE)
        top = await ram(graph, "top", SIZE, backing="base")

        async def nothing(offset: int, length: int) -> list[Extent]:
            return [Extent(length, False, False, False)]

        top.block_status = nothing  # type: ignore[method-assign]
        node = await graph.open({"driver": "quorum", "children": ["top"], "vote-threshold": 1, "read-pattern": "fifo"})
        user = graph.attach_backend(node, "user")
        assert await user.block_status(0, 100) == [Extent(100, True, False, True, 1)]

    asyncio.run(main())


def test_zero_in_a_vote_is_what_all_children_know_to_be_zero() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE, **votes(2))

        def zero_from(border: int) -> Any:
            async def status(offset: int, length: int) -> list[Extent]:
                cut = min(max(border - offset, 0), length)
                return [e for e in (Extent(cut), Extent(length - cut, False, True)) if e.length]
            return status

        for disk, door, border in zip(rig.disks, rig.doors, (100, 300), strict=True):
            disk.block_status = zero_from(border)  # type: ignore[method-assign]
            door.children["file"].bind(disk)
        extents = await rig.node.block_status(50, 400)
        assert [(e.length, e.zero) for e in extents] == [(50, False), (200, False), (150, True)]
        assert extents[1].data

    asyncio.run(main())


# --- children come and go ---


def test_children_are_added_and_removed_under_load_and_keep_their_names() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        spare: list[Driver] = [await ram(rig.graph, f"spare{i}") for i in range(3)]
        assert await rig.node.add_child(rig.graph, spare[0]) == "children.2"
        assert await rig.node.remove_child(rig.graph, "children.1") is rig.doors[1]
        assert list(rig.node.children) == ["children.0", "children.2"]
        assert await rig.node.add_child(rig.graph, spare[1]) == "children.3"  # 1 is not given again
        await rig.node.remove_child(rig.graph, "children.3")
        assert await rig.node.add_child(rig.graph, spare[2]) == "children.3"  # the last one's is
        await rig.user.pwrite(0, b"x")
        assert [len(disk.requests) for disk in (*rig.disks, *spare)] == [1, 0, 1, 0, 1]  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_change_of_children_waits_for_requests_in_flight_and_holds_new_ones() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        spare = await ram(rig.graph, "spare")
        rig.doors[0].suspend("write", "w")
        write = asyncio.create_task(rig.user.pwrite(0, b"before"))
        await rig.doors[0].suspended("w")
        adding = asyncio.create_task(rig.node.add_child(rig.graph, spare))
        await asyncio.sleep(0)
        later = asyncio.create_task(rig.user.pwrite(100, b"after"))
        await asyncio.sleep(0)
        assert not adding.done()
        assert not later.done()
        rig.doors[0].resume("w")
        await asyncio.gather(write, adding, later)
        assert spare.requests == [("write", 100, 5)]

    asyncio.run(main())


def test_a_removed_childs_node_is_closed_if_nobody_holds_it() -> None:
    async def main() -> None:
        graph = Graph()
        named = await ram(graph, "named")
        node = await graph.open({"driver": "quorum", "vote-threshold": 1, "read-pattern": "fifo",
                                 "children": ["named", {"driver": "test-ram", "node-name": "inner"}]})
        assert isinstance(node, Quorum)
        inner = graph.find("inner")
        await node.remove_child(graph, "children.1")
        assert "inner" not in graph.nodes
        assert isinstance(inner, Ram)
        assert inner.closed
        with pytest.raises(GraphError, match="vote-threshold"):
            await node.remove_child(graph, "children.0")
        assert not named.closed

    asyncio.run(main())


def test_bad_additions_and_removals_change_nothing() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        short = await ram(rig.graph, "short", 512)
        with pytest.raises(GraphError, match="short"):
            await rig.node.add_child(rig.graph, short)
        with pytest.raises(GraphError, match=r"children\.7"):
            await rig.node.remove_child(rig.graph, "children.7")
        busy = await ram(rig.graph, "busy")
        rig.graph.attach_backend(busy, "owner", READ | WRITE, READ)
        with pytest.raises(PermissionConflict):
            await rig.node.add_child(rig.graph, busy)
        assert list(rig.node.children) == ["children.0", "children.1"]
        await rig.user.pwrite(0, b"x")
        assert await rig.user.pread(0, 1) == b"x"
        assert await rig.node.add_child(rig.graph, await ram(rig.graph, "good")) == "children.2"

    asyncio.run(main())


def test_what_a_removed_child_has_missed_is_forgotten() -> None:
    async def main() -> None:
        rig = await Rig.make(SIZE, SIZE)
        rig.doors[1].fail("write", once=True)
        await rig.user.pwrite(0, b"x")
        await rig.node.remove_child(rig.graph, "children.1")
        assert await rig.node.add_child(rig.graph, rig.doors[1]) == "children.1"
        rig.doors[0].fail("read")
        assert await rig.user.pread(0, 1) == b"\0"

    asyncio.run(main())


# --- the ranges that a child has missed ---


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 63), st.integers(1, 20)), max_size=30))
def test_missed_ranges_are_a_set_of_bytes(steps: list[tuple[bool, int, int]]) -> None:
    missed, model = Missed(), set[int]()
    for add, start, length in steps:
        if add:
            missed.add(start, start + length)
            model |= set(range(start, start + length))
        else:
            missed.made_good(start, start + length)
            model -= set(range(start, start + length))
        assert {at for at in range(100) if missed.touches(at, at + 1)} == model
        assert missed.touches(10, 30) == bool(model & set(range(10, 30)))


def test_too_many_missed_ranges_become_their_hull() -> None:
    missed = Missed(limit=3)
    for start in (50, 10, 30, 70):
        missed.add(start, start + 5)
    assert missed.ranges == [(10, 75)]
