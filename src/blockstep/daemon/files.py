"""What others do to the files of a program's disks while it serves them: shorten, move, delete or replace them.

Nobody who only reads and writes notices, and the harm comes later: a deleted file is gone when the program ends, and
another one under its name is what the next start takes. So all files of a disk, backing images too, are looked at:
every few seconds, when somebody asks how it is, and at the end. Never on the path of a request, and in a thread: a
filesystem that hangs holds up nobody.

What has been lost stays a fault, also when a file has been made long again, for as long as its node is open. A name
can be mended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from blockstep.aio.pool import in_thread
from blockstep.aio.posix import Fault
from blockstep.block.driver import Driver

if TYPE_CHECKING:
    from blockstep.daemon.certificates import Certificates

#: Seconds between two looks, which the last one may take; and for which somebody who asks waits for one.
EVERY: Final = 5.0
PATIENCE: Final = 0.5


class Files:
    """See the module. ``changed`` is called when `faults` has become other than it was.

    ``certificates``, if there are any, are looked at as well, and ``changed`` is called when theirs have.
    """

    def __init__(self, changed: Callable[[], None], certificates: Certificates | None = None) -> None:
        self._changed = changed
        self._certificates = certificates
        #: What is told of certificates.
        self.expiring: list[str] = []
        #: Which disks have faults, and which, in words; and those whose content is not what was written any more.
        self.faults: dict[str, str] = {}
        self.torn: dict[str, str] = {}
        self._disks: dict[str, Driver] = {}
        self._nodes: Mapping[str, Driver] = {}
        self._lasting: dict[Driver, Fault] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    def told(self) -> list[str]:
        """The faults, one text a disk that has any."""
        return [f"disk '{name}': {fault}" for name, fault in self.faults.items()]

    def watch(self, disk: str, storage: Driver) -> None:
        """From now on look at the files of ``storage`` and of what is below it, which stay open until `close`."""
        self._disks[disk] = storage
        self._begin()

    def watch_each(self, nodes: Mapping[str, Driver]) -> None:
        """From now on look at the files of these nodes, which come and go: each is a disk of its own."""
        self._nodes = nodes
        self._begin()

    def _begin(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY, self._due)

    async def look(self) -> None:
        """Look now. Gives up waiting for a filesystem that hangs."""
        await asyncio.wait([self._look()], timeout=PATIENCE)

    async def close(self) -> None:
        """Look for the last time; then the files may be closed. Gives up a look that hangs after some seconds."""
        if self._timer:
            self._timer.cancel()
        look = self._look()
        await asyncio.wait([look], timeout=EVERY)
        look.cancel()
        self._disks, self._nodes = {}, {}

    def _due(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._due)
        self._look()

    def _look(self) -> asyncio.Task[None]:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look_at_all())
        return self._looking

    async def _look_at_all(self) -> None:
        watched = [(disk, node) for disk, storage in self._disks.items() for node in (storage, *storage.below())]
        watched += self._nodes.items()
        seen = await in_thread(_faults, [node for _, node in watched])
        found: dict[str, list[Fault]] = {}
        lasting: dict[Driver, Fault] = {}
        for disk, node in watched:
            fault = _judge(self._lasting.get(node), seen[node])
            if fault and not node.gone:
                found.setdefault(disk, []).append(fault)
                if fault.lasting:
                    lasting[node] = fault
        self._lasting = lasting
        faults, self.torn = _in_words(found), _in_words(found, torn=True)
        expiring = await self._certificates.look() if self._certificates else []
        if faults != self.faults or expiring != self.expiring:
            self.faults, self.expiring = faults, expiring
            self._changed()


def _faults(nodes: Iterable[Driver]) -> dict[Driver, Fault | None]:
    """For a thread."""
    return {node: node.storage_fault() for node in nodes}


def _judge(known: Fault | None, seen: Fault | None) -> Fault | None:
    """What is the matter with a node of which is ``known`` what lasts, and which looks as ``seen`` now."""
    return seen if seen and (not known or seen.torn > known.torn) else known


def _in_words(found: Mapping[str, list[Fault]], torn: bool = False) -> dict[str, str]:
    """The faults of each disk, or those by which it is ``torn``; without the disks that have none."""
    words = {disk: "; ".join(fault.text for fault in faults if fault.torn >= torn) for disk, faults in found.items()}
    return {disk: text for disk, text in words.items() if text}
