"""Files that come under their names when they are complete.

    .NAME.PID.part ──made, filled, synced──► NAME

Who is interrupted leaves nothing under the name: what was there before stays until the new file takes its place, in
one step. A process that is killed leaves the ``.part`` file, and nothing refers to it. A file that somebody else writes
to is not replaced under him (EBUSY), a replaced file keeps its mode, and a symbolic link stays one.

The external data file of an image is made in its place, under its name: what it had is gone in any case.

A block device, or anything else that is no regular file, is written in its place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

from blockstep.aio.pool import in_thread, made_in_thread
from blockstep.aio.posix import OpenFile, sync_parent


@asynccontextmanager
async def made_anew(filename: str, durable: bool = True, beside: Iterable[str] = ()) -> AsyncIterator[str]:
    """The path at which to make ``filename``. After the section it has its name; after an exception it is gone.

    ``beside``: other files, which are made with it under their names. After an exception those are gone too that were
    not there before.
    """
    final = os.path.realpath(filename)
    new = [path for path in beside if not os.path.lexists(path)]
    old = await made_in_thread(_let_go, _hold, final)
    try:
        if old is None and os.path.exists(final):
            yield final
            return
        directory, name = os.path.split(final)
        part = os.path.join(directory, f".{_begin(name)}.{os.getpid()}.part")
        try:
            yield part
            await in_thread(_finish, part, final, old, durable)
        except BaseException as error:
            for path in (part, *new):
                with suppress(OSError):
                    os.unlink(path)
            if isinstance(error, OSError) and error.filename == part:
                error.filename = filename  # the name that the user knows
            raise
    finally:
        _let_go(old)


def _begin(name: str) -> str:
    """As much of a file's name as leaves room for more in another's: names have 255 bytes at most."""
    return os.fsdecode(os.fsencode(name)[:230])


def _hold(final: str) -> OpenFile | None:
    """The regular file that is to be replaced, locked; None: there is none."""
    try:
        if not stat.S_ISREG(os.stat(final).st_mode):
            return None
    except FileNotFoundError:
        return None
    return OpenFile(final, writable=True)


def _let_go(old: OpenFile | None) -> None:
    if old is not None:
        old.close()


def _finish(part: str, final: str, old: OpenFile | None, durable: bool) -> None:
    if old is not None:
        os.chmod(part, stat.S_IMODE(os.fstat(old.fd).st_mode))
    if durable:  # the drivers have flushed; what they wrote while they closed has to be there as well
        fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.rename(part, final)
    if durable:
        sync_parent(final)
