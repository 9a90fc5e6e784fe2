"""All that a storage daemon holds, in one place, so that commands have one thing to work on.

Nothing here is global: a process can hold two inventories, and a test does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.node import Node
from blockstep.block.permissions import Role
from blockstep.drivers.nbd import Nbd
from blockstep.inventory.colo import Colo
from blockstep.inventory.event_lines import tell
from blockstep.inventory.exports import CLOSE_DEADLINE, ExportTable
from blockstep.inventory.nodes import tried
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
        #: What others have done to the files of nodes, in words, by the names of these; as the program saw it last.
        self.faults: Mapping[str, str] = {}
        self.colo = Colo(self.replication, self.report, lambda: self.faults)
        self.exports = ExportTable(self.graph, self.report, lambda id: self.objects.tls(id, "server").context())
        #: Gets QEMU's name of each event and its data: what nodes, jobs and exports report.
        self.on_event: Callable[[str, Mapping[str, Any]], None] = lambda name, data: None
        self.graph.listeners += [self.report, tell]

    def report(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell of an event."""
        self.on_event(name, data)

    async def close(self) -> list[OSError]:
        """End everything in good order: exports, then jobs; make durable what was written; close all nodes.

        Returns an error for each disk that could not be flushed or closed; nothing is kept open for it. See `ending`.
        """
        with self.ending():
            ends: list[OSError | None] = [*await self.exports.close()]
            await self.jobs.cancel_all()
            await self.colo.close()
            ends += [await tried(node, node.flush()) for node in self._to_flush()]
            for node in self.graph.nodes.values():
                node.owned = False
            ends += [await tried(node, self.graph.close_unused(node)) for node in list(self.graph.nodes.values())]
        return [error for error in ends if error is not None]

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Within, what waits for an NBD server that does not answer fails after `CLOSE_DEADLINE`."""
        watchdog = asyncio.get_running_loop().call_later(CLOSE_DEADLINE, self._cut_off)
        try:
            yield
        finally:
            watchdog.cancel()

    def _cut_off(self) -> None:
        """Let requests fail that wait for servers."""
        for node in self.graph.everything():
            if isinstance(node, Nbd):
                node.yank()

    def _to_flush(self) -> list[Driver]:
        """The nodes that can be written to, without those to which a flush of another comes down."""
        return [node for node in self.graph.nodes.values() if not node.read_only and not any(
            isinstance(edge.parent, Node) and not edge.parent.read_only and edge.role is not Role.BACKING
            for edge in node.parents)]
