"""Blklog: the log says what happened, in order, in the format of dm-log-writes."""

from __future__ import annotations

import asyncio
import errno
import io
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.block.driver import FUA
from blockstep.block.graph import Graph
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.blklog import DISCARD_FLAG, FLUSH_FLAG, FUA_FLAG, MARK_FLAG, Blklog, LogEntry, read_log, replay
from blockstep.errors import OptionError
from blockstep.testing.conformance import fails
from tests.disks import Ram, faulty

SIZE = 10_000  # not a whole number of sectors


class Rig:
    """A blklog over a disk and a log, both behind blkdebug."""

    @classmethod
    async def make(cls, content: bytes | int = SIZE, **options: Any) -> Rig:
        rig = cls()
        rig.graph = Graph()
        rig.door, rig.disk = await faulty(rig.graph, "door", content)
        rig.log_door, rig.log = await faulty(rig.graph, "log", 512)
        node = await rig.graph.open({"driver": "blklog", "node-name": "l", "file": "door", "log": "log", **options})
        assert isinstance(node, Blklog)
        rig.node = node
        return rig

    graph: Graph
    node: Blklog
    door: Blkdebug
    log_door: Blkdebug
    disk: Ram
    log: Ram

    def entries(self) -> list[LogEntry]:
        return list(read_log(io.BytesIO(self.log.content)))


def kinds(entries: list[LogEntry]) -> list[tuple[int, int, int]]:
    return [(entry.offset, entry.length, entry.flags) for entry in entries]


def test_the_log_has_the_documented_layout() -> None:
    async def main() -> None:
        rig = await Rig.make()
        await rig.node.pwrite(1024, b"x" * 512, FUA)
        await rig.node.flush()
        log = bytes(rig.log.content)
        assert struct.unpack_from("<QQQI", log) == (0x6A736677736872, 1, 2, 512)
        assert struct.unpack_from("<QQQQ", log, 512) == (2, 1, FUA_FLAG, 0)
        assert log[1024:1536] == b"x" * 512
        assert struct.unpack_from("<QQQQ", log, 1536) == (0, 0, FLUSH_FLAG, 0)

    asyncio.run(main())


def test_all_changes_are_logged_in_order() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE)
        await rig.node.pwrite(0, b"b" * 512)
        await rig.node.flush()
        await rig.node.write_zeroes(512, 1024)
        await rig.node.discard(4096, 512)
        await rig.node.mark("checkpoint 1")
        await rig.node.pread(0, 10)
        await rig.graph.close(rig.node)
        entries = rig.entries()
        assert kinds(entries) == [(0, 512, 0), (0, 0, FLUSH_FLAG), (512, 1024, 0), (4096, 512, DISCARD_FLAG),
                                  (0, 0, MARK_FLAG)]
        assert entries[0].data == b"b" * 512
        assert entries[2].data == bytes(1024)
        assert entries[4].mark == "checkpoint 1"
        assert [entry.number for entry in entries] == [0, 1, 2, 3, 4]

    asyncio.run(main())


def test_requests_between_sectors_are_widened_and_discards_narrowed() -> None:
    async def main() -> None:
        rig = await Rig.make(b"a" * SIZE)
        await rig.node.pwrite(500, b"b" * 20)
        await rig.node.write_zeroes(SIZE - 1, 1)
        await rig.node.discard(100, 1000)
        await rig.node.discard(100, 10)
        await rig.node.flush()
        entries = rig.entries()
        assert kinds(entries) == [(0, 1024, 0), (9728, 512, 0), (512, 512, DISCARD_FLAG), (0, 0, FLUSH_FLAG)]
        assert entries[0].data == b"a" * 500 + b"b" * 20 + b"a" * 504
        assert entries[1].data == b"a" * 271 + bytes(241)

    asyncio.run(main())


def test_a_flush_stands_where_it_started() -> None:
    async def main() -> None:
        rig = await Rig.make()
        rig.door.suspend("flush", "f")
        flush = asyncio.create_task(rig.node.flush())
        await rig.door.suspended("f")
        await rig.node.pwrite(0, bytes(512))  # not covered by that flush
        rig.door.resume("f")
        await flush
        assert kinds(rig.entries()) == [(0, 0, FLUSH_FLAG), (0, 512, 0)]

    asyncio.run(main())


def test_failed_requests_are_not_logged_as_done() -> None:
    async def main() -> None:
        rig = await Rig.make()
        for event in ("write", "write_zeroes", "discard", "flush"):
            rig.door.fail(event, errno.ENOSPC, once=True)
        await fails(rig.node.pwrite(0, bytes(512)), errno.ENOSPC)
        await fails(rig.node.write_zeroes(0, 512), errno.ENOSPC)
        await fails(rig.node.discard(0, 512), errno.ENOSPC)
        await fails(rig.node.flush(), errno.ENOSPC)
        await rig.node.flush()
        entries = rig.entries()
        assert kinds(entries) == [(0, 0, MARK_FLAG), (0, 0, FLUSH_FLAG)]
        assert entries[0].mark == "flush failed"

    asyncio.run(main())


