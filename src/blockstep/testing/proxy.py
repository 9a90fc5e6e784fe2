"""A network that fails on command: a TCP proxy between a primary and its standby.

    async with Proxy("127.0.0.1", 40000) as proxy:      # stands for the port given and the one above it
        primary --standby 127.0.0.1:{proxy.port}
        proxy.delay = 0.1         # seconds that every byte is under way, in each direction
        proxy.rate = 1 << 20      # bytes a second, in each direction and connection; 0: no limit
        proxy.half_open()         # both sides believe they are connected, and nothing arrives any more
        proxy.cut()               # every connection is reset
        proxy.closed = True       # and new ones are reset at once
        proxy.heal()              # as in the beginning, for new connections

What a half-open connection has swallowed is lost, as in the field: `heal` is for those that come after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self

from blockstep.aio.endings import wait_out

_CHUNK: Final = 64 << 10
#: Bytes that are under way in one direction of a connection before reading stops.
_WINDOW: Final = 4 << 20
_RESET: Final = struct.pack("ii", 1, 0)


class Proxy:
    """See the module. ``ports``: how many neighbouring ports it stands for."""

    def __init__(self, host: str, port: int, ports: int = 2) -> None:
        self.host, self.target_port, self.ports = host, port, ports
        self.port = 0
        self.delay = 0.0
        self.rate = 0
        self.closed = False
        self.up = 0  #: bytes that have gone to the standby
        self.down = 0  #: bytes that have come from it
        self._swallowing = False
        self._listeners: list[socket.socket] = []
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """HOST:PORT of the first port."""
        return f"{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._connections)

    async def __aenter__(self) -> Self:
        self._listeners = _neighbours(self.host, self.ports)
        self.port = self._listeners[0].getsockname()[1]
        for number, listener in enumerate(self._listeners):
            self._begin(self._accept(listener, self.target_port + number))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()
        for listener in self._listeners:
            listener.close()

    def cut(self) -> None:
        """Reset all connections, on both sides. Once only: new ones are taken, see `closed`."""
        for connection in list(self._connections):
            connection.reset()

    def half_open(self) -> None:
        """Swallow whatever comes, in both directions; new connections are taken and hear nothing."""
        self._swallowing = True
        for connection in self._connections:
            connection.swallowing = True

    def heal(self) -> None:
        """New connections are good ones, without delay and limit. Those that have lost something stay half-open."""
        self._swallowing = self.closed = False
        self.delay, self.rate = 0.0, 0

    async def _accept(self, listener: socket.socket, port: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(listener)
            if self.closed:
                _reset(near)
                continue
            connection = _Connection(self, near, self._swallowing)
            self._connections.add(connection)
            connection.task = self._begin(connection.run(port))
            connection.task.add_done_callback(connection.close)  # it may be cancelled before its first step

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)


class _Connection:
    """Two sockets and the two directions between them."""

    def __init__(self, proxy: Proxy, near: socket.socket, swallowing: bool) -> None:
        self.proxy, self.near, self.swallowing = proxy, near, swallowing
        self.far = socket.socket(socket.AF_INET6 if ":" in proxy.host else socket.AF_INET)
        for sock in (self.near, self.far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.task: asyncio.Task[None] | None = None
        self._pumps: list[asyncio.Task[None]] = []

    async def run(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            if not self.swallowing:
                await loop.sock_connect(self.far, (self.proxy.host, port))
            directions = [_Direction(self, self.near, self.far, True)]
            if not self.swallowing:
                directions.append(_Direction(self, self.far, self.near, False))
            self._pumps = [loop.create_task(direction.pump()) for direction in directions]
            done, _ = await asyncio.wait(self._pumps, return_when=asyncio.FIRST_EXCEPTION)
            for pump in done:
                pump.result()
        except OSError:
            self.reset()
        finally:
            # First out of the loop, then closed: it knows a socket by its number, which another one may have then.
            for pump in self._pumps:
                pump.cancel()
            for pump in self._pumps:
                await wait_out(pump)
                _ = pump.cancelled() or pump.exception()  # both may have failed
            self.close()

    def close(self, _: object = None) -> None:
        """Nothing more is heard or said."""
        self.near.close()
        self.far.close()
        self.proxy._forget(self)

    def reset(self) -> None:
        """RST on both sides. The sockets are closed by `run`."""
        for sock in (self.near, self.far):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if self.task:
            self.task.cancel()


class _Direction:
    """From one socket to the other, with what is under way between them."""

    def __init__(self, connection: _Connection, source: socket.socket, sink: socket.socket, up: bool) -> None:
        self.connection, self.source, self.sink, self.up = connection, source, sink, up
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._moved = asyncio.Event()

    async def pump(self) -> None:
        """Until the source has ended (then the sink is told so), or one of both fails."""
        sending = asyncio.get_running_loop().create_task(self._send())
        try:
            await self._receive()
            await sending
        finally:
            sending.cancel()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await sending

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"."
        while data:
            data = await loop.sock_recv(self.source, _CHUNK)
            self._under_way.append((loop.time() + self.connection.proxy.delay, data))
            self._bytes += len(data)
            self._moved.set()
            while self._bytes > _WINDOW:
                self._moved.clear()
                await self._moved.wait()

    async def _send(self) -> None:
        loop, proxy = asyncio.get_running_loop(), self.connection.proxy
        while True:
            while not self._under_way:
                self._moved.clear()
                await self._moved.wait()
            due, data = self._under_way.popleft()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            self._bytes -= len(data)
            self._moved.set()
            if self.connection.swallowing:
                continue  # the end of the stream is swallowed as well
            if not data:
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(self.sink, data)
            if self.up:
                proxy.up += len(data)
            else:
                proxy.down += len(data)
            if proxy.rate:
                await asyncio.sleep(len(data) / proxy.rate)


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def _neighbours(host: str, count: int) -> list[socket.socket]:
    """Listening sockets on free ports in a row."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(64):
        made = [socket.create_server((host, 0), family=family)]
        try:
            first = made[0].getsockname()[1]
            made += [socket.create_server((host, first + number), family=family) for number in range(1, count)]
        except (OSError, OverflowError):
            for sock in made:
                sock.close()
            continue
        for sock in made:
            sock.setblocking(False)
        return made
    raise OSError(f"no {count} free ports in a row")
