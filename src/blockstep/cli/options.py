"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from blockstep.cli.words import Option
from blockstep.errors import OptionError
from blockstep.forms import Annotated
from blockstep.nbd.uri import Address, InetAddress, UnixAddress, parse_address
from blockstep.places import runtime_directory
from blockstep.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeVar

    from blockstep.daemon.disks import DiskSpec

    T = TypeVar("T", int, float)


_PAIR: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DISK_OPTION: Final = re.compile(r"(.*),(size|format)=([^,]*)", re.DOTALL)
_OTHER_OPTION: Final = re.compile(r".*,([a-z][a-z-]*)=[^,/]*", re.DOTALL)
_LAST_PORT: Final = 65535

Pair = Annotated[str, Option("--pair", metavar="NAME", help="The pair's name; the same on both sides.")]
Disks = Annotated[
    list[str],
    Option("--disk", metavar="NAME=PATH[,format=FMT][,size=SIZE]", help="A disk: its name in the pair and its "
           "file or block device; its format: raw (the default), qcow2 or overlay. With size, a missing file is "
           "made. May be given several times."),
]
Socket = Annotated[Path | None, Option("--socket", metavar="PATH", help="Serve the disks on a unix socket.")]
Listen = Annotated[str | None, Option("--listen", metavar="HOST:PORT", help="Serve the disks on TCP.")]
Qmp = Annotated[Path | None, Option("--qmp", metavar="PATH", help="The control socket.")]
Tls = Annotated[
    Path | None,
    Option("--tls", metavar="DIR", help="Require TLS between the two sides; DIR holds ca-cert.pem and the "
           "side's certificate and key, named as QEMU names them."),
]
ExportTls = Annotated[
    Path | None,
    Option("--export-tls", metavar="DIR", help="Require TLS of those who use the disks; DIR holds ca-cert.pem, "
           "server-cert.pem and server-key.pem. They need a certificate of the same CA."),
]


def parse_pair(name: str) -> str:
    """The name of a pair: sockets are named after it. Raises OptionError."""
    if not _PAIR.fullmatch(name):
        raise OptionError("--pair", name, "1 to 64 letters, digits, '-', '.' and '_', beginning with a letter or digit")
    return name


def parse_disks(texts: list[str]) -> tuple[DiskSpec, ...]:
    """``NAME=PATH[,format=FORMAT][,size=SIZE]``, several. Raises OptionError."""
    from blockstep.block.names import check_name
    from blockstep.daemon.disks import DiskSpec, check_format  # with all that disks need: not for the help

    disks: dict[str, DiskSpec] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        options: dict[str, str] = {}
        while match := _DISK_OPTION.fullmatch(path):  # from the end: a path may have commas
            path, option, value = match.groups()
            if option in options:
                raise OptionError("--disk", text, f"with '{option}' at most once")
            options[option] = value
        if not equals or not name or not path:
            raise OptionError("--disk", text, "NAME=PATH, NAME=PATH,format=FORMAT or NAME=PATH,format=FORMAT,size=SIZE")
        other = _OTHER_OPTION.fullmatch(path)
        if other and not Path(path).exists():
            raise OptionError("--disk", text, f"without '{other[1]}': the options are format and size, and there is no "
                              f"file '{path}'")
        check_name("--disk", name)
        if name in disks:
            raise OptionError("--disk", text, f"one disk for each name; '{name}' was given twice")
        size = parse_size(options["size"], "--disk size") if options.get("size") else None
        disks[name] = DiskSpec(name, Path(path), size, check_format(options.get("format", "raw")))
    if not disks:
        raise OptionError("--disk", None, "given at least once: NAME=PATH")
    return tuple(disks.values())


def parse_served(socket: Path | None, listen: str | None, default: str) -> Address:
    """Where disks are served: ``--socket`` or ``--listen``, or a socket named ``default`` in the runtime directory."""
    if socket is not None and listen is not None:
        raise OptionError("--listen", listen, "left out when --socket is given")
    if listen is not None:
        return parse_address(listen, "--listen")
    return UnixAddress(str((socket or runtime_directory() / default).absolute()))


def parse_inet(text: str, option: str) -> InetAddress:
    """``HOST[:PORT]`` of a link, which has the port above it as well. Raises OptionError."""
    address = parse_address(text, option)
    if not isinstance(address, InetAddress):
        raise OptionError(option, text, "HOST:PORT or [IPV6]:PORT")
    if address.port == _LAST_PORT:
        raise OptionError(option, text, f"an address with a port below {_LAST_PORT}: the one above it is needed too")
    return address


def parse_positive(text: str, option: str, parse: Callable[[str, str], T]) -> T:
    """A size or a time that cannot be 0. Raises OptionError."""
    value = parse(text, option)
    if not value:
        raise OptionError(option, text, "more than 0")
    return value
