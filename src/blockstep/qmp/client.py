"""The QMP client of blockstep's own commands and of a primary that talks to its standby.

    async with connect("/run/blockstep/qmp.sock", timeout=5) as qmp:
        status = await qmp.execute("query-status")
        async for event in qmp.events("JOB_STATUS_CHANGE"):
            ...

The protocol is the library `qemu.qmp` (its QMPClient: greeting, negotiation, ids, events). What it lacks for
programs that run long or must not hang is added here, through its public hooks where there are any:

- *Deadlines.* None of its calls has one. Here every call has: `TimeoutError` leaves the connection usable (the late
  answer is dropped by its id); a deadline while connecting or closing cuts the connection off. Cutting off has no
  public way; `_Client` is the one place that reaches into the library.
- *The end.* The library's own way out first flushes to the peer, and so waits for ever for a stopped one. Over TLS it
  moves the limits of asyncio's transport to do that, which waits for ever as well, or, if the connection is gone,
  logs that ``protocol.pause_writing() failed``. There is nothing to flush for: who closes waits for no answer.
- *Errors.* A refusal is `CommandRefused` with QMP's class and description; one instead of the greeting, which the
  library does not understand, is `PeerRefused`; a peer that is gone is `ConnectionLost`; one that talks something else
  than QMP is `ProtocolError`.
- *Events.* The library keeps every event that it ever received in a history and its queues without bound, and an
  iteration over events never ends, not even with the connection. Here each subscription has a queue of at most
  `EVENT_QUEUE`; one that falls further behind ends with EventsLost; all end when the connection does.
- *TLS* works, for TCP; it needs a server name, which the library takes from the host.
- *A reply* may have at most `MAX_REPLY` bytes (the library reads lines; longer ones end the connection).
- *Logging.* It logs what it also raises; its logger is kept from printing that to the terminal.

Source: QMP specification; the documentation of qemu.qmp 0.0.6.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl as tls
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)
from qemu.qmp.events import EventListener

from blockstep.aio.endings import to_its_end
from blockstep.errors import ConnectionLost, PeerRefused, ProtocolError
from blockstep.qmp.errors import CommandRefused

#: Where a server listens: the path of a unix socket, or (host, port).
Address = str | os.PathLike[str] | tuple[str, int]

#: The longest reply or event that is understood, in bytes.
MAX_REPLY: Final = 64 << 20
#: Events that may wait for one subscriber.
EVENT_QUEUE: Final = 4096
#: Seconds that an orderly end of the connection may take.
_CLOSING: Final = 1.0

logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class EventsLost(ProtocolError):
    """A subscriber did not keep up: events after the last one it got are lost. Query the state and subscribe again."""


class _Client(QMPClient):
    """The library's client, which can be cut off."""

    def cut_off(self) -> None:
        """Drop the connection without a flush: what waits for it ends with an error."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def disconnect(self) -> None:
        """The library's, which must not be left half done: what had ended the connection would be raised nowhere."""
        self._schedule_disconnect()  # now, and not in that task's first turn: nothing more is heard
        await to_its_end(super().disconnect())

    async def _bh_flush_writer(self) -> None:
        """A step of the library's disconnect that is left out: see the module."""

    def _cb_inbound(self, msg: Message) -> Message:
        """The library's hook for what comes: a server that does not want us answers before anything was asked."""
        error = msg.get("error")
        if self.greeting is None and isinstance(error, dict) and isinstance(error.get("desc"), str):
            raise PeerRefused(error["desc"])
        return msg


class _Tap(EventListener):
    """Sees every event, keeps none: `accept` is the library's hook for filters."""

    def __init__(self, handle: Callable[[Message], None]) -> None:
        super().__init__()
        self._handle = handle

    def accept(self, event: Message) -> bool:
        self._handle(event)
        return False


class Events:
    """The events from one subscription on, in order: dicts with ``event``, ``data`` and ``timestamp``.

    An async iterator. It ends when the connection does, with ConnectionLost unless it was closed from here; and
    with EventsLost when more than `EVENT_QUEUE` events wait. `close` ends the subscription.
    """

    def __init__(self, names: frozenset[str], closed: Callable[[Events], None]) -> None:
        self._names = names
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._error: Exception | None = None
        self._ended = False
        self._closed = closed

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._ended and self._queue.empty():
            raise self._error or StopAsyncIteration
        event = await self._queue.get()
        if event is None:
            raise self._error or StopAsyncIteration
        return event

    def close(self) -> None:
        """End the subscription; the iteration ends after what it has received."""
        self._end(None)

    def _take(self, event: Message) -> None:
        if self._names and event["event"] not in self._names:
            return
        if self._queue.qsize() >= EVENT_QUEUE:
            self._end(EventsLost(f"more than {EVENT_QUEUE} events wait for a subscriber"))
        else:
            self._queue.put_nowait(dict(event))

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended, self._error = True, error
            self._queue.put_nowait(None)
            self._closed(self)


