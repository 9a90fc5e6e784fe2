"""A stream socket that receives into its owner's buffers and sends without copies.

asyncio's transports copy what the kernel does not take at once, and hand out received bytes in their own
time. A request of 4 KiB is worth fewer than ten microseconds, so the data path owns its socket:

    kernel ── recv_into ─► receiver.get_buffer() ─► receiver.received(n)      a few times per turn of the loop
    owner ── send([b, b, b]) ── sendmsg ─► kernel                              at once, in the caller's frame
                      └─ what the kernel did not take: queued by reference, sent when there is room

Buffers given to `send` belong to the channel until they are sent: nobody may change them. How many bytes wait
is in `unsent`; the owner decides from it when to `pause` reading, and `on_room` tells when some were sent.

The end comes in one of three ways, and in each ``receiver.lost`` is called exactly once:

    the peer ends or resets the connection      lost(None) or lost(error), from the loop
    close(): after all that is queued was sent  lost(None), from the loop
    abort(): at once, queue dropped, RST        lost(ConnectionAbortedError), before abort() returns

After `lost` nothing is received and all that is sent is dropped without an error. `send` itself never raises
and never calls `lost`: the caller may be in the middle of a batch.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import ClassVar, Final, Protocol
from weakref import WeakKeyDictionary

from blockstep.aio import Buffer

#: How many pieces one sendmsg takes (IOV_MAX of Linux and the BSDs).
IOV_MAX: Final = 1024
#: How often a channel receives before others have their turn. A peer that was just answered has often sent more
#: by then, and a turn of the loop costs ten times a receive that finds nothing (4k, depth 1: 66 k IOPS to 77 k).
_RECEIVES: Final = 4
#: Batches of up to this many bytes are joined.
_JOIN: Final = 2048
#: Under TLS small pieces are joined up to this many bytes: each call makes a record of its own.
_TLS_JOIN: Final = 64 << 10
_CLOSE_WITH_RESET: Final = struct.pack("ii", 1, 0)


class _Batch:
    """What all channels of a loop share: whether one of them is handing over what it received."""

    __slots__ = ("active", "at_end")

    #: By loop; a loop that is gone takes its entry along.
    of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _Batch]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.active = False
        self.at_end: list[Callable[[], None]] = []


class Receiver(Protocol):
    """The owner of a channel."""

    def get_buffer(self) -> memoryview:
        """Where the next bytes go. Not empty."""

    def received(self, count: int) -> None:
        """``count`` bytes, at least one, are in the buffer that was handed out last."""

    def lost(self, error: OSError | None) -> None:
        """The connection is gone. None: an orderly end of the stream, or `Channel.close`."""


def errno_of(error: OSError) -> int:
    """The errno of what ended a channel. The numbers of TLS's errors are no errnos."""
    if isinstance(error, ssl.SSLError):
        return errno.ECONNRESET if isinstance(error, ssl.SSLEOFError) else errno.EPROTO
    return error.errno or errno.EIO


