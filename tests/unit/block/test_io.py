"""The border: what it checks, what it counts, and what it holds back."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import blockstep.drivers  # noqa: F401
from blockstep.aio.inline import Completion, start
from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Buffer, Driver
from blockstep.block.graph import Graph
from blockstep.block.io import Backend, enter, leave
from blockstep.block.permissions import READ, RESIZE, WRITE, WRITE_UNCHANGED
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.file import File
from blockstep.testing.conformance import fails
from tests.disks import Ram, faulty, ram

SIZE = 10_000


async def rig() -> tuple[Graph, Blkdebug, Ram, Backend]:
    graph = Graph()
    door, disk = await faulty(graph, "door", SIZE)
    return graph, door, disk, graph.attach_backend(door, "guest", READ | WRITE | RESIZE)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- checks ---


@pytest.mark.parametrize(("offset", "length"), [
    (-1, 1), (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (1, -1), (1 << 70, 1),
])
def test_ranges_outside_the_node_never_reach_it(offset: int, length: int) -> None:
    async def main() -> None:
        _, _, disk, user = await rig()
        await fails(user.pread(offset, length), errno.EINVAL)
        await fails(user.discard(offset, length), errno.EINVAL)
        await fails(user.block_status(offset, length), errno.EINVAL)
        await fails(user.write_zeroes(offset, length), errno.ENOSPC)
        if length > 0:
            await fails(user.pwrite(offset, bytes(length)), errno.ENOSPC)
        assert disk.requests == []
        assert user.in_flight == 0

    asyncio.run(main())


def test_empty_requests_end_at_the_border() -> None:
    async def main() -> None:
        _, _, disk, user = await rig()
        for offset in (0, 5, SIZE):
            assert await user.pread(offset, 0) == b""
            await user.pwrite(offset, b"")
            await user.write_zeroes(offset, 0)
            await user.discard(offset, 0)
            assert await user.block_status(offset, 0) == []
        assert disk.requests == []

    asyncio.run(main())


def test_unknown_flags_are_refused() -> None:
    async def main() -> None:
        _, _, disk, user = await rig()
        await user.pwrite(0, b"x", FUA)
        await user.write_zeroes(0, 1, FUA | MAY_UNMAP | FAST)
        await fails(user.pwrite(0, b"x", MAY_UNMAP), errno.EINVAL)
        await fails(user.write_zeroes(0, 1, 8), errno.EINVAL)
        assert len(disk.requests) == 2

    asyncio.run(main())


def test_what_was_not_taken_is_refused() -> None:
    async def main() -> None:
        graph, door, disk, _ = await rig()
        reader = graph.attach_backend(door, "reader", READ)
        for request in (reader.pwrite(0, b"x"), reader.write_zeroes(0, 1), reader.discard(0, 1), reader.truncate(5)):
            await fails(request, errno.EPERM)
        copier = graph.attach_backend(door, "copier", READ | WRITE_UNCHANGED)
        assert copier.read_only
        await copier.pwrite(0, b"x")
        await fails(copier.discard(0, 1), errno.EPERM)
        assert disk.requests == [("write", 0, 1)]

    asyncio.run(main())


def test_a_new_length_moves_the_border() -> None:
    async def main() -> None:
        _, _, _, user = await rig()
        await user.truncate(SIZE + 10)
        await user.pwrite(SIZE, b"0123456789")
        await user.truncate(5)
        await fails(user.pread(0, 6), errno.EINVAL)
        assert user.length == 5

    asyncio.run(main())


def test_every_end_of_a_request_is_counted() -> None:
    async def main() -> None:
        _, door, _, user = await rig()
        door.fail("none")
        for request in (user.pread(0, 1), user.pwrite(0, b"x"), user.write_zeroes(0, 1), user.discard(0, 1),
                        user.flush(), user.block_status(0, 1), user.truncate(3)):
            await fails(request, errno.EIO)
        assert user.in_flight == 0

    asyncio.run(main())


def test_a_request_that_does_not_wait_ends_in_the_callers_frame() -> None:
    async def main() -> None:
        _, _, _, user = await rig()
        assert start(user.pwrite(0, b"x"), lambda value, error: None)
        assert start(user.pread(0, 1), lambda value, error: None)
        assert start(user.flush(), lambda value, error: None)

    asyncio.run(main())


# --- drain ---


def test_a_drain_waits_for_what_is_in_flight_and_holds_back_what_comes() -> None:
    async def main() -> None:
        graph, door, disk, user = await rig()
        door.suspend("write", "w")
        first = asyncio.create_task(user.pwrite(0, b"1"))
        await door.suspended("w")
        inside, leave_section = asyncio.Event(), asyncio.Event()

        async def drain() -> None:
            async with graph.drained(disk):
                inside.set()
                await leave_section.wait()

        draining = asyncio.create_task(drain())
        await turns()
        later = asyncio.create_task(user.pwrite(1, b"2"))
        await turns()
        assert not inside.is_set()
        door.resume("w")
        await inside.wait()
        await first
        await turns()
        assert disk.requests == [("write", 0, 1)]
        assert not later.done()
        leave_section.set()
        await later
        await draining
        assert disk.requests[-1] == ("write", 1, 1)

    asyncio.run(main())


def test_held_requests_go_on_in_their_order() -> None:
    async def main() -> None:
        graph, door, disk, user = await rig()
        ends: list[int] = []
        async with graph.drained(door):
            for number in range(10):
                assert not start(user.pwrite(number, b"x"), lambda value, error, number=number: ends.append(number))
            assert user.in_flight == 0
        assert ends == list(range(10))
        assert [offset for _, offset, _ in disk.requests] == list(range(10))

    asyncio.run(main())


def test_drains_nest_and_the_last_one_lets_go() -> None:
    async def main() -> None:
        graph, door, disk, user = await rig()
        async with graph.drained(door):
            async with graph.drained(disk):
                held = asyncio.create_task(user.flush())
                await turns()
            await turns()
            assert not held.done()
        await held

    asyncio.run(main())


def test_a_drain_holds_all_users_above_and_nobody_beside() -> None:
    async def main() -> None:
        graph = Graph()
        below, beside = await ram(graph, "below"), await ram(graph, "beside")
        top = await graph.open({"driver": "blkdebug", "file": "below"})
        users = [graph.attach_backend(node, "user") for node in (below, top, beside)]
        async with graph.drained(below):
            requests = [asyncio.create_task(user.pread(0, 1)) for user in users]
            await turns()
            assert [request.done() for request in requests] == [False, False, True]
        await asyncio.gather(*requests)

    asyncio.run(main())


def test_a_drain_ends_also_when_its_section_fails() -> None:
    async def main() -> None:
        graph, door, _, user = await rig()
        with pytest.raises(ZeroDivisionError):
            async with graph.drained(door):
                raise ZeroDivisionError
        assert await user.pread(0, 1) == b"\0"

    asyncio.run(main())


def test_nodes_are_drained_from_the_bottom_up_and_released() -> None:
    async def main() -> None:
        graph, door, disk, _ = await rig()
        record: list[str] = []
        for node in (door, disk):
            async def begin(node: object = node) -> None:
                record.append(f"begin {node.name}")  # type: ignore[attr-defined]

            node.drain_begin = begin  # type: ignore[method-assign]
            node.drain_end = lambda node=node: record.append(f"end {node.name}")  # type: ignore
            node.expedite = lambda on, node=node: record.append(f"expedite {node.name} {on}")  # type: ignore
        async with graph.drained(disk):
            record.append("inside")
        assert record == ["expedite door-disk True", "expedite door True", "begin door-disk", "begin door", "inside",
                          "end door-disk", "end door", "expedite door-disk False", "expedite door False"]

    asyncio.run(main())


def test_a_request_held_by_a_drain_is_checked_against_what_it_then_meets() -> None:
    async def main() -> None:
        graph, door, disk, user = await rig()
        async with graph.drained(door):
            held = asyncio.create_task(user.pread(SIZE - 1, 1))
            await turns()
            await disk.truncate(100)
        await fails(held, errno.EINVAL)

    asyncio.run(main())


def test_a_user_that_leaves_waits_for_its_requests() -> None:
    async def main() -> None:
        graph, door, _, user = await rig()
        door.suspend("write", "w")
        write = asyncio.create_task(user.pwrite(0, b"x"))
        await door.suspended("w")
        leaving = asyncio.create_task(graph.detach_backend(user))
        await turns()
        assert not leaving.done()
        door.resume("w")
        await leaving
        await write
        assert door.parents == []

    asyncio.run(main())


def test_work_of_several_requests_counts_as_one() -> None:
    async def main() -> None:
        graph, _, disk, user = await rig()
        other = graph.attach_backend(await ram(graph, "other"), "other user")
        await enter(user, other)
        section = graph.drained(disk)
        draining = asyncio.create_task(section.__aenter__())
        await turns()
        await user.edge.pwrite(0, b"first")
        await turns()
        assert not draining.done()
        leave(user, other)
        await draining
        entering = asyncio.create_task(enter(user, other))
        await turns()
        assert not entering.done()
        assert other.in_flight == 0
        await section.__aexit__(None, None, None)
        await entering
        assert other.in_flight == user.in_flight == 1

    asyncio.run(main())


# --- watchers ---


class Record:
    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def wrote(self, offset: int, length: int) -> None:
        self.ranges.append((offset, length))


def test_a_watcher_hears_of_all_changes_also_of_those_that_failed() -> None:
    async def main() -> None:
        _, door, _, user = await rig()
        watcher = Record()
        await user.pwrite(0, b"before")
        door.watch(watcher)
        await user.pwrite(1, b"ab")
        await user.write_zeroes(3, 4)
        await user.discard(5, 6)
        await user.pread(0, 10)
        await user.flush()
        door.fail("none")
        await fails(user.pwrite(7, b"c"), errno.EIO)
        door.unwatch(watcher)
        door.clear_rules()
        await user.pwrite(9, b"after")
        assert watcher.ranges == [(1, 2), (3, 4), (5, 6), (7, 1)]

    asyncio.run(main())


def test_a_watcher_stays_with_its_node_when_filters_come() -> None:
    async def main() -> None:
        graph, door, _, user = await rig()
        watcher = Record()
        door.watch(watcher)
        node = await graph.insert_filter({"driver": "blkdebug", "file": "door"}, door)
        await user.pwrite(1, b"x")
        await graph.remove_filter(node)
        await user.pwrite(2, b"x")
        assert watcher.ranges == [(1, 1), (2, 1)]

    asyncio.run(main())


# --- requests that end at once ---


async def begun(started: Any) -> Any:
    return await started if isinstance(started, Coroutine) else started


def over_file(path: Path) -> Path:
    (path / "disk").write_bytes(bytes(SIZE))
    return path / "disk"


def test_what_ends_at_once_needs_no_coroutine(tmp_path: Path) -> None:
    async def main() -> None:
        graph = Graph()
        disk = await graph.open({"driver": "raw", "file": {"driver": "file", "filename": str(over_file(tmp_path))}})
        user = graph.attach_backend(disk, "guest", READ | WRITE)
        assert user.begin_write(100, b"abc") is None
        assert user.begin_read(99, 5) == b"\0abc\0"
        assert user.in_flight == 0

    asyncio.run(main())


def test_a_drained_node_takes_nothing_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        graph = Graph()
        disk = await graph.open({"driver": "file", "filename": str(over_file(tmp_path))})
        user = graph.attach_backend(disk, "guest", READ | WRITE)
        async with graph.drained(disk):
            writing, reading = user.begin_write(0, b"x"), user.begin_read(0, 1)
            assert isinstance(writing, Coroutine)
            assert isinstance(reading, Coroutine)
            tasks = [asyncio.create_task(writing), asyncio.create_task(reading)]
            await turns()
            assert not any(task.done() for task in tasks)
        assert (await asyncio.gather(*tasks))[1] == b"x"

    asyncio.run(main())


def test_what_is_refused_is_refused_when_it_is_begun_too(tmp_path: Path) -> None:
    async def main() -> None:
        graph = Graph()
        disk = await graph.open({"driver": "file", "filename": str(over_file(tmp_path))})
        user, reader = graph.attach_backend(disk, "guest", READ | WRITE), graph.attach_backend(disk, "reader", READ)
        await fails(begun(user.begin_read(SIZE - 1, 2)), errno.EINVAL)
        await fails(begun(user.begin_read(-1, 2)), errno.EINVAL)
        await fails(begun(user.begin_write(SIZE - 1, b"ab")), errno.ENOSPC)
        await fails(begun(user.begin_write(-1, b"ab")), errno.ENOSPC)
        await fails(begun(reader.begin_write(0, b"ab")), errno.EPERM)
        assert await begun(user.begin_read(0, 0)) == b""
        assert await begun(user.begin_write(0, b"")) is None
        user.revoke("somebody else has the disk")
        await fails(begun(user.begin_write(0, b"ab")), errno.ESHUTDOWN)
        assert (tmp_path / "disk").read_bytes() == bytes(SIZE)

    asyncio.run(main())


class OneTurnLater(Ram):
    async def pread(self, offset: int, length: int) -> Buffer:
        await asyncio.sleep(0)
        return await super().pread(offset, length)


def test_what_has_to_wait_counts_as_in_flight() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk", b"ab" + bytes(SIZE))
        disk.__class__ = OneTurnLater
        user = graph.attach_backend(disk, "guest", READ)
        reading = user.begin_read(0, 2)
        assert isinstance(reading, Coroutine)
        assert reading.send(None) is None
        assert user.in_flight == 1
        with pytest.raises(StopIteration) as end:
            reading.send(None)
        assert end.value.value == b"ab"
        assert user.in_flight == 0

    asyncio.run(main())


class EndsElsewhere(Ram):
    """Somebody else ends a write: here the test."""

    def begin_write(self, offset: int, data: Buffer) -> Completion[None]:
        self.completion: Completion[None] = Completion()
        return self.completion


def test_what_somebody_else_ends_counts_as_in_flight_without_a_coroutine() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk", bytes(SIZE))
        disk.__class__ = EndsElsewhere
        assert isinstance(disk, EndsElsewhere)
        user = graph.attach_backend(disk, "guest", READ | WRITE)
        for error in (None, OSError(errno.EIO, "no")):
            writing = user.begin_write(0, bytes(10))
            assert writing is disk.completion
            assert user.in_flight == 1
            leaving = asyncio.ensure_future(user.idle())
            await turns()
            assert not leaving.done()
            if error is None:
                disk.completion.set_result(None)
            else:
                disk.completion.set_error(error)
            assert user.in_flight == 0
            await leaving

    asyncio.run(main())


def test_a_bitmap_hears_of_a_write_that_ended_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        graph = Graph()
        disk = await graph.open({"driver": "file", "filename": str(over_file(tmp_path))})
        user = graph.attach_backend(disk, "guest", READ | WRITE)
        bitmap = DirtyBitmap(disk, "changes", granularity=4096)
        await begun(user.begin_write(5000, b"x"))
        assert list(bitmap.dirty()) == [(4096, 4096)]

    asyncio.run(main())


def test_a_driver_that_has_its_own_read_is_not_passed_by() -> None:
    class Shouting(File):
        async def pread(self, offset: int, length: int) -> Buffer:
            return bytes(await super().pread(offset, length)).upper()

    assert Shouting.begin_read is Driver.begin_read
    assert Shouting.begin_write is File.begin_write
