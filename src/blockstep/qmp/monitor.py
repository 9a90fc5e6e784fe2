"""One monitor of a QMP server: requests in order, answers out, everything bounded.

       socket ──► session ──► queue (at most QUEUE) ──► worker, a task while there is work ──► transport
                     │                                                                            ▲
                     └── out of band: a task each ────────────────────────────────────────────────┤
                                                                                  events ─────────┘

Three things wait for each other, and so nothing grows: the socket is not read while the queue is full and
`READ_AHEAD` bytes have come; the worker begins nothing new while the transport holds back what the peer does
not read; and an event that finds `EVENT_BACKLOG` bytes unsent cuts the monitor off. For each request in order the
worker takes a turn (`blockstep.qmp.turns`), so that a flood of requests does not hold the event loop.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from blockstep.qmp import wire
from blockstep.qmp.errors import is_expected
from blockstep.qmp.schema import Command, EventKind
from blockstep.qmp.session import OOB, Call, Reply, Session

if TYPE_CHECKING:
    from blockstep.qmp.server import Listener

#: Requests of one monitor that wait, or run out of band. One waits where nothing behind it could overtake it.
QUEUE: Final = 8
#: Bytes of unread input above which a monitor's socket is not read.
READ_AHEAD: Final = 64 * 1024
#: Bytes of unsent output above which an event cuts a monitor off.
EVENT_BACKLOG: Final = 1 << 20
#: Bytes of unsent output above which a monitor's requests wait.
_HIGH_WATER: Final = 64 * 1024
#: Seconds that a peer on the network has to negotiate: those that say nothing must not take all places.
NEGOTIATION: Final = 10.0


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._server = listener, listener.server
        self._session = Session(listener.commands, self._server.version)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._queue: deque[Call | Reply] = deque()
        self._working = self._reading_paused = self._opened = self._finishing = self._eof = False
        self._out_of_band = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self.gone = asyncio.Event()
        self.peer = ""

    @property
    def commands(self) -> Mapping[str, Command]:
        return self._listener.commands

    @property
    def events(self) -> Mapping[str, EventKind]:
        return self._server.registry.events

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        sock = transport.get_extra_info("socket")
        peer = transport.get_extra_info("peername")
        if peer is None or self._listener.closed:  # it has gone already; it was in its TLS handshake
            self._finishing = True
            transport.abort()
            return
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            host, port = peer[:2]
            host = host.removeprefix("::ffff:")  # IPv4, on a socket for both
            self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._deadline = asyncio.get_running_loop().call_later(NEGOTIATION, self._must_have_negotiated)
        else:
            self.peer = f"unix:{self._listener.address}"
        if len(self._listener.monitors) >= self._listener.max_monitors:
            self._finishing = True
            most = self._listener.max_monitors
            transport.write(wire.encode_error("GenericError", f"this socket takes {most} monitors, and they are here"))
            transport.close()
            return
        self._listener.monitors.add(self)
        self._send(self._session.greeting)

    def _must_have_negotiated(self) -> None:
        if not self._opened:
            self.abort()

    def data_received(self, data: bytes) -> None:
        if self._finishing:
            return
        self._session.feed(data)
        self._pull()

    def eof_received(self) -> bool:
        """The peer sends no more; it still gets the answers to what it has asked, but for TLS: it has no half end."""
        self._eof = True
        return self._busy and self._transport.get_extra_info("sslcontext") is None

    def connection_lost(self, error: Exception | None) -> None:
        self._finishing = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._listener.monitors.discard(self)
        self._queue.clear()
        self._may_write.set()
        self.gone.set()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    # -- requests

    def _pull(self) -> None:
        """Take requests out of the input as far as the bounds allow, and see that somebody works on them."""
        while not self._finishing and not self._full:
            item = self._session.next()
            if item is None:
                break
            if isinstance(item, Call) and item.oob:
                self._out_of_band += 1
                self._server.spawn(self._run_out_of_band(item))
            else:
                self._queue.append(item)
                if not self._working:
                    self._working = True
                    self._server.spawn(self._work())
        self._balance()

    @property
    def _full(self) -> bool:
        ahead = QUEUE if OOB in self._session.enabled else 1
        return len(self._queue) >= ahead or self._out_of_band >= QUEUE

    def _balance(self) -> None:
        """Read the socket only while there is room for what comes."""
        full = self._session.buffered > READ_AHEAD and self._full
        if full != self._reading_paused and not self._transport.is_closing():
            self._reading_paused = full
            if full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    async def _work(self) -> None:
        """Answer what is queued, in order. Exists only while there is something."""
        try:
            while self._queue and not self._transport.is_closing():
                await self._server.turns.take()
                if not self._queue:  # the peer went away meanwhile
                    break
                item = self._queue.popleft()
                self._answer(item if isinstance(item, Reply) else Reply(await self._run(item)))
                await self._may_write.wait()
                self._pull()
        finally:
            self._working = False
            self._close_if_done()

    async def _run_out_of_band(self, call: Call) -> None:
        try:
            answer = await self._run(call)
            await self._may_write.wait()
            self._answer(Reply(answer))
        finally:
            self._out_of_band -= 1
            self._pull()
            self._close_if_done()

    async def _run(self, call: Call) -> bytes:
        try:
            return call.succeeded(await call.command.run(self._server.context, call.args, self))
        except Exception as error:
            if not is_expected(error):
                self._server.report(error, f"command '{call.command.name}' failed with an error that none may have")
            return call.failed(error)

    def _answer(self, reply: Reply) -> None:
        if not self._transport.is_closing():
            self._send(reply.data)
            self._opened = self._opened or reply.opens

    def send_event(self, line: bytes) -> None:
        """Send an event, or cut the monitor off if it has not read too many."""
        if not self._opened or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() + len(line) > EVENT_BACKLOG:
            self._server.cut_off += 1
            self._transport.abort()
        else:
            self._send(line)

    def _send(self, line: bytes) -> None:
        self._transport.write(wire.laid_out(line) if self._listener.pretty else line)

    # -- the end

    @property
    def _busy(self) -> bool:
        return self._working or self._out_of_band > 0

    def _close_if_done(self) -> None:
        if self._eof and not self._busy:
            self._transport.close()

    def finish(self) -> None:
        """Begin nothing new."""
        self._finishing = True
        self._queue.clear()

    def close(self) -> None:
        """Close when what was written has gone out."""
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if not self.gone.is_set():
            self._transport.abort()
