"""From an address to a connection whose handshake is done: the asyncio half of `blockstep.nbd.client_handshake`.

    address ── connect ─► socket ── script of the handshake (and TLS) ─► Channel, paused ─► its new owner

The channel comes paused: nothing that the server says is lost between the handshake and the new owner, who calls
`Channel.set_receiver` and `Channel.resume`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from blockstep.aio.channel import Channel, errno_of
from blockstep.aio.names import resolve
from blockstep.errors import ConnectionLost, OptionError, PeerRefused
from blockstep.nbd.client_handshake import (
    ABORT,
    ClientHandshake,
    ExportInfo,
    HandshakeState,
    Script,
    TlsMode,
    list_exports,
)
from blockstep.nbd.uri import Address, InetAddress, UnixAddress

T = TypeVar("T")


class ClientTls(msgspec.Struct, frozen=True):
    """How a client does TLS. ``hostname``: whom the certificate must name; None: the address's host."""

    context: ssl.SSLContext
    hostname: str | None = None
    #: False: go on in the clear with a server that has no TLS.
    required: bool = True


def tls_mode(tls: ClientTls | None) -> TlsMode:
    """What the handshake script is to do about TLS."""
    return TlsMode.OFF if tls is None else TlsMode.REQUIRED if tls.required else TlsMode.OPTIONAL


async def dial(address: Address | socket.socket, script: Callable[[Callable[[bytes], None]], Script[T]],
               tls: ClientTls | None = None, timeout: float = 10.0) -> tuple[Channel, T]:
    """Connect and run a handshake script, both together in ``timeout`` seconds.

    A socket in place of the address is connected already; it belongs to the channel, and is closed on failure.
    Raises ConnectionLost (ETIMEDOUT after ``timeout``), OSError when connecting fails, ProtocolError, PeerRefused,
    OptionError. Nothing is left open then, nor after a cancellation.
    """
    return await _within(timeout, f"no connection to {_name(address)} after {timeout:g} s",
                         _dial(address, script, tls))


async def list_server(address: Address, *, tls: ClientTls | None = None, details: bool = True,
                      timeout: float = 10.0) -> list[ExportInfo]:
    """The exports of a server, with their sizes, flags and contexts if ``details``. Errors as of `dial`."""
    channel, exports = await dial(
        address, lambda send: list_exports(send, tls=tls_mode(tls), details=details), tls, timeout)
    channel.close()
    await channel.wait_closed()
    return exports


async def open_socket(address: Address) -> socket.socket:
    """A connected, non-blocking socket. All addresses of a host are tried, one after the other.

    Raises OSError: that of the last attempt, its text saying where to; or that of the name.
    """
    loop = asyncio.get_running_loop()
    if isinstance(address, UnixAddress):
        candidates: list[tuple[int, Any]] = [(socket.AF_UNIX, address.path)]
    else:
        found = await resolve(address.host or "localhost", address.port)
        candidates = [(family, where) for family, _, _, _, where in found]
    error = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for family, where in candidates:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, where)
        except OSError as caught:
            sock.close()
            error = caught
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise OSError(error.errno, f"{os.strerror(error.errno) if error.errno else error}: {_name(address)}")


class _Greeter:
    """The channel's owner while the handshake lasts."""

    def __init__(self, handshake: ClientHandshake[Any]) -> None:
        self.handshake = handshake
        self.channel: Channel
        self._buffer = memoryview(bytearray(16 << 10))
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def haggle(self) -> None:
        """Until the handshake is in another state than HAGGLING; the channel is paused then."""
        self.channel.resume()
        await self._turn
        self._turn = asyncio.get_running_loop().create_future()

    def get_buffer(self) -> memoryview:
        return self._buffer

    def received(self, count: int) -> None:
        try:
            answer = self.handshake.receive(self._buffer[:count])
        except Exception as error:
            self._end_turn(error)
            return
        if answer:
            self.channel.send([answer])
        if self.handshake.state is not HandshakeState.HAGGLING:
            self._end_turn(None)

    def lost(self, error: OSError | None) -> None:
        reason = error.strerror if error is not None and error.strerror else "the server closed the connection"
        self._end_turn(ConnectionLost(f"{reason}, during the handshake",
                                      errno.ECONNRESET if error is None else errno_of(error)))

    def _end_turn(self, error: Exception | None) -> None:
        self.channel.pause()
        if self._turn.done():
            return
        if error is None:
            self._turn.set_result(None)
        else:
            self._turn.set_exception(error)
            self._turn.exception()  # nobody waits for it when TLS has failed already


async def _dial(address: Address | socket.socket, script: Callable[[Callable[[bytes], None]], Script[T]],
                tls: ClientTls | None) -> tuple[Channel, T]:
    greeter = _Greeter(ClientHandshake(script))
    handshake: ClientHandshake[T] = greeter.handshake
    sock = address if isinstance(address, socket.socket) else await open_socket(address)
    channel = greeter.channel = Channel(sock, greeter)
    try:
        await greeter.haggle()
        if handshake.state is HandshakeState.STARTING_TLS:
            assert tls is not None
            await channel.start_tls(tls.context, False, _hostname(tls, address))
            channel.pause()
            channel.send([handshake.tls_started()])
            await greeter.haggle()
    except PeerRefused:
        channel.send([ABORT])
        channel.close()
        raise
    except BaseException:
        channel.abort()
        raise
    return channel, handshake.result


async def _within(timeout: float, reason: str, work: Coroutine[Any, Any, tuple[Channel, T]]) -> tuple[Channel, T]:
    """Like asyncio.timeout, but for strands too, and a channel that comes when nobody wants it any more is dropped."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = loop.call_later(timeout, expire)
    try:
        return await task
    except asyncio.CancelledError:
        if not expired:
            task.cancel()
            task.add_done_callback(_drop)
            raise
        raise ConnectionLost(reason, errno.ETIMEDOUT) from None
    finally:
        timer.cancel()


def _drop(dialled: asyncio.Task[tuple[Channel, T]]) -> None:
    if not dialled.cancelled() and dialled.exception() is None:
        dialled.result()[0].abort()


def _hostname(tls: ClientTls, address: Address | socket.socket) -> str | None:
    if tls.hostname is not None:
        return _host_name(tls.hostname)
    if isinstance(address, InetAddress):
        return address.host or "localhost"
    if tls.context.check_hostname:
        raise OptionError("tls-hostname", None, "given: a socket without a host name leaves nothing to check the "
                          "server's certificate against")
    return None


def _host_name(name: str) -> str:
    try:
        fits = bool(name.encode("idna")) and "\0" not in name
    except UnicodeError:
        fits = False
    if not fits:
        raise OptionError("tls-hostname", name, "a host name")
    return name


def _name(address: Address | socket.socket) -> str:
    return f"file descriptor {address.fileno()}" if isinstance(address, socket.socket) else str(address)
