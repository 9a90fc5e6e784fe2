"""A peer that does what the test says, and a clock that the test moves: for tests of the client."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import socket
import struct
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from blockstep.aio.channel import Channel
from blockstep.nbd import constants as c
from blockstep.nbd.client import Client
from blockstep.nbd.client_handshake import ExportInfo

ALL_FLAGS = (c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES
             | c.FLAG_CAN_MULTI_CONN | c.FLAG_SEND_CACHE | c.FLAG_SEND_FAST_ZERO)


class FakeClock:
    """Time stands still until `advance`."""

    class _Timer:
        def __init__(self, callback: Callable[..., object]) -> None:
            self.callback: Callable[..., object] | None = callback

        def cancel(self) -> None:
            self.callback = None

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, FakeClock._Timer]] = []
        self._count = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any) -> FakeClock._Timer:
        timer = self._Timer(partial(callback, *args))
        heapq.heappush(self._timers, (self.now + delay, next(self._count), timer))
        return timer

    @property
    def next_call(self) -> float | None:
        """When the next timer runs out."""
        return min((when for when, _, timer in self._timers if timer.callback), default=None)

    def advance(self, seconds: float) -> None:
        """Let time pass; what falls due is called now."""
        until = self.now + seconds
        while self._timers and self._timers[0][0] <= until:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.callback:
                timer.callback()
        self.now = until


class Peer:
    """The server's end of a connection in the transmission phase (compact headers)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.receives = 0
        self._received = b""

    async def request(self) -> tuple[int, int, int, int, int, bytes]:
        """The next request: command, flags, cookie, offset, length, data."""
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", await self._take(28))
        assert magic == c.REQUEST_MAGIC
        data = await self._take(length) if command == c.CMD_WRITE else b""
        return command, flags, cookie, offset, length, data

    async def _take(self, count: int) -> bytes:
        while len(self._received) < count:
            more = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)
            assert more, "the client has gone"
            self.receives += 1
            self._received += more
        data, self._received = self._received[:count], self._received[count:]
        return data

    async def ended(self) -> bool:
        """Wait for the end of the stream. False if something else came first."""
        try:
            return not self._received and not await asyncio.get_running_loop().sock_recv(self.sock, 1)
        except ConnectionResetError:
            return True

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def acknowledge(self, cookie: int, error: int = 0, data: bytes = b"") -> None:
        """A simple reply."""
        self.send(struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, error, cookie) + data)

    async def serve(self, disk: bytearray, minimum_block: int = 1) -> list[tuple[int, int, int, int]]:
        """Serve ``disk`` until DISC; returns (command, flags, offset, length) of all requests."""
        requests = []
        while True:
            command, flags, cookie, offset, length, data = await self.request()
            requests.append((command, flags, offset, length))
            if command == c.CMD_DISC:
                self.sock.close()
                return requests
            assert offset % minimum_block == length % minimum_block == 0, "misaligned"
            if command == c.CMD_WRITE:
                disk[offset:offset + length] = data
            if command == c.CMD_WRITE_ZEROES:
                disk[offset:offset + length] = bytes(length)
            self.acknowledge(cookie, 0, bytes(disk[offset:offset + length]) if command == c.CMD_READ else b"")


def pair(flags: int = ALL_FLAGS, size: int = 1 << 20, minimum_block: int = 1, maximum_payload: int = 1 << 25,
         structured: bool = False, contexts: dict[str, int] | None = None, **options: Any) -> tuple[Client, Peer]:
    """A client in the transmission phase, and its peer."""
    ours, theirs = socket.socketpair()
    info = ExportInfo("disk", size, flags, minimum_block=minimum_block, maximum_payload=maximum_payload,
                      structured=structured, contexts=contexts or {})
    channel = Channel(ours, _Nobody())
    channel.pause()
    made = Client(channel, info, **options), Peer(theirs)
    _made.append(made)
    return made


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test, and close what `pair` made in it."""
    async def whole() -> None:
        try:
            await test()
        finally:
            for client, peer in _made:
                client.yank()
                peer.sock.close()
            _made.clear()
    asyncio.run(whole())


async def turns(count: int = 3) -> None:
    """Let the event loop turn."""
    for _ in range(count):
        await asyncio.sleep(0)


_made: list[tuple[Client, Peer]] = []


class _Nobody:
    def get_buffer(self) -> memoryview:
        return memoryview(bytearray(1))

    def received(self, count: int) -> None:
        raise AssertionError

    def lost(self, error: OSError | None) -> None:
        raise AssertionError
