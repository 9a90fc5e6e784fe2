"""NBD URIs and server addresses: text to values and back.

    nbd://user@host:port/export?tls-hostname=NAME        TCP, opportunistic TLS at most
    nbds://[::1]/export?tls-certificates=DIR             TCP, TLS required
    nbd+unix:///export?socket=PATH                       unix socket
    nbds+unix:///export?socket=PATH                      unix socket, TLS required

Everything after the first slash of the path is the export name, so ``//disk`` names the export ``/disk``.
Names, paths and parameters are percent-encoded UTF-8; ``+`` is a plus. A ``socket`` beginning with ``%00``
is a name in Linux's abstract namespace. Other schemes, user names or host names where they mean nothing,
parameters that we do not know and fragments are refused: an option that is silently dropped is worse than an
error, above all when it speaks of TLS.

Source: uri.md of the NBD project; nbd_connect_uri(3) for ``tls-certificates`` and ``tls-psk-file``.
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from blockstep.errors import OptionError
from blockstep.nbd.constants import DEFAULT_PORT, MAX_STRING

_URI: Final = r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(#.*)?"
_AUTHORITY: Final = re.compile(r"(?:([^@\[\]]*)@)?(\[[^\[\]]*\]|[^:@\[\]]*)(?::([0-9]{0,9}))?")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_BOOLEANS: Final = {"0": False, "false": False, "1": True, "true": True}
_TLS_TYPES: Final = ("anon", "x509", "psk")
_PARAMETERS: Final = ("socket", "tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates",
                      "tls-psk-file", "tls-username")


class InetAddress(NamedTuple):
    """A TCP server: a host name, an IPv4 or an IPv6 address (without brackets), and a port."""

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """A unix socket: a path, or ``\\0`` and a name in the abstract namespace."""

    path: str

    def __str__(self) -> str:
        return "@" + self.path[1:] if self.path.startswith("\0") else self.path


#: Where a server listens. ``str()`` of it is for people: ``host:port``, ``[v6]:port``, a path.
Address = InetAddress | UnixAddress


class NbdUri(NamedTuple):
    """An NBD URI, taken apart. ``str()`` of it is the URI again."""

    address: Address
    export: str = ""
    #: TLS is required (``nbds``); False: the URI does not demand it.
    tls: bool = False
    username: str | None = None
    tls_type: str | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool | None = None
    tls_certificates: str | None = None
    tls_psk_file: str | None = None

    def __str__(self) -> str:
        unix = isinstance(self.address, UnixAddress)
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if unix else "")
        parameters: list[tuple[str, str | None]] = [
            ("socket", self.address.path if isinstance(self.address, UnixAddress) else None),
            ("tls-type", self.tls_type),
            ("tls-hostname", self.tls_hostname),
            ("tls-verify-peer", None if self.tls_verify_peer is None else str(int(self.tls_verify_peer))),
            ("tls-certificates", self.tls_certificates),
            ("tls-psk-file", self.tls_psk_file),
            ("tls-username", self.username if unix else None)]
        query = "&".join(f"{key}={_encode(value, '/')}" for key, value in parameters if value is not None)
        return f"{scheme}://{self._authority()}/{_encode(self.export, '/')}{'?' + query if query else ''}"

    def _authority(self) -> str:
        if isinstance(self.address, UnixAddress):
            return ""
        user = "" if self.username is None else _encode(self.username, "") + "@"
        host = self.address.host
        host = f"[{_encode(host, ':')}]" if ":" in host else _encode(host, "")
        return user + host + ("" if self.address.port == DEFAULT_PORT else f":{self.address.port}")


def parse_uri(text: str, option: str = "uri") -> NbdUri:
    """Take an NBD URI apart. A host that is not given is ``localhost``.

    Raises OptionError naming ``option`` and what is wrong.
    """
    def wrong(expected: str) -> OptionError:
        return OptionError(option, text, expected)

    match = re.fullmatch(_URI, text, re.DOTALL)
    if not match or match[1].lower() not in _SCHEMES:
        raise wrong("an NBD URI: nbd://, nbds://, nbd+unix:// or nbds+unix://")
    scheme = match[1].lower()
    if match[5]:
        raise wrong("an NBD URI without a fragment ('#' in a name is written %23)")
    if match[3] and not match[3].startswith("/"):
        raise wrong("an NBD URI whose scheme is followed by '//'")
    try:
        export = _decode(match[3][1:])
        parameters = _parse_query(match[4] or "")
        username, host = _parse_authority(match[2] or "")
        if len(export.encode()) > MAX_STRING or "\0" in export:
            raise ValueError(f"whose export name has at most {MAX_STRING} bytes and no NUL")
        address: Address = host or InetAddress("localhost")
        if scheme.endswith("+unix"):
            if host is not None or username is not None:
                raise ValueError("without user, host and port, as it names a unix socket")
            if parameters.get("socket", "") in ("", "\0"):
                raise ValueError("with the parameter socket=PATH")
            address = UnixAddress(parameters["socket"])
            if "\0" in address.path[1:]:
                raise ValueError("whose socket has a NUL only at its start")
        elif "socket" in parameters:
            raise ValueError("with the scheme nbd+unix or nbds+unix, as it has a parameter socket")
        verify = parameters.get("tls-verify-peer")
        if verify is not None and verify not in _BOOLEANS:
            raise ValueError("whose tls-verify-peer is 0 or 1")
        if parameters.get("tls-type", "x509") not in _TLS_TYPES:
            raise ValueError("whose tls-type is anon, x509 or psk")
    except ValueError as error:
        what = error.args[0] if type(error) is ValueError else "whose names are valid UTF-8"
        raise wrong(f"an NBD URI {what}") from None
    return NbdUri(address, export, scheme.startswith("nbds"),
                  username=parameters.get("tls-username", username),
                  tls_type=parameters.get("tls-type"),
                  tls_hostname=parameters.get("tls-hostname"),
                  tls_verify_peer=None if verify is None else _BOOLEANS[verify],
                  tls_certificates=parameters.get("tls-certificates"),
                  tls_psk_file=parameters.get("tls-psk-file"))


def parse_address(text: str, option: str = "address", default_port: int = DEFAULT_PORT) -> Address:
    """``host:port``, ``host``, ``[v6]:port``, ``:port`` (any), ``unix:PATH``, ``/PATH`` or ``@abstract``.

    Raises OptionError naming ``option``.
    """
    if text.startswith("unix:") and len(text) > 5:
        return UnixAddress("\0" + text[6:] if text.startswith("unix:@") else text[5:])
    if text.startswith("/"):
        return UnixAddress(text)
    if text.startswith("@") and len(text) > 1:
        return UnixAddress("\0" + text[1:])
    match = _AUTHORITY.fullmatch(text)
    if match and match[1] is None and text and match[3] != "":
        port = default_port if match[3] is None else int(match[3])
        if port < 65536:
            return InetAddress(match[2].strip("[]"), port)
    raise OptionError(option, text, "HOST:PORT, [IPV6]:PORT, unix:PATH or an absolute path")


def _parse_authority(text: str) -> tuple[str | None, InetAddress | None]:
    match = _AUTHORITY.fullmatch(text)
    if not match:
        raise ValueError("whose authority is [user@]host[:port], an IPv6 address in brackets")
    host = match[2]
    if host.startswith("[") and ":" not in host:
        raise ValueError("with nothing but an IPv6 address in brackets")
    port = int(match[3]) if match[3] else DEFAULT_PORT
    if not 0 < port < 65536:
        raise ValueError("whose port is 1 to 65535")
    username = None if match[1] is None else _decode(match[1])
    if not host and match[3] is None:
        return username, None
    host = _decode(host.strip("[]"))
    if "\0" in host:
        raise ValueError("whose host has no NUL")
    return username, InetAddress(host or "localhost", port)


def _parse_query(text: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for part in text.split("&") if text else ():
        key, equals, value = part.partition("=")
        if key not in _PARAMETERS:
            raise ValueError(f"with no other parameters than {', '.join(_PARAMETERS)}")
        if not equals or key in parameters:
            raise ValueError(f"with one value for {key}")
        parameters[key] = _decode(value, path=key == "socket")
        if key != "socket" and "\0" in parameters[key]:
            raise ValueError(f"with no NUL in {key}")
    return parameters


def _decode(text: str, path: bool = False) -> str:
    if _BAD_ESCAPE.search(text):
        raise ValueError("in which every % is followed by two hexadecimal digits")
    raw = unquote_to_bytes(text)
    return os.fsdecode(raw) if path else raw.decode()


def _encode(text: str, safe: str) -> str:
    return quote(os.fsencode(text), safe=safe)
