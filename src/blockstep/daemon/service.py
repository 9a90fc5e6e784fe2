"""What the programs share: the control socket, readiness and a clean stop.

A program is a coroutine that starts everything and then waits in `Service.wait` until it is told to stop: by
SIGTERM, SIGINT or SIGHUP, or by the command ``quit``. Another SIGTERM or SIGHUP changes nothing: a stop that is broken
off loses data. A second Ctrl-C is somebody who wants that, and kills. Under systemd it says READY=1 when it serves and
STOPPING=1 when it begins to stop (sd_notify's protocol: a datagram to $NOTIFY_SOCKET).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Literal

from blockstep import __version__
from blockstep.aio.malloc import keep_freed_memory
from blockstep.qmp.commands import core, introspection
from blockstep.qmp.schema import Event, Registry
from blockstep.qmp.server import Server


def make_parent(path: Path) -> None:
    """Make the directory of a socket, for its owner alone, if it is missing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def notify(state: str) -> None:
    """Tell systemd, if it listens. Failing to is no reason to fail."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.send(state.encode())


def _open_as_many_files_as_allowed() -> None:
    """The usual limit, 1024, is for programs that call select(2); each client and each disk is a file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # an administrator may have lowered what the kernel allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Service:
    """A program that runs until it is told to stop. Make it in a running event loop."""

    run_state: core.RunState = "running"

    def __init__(self, name: str | None) -> None:
        keep_freed_memory()
        _open_as_many_files_as_allowed()
        self.name = name
        major, minor, micro = (int(part) for part in __version__.split("."))
        self.version = core.Version(
            qemu=core.Triple(major=7, minor=2, micro=0), package=f"blockstep {major}.{minor}.{micro}"
        )
        self.qmp: Server | None = None
        self._quit = asyncio.Event()
        self._reason: Literal["host-qmp-quit", "host-signal"] = "host-qmp-quit"
        # From the beginning: what is half open when the signal comes is closed in good order as well. A terminal
        # that is closed is no reason to leave disks unmerged; nohup's wish is respected.
        self._signals = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                         if signal.getsignal(number) != signal.SIG_IGN]
        for number in self._signals:
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)

    def request_quit(self) -> None:
        """Begin a clean stop."""
        self._quit.set()

    def _signalled(self) -> None:
        self._reason = "host-signal"
        self.request_quit()

    async def serve_qmp(self, path: Path, *areas: Registry) -> None:
        """Open the control socket with the commands of ``areas`` and those that every program has."""
        make_parent(path)
        self.qmp = Server(Registry.of(core.commands, introspection.commands, *areas), self, version=self.version)
        await self.qmp.start_unix(path)

    def emit(self, event: Event) -> None:
        """Send an event to all monitors."""
        if self.qmp:
            self.qmp.emit(event)

    async def told_to_stop(self) -> None:
        """Wait for a signal or the command ``quit``."""
        await self._quit.wait()

    async def wait(self) -> None:
        """Say that everything is served, and wait for the end."""
        notify("READY=1")
        try:
            await self._quit.wait()
        finally:
            notify("STOPPING=1")
            if signal.SIGINT in self._signals:
                asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
                signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def finish_qmp(self) -> None:
        """Begin no more commands, and let those that have begun end: what they are about is taken down next."""
        if self.qmp:
            await self.qmp.finish()

    async def stop_qmp(self) -> None:
        """Close the control socket, after its answers have gone out."""
        if self.qmp:
            self.emit(core.Shutdown(reason=self._reason))
            await self.qmp.stop()

