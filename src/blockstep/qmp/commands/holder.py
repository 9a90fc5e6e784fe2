"""What the commands of a storage daemon need of their context."""

from __future__ import annotations

from typing import Protocol

from blockstep.inventory.inventory import Inventory


class Holder(Protocol):
    """A program that holds an inventory."""

    @property
    def inventory(self) -> Inventory: ...

    async def look(self) -> None: ...
