"""The memory of an end in good order: a file that says what a program knew of its disks when it ended.

A program that is started again, after an update or a reboot, knows nothing of its disks but what the note says: that
they are this checkpoint of this run of a primary, but for what the standby *lacks*. So what has to be copied then is
the difference and not everything; and where both ends have ended in good order, their roles may be exchanged.

    end      the files are closed ──► their stamps ──► the note, durably
    start    the stamps are as in the note ──► the note goes, durably ──► the first write

Whoever ends in any other way leaves no note. Whoever writes to the files in between, or puts others in their place,
changes their stamps: inode, length, and the times of the last write and of the last change of any kind. These are as
coarse as the filesystem has them: a program ends when a write would have another time. A block device has its length,
and the kernel's count of what was written to it. That begins anew with each boot: so after a reboot nothing is known of
disks that are one.

**Instances.** Each run of a primary has a name of its own, and a standby remembers which run committed last, until
another one attaches: that one may write to the disks. A run that begins with a note calls itself NEW/OLD. A standby
that knows OLD, or a note in which OLD is known, then takes it for the same one; but only one of several that come from
the same note, since it knows NEW from then on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from blockstep.aio.pool import in_thread
from blockstep.aio.posix import replace_file, sync_parent
from blockstep.block.bitmap import Bitmap
from blockstep.block.driver import Driver
from blockstep.daemon.disks import DiskSpec
from blockstep.errors import explained

#: Of /sys/dev/block/*/stat, see iostats in the kernel's documentation: writes, sectors written, discards, sectors
#: discarded.
_WRITTEN: Final = (4, 6, 11, 13)


class DiskEnd(msgspec.Struct):
    """A disk in a note: where and what it was."""

    path: str
    format: str
    #: The files that it is made of. `write` puts the stamps in.
    files: dict[str, str]
    #: What the standby may lack of it: packed, see `pack`.
    lacks: bytes = b""


class GoodEnd(msgspec.Struct):
    """What was known at the end; see the module."""

    pair: str
    instance: str
    #: The last checkpoint; the last that was asked for; and how old the first of them was at the end, in seconds.
    epoch: int
    asked: int
    age: float
    disks: dict[str, DiskEnd]
    #: What a disk ``lacks`` is what was written since this checkpoint; that of a standby is its last one.
    durable: int
    #: Seconds of the Unix epoch. `write` puts it in.
    ended: float = 0.0

    @property
    def age_now(self) -> float:
        """How old the checkpoint is, in seconds, as far as the wall clock can be believed."""
        return self.age + max(0.0, time.time() - self.ended)


def successor(instance: str) -> str:
    """The name of a run that goes on where the run ``instance`` has ended; empty: where none has."""
    new, old = str(uuid.uuid4()), instance.partition("/")[0]
    return f"{new}/{old}" if old else new


def follows(instance: str, known: str) -> bool:
    """Whether the run ``instance`` goes on where ``known`` has ended."""
    return instance.partition("/")[2] == known.partition("/")[0] != ""


def disk_end(spec: DiskSpec, storage: Driver, *lacks: Bitmap) -> DiskEnd | None:
    """What there is to say of a disk and its open node; None if its files could not show that they were written to."""
    files = files_of(storage)
    if files is None:
        return None
    return DiskEnd(os.path.abspath(spec.path), spec.format, dict.fromkeys(files, ""),
                   pack(*lacks) if lacks else b"")


def files_of(storage: Driver) -> list[str] | None:
    """The files of a node and of what is below it; None if it lies on something else as well."""
    files: list[str] = []
    for node in (storage, *storage.below()):
        filename = getattr(node.options, "filename", None)
        if filename is not None:
            files.append(os.path.abspath(filename))
        elif not node.children:
            return None
    return files


def stamps(files: Iterable[str]) -> dict[str, str] | None:
    """The stamps of files that nobody has open for writing. None if one has none, or is not there."""
    found: dict[str, str] = {}
    for name in files:
        try:
            found[name] = _stamp(os.stat(name))
        except OSError:
            return None
    return found


def _stamp(status: os.stat_result) -> str:
    """See the module. Raises OSError where there is none."""
    if stat.S_ISREG(status.st_mode):
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    # A link to its directory; a partition's lies in that of its disk.
    device = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}").resolve(strict=True)
    disk = device if (device / "queue").exists() else device.parent
    if not stat.S_ISBLK(status.st_mode) or (disk / "queue/iostats").read_text().strip() != "1":
        raise OSError(errno.ENOTSUP, "nothing is counted")
    counts = (device / "stat").read_text().split()
    # A growth writes nothing, and what is new may hold anything.
    known = [(disk / "diskseq").read_text().strip(), (device / "size").read_text().strip()]
    return " ".join([boot(), *known, *(counts[at] for at in _WRITTEN)])


def boot() -> str:
    """Which boot of the kernel this is. Raises OSError."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def tick(changed: int) -> float:
    """How many seconds apart changes of a file must be to have different times, by the time of one, in nanoseconds.

    The clock of the kernel's timer, or where times are whole seconds, the two seconds of FAT.
    """
    return 2.0 if changed % 1_000_000_000 == 0 else 0.02


