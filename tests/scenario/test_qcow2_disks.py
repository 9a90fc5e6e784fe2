"""A standby whose secondary, hidden and active disks are qcow2 images."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from blockstep.block.driver import MAY_UNMAP
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.check import check
from blockstep.jobs.registry import JobRegistry
from blockstep.replication.registry import ReplicationRegistry
from blockstep.units import KiB, MiB

SIZE = 1 * MiB


@pytest.mark.parametrize("failover", [False, True])
def test_the_view_is_the_last_checkpoint_and_the_standbys_own_writes(failover: bool, tmp_path: Path) -> None:
    rnd = random.Random(7)
    paths = {name: tmp_path / f"{name}.qcow2" for name in ("secondary", "hidden", "active")}
    for path in paths.values():
        CreateQcow2(filename=str(path), size=SIZE).create()

    async def go() -> None:
        graph, below = Graph(), None
        jobs = JobRegistry(on_event=lambda name, data: None)
        registry = ReplicationRegistry(graph, jobs)
        for name, path in paths.items():
            await graph.open({"driver": "qcow2", "node-name": name, "backing": below,
                              "file": {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}})
            below = name
        await graph.open({"driver": "replication", "mode": "secondary", "node-name": "filter", "top-id": "top",
                          "file": "active"})
        top = await graph.open({"driver": "quorum", "node-name": "top", "vote-threshold": 1, "read-pattern": "fifo",
                                "children": ["filter"]})
        primary = graph.attach_backend(graph.find("secondary"), "primary", READ | WRITE)
        view = graph.attach_backend(top, "guest", READ | WRITE)
        theirs = bytearray(SIZE)
        await registry.start_all("secondary")
        for _ in range(3):
            await registry.checkpoint_all()
            expected = bytearray(theirs)
            for _ in range(30):
                offset, size = rnd.randrange(SIZE - 100 * KiB), rnd.choice((1, 4096, 100 * KiB))
                if rnd.random() < 0.5:
                    theirs[offset:offset + size] = data = rnd.randbytes(size)
                    await primary.pwrite(offset, data)
                elif rnd.random() < 0.3:
                    theirs[offset:offset + size] = bytes(size)
                    await primary.write_zeroes(offset, size, MAY_UNMAP)
                else:
                    expected[offset:offset + size] = data = rnd.randbytes(size)
                    await view.pwrite(offset, data)
            await view.flush()
            assert bytes(await view.pread(0, SIZE)) == expected
        await registry.stop_all(failover)
        for job in jobs.list():
            assert await job.wait() is None
        assert bytes(await view.pread(0, SIZE)) == (expected if failover else theirs)
        for user in (view, primary):
            await graph.detach_backend(user)
        while graph.nodes:
            await graph.close(next(node for node in graph.nodes.values() if not node.parents))

    asyncio.run(go())
    for path in paths.values():
        assert path.stat().st_size < 6 * SIZE
        content = path.read_bytes()
        assert check(lambda offset, length, content=content: content[offset:offset + length], len(content)).clean
