"""The RAM disk: sparse, exact, and free of what is discarded."""

from __future__ import annotations

import asyncio
import os

import pytest

import blockstep.drivers  # noqa: F401
from blockstep.block.driver import FUA, MAY_UNMAP, Extent
from blockstep.block.graph import Graph
from blockstep.drivers.memory import Memory
from blockstep.errors import OptionError

MiB = 1 << 20


async def opened(graph: Graph, size: int) -> Memory:
    node = await graph.open({"driver": "memory", "size": size})
    assert isinstance(node, Memory)
    return node


def occupied(node: Memory) -> int:
    return os.fstat(node.fd).st_blocks * 512


def test_what_is_written_is_read_at_any_alignment() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, 4 * MiB + 5)
        data = os.urandom(3 * MiB)
        await node.pwrite(12_345, data, FUA)
        await node.flush()
        assert await node.pread(12_345, len(data)) == data
        assert await node.pread(12_344, 2) == b"\0" + data[:1]
        await node.pwrite(4 * MiB, b"12345")
        assert await node.pread(4 * MiB - 1, 6) == b"\x0012345"
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [8192, 2 * MiB, 6 * MiB])
def test_holes_give_the_memory_back(length: int) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, 8 * MiB)
        await node.pwrite(0, b"x" * 8 * MiB)
        await node.write_zeroes(4096, length, MAY_UNMAP)
        assert occupied(node) == 8 * MiB - length
        await node.discard(0, 4096)
        assert occupied(node) == 8 * MiB - length - 4096
        assert not any(await node.pread(0, 4096 + length))
        assert await node.block_status(0, 8 * MiB) == [
            Extent(4096 + length, data=False, zero=True), Extent(8 * MiB - 4096 - length)]
        await graph.close(node)

    asyncio.run(scenario())


def test_few_zeroes_that_must_stay_allocated_stay() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, MiB)
        await node.write_zeroes(0, 4096)
        assert occupied(node) == 4096
        await graph.close(node)

    asyncio.run(scenario())


def test_what_a_resize_adds_is_zero_even_where_data_was() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, MiB)
        await node.pwrite(0, b"x" * MiB)
        await node.truncate(1000)
        await node.truncate(2000)
        assert node.length == 2000
        assert await node.pread(0, 2000) == b"x" * 1000 + bytes(1000)
        await graph.close(node)

    asyncio.run(scenario())


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(OptionError):
        asyncio.run(opened(Graph(), -1))
