"""Character devices of the storage daemon: what monitors are connected to.

A device with ``server=on`` listens from its ``--chardev`` on; whoever connects is greeted if a ``--monitor`` names it,
when all options are done. So a socket is there, with mode 0600, before anything that is told about it; and ``wait=on``
can hold up what follows until somebody has connected. Any number of clients may be connected at a time.

Without it the device connects to somebody who listens, as programs do that start QEMU and want to be sure to whom they
talk. There is one monitor then; when it hangs up, nobody comes in its place.

A device is a unix socket, TCP (with TLS, if it listens and credentials are named), a socket that was handed over, or
standard input and output.

Source: the man page of QEMU's storage daemon (``--chardev``) for the names.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
from typing import Annotated, Any, Final, cast

import msgspec
from msgspec import Meta

from blockstep.aio.names import parse_port, resolve
from blockstep.daemon.stdio import StandardStreams
from blockstep.errors import OptionError
from blockstep.inventory.objects import Objects
from blockstep.qmp.server import bind_tcp, bind_unix

#: Words of a ``--chardev`` that may stand alone.
SWITCHES: Final = ("server", "wait", "delay", "ipv4", "ipv6")


class SocketOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, tag_field="backend",
                    tag="socket"):
    """A socket: either ``path``, or ``host`` and ``port``, or ``fd``."""

    id: Annotated[str, Meta(description="Its name, for --monitor.")]
    path: Annotated[str | None, Meta(description="A unix socket.")] = None
    host: Annotated[str | None, Meta(description="A TCP address; empty: all addresses.")] = None
    port: Annotated[str | None, Meta(description="Its port, with host.")] = None
    fd: Annotated[str | None, Meta(description="A socket that was handed over: the number of its "
                                   "descriptor, or its name if systemd has given it one.")] = None
    server: Annotated[bool, Meta(description="Listen; off: connect to somebody who listens.")] = False
    wait: Annotated[bool | None, Meta(description="With server: go on with the options when somebody has connected, "
                                      "not before (on).")] = None
    tls_creds: Annotated[str | None, Meta(description="With server: demand TLS, with the credentials of that id; "
                                          "TCP only.")] = None
    tls_authz: Annotated[str | None, Meta(description="Refused: there are no authorization objects.")] = None
    delay: Annotated[bool, Meta(description="Of no effect: answers are sent at once.")] = False
    ipv4: Annotated[bool, Meta(description="Of no effect: the first address of the host is taken.")] = True
    ipv6: Annotated[bool, Meta(description="Of no effect: the first address of the host is taken.")] = True


class StdioOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, tag_field="backend",
                   tag="stdio"):
    """Standard input and output."""

    id: Annotated[str, Meta(description="Its name, for --monitor.")]
    signal: Annotated[bool, Meta(description="Of no effect: a terminal's signals are signals.")] = True


ChardevOptions = SocketOptions | StdioOptions


class Chardev:
    """A socket that listens, or is connected. Made by `open_chardev`; a monitor takes it over with `take`.

    ``streams``: what is at the other end, if it is this process itself.
    """

    def __init__(self, options: ChardevOptions, sock: socket.socket, tls: ssl.SSLContext | None = None,
                 streams: StandardStreams | None = None) -> None:
        self.options, self.tls = options, tls
        self.listens = isinstance(options, SocketOptions) and options.server
        self._sock: socket.socket | None = sock
        self._streams = streams
        self._file: tuple[str, tuple[int, int]] | None = None
        if isinstance(options, SocketOptions) and options.path is not None and options.server:
            path = os.path.abspath(options.path)
            self._file = path, _identity(path)

    async def wait_connected(self) -> None:
        """Wait until somebody has connected; they are not accepted yet."""
        assert self._sock is not None
        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        loop.add_reader(self._sock, came.set)
        try:
            await came.wait()
        finally:
            loop.remove_reader(self._sock)

    def take(self) -> socket.socket:
        """The socket, once."""
        assert self._sock is not None
        sock, self._sock = self._sock, None
        if self._streams is not None:
            self._streams.start()
        return sock

    def close(self) -> None:
        """Remove the file of a unix socket, if it is still ours, and the socket if nobody has taken it."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._file is not None:
            path, identity = self._file
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    os.unlink(path)
            self._file = None
        if self._streams is not None:
            self._streams.close()


async def open_chardev(options: ChardevOptions, objects: Objects, passed: dict[str, int]) -> Chardev:
    """Bind and listen. ``passed``: sockets that were handed over and not
    taken yet, by name. Raises OptionError or OSError."""
    if isinstance(options, StdioOptions):
        streams = StandardStreams()
        return Chardev(options, streams.sock, streams=streams)
    tls = _check(options, objects)
    if options.fd is not None:
        sock = passed_socket(options.fd, passed, "fd", listening=options.server)
    elif not options.server:
        sock = await _connect(options)
    elif options.path is not None:
        sock = bind_unix(options.path)
    else:
        sock = await bind_tcp(options.host or "", int(options.port or 0))
    if options.server:
        sock.listen(128)
    sock.setblocking(False)
    return Chardev(options, sock, tls)


async def _connect(options: SocketOptions) -> socket.socket:
    """To somebody who listens. Raises OSError."""
    loop = asyncio.get_running_loop()
    family, kind, protocol, address = socket.AF_UNIX, socket.SOCK_STREAM, 0, cast(Any, options.path)
    try:
        if options.host is not None:
            found = await resolve(options.host, options.port)
            family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise OSError(error.errno or errno.EINVAL, f"cannot connect: {error.strerror or error}") from None
    return sock


def _check(options: SocketOptions, objects: Objects) -> ssl.SSLContext | None:
    places = [name for name in ("path", "host", "fd") if getattr(options, name) is not None]
    if len(places) != 1:
        raise OptionError("path", ", ".join(places) or None, "given as one of path, host (with port) and fd")
    if (options.host is None) != (options.port is None):
        raise OptionError("port", options.port, "given together with host")
    if options.port is not None:
        parse_port(options.port, "port")
    if not options.server and options.wait is not None:
        raise OptionError("wait", options.wait, "left out, or given together with server=on")
    if options.tls_authz is not None:
        raise OptionError("tls-authz", options.tls_authz, "left out: there are no authorization objects; with "
                          "verify-peer the credentials let in only clients whom the CA knows")
    if options.tls_creds is None:
        return None
    if options.path is not None or not options.server:
        raise OptionError("tls-creds", options.tls_creds, "left out: TLS is for TCP, with server=on")
    return objects.tls(options.tls_creds, "server").context()


def passed_socket(text: str, passed: dict[str, int], option: str, *, listening: bool = True) -> socket.socket:
    """A socket that was handed over, by its name or its number; it is taken out of ``passed``.

    ``listening``: whether it has to listen, or to be connected. Raises OptionError.
    """
    try:
        name = next((name for name, fd in passed.items() if text in (name, str(fd))), None)
        fd = int(text) if name is None else passed.pop(name)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ValueError
        sock = socket.socket(fileno=fd)
    except (ValueError, OverflowError, OSError):
        names = f" ({', '.join(passed)})" if passed else ""
        raise OptionError(option, text, f"the number or the name of a socket that was handed over{names}") from None
    if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != listening:
        sock.detach()
        raise OptionError(option, text, f"a stream socket that {'listens' if listening else 'is connected'}")
    return sock


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino
