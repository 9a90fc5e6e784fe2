"""``blockstep daemon``: an inventory of disks, and monitors that change it; what qemu-storage-daemon is for QEMU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        self.inventory.on_event = self.announce

    def announce(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell all monitors of an event: QEMU's name and its data."""
        if self.qmp:
            self.qmp.announce(name, data)
