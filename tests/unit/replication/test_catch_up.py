"""The job that brings a standby up to its primary, while the guest writes."""

from __future__ import annotations

import asyncio

import pytest

import blockstep.drivers  # noqa: F401  (they register themselves)
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.jobs.registry import JobRegistry
from blockstep.replication.catch_up import CatchUp
from blockstep.replication.link import GRANULARITY, Link


@pytest.mark.parametrize("length", [2 * GRANULARITY, 2 * GRANULARITY + 1, 3 * GRANULARITY - 1, 777])
def test_a_guest_that_writes_to_the_end_of_its_disk_does_not_keep_a_sync_from_ending(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        graph, jobs = Graph(), JobRegistry(on_event=lambda name, data: None)
        for name in ("here", "there"):
            await graph.open({"driver": "memory", "node-name": name, "size": length})
        link = await graph.open({"driver": "link", "node-name": "link", "file": "here"})
        assert isinstance(link, Link)
        guest = graph.attach_backend(link, "guest", READ | WRITE)
        await guest.pwrite(0, bytes(index % 251 for index in range(length)))
        copy, writes = CatchUp._copy_dirty, 0

        async def copy_and_write(job: CatchUp) -> None:
            nonlocal writes
            await copy(job)
            writes += 1
            await guest.pwrite(length - 1, bytes([writes]))

        monkeypatch.setattr(CatchUp, "_copy_dirty", copy_and_write)
        with graph.change() as change:
            change.attach(link, "target", Role.TARGET, graph.find("there"))
        job = await jobs.create(CatchUp("sync", graph, graph.find("here"), graph.find("there"), link, None))
        assert await job.wait() is None
        assert link.on
        await link.settle()
        standby = graph.attach_backend(graph.find("there"), "standby")
        assert bytes(await standby.pread(0, length)) == bytes(await guest.pread(0, length))
        assert writes
        await graph.detach_backend(standby)
        await graph.detach_backend(guest)
        await graph.close(link)
        for name in ("here", "there"):
            await graph.close(graph.find(name))

    asyncio.run(main())
