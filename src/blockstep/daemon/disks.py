"""What standby and primary have in common: how a disk is named, where it is served, how long work is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blockstep.daemon.service import make_parent
from blockstep.jobs.job import Job
from blockstep.nbd.server import Server
from blockstep.nbd.uri import Address, InetAddress, UnixAddress
from blockstep.qmp.commands.replication import WorkStatus


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A disk as the user names it: ``NAME=PATH[,size=SIZE]``. ``size``: make a missing file of that length."""

    name: str
    path: Path
    size: int | None = None

    def make(self) -> None:
        """Make the file if it is missing and a size was given. Raises OSError."""
        if self.size is not None and not self.path.exists():
            with open(self.path, "xb") as file:
                file.truncate(self.size)


async def listen(server: Server, address: Address) -> Address:
    """Let an NBD server listen at an address. Returns it with the port that port 0 became. Raises OSError."""
    if isinstance(address, UnixAddress):
        make_parent(Path(address.path))
        await server.start_unix(address.path)
    else:
        (_, port), *_ = await server.start_tcp(address.host or None, address.port)
        return InetAddress(address.host, port)
    return address


def work_status(kind: Literal["sync", "resync", "failover"], jobs: Sequence[Job]) -> WorkStatus:
    """Several jobs as one work."""
    current, total = sum(job.current for job in jobs), sum(job.total for job in jobs)
    speed = sum(job.rate or 0.0 for job in jobs)
    left = (total - current) / speed if speed else -1.0
    return WorkStatus(kind=kind, current=current, total=total, speed=speed, time_left=left)