class Channel:
    """A connected stream socket (TCP or unix), plain or TLS, driven by the running event loop."""

    __slots__ = ("_batch", "_closed", "_closing", "_is_reading", "_is_writing", "_loop", "_lost", "_queue",
                 "_receiver", "_sock", "_starting_tls", "_tls", "on_room", "unsent")

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        """Take over the connected ``sock`` and start reading."""
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sock = sock
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._batch = _Batch.of.setdefault(self._loop, _Batch())
        self._queue: deque[Buffer] = deque()
        self._tls: ssl.SSLSocket | None = None
        self._starting_tls = False
        self._is_reading = False
        self._is_writing = False
        self._closing = False
        self._lost = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        #: Bytes that wait for room in the kernel's buffer.
        self.unsent = 0
        #: Called from the loop each time after some of them were sent.
        self.on_room: Callable[[], None] | None = None
        self.resume()

    def set_receiver(self, receiver: Receiver) -> None:
        """Change the owner: what is received from now on, and `lost`, is told to ``receiver``."""
        self._receiver = receiver

    # Receiving.

    def pause(self) -> None:
        """Stop reading. Nothing is received after this until `resume`."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._sock)

    def resume(self) -> None:
        """Go on reading."""
        if not self._is_reading and not self._lost and not self._closing:
            self._is_reading = True
            self._loop.add_reader(self._sock, self._readable)
            if self._tls is not None and self._tls.pending():
                self._loop.call_soon(self._readable)

    @property
    def is_paused(self) -> bool:
        """Whether reading is off."""
        return not self._is_reading

    def _readable(self) -> None:
        if self._tls is not None:
            self._readable_tls(self._tls)
            return
        receiver, recv_into, batch = self._receiver, self._sock.recv_into, self._batch
        left = _RECEIVES
        while left:
            try:
                count = recv_into(receiver.get_buffer())
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._end(error)
                return
            if not count:
                self._end(None)
                return
            left -= 1
            batch.active = True
            try:
                receiver.received(count)
            finally:
                batch.active = False
                if batch.at_end:
                    self._end_batch()
            if not self._is_reading:
                return

    def after_batch(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when what some channel of this loop has just received was dealt with, or else soon.

        So what is sent because of it leaves in one piece, and without another turn of the loop.
        """
        if self._batch.active:
            self._batch.at_end.append(callback)
        else:
            self._loop.call_soon(callback)

    def _end_batch(self) -> None:
        callbacks, self._batch.at_end = self._batch.at_end, []
        for callback in callbacks:
            callback()

    def _readable_tls(self, tls: ssl.SSLSocket) -> None:
        while self._is_reading:
            try:
                count = tls.recv_into(self._receiver.get_buffer())
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                self._end(error)
                return
            if not count:
                self._end(None)
                return
            self._receiver.received(count)
            # Decrypted bytes wait in the library where no poll sees them.
            if not tls.pending():
                return

    # Sending.

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send ``buffers`` in order, after all earlier ones; what does not fit now is queued by reference."""
        if self._lost or self._closing:
            return
        if self._queue or self._tls is not None or self._starting_tls or len(buffers) > IOV_MAX:
            self._enqueue(buffers)
            if not self._is_writing and not self._starting_tls:
                self._drain()
            return
        total = sum(map(len, buffers))
        try:
            # Joining a few hundred bytes is cheaper than describing the pieces to the kernel (1.1 us to 1.8 for 16).
            sent = self._sock.send(b"".join(buffers)) if total <= _JOIN else self._sock.sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._fail_later(error)
            return
        if sent != total:
            self._enqueue(buffers)
            self._drop(sent)
            self._want_room()

    def _enqueue(self, buffers: Sequence[Buffer]) -> None:
        self._queue.extend(filter(len, buffers))
        self.unsent += sum(map(len, buffers))

    def _drop(self, count: int) -> None:
        """Forget the first ``count`` queued bytes: they are sent."""
        queue = self._queue
        self.unsent -= count
        while count:
            head = queue[0]
            if count < len(head):
                queue[0] = memoryview(head)[count:]
                return
            count -= len(head)
            queue.popleft()

    def _want_room(self) -> None:
        if not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        before = self.unsent
        self._drain()
        if self.unsent < before and self.on_room is not None and not self._lost:
            self.on_room()

    def _drain(self) -> None:
        try:
            while self._queue:
                self._drop(self._send_tls(self._tls) if self._tls is not None
                           else self._sock.sendmsg(list(islice(self._queue, IOV_MAX))))
        except (BlockingIOError, InterruptedError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._want_room()
            return
        except OSError as error:
            self._fail_later(error)
            return
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._sock)
        if self._closing:
            self._loop.call_soon(self._end, None)

    def _send_tls(self, tls: ssl.SSLSocket) -> int:
        """Send the head of the queue. After a want-write the library must see the same bytes again."""
        queue = self._queue
        head = queue[0]
        if not self._is_writing and len(queue) > 1 and len(head) < _TLS_JOIN:
            pieces: list[Buffer] = []
            size = 0
            while queue and size + len(queue[0]) <= _TLS_JOIN:
                size += len(queue[0])
                pieces.append(queue.popleft())
            head = b"".join(pieces) if pieces else queue.popleft()
            queue.appendleft(head)
        return tls.send(head)

    # TLS.

    async def start_tls(self, context: ssl.SSLContext, server_side: bool,
                        server_hostname: str | None = None) -> None:
        """Send what is queued, then go over to TLS and resume reading.

        The caller paused reading before, in the frame in which it saw the last plain byte, so that nothing
        of the TLS handshake is taken for plain data. Raises OSError (ssl.SSLError among it) if the handshake
        fails; the channel has been aborted then. Cancellation aborts it too.
        """
        assert not self._is_reading, "pause before start_tls"
        try:
            self._starting_tls = True
            while self._queue:
                await self._wait(self._loop.add_writer, self._loop.remove_writer)
                self._drain()
            self._raise_if_lost()
            if self._is_writing:
                self._is_writing = False
                self._loop.remove_writer(self._sock)
            self._sock.getpeername()  # of a peer that is gone wrap_socket would keep the socket, open or closed
            tls = context.wrap_socket(self._sock, server_side=server_side, server_hostname=server_hostname,
                                      do_handshake_on_connect=False)
            self._sock = tls
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self._wait(self._loop.add_reader, self._loop.remove_reader)
                except ssl.SSLWantWriteError:
                    await self._wait(self._loop.add_writer, self._loop.remove_writer)
                self._raise_if_lost()
            self._tls = tls
        except BaseException as error:
            self._starting_tls = False
            self.abort(error if isinstance(error, OSError) else None)
            raise
        self._starting_tls = False
        if self._queue:
            self._drain()
        self.resume()

    async def _wait(self, add: Callable[..., None], remove: Callable[[socket.socket], bool]) -> None:
        """Wait until the socket is ready one way, or lost."""
        ready = self._loop.create_future()
        sock = self._sock

        def wake(_: object = None) -> None:
            if not ready.done():
                ready.set_result(None)

        add(sock, wake)
        self._closed.add_done_callback(wake)
        try:
            await ready
        finally:
            self._closed.remove_done_callback(wake)
            if sock.fileno() >= 0:
                remove(sock)

    def _raise_if_lost(self) -> None:
        if self._lost:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the connection was closed")

    # The end.

    def close(self) -> None:
        """Stop reading, send what is queued, then close. `lost(None)` follows from the loop."""
        if self._lost or self._closing:
            return
        self.pause()
        self._closing = True
        if not self._queue:
            self._loop.call_soon(self._end, None)

    def abort(self, error: OSError | None = None) -> None:
        """Close at once, with a reset. What is queued is dropped; `lost` has been called at return, with ``error``."""
        if not self._lost:
            if self._sock.family in (socket.AF_INET, socket.AF_INET6):
                try:
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
                except OSError:
                    pass
            self._end(error or ConnectionAbortedError(errno.ECONNABORTED, "the connection was cut off"))

    async def wait_closed(self) -> None:
        """Wait until the socket is closed and `lost` was called."""
        await asyncio.shield(self._closed)

    def _fail_later(self, error: OSError) -> None:
        self._queue.clear()
        self.unsent = 0
        self._loop.call_soon(self._end, error)

    def _end(self, error: OSError | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._is_reading = self._is_writing = False
        if self._sock.fileno() >= 0:  # else wrap_socket has failed, and it is in other hands
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
        self._queue.clear()
        self.unsent = 0
        if error is None:
            self._say_goodbye()
        self._sock.close()
        try:
            self._receiver.lost(error)
        finally:
            if not self._closed.done():
                self._closed.set_result(None)

    def _say_goodbye(self) -> None:
        """TLS's close notice, then the end of the stream; the peer may be gone already."""
        try:
            if self._tls is not None:
                self._tls.unwrap()
        except (OSError, ValueError):
            pass
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
