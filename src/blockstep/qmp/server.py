"""The QMP server: sockets around sessions.

    server = Server(registry, context)
    await server.start_unix("/run/blockstep/qmp.sock")
    await server.start_tcp("::", 4444, ssl=tls, allow=frozenset({"query-name", ...}))
    server.emit(Stopped())
    await server.stop()

**Order.** The requests of one monitor are executed one after the other, in the order in which they came, and
answered in that order; a slow command delays only its own monitor. Out-of-band commands run at once. A command
that has begun runs to its end even if its monitor goes away, since half a failover is worse than an unread
answer; what was queued behind it is dropped. A monitor that only says that it sends no more (``echo ... | socat``)
gets all its answers; that it is gone altogether shows with the first answer that cannot be sent.

**Bounds.** They are in the module `monitor`: how many requests wait, how much input is read ahead, when output
holds requests back. Events cannot wait: a monitor that lets more than `monitor.EVENT_BACKLOG` bytes pile up is
cut off, because one that misses events without knowing is worse off than one that has to connect again
(`Server.cut_off` counts them). A listener takes ``max_monitors`` connections at a time; one more is told so and
closed. The limit is one of the listener, so that strangers on a TCP port cannot keep the administrator from the
unix socket.

**Access.** A unix socket has mode 0600 from the moment it can be connected to. A listener may offer fewer
commands (``allow``): others do not exist for it. TCP may be TLS; who may connect is the ssl context's matter.

**Time and errors.** The clock is passed in. An error that no command may raise is answered with GenericError and
given to the event loop's exception handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl as tls
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from blockstep.aio.acceptor import Acceptor
from blockstep.aio.names import resolve
from blockstep.errors import of_socket
from blockstep.qmp import wire
from blockstep.qmp.events import Throttle
from blockstep.qmp.monitor import Connection
from blockstep.qmp.schema import Command, Event, Registry
from blockstep.qmp.turns import Turns

_BACKLOG: Final = 128


class Listener:
    """One listening socket. ``address`` is a path, or (host, port) with the port that was really bound.

    ``pretty``: what its monitors are sent is laid out for people.
    """

    def __init__(self, server: Server, commands: Mapping[str, Command], max_monitors: int, pretty: bool) -> None:
        self.server, self.commands, self.max_monitors, self.pretty = server, commands, max_monitors, pretty
        self.monitors: set[Connection] = set()
        self.address: str | tuple[str, int] = ""
        #: Whether it takes no more monitors.
        self.closed = False
        self._acceptor: Acceptor | None = None
        self._tls: tls.SSLContext | None = None
        #: What makes monitors of connections, until they are.
        self._opening: set[asyncio.Task[None]] = set()
        self._inode: tuple[int, int] | None = None

    def _listen(self, sock: socket.socket, ssl: tls.SSLContext | None) -> None:
        name = sock.getsockname()
        self.address = os.fsdecode(name) if sock.family == socket.AF_UNIX else name[:2]
        self._tls = ssl
        sock.listen(_BACKLOG)
        self._acceptor = Acceptor(sock, self._accepted)
        self._acceptor.start()

    def _accepted(self, sock: socket.socket) -> None:
        def opened(task: asyncio.Task[None]) -> None:
            self._opening.discard(task)
            if task.cancelled():
                sock.close()  # it may not have begun

        task = self.server.spawn(self._open(sock))
        self._opening.add(task)
        task.add_done_callback(opened)

    async def _open(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # of the TLS handshake: who cannot do it is nobody's monitor
            await self._attach(sock)

    async def _attach(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        loop, ssl = asyncio.get_running_loop(), self._tls
        timeout: Any = {} if ssl is None else {"ssl_handshake_timeout": 10.0, "ssl_shutdown_timeout": 2.0}
        await loop.connect_accepted_socket(lambda: Connection(self), sock, ssl=ssl, **timeout)

    def close(self) -> None:
        """Stop listening; monitors stay. A unix socket that is still ours is removed from the file system."""
        self.closed = True
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        for task in self._opening:
            task.cancel()
        if self._inode is not None:
            with contextlib.suppress(OSError):
                if _inode(self.address) == self._inode:
                    os.unlink(str(self.address))
            self._inode = None


class Server:
    """A QMP server over any number of listeners.

    ``context`` is handed to every command. ``version`` is the greeting's. ``clock`` gives nanoseconds since the
    epoch, for the timestamps of events.
    """

    def __init__(self, registry: Registry, context: Any, *, version: Any = None,
                 clock: Callable[[], int] = time.time_ns) -> None:
        self.registry, self.context, self.version = registry, context, version
        self.listeners: list[Listener] = []
        self.cut_off = 0
        self.turns = Turns()
        self._clock = clock
        self._throttle = Throttle()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def monitors(self) -> list[Connection]:
        """The connections that are open now."""
        return [monitor for listener in self.listeners for monitor in listener.monitors]

    async def start_unix(self, path: str | os.PathLike[str], *, allow: frozenset[str] | None = None,
                         max_monitors: int = 64, pretty: bool = False) -> Listener:
        """Listen on a unix socket with mode 0600. A socket that a dead process left behind is replaced.

        Raises OSError: EADDRINUSE if somebody listens there or the path is no socket.
        """
        sock = bind_unix(os.fspath(path))
        listener = await self.start_socket(sock, allow=allow, max_monitors=max_monitors, pretty=pretty)
        listener._inode = _inode(path)
        return listener

    async def start_tcp(self, host: str, port: int, ssl: tls.SSLContext | None = None, *,
                        allow: frozenset[str] | None = None, max_monitors: int = 64,
                        pretty: bool = False) -> Listener:
        """Listen on the first address that ``host`` resolves to, IPv4 or IPv6; port 0 takes a free one.

        Raises OSError if the address cannot be resolved or bound.
        """
        sock = await bind_tcp(host, port)
        return await self.start_socket(sock, ssl, allow=allow, max_monitors=max_monitors, pretty=pretty)

    async def start_socket(self, sock: socket.socket, ssl: tls.SSLContext | None = None, *,
                           allow: frozenset[str] | None = None, max_monitors: int = 64,
                           pretty: bool = False) -> Listener:
        """Listen on a bound stream socket (systemd's, for one), which is closed with the listener."""
        try:
            listener = Listener(self, self.registry.offered(allow), max_monitors, pretty)
            listener._listen(sock, ssl)
        except BaseException:
            sock.close()
            raise
        self.listeners.append(listener)
        return listener

    async def attach(self, sock: socket.socket, *, allow: frozenset[str] | None = None, pretty: bool = False) -> None:
        """Serve one monitor on a connected stream socket, which is closed with it."""
        listener = Listener(self, self.registry.offered(allow), 1, pretty)
        self.listeners.append(listener)
        await listener._attach(sock)

    def emit(self, event: Event) -> None:
        """Send an event to every monitor in command mode, now or when its rate limit allows."""
        if self._throttle.offer(event, asyncio.get_running_loop().time()):
            self._broadcast(event)
        elif self._timer is None:
            self._arm()

    def announce(self, name: str, data: Mapping[str, Any]) -> None:
        """Send an event that the core reports: its name and data as on the wire.

        It is sent as the `Event` that the registry declares under ``name``. One that is not declared, or whose data
        does not fit the declaration, is a bug: it is reported as one, and sent as it is, at once.
        """
        try:
            kind = self.registry.events[name]
            event = msgspec.convert(data, kind.type)
        except (KeyError, msgspec.ValidationError) as error:
            self.report(error, f"event '{name}' is not as it was declared")
            self._send(name, data)
        else:
            self.emit(event)

    def _broadcast(self, event: Event) -> None:
        self._send(event.kind.name, event)

    def _send(self, name: str, data: Any) -> None:
        line = wire.encode_event(name, data, self._clock())
        for monitor in self.monitors:
            monitor.send_event(line)

    def _arm(self) -> None:
        when = self._throttle.next_time()
        loop = asyncio.get_running_loop()
        self._timer = None if when is None else loop.call_at(when, self._due)

    def _due(self) -> None:
        for event in self._throttle.due(asyncio.get_running_loop().time()):
            self._broadcast(event)
        self._arm()

    async def finish(self, grace: float = 2.0) -> None:
        """Stop listening, begin no more commands, and let those that have begun end. Events still go out.

        What has not ended after ``grace`` seconds is cancelled. Called from a command it does not wait for that
        command.
        """
        for listener in self.listeners:
            listener.close()
        for monitor in self.monitors:
            monitor.finish()
        waiting = self._tasks - {task for task in (asyncio.current_task(),) if task is not None}
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=grace)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def stop(self, grace: float = 2.0) -> None:
        """Stop listening, let commands that have begun end and answers go out, close all monitors.

        What has not ended after ``grace`` seconds is cancelled. Called from a command it does not wait for that
        command, whose answer is lost then: let the command return first.
        """
        deadline = asyncio.get_running_loop().time() + grace
        await self.finish(grace)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        monitors = self.monitors
        for monitor in monitors:
            monitor.close()
        if gone := [asyncio.ensure_future(monitor.gone.wait()) for monitor in monitors]:
            _, late_monitors = await asyncio.wait(gone, timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
            if late_monitors:
                for monitor in monitors:
                    monitor.abort()
                await asyncio.wait(gone)
        self.listeners.clear()

    def spawn(self, coroutine: Any) -> asyncio.Task[None]:
        """Run a monitor's work as a task that `stop` waits for."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def report(self, error: BaseException, what: str) -> None:
        """Something happened that may not: a bug, for the exception handler of the event loop."""
        report = {"message": f"QMP: {what}; this is a bug", "exception": error}
        asyncio.get_running_loop().call_exception_handler(report)


async def bind_tcp(host: str, port: int) -> socket.socket:
    """A socket bound to the first address that ``host`` resolves to, not listening yet. Raises OSError."""
    found = await resolve(host, port, socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_unix(path: str) -> socket.socket:
    """A socket bound to ``path`` with mode 0600, not listening yet, so that nobody can connect before the mode."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        os.chmod(path, 0o600)
    except OSError as error:
        sock.close()
        raise of_socket(error, path) from None
    except BaseException:
        sock.close()
        raise
    return sock


def _is_stale(path: str) -> bool:
    """Whether ``path`` is a socket on which nobody listens."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _inode(path: object) -> tuple[int, int]:
    status = Path(str(path)).lstat()
    return status.st_dev, status.st_ino

