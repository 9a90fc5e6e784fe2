"""An export that stays usable while its connections come and go.

               ┌─► Client ═══╗
    requests ──┼─► Client ═══╬═► server        several, if the server offers multi-conn: least loaded first
               └─► (dialling)╝

A connection that is lost is dialled again, with a pause that doubles from `Backoff.first` to `Backoff.longest`
and is shortened by a random part, so that many clients of one server do not come back in step. What happens to
requests while there is no connection at all:

    connected ── last connection lost ──► waiting ── reconnect_delay s ──► failing
        ▲                                    │                                │
        └──────────── reconnected ───────────┴────────────────────────────────┘

    waiting    requests wait, also those that were outstanding: they are sent again
    failing    requests fail at once with ConnectionLost; dialling goes on

A request that is sent again and lost again, and again, fails when ``reconnect_delay`` has passed since the first
loss. With ``reconnect_delay`` 0 there is no waiting and no repetition: the caller decides.

The server may still be at work on what was outstanding: it has no way to take a write back that its storage has. Such
a write can take effect after the one that was sent again has been answered, and so undo a later write to the same
place. Where the connection was cut because no answer came in time (ETIMEDOUT), slow storage is what is to be expected:
writes, zeroes and discards that were outstanding on it fail, and their callers know that the ranges are uncertain.
After any other loss they are sent again, for such a server has ended, or ends its requests sooner than it is dialled.
Who cannot rely on that sets ``reconnect_delay`` to 0.

Durability: a flush covers the writes that this process knows to have ended, on all connections, as multi-conn
demands of the server. A server that lost its cache while it was away (its machine crashed, not only the
connection) has lost writes that had ended and were not flushed; no NBD client can see that. Who must know, counts
`Session.losses` between a write and its flush.

The size, the flags and the contexts are those of the latest handshake: see `Session.info`.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import math
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from blockstep.aio import Buffer
from blockstep.aio.clock import Clock, Timer
from blockstep.aio.inline import Completion
from blockstep.aio.rangelock import RangeLock
from blockstep.errors import BlockstepError, ConnectionLost
from blockstep.nbd import constants as c
from blockstep.nbd.client import CLOSE_TIMEOUT, Client
from blockstep.nbd.client_handshake import ExportInfo
from blockstep.nbd.reply_table import Acknowledged

T = TypeVar("T")
State: TypeAlias = Literal["connected", "lost"]


class Backoff(msgspec.Struct, frozen=True):
    """The pauses between attempts to connect, in seconds."""

    first: float = 0.1
    longest: float = 16.0
    #: The part of a pause that is random, 0 to 1.
    jitter: float = 0.5

    def pause(self, attempt: int, chance: float) -> float:
        """After ``attempt`` failures in a row (0: the first dial after a loss); ``chance`` in [0, 1)."""
        whole: float = min(self.first * 2.0 ** min(attempt, 60), self.longest)
        return whole * (1 - self.jitter * chance)


class Session:
    """A client of one export, over ``connections`` connections; has the requests of `Client`."""

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, Client]], *, connections: int = 1,
                 reconnect_delay: float = 0.0, backoff: Backoff | None = None,
                 on_state: Callable[[State, Exception | None], object] | None = None,
                 clock: Clock | None = None, chance: Callable[[], float] = random.random) -> None:
        """``connect`` makes one connection: ``lambda: Client.connect(address, "disk")``.

        ``on_state`` hears of the first connection that comes ("connected", None) and of the last one that goes
        ("lost", why), not of those between. ``clock`` and ``chance`` are for tests. Nothing is dialled yet.
        """
        #: How often the last connection was lost.
        self.losses = 0
        self._connect = connect
        self._wanted = connections
        self._reconnect_delay = reconnect_delay
        self._backoff = backoff or Backoff()
        self._on_state = on_state
        self._clock: Clock = clock or asyncio.get_running_loop()
        self._chance = chance
        self._clients: list[Client] = []
        self._info: ExportInfo | None = None
        self._blocks = RangeLock()
        self._dialler: asyncio.Task[None] | None = None
        self._waiting: list[Completion[None]] = []
        self._grace: Timer | None = None
        self._why_lost: ConnectionLost | None = None
        self._ended: ConnectionLost | None = None

    @property
    def info(self) -> ExportInfo:
        """What the server said in the latest handshake. Only after `open`."""
        assert self._info is not None
        return self._info

    @property
    def connected(self) -> int:
        """How many connections there are now."""
        return len(self._clients)

    async def open(self, timeout: float = 0.0) -> None:
        """Connect. For ``timeout`` seconds every failure is followed by another attempt; 0: there is only one.

        Raises what ``connect`` raised last, or ConnectionLost at once when it is yanked. Further connections that the
        server allows follow in the background.
        """
        self._dialler = dialler = asyncio.get_running_loop().create_task(self._dial(self._clock.time() + timeout))
        try:
            await dialler
        except asyncio.CancelledError:
            if self._ended is None:
                raise
            raise self._no_connection() from None
        finally:
            if self._dialler is dialler:
                self._dialler = None

    # Requests: those of `Client`.

    async def pread(self, offset: int, length: int) -> Buffer:
        """`Client.pread`."""
        if not self._reconnect_delay and len(self._clients) == 1:
            return await self._clients[0].pread(offset, length)
        return await self._repeat(lambda client: client.pread(offset, length))

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        """`Client.pwrite`."""
        if not self._reconnect_delay and len(self._clients) == 1:
            await self._clients[0].pwrite(offset, data, flags)
        else:
            await self._repeat(lambda client: client.pwrite(offset, data, flags), changes=True)

    def submit_write(self, offset: int, data: Buffer, flags: int, done: Acknowledged) -> None:
        """`Client.submit_write`: never waits for a connection, and nothing is sent again."""
        client = self._pick()
        if client is None:
            done(self._no_connection())
        else:
            client.submit_write(offset, data, flags, done)

    async def flush(self) -> None:
        """`Client.flush`, of all connections."""
        await self._repeat(lambda client: client.flush())

    async def discard(self, offset: int, length: int) -> None:
        """`Client.discard`."""
        await self._repeat(lambda client: client.discard(offset, length), changes=True)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """`Client.write_zeroes`."""
        await self._repeat(lambda client: client.write_zeroes(offset, length, flags), changes=True)

    async def cache(self, offset: int, length: int) -> None:
        """`Client.cache`."""
        await self._repeat(lambda client: client.cache(offset, length))

    async def block_status(self, offset: int, length: int, context: str = c.BASE_ALLOCATION,
                           ) -> list[tuple[int, int]]:
        """`Client.block_status`."""
        return await self._repeat(lambda client: client.block_status(offset, length, context))

    async def _repeat(self, request: Callable[[Client], Awaitable[T]], changes: bool = False) -> T:
        give_up: float | None = None
        while True:
            client = self._pick()
            if client is None:
                await self._wait()
                continue
            try:
                return await request(client)
            except ConnectionLost as error:
                if changes and error.errno == errno.ETIMEDOUT:  # it may yet take effect: see the module
                    raise
                now = self._clock.time()
                if give_up is None:
                    give_up = now + self._reconnect_delay
                if now >= give_up or self._ended is not None:
                    raise

    def _pick(self) -> Client | None:
        clients = self._clients
        if len(clients) == 1 and clients[0].usable:
            return clients[0]
        return min((client for client in clients if client.usable), key=_load, default=None)

    async def _wait(self) -> None:
        """Until there may be a connection. Raises ConnectionLost when waiting is over."""
        if self._ended is not None or not self._reconnect_delay or (
                self._why_lost is not None and self._grace is None):
            raise self._no_connection()
        waiter: Completion[None] = Completion()
        self._waiting.append(waiter)
        await waiter

    def _no_connection(self) -> ConnectionLost:
        why = self._ended or self._why_lost
        return ConnectionLost(why.reason, why.errno or errno.ENOTCONN) if why else ConnectionLost("not connected")

    # Connections.

    def _add(self, client: Client) -> None:
        client.blocks = self._blocks
        client.on_lost = lambda error: self._lost(client, error)
        self._info = client.info
        self._clients.append(client)
        if client.lost_because is not None:
            self._lost(client, client.lost_because)
            return
        if len(self._clients) == 1:
            self._why_lost = None
            self._stop_grace()
            if self._on_state is not None:
                self._on_state("connected", None)
            self._wake()
        self._dial_missing()

    def _lost(self, client: Client, error: ConnectionLost) -> None:
        self._clients.remove(client)
        if self._ended is not None:
            return
        if not self._clients:
            self.losses += 1
            self._why_lost = error
            if self._reconnect_delay:
                self._grace = self._clock.call_later(self._reconnect_delay, self._grace_over)
            if self._on_state is not None:
                self._on_state("lost", error)
        self._dial_missing()

    def _dial_missing(self) -> None:
        several = self._info is not None and self._info.flags & c.FLAG_CAN_MULTI_CONN
        if self._ended is None and self._dialler is None and len(self._clients) < (self._wanted if several else 1):
            self._dialler = asyncio.get_running_loop().create_task(self._dial())

    async def _dial(self, latest: float = math.inf) -> None:
        """One connection more; pauses first when the last attempt failed or a connection was just lost.

        No attempt begins after ``latest``: raises what the last one raised.
        """
        pauses = (self._backoff.pause(attempt, self._chance()) for attempt in itertools.count())
        if self._why_lost is not None:
            await self._sleep(next(pauses))
        while True:
            try:
                client = await self._connect()
                break
            except (OSError, BlockstepError):
                pause = next(pauses)
                if self._clock.time() + pause > latest:
                    raise
            await self._sleep(pause)
        self._dialler = None
        self._add(client)

    async def _sleep(self, seconds: float) -> None:
        over: Completion[None] = Completion()
        timer = self._clock.call_later(seconds, lambda: over.set_result(None))
        try:
            await over
        finally:
            timer.cancel()

    def _grace_over(self) -> None:
        self._grace = None
        self._wake()

    def _stop_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _wake(self) -> None:
        """Those who wait look again what they can do."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    # The end.

    def yank(self) -> None:
        """Cut all connections and stay without. Every request has failed when this returns, and later ones do."""
        self._end(ConnectionLost("the connection was yanked"))
        for client in list(self._clients):
            client.yank()

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """`Client.close` on all connections."""
        self._end(ConnectionLost("the connection was closed"))
        for client in list(self._clients):
            await client.close(timeout)

    def _end(self, why: ConnectionLost) -> None:
        if self._ended is None:
            self._ended = why
        if self._dialler is not None:
            self._dialler.cancel()
            self._dialler = None
        self._stop_grace()
        self._wake()


def _load(client: Client) -> int:
    return client.outstanding
