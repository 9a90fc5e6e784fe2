"""Block status through layers: who holds each byte, checked against a model that is asked byte by byte."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockstep.drivers  # noqa: F401
from blockstep.block.driver import Driver, Extent
from blockstep.block.graph import Graph
from blockstep.block.status import allocated_above, status_through
from tests.disks import Ram, ram

LENGTH = 60

Layer = tuple[int, set[int]]  # its length, and the bytes that it holds


def holds(node: Ram, bytes_held: set[int], most: int = LENGTH) -> None:
    """Let a disk say that it holds these bytes only, in answers of at most ``most`` bytes."""

    async def status(offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        for at in range(offset, offset + min(length, most)):
            held = at in bytes_held
            if extents and extents[-1].allocated == held:
                extents[-1] = extents[-1]._replace(length=extents[-1].length + 1)
            else:
                extents.append(Extent(1, held, False, held))
        return extents

    node.block_status = status  # type: ignore[method-assign]


async def chain(layers: list[Layer], with_filters: bool = False) -> tuple[Graph, list[Ram], list[Driver]]:
    """Disks over one another, the first at the top. Returns them and what stands over each."""
    graph = Graph()
    disks: list[Ram] = []
    tops: list[Driver] = []
    for number, (length, held) in reversed(list(enumerate(layers))):
        below = {"backing": tops[0].name} if tops else {}
        disk = await ram(graph, f"disk{number}", length, **below)
        holds(disk, held, 7)
        disks.insert(0, disk)
        top: Driver = disk
        if with_filters:
            top = await graph.open({"driver": "blkdebug", "node-name": f"filter{number}", "file": disk.name})
        tops.insert(0, top)
    return graph, disks, tops


def spread(extents: list[Extent]) -> list[tuple[int, bool, bool]]:
    """(depth, allocated, zero) of each byte."""
    return [(extent.depth, extent.allocated, extent.zero) for extent in extents for _ in range(extent.length)]


held = st.sets(st.integers(0, LENGTH - 1))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, LENGTH), held), min_size=1, max_size=4), st.booleans(), st.data())
def test_each_byte_is_attributed_to_the_highest_layer_that_holds_it(
    layers: list[Layer], with_filters: bool, data: st.DataObject
) -> None:
    async def main() -> None:
        top_length = layers[0][0]
        offset = data.draw(st.integers(0, top_length - 1))
        length = data.draw(st.integers(1, top_length - offset))
        base = data.draw(st.none() | st.integers(1, len(layers) - 1)) if len(layers) > 1 else None
        _, disks, tops = await chain(layers, with_filters)
        bases = data.draw(st.sampled_from((tops, disks)))  # the base or a filter of it, it is the same
        extents = await status_through(tops[0], offset, length, None if base is None else bases[base])

        expected = []
        for at in range(offset, offset + length):
            depth, zero = 0, base is None
            for number, (size, bytes_held) in enumerate(layers[:base]):
                if at >= size:  # shorter than what lies over it: zeroes, whatever is below
                    zero = True
                    break
                if at in bytes_held:
                    depth, zero = number + 1, False
                    break
            expected.append((depth, depth > 0, zero))
        assert spread(extents) == expected
        assert all(one[1:] != other[1:] for one, other in itertools.pairwise(extents)), "not merged"

        if base is not None:
            above = await allocated_above(tops[0], bases[base], offset, length)
            assert [held for size, held in above for _ in range(size)] == [depth > 0 for depth, _, _ in expected]

    asyncio.run(main())


@pytest.mark.parametrize("with_filters", [False, True])
def test_filters_are_no_layers(with_filters: bool) -> None:
    async def main() -> None:
        graph, _, tops = await chain([(30, {0}), (30, {1}), (30, {2})], with_filters)
        user = graph.attach_backend(tops[0], "user")
        extents = await user.block_status(0, 4)
        assert [extent.depth for extent in extents] == [1, 2, 3, 0]

    asyncio.run(main())
