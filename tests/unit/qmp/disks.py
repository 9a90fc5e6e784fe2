"""Disks and users of them, for tests of commands that copy; and all that a refused command might have changed."""

from __future__ import annotations

from typing import Any

from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from tests.daemon import Daemon
from tests.unit.jobs.support import picture

MiB = 1 << 20


async def disks(d: Daemon, *names: str, size: int = MiB) -> None:
    """Nodes in memory, full of their names."""
    for name in names:
        await d.qmp("blockdev-add", {"driver": "memory", "node-name": name, "size": size})
        await d.inventory.graph.find(name).pwrite(0, name.encode()[:1] * size)


async def overlay(d: Daemon, name: str, backing: str | None = None, size: int = MiB) -> None:
    """An empty overlay in memory."""
    await d.qmp("blockdev-add", {"driver": "overlay", "node-name": name, "backing": backing, "size": size})


def client(d: Daemon, name: str) -> Backend:
    """A user of a node, as an export is."""
    graph = d.inventory.graph
    return graph.attach_backend(graph.find(name), "client", READ | WRITE)


async def content(d: Daemon, name: str, length: int = MiB) -> bytes:
    """What a node reads as."""
    return bytes(await d.inventory.graph.find(name).pread(0, length))


def everything(d: Daemon) -> Any:
    """Nodes, bitmaps and jobs, as something that can be compared."""
    bitmaps = {(node.name, name): (bitmap.enabled, bitmap.busy, list(bitmap.dirty()))
               for node in d.inventory.graph.nodes.values() for name, bitmap in node.bitmaps.items()}
    return picture(d.inventory.graph), bitmaps, [(job.id, job.status) for job in d.inventory.jobs.list()]
