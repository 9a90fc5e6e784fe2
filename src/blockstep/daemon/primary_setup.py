"""What a primary was told, and the disks that it opens.

For each disk NAME, once opened:

    guest's export ──► NAME (link) ──file──► NAME-disk (file, or a format over NAME-disk-file)
                          └──target──► NAME-standby (nbd), while there is a standby
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from blockstep.daemon.disks import DiskSpec
from blockstep.drivers.nbd import Nbd
from blockstep.nbd.uri import Address, InetAddress
from blockstep.replication.catch_up import CatchUp
from blockstep.replication.link import Link


class PrimaryConfig(msgspec.Struct, frozen=True):
    """What ``blockstep primary`` was told. Times in seconds, sizes in bytes."""

    pair: str
    disks: tuple[DiskSpec, ...]
    standby: InetAddress
    export: Address
    qmp: Path
    #: Where an end in good order is written down; see `blockstep.daemon.good_end`.
    state: Path
    ack: Literal["local", "both"] = "local"
    #: Bytes of writes that may wait for the standby, for each disk.
    queue: int = 64 << 20
    max_stall: float = 2.0
    #: When a checkpoint is due (0: never by this).
    checkpoint_every: float = 5.0
    checkpoint_bytes: int = 256 << 20
    #: A directory with certificates: the standby is spoken to with TLS only.
    tls: Path | None = None
    #: A directory with certificates: guests must speak TLS, and have a certificate of the same CA.
    export_tls: Path | None = None
    #: The user said where to serve: sockets that systemd passes are not looked at.
    export_given: bool = True


class PrimaryDisk(msgspec.Struct):
    """One disk, opened."""

    spec: DiskSpec
    link: Link
    backend: Backend
    #: Connections to the standby: for the link, with the deadline; for syncs and flushes.
    standby: Nbd | None = None
    sync: Nbd | None = None
    #: The sync that runs, and what it is to copy (None: everything).
    job: CatchUp | None = None
    bitmap: DirtyBitmap | None = None
    #: After a resize that failed: what could not be taken back on the standby.
    wrong: str = ""

    @property
    def reasons(self) -> list[str]:
        """What is the matter with it, as far as it is not what others have done to its file."""
        trouble = self.link.trouble
        return [*filter(None, [self.wrong]), *([f"{self.spec.path}: {trouble.strerror or trouble}"] if trouble else [])]


async def open_disk(graph: Graph, config: PrimaryConfig, spec: DiskSpec) -> PrimaryDisk:
    """Open a disk; its link is off. Raises OSError or OptionError."""
    await spec.make()
    await spec.open(graph, f"{spec.name}-disk")
    link = await graph.open(
        {"driver": "link", "node-name": spec.name, "file": f"{spec.name}-disk", "ack": config.ack,
         "queue": config.queue})
    assert isinstance(link, Link)
    return PrimaryDisk(spec, link, graph.attach_backend(link, f"guest's {spec.name}", READ | WRITE))
