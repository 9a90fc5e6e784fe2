"""How `graph` and `shell` find the monitor that they talk to: any QMP server, a pair's, a daemon's or QEMU's."""

from __future__ import annotations

import os
from pathlib import Path

from blockstep.cli.control import find_socket
from blockstep.cli.words import Option
from blockstep.errors import OptionError
from blockstep.forms import Annotated
from blockstep.nbd.uri import UnixAddress, parse_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

    from blockstep.qmp.client import Address

Socket = Annotated[str | None, Option(
    "--socket", "--qmp", metavar="ADDRESS", help="The QMP socket of a daemon, of a pair's program or of QEMU: a path, "
    "or HOST:PORT. Without it: the pair's of this host.")]
MonitorTls = Annotated[Path | None, Option(
    "--tls", metavar="DIR", help="Speak TLS with HOST:PORT; DIR holds ca-cert.pem, and if the server asks for them "
    "client-cert.pem and client-key.pem.")]


def find_monitor(pair: str | None, address: str | None, tls: Path | None) -> tuple[Address, ssl.SSLContext | None]:
    """The address that is meant, and the TLS context if there is to be one. Raises OptionError."""
    if address is None:
        return find_socket(pair, None, None), None
    if "/" in address or os.path.exists(address):
        return Path(address.removeprefix("unix:")), None
    found = parse_address(address, "--socket", default_port=0)
    if isinstance(found, UnixAddress):
        return found.path, None
    if not found.port:
        raise OptionError("--socket", address, "the path of a socket that is there, or HOST:PORT")
    if tls is None:
        return (found.host or "localhost", found.port), None
    from blockstep.nbd.tls import client_context

    return (found.host or "localhost", found.port), client_context(tls, option="--tls")
