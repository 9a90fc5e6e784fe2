"""What a program does to be a daemon of the old school: a file with its process id, and a life in the background.

``--daemonize``: the parent waits until the child serves, and ends with 0; if the child fails, it has said why on the
standard error that they share, and the parent ends with 1. When the child serves it lets go of the terminal, of its
directory and of standard input, output and error.

The pidfile is locked for as long as the program lives, so that a second one with the same file is refused, and one
that was killed is in nobody's way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable

from blockstep.errors import BlockstepError


class PidFile:
    """The process id in a file, locked. Raises BlockstepError if another living program holds it, or if it is no file
    but a device, say; OSError. What was there is left alone then, and nothing new is."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        while True:
            self._fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._fd)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise BlockstepError(f"pidfile '{path}' belongs to a program that is running") from None
                raise
            if self._is_the_file():
                break
            os.close(self._fd)  # the one before us has just removed it
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise BlockstepError("this is no regular file")
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the file and let go of it."""
        if self._is_the_file():
            os.unlink(self._path)
        os.close(self._fd)

    def _is_the_file(self) -> bool:
        mine = os.fstat(self._fd)
        with contextlib.suppress(OSError):
            there = os.stat(self._path)
            return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
        return False


def daemonize() -> Callable[[], None]:
    """Go on in a child, in a session of its own. Returns in the child, with what to call when it serves.

    The parent does not return. Call it before there are threads or an event loop.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        served = os.read(reading, 1)
        os._exit(0 if served else _exit_code(child))
    os.close(reading)
    os.setsid()

    def serving() -> None:
        os.chdir("/")
        sys.stdout.flush()
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(writing, b"1")
        os.close(writing)

    return serving


def _exit_code(child: int) -> int:
    """That of a child that has ended before it served; 0 would be a lie."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) and status else 1