def test_after_a_failure_of_the_log_every_change_fails() -> None:
    async def main() -> None:
        rig = await Rig.make()
        await rig.node.pwrite(0, b"x" * 512)
        await rig.node.flush()
        rig.log_door.fail("write", errno.ENOSPC, once=True)
        await fails(rig.node.pwrite(512, bytes(512)), errno.ENOSPC)
        await fails(rig.node.pwrite(512, bytes(512)), errno.EIO)
        await fails(rig.node.flush(), errno.EIO)
        assert await rig.node.pread(0, 1) == b"x"
        await rig.graph.close(rig.node)
        assert kinds(rig.entries()) == [(0, 512, 0), (0, 0, FLUSH_FLAG)]

    asyncio.run(main())


def test_overlapping_writes_are_logged_in_the_order_in_which_they_take_effect() -> None:
    async def main() -> None:
        rig = await Rig.make()
        rig.door.suspend("write", "w")
        first = asyncio.create_task(rig.node.pwrite(0, b"1" * 1024))
        await rig.door.suspended("w")
        second = asyncio.create_task(rig.node.pwrite(600, b"2" * 10))
        await asyncio.sleep(0)
        rig.door.resume("w")
        await asyncio.gather(first, second)
        await rig.node.flush()
        disk = bytearray(SIZE)
        replay(io.BytesIO(rig.log.content), disk)
        assert disk == rig.disk.content

    asyncio.run(main())


def test_a_log_can_be_continued() -> None:
    async def main() -> None:
        rig = await Rig.make()
        await rig.node.pwrite(0, b"1" * 512)
        await rig.node.discard(0, 512)
        await rig.graph.close(rig.node)
        node = await rig.graph.open({"driver": "blklog", "file": "door", "log": "log", "log-append": True})
        await node.pwrite(512, b"2" * 512)
        await rig.graph.close(node)
        assert kinds(rig.entries()) == [(0, 512, 0), (0, 512, DISCARD_FLAG), (512, 512, 0)]
        with pytest.raises(OptionError, match="log-append"):
            await rig.graph.open({"driver": "blklog", "file": "door", "log": "log", "log-append": True,
                                  "log-sector-size": 4096})

    asyncio.run(main())


@pytest.mark.parametrize("log", [b"", struct.pack("<QQQI", 0x6A736677736872, 1, 5, 512).ljust(512, b"\0")])
def test_a_log_that_is_too_short_for_what_it_counts_is_not_continued(log: bytes) -> None:
    async def main() -> None:
        graph = Graph()
        await faulty(graph, "door", SIZE)
        await faulty(graph, "log", log)
        with pytest.raises(OptionError, match="log-append"):
            await graph.open({"driver": "blklog", "file": "door", "log": "log", "log-append": True})

    asyncio.run(main())


def test_the_superblock_is_written_at_its_interval() -> None:
    async def main() -> None:
        rig = await Rig.make(**{"log-super-update-interval": 2})
        counts = []
        for _ in range(4):
            await rig.node.pwrite(0, bytes(512))
            counts.append(len(rig.entries()))
        assert counts == [0, 2, 2, 4]

    asyncio.run(main())


@pytest.mark.parametrize(("option", "value"), [
    ("log-sector-size", 513), ("log-sector-size", 256), ("log-sector-size", 1 << 32), ("log-super-update-interval", 0),
])
def test_wrong_options_are_named(option: str, value: int) -> None:
    with pytest.raises(OptionError) as caught:
        asyncio.run(Rig.make(**{option: value}))
    assert caught.value.option == option


@pytest.mark.parametrize("log", [b"", bytes(4096), struct.pack("<QQQI", 0x6A736677736872, 1, 5, 512)])
def test_what_is_no_log_is_refused(log: bytes) -> None:
    with pytest.raises(ValueError):
        list(read_log(io.BytesIO(log)))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, SIZE - 1), st.integers(1, 3000), st.integers(0, 255)),
                max_size=15), st.sampled_from((512, 4096)))
def test_every_prefix_of_the_log_is_a_state_of_the_disk(steps: list[tuple[bool, int, int, int]], sector: int) -> None:
    async def main() -> None:
        rig = await Rig.make(**{"log-sector-size": sector})
        states = [bytes(SIZE)]
        for write, offset, length, value in steps:
            length = min(length, SIZE - offset)
            if write:
                await rig.node.pwrite(offset, bytes((value,)) * length)
            else:
                await rig.node.write_zeroes(offset, length)
            states.append(bytes(rig.disk.content))
        await rig.graph.close(rig.node)
        for upto, state in enumerate(states):
            disk = bytearray(SIZE)
            replay(io.BytesIO(rig.log.content), disk, upto)
            assert disk == state
        replay(io.BytesIO(rig.log.content), disk)
        assert disk == states[-1]

    asyncio.run(main())
