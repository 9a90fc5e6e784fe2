"""What a standby was told, and the disks that it opens.

For each disk NAME, once opened:

    link server ──► NAME-secondary ◄── NAME-hidden ◄── NAME-active ◄── NAME-filter ◄── NAME ──► view server
    (for the primary)   file or       overlay or       overlay or     replication    quorum   (for a guest)
                        a format      qcow2            qcow2

The first commit of a primary puts copy-before-write over NAME-secondary: see `blockstep.replication.hidden_disk`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from blockstep.aio.pool import in_thread, made_in_thread
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from blockstep.daemon.disks import DiskSpec
from blockstep.drivers.replication import DiskBuffer, Replication, Stage
from blockstep.errors import OptionError
from blockstep.nbd.uri import Address, InetAddress
from blockstep.replication.resize import unevenness

#: Of buffers that are qcow2 images, in bytes: a first write of 4 KiB saves no more than that. L1 tables have an end
#: (8 TiB with clusters of 4 KiB), so that disks from half of that on have other ones.
_BUFFER_CLUSTER: Final = 4096
_LARGE_BUFFER_CLUSTER: Final = 65536
_MOST_IN_SMALL_CLUSTERS: Final = 4 << 40

#: What the names of the buffers of a disk end with, the upper one first.
BUFFERS: Final = ("-active", "-hidden")


class StandbyConfig(msgspec.Struct, frozen=True):
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
    #: What the buffers are made of; qcow2: files in the directory, with nothing but caches in memory.
    buffer_format: Literal["overlay", "qcow2"] = "overlay"
    #: A directory with certificates: TLS is required of the primary, both sides are verified.
    tls: Path | None = None
    #: Likewise for those who use the views.
    view_tls: Path | None = None
    #: The user said where to serve the views: sockets that systemd passes are not looked at.
    view_given: bool = True


class StandbyDisk(msgspec.Struct):
    """One disk, opened."""

    spec: DiskSpec
    filter: Replication
    view: Backend
    link: Backend | None = None
    #: The name under which the primary that is attached finds it.
    link_name: str = ""
    errors: list[str] = msgspec.field(default_factory=list)
    #: What the primary's disk had when that was last heard of: what has grown beyond may be taken back.
    primary_length: int = 0

    def __post_init__(self) -> None:
        self.primary_length = self.view.length

    @property
    def wrong(self) -> list[str]:
        """What is the matter with it; the first is the most important."""
        uneven = unevenness(self.filter) if self.filter.stage in (Stage.NONE, Stage.RUNNING) else ""
        return [uneven, *self.errors] if uneven else self.errors

    @property
    def buffer(self) -> DiskBuffer | None:
        return self.filter.buffer


async def open_disk(graph: Graph, config: StandbyConfig, spec: DiskSpec) -> StandbyDisk:
    """Open a disk with its buffers and its view, not started. Raises OSError or OptionError."""
    await spec.make()
    await in_thread(_forget_cached, spec.path)
    name = spec.name
    below = f"{name}-secondary"
    await spec.open(graph, below)
    for end in reversed(BUFFERS):
        await _open_buffer(graph, config, f"{name}{end}", below)
        below = f"{name}{end}"
    top = await graph.open({
        "driver": "quorum", "node-name": name, "vote-threshold": 1, "read-pattern": "fifo",
        "children": [{"driver": "replication", "node-name": f"{name}-filter", "mode": "secondary",
                      "top-id": name, "file": below}]})
    filter = graph.find(f"{name}-filter")
    assert isinstance(filter, Replication)
    return StandbyDisk(spec, filter, graph.attach_backend(top, f"view of {name}", READ | WRITE))


def _forget_cached(path: Path) -> None:
    """Have a file read from where it is stored.

    What the kernel could not write may stay in its cache as if it had been: a process that was told so has ended
    (`blockstep.drivers.file`), and a comparison with the primary would find on the disk what is not there.
    """
    with contextlib.suppress(OSError):  # whoever opens it next says what is wrong with it
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


async def close_buffers(graph: Graph, spec: DiskSpec) -> None:
    """Close the buffers of a disk that are not used any more: what they hold takes room, and is nobody's.

    So it is no error either if it cannot be put in order, where there is no room for that.
    """
    for end in BUFFERS:
        node = graph.nodes.get(f"{spec.name}{end}")
        if node and not node.parents:
            with contextlib.suppress(OSError):
                await graph.close(node)


def _empty_file(directory: Path, prefix: str) -> str:
    import tempfile

    fd, filename = tempfile.mkstemp(".qcow2", prefix, directory)
    os.close(fd)
    return filename


async def _open_buffer(graph: Graph, config: StandbyConfig, node_name: str, below: str) -> None:
    """The hidden or the active disk. It holds nothing yet, and is gone with the process, however that ends."""
    if config.buffer_format == "overlay":
        limits: dict[str, Any] = {"memory-limit": config.buffer_memory}
        if config.buffer_dir:
            limits["spill-dir"] = str(config.buffer_dir)
        await graph.open({"driver": "overlay", "node-name": node_name, "backing": below, **limits})
        return
    from blockstep.drivers.create import CreateQcow2

    if config.buffer_dir is None or not config.buffer_dir.is_dir():
        raise OptionError("--buffer-dir", config.buffer_dir, "a directory, for buffers that are images")
    length = graph.find(below).length
    cluster_size = _BUFFER_CLUSTER if length <= _MOST_IN_SMALL_CLUSTERS else _LARGE_BUFFER_CLUSTER
    filename = await made_in_thread(os.unlink, _empty_file, config.buffer_dir, f".{config.pair}-{node_name}-")
    try:
        await in_thread(CreateQcow2(filename=filename, size=length, cluster_size=cluster_size).create)
        # Nothing of it outlives the process: there is nobody for whom it would have to be on the disk.
        await graph.open({
            "driver": "qcow2", "node-name": node_name, "backing": below, "discard": "unmap",
            "cache": {"no-flush": True},
            "file": {"driver": "file", "node-name": f"{node_name}-file", "filename": filename}})
    finally:
        os.unlink(filename)
