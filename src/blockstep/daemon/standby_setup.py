"""What a standby was told, and the disks that it opens.

For each disk NAME, once opened:

    link server ──► NAME-secondary ◄── NAME-hidden ◄── NAME-active ◄── NAME-filter ◄── NAME ──► view server
    (for the primary)   file            overlay          overlay       replication    quorum   (for a guest)

The first commit of a primary puts copy-before-write over NAME-secondary: see `blockstep.replication.hidden_disk`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from blockstep.daemon.disks import DiskSpec
from blockstep.drivers.replication import Replication
from blockstep.nbd.uri import Address, InetAddress
from blockstep.replication.hidden_disk import HiddenDiskBuffer


@dataclass(frozen=True, slots=True)
class StandbyConfig:
    """What ``blockstep standby`` was told."""

    pair: str
    disks: tuple[DiskSpec, ...]
    #: Where the primary connects to; the control port is one above.
    link: InetAddress
    #: Where a guest finds the views.
    view: Address
    qmp: Path
    #: Where a promotion is written down; see `blockstep.daemon.promotion`.
    state: Path
    #: Bytes that the buffers of one disk may hold in memory, and where they spill to (None: then they are full).
    buffer_memory: int
    buffer_dir: Path | None
    #: A directory with certificates: TLS is required of the primary, both sides are verified.
    tls: Path | None = None
    #: Likewise for those who use the views.
    view_tls: Path | None = None
    #: The user said where to serve the views: sockets that systemd passes are not looked at.
    view_given: bool = True

    @property
    def buffer_limit(self) -> int:
        """Bytes that the buffer of a disk takes between two checkpoints; 0: there is no limit."""
        return 0 if self.buffer_dir else self.buffer_memory


@dataclass(slots=True)
class StandbyDisk:
    """One disk, opened."""

    spec: DiskSpec
    filter: Replication
    view: Backend
    link: Backend | None = None
    errors: list[str] = field(default_factory=list)
    #: Its length before it grew last: a primary whose disk could not follow may have it back.
    former_length: int | None = None

    @property
    def buffer(self) -> HiddenDiskBuffer | None:
        return self.filter.buffer if isinstance(self.filter.buffer, HiddenDiskBuffer) else None


async def open_disk(graph: Graph, config: StandbyConfig, spec: DiskSpec) -> StandbyDisk:
    """Open a disk with its buffers and its view, not started. Raises OSError or OptionError."""
    spec.make()
    name = spec.name
    secondary = await graph.open(
        {"driver": "file", "node-name": f"{name}-secondary", "filename": str(spec.path), "discard": "unmap"})
    limits: dict[str, Any] = {"memory-limit": config.buffer_memory}
    if config.buffer_dir:
        limits["spill-dir"] = str(config.buffer_dir)
    backing: Any = secondary.name
    for part in ("hidden", "active"):
        await graph.open({"driver": "overlay", "node-name": f"{name}-{part}", "backing": backing, **limits})
        backing = f"{name}-{part}"
    top = await graph.open({
        "driver": "quorum", "node-name": name, "vote-threshold": 1, "read-pattern": "fifo",
        "children": [{"driver": "replication", "node-name": f"{name}-filter", "mode": "secondary",
                      "top-id": name, "file": backing}]})
    filter = graph.find(f"{name}-filter")
    assert isinstance(filter, Replication)
    return StandbyDisk(spec, filter, graph.attach_backend(top, f"view of {name}", READ | WRITE))
