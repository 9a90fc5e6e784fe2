"""One connection to an export: requests go out pipelined, answers come back in any order.

                      requests of one turn of the loop, or of one batch of replies
    pread, pwrite ──► cork: [header, data, header, data, ...] ── one sendmsg ──► server
      ▲                                                                             │
      └── completed in the reader's frame ◄── ReplyTable ◄── one recv ◄─────────────┘

System calls are the cost of small requests, so they are shared: requests that are issued while a batch of anything
that was received is worked off leave together at its end, others at the end of the loop's turn, and at the latest
when `CORK` bytes have gathered; the first ones sooner, if the server has nothing to do meanwhile (`EARLY`). A
request costs an entry in the table of replies; there is no task and no timer per request.

**Deadline.** With ``timeout`` no request stays unanswered longer than that, give or take an eighth: one timer per
connection looks at the oldest one eight times per ``timeout``. When it is too old the connection is cut: a server
that has stopped answering one request will not come back for the others.

**The end.** However the connection ends, every request that is outstanding fails with ConnectionLost, each with an
instance of its own, and `on_lost` is told once. What a failed write has done to the disk is unknown.

    close()            waits for the outstanding requests, then says good-bye (DISC)
    yank()             at once, outstanding requests have failed when it returns
    the deadline       as yank; ETIMEDOUT
    protocol broken    as yank; EPROTO, the ProtocolError is the cause of the error that `on_lost` gets
    ESHUTDOWN          the server asks to leave: as close, and new requests are refused at once

Requests of any alignment and length are taken; `blockstep.nbd.shape` cuts or widens those that the server could
not take as they are. ``offset`` and ``length`` are bytes, and lie inside the export: the server checks that.

Source: proto.md, "Transmission", "Size constraints".
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final

from blockstep.aio import Buffer
from blockstep.aio.channel import Channel, errno_of
from blockstep.aio.clock import Clock, Timer
from blockstep.aio.inline import Completion, start
from blockstep.aio.rangelock import RangeLock
from blockstep.errors import ConnectionLost, ProtocolError
from blockstep.nbd import constants as c
from blockstep.nbd import shape
from blockstep.nbd.client_handshake import ExportInfo, open_export
from blockstep.nbd.dial import ClientTls, dial, tls_mode
from blockstep.nbd.reply_table import LONG, Acknowledged, Pending, Read, ReplyTable, Status
from blockstep.nbd.uri import Address
from blockstep.nbd.wire import EXTENDED_REQUEST, REQUEST

#: Bytes that gather in the cork before they are sent without waiting for more.
CORK: Final = 256 << 10
#: The same while the server has nothing to do: it works on the first requests of a batch while we issue the others.
EARLY: Final = 12 << 10
#: How often per ``timeout`` the oldest request is looked at.
LOOKS: Final = 8
#: Seconds that `Client.close` waits for a server that does not answer any more.
CLOSE_TIMEOUT: Final = 5.0


class Client:
    """A connection in the transmission phase. Made by `connect`."""

    def __init__(self, channel: Channel, info: ExportInfo, *, timeout: float | None = None,
                 on_lost: Callable[[ConnectionLost], object] | None = None, clock: Clock | None = None) -> None:
        """Take over a channel whose handshake is done, paused as `dial` returns it."""
        #: What the server said about the export; `ExportInfo.size` is its length in bytes.
        self.info = info
        #: Why the connection is gone; None while it is there.
        self.lost_because: ConnectionLost | None = None
        #: Called once with the error when the connection is gone, after all requests have failed.
        self.on_lost = on_lost
        #: Held while a misaligned write reads, modifies and writes: see `blockstep.nbd.shape`.
        self.blocks = RangeLock()
        self._channel = channel
        self._table = ReplyTable(info.structured, info.extended)
        self._pending = self._table.pending
        self._contexts = frozenset(info.contexts.values())
        self._clock: Clock = clock or asyncio.get_running_loop()
        self._after_batch = channel.after_batch
        self._timeout = timeout
        self._timer: Timer | None = None
        self._looks: deque[tuple[float, int]] = deque()
        self._cookie = 0
        self._cork: list[Buffer] = []
        self._corked = 0
        self._cork_limit = EARLY
        self._in_batch = False
        self._refusing: ConnectionLost | None = None
        self._reason: ConnectionLost | None = None
        self._saying_goodbye = False
        header: Struct = EXTENDED_REQUEST if info.extended else REQUEST
        self._pack = header.pack
        self._magic = c.EXTENDED_REQUEST_MAGIC if info.extended else c.REQUEST_MAGIC
        self._write_flags = c.CMD_FLAG_PAYLOAD_LEN if info.extended else 0
        # What a read or write must be to go out as it is: no longer than this, and with no other flags.
        self._longest = info.maximum_payload if info.minimum_block == 1 else 0
        self._plain_flags = c.CMD_FLAG_FUA if info.flags & c.FLAG_SEND_FUA else 0
        self.get_buffer = self._table.get_buffer
        channel.set_receiver(self)
        channel.resume()

    @classmethod
    async def connect(cls, address: Address | socket.socket, export: str = "", *, tls: ClientTls | None = None,
                      contexts: Iterable[str] = (c.BASE_ALLOCATION,), handshake_timeout: float = 10.0,
                      timeout: float | None = None, structured: bool = True,
                      extended: bool = True, on_lost: Callable[[ConnectionLost], object] | None = None,
                      clock: Clock | None = None) -> Client:
        """Connect to ``export`` at ``address``, or over a socket that is connected.

        ``handshake_timeout`` bounds all of it, ``timeout`` each request later (None: for ever), both in seconds.
        ``contexts`` are the metadata contexts to ask for; those that the server has are in ``info.contexts``.
        ``structured`` and ``extended`` False keep to older forms of the protocol.

        Raises ConnectionLost or another OSError when there is no connection to be had, PeerRefused when the
        server does not give this export, ProtocolError, OptionError.
        """
        wanted = tuple(contexts)
        channel, info = await dial(
            address,
            lambda send: open_export(send, export, tls=tls_mode(tls), contexts=wanted, structured=structured,
                                     extended=extended),
            tls, handshake_timeout)
        return cls(channel, info, timeout=timeout, on_lost=on_lost, clock=clock)

    @property
    def outstanding(self) -> int:
        """How many requests wait for their answer."""
        return len(self._pending)

    @property
    def usable(self) -> bool:
        """Whether new requests are taken."""
        return self._refusing is None

    # Requests.

    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes. Raises OSError, as all requests do: the server's error, or ConnectionLost."""
        if length > self._longest:
            return await shape.read(self, offset, length)
        answer: Completion[Read] = Completion()
        self._issue(c.CMD_READ, 0, offset, length, Read(offset, length, answer.set_result))
        if length > LONG:
            self._table.long_reads += 1
        read = await answer
        if read.error is not None:
            raise read.error
        return read.data  # type: ignore[return-value]  # there without an error

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        """Write all of ``data``, which must not change until this returns. ``flags``: CMD_FLAG_FUA."""
        length = len(data)
        if length > self._longest or flags & ~self._plain_flags:
            await shape.write(self, offset, data, flags)
            return
        answer: Completion[BaseException | None] = Completion()
        self._issue(c.CMD_WRITE, self._write_flags | flags, offset, length, answer.set_result)
        self._cork.append(data)
        self._corked += length
        if self._corked > CORK:
            self._uncork()
        error = await answer
        if error is not None:
            raise error

    def submit_write(self, offset: int, data: Buffer, flags: int, done: Acknowledged) -> None:
        """`pwrite` for a caller that counts: no coroutine; ``done(error or None)`` is called from the reply batch.

        Called at once, with ConnectionLost, if the connection is gone already. Whatever ``done`` raises is taken
        for a bug and costs the connection.
        """
        length = len(data)
        if length > self._longest or flags & ~self._plain_flags or self._refusing is not None:
            def ended(_: None, error: BaseException | None) -> None:
                done(error)
            start(self.pwrite(offset, data, flags), ended)
            return
        cookie = self._cookie = self._cookie + 1
        self._pending[cookie] = done
        cork = self._cork
        if not cork and not self._in_batch:
            self._after_batch(self._uncork)
        cork.append(self._pack(self._magic, self._write_flags | flags, 1, cookie, offset, length))
        cork.append(data)
        self._corked += length
        if self._corked > self._cork_limit:
            self._uncork()
        if self._timer is None and self._timeout is not None:
            self._start_looking()

    async def flush(self) -> None:
        """Make all writes that have ended durable. A server without FLUSH has no cache: nothing to do."""
        if self.info.flags & c.FLAG_SEND_FLUSH:
            await self.request(c.CMD_FLUSH, 0, 0, 0)

    async def discard(self, offset: int, length: int) -> None:
        """Advise that a range is not needed (TRIM). ENOTSUP if the server has no TRIM."""
        self._need(c.FLAG_SEND_TRIM, "trim")
        await shape.trim(self, offset, length)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make a range read as zeroes. ``flags``: CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_FAST_ZERO.

        ENOTSUP if the server cannot, or with FAST_ZERO not fast.
        """
        self._need(c.FLAG_SEND_WRITE_ZEROES, "write zeroes")
        if flags & c.CMD_FLAG_FAST_ZERO:
            self._need(c.FLAG_SEND_FAST_ZERO, "fast zeroes")
        await shape.zero(self, offset, length, flags)

    async def cache(self, offset: int, length: int) -> None:
        """Advise that a range will be read soon. ENOTSUP if the server has no CACHE."""
        self._need(c.FLAG_SEND_CACHE, "cache")
        await shape.cache(self, offset, length)

    async def block_status(self, offset: int, length: int, context: str = c.BASE_ALLOCATION,
                           ) -> list[tuple[int, int]]:
        """Extents of a metadata context from ``offset`` on: (bytes, flags), at least one, at most ``length`` bytes.

        ENOTSUP if the context was not selected in the handshake.
        """
        if context not in self.info.contexts:
            raise OSError(errno.ENOTSUP, f"the server has no metadata context '{context}' for this export")
        return await shape.status(self, offset, length, self.info.contexts[context])

    # Requests that the server can take as they are: `shape` makes them.

    async def read_as_is(self, offset: int, length: int) -> Buffer:
        """One READ."""
        answer: Completion[Read] = Completion()
        self._issue(c.CMD_READ, 0, offset, length, Read(offset, length, answer.set_result))
        if length > LONG:
            self._table.long_reads += 1
        read = await answer
        if read.error is not None:
            raise read.error
        assert read.data is not None
        return read.data

    async def write_as_is(self, offset: int, data: Buffer, flags: int = 0) -> None:
        """One WRITE."""
        answer: Completion[BaseException | None] = Completion()
        self._issue(c.CMD_WRITE, self._write_flags | flags, offset, len(data), answer.set_result)
        self._cork.append(data)
        self._corked += len(data)
        if self._corked > CORK:
            self._uncork()
        error = await answer
        if error is not None:
            raise error

    async def request(self, command: int, flags: int, offset: int, length: int) -> None:
        """One request without data either way."""
        answer: Completion[BaseException | None] = Completion()
        self._issue(command, flags, offset, length, answer.set_result)
        error = await answer
        if error is not None:
            raise error

    async def status_as_is(self, offset: int, length: int) -> dict[int, list[tuple[int, int]]]:
        """One BLOCK_STATUS: the extents of each selected context, by its id."""
        answer: Completion[Status] = Completion()
        self._issue(c.CMD_BLOCK_STATUS, 0, offset, length, Status(offset, self._contexts, answer.set_result))
        status = await answer
        if status.error is not None:
            raise status.error
        return status.result

    def _issue(self, command: int, flags: int, offset: int, length: int, entry: Pending) -> None:
        if self._refusing is not None:
            raise _copy(self._refusing)
        cookie = self._cookie = self._cookie + 1
        self._pending[cookie] = entry
        if not self._cork and not self._in_batch:
            self._after_batch(self._uncork)
        self._cork.append(self._pack(self._magic, flags, command, cookie, offset, length))
        if self._timer is None and self._timeout is not None:
            self._start_looking()

    def _need(self, flag: int, what: str) -> None:
        if not self.info.flags & flag:
            raise OSError(errno.ENOTSUP, f"the server does not offer: {what}")

    def _uncork(self) -> None:
        cork = self._cork
        if cork:
            self._cork = []
            self._corked = 0
            self._cork_limit = CORK
            self._channel.send(cork)

    # The deadline.

    def _start_looking(self) -> None:
        assert self._timeout is not None
        self._looks.append((self._clock.time(), self._cookie))
        self._timer = self._clock.call_later(self._timeout / LOOKS, self._look)

    def _look(self) -> None:
        """Each look notes which requests there were at what time; so the age of the oldest is known."""
        assert self._timeout is not None
        self._timer = None
        if not self._pending:
            self._looks.clear()
            return
        oldest = min(self._pending)
        latest_start = self._clock.time() - self._timeout
        while self._looks and self._looks[0][0] <= latest_start:
            if oldest <= self._looks.popleft()[1]:
                self._cut(ConnectionLost(f"no answer for {self._timeout:g} s", errno.ETIMEDOUT))
                return
        self._start_looking()

    # The channel's receiver; get_buffer is the table's.

    def received(self, count: int) -> None:
        self._in_batch = True
        try:
            self._table.received(count)
        except ProtocolError as error:
            if self.lost_because is None:
                reason = ConnectionLost(f"the server broke the protocol: {error}", errno.EPROTO)
                reason.__cause__ = error
                self._cut(reason)
        except BaseException:
            self._cut(ConnectionLost("a bug in the handling of a reply", errno.EIO))
            raise
        finally:
            self._in_batch = False
        if not self._pending:
            self._cork_limit = EARLY
        if self._cork:
            self._uncork()
        if self._table.shutting_down and self._refusing is None:
            self._refusing = ConnectionLost("the server is shutting down", errno.ESHUTDOWN)
        if self._refusing is not None and not self._pending:
            self._say_goodbye()

    def lost(self, error: OSError | None) -> None:
        if self._reason is not None:
            reason = self._reason
        elif self._saying_goodbye and self._refusing is not None:
            reason = self._refusing
        elif error is None:
            reason = ConnectionLost("the server closed the connection", errno.ECONNRESET)
        else:
            reason = ConnectionLost(error.strerror or str(error), errno_of(error))
        self.lost_because = self._refusing = reason
        self._cork = []
        if self._timer is not None:
            self._timer.cancel()
        self._table.fail_all(lambda: _copy(reason))
        if self.on_lost is not None:
            self.on_lost(reason)

    # The end.

    def yank(self) -> None:
        """Cut the connection. All outstanding requests have failed with ConnectionLost when this returns."""
        self._cut(ConnectionLost("the connection was yanked"))

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Refuse new requests, wait for the outstanding ones, say good-bye, close.

        A server that has not answered all of them and taken the rest within ``timeout`` seconds is cut off.
        """
        if self.lost_because is None:
            if self._refusing is None:
                self._refusing = ConnectionLost("the connection was closed")
            if not self._pending:
                self._say_goodbye()
            timer = self._clock.call_later(timeout, self.yank)
            try:
                await self._channel.wait_closed()
            finally:
                timer.cancel()

    def _cut(self, reason: ConnectionLost) -> None:
        if self.lost_because is None:
            self._reason = self._refusing = reason
            self._channel.abort()

    def _say_goodbye(self) -> None:
        if not self._saying_goodbye and self.lost_because is None:
            self._saying_goodbye = True
            self._uncork()
            self._channel.send([self._pack(self._magic, 0, c.CMD_DISC, 0, 0, 0)])
            self._channel.close()


def _copy(error: ConnectionLost) -> ConnectionLost:
    """Whoever raises an error changes it; so each request gets its own."""
    return ConnectionLost(error.reason, error.errno or errno.ENOTCONN)
