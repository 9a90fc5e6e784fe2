"""A primary and a standby as their programs compose them, in one process, with a network and disks that fail.

    guest ──unix socket──► Primary ──tcp──► Proxy ──tcp──► Standby ◄──unix socket── guest of the view
                              │                               │
                    NAME-disk: blkdebug             NAME-secondary: blkdebug
                       over the disk                   over the disk

Everything but time is real: sockets, threads, files. Time is that of `blockstep.testing.clock`. What a test has to
know of the programs' insides is here: when links are marked, when views move, what a disk holds behind its faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.primary import Primary, PrimaryConfig
from blockstep.daemon.service import Service
from blockstep.daemon.standby import Standby, StandbyConfig
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.errors import BlockstepError
from blockstep.images.opened import ImageName
from blockstep.nbd.client import Client
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.schema import Event
from blockstep.replication.link import GRANULARITY
from blockstep.testing.processes import free_ports
from blockstep.testing.proxy import Proxy
from tests.scenario import pair_model as model

MAX_STALL = 2.0
#: What sync and resync may send beyond what they copy, in bytes: headers, and the control connection.
OVERHEAD = 64 << 10


@dataclass(frozen=True)
class Shape:
    """What the pair is. Sizes in bytes, times in seconds."""

    sizes: tuple[int, ...] = ((1 << 20) + 777, 200_001)
    format: Literal["raw", "qcow2"] = "raw"
    faulty: bool = True  #: disks can be made to fail
    ack: Literal["local", "both"] = "local"
    queue: int = 1 << 20
    buffer: int = 16 << 20
    every: float = 0.0

    @property
    def ample(self) -> bool:
        """Whether the buffers have room for whatever comes."""
        return self.buffer > 2 * max(self.sizes)


class FaultyDisk(DiskSpec):
    """A disk whose node is a blkdebug over the disk itself, NAME-image."""

    async def open(self, graph: Graph, node_name: str) -> None:
        image = await ImageName(os.path.abspath(self.path), self.format).node_options(writable=True)
        await graph.open({"driver": "blkdebug", "node-name": node_name,
                          "file": {**image, "node-name": f"{node_name}-image"}})


class World:
    """The pair and its model. Use `open` and `close`."""

    def __init__(self, directory: Path, shape: Shape) -> None:
        self.directory, self.shape = directory, shape
        self.names = "abc"[:len(shape.sizes)]
        self.proxy = Proxy("127.0.0.1", free_ports(2))
        #: Where the disks and notes of the primary are, and those of the standby.
        self.hosts = [directory / "one", directory / "two"]
        self.clients: dict[tuple[model.Side, str], Client] = {}
        self.primary_running = self.standby_running = False
        #: What each of them has announced last.
        self.announced: dict[str, qmp.ReplicationState] = {}
        #: A disk of the primary that runs has failed: until the next start it keeps no books.
        self.has_failed = False
        #: Bytes that a resync may have sent so far, and what the proxy had carried when it began; None: none runs.
        self._resync: tuple[int, int] | None = None
        self._written = 0

    # --- start and stop ---

    async def open(self) -> None:
        """Fill the disks, and start both programs: a standby with something else on its disks."""
        rnd = random.Random(5)
        for host in self.hosts:
            host.mkdir()
        contents: dict[str, bytes] = {}
        for name, size in zip(self.names, self.shape.sizes, strict=True):
            if self.shape.format == "qcow2":
                size += -size % 512  # as the format has it
            content = bytearray(rnd.randbytes(size) if self.shape.format == "raw" else bytes(size))
            content[70_000:150_000] = bytes(len(content[70_000:150_000]))  # a hole
            contents[name] = bytes(content)
            if self.shape.format == "raw":
                self.path(name, "primary").write_bytes(content)
                self.path(name, "standby").write_bytes(content[:size // 2][::-1] + content[size // 2:])
        self.model = model.Pair(contents)
        await self.start_standby()
        await self.proxy.__aenter__()
        await self.start_primary()

    def path(self, name: str, side: Literal["primary", "standby"]) -> Path:
        """The file of a disk."""
        return self.hosts[side == "standby"] / f"{name}.img"

    def _disk(self, name: str, side: Literal["primary", "standby"]) -> DiskSpec:
        kind = FaultyDisk if self.shape.faulty else DiskSpec
        return kind(name, self.path(name, side), len(self.model.disks[name].primary.data), self.shape.format)

    async def start_standby(self) -> None:
        """Raises OptionError if it has been promoted."""
        loop = asyncio.get_running_loop()
        images = self.shape.format == "qcow2"
        self.standby = Standby(StandbyConfig(
            pair="p", disks=tuple(self._disk(name, "standby") for name in self.names),
            link=InetAddress("127.0.0.1", self.proxy.target_port), view=UnixAddress(str(self.directory / "view")),
            qmp=self.directory / "standby.qmp", state=self.hosts[1] / "p.promoted",
            buffer_memory=self.shape.buffer, buffer_dir=self.directory if images else None,
            buffer_format="qcow2" if images else "overlay"), loop.time)
        self._listen(self.standby, "standby")
        await self.standby.open()
        self.proxy.target_port = self.standby.link.port
        self.standby_running = True
        _after(self.standby.registry, "start_all", self.model.commit)
        _after(self.standby.registry, "checkpoint_all", self.model.commit)
        _around(self.standby.registry, "give_up_all", self.model.begin_give_up, self.model.end_give_up)
        await self._dial("view", "view")

    async def start_primary(self) -> None:
        shape = self.shape
        self.primary = Primary(PrimaryConfig(
            pair="p", disks=tuple(self._disk(name, "primary") for name in self.names),
            standby=InetAddress("127.0.0.1", self.proxy.port), export=UnixAddress(str(self.directory / "export")),
            qmp=self.directory / "primary.qmp", state=self.hosts[0] / "p.ended", ack=shape.ack, queue=shape.queue,
            max_stall=MAX_STALL, checkpoint_every=shape.every, checkpoint_bytes=0), asyncio.get_running_loop().time)
        self.has_failed = False
        self._listen(self.primary, "primary")
        await self.primary.open()
        self.primary_running = True
        links = [disk.link for disk in self.primary.disks.values()]
        _before(links[0], "mark", self.model.mark)
        for name, disk in self.primary.disks.items():
            _before(disk.link, "settled", self.model.disks[name].settled)
            _before(disk.link, "switch_on", self.model.disks[name].synced)
            _after(disk.link, "truncate", partial(self._grown, name))
        _before(self.primary.sync, "begin", self._sync_begins)
        _after(self.primary.sync, "ended", self._synced)
        await self._dial("guest", "export")

    def _listen(self, program: Service, name: str) -> None:
        self.announced.pop(name, None)

        def heard(event: Event) -> None:
            if isinstance(event, qmp.ReplicationState):
                self.announced[name] = event
            elif isinstance(event, qmp.ReplicationIoError) and name == "primary":
                self.has_failed = True

        _before(program, "emit", heard)

    async def _dial(self, side: model.Side, socket: str) -> None:
        for name in self.names:
            self.clients[side, name] = await Client.connect(UnixAddress(str(self.directory / socket)), name)

    async def _hang_up(self, side: model.Side) -> None:
        for name in self.names:
            if client := self.clients.pop((side, name), None):
                client.yank()

    async def stop_primary(self) -> None:
        """In good order. Its guests' requests must have ended. Raises OSError of a disk."""
        if self.primary_running:
            self.primary_running = False
            await self._hang_up("guest")
            await self.primary.close()

    async def stop_standby(self) -> None:
        """In good order. Raises ReplicationError if a disk is torn, OSError of a disk."""
        if self.standby_running:
            self.standby_running = False
            await self._hang_up("view")
            await self.standby.close()

    async def crash_standby(self) -> None:
        """It ends as if it were killed: nothing is merged or written down. What it had in flight may be done."""
        if self.standby_running:
            self.standby_running = False
            await self._hang_up("view")

            async def no_merge() -> list[Exception]:
                with contextlib.suppress(BlockstepError, OSError):
                    await self.standby.registry.give_up_all()
                return []

            async def no_end() -> None:
                return None

            self.standby.ends.close = no_merge  # type: ignore[method-assign]
            self.standby._end = no_end  # type: ignore[method-assign]
            with contextlib.suppress(BlockstepError, OSError):
                await self.standby.close()

    async def crash_primary(self) -> None:
        """It ends as if it were killed, but that the kernel has what it was told in between."""
        if self.primary_running:
            self.primary_running = False
            await self._hang_up("guest")
            primary = self.primary

            async def dead() -> qmp.Committed:
                raise BlockstepError("the primary is dead")

            async def no_forgetting() -> None:
                await primary.ledger._pulse.close()

            primary.checkpoint = dead  # type: ignore[method-assign]
            primary._end = lambda: None  # type: ignore[method-assign]
            primary.ledger.close = no_forgetting  # type: ignore[method-assign]
            with contextlib.suppress(BlockstepError, OSError):
                await primary.close()

    @property
    def keeps_books(self) -> bool:
        """Whether what the standby may lack outlives the primary."""
        return (self.directory / "p.lacks").exists()

    @property
    def follows(self) -> bool:
        """Whether the standby's host knows whom its disks follow."""
        return (self.hosts[1] / "p.follows").exists()

    async def turn_round(self) -> None:
        """Exchange the roles of the two hosts. Both programs have ended; a promotion is not to be remembered."""
        self.hosts.reverse()
        (self.hosts[0] / "p.promoted").unlink(missing_ok=True)
        await self.start_standby()
        await self.start_primary()

    async def close(self) -> None:
        """End everything that runs. Raises what the programs raise."""
        self.heal_disks()
        try:
            await self.stop_primary()
        finally:
            try:
                await self.stop_standby()
            finally:
                await self.proxy.__aexit__(None, None, None)

    def _grown(self, name: str) -> None:
        self.model.view_written()  # what is new in the view counts as that
        self.model.disks[name].resize(self.primary.disks[name].link.length)

    # --- syncs copy the difference, and no more ---

    def _sync_begins(self, full: bool) -> None:
        assert full is not self.model.known, f"full={full}, and it is known what the standby lacks: {self.model.known}"
        self._resync = None
        if not full:
            copied = 0
            for name, disk in self.primary.disks.items():
                modelled = self.model.disks[name]
                may = modelled.since | modelled.closing
                lacks = {bit for bitmap in (disk.link.since, disk.link.closing) for bit in bitmap.bits.search(1)}
                assert lacks <= may, f"a resync of {name} copies clusters {sorted(lacks - may)} for nothing"
                copied += len(may) * GRANULARITY
            self._resync = copied + OVERHEAD - self._written, self.proxy.up

    def _synced(self) -> None:
        if self._resync:
            may, before = self._resync
            sent, may = self.proxy.up - before, may + self._written
            assert sent <= may, f"a resync has sent {sent} bytes, and {may} could have differed"

    def written(self, offset: int, length: int) -> None:
        """The guest has written: a resync that runs may have to copy these clusters again."""
        self._written += 2 * len(model.clusters([(offset, length)])) * GRANULARITY

    # --- disks ---

    def faulty(self) -> Iterator[Blkdebug]:
        """The disks of both sides that can be made to fail, as far as their programs run."""
        for graph in [self.primary.graph] * self.primary_running + [self.standby.graph] * self.standby_running:
            yield from (node for node in graph.nodes.values() if isinstance(node, Blkdebug))

    def heal_disks(self) -> None:
        """No disk fails any more."""
        for node in self.faulty():
            node.clear_rules()

    @contextmanager
    def all_sound(self) -> Iterator[None]:
        """Meanwhile no disk fails, and no fault is used up."""
        rules = [(node, node._errors) for node in self.faulty()]
        for node, _ in rules:
            node._errors = []
        try:
            yield
        finally:
            for node, errors in rules:
                node._errors = errors

    async def on_disk(self, graph: Graph, name: str) -> bytes:
        """What a disk holds, past its faults."""
        node: Driver = graph.find(name)
        if isinstance(node, Blkdebug):
            node = node.file.node
        return bytes(await node.pread(0, node.length))


def _before(owner: Any, method: str, call: Callable[..., object]) -> None:
    """Let ``call`` come before a method of one object, with the same arguments."""
    original = getattr(owner, method)

    def called(*args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, method, called)


def _after(owner: Any, method: str, call: Callable[[], object]) -> None:
    """Let ``call`` come after a coroutine method of one object that ended well."""
    original: Callable[..., Awaitable[Any]] = getattr(owner, method)

    async def called(*args: Any, **kwargs: Any) -> Any:
        value = await original(*args, **kwargs)
        call()
        return value

    setattr(owner, method, called)


def _around(owner: Any, method: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """Let ``begin`` come before a coroutine method of one object, and ``end`` after it, however it ends."""
    original: Callable[..., Awaitable[Any]] = getattr(owner, method)

    async def called(*args: Any, **kwargs: Any) -> Any:
        begin()
        try:
            return await original(*args, **kwargs)
        finally:
            end()

    setattr(owner, method, called)
