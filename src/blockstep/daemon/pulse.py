"""Signs of life: the time of a note, by which a start after a crash knows whether its disks are what they were.

A program that lives gives its note the present time, once a second, unless it sees that something has become of its
files: then there is no note any more. After its death others may write to the files, or put other ones in their place.
Those have another inode. What was changed (ctime) later than the note, by more than that may be behind, was changed
when the program did not run any more; after a reboot, so was what was changed since then. What was changed last before
the note was written is an older state of the file, put back; and a raw disk that is shorter was cut off. Only a clock
that was put back can hide all that, or that of a file server which is late. Block devices have no such time: nothing is
known of disks that are one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from blockstep.aio.pool import in_thread
from blockstep.daemon.files import Files
from blockstep.daemon.good_end import DiskEnd, boot, forget

#: Seconds from one time of the note to the next, and how far it may be behind the last write to a disk: after the death
#: of the process, and after a power failure, which may have kept the one and lost the other.
_EVERY: Final = 1.0
_BEHIND: Final = 3.0
_BEHIND_AFTER_REBOOT: Final = 60.0


class Pulse:
    """Keeps the time of ``note``, while ``lives`` says that somebody may write to the disks, which have ``files``."""

    def __init__(self, note: Path, files: Files, lives: Callable[[], bool] = lambda: True) -> None:
        self._note, self._files, self._lives = note, files, lives
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The note is of now. From here on it is kept so."""
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(_EVERY, self._due)

    async def beat(self) -> None:
        """Once, and then as from `start`."""
        await self._files.look()
        if self._files.faults:
            with contextlib.suppress(OSError):  # then it has become too old in some seconds
                await in_thread(forget, self._note)
            return
        with contextlib.suppress(OSError):  # a note that is too old is not believed
            await in_thread(os.utime, self._note)
        self.start()

    def stop(self) -> None:
        """No more, but for what has begun."""
        if self._timer:
            self._timer.cancel()

    async def close(self) -> None:
        """No more."""
        if self._beating:
            await self._beating
        self.stop()

    def _due(self) -> None:
        if self._lives():
            self._beating = asyncio.get_running_loop().create_task(self.beat())
        else:
            self.start()


def stamp(disks: Mapping[str, DiskEnd]) -> None:
    """Give the disks of a note the stamps of their files. Raises OSError if one is no regular file."""
    for disk in disks.values():
        disk.files = {name: " ".join(map(str, _seen(name))) for name in disk.files}


def unchanged(note: Path, boot_then: str, disks: Mapping[str, DiskEnd]) -> bool:
    """Whether nobody has changed the files since the program died, in the boot ``boot_then``. Raises OSError."""
    latest = (written := os.stat(note).st_mtime) + _BEHIND
    if boot_then != boot():
        latest = min(written + _BEHIND_AFTER_REBOOT, time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))
    return all(_unchanged(name, stamp, latest, disk.format) for disk in disks.values()
               for name, stamp in disk.files.items())


def _unchanged(name: str, stamp: str, latest: float, format: str) -> bool:
    was, now = [int(part) for part in stamp.split() if part.isdecimal()], _seen(name)
    # Images become shorter by themselves.
    return (len(was) == 3 and now[0] == was[0] and was[1] <= now[1] <= latest * 1e9
            and (was[2] <= now[2] or format != "raw"))


def _seen(name: str) -> tuple[int, int, int]:
    """Inode, ctime and length of a regular file. Raises OSError for others."""
    status = os.stat(name)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{name} is no regular file")
    return status.st_ino, status.st_ctime_ns, status.st_size
