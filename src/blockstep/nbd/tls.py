"""TLS contexts from a directory of X.509 files, laid out as QEMU's ``tls-creds-x509`` and libnbd expect it.

    ca-cert.pem                         who signed the peer
    server-cert.pem, server-key.pem     who the server is
    client-cert.pem, client-key.pem     who the client is, for servers that ask

TLS 1.2 is the least that is spoken. A server with ``verify_peer`` takes only clients with a certificate that its CA
signed (mutual TLS). A client always checks the server's certificate against the CA, and its name unless told not to.

A server takes renewed files without a restart: with each handshake it looks whether they are others than before, and
goes on with the old ones as long as the new ones do not fit together.
"""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from blockstep.errors import OptionError

CA_CERT = "ca-cert.pem"
SERVER_CERT, SERVER_KEY = "server-cert.pem", "server-key.pem"
CLIENT_CERT, CLIENT_KEY = "client-cert.pem", "client-key.pem"
#: How a directory with certificates is given in URIs.
OPTION = "tls-certificates"


class TlsCredentials(msgspec.Struct, frozen=True):
    """One directory for one end of connections, and whether the peer must have a certificate of the same CA.

    ``password`` opens the private key, if it is encrypted.
    """

    directory: str
    endpoint: Literal["client", "server"]
    verify_peer: bool = True
    password: bytes | None = None

    def __repr__(self) -> str:
        """Without the password."""
        return f"TlsCredentials({self.directory!r}, {self.endpoint!r}, verify_peer={self.verify_peer})"

    def context(self) -> ssl.SSLContext:
        """A new context for the endpoint. Raises OptionError as `server_context` does."""
        if self.endpoint == "server":
            return server_context(self.directory, self.verify_peer, self.password)
        context = client_context(self.directory, check_hostname=self.verify_peer, password=self.password)
        if not self.verify_peer:
            context.verify_mode = ssl.CERT_NONE
        return context


def server_context(directory: str | os.PathLike[str], verify_peer: bool = False,
                   password: bytes | None = None, option: str = OPTION) -> ssl.SSLContext:
    """The context of a server. With ``verify_peer`` a client must have a certificate signed by ``ca-cert.pem``.

    ``password`` opens an encrypted key. Raises OptionError for ``option``, which is how the directory was given, that
    names the file that is missing or that cannot be used. Files that are renewed are used from then on.
    """
    folder = Path(directory)
    files = [folder / name for name in (SERVER_CERT, SERVER_KEY, *([CA_CERT] if verify_peer else []))]

    def load() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _set_common(context)
        _load_identity(context, folder, SERVER_CERT, SERVER_KEY, password, option)
        if verify_peer:
            _load_ca(context, folder, option)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    seen = _stamps(files)
    context = newest = load()

    def greeted(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        """Called in each handshake, whether a name was asked for or not."""
        nonlocal seen, newest
        stamps = _stamps(files)
        if stamps != seen:
            seen = stamps
            with suppress(OptionError):  # not all of them have been renewed yet
                newest = load()
        connection.context = newest

    context.sni_callback = greeted
    return context


def client_context(directory: str | os.PathLike[str] | None, check_hostname: bool = True,
                   password: bytes | None = None, option: str = OPTION) -> ssl.SSLContext:
    """The context of a client. Without a directory the system's CAs are trusted and no certificate is shown.

    ``check_hostname`` False accepts any name in a certificate that the CA signed. Raises OptionError as
    `server_context` does; the client's own certificate may be absent, both files together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _set_common(context)
    context.check_hostname = check_hostname
    if directory is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return context
    folder = Path(directory)
    _load_ca(context, folder, option)
    if (folder / CLIENT_CERT).exists() or (folder / CLIENT_KEY).exists():
        _load_identity(context, folder, CLIENT_CERT, CLIENT_KEY, password, option)
    return context


def _stamps(files: list[Path]) -> list[tuple[int, ...]]:
    stamps: list[tuple[int, ...]] = []
    for path in files:
        try:
            status = path.stat()
            stamps.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append(())
    return stamps


def _set_common(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION


def _load_ca(context: ssl.SSLContext, folder: Path, option: str) -> None:
    path = _existing(folder, CA_CERT, option)
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise OptionError(option, str(path), f"a readable PEM file of CA certificates ({error})") from error


def _load_identity(context: ssl.SSLContext, folder: Path, cert: str, key: str, password: bytes | None,
                   option: str) -> None:
    cert_path, key_path = _existing(folder, cert, option), _existing(folder, key, option)
    try:
        # Without a password OpenSSL would ask the terminal for one.
        context.load_cert_chain(cert_path, key_path, password or (lambda: b""))
    except (OSError, ssl.SSLError) as error:
        kind = "key that the password opens" if password else "unencrypted key"
        raise OptionError(option, str(cert_path),
                          f"a PEM certificate that fits the {kind} in {key_path} ({error})") from error


def _existing(folder: Path, name: str, option: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise OptionError(option, str(folder), f"a directory with a file {name}; there is no {path}")
    return path
