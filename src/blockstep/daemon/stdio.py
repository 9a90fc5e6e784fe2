"""Standard input and output as a socket, for a monitor on a terminal or on the pipes of whoever started the daemon.

Two threads carry bytes: files and terminals do not all work with an event loop, and a thread does not mind. When
standard input ends, the monitor is told that no more comes; it answers what came, and the daemon lives on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Final

_PIECE: Final = 65536
#: Seconds for what is still to be written at the end.
_LAST: Final = 2.0


class StandardStreams:
    """The other end of `sock`, from `start` on."""

    def __init__(self) -> None:
        self.sock, self._mine = socket.socketpair()
        self._out = threading.Thread(target=self._write, name="stdout", daemon=True)

    def start(self) -> None:
        """Carry bytes."""
        threading.Thread(target=self._read, name="stdin", daemon=True).start()
        self._out.start()

    def close(self) -> None:
        """When the monitor has closed its end: wait until what it said has been written."""
        if self._out.is_alive():
            self._out.join(_LAST)
        else:
            self._mine.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(0, _PIECE):
                self._mine.sendall(piece)
        with contextlib.suppress(OSError):
            self._mine.shutdown(socket.SHUT_WR)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while piece := self._mine.recv(_PIECE):
                while piece:
                    piece = piece[os.write(1, piece):]
        self._mine.close()
