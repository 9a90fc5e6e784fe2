"""``blockstep daemon``: an inventory of disks, and monitors that change it; what qemu-storage-daemon is for QEMU.

    monitors (QMP) ──► commands of all AREAS ──► inventory: objects, nodes, jobs, exports
         ▲                                            │
         └──────────────── events ◄───────────────────┘

It looks at the files of all nodes (`blockstep.daemon.files`): what others do to them is an event, a line on standard
error, and a part of what is told of nodes and of replication.

The end, in this order, so that nobody is told "written" of what is not: no command begins any more, and those that
have begun end; exports finish what clients have sent and close; jobs are cancelled; what the users of the disks wrote
is flushed, and all nodes are closed; the monitors go last, so that they hear of it.
"""

from __future__ import annotations

from blockstep import drivers
from blockstep.daemon.files import Files
from blockstep.daemon.service import Service
from blockstep.inventory.inventory import Inventory
from blockstep.qmp.commands import (
    bitmaps,
    block_jobs,
    colo,
    copying,
    core,
    exports,
    human,
    introspection,
    jobs,
    nodes,
    objects,
    query_nodes,
    run_state,
    snapshots,
    transaction,
    yank,
)
from blockstep.qmp.schema import Registry
from blockstep.qmp.server import Server

#: The areas of commands that the daemon offers.
AREAS: tuple[Registry, ...] = (
    core.commands,
    objects.commands,
    nodes.commands,
    query_nodes.commands,
    human.commands,
    exports.commands,
    run_state.commands,
    yank.commands,
    colo.commands,
    jobs.commands,
    block_jobs.commands,
    copying.commands,
    snapshots.commands,
    bitmaps.commands,
    transaction.commands,
    introspection.commands,
)


class StorageDaemon(Service):
    """The program, as the context of its commands. Make it in a running event loop.

    Monitors are added to `qmp` (a server of all areas); `close` ends everything.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        drivers.load()  # any of them may be asked for while the disks are in use
        self.inventory = Inventory()
        self.inventory.colo.name = self.name or ""
        self.qmp: Server = Server(Registry.of(*AREAS), self, version=self.version)
        self.inventory.on_event = self.qmp.announce
        self._files = Files(self._tell_faults)
        self._files.watch_each(self.inventory.graph.nodes)

    async def look(self) -> None:
        """Find out how the nodes' files are."""
        await self._files.look()

    def _tell_faults(self) -> None:
        before, now = self.inventory.faults, self._files.faults
        self.inventory.faults = now
        for name in list(self.inventory.graph.nodes):
            if before.get(name) != now.get(name):
                self.inventory.graph.report("BLOCK_STORAGE_FAULT", {"node-name": name, "reason": now.get(name, "")})
        self.inventory.colo.tell_state()

    async def close(self) -> list[OSError]:
        """A clean stop; see the module. Returns what could not be flushed: one error for each node."""
        with self.inventory.ending():  # commands, too: one that closes a node is not broken off
            await self.finish_qmp()
            await self._files.close()
            try:
                return await self.inventory.close()
            finally:
                await self.stop_qmp()
