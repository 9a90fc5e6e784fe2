"""How much the buffers of a standby may hold: their memory, and what is free in the file system that they go on in.

A primary takes a checkpoint before a disk's buffer is full, so the standby tells it with each answer what the buffer
may hold. With a ``--buffer-dir`` that changes, for others use the file system as well. It is looked at when a primary
attaches, each time that it asks how the standby is, and when somebody else does. Never on the path of a request, and in
a thread: a file system that hangs holds up nobody. Several disks that share what is free are told an even share of it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from blockstep.aio.pool import in_thread
from blockstep.daemon.files import PATIENCE
from blockstep.daemon.standby_setup import StandbyConfig, StandbyDisk


class Room:
    """See the module. `look` finds out, `limit` is what it found."""

    def __init__(self, config: StandbyConfig, disks: Mapping[str, StandbyDisk]) -> None:
        self._config, self._disks = config, disks
        #: Of buffers that are images none of it is in memory.
        self._memory = config.buffer_memory if config.buffer_format == "overlay" else 0
        self._limits: dict[str, int] = {}
        self._looking: asyncio.Task[None] | None = None

    def limit(self, name: str) -> int:
        """Bytes that the buffer of a disk may hold between two checkpoints; 0: there is no limit, or none is known."""
        return self._limits.get(name, 0) if self._config.buffer_dir else self._memory

    @property
    def least(self) -> int:
        """The limit that is reached first; 0: there is none."""
        return min(filter(None, map(self.limit, self._disks)), default=0)

    async def look(self) -> None:
        """Look now. Gives up waiting for a file system that hangs."""
        self.begin()
        if self._looking:
            await asyncio.wait([self._looking], timeout=PATIENCE)

    def begin(self) -> None:
        """Look, and wait for nothing."""
        if self._config.buffer_dir and (self._looking is None or self._looking.done()):
            self._looking = asyncio.get_running_loop().create_task(self._look_at(self._config.buffer_dir))

    async def _look_at(self, directory: Path) -> None:
        # Before the file system: what a checkpoint gives back meanwhile is not counted twice.
        held = {name: max(disk.buffer.used if disk.buffer else 0, self._memory) for name, disk in self._disks.items()}
        try:
            free = await in_thread(_free, directory)
        except OSError:  # it is gone: nothing goes there any more, but into files that are open
            self._limits = dict.fromkeys(held, self._memory)
            return
        self._limits = {} if free is None else {name: max(1, used + free // len(held)) for name, used in held.items()}


def _free(directory: Path) -> int | None:
    """Bytes that are free for this user; None: there is no bound to them, as in a tmpfs without a size."""
    seen = os.statvfs(directory)
    return seen.f_bavail * seen.f_frsize if seen.f_blocks else None
