"""The memory of whom a standby follows: a file for the start after a crash.

After a crash its disks are some checkpoint of a primary, with any part of what that wrote since then. The primary
remembers, as long as it runs, what it wrote since the last checkpoint that is durable (`blockstep.replication.link`).
So it copies no more than that, if it learns which of its checkpoints the disks are based on::

    a checkpoint is durable on the disks ──► the note, durably ──► the primary forgets what came before
    every second with a primary ──► the note's time
    anybody else is about to write to the disks ──► no note, durably

Whether others have written to the files since: `blockstep.daemon.pulse`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from blockstep.aio.pool import in_thread
from blockstep.aio.posix import replace_file
from blockstep.block.graph import Graph
from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.files import Files
from blockstep.daemon.good_end import DiskEnd, boot, disk_end, forget, same_disks
from blockstep.daemon.pulse import Pulse, stamp, unchanged
from blockstep.daemon.standby_setup import StandbyDisk


class Followed(msgspec.Struct, frozen=True):
    """Which run of a primary the disks follow, and the checkpoint from which on they may differ from it."""

    pair: str
    instance: str
    epoch: int
    #: With the stamps of `blockstep.daemon.pulse`.
    disks: dict[str, DiskEnd]
    boot: str


class Following:
    """The note of a standby. ``attached``: whether there is a primary, which may write at any time."""

    def __init__(self, note: Path, pair: str, graph: Graph, disks: Mapping[str, StandbyDisk], files: Files,
                 attached: Callable[[], bool]) -> None:
        self._note, self._pair, self._graph, self._disks, self._files = note, pair, graph, disks, files
        self._pulse = Pulse(note, files, attached)
        #: Whose run the note is of; empty: nobody's, or that is not known.
        self.instance = ""
        self._may_exist = False
        self._turn = asyncio.Lock()

    async def go_on(self, instance: str) -> None:
        """There is a note, of this run, that `read` has found."""
        self.instance, self._may_exist = instance, True
        await self._pulse.beat()

    async def keep(self, instance: str, epoch: int, check: Callable[[], None] = lambda: None) -> None:
        """Write down that the disks follow this run, from this checkpoint on; durable at return.

        Of disks that cannot have a note, or of whose files something has become, there is none. ``check`` is called
        when its turn has come, and what it raises ends it. Raises OSError that names the note; then the one before may
        be there still.
        """
        await self._files.look()
        if self._files.faults:
            await self.forget()
            return
        async with self._turn:
            check()
            disks = {name: disk_end(disk.spec, self._graph.find(f"{name}-secondary"))
                     for name, disk in self._disks.items()}
            known = {name: disk for name, disk in disks.items() if disk}
            if len(known) == len(disks):
                self._may_exist = True
                if self.instance != instance:
                    self.instance = ""  # until one of them is there for sure
                if await in_thread(_write, self._note, self._pair, instance, epoch, known):
                    self.instance = instance
                    self._pulse.start()

    async def forget(self) -> None:
        """There is no note when this returns, durably. Raises OSError that names it."""
        async with self._turn:
            if self._may_exist:
                self.instance = ""
                await in_thread(forget, self._note)
                self._may_exist = False

    async def close(self) -> None:
        """Leave the note as it is."""
        await self._pulse.close()


def read(note: Path, pair: str, disks: Sequence[DiskSpec], opened: bool = False) -> Followed | None:
    """The note, if there is one and all is as it says; else None, and there is none any more. Raises OSError.

    ``opened``: once more, when the disks are open, which may have changed their files, and when no other process can
    have them any more.
    """
    try:
        said = msgspec.json.decode(note.read_bytes(), type=Followed)
        if said.pair == pair and same_disks(said.disks, disks) and (
                opened or unchanged(note, said.boot, said.disks)):
            return said
    except (OSError, msgspec.MsgspecError, UnicodeError):
        pass
    forget(note)
    return None


def forget_if_of(note: Path, disks: Sequence[DiskSpec]) -> None:
    """For somebody else who is about to write to these disks: a note of one of them goes, durably. Raises OSError."""
    mine = {os.path.abspath(disk.path) for disk in disks}
    try:
        said = msgspec.json.decode(note.read_bytes(), type=Followed)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return
    if any(disk.path in mine for disk in said.disks.values()):
        forget(note)


def _write(note: Path, pair: str, instance: str, epoch: int, disks: dict[str, DiskEnd]) -> bool:
    """Whether there is a note now."""
    try:
        for disk in disks.values():
            for name in disk.files:
                _sync(name)
        stamp(disks)
        said = msgspec.json.encode(Followed(pair, instance, epoch, disks, boot()))
    except (OSError, UnicodeError):  # a device; a file that is not there any more, of which a look tells; no text
        forget(note)
        return False
    replace_file(note, said + b"\n")
    return True


def _sync(name: str) -> None:
    """Make a file's times durable, as its data are: after a power failure an older time is that of an older state."""
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
