"""One client's connection to the server: the thin part between the channel and the backend, and the hot path.

    receive ─► handshake ─► events                              until GO
    receive ─► decode the batch ─► run each request ─► replies ─► one send

A request is begun here, in the frame of the receive. Most end there and then (the page cache had it); their replies
are collected and sent together at the end of the batch. The others are coroutines, and become strands if they have to
wait; what they answer is sent when the last request in flight has ended, or else once per turn of the loop, so that
requests which end together are answered together.

Bounds on what a client can make us hold (`Limits`): requests in flight, and bytes in flight plus bytes not yet
sent; and, for large payloads, what is left of the memory of all connections together (`buffers.Pool`). Beyond the
first two the rest of the batch waits undone in the *backlog*, and nothing more is received until there is
room again. The backlog also takes what is left of a batch when it has cost a turn, so that others have theirs; and an
expensive request when another connection has made one in this iteration of the loop (`turns`). The
handshake has a deadline; after it a client may be silent for as long as it likes.

The end: DISC and `finish` let what is in flight end, send its replies, then close. What comes after `finish` while
something is in flight is answered with ESHUTDOWN, an option with REP_ERR_SHUTDOWN. `abort` and a client that goes
away drop the replies; the requests run to their end in the backend all the same, counted in `Export.in_flight`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from itertools import chain
from types import CoroutineType
from typing import Any, Final, Literal

import msgspec

from blockstep.aio.channel import Channel
from blockstep.aio.inline import Completion, go_on
from blockstep.block.driver import Buffer
from blockstep.nbd import constants as c
from blockstep.nbd import forms
from blockstep.nbd.buffers import Arena, Pool, ReceiveBuffer
from blockstep.nbd.commands import Session, cost, nbd_error, prepare
from blockstep.nbd.export import Export, Exports
from blockstep.nbd.handshake import Close, Go, Send, ServerHandshake, StartTls, TlsMode
from blockstep.nbd.turns import Turns
from blockstep.nbd.wire import Request, decode_extended_requests, decode_requests

#: Replies of this many bytes are sent without waiting for the end of the batch.
_SEND_EARLY: Final = 1 << 20
#: After so many replies of a batch they are sent: the client goes on while the others are made.
_FIRST: Final = 8
#: Seconds that a client has to hear, in the handshake, that the server is shutting down.
_LAST_WORDS: Final = 0.1
#: What a connection's requests may cost (`commands.cost`) before others have their turn. Some 10 ms.
_TURN: Final = 16 << 20


class Limits(msgspec.Struct, frozen=True):
    """What one connection may cost."""

    requests: int = 1024  #: in flight in the backend
    memory: int = 64 << 20  #: bytes of payloads in flight and of replies not yet sent; exceeded by one request
    handshake: float = 10.0  #: seconds until the transmission phase; for taking the last replies; without memory


class _Pending:
    """A request that waits in the backend. It is the ``done`` of its strand."""

    __slots__ = ("arena", "connection", "request", "size")

    def __init__(self, connection: Connection, request: Request, arena: Arena | None, size: int) -> None:
        self.connection = connection
        self.request = request
        self.arena = arena
        self.size = size

    def __call__(self, value: Any, error: BaseException | None) -> None:
        connection, request = self.connection, self.request
        if self.arena is not None:
            self.arena.release()
        if error is not None:
            connection._fail(request, error)
        else:
            connection._answer(request, value)
        connection._ended(self.size)


class Connection:
    """A client, from its first byte to its last."""

    def __init__(self, sock: socket.socket, exports: Exports, pool: Pool, turns: Turns, limits: Limits, tls: TlsMode,
                 tls_context: ssl.SSLContext | None,
                 on_change: Callable[[Connection, Literal["ready", "gone"]], None]) -> None:
        """``on_change(connection, what)`` hears "ready" when an export is chosen and "gone" at the end."""
        self.peer = _peer_name(sock)
        #: The export that was chosen, after the handshake.
        self.export: Export | None = None
        #: Why the connection ended; None if both sides wanted it.
        self.error: BaseException | None = None
        self._turns, self._limits = turns, limits
        self._on_change = on_change
        self._tls_context = tls_context
        self._handshake: ServerHandshake[Export] | None = ServerHandshake(exports, tls)
        self._pool = pool
        self._buffer = ReceiveBuffer(pool)
        self._starving: asyncio.TimerHandle | None = None
        self._out: list[Buffer] = []
        self._form = forms.SIMPLE
        self._requests: list[Request] = []
        self._backlog: Iterator[Request] | None = None
        self._in_flight = 0
        self._bytes_in_flight = 0
        self._running = False
        self._flush_planned = False
        self._finishing = False
        self._refusing = False
        self._is_gone = False
        self._tls_task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.channel = Channel(sock, self)
        self.channel.on_room = self._go_on
        self._deadline: asyncio.TimerHandle | None = self._loop.call_later(limits.handshake, self._too_slow)
        self.channel.send([ServerHandshake.greeting()])

    # Called by the server.

    def finish(self) -> None:
        """End in good order: take no more requests, answer what was received, then close."""
        if self._handshake is not None:
            self._handshake.shutting_down = True
            if self._tls_task is not None:
                self._tls_task.cancel()
                self.channel.close()
            else:
                self._loop.call_later(_LAST_WORDS, self.channel.close)
            return
        self._finishing = self._refusing = True
        self._close_if_idle()

    def abort(self, error: BaseException | None = None) -> None:
        """Cut off at once. Nothing that was received and not started will be done."""
        self.error = self.error or error
        self.channel.abort()

    # Called by the channel.

    def get_buffer(self) -> memoryview:
        return self._buffer.target()

    def received(self, count: int) -> None:
        buffer = self._buffer
        if self._handshake is not None:
            self._negotiate(self._handshake, bytes(buffer.view[:count]))
            return
        buffer.end += count
        if count < buffer.need:
            buffer.need -= count
            return
        self._batch()

    def lost(self, error: OSError | None) -> None:
        self._is_gone = True
        self.error = self.error or error
        for timer in (self._deadline, self._starving):
            if timer is not None:
                timer.cancel()
        self._requests.clear()  # a batch that is being run ends here
        if not self._running:
            self._give_up()
        if self.export is not None:
            self.export.connections.discard(self)
        self._on_change(self, "gone")

    def _give_up(self) -> None:
        self._backlog = None
        self._out.clear()
        self._buffer.give_up()

    # The handshake.

    def _negotiate(self, handshake: ServerHandshake[Export], data: bytes) -> None:
        for event in handshake.receive(data):
            if isinstance(event, Send):
                self.channel.send([event.data])
                if handshake.shutting_down:
                    self.channel.close()
                    return
            elif isinstance(event, Go):
                self._begin(handshake, event)
            elif isinstance(event, StartTls):
                self.channel.pause()
                self._tls_task = self._loop.create_task(self._start_tls(handshake))
            elif isinstance(event, Close):
                self.error = event.error
                self.channel.close()

    async def _start_tls(self, handshake: ServerHandshake[Export]) -> None:
        assert self._tls_context is not None
        try:
            await self.channel.start_tls(self._tls_context, server_side=True)
        except OSError as error:
            self.error = error
        else:
            handshake.tls_started()
        finally:
            self._tls_task = None

    def _begin(self, handshake: ServerHandshake[Export], go: Go[Export]) -> None:
        self._handshake = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._form = forms.EXTENDED if go.extended else forms.STRUCTURED if go.structured else forms.SIMPLE
        self._decode = decode_extended_requests if go.extended else decode_requests
        self.export = go.export
        self._session = Session(go.export, self._form, go.contexts)
        go.export.connections.add(self)
        self._on_change(self, "ready")
        if handshake.rest and not self._is_gone:
            self._buffer.add(handshake.rest)
            self._batch()

    def _too_slow(self) -> None:
        what = "handshake" if self.export is None else "connection"
        self.abort(TimeoutError(f"no end of the {what} within {self._limits.handshake:g} s"))

    # The transmission phase.

    def _batch(self) -> None:
        """Decode all that is there, and run it."""
        buffer = self._buffer
        buffer.is_settled = False
        requests, buffer.start, buffer.need, error = self._decode(buffer.view, buffer.start, buffer.end)
        if error is not None:
            self.error = error
            buffer.end = buffer.start
            self._finishing = True
            self.channel.pause()
        if self._refusing:
            self._refuse(requests)
        else:
            self._requests = requests
            self._run(iter(requests))

    def _refuse(self, requests: list[Request]) -> None:
        """The server is being stopped, and something is still in flight."""
        for type, _, cookie, offset, *_ in requests:
            if type == c.CMD_DISC:
                self.channel.pause()
                break
            self._out.append(self._form.error(cookie, offset, c.ESHUTDOWN, "the server is shutting down"))
        self._flush()
        if not self._buffer.settle() or self._room() <= 0:
            self.channel.pause()
        self._close_if_idle()

    def _run(self, requests: Iterator[Request]) -> None:
        """Run requests until there are no more, or no more room; the rest goes to the backlog."""
        export = self.export
        assert export is not None
        backend, form, out = export.backend, self._form, self._out
        begin_read, begin_write, read, done = backend.begin_read, backend.begin_write, form.read, form.done
        size, plain_write = backend.length, -1 if export.read_only else 0
        self._backlog = None
        self._running = True
        room, turn = self._room(), _TURN
        first = _FIRST
        for request in requests:
            type, flags, cookie, offset, length, payload = request
            if type == 0 and not flags and offset + length <= size and 0 < length <= 33554432:
                try:
                    found = begin_read(offset, length)
                except (Exception, asyncio.CancelledError) as error:
                    self._fail(request, error)
                    continue
                if found.__class__ is not CoroutineType:
                    out.append(read(cookie, offset, length))
                    out.append(found)  # type: ignore[arg-type]
                    room -= length
                else:
                    room = self._room() if self._run_one(found, request, None, length) else room - length
            elif type == 1 and flags == plain_write and offset + length <= size and length:
                try:
                    writing = begin_write(offset, payload)  # type: ignore[arg-type]
                except (Exception, asyncio.CancelledError) as error:
                    self._fail(request, error)
                    continue
                if writing is None:
                    out.append(done(cookie, offset))
                    if len(out) == first:
                        first = 0
                        self._flush()
                elif isinstance(writing, Completion):
                    writing.watch(self._pending(request, self._buffer.arena, length))
                    room = self._room()
                elif self._run_one(writing, request, self._buffer.arena, length):
                    room = self._room()
            elif type == 2:
                self._finishing = True
                self.channel.pause()
                break
            else:
                price = cost(request)
                if price >= _TURN and not self._turns.take():
                    self._backlog = chain((request,), requests)
                    self.channel.pause()
                    self._turns.wait(self._go_on)
                    break
                self._other(request)
                turn -= price
                room = self._room() if turn > 0 else 0
            if room <= 0:
                self._flush()
                room = self._room() if turn > 0 else 0
                if room <= 0:
                    self._backlog = requests
                    self.channel.pause()
                    if turn <= 0:
                        self._plan_to_go_on()
                    break
        else:
            if not self._is_gone and not self._buffer.settle():
                self.channel.pause()
                self._starving = self._loop.call_later(self._limits.handshake, self._starved)
                self._pool.wait(self._settled)
        self._running = False
        if self._is_gone:
            self._give_up()
            return
        if out:
            self.channel.send(out)
            out.clear()
        if self._finishing:
            self._close_if_idle()

    def _settled(self) -> bool:
        """Memory has come back: whether this connection needs none of it any more."""
        if self._is_gone or self._starving is None:
            return True
        if not self._buffer.settle():
            return False
        if self._starving is not None:
            self._starving.cancel()
            self._starving = None
        self._resume()
        return True

    def _starved(self) -> None:
        self.abort(MemoryError(f"no memory for a large payload within {self._limits.handshake:g} s"))

    def _room(self) -> int:
        """How many bytes of replies may be made before looking again; none: stop."""
        limits = self._limits
        if self._in_flight >= limits.requests or self._is_gone:
            return 0
        return min(_SEND_EARLY, limits.memory - self._bytes_in_flight - self.channel.unsent)

    def _other(self, request: Request) -> None:
        """A request that is no plain read or write."""
        try:
            coroutine = prepare(self._session, request)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(request, error)
        else:
            self._run_one(coroutine, request, None if request[5] is None else self._buffer.arena, cost(request))

    def _run_one(self, coroutine: Any, request: Request, arena: Arena | None, size: int) -> bool:
        """Begin what is a coroutine. If it does not end at once it goes on as a strand; says whether that is so."""
        try:
            waits_for = coroutine.send(None)
        except StopIteration as stop:
            self._answer(request, stop.value)
            return False
        except (Exception, asyncio.CancelledError) as error:
            self._fail(request, error)
            return False
        go_on(coroutine, waits_for, self._pending(request, arena, size))
        return True

    def _pending(self, request: Request, arena: Arena | None, size: int) -> _Pending:
        """One more in flight: what is to be called at its end."""
        assert self.export is not None
        if arena is not None:
            arena.users += 1
        self._in_flight += 1
        self._bytes_in_flight += size
        self.export.in_flight += 1
        return _Pending(self, request, arena, size)

    def _answer(self, request: Request, value: Any) -> None:
        """A success: ``value`` is the data of a read, a list of whole replies, or None."""
        type, _, cookie, offset, length, _ = request
        if value.__class__ is list:
            self._out.extend(value)
        elif type == 0:
            self._out.append(self._form.read(cookie, offset, length))
            self._out.append(value)
        else:
            self._out.append(self._form.done(cookie, offset))

    def _fail(self, request: Request, error: BaseException) -> None:
        type, _, cookie, offset, _, _ = request
        if not isinstance(error, OSError):
            # A bug below us: the client sees EIO, and whoever runs the loop sees the traceback.
            self._loop.call_exception_handler({"message": f"NBD command {type} failed", "exception": error})
        elif self.export is not None:
            self.export.on_error(error)
        message = (error.strerror if isinstance(error, OSError) else None) or str(error)
        self._out.append(self._form.error(cookie, offset, nbd_error(error, request), message))

    def _ended(self, size: int) -> None:
        """A request that had waited has put its reply into ``_out``."""
        assert self.export is not None
        self._in_flight -= 1
        self._bytes_in_flight -= size
        self.export.ended()
        if self._running:
            return
        if not self._in_flight:
            self._go_on()
        else:
            self._plan_to_go_on()

    def _plan_to_go_on(self) -> None:
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Send what is ready; take up the backlog, or receive again, if there is room."""
        self._flush_planned = False
        if self._is_gone:
            self._out.clear()
            return
        self._flush()
        if self._starving is not None:  # its own arena may be free now
            self._settled()
        if self._backlog is not None:
            if not self._running and self._room() > 0:
                self._run(self._backlog)
                self._resume()
        elif self._finishing:
            self._close_if_idle()

    def _resume(self) -> None:
        if self._backlog is None and not self._finishing and self._starving is None:
            self.channel.resume()

    def _flush(self) -> None:
        if self._out:
            self.channel.send(self._out)
            self._out.clear()

    def _close_if_idle(self) -> None:
        if not self._in_flight and self._backlog is None and not self._running:
            self._flush()
            self.channel.close()
            if self._deadline is None:
                self._deadline = self._loop.call_later(self._limits.handshake, self._too_slow)


def _peer_name(sock: socket.socket) -> str:
    if sock.family == socket.AF_INET:
        host, port = sock.getpeername()[:2]
        return f"{host}:{port}"
    if sock.family == socket.AF_INET6:
        host, port = sock.getpeername()[:2]
        return f"[{host}]:{port}"
    return "unix"
