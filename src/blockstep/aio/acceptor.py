"""A listening socket that outlives a shortage.

A connection that cannot be accepted, for want of descriptors or memory, stays in the kernel's queue, and its socket
stays readable: a loop that only tried again would do nothing else. So nothing is accepted for a moment after each
failure, and those who wait in the queue are served as soon as there is room for them.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Final

#: Connections that are accepted before others have a turn.
AT_ONCE: Final = 32
#: Seconds without accepting after it has failed.
PAUSE: Final = 1.0
#: Seconds in which failures are reported once.
SILENCE: Final = 60.0


class Acceptor:
    """Gives each connection of ``sock``, which listens, to ``accepted``. Make it in a running event loop.

    What keeps it from accepting is reported, as one line without a traceback, to the exception handler of the loop.
    """

    def __init__(self, sock: socket.socket, accepted: Callable[[socket.socket], object], pause: float = PAUSE) -> None:
        """Takes ``sock`` over. ``pause``: see `PAUSE`."""
        sock.setblocking(False)
        self.sock = sock
        self._accepted = accepted
        self._pause = pause
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._silent_until = 0.0

    def start(self) -> None:
        """Accept those who connect, and those who have."""
        self._timer = None
        self._loop.add_reader(self.sock, self._accept)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock)
            self.sock.close()

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, _ = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._loop.remove_reader(self.sock)
                self._timer = self._loop.call_later(self._pause, self.start)
                self._report(error)
                return
            self._accepted(sock)

    def _report(self, error: OSError) -> None:
        now = self._loop.time()
        if now >= self._silent_until:
            self._silent_until = now + SILENCE
            self._loop.call_exception_handler({
                "message": f"blockstep: new clients have to wait at {_where(self.sock)}: {error.strerror}"})


def _where(sock: socket.socket) -> str:
    name = sock.getsockname()
    return f"{name[0]} port {name[1]}" if isinstance(name, tuple) else os.fsdecode(name)
