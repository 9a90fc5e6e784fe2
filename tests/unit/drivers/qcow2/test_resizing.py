"""Growth over a backing node that grows as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, RESIZE, WRITE
from blockstep.drivers.create import CreateQcow2
from blockstep.units import KiB
from tests.disks import ram
from tests.scenarios import scenario

#: Not a whole number of clusters of any size.
BEFORE = 300 * KiB + 77


@pytest.mark.parametrize("version", ["v2", "v3"])
@scenario
async def test_what_a_disk_gained_hides_what_its_backing_node_gains_later_until_it_is_emptied(
        tmp_path: Path, version: str) -> None:
    path = tmp_path / "disk.qcow2"
    CreateQcow2(filename=str(path), size=BEFORE, version=version).create()  # type: ignore[arg-type]
    graph = Graph()
    below = await ram(graph, "below", b"\x07" * BEFORE)
    node = await graph.open({"driver": "qcow2", "backing": "below", "file": {"driver": "file", "filename": str(path)}})
    user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
    after = 4 * BEFORE
    await user.truncate(after)
    await below.truncate(after)
    below.content[BEFORE:] = b"\x08" * (after - BEFORE)
    assert bytes(await user.pread(0, after)) == b"\x07" * BEFORE + bytes(after - BEFORE)
    extents = await user.block_status(0, after)
    assert sum(extent.length for extent in extents if extent.depth == 2) == BEFORE
    assert all(extent.zero for extent in extents if extent.depth == 1)

    await user.pwrite(2 * BEFORE, b"here")  # the rest of its cluster is what was to be seen
    await user.write_zeroes(BEFORE - 10, 20)
    await user.discard(3 * BEFORE, BEFORE)
    expected = bytearray(b"\x07" * BEFORE + bytes(after - BEFORE))
    expected[2 * BEFORE:2 * BEFORE + 4] = b"here"
    expected[BEFORE - 10:BEFORE] = bytes(10)
    assert bytes(await user.pread(0, after)) == expected

    await node.make_empty()
    assert bytes(await user.pread(0, after)) == bytes(below.content)
    await graph.detach_backend(user)
    await graph.close(node)
