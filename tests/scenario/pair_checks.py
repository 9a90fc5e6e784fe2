"""What must hold of a pair at any moment, whatever has befallen it.

After each step `Checks.check` reads both disks, behind whatever makes them fail, and every view, and asks both
programs how they are:

- the primary's disks, and the views, are what the model says, in every byte;
- of every cluster in which primary and standby differ the primary knows it, so that a resync would copy it; while links
  are on and nothing is queued there is none;
- status is true: sizes, whether there is a checkpoint, and that a pair to which nothing has happened is healthy; and
  what was announced last is what status says;
- nothing has been raised where nobody hears it, and no guest of the primary had to wait for longer than max-stall.

(That a sync copies no more than it must is watched by `tests.scenario.pair_world` all the time.)
"""

from __future__ import annotations

import asyncio
from typing import Final

from blockstep.images.opened import ImageName, opened
from blockstep.qmp.commands import replication as qmp
from blockstep.replication.link import GRANULARITY
from blockstep.testing.model import Read, Write
from tests.scenario.pair_world import MAX_STALL, World

#: Seconds after which each side knows that the other is not there.
NOTICES: Final = 4 * MAX_STALL


class Checks:
    """Of one world; and what has to be known of a trace to judge it."""

    def __init__(self, world: World) -> None:
        self.world, self.model, self.shape = world, world.model, world.shape
        #: What was raised where nobody hears it.
        self.bugs: list[str] = []
        #: Requests and commands that have not ended.
        self.running: set[asyncio.Task[None]] = set()
        #: Nothing was done yet, since the last recovery, that may fail a checkpoint or let the pair be unwell.
        self.calm = False
        #: How the standby's life with its primary has ended.
        self.ended = ""
        #: The views become what the primary wrote last: now they are neither that nor what they were.
        self.turning = False
        #: What its guest has had in flight meanwhile.
        self.meanwhile: list[tuple[str, Write]] = []

    async def check(self) -> None:
        """See the module. Raises AssertionError."""
        assert not self.bugs, "; ".join(self.bugs)
        world = self.world
        with world.all_sound():
            if world.primary_running:
                await self.check_primary()
            if world.standby_running and not self.turning:
                await self.check_views()
            if world.primary_running and world.standby_running:
                await self.check_difference()
        assert not self.bugs, "; ".join(self.bugs)
        self.check_status()

    async def check_primary(self) -> None:
        for name, disk in self.model.disks.items():
            quiet = not self.running
            if not quiet:
                self.learn_lengths()
            read = disk.primary.begin_read(0, len(disk.primary.data))
            got = await self.world.on_disk(self.world.primary.graph, f"{name}-disk")
            wrong = disk.primary.end_read(read, got[:read.length])
            assert not wrong, f"primary's {name}: {wrong}"
            if quiet:
                disk.primary.adopt(got)

    def learn_lengths(self) -> None:
        """After a resize, and while one runs, whether it goes well or not."""
        for name, disk in self.model.disks.items():
            length = self.world.primary.disks[name].link.length
            if length != len(disk.primary.data):
                self.model.view_written()  # what is new in the view counts as that
            disk.resize(length)

    async def check_views(self) -> None:
        for name, disk in self.model.disks.items():
            view = self.world.standby.disks[name].view
            while (content := disk.view) is not None:
                moves, quiet = self.model.moves, not self.running
                content.resize(view.length)
                read = content.begin_read(0, view.length)
                try:
                    got = bytes(await view.pread(0, view.length))
                except OSError as error:
                    if moves == self.model.moves and not self.turning:
                        raise AssertionError(f"view of {name}: {error}") from error
                    continue
                if self.turning:
                    return
                if moves == self.model.moves:
                    wrong = content.end_read(read, got)
                    assert not wrong, f"view of {name}: {wrong}"
                    if quiet:
                        content.adopt(got)
                    break

    async def check_difference(self) -> None:
        """Where the two disks differ the primary knows it, and while nothing is under way they do not."""
        world = self.world
        if not self.model.known or self.ended or self.running:
            return
        for name, disk in world.primary.disks.items():
            link = disk.link
            equal = (link.on and not link.queued and not self.model.disks[name].torn
                     and world.standby.situation.primary is not None)
            here = await world.on_disk(world.primary.graph, f"{name}-disk")
            there = await world.on_disk(world.standby.graph, f"{name}-secondary")
            differ = [at for at in range(0, min(len(here), len(there)), GRANULARITY)
                      if here[at:at + GRANULARITY] != there[at:at + GRANULARITY]]
            if not self.model.known or self.ended or self.running or len(here) != len(there):
                return
            lost = [at for at in differ if not any(bitmap is not None and bitmap.any(at, 1) for bitmap in (
                link.since, link.closing, link._torn))]
            assert not lost, f"{name} differs at {lost}, and the primary does not know"
            if equal and link.on:
                assert not differ, f"{name} differs at {differ}, and nothing is under way"

    def check_status(self) -> None:
        world, calm = self.world, self.calm and not self.running
        here = world.primary.status() if world.primary_running else None
        there = world.standby.status() if world.standby_running else None
        if there:
            assert bool(there.checkpoint) == self.model.has_view or self.ended or self.model.giving_up, there
            assert there.state != "replicating" or there.checkpoint, there
        if here:
            sizes = {name: len(disk.primary.data) for name, disk in self.model.disks.items()}
            assert self.running or {disk.name: disk.size for disk in here.disks} == sizes, here
        for name, told in (("primary", here), ("standby", there)):
            if told and not self.running:
                self.check_announced(name, told)
        if calm and here and there:
            assert here.health == there.health == "healthy", f"{here}\n{there}"
            assert here.checkpoint
            assert there.checkpoint
            assert here.checkpoint.epoch == there.checkpoint.epoch or here.state == "checkpointing", f"{here}\n{there}"

    def check_announced(self, name: str, told: qmp.PairStatus) -> None:
        """Whoever listens knows as much as who asks, but for what is no news, or comes when it is durable."""
        heard = self.world.announced.get(name)
        if heard and told.state not in ("checkpointing", "promoted") and "s old" not in told.reason:
            assert (heard.state, heard.health) == (told.state, told.health), f"announced: {heard}\nis: {told}"

    def check_alone(self) -> None:
        """There has been no network for long: each side has to say that it is alone."""
        if self.world.primary_running:
            told = self.world.primary.status()
            assert (told.state, told.health) in (("offline", "at-risk"), ("stopped", "at-risk")), told
        if self.world.standby_running:
            told = self.world.standby.status()
            assert (told.state, told.health) == ("lost" if self.model.has_view else "waiting", "at-risk"), told

    # --- at ends ---

    async def views_are_latest(self, at_least: dict[str, Read]) -> None:
        """The views are what the primary wrote last: no less than it had, of each disk, when such a read was begun."""
        for name, disk in self.model.disks.items():
            view = self.world.standby.disks[name].view
            with self.world.all_sound():
                got = bytes(await view.pread(0, view.length))
            meanwhile = [write for of, write in self.meanwhile if of == name]
            if read := at_least.get(name):
                read.writes += [*disk.torn, *meanwhile]
                wrong = disk.primary.end_read(read, got[:read.length])  # a resize may be half done
                assert not wrong, f"the latest of {name}: {wrong}"
            disk.mark()
            disk.marked.adopt(got)
            disk.marked.doubts += meanwhile
            disk.commit()
        self.model.moves += 1

    async def files_are_the_views(self) -> None:
        """The standby has ended in good order."""
        for name, disk in self.model.disks.items():
            assert disk.view
            got = await self.content_of(name)
            disk.view.resize(len(got))
            wrong = disk.view.differs(got)
            assert not wrong, f"file of {name}: {wrong}"
            disk.view.adopt(got)

    async def content_of(self, name: str) -> bytes:
        """What the file of a standby's disk reads as."""
        async with opened(ImageName(str(self.world.path(name, "standby")), self.shape.format)) as image:
            return bytes(await image.pread(0, image.length))
