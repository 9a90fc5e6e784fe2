"""A standby in a process: real nodes over storage that can be stopped and made to fail, and the model beside it.

    NAME-secondary   bytes, or a qcow2 image, behind gates          written to by `Disk.primary`
    NAME-hidden      overlay, or qcow2, behind gates, in memory or in a file
    NAME-active      the same
    NAME-filter      replication, mode=secondary
    NAME             quorum, fifo                        used by `Disk.view`

Everything is done as its users do it: through Backends and the registry of replication. What the disks are, all of
them, is `Rig.kind`, which the fixture ``four_disks`` of these tests sets, or random traces draw it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from blockstep.aio.inline import start
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.drivers.overlay import Overlay, OverlayOptions
from blockstep.drivers.qcow2.check import check
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.drivers.replication import Replication, Stage
from blockstep.errors import BlockstepError
from blockstep.jobs.registry import JobRegistry
from blockstep.replication.hidden_disk import HiddenDiskBuffer
from blockstep.replication.registry import ReplicationRegistry
from blockstep.testing import model
from tests.scenario.gates import GatedDisk, GatedImage, Gates, gated_disk
from tests.scenario.qcow2 import GatedQcow2, gated_qcow2

#: Odd on purpose: the last cluster of each kind is a part of one.
LENGTH = 5 * 4096 + 777
#: Of a secondary disk that is an image.
SECONDARY_CLUSTER = 4096

Kind = Literal["overlay", "qcow2"]
#: For random traces: a third of them has images.
KINDS: tuple[Kind, ...] = ("overlay", "overlay", "qcow2")


class GatedOverlay(GatedImage, Overlay):
    """An overlay behind gates."""


async def gated_overlay(graph: Graph, gates: Gates, name: str, backing: str | None, *, owned: bool = True,
                        **options: Any) -> GatedOverlay:
    """An overlay as a node of ``graph``, as `Graph.open` makes one."""
    node = GatedOverlay(name, OverlayOptions(node_name=name, backing=backing, **options))
    node.gates, node.on_event, node.owned = gates, graph.report, owned
    graph.nodes[name] = node
    if backing is not None:
        with graph.change() as change:
            change.attach(node, "backing", Role.BACKING, graph.find(backing))
    await node.open()
    return node


#: The stages, and the two ways to be done.
StageName = Literal["none", "running", "failover", "failover-failed", "stopped", "failed-over"]
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass
class Disk:
    """One disk of the rig."""

    name: str
    secondary: GatedDisk | GatedQcow2
    filter: Replication
    primary: Backend
    view: Backend

    async def read_view(self) -> bytes:
        return bytes(await self.view.pread(0, self.view.length))


@dataclass(frozen=True)
class Shape:
    """How the buffers are made."""

    active_cluster: int = 4096
    hidden_cluster: int = 4096
    directory: Path | None = None  #: overlays in files there, rather than in memory
    owned: bool = True  #: overlays that stay when replication lets go of them
    kind: Kind | None = None  #: what the disks are; None: as `Rig.kind` says


class Rig:
    """Several disks in one process, all behind the same gates."""

    #: What the disks of a standby are.
    kind: Kind = "overlay"

    def __init__(self) -> None:
        self.graph = Graph()
        self.events: list[tuple[str, Any]] = []
        self.jobs = JobRegistry(on_event=lambda name, data: self.events.append((name, data)))
        self.registry = ReplicationRegistry(self.graph, self.jobs)
        self.gates = Gates()
        self.disks: list[Disk] = []
        #: Of all images: what is in them at the moment.
        self._images: list[Callable[[], bytes]] = []

    @classmethod
    async def open(cls, names: Sequence[str] = ("a",), shape: Shape = Shape(), length: int = LENGTH) -> Rig:
        """A rig that has not been started. Each disk begins with a content of its own."""
        rig = cls()
        for number, name in enumerate(names):
            await rig.add(name, initial(number, length), shape)
        return rig

    async def add(self, name: str, content: bytes, shape: Shape = Shape()) -> Disk:
        secondary: GatedDisk | GatedQcow2
        kind = shape.kind or self.kind
        if kind == "qcow2":
            secondary = await self._qcow2(f"{name}-secondary", None, len(content), shape, SECONDARY_CLUSTER)
            await Qcow2.pwrite(secondary, 0, content)
        else:
            secondary = gated_disk(self.graph, self.gates, f"{name}-secondary", content)
        backing = secondary.name
        for part, cluster in (("hidden", shape.hidden_cluster), ("active", shape.active_cluster)):
            file: dict[str, Any] = {}
            if kind == "qcow2":
                await self._qcow2(f"{name}-{part}", backing, len(content), shape, cluster)
            else:
                if shape.directory:
                    file = {"filename": str(shape.directory / f"{name}-{part}.overlay"), "create": True}
                await gated_overlay(self.graph, self.gates, f"{name}-{part}", backing, owned=shape.owned,
                                    cluster_size=cluster, **file)
            backing = f"{name}-{part}"
        filter = await self.graph.open({"driver": "replication", "mode": "secondary", "node-name": f"{name}-filter",
                                        "top-id": name, "file": backing}, owned=shape.owned)
        assert isinstance(filter, Replication)
        top = await self.graph.open({"driver": "quorum", "node-name": name, "vote-threshold": 1,
                                     "read-pattern": "fifo", "children": [filter.name]})
        disk = Disk(name, secondary, filter,
                    self.graph.attach_backend(secondary, f"{name}: primary", READ | WRITE),
                    self.graph.attach_backend(top, f"{name}: guest", READ | WRITE))
        self.disks.append(disk)
        return disk

    async def _qcow2(self, name: str, backing: str | None, length: int, shape: Shape, cluster: int) -> GatedQcow2:
        directory = shape.directory if backing is not None else None
        owned = shape.owned or backing is None
        node, image = await gated_qcow2(self.graph, self.gates, name, backing, length, cluster, directory, owned=owned)
        self._images.append(image)
        return node

    def model(self) -> model.Standby:
        """The model of what is there now, just started."""
        return model.Standby({disk.name: bytes(disk.secondary.data) for disk in self.disks})

    async def add_primary(self, name: str, content: bytes) -> Disk:
        """A disk in primary mode: the filter forwards to a standby that is a plain gated disk."""
        remote = gated_disk(self.graph, self.gates, f"{name}-secondary", content)
        filter = await self.graph.open({"driver": "replication", "mode": "primary", "node-name": f"{name}-filter",
                                        "file": remote.name})
        assert isinstance(filter, Replication)
        guest = self.graph.attach_backend(filter, f"{name}: guest", READ | WRITE)
        disk = Disk(name, remote, filter, guest, guest)
        self.disks.append(disk)
        return disk

    async def enter(self, stage: StageName) -> None:
        """Bring all disks, all in secondary mode and not started, to a stage.

        ``failover`` leaves the secondary disks' gates closed, so that the commit cannot end.
        """
        if stage == "none":
            return
        await self.registry.start_all("secondary")
        for disk in self.disks:  # the hidden disk holds cluster 1, the active disk cluster 2
            await disk.primary.pwrite(4096, b"P" * 4096)
            await disk.view.pwrite(8192, b"V" * 4096)
        if stage == "failover":
            self.gates.close(*(disk.secondary.name for disk in self.disks))
        elif stage == "failover-failed":
            for disk in self.disks:
                self.gates.fail(disk.secondary.name, "write", always=True)
        if stage != "running":
            await self.registry.stop_all(stage != "stopped")
        if stage != "failover":
            await self.merged()
            self.gates.heal()

    async def merged(self) -> list[Exception | None]:
        """Wait for the failover commits. Returns their errors."""
        errors = [await job.wait() for job in self.jobs.list()]
        for disk in self.disks:
            if isinstance(disk.filter.buffer, HiddenDiskBuffer) and disk.filter.stage is Stage.FAILOVER:
                await disk.filter.buffer.merged()
        return errors

    async def close(self) -> None:
        """Close everything, from any state."""
        self.gates.heal()
        self.gates.open()
        if all(disk.filter.stage is Stage.RUNNING for disk in self.disks):
            await self.registry.stop_all(False)
        await self.merged()
        for disk in self.disks:
            for user in {id(user): user for user in (disk.primary, disk.view)}.values():
                await self.graph.detach_backend(user)
        while roots := [node for node in self.graph.nodes.values() if not node.parents]:
            for node in roots:
                await self.graph.close(node)
        assert not self.graph.nodes
        for image in self._images:  # closed in order, and no file has failed
            data = image()
            result = check(lambda offset, length, data=data: data[offset:offset + length], len(data))  # type: ignore[misc]
            assert result.clean, result


def initial(number: int, length: int = LENGTH) -> bytes:
    """A content in which each byte and each disk differs from its neighbours."""
    return bytes((index * 13 + index // 256 + number * 101) & 0xFF for index in range(length))


class Request:
    """A request, or an operation of the registry, that was started and may have ended."""

    def __init__(self, coroutine: Awaitable[Any], then: Callable[[Any, BaseException | None], None] | None = None):
        self.ended = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._then = then
        start(coroutine, self._done)  # type: ignore[arg-type]

    def _done(self, value: Any, error: BaseException | None) -> None:
        self.ended, self.value, self.error = True, value, error
        if self._then:
            self._then(value, error)


async def error_of(operation: Awaitable[Any]) -> OSError | BlockstepError | None:
    """How a request or operation failed, or None."""
    try:
        await operation
    except (OSError, BlockstepError) as error:
        return error
    return None


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Play a scenario in an event loop of its own."""
    asyncio.run(scenario())
