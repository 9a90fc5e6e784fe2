"""All that a storage daemon holds, in one place, so that commands have one thing to work on.

Nothing here is global: a process can hold two inventories, and a test does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blockstep.block.graph import Graph
from blockstep.inventory.colo import Colo
from blockstep.inventory.exports import ExportTable
from blockstep.inventory.objects import Objects
from blockstep.jobs.registry import JobRegistry
from blockstep.replication.registry import ReplicationRegistry


class Inventory:
    """Objects, nodes, jobs, exports, replication filters. Make it in a running event loop."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.objects = Objects(self.graph)
        self.jobs = JobRegistry(on_event=self.report)
        self.replication = ReplicationRegistry(self.graph, self.jobs)
        self.colo = Colo(self.replication, self.report)
        self.exports = ExportTable(self.graph, self.report, lambda id: self.objects.tls(id, "server").context())
        #: Gets QEMU's name of each event and its data: what nodes, jobs and exports report.
        self.on_event: Callable[[str, Mapping[str, Any]], None] = lambda name, data: None
        self.graph.listeners.append(self.report)

    def report(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell of an event."""
        self.on_event(name, data)

    async def close(self) -> list[OSError]:
        """End everything in good order: exports, then jobs; make durable what was written; close all nodes.

        Other users of the nodes are gone before. Returns an error for each disk that could not be
        flushed; nothing is kept open for it.
        """
        await self.exports.close()
        await self.jobs.cancel_all()
        await self.colo.close()
        lost: list[OSError] = []
        for node in [node for node in self.graph.nodes.values() if not node.parents and not node.read_only]:
            try:
                await node.flush()
            except OSError as error:
                lost.append(OSError(error.errno, f"node '{node.name}': {error.strerror or error}"))
        for node in self.graph.nodes.values():
            node.owned = False
        for node in list(self.graph.nodes.values()):
            await self.graph.close_unused(node)
        return lost
