"""Traces over a pair see the sins of replication: each breaks one promise, and a trace of few steps finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blockstep.block.driver import Buffer
from blockstep.daemon import promotion
from blockstep.daemon.following import Following
from blockstep.daemon.primary_status import PrimaryStatus
from blockstep.daemon.primary_sync import Sync
from blockstep.daemon.standby_link import PrimarysSide
from blockstep.drivers.copy_before_write import CopyBeforeWrite
from blockstep.drivers.replication import Stage
from blockstep.replication import comparison
from blockstep.replication.hidden_disk import HiddenDiskBuffer
from blockstep.replication.link import Link
from blockstep.replication.registry import ReplicationRegistry
from tests.scenario.pair_steps import Do, Request, Step
from tests.scenario.pair_trace import play
from tests.scenario.pair_world import Shape

Patch = pytest.MonkeyPatch


def saves_all_but_one_cluster(patch: Patch) -> None:
    begin_write = CopyBeforeWrite.begin_write

    def skipping(self: CopyBeforeWrite, offset: int, data: Buffer) -> Any:
        self.done.set(17 << self.done.shift, 1)
        return begin_write(self, offset, data)

    patch.setattr(CopyBeforeWrite, "begin_write", skipping)


def forgets_a_bit_when_the_link_is_lost(patch: Patch) -> None:
    switch_off = Link.switch_off

    def forgetting(self: Link) -> None:
        if self.on and (at := self.since.bits.find(1)) >= 0:
            self.since.bits[at] = 0
        switch_off(self)

    patch.setattr(Link, "switch_off", forgetting)


def forgets_what_is_discarded(patch: Patch) -> None:
    patch.setattr(Link, "_count", lambda self, offset, length: None)

    async def discard(self: Link, offset: int, length: int) -> None:
        await self.file.discard(offset, length)

    patch.setattr(Link, "discard", discard)


def sends_what_it_should_hold(patch: Patch) -> None:
    mark = Link.mark

    def marking(self: Link) -> None:
        mark(self)
        self._held = None

    patch.setattr(Link, "mark", marking)
    patch.setattr(Link, "release", lambda self: None)


def takes_the_checkpoint_on_one_disk(patch: Patch, disks: int | None = 1) -> None:
    async def checkpoint_all(self: ReplicationRegistry) -> None:
        buffers = [filter.buffer for filter in self.filters if filter.stage is Stage.RUNNING and filter.buffer]
        async with self._graph.drained(*self.filters, *(buffer.secondary for buffer in buffers)):
            for buffer in buffers[:disks]:
                (await buffer.prepare_checkpoint()).commit()

    patch.setattr(ReplicationRegistry, "_checkpoint_all", checkpoint_all)


def commits_one_disk_before_the_next_is_prepared(patch: Patch) -> None:
    takes_the_checkpoint_on_one_disk(patch, None)


def lets_a_stale_primary_write(patch: Patch) -> None:
    async def revoke(self: PrimarysSide) -> None:
        pass

    patch.setattr(PrimarysSide, "revoke", revoke)
    patch.setattr(HiddenDiskBuffer, "revoke_writers", lambda self: None)


def forgets_a_promotion(patch: Patch) -> None:
    patch.setattr(promotion, "write", lambda *_: None)


def copies_everything_again(patch: Patch) -> None:
    begin = Sync.begin

    async def beginning(self: Sync, full: bool) -> None:
        for disk in self._disks.values():
            disk.link.since.set(0, disk.link.length)
        await begin(self, full)

    patch.setattr(Sync, "begin", beginning)


def copies_nothing_at_all(patch: Patch) -> None:
    begin = Sync.begin

    async def beginning(self: Sync, full: bool) -> None:
        for disk in self._disks.values():
            disk.link.since.clear()
        await begin(self, full)

    patch.setattr(Sync, "begin", beginning)


def takes_a_written_view_for_a_checkpoint(patch: Patch) -> None:
    async def never(self: HiddenDiskBuffer) -> bool:
        return False

    patch.setattr(HiddenDiskBuffer, "view_is_written", never)


def takes_what_differs_for_the_same(patch: Patch) -> None:
    patch.setattr(comparison, "differing", lambda one, other: [])


def still_follows_after_it_has_merged(patch: Patch) -> None:
    async def never(self: Following) -> None:
        pass

    patch.setattr(Following, "forget", never)


def does_not_remember_whom_it_follows(patch: Patch) -> None:
    async def never(self: Following, *_: Any) -> None:
        pass

    patch.setattr(Following, "keep", never)


def is_always_healthy(patch: Patch) -> None:
    patch.setattr(PrimaryStatus, "_health", lambda self: ("healthy", ""))


def acknowledges_what_it_has_not_written(patch: Patch) -> None:
    begin_write = Link.begin_write

    def beginning(self: Link, offset: int, data: Buffer) -> Any:
        return begin_write(self, offset, data) if len(data) != 77 else None

    patch.setattr(Link, "begin_write", beginning)


WRITE = Request("write", offset=69_632, length=70_000)
OTHER = Request("write", disk=1, offset=69_632, length=70_000)

SINS: list[tuple[Callable[[Patch], None], str, list[Step]]] = [
    (saves_all_but_one_cluster, "view of a: byte 69632", [WRITE, Do("wait")]),
    (forgets_a_bit_when_the_link_is_lost, "a differs at .* and the primary does not know",
     [Do("slow"), WRITE, Do("turn", amount=5), Do("cut"), Do("wait")]),
    (forgets_what_is_discarded, "a differs at .* and the primary does not know",
     [Do("down"), Request("discard", length=65_536), Do("wait")]),
    (sends_what_it_should_hold, "view of b",
     [Do("slow"), WRITE, Do("turn", amount=8), Do("checkpoint", begin=True), Do("sleep", amount=0.01), OTHER,
      Do("wait")]),
    (takes_the_checkpoint_on_one_disk, "view of b", [WRITE, OTHER, Do("wait"), Do("checkpoint")]),
    (commits_one_disk_before_the_next_is_prepared, "view of a",
     [WRITE, Do("wait"), Do("stuck", disk=1), Do("checkpoint")]),
    (lets_a_stale_primary_write, "view of a|is failover-failed", [Do("failover"), WRITE, Do("wait")]),
    (forgets_a_promotion, "a standby that was promoted is one again", [Do("failover"), Do("bounce-standby")]),
    (copies_everything_again, "copies clusters .* for nothing", [Do("cut"), Do("recover")]),
    (copies_nothing_at_all, "a differs at|view of a", [Do("down"), WRITE, Do("recover")]),
    (takes_a_written_view_for_a_checkpoint, "a differs at|view of a",
     [Request("write", side="view"), Do("wait"), Do("bounce-standby"), Do("recover")]),
    (takes_what_differs_for_the_same, "a differs at|view of a",
     [Request("write", side="view"), Do("wait"), Do("bounce-standby"), Do("recover")]),
    (still_follows_after_it_has_merged, "view of a",
     [Request("write", side="view"), Do("wait"), Do("bounce-standby"), Do("crash-standby"), Do("recover")]),
    (does_not_remember_whom_it_follows, "is not written down", []),
    (is_always_healthy, "state='offline', health='healthy'", [Do("down"), Do("sleep", amount=10.0)]),
    (acknowledges_what_it_has_not_written, "primary's a: byte 0", [Request("write", length=77), Do("wait")]),
]


@pytest.mark.parametrize(("sin", "finding", "steps"), [pytest.param(*case, id=case[0].__name__) for case in SINS])
def test_a_pair_that_sins_is_found_out(
    sin: Callable[[Patch], None], finding: str, steps: list[Step], monkeypatch: Patch
) -> None:
    sin(monkeypatch)
    with pytest.raises(AssertionError, match=finding):
        play(Shape(), steps)