class Connection:
    """A negotiated connection. Made by `connect`; calls may overlap, the server answers in their order."""

    def __init__(self, client: _Client, address: Address, timeout: float) -> None:
        self.address, self.timeout = address, timeout
        self._client = client
        self._subscriptions: set[Events] = set()
        self._closing = False
        client.events.event_filter = lambda event: False  # the default listener would keep all of them for ever
        client.register_listener(_Tap(self._dispatch))
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What the server said first: ``version`` and ``capabilities``."""
        assert self._client.greeting is not None
        said = self._client.greeting.QMP
        return {"version": said.version, "capabilities": said.capabilities}

    @property
    def connected(self) -> bool:
        """Whether the connection stands, as far as is known."""
        return self._client.runstate is Runstate.RUNNING

    async def ended(self, limit: float) -> bool:
        """Wait for the end of the connection, ``limit`` seconds at the most; whether it has come."""
        await asyncio.wait([self._watcher], timeout=limit)
        return self._watcher.done()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *,
                      timeout: float | None = None, out_of_band: bool = False) -> Any:
        """Execute a command and return its result.

        ``timeout`` in seconds (default: the connection's). Raises CommandRefused when the server answers with an
        error, TimeoutError when it does not answer in time (it may still execute the command), ConnectionLost
        when the connection is or goes away (it may have executed it).
        """
        limit = self.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                return await self._client.execute(command, arguments, oob=out_of_band)
        except TimeoutError:
            raise TimeoutError(f"{_shown(self.address)}: no answer to '{command}' within {limit:g} s") from None
        except ExecuteError as error:
            raise CommandRefused(command, error.error_class, str(error)) from None
        except (ExecInterruptedError, StateError) as error:
            raise ConnectionLost(f"{_shown(self.address)}: the connection ended before the answer to "
                                 f"'{command}'") from error
        except QMPError as error:
            raise ProtocolError(f"{_shown(self.address)}: {error}") from error

    def events(self, *names: str) -> Events:
        """Subscribe to events from now on: all, or those with one of ``names``."""
        events = Events(frozenset(names), self._subscriptions.discard)
        if not self.connected:
            events._end(ConnectionLost(f"{_shown(self.address)}: not connected"))
        else:
            self._subscriptions.add(events)
        return events

    async def close(self) -> None:
        """Close the connection. Takes at most a second; raises nothing."""
        self._closing = True
        loop = asyncio.get_running_loop()
        last_resort = loop.call_later(_CLOSING, self._client.cut_off)
        try:
            # An error that ended the connection shows up here once more; those whom it hit have it already.
            with contextlib.suppress(Exception):
                await self._client.disconnect()
        finally:
            last_resort.cancel()
            self._watcher.cancel()
            self._end_subscriptions(None)

    def _dispatch(self, event: Message) -> None:
        for events in list(self._subscriptions):
            events._take(event)

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._end_subscriptions(None if self._closing else ConnectionLost(f"{_shown(self.address)}: the peer is gone"))

    def _end_subscriptions(self, error: Exception | None) -> None:
        for events in list(self._subscriptions):
            events._end(error)


@asynccontextmanager
async def connect(address: Address, *, timeout: float = 10.0,
                  ssl: tls.SSLContext | None = None) -> AsyncIterator[Connection]:
    """Connect, negotiate, and close at the end of the block.

    ``timeout`` in seconds bounds the connecting as a whole and is the default for each call. ``ssl`` is for TCP.
    Raises ConnectionLost if the server cannot be reached or hangs up, PeerRefused if it takes no more connections,
    ProtocolError if it speaks no QMP, TimeoutError if all that takes too long.
    """
    connection = await open_connection(address, timeout=timeout, ssl=ssl)
    try:
        yield connection
    finally:
        await connection.close()


async def open_connection(address: Address, *, timeout: float = 10.0,
                          ssl: tls.SSLContext | None = None) -> Connection:
    """As `connect`, for those who close it themselves."""
    client = _Client(readbuflen=MAX_REPLY)
    where = address if isinstance(address, tuple) else os.fspath(address)
    # A connection that stands is cut off, which ends the attempt at once; before that there is one to cancel.
    last_resort = asyncio.get_running_loop().call_later(timeout, client.cut_off)
    late = TimeoutError(f"{_shown(address)}: no connection within {timeout:g} s")
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(timeout + 0.1):
            await client.connect(where, ssl)
    except TimeoutError:
        raise late from None
    except ConnectError as error:
        if asyncio.get_running_loop().time() - started >= timeout:
            raise late from None
        raise _failed(address, error.exc) from error
    except AssertionError:  # the library's, that a connection which it has just made still stands
        with contextlib.suppress(Exception):
            await client.disconnect()
        raise ConnectionLost(f"{_shown(address)}: the peer hung up after it had greeted") from None
    finally:
        last_resort.cancel()
    return Connection(client, address, timeout)


def _failed(address: Address, cause: Exception) -> Exception:
    if isinstance(cause, tls.SSLError | socket.gaierror):  # whose numbers are no errno
        return ConnectionLost(f"{_shown(address)}: {cause.strerror or cause}")
    if isinstance(cause, EOFError) or not cause.args:  # asyncio has no words for an end in the TLS handshake
        return ConnectionLost(f"{_shown(address)}: the peer hung up before it had greeted")
    if isinstance(cause, UnicodeEncodeError) or type(cause) is UnicodeError:  # which of them depends on Python
        return ConnectionLost(f"{_shown(address)}: it is no host name")
    if isinstance(cause, OSError):
        # With a number the words for it say it all; what asyncio writes there has the address once more.
        return ConnectionLost(_shown(address) if cause.errno else f"{_shown(address)}: {cause}",
                              cause.errno or errno.ENOTCONN)
    if isinstance(cause, PeerRefused):
        return PeerRefused(f"{_shown(address)}: {cause}")
    return ProtocolError(f"{_shown(address)}: this is no QMP server: {cause}")


def _shown(address: Address) -> str:
    if not isinstance(address, tuple):
        return os.fspath(address)
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
