"""The NBD server: listeners, connections, and what they have in common.

    server = Server(tls="required", tls_context=server_context(directory, verify_peer=True))
    server.add(Export("disk", backend))
    await server.start_tcp("::", 10809)
    ...
    await server.remove("disk", "hard")      # its clients are cut off; the name is unknown from now on
    await server.stop()                      # finish what is in flight, then close

All methods belong to the thread of the event loop. An export can be added and removed while clients are connected.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from blockstep.aio.acceptor import Acceptor
from blockstep.aio.names import resolve
from blockstep.errors import OptionError, of_socket
from blockstep.nbd.buffers import Pool
from blockstep.nbd.connection import Connection, Limits
from blockstep.nbd.export import Export, ExportInUse, Exports
from blockstep.nbd.handshake import TlsMode
from blockstep.nbd.turns import Turns

_BACKLOG: Final = 128
_FIRST_PASSED_FD: Final = 3
#: What the kernel may hold for a client on a unix socket, as far as it allows that much (net.core.wmem_max): a reply
#: of 1 MiB then leaves with one call and not with eight (1.9 k to 2.5 k a second). TCP finds its own size.
_UNIX_SEND_BUFFER: Final = 2 << 20


class ClientEvent(msgspec.Struct, frozen=True):
    """Something happened to a client."""

    #: connected; ready: it has chosen ``export``; gone; refused: there were too many already.
    what: Literal["connected", "ready", "gone", "refused"]
    peer: str  #: address and port, or "unix"
    export: str | None = None
    error: BaseException | None = None  #: for "gone": None if it left in good order


class Server:
    """An NBD server. Make it in a running event loop."""

    def __init__(self, *, tls: TlsMode = "off", tls_context: ssl.SSLContext | None = None, max_connections: int = 0,
                 limits: Limits | None = None, memory: int = 1 << 30, accepting: bool = True,
                 on_client: Callable[[ClientEvent], None] | None = None) -> None:
        """``max_connections`` 0: no limit. ``limits`` hold for each connection. ``accepting``: see `accept`.

        ``memory``: bytes that all connections together may hold for payloads of more than 256 KiB; a client whose
        payload finds no room is not read from until there is, and is cut off if there is none for long.

        ``on_client`` is called from the loop for each event. Raises OptionError for TLS without a context.
        """
        if tls != "off" and tls_context is None:
            raise OptionError("tls", tls, "off, or given together with certificates")
        self.exports = Exports()
        self.connections: set[Connection] = set()
        self._tls: TlsMode = tls
        self._tls_context = tls_context
        self._max_connections = max_connections
        self._limits = limits or Limits()
        self._on_client = on_client
        self._pool = Pool(budget=memory)
        self._turns = Turns()
        self._listeners: list[Acceptor] = []
        self._paths: list[tuple[str, tuple[int, int]]] = []
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._accepting = accepting

    # Exports.

    def add(self, export: Export) -> None:
        """Offer an export. Raises OptionError if its name is taken."""
        self.exports.add(export)

    async def remove(self, name: str, mode: Literal["safe", "hard"] = "safe") -> None:
        """Take an export away.

        "safe" raises ExportInUse if clients are connected to it. "hard" cuts them off: at return nothing more
        that they sent will be started; what had been started runs to its end, see `Export.wait_idle`. Raises
        OptionError if there is no such export.
        """
        export = self.exports.find(name)
        if mode == "safe" and export is not None and export.connections:
            raise ExportInUse(name, len(export.connections))
        export = self.exports.remove(name)
        for connection in list(export.connections):
            connection.abort(ConnectionAbortedError(errno.ECONNABORTED, f"export '{name}' was removed"))

    # Listeners.

    async def start_tcp(self, host: str | None, port: int) -> list[tuple[str, int]]:
        """Listen on all addresses of ``host`` (None or empty: all of this machine). Port 0 takes a free one.

        ``::`` is open to IPv4 as well. Returns the addresses with their port. Raises OSError that names the address
        if any of them cannot be had; none is kept then.
        """
        try:
            infos = await resolve(host or "", port, socket.AI_PASSIVE | socket.AI_ADDRCONFIG)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {error.strerror}") from None
        both = len({family for family, *_ in infos}) > 1
        made: list[socket.socket] = []
        try:
            for family, _, _, _, address in dict.fromkeys(infos):
                if made and not port:  # the same free port on all addresses
                    address = (address[0], made[0].getsockname()[1], *address[2:])
                made.append(_listen_tcp(family, address, both))
        except OSError:
            for sock in made:
                sock.close()
            raise
        for sock in made:
            self._listen(sock)
        return [sock.getsockname()[:2] for sock in made]

    async def start_unix(self, path: str | os.PathLike[str]) -> None:
        """Listen on a unix socket. A socket file that nobody listens on any more is replaced.

        Raises OSError (EADDRINUSE among it) that names the path. `stop` removes the file.
        """
        name = os.fspath(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale(name)
            sock.bind(name)
            sock.listen(_BACKLOG)
            info = os.stat(name)
        except OSError as error:
            sock.close()
            raise of_socket(error, name) from None
        self._paths.append((name, (info.st_dev, info.st_ino)))
        self._listen(sock)

    def start_fd(self, fd: int) -> None:
        """Listen on a socket that was handed over, see `passed_sockets`. Takes ``fd`` over."""
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            raise OptionError("fd", fd, "a stream socket that listens")
        self._listen(sock)

    def _listen(self, sock: socket.socket) -> None:
        listener = Acceptor(sock, self.serve)
        self._listeners.append(listener)
        if self._accepting:
            listener.start()

    # Connections.

    def accept(self) -> None:
        """Serve those who connect, and those who have: they wait while a server is not ``accepting``."""
        self._accepting = True
        for listener in self._listeners:
            listener.start()

    def serve(self, sock: socket.socket) -> Connection | None:
        """Serve a connected socket. None if there are too many connections: it has been closed then."""
        if (self._max_connections and len(self.connections) >= self._max_connections) or self._stopped:
            sock.close()
            self._tell(ClientEvent("refused", "unknown"))
            return None
        try:
            if sock.family == socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
            connection = Connection(sock, self.exports, self._pool, self._turns, self._limits, self._tls,
                                    self._tls_context, self._changed)
        except OSError as error:  # it is gone already
            sock.close()
            self._tell(ClientEvent("refused", "unknown", error=error))
            return None
        self.connections.add(connection)
        self._tell(ClientEvent("connected", connection.peer))
        return connection

    def _changed(self, connection: Connection, what: Literal["ready", "gone"]) -> None:
        if what == "gone":
            self.connections.discard(connection)
        export = connection.export.name if connection.export is not None else None
        self._tell(ClientEvent(what, connection.peer, export, connection.error))

    def _tell(self, event: ClientEvent) -> None:
        if self._on_client is not None:
            self._on_client(event)

    # The end.

    async def stop(self, deadline: float = 10.0) -> None:
        """Accept nobody any more, answer what has been received, close all connections.

        Connections that have not ended after ``deadline`` seconds are cut off. Idempotent.
        """
        self._stopped = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._remove_paths()
        for connection in list(self.connections):
            connection.finish()
        waiting = [asyncio.ensure_future(connection.channel.wait_closed()) for connection in self.connections]
        if waiting:
            await asyncio.wait(waiting, timeout=deadline)
        for connection in list(self.connections):
            connection.abort(TimeoutError(f"not ended {deadline:g} s after the server was stopped"))
        if waiting:
            await asyncio.wait(waiting)

    def _remove_paths(self) -> None:
        for path, identity in self._paths:
            try:
                info = os.stat(path)
                if (info.st_dev, info.st_ino) == identity:
                    os.unlink(path)
            except OSError:
                pass
        self._paths.clear()


def passed_sockets() -> list[int]:
    """The listening sockets that systemd handed over (LISTEN_FDS), and forget them in the environment.

    Source: sd_listen_fds(3).
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = list(range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def _listen_tcp(family: int, address: tuple[object, ...], both: bool) -> socket.socket:
    """``both``: IPv4 has a socket of its own."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(both))
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{error.strerror}: cannot listen on {address[0]} port {address[1]}") from None
    return sock


def _remove_stale(path: str) -> None:
    """Unlink a socket file whose server is gone."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass
