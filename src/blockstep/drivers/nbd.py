"""Driver ``nbd``: a disk that an NBD server exports.

Where the server is, in one of these ways:

    server: {type: inet, host, port} | {type: unix, path} | {type: fd, str}      as QEMU has it
    host, port | path                                                             the same, flat
    uri                                                                           with export and TLS in it

The connection comes back by itself when it is lost: see ``reconnect-delay`` and `blockstep.nbd.session`. When it
comes and goes, the event ``NBD_CONNECTION`` says so, and how long the export is now. The node keeps the length that it
was opened with, on which others above rely, until `Nbd.truncate` takes that of the export over.

A flush makes durable what the server calls durable. What the server cannot do is done with what it can: FUA by a
flush, zeroes by writing them, discard by nothing.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from typing import ClassVar

import msgspec

from blockstep.aio.names import parse_port
from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Buffer, Driver, Extent, not_supported
from blockstep.block.node import NodeOptions
from blockstep.block.registry import register
from blockstep.errors import OptionError
from blockstep.nbd import constants as c
from blockstep.nbd.client import Client
from blockstep.nbd.dial import ClientTls
from blockstep.nbd.session import Session, State
from blockstep.nbd.tls import TlsCredentials, client_context
from blockstep.nbd.uri import Address, InetAddress, NbdUri, UnixAddress, parse_uri


class InetServer(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, tag_field="type",
                 tag="inet"):
    """A TCP server. ``numeric``, ``to`` and ``keep-alive`` are QEMU's, and of no effect: the kernel always probes."""

    host: str
    port: int | str
    numeric: bool = False
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    mptcp: bool = False


class UnixServer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="unix"):
    """A unix socket. ``abstract``: of the abstract namespace, with names that are not padded (``tight``)."""

    path: str
    abstract: bool = False
    tight: bool = True


class FdServer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="fd"):
    """A connected socket: the number of its file descriptor, of which a duplicate is used. It cannot come back."""

    text: str = msgspec.field(name="str")


class NbdOptions(NodeOptions, tag="nbd"):
    """See the module for ``server``, ``host``, ``port``, ``path`` and ``uri``; times are seconds.

    ``export``: its name. ``tls-creds``: the id of an object of type tls-creds-x509, or a directory as
    `blockstep.nbd.tls` describes it; TLS is required then.
    ``tls-hostname``: whom the server's certificate must name, if not the host. ``open-timeout``: how long to try
    at the start; 0: once. ``reconnect-delay``: how long requests wait for a lost connection; then they fail, and
    dialling goes on. ``timeout``: how long a request may stay unanswered before the connection is cut; 0: for ever.
    Writes that were outstanding then fail, and are not sent again.
    ``connections``: how many, if the server offers multi-conn. ``x-dirty-bitmap``: a metadata context that takes
    the place of ``base:allocation`` in block status.
    """

    server: InetServer | UnixServer | FdServer | None = None
    host: str | None = None
    port: int | str | None = None
    path: str | None = None
    uri: str | None = None
    export: str | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    open_timeout: float = 0.0
    reconnect_delay: float = 0.0
    timeout: float = 0.0
    connections: int = 1
    x_dirty_bitmap: str | None = None


@register
class Nbd(Driver):
    """See the module."""

    driver: ClassVar[str] = "nbd"
    Options = NbdOptions
    options: NbdOptions
    #: The connections; for those who want more than a driver does (`Session.yank`, `Session.submit_write`).
    session: Session

    async def open(self) -> None:
        options = self.options
        for name in ("open_timeout", "reconnect_delay", "timeout"):
            if getattr(options, name) < 0:
                raise OptionError(name.replace("_", "-"), getattr(options, name), "0 or more seconds")
        if not 1 <= options.connections <= 16:
            raise OptionError("connections", options.connections, "1 to 16")
        uri = parse_uri(options.uri) if options.uri is not None else None
        address = _address(options, uri)
        tls = _tls(options, uri, self.objects.get(options.tls_creds or ""))
        export = options.export if options.export is not None else uri.export if uri is not None else ""
        #: Where the disk is, for people; empty if it was given as a connected socket.
        self.uri = "" if callable(address) else str(NbdUri(address, export, tls=tls is not None))
        self._context = options.x_dirty_bitmap or c.BASE_ALLOCATION
        self.session = Session(
            lambda: Client.connect(address() if callable(address) else address, export, tls=tls,
                                   contexts=(self._context,), timeout=options.timeout or None),
            connections=options.connections, reconnect_delay=options.reconnect_delay, on_state=self._state)
        await self.session.open(options.open_timeout)
        info = self.session.info
        try:
            if info.flags & c.FLAG_READ_ONLY and not self.read_only:
                raise OptionError("read-only", False, f"true: the server exports '{info.name}' read-only")
            if options.x_dirty_bitmap and self._context not in info.contexts:
                raise OptionError("x-dirty-bitmap", self._context, f"a metadata context of export '{info.name}'")
        except OptionError:
            await self.session.close()
            raise
        self.length = info.size

    async def close(self) -> None:
        await self.session.close()

    def shown_as(self) -> str | None:
        return self.uri or None

    def yank(self) -> None:
        """Cut the connections: all requests have failed when this returns, and all later ones fail."""
        self.session.yank()

    def has_grown(self, length: int) -> None:
        """Whoever owns the export says that it has ``length`` bytes by now; the connections stay as they are."""
        self.length = length

    def _state(self, state: State, error: Exception | None) -> None:
        more = {"error": str(error)} if error is not None else {"size": self.session.info.size}
        self.report("NBD_CONNECTION", {"node-name": self.name, "state": state, **more})

    # Requests.

    async def pread(self, offset: int, length: int) -> Buffer:
        return await self.session.pread(offset, length)

    def submit_write(
        self, offset: int, data: Buffer, flags: int, done: Callable[[BaseException | None], None]
    ) -> None:
        if flags:
            super().submit_write(offset, data, flags, done)
        else:
            self.session.submit_write(offset, data, 0, done)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self.session.pwrite(offset, data, flags)

    async def flush(self) -> None:
        await self.session.flush()

    async def discard(self, offset: int, length: int) -> None:
        if self.options.discard == "unmap" and self.session.info.flags & c.FLAG_SEND_TRIM:
            await self.session.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        offered = self.session.info.flags
        if offered & c.FLAG_SEND_WRITE_ZEROES and (not flags & FAST or offered & c.FLAG_SEND_FAST_ZERO):
            if self.options.discard != "unmap":
                flags &= ~MAY_UNMAP
            await self.session.write_zeroes(offset, length, _ZERO_FLAGS[flags])
        elif flags & FAST:
            raise not_supported("fast zeroes")
        else:
            await super().write_zeroes(offset, length, flags)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        if self._context not in self.session.info.contexts:
            return [Extent(length)]
        extents = await self.session.block_status(offset, length, self._context)
        return [Extent(count, data=not flags & c.STATE_HOLE, zero=bool(flags & c.STATE_ZERO))
                for count, flags in extents]

    async def truncate(self, length: int) -> None:
        """See `Driver`. The node can only be given the length that the export had at the latest handshake."""
        size = self.session.info.size
        if length != size:
            raise not_supported(f"resize of the NBD export of {size} bytes to {length} bytes")
        if length > self.length:
            await self.write_zeroes(self.length, length - self.length, MAY_UNMAP)
        self.length = length


_ZERO_FLAGS = {flags: (c.CMD_FLAG_FUA if flags & FUA else 0)
               | (0 if flags & MAY_UNMAP else c.CMD_FLAG_NO_HOLE)
               | (c.CMD_FLAG_FAST_ZERO if flags & FAST else 0)
               for flags in range(8)}


def _address(options: NbdOptions, uri: NbdUri | None) -> Address | _Duplicate:
    given = {"server": options.server is not None, "host": options.host is not None,
             "path": options.path is not None, "uri": options.uri is not None}
    if sum(given.values()) != 1:
        raise OptionError("server", ", ".join(name for name in given if given[name]) or None,
                          "given once, as one of server, host (and port), path and uri")
    if options.port is not None and options.host is None:
        raise OptionError("port", options.port, "given together with host")
    if uri is not None:
        return uri.address
    if options.path is not None:
        return UnixAddress(options.path)
    if options.host is not None:
        return InetAddress(options.host, _port(options.port, "port"))
    server = options.server
    if isinstance(server, InetServer):
        if server.mptcp:
            raise OptionError("server.mptcp", True, "off: multipath TCP is not offered")
        if False in (server.ipv4, server.ipv6):
            raise OptionError("server.ipv4" if server.ipv4 is False else "server.ipv6", False,
                              "left out: an address of the family wanted, as host, chooses it")
        return InetAddress(server.host, _port(server.port, "server.port"))
    if isinstance(server, UnixServer):
        if server.abstract and not server.tight:
            raise OptionError("server.tight", False, "on: names of abstract sockets are not padded")
        return UnixAddress("\0" + server.path if server.abstract else server.path)
    assert server is not None
    return _Duplicate(server.text)


def _port(port: int | str | None, option: str) -> int:
    if port is None:
        return c.DEFAULT_PORT
    return parse_port(str(port), option, 1)


class _Duplicate:
    """A connected socket that was handed to this process: each call gives a duplicate of it."""

    def __init__(self, text: str) -> None:
        try:
            self._fd = int(text)
            os.fstat(self._fd)
        except (ValueError, OverflowError, OSError):
            raise OptionError("server.str", text, "the number of an open file descriptor") from None

    def __call__(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._fd))


def _tls(options: NbdOptions, uri: NbdUri | None, credentials: object) -> ClientTls | None:
    if isinstance(credentials, TlsCredentials):
        if credentials.endpoint != "client":
            raise OptionError("tls-creds", options.tls_creds, "the id of credentials with endpoint=client")
        hostname = options.tls_hostname or (uri.tls_hostname if uri is not None else None)
        return ClientTls(credentials.context(), hostname, True)
    directory, hostname, required, verify = options.tls_creds, options.tls_hostname, True, True
    if uri is not None and (uri.tls or uri.tls_certificates is not None):
        if uri.tls_type not in (None, "x509") or uri.tls_psk_file is not None or uri.username is not None:
            raise OptionError("uri", options.uri, "an NBD URI with TLS by X.509 certificates: "
                              "there is no TLS with pre-shared keys or anonymous peers here")
        required = uri.tls or directory is not None
        directory = directory or uri.tls_certificates
        hostname = hostname or uri.tls_hostname
        verify = uri.tls_verify_peer is not False
    elif directory is None:
        if hostname is not None:
            raise OptionError("tls-hostname", hostname, "given together with tls-creds")
        return None
    context = client_context(directory, check_hostname=verify)
    if not verify:
        context.verify_mode = ssl.CERT_NONE
    return ClientTls(context, hostname, required)
