"""Blkdebug: which request fails, which one hangs, and until when."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from blockstep.aio.inline import start
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.drivers.blkdebug import EVENTS, Blkdebug, InjectError, SetState, event_name
from blockstep.errors import OptionError
from blockstep.testing.conformance import fails
from tests.disks import Ram, faulty, ram

SIZE = 1 << 16


async def opened(**options: Any) -> tuple[Blkdebug, Ram]:
    graph = Graph()
    disk = await ram(graph, "disk", b"d" * SIZE)
    node = await graph.open({"driver": "blkdebug", "node-name": "door", "file": "disk", **options})
    assert isinstance(node, Blkdebug)
    return node, disk


def request(node: Driver, event: str) -> Any:
    """A request that is ``event``."""
    return {
        "read": lambda: node.pread(0, 512), "write": lambda: node.pwrite(0, bytes(512)),
        "write_zeroes": lambda: node.write_zeroes(0, 512), "discard": lambda: node.discard(0, 512),
        "flush": node.flush, "block_status": lambda: node.block_status(0, 512),
        "truncate": lambda: node.truncate(SIZE), "make_empty": node.prepare_empty,
    }[event]()


REQUESTS = [event for event in EVENTS if event != "open"]


@pytest.mark.parametrize("event", REQUESTS)
def test_a_rule_fails_its_event_and_no_other_and_the_child_sees_nothing(event: str) -> None:
    async def main() -> None:
        node, disk = await opened(**{"inject-error": [{"event": event, "errno": errno.ENOSPC}]})
        await fails(request(node, event), errno.ENOSPC)
        assert disk.requests == []
        for other in REQUESTS:
            if other != event:
                await request(node, other)

    asyncio.run(main())


def test_an_error_at_open_leaves_nothing_open() -> None:
    async def main() -> None:
        graph = Graph()
        with pytest.raises(OSError) as caught:
            await graph.open({"driver": "blkdebug", "file": {"driver": "test-ram", "node-name": "inner"},
                              "inject-error": [{"event": "open", "errno": errno.EACCES}]})
        assert caught.value.errno == errno.EACCES
        assert graph.nodes == {}

    asyncio.run(main())


def test_a_failing_make_empty_leaves_the_content() -> None:
    async def main() -> None:
        node, disk = await opened()
        node.fail("make_empty", errno.ENOSPC, once=True)
        await fails(node.make_empty(), errno.ENOSPC)
        assert disk.content == b"d" * SIZE
        await node.make_empty()
        assert disk.content == bytes(SIZE)

    asyncio.run(main())


def test_once_is_once() -> None:
    async def main() -> None:
        node, _ = await opened()
        node.fail("read", once=True)
        await fails(node.pread(0, 1), errno.EIO)
        assert await node.pread(0, 1) == b"d"

    asyncio.run(main())


@pytest.mark.parametrize(("rule", "hit", "missed"), [
    ({"sector": 2}, [(1024, 1), (1535, 1), (1030, 5), (0, 4096)], [(0, 1024), (1536, 10)]),
    ({"offset": 1000, "length": 10}, [(1000, 1), (1009, 5), (0, 4096)], [(990, 10), (1010, 10)]),
])
def test_a_range_fails_the_requests_that_touch_it(
    rule: dict[str, int], hit: list[tuple[int, int]], missed: list[tuple[int, int]]
) -> None:
    async def main() -> None:
        node, _ = await opened(**{"inject-error": [{"event": "read", **rule}]})
        for offset, length in hit:
            await fails(node.pread(offset, length), errno.EIO)
        for offset, length in missed:
            await node.pread(offset, length)

    asyncio.run(main())


def test_iotype_narrows_a_rule_for_all_events() -> None:
    async def main() -> None:
        node, _ = await opened(**{"inject-error": [{"event": "none", "iotype": "write-zeroes"}]})
        await node.pwrite(0, b"x")
        await fails(node.write_zeroes(0, 1), errno.EIO)

    asyncio.run(main())


def test_rules_hold_in_their_state_and_events_change_it() -> None:
    async def main() -> None:
        node, _ = await opened(**{
            "inject-error": [{"event": "write", "state": 2}],
            "set-state": [{"event": "flush", "state": 1, "new_state": 2},
                          {"event": "flush", "state": 2, "new_state": 3}],
        })
        await node.pwrite(0, b"x")
        await node.flush()
        assert node.state == 2
        await fails(node.pwrite(0, b"x"), errno.EIO)
        await node.flush()
        assert node.state == 3
        await node.pwrite(0, b"x")

    asyncio.run(main())


def test_rules_can_be_added_and_cleared_at_run_time() -> None:
    async def main() -> None:
        node, _ = await opened()
        node.add_rule(InjectError(event="read_aio"))
        node.add_rule(SetState(event="flush_to_disk", new_state=5))
        await fails(node.pread(0, 1), errno.EIO)
        await node.flush()
        assert node.state == 5
        node.clear_rules()
        await node.pread(0, 1)

    asyncio.run(main())


def test_immediately_fails_in_the_callers_frame_and_otherwise_a_turn_later() -> None:
    async def main() -> None:
        node, _ = await opened()
        ends: list[BaseException | None] = []
        for immediately in (True, False):
            node.clear_rules()
            node.fail("read", immediately=immediately)
            assert start(node.pread(0, 1), lambda value, error: ends.append(error)) is immediately
        await asyncio.sleep(0)
        assert len(ends) == 2

    asyncio.run(main())


def test_a_suspension_holds_one_request_and_resume_lets_it_go() -> None:
    async def main() -> None:
        node, disk = await opened()
        node.suspend("write", "A")
        assert not node.is_suspended("A")
        held = asyncio.create_task(node.pwrite(0, b"held"))
        await node.suspended("A")
        assert node.is_suspended("A")
        await node.pwrite(10, b"passes")
        await node.pread(0, 1)
        assert disk.content[:4] == b"dddd"
        node.resume("A")
        await held
        assert disk.content[:4] == b"held"
        assert not node.is_suspended("A")

    asyncio.run(main())


def test_a_rule_added_while_a_request_hangs_hits_that_request() -> None:
    async def main() -> None:
        node, disk = await opened()
        node.suspend("write", "A")
        held = asyncio.create_task(node.pwrite(0, b"held"))
        await node.suspended("A")
        node.fail("write", errno.ENOSPC)
        node.resume("A")
        await fails(held, errno.ENOSPC)
        assert disk.requests == []

    asyncio.run(main())


def test_several_suspensions_hold_several_requests_and_those_not_met_are_taken_back() -> None:
    async def main() -> None:
        node, disk = await opened()
        for _ in range(3):
            node.suspend("none", "A")
        held = [asyncio.create_task(node.flush()), asyncio.create_task(node.pread(0, 1))]
        await node.suspended("A")
        await asyncio.sleep(0)
        node.resume("A")
        await asyncio.gather(*held)
        await node.flush()
        assert len(disk.requests) == 3
        with pytest.raises(OptionError, match="tag"):
            node.resume("A")

    asyncio.run(main())


@pytest.mark.parametrize(("limit", "code", "bad", "good"), [
    ("align", errno.EINVAL, lambda n: n.pread(1, 4096), lambda n: n.pread(4096, 4096)),
    ("align", errno.EINVAL, lambda n: n.pwrite(0, b"x"), lambda n: n.pwrite(0, bytes(4096))),
    ("max-transfer", errno.EINVAL, lambda n: n.pwrite(0, bytes(4097)), lambda n: n.pwrite(0, bytes(4096))),
    ("max-write-zero", errno.EINVAL, lambda n: n.write_zeroes(0, 4097), lambda n: n.write_zeroes(0, 4096)),
    ("opt-write-zero", errno.ENOTSUP, lambda n: n.write_zeroes(512, 4096), lambda n: n.write_zeroes(4096, 8192)),
    ("max-discard", errno.EINVAL, lambda n: n.discard(0, 8192), lambda n: n.discard(1, 1)),
    ("opt-discard", errno.ENOTSUP, lambda n: n.discard(0, 512), lambda n: n.discard(0, 4096)),
])
def test_limits_refuse_what_does_not_keep_them(limit: str, code: int, bad: Any, good: Any) -> None:
    async def main() -> None:
        node, _ = await opened(**{limit: 4096})
        await fails(bad(node), code)
        await good(node)

    asyncio.run(main())


def test_qemus_names_of_events_are_understood_and_unknown_ones_refused() -> None:
    assert [event_name(name) for name in ("read_aio", "write_aio", "flush_to_disk", "none")] == \
        ["read", "write", "flush", "none"]
    with pytest.raises(OptionError, match="l2_update"):
        event_name("l2_update")
    with pytest.raises(OptionError, match="l2_update"):
        asyncio.run(opened(**{"inject-error": [{"event": "l2_update"}]}))


def test_the_child_may_be_called_image() -> None:
    async def main() -> None:
        graph = Graph()
        await ram(graph, "disk")
        node = await graph.open({"driver": "blkdebug", "image": "disk"})
        assert list(node.children) == ["file"]
        with pytest.raises(OptionError, match="two names"):
            await graph.open({"driver": "blkdebug", "image": "disk", "file": "disk"})
        with pytest.raises(OptionError, match="missing"):
            await graph.open({"driver": "blkdebug"})

    asyncio.run(main())


def test_the_helper_of_the_tests_gives_door_and_disk() -> None:
    async def main() -> None:
        node, disk = await faulty(Graph(), "x", b"abc")
        assert (node.name, disk.name) == ("x", "x-disk")
        assert await node.pread(0, 3) == b"abc"

    asyncio.run(main())
