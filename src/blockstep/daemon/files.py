"""What others do to the files of a program's disks while it serves them: shorten, move, delete or replace them.

Nobody who only reads and writes notices, and the harm comes later: a deleted file is gone when the program ends, and
another one under its name is what the next start takes. So all files of a disk, backing images too, are looked at:
every few seconds, when somebody asks how it is, and at the end. Never on the path of a request, and in a thread: a
filesystem that hangs holds up nobody.

What has been lost stays a fault, also when a file has been made long again. A name can be mended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final

from blockstep.aio.pool import in_thread
from blockstep.aio.posix import Fault
from blockstep.block.driver import Driver
from blockstep.block.node import Node

#: Seconds between two looks, and for which somebody who asks waits for one.
EVERY: Final = 5.0
PATIENCE: Final = 0.5


class Files:
    """See the module. ``changed`` is called when `faults` has become other than it was."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        #: Which disks have faults, and which, in words; and those whose content is not what was written any more.
        self.faults: dict[str, str] = {}
        self.torn: dict[str, str] = {}
        self._disks: dict[str, Driver] = {}
        self._lasting: dict[str, Fault] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    def told(self) -> list[str]:
        """The faults, one text a disk that has any."""
        return [f"disk '{name}': {fault}" for name, fault in self.faults.items()]

    def watch(self, disk: str, storage: Driver) -> None:
        """From now on look at the files of ``storage`` and of what is below it, which stay open until `close`."""
        self._disks[disk] = storage
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY, self._due)

    async def look(self) -> None:
        """Look now. Gives up waiting for a filesystem that hangs."""
        await asyncio.wait([self._look()], timeout=PATIENCE)

    async def close(self) -> None:
        """Look for the last time; then the files may be closed."""
        if self._timer:
            self._timer.cancel()
        await asyncio.wait([self._look()])
        self._disks.clear()

    def _due(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._due)
        self._look()

    def _look(self) -> asyncio.Task[None]:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look_at_all())
        return self._looking

    async def _look_at_all(self) -> None:
        faults = {}
        for disk, storage in self._disks.items():
            found = [fault for node in list(_all_below(storage)) if (fault := await self._look_at(node))]
            if found:
                faults[disk] = "; ".join(fault.text for fault in found)
            if torn := [fault.text for fault in found if fault.torn]:
                self.torn[disk] = "; ".join(torn)
        if faults != self.faults:
            self.faults = faults
            self._changed()

    async def _look_at(self, node: Driver) -> Fault | None:
        known = self._lasting.get(node.name)
        if (known and known.torn) or not await in_thread(node.storage_fault):
            return known
        fault = node.storage_fault()  # again, here, where no resize of our own is half done
        if not fault or (known and not fault.torn):
            return known
        if fault.lasting:
            self._lasting[node.name] = fault
        return fault


def _all_below(node: Node) -> Iterator[Driver]:
    assert isinstance(node, Driver)
    yield node
    for child in node.children.values():
        yield from _all_below(child.node)
