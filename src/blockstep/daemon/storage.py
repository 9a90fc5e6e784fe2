"""``blockstep daemon``: an inventory of disks, and monitors that change it; what qemu-storage-daemon is for QEMU."""

from __future__ import annotations

from blockstep.daemon.service import Service
from blockstep.inventory.inventory import Inventory
from blockstep.qmp.commands import core
from blockstep.qmp.schema import Registry

#: The areas of commands that the daemon offers.
AREAS: tuple[Registry, ...] = (
    core.commands,
)


class StorageDaemon(Service):
    """The program, as the context of its commands. Make it in a running event loop."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.inventory = Inventory()
