"""The first sync of a primary's disks, and every resync: a job for each disk, from NAME-disk to NAME-sync.

A job (`CatchUp`) converges while the guest writes, and switches its link on when the two are the same. A full sync
covers the disk, of which it leaves out what the standby says that it holds; a resync covers what the link remembers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.daemon.disks import work_status
from blockstep.daemon.primary_setup import PrimaryDisk
from blockstep.jobs.registry import JobRegistry
from blockstep.qmp.commands.replication import WorkStatus
from blockstep.replication.catch_up import CatchUp
from blockstep.replication.comparison import Content
from blockstep.replication.link import GRANULARITY


class Sync:
    """All disks' syncs as one. ``content`` asks the standby what a disk holds: see `StandbySide.content`."""

    def __init__(self, graph: Graph, jobs: JobRegistry, disks: Mapping[str, PrimaryDisk],
                 content: Callable[[str, int, int, bytes], Coroutine[Any, Any, Content | None]]) -> None:
        self._graph, self._jobs, self._disks, self._content = graph, jobs, disks, content
        self._is_full = True

    async def begin(self, full: bool) -> None:
        """Begin to copy all that differs, or what the standby lacks. From then on the disks keep their lengths."""
        self._is_full = full
        for name, disk in self._disks.items():
            assert disk.sync is not None
            source = self._graph.find(f"{name}-disk")
            if not full:
                disk.bitmap = DirtyBitmap(source, "resync", disk.link.length, GRANULARITY)
                disk.bitmap.merge(disk.link.since)
                disk.bitmap.merge(disk.link.closing)
            job = CatchUp(f"sync-{name}", self._graph, source, disk.sync, disk.link, disk.bitmap,
                          partial(self._content, name))
            disk.job = await self._jobs.create(job)

    async def ended(self) -> None:
        """Wait for the end of what has begun. At return all links are on.

        Raises the error of the first job that fails, at once: the others run on, up to `cancel`.
        """
        await asyncio.gather(*(_succeeded(disk.job) for disk in self._disks.values() if disk.job))
        with self._graph.change() as change:
            for disk in self._disks.values():
                change.refresh(disk.link)
        self._clear()

    def cancel(self) -> None:
        """Now: a sync that is about to end must not switch its link on. `cancelled` waits for what follows."""
        for job in self._jobs.list():
            job.end(force=True)

    async def cancelled(self) -> None:
        """Wait until nothing of it is left."""
        await self._jobs.cancel_all()
        self._clear()

    def _clear(self) -> None:
        for disk in self._disks.values():
            disk.job = None
            if disk.bitmap:
                disk.bitmap.remove()
                disk.bitmap = None

    def status(self) -> WorkStatus | None:
        """How far it is; None if none runs."""
        jobs = [disk.job for disk in self._disks.values() if disk.job]
        return work_status("sync" if self._is_full else "resync", jobs) if jobs else None


async def _succeeded(job: CatchUp) -> None:
    error = await job.wait()
    if error:
        raise error
