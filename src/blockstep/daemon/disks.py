"""What standby and primary have in common: how a disk is named, where it is served, how long work is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from blockstep.block.graph import Graph
from blockstep.daemon.service import make_parent
from blockstep.errors import OptionError
from blockstep.images import FORMATS
from blockstep.images.opened import ImageName
from blockstep.jobs.job import Job
from blockstep.nbd.server import Server, passed_sockets
from blockstep.nbd.uri import Address, InetAddress, NbdUri, UnixAddress
from blockstep.qmp.commands.replication import Health, WorkStatus


class DiskSpec(msgspec.Struct, frozen=True):
    """A disk as the user names it: ``NAME=PATH[,format=FORMAT][,size=SIZE]``.

    ``format``: raw, qcow2 or overlay; it is never guessed. ``size``: a missing file is made, in that format, with
    that length.
    """

    name: str
    path: Path
    size: int | None = None
    format: str = "raw"

    async def make(self) -> None:
        """Make the file if it is missing and a size was given. Raises OSError or OptionError."""
        if self.size is not None and not self.path.exists():
            from blockstep.images.create import Creation, create

            await create(await Creation(self.format, str(self.path), self.size).checked())

    async def open(self, graph: Graph, node_name: str) -> None:
        """Open it for writing, as a node with that name. Raises OSError, or an OptionError that names the disk.

        A format has its file in a node of its own: NODE-NAME-file.
        """
        options = await ImageName(os.path.abspath(self.path), self.format).node_options(writable=True)
        file: dict[str, Any] | None = options.get("file")
        if file is not None and self.format != "overlay":  # whose file is its own business
            file["node-name"] = f"{node_name}-file"
        try:
            await graph.open({**options, "node-name": node_name})
        except OptionError as error:
            wanted = error.expected
            if error.option.endswith("read-only"):
                wanted = f"an image that can be written to: {wanted.partition(': ')[2] or wanted}"
            raise OptionError(f"--disk {self.name}", f"{self.path} ({self.format})", wanted) from error
        except FileNotFoundError as error:
            if not self.path.exists():
                error.add_note("a missing file of a disk is made if its size is given: "
                               f"--disk {self.name}={self.path},size=SIZE")
            raise


def missing_last(disks: Sequence[DiskSpec]) -> list[DiskSpec]:
    """The order in which to open disks: what one of them is refused for comes before any file is made."""
    return sorted(disks, key=lambda disk: disk.size is not None and not disk.path.exists())


def check_format(text: str) -> str:
    """The format of a disk. Raises OptionError."""
    if text not in FORMATS:
        raise OptionError("--disk format", text, f"one of {', '.join(FORMATS)}")
    return text


async def listen(server: Server, address: Address) -> Address:
    """Let an NBD server listen at an address. Returns it with the port that port 0 became. Raises OSError."""
    if isinstance(address, UnixAddress):
        make_parent(Path(address.path))
        await server.start_unix(address.path)
    else:
        (_, port), *_ = await server.start_tcp(address.host or None, address.port)
        return InetAddress(address.host, port)
    return address


async def serve(server: Server, address: Address, given: bool) -> list[Address]:
    """Let an NBD server listen for guests: at ``address`` if the user has given it, else on what systemd passes.

    If systemd passes no sockets, at ``address`` as well. Returns where it listens. Raises OSError, or OptionError for
    a passed descriptor that is no listening socket.
    """
    passed = [] if given else passed_sockets()
    if not passed:
        return [await listen(server, address)]
    addresses = [_address_of(fd) for fd in passed]
    for fd in passed:
        server.start_fd(fd)
    return [address for address in addresses if address is not None]


def _address_of(fd: int) -> Address | None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        name = sock.getsockname()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            return InetAddress(name[0], name[1])
        return UnixAddress(name) if isinstance(name, str) and name else None  # abstract ones have no place in a URI


def uris(addresses: Sequence[Address], names: Iterable[str], tls: bool) -> list[str]:
    """The NBD URIs of exports at each address. ``tls``: they demand it."""
    return [str(NbdUri(address, name, tls=tls)) for name in names for address in addresses]


def with_faults(health: tuple[Health, str], faults: list[str]) -> tuple[Health, str]:
    """A health and its reason, for a pair some files of which have ``faults``, on this side or the other."""
    _, reason = health
    news = [fault for fault in faults if fault not in reason]
    return ("at-risk", "; ".join(filter(None, [*news, reason]))) if faults else health


def with_expiring(health: tuple[Health, str], certificates: list[str]) -> tuple[Health, str]:
    """A health and its reason, for a program some ``certificates`` of which expire."""
    how, reason = health
    if not certificates:
        return health
    return "degraded" if how == "healthy" else how, "; ".join(filter(None, [reason, *certificates]))


def work_status(kind: Literal["sync", "resync", "failover"], jobs: Sequence[Job]) -> WorkStatus:
    """Several jobs as one work."""
    current, total = sum(job.current for job in jobs), sum(job.total for job in jobs)
    speed = sum(job.rate or 0.0 for job in jobs)
    left = (total - current) / speed if speed else -1.0
    return WorkStatus(kind=kind, current=current, total=total, speed=speed, time_left=left)