def pack(*bitmaps: Bitmap) -> bytes:
    """What is set in one of the bitmaps, which have one granularity; nothing, if nothing is."""
    union = Bitmap(bitmaps[0].length, bitmaps[0].granularity)
    for bitmap in bitmaps:
        union.merge(bitmap)
    return zlib.compress(union.bits.tobytes(), 1) if union.bits.any() else b""


def unpacked(packed: bytes, length: int, granularity: int) -> Bitmap | None:
    """The bitmap that `pack` has made of one of this length; None if it was of another."""
    bitmap = Bitmap(length, granularity)
    with memoryview(bitmap.bits) as view:
        try:
            data = zlib.decompressobj().decompress(packed, len(view) + 1)
        except zlib.error:
            return None
        if len(data) != len(view):
            return None
        view[:] = data
    return bitmap


def write(note: Path, end: GoodEnd) -> None:
    """Write the note, if the files, which are closed, are such that it can be believed. It is durable at return.

    Raises OSError that names the note; then there is none.
    """
    for disk in end.disks.values():
        found = stamps(disk.files)
        if found is None:
            return
        disk.files = found
    try:
        time.sleep(max(tick(os.stat(name).st_ctime_ns) for disk in end.disks.values() for name in disk.files))
    except FileNotFoundError:  # since then
        return
    end.ended = time.time()
    try:
        said = msgspec.json.encode(end) + b"\n"
    except UnicodeEncodeError:  # the name of a file is not text
        return
    try:
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(note, said)
    except OSError as error:
        code = error.errno or errno.EIO
        raise OSError(code, explained(code, "all has ended in good order, but the next start will compare everything"),
                      str(note)) from None


async def noted(note: Path, end: GoodEnd) -> list[OSError]:
    """`write`, in a thread; the error is returned, for those who have more to do."""
    try:
        await in_thread(write, note, end)
    except OSError as error:
        return [error]
    return []


def read(note: Path, pair: str, disks: Sequence[DiskSpec]) -> GoodEnd | None:
    """The note, if there is one and all is as it says; else None: nothing is known."""
    try:
        end = msgspec.json.decode(note.read_bytes(), type=GoodEnd)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None
    same = end.pair == pair and same_disks(end.disks, disks)
    return end if same and all(stamps(disk.files) == disk.files for disk in end.disks.values()) else None


def same_disks(said: Mapping[str, DiskEnd], disks: Sequence[DiskSpec]) -> bool:
    """Whether a note is of these disks, by their names, places and formats."""
    return ({name: (disk.path, disk.format) for name, disk in said.items()}
            == {disk.name: (os.path.abspath(disk.path), disk.format) for disk in disks})


def forget(note: Path) -> None:
    """From here on a note is not true any more; it is gone, durably, when this returns. Raises OSError."""
    note.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        sync_parent(note)  # also where it is gone: that may not have been durable
