"""What server tests serve, and the client that speaks to the server in bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from blockstep.aio.inline import Completion
from blockstep.block.driver import Extent
from blockstep.nbd import constants as c
from blockstep.nbd.export import Export
from blockstep.nbd.server import ClientEvent, Server
from blockstep.nbd.wire import CHUNK, EXTENDED_CHUNK, SIMPLE_REPLY, encode_request

TIMEOUT = 10.0
#: The type of a simple reply among those of chunks.
SIMPLE = -1


class Storage:
    """Bytes in memory. ``hold`` makes requests wait until `release`; ``fail`` makes them fail."""

    def __init__(self, length: int = 1 << 20, read_only: bool = False) -> None:
        self.length = length
        self.read_only = read_only
        self.data = bytearray(length)
        self.hold = False
        self.fail: BaseException | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.waiting: list[Completion[None]] = []
        self.extents: list[Extent] | None = None

    async def _gate(self, *call: Any) -> None:
        self.calls.append(call)
        if self.hold:
            gate: Completion[None] = Completion()
            self.waiting.append(gate)
            await gate
        if self.fail is not None:
            raise self.fail

    def release(self) -> None:
        self.hold = False
        waiting, self.waiting = self.waiting, []
        for gate in waiting:
            gate.set_result(None)

    async def pread(self, offset: int, length: int) -> bytes:
        await self._gate("pread", offset, length)
        return bytes(self.data[offset:offset + length])

    async def pwrite(self, offset: int, data: Any, flags: int = 0) -> None:
        await self._gate("pwrite", offset, len(data), flags)
        self.data[offset:offset + len(data)] = data

    def begin_read(self, offset: int, length: int) -> Coroutine[Any, Any, bytes]:
        return self.pread(offset, length)

    def begin_write(self, offset: int, data: Any) -> Coroutine[Any, Any, None]:
        return self.pwrite(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._gate("write_zeroes", offset, length, flags)
        self.data[offset:offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        await self._gate("discard", offset, length)

    async def flush(self) -> None:
        await self._gate("flush")

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._gate("block_status", offset, length)
        if self.extents is None:
            return [Extent(length)]
        result, position = [], 0
        for extent in self.extents:
            start, end = max(position, offset), min(position + extent.length, offset + length)
            if start < end:
                result.append(extent._replace(length=end - start))
            position += extent.length
        return result


class Client:
    """The other end: sends bytes, and waits for as many as it expects."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.extended = False
        self.received = b""

    async def send(self, *data: bytes) -> None:
        await asyncio.wait_for(self.loop.sock_sendall(self.sock, b"".join(data)), TIMEOUT)

    async def read(self, count: int) -> bytes:
        while len(self.received) < count:
            piece = await asyncio.wait_for(self.loop.sock_recv(self.sock, 1 << 20), TIMEOUT)
            if not piece:
                raise EOFError(f"end after {self.received!r}")
            self.received += piece
        data, self.received = self.received[:count], self.received[count:]
        return data

    async def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        data, self.received = self.received, b""
        try:
            while piece := await asyncio.wait_for(self.loop.sock_recv(self.sock, 1 << 20), TIMEOUT):
                data += piece
        except ConnectionError:
            pass
        return data

    async def greet(self, flags: int = 3) -> None:
        assert await self.read(18) == struct.pack(">QQH", c.INIT_MAGIC, c.OPTION_MAGIC, 3)
        await self.send(struct.pack(">I", flags))

    async def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; its replies as (type, data), the final one last."""
        await self.send(option_bytes(option, data))
        replies = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", await self.read(20))
            assert (magic, echoed) == (c.OPTION_REPLY_MAGIC, option)
            replies.append((kind, await self.read(length)))
            if kind == c.REP_ACK or kind & c.REP_FLAG_ERROR:
                return replies

    async def go(self, name: str = "", *, structured: bool = True, extended: bool = False,
                 contexts: list[str] | None = None) -> list[tuple[int, bytes]]:
        await self.greet()
        if structured:
            assert (await self.option(c.OPT_STRUCTURED_REPLY))[-1][0] == c.REP_ACK
        if extended:
            assert (await self.option(c.OPT_EXTENDED_HEADERS))[-1][0] == c.REP_ACK
        self.extended = extended
        if contexts is not None:
            assert (await self.option(c.OPT_SET_META_CONTEXT, queries(name, *contexts)))[-1][0] == c.REP_ACK
        return await self.option(c.OPT_GO, info(name))

    def request(self, type: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 1,
                payload: bytes = b"") -> bytes:
        if self.extended and payload:
            flags |= c.CMD_FLAG_PAYLOAD_LEN
        return encode_request(type, flags, cookie, offset, length or len(payload), self.extended) + payload

    async def ask(self, type: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 1,
                  payload: bytes = b"", reads: dict[int, int] | None = None) -> list[tuple[int, int, bytes]]:
        """Send one request; (chunk type, error, payload) of its replies."""
        await self.send(self.request(type, offset, length, flags, cookie, payload))
        return [(kind, error, data) for kind, _, _, error, data in await self.replies(1, reads)]

    async def replies(self, count: int, reads: dict[int, int] | None = None) -> list[tuple[int, int, int, int, bytes]]:
        """Replies and chunks until ``count`` requests are done: (type, flags, cookie, error, payload)."""
        result: list[tuple[int, int, int, int, bytes]] = []
        while count:
            result.append(await self._reply(reads or {}))
            count -= result[-1][1] & c.REPLY_FLAG_DONE
        return result

    async def _reply(self, reads: dict[int, int]) -> tuple[int, int, int, int, bytes]:
        """One reply; a simple one has the type SIMPLE, and ``reads`` says how much data a good one of a read has."""
        head = await self.read(SIMPLE_REPLY.size)
        magic, code, cookie = SIMPLE_REPLY.unpack(head)
        if magic == c.SIMPLE_REPLY_MAGIC:
            return SIMPLE, c.REPLY_FLAG_DONE, cookie, code, b"" if code else await self.read(reads.get(cookie, 0))
        assert magic == (c.EXTENDED_REPLY_MAGIC if self.extended else c.STRUCTURED_REPLY_MAGIC)
        form = EXTENDED_CHUNK if self.extended else CHUNK
        _, flags, kind, cookie, *_, length = form.unpack(head + await self.read(form.size - len(head)))
        return kind, flags, cookie, 0, await self.read(length)


@asynccontextmanager
async def served(storage: Storage | None = None, *, name: str = "", export: Export | None = None,
                 events: list[ClientEvent] | None = None, **options: Any) -> AsyncIterator[tuple[Server, Client]]:
    """A server of one export, and a client that is connected to it."""
    server = Server(on_client=events.append if events is not None else None, **options)
    server.add(export or Export(name, storage or Storage()))
    with connected(server) as client:
        yield server, client
        await server.stop(0.1)


@contextmanager
def connected(server: Server) -> Iterator[Client]:
    """One client more."""
    ours, theirs = socket.socketpair()
    server.serve(theirs)
    with ours:
        yield Client(ours)


def option_bytes(option: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", c.OPTION_MAGIC, option, len(data)) + data


def info(name: str, *requests: int) -> bytes:
    text = name.encode()
    return struct.pack(f">I{len(text)}sH{len(requests)}H", len(text), text, len(requests), *requests)


def queries(name: str, *texts: str) -> bytes:
    parts = [struct.pack(">I", len(name.encode())) + name.encode() + struct.pack(">I", len(texts))]
    return b"".join(parts + [struct.pack(">I", len(text.encode())) + text.encode() for text in texts])
