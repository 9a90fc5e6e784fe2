"""What a primary and its standby must hold: a plain model of a pair, whatever becomes of the network between them.

    guest's writes ──► Disk.primary ──mark──► Disk.marked ──commit──► Disk.view ◄── writes of the view's guest

For each disk the model has three contents, plain bytes with what is in doubt (`blockstep.testing.model`):

    primary   what the guest of the primary finds: everything acknowledged, byte by byte
    marked    the primary, on all disks at one moment, when its links were marked for a checkpoint
    view      the last checkpoint that the standby committed, and what its own guest wrote since; None: there is none

So the moments are the programs' own, `mark` and `commit`, and nothing else is: a checkpoint that mixes two moments, of
one disk or of two, is not what was marked. Where a write fails on the primary's own disk, the two sides may differ
until the next sync (`Disk.torn`).

And it counts what a resync may copy: the clusters that were written since the last checkpoint that is durable on the
standby, or as it was being taken.
"""

from __future__ import annotations

from collections.abc import Iterable

from blockstep.replication.link import GRANULARITY
from blockstep.testing.model import Content, Write

#: Two writes, to the primary or to the view.
Side = str


class Disk:
    """One disk, on both sides."""

    def __init__(self, content: bytes) -> None:
        self.primary = Content(content)
        self.marked = Content(content)
        self.view: Content | None = None
        #: Writes that have failed on the primary, and that the standby may have got all the same.
        self.torn: list[Write] = []
        #: Clusters written since the last mark; and before, but not known to be durable on the standby.
        self.since: set[int] = set()
        self.closing: set[int] = set()

    def content(self, side: Side) -> Content | None:
        return self.primary if side == "guest" else self.view

    def begin(self, side: Side, offset: int, data: bytes) -> Write | None:
        """A write is on its way; None if there is nothing that it could reach."""
        content = self.content(side)
        if side == "guest":
            self.since.update(clusters([(offset, len(data))]))
        return content.begin(offset, data) if content else None

    def end(self, side: Side, write: Write, done: bool, failed: bool = False) -> None:
        """It has ended: ``done``, or in doubt, as a discard does and a write that ``failed``."""
        content = self.content(side)
        if content and write in content.in_flight:  # else that content is gone, and the write with it
            content.end(write, done)
        if side == "guest":
            self.since.update(clusters([(write.offset, len(write.data))]))  # a mark may have come in between
            if failed:
                self.torn.append(Write(write.offset, write.data))

    def mark(self) -> None:
        self.marked = self.primary.copy(in_flight=True)
        self.marked.doubts += self.torn
        self.closing |= self.since
        self.since = clusters((write.offset, len(write.data)) for write in self.primary.in_flight)

    def settled(self) -> None:
        """What was marked is durable on the standby."""
        self.closing = clusters((write.offset, len(write.data)) for write in (*self.torn, *self.primary.in_flight))

    def synced(self, *_: object) -> None:
        """The standby is what the primary is, and gets what is written from now on."""
        self.torn = [Write(write.offset, write.data) for write in self.primary.in_flight]

    def commit(self) -> None:
        before, self.view = self.view, self.marked.copy()
        if before:
            self.view.succeed(before)

    def resize(self, length: int) -> None:
        """The primary's disk has another length."""
        before = len(self.primary.data)
        self.since.update(clusters([(before, max(0, length - before))]))
        self.primary.resize(length)


class Pair:
    """The disks, by name, with the moments that they share."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.disks = {name: Disk(content) for name, content in contents.items()}
        #: How often the views were moved, or given up.
        self.moves = 0
        #: The standby has what this primary has, but for what is in `Disk.since` and `Disk.closing`, and both know it.
        #: None: that depends on what the model does not know.
        self.known: bool | None = False
        self.giving_up = False
        #: The standby's guest may have written since the last commit.
        self.written = False

    @property
    def has_view(self) -> bool:
        return all(disk.view for disk in self.disks.values())

    def in_flight(self, side: Side) -> bool:
        """Whether writes of that side are on their way."""
        return any(content.in_flight for disk in self.disks.values() if (content := disk.content(side)))

    def mark(self) -> None:
        for disk in self.disks.values():
            disk.mark()

    def commit(self) -> None:
        self.moves += 1
        self.known, self.written = True, self.in_flight("view")
        for disk in self.disks.values():
            disk.commit()

    def begin_give_up(self) -> None:
        """There is no checkpoint any more, and what is read of the views meanwhile is anything, or refused."""
        self.giving_up = True
        self.give_up()

    def end_give_up(self) -> None:
        self.giving_up = False

    def give_up(self) -> None:
        """There is no checkpoint any more."""
        self.moves += 1
        for disk in self.disks.values():
            disk.view = None

    def view_written(self) -> None:
        """The standby's guest writes: if that goes well, its disks are no checkpoint when it ends."""
        self.written = True

    def standby_ended(self, kept: bool, noted: bool) -> None:
        """And begins again: its disks are the views, if they were ``kept``, in good order.

        Else there is no checkpoint; but if it was ``noted`` it is known what the disks follow.
        """
        if not kept:
            self.give_up()
            self.known = self.known if noted else False
        elif self.written and self.known:
            self.known = None

    def turned_round(self, known: bool) -> Pair:
        """The model of the pair whose primary has the standby's disks, and the other way round: both are the same."""
        pair = Pair({name: bytes(disk.view.data) for name, disk in self.disks.items() if disk.view})
        pair.known = None if known and any(disk.torn for disk in self.disks.values()) else known
        if known:
            for name, disk in pair.disks.items():
                disk.view = Content(self.disks[name].primary.data)
        return pair


def clusters(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """The clusters of the link's bitmaps that (offset, length) touch."""
    return {cluster for offset, length in ranges if length
            for cluster in range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1)}
