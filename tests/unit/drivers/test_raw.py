"""The raw driver: a window that moves offsets and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import blockstep.drivers  # noqa: F401
from blockstep.block.driver import Driver, Extent
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.block.resize import resize
from blockstep.errors import OptionError, PermissionConflict

CHILD = {"driver": "memory", "size": 1 << 20, "node-name": "child"}


async def opened(graph: Graph, **options: Any) -> Driver:
    return await graph.open({"driver": "raw", "file": CHILD, **options})


@pytest.mark.parametrize("offset", [0, 4096, 777])
def test_all_requests_are_moved_by_the_offset(offset: int) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, offset=offset, size=100_000)
        child = graph.find("child")
        assert node.length == 100_000
        await node.pwrite(10, b"A" * 90_000)
        assert bytes(await child.pread(offset + 9, 3)) == b"\0AA"
        assert bytes(await node.pread(89_999, 20)) == b"A" * 11 + bytes(9)
        await node.write_zeroes(20, 10)
        await node.flush()
        assert bytes(await child.pread(offset + 19, 12)) == b"A" + bytes(10) + b"A"
        await node.discard(0, 100_000)
        assert not any(await child.pread(0, 200_000))
        assert await node.block_status(8192, 50_000) == [Extent(50_000, data=False, zero=True)]
        place, theirs = node.raw_range(5, 10), child.raw_range(offset + 5, 10)
        assert place == theirs is not None
        await graph.close(node)

    asyncio.run(scenario())


def test_without_a_size_it_follows_its_child() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, offset=4096)
        assert node.length == (1 << 20) - 4096
        await node.truncate(10_000)
        assert graph.find("child").length == 14_096
        assert node.length == 10_000
        await graph.close(node)

    asyncio.run(scenario())


def test_what_lies_under_a_window_of_fixed_size_keeps_its_length() -> None:
    async def scenario() -> None:
        graph = Graph()
        child = await graph.open(CHILD)
        fixed = await graph.open({"driver": "raw", "file": "child", "offset": 4096, "size": 100_000})
        rest = await graph.open({"driver": "raw", "file": "child", "offset": 4096})
        user = graph.attach_backend(fixed, "user", READ | WRITE)
        with pytest.raises(PermissionConflict, match="resize"):
            await resize(graph, child, 50_000)
        assert child.length == 1 << 20
        await graph.detach_backend(user)
        await graph.close(fixed)
        await resize(graph, child, 50_000)
        assert rest.length == 50_000 - 4096
        await resize(graph, child, 1000)
        assert rest.length == 0
        await graph.close(rest)
        await graph.close(child)

    asyncio.run(scenario())


def test_a_window_of_fixed_size_is_not_resized() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, size=4096)
        with pytest.raises(OSError, match="resize"):
            await node.truncate(8192)
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize(("options", "named"), [
    ({"offset": -1}, "offset"), ({"offset": (1 << 20) + 1}, "offset"), ({"offset": 4096, "size": 1 << 20}, "size")])
def test_a_window_outside_the_child_is_refused(options: dict[str, int], named: str) -> None:
    async def scenario() -> None:
        graph = Graph()
        with pytest.raises(OptionError) as caught:
            await opened(graph, **options)
        assert caught.value.option == named
        assert not graph.nodes

    asyncio.run(scenario())


def test_it_takes_of_its_child_what_its_users_take_of_it() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph)
        reader = graph.attach_backend(node, "reader", READ)
        other = graph.attach_backend(graph.find("child"), "writer below", READ | WRITE)
        assert node.children["file"].taken == READ
        await graph.detach_backend(other)
        await graph.detach_backend(reader)

    asyncio.run(scenario())
