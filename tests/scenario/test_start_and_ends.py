"""The borders of replication: what start checks and undoes, what every end puts back, all filters or none.

A start that fails, at whatever step, leaves the graph as it was; an end lifts the blockers and gives the disks
their read-only flags back, whichever end it is.
"""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.driver import Driver
from blockstep.block.permissions import DATA, READ, WRITE
from blockstep.drivers.replication import Stage
from blockstep.errors import GraphError, OperationBlocked, OptionError, PermissionConflict, ReplicationError
from blockstep.replication.hidden_disk import HiddenDiskBuffer
from tests.scenario.standby import STAGES, Rig, Shape, StageName, initial, run

pytestmark = pytest.mark.usefixtures("four_disks")

# --- what start checks, in this order ---


class Wrong:
    """A rig of which everything may be wrong at once: a check that comes first must speak first."""

    CHECKS = ("mode", "active backing", "hidden backing", "attached", "length", "emptied", "top-id", "top-id root")

    def __init__(self, *wrong: str) -> None:
        self.wrong = wrong
        self.rig = Rig()

    async def open(self) -> None:
        graph = self.rig.graph
        disk = await self.rig.add("b", initial(0))
        hidden, active = graph.find("b-hidden"), graph.find("b-active")
        if "active backing" in self.wrong:
            self._cut(active)
        if "hidden backing" in self.wrong:
            self._cut(hidden)
        if "attached" in self.wrong:
            await graph.detach_backend(disk.primary)
            disk.secondary.owned = False
        if "length" in self.wrong:
            active.length += 512
        if "emptied" in self.wrong:
            hidden.can_be_emptied = False  # type: ignore[misc]
        if "top-id" in self.wrong:
            disk.filter.options.top_id = "nobody"
        if "top-id root" in self.wrong:
            disk.filter.options.top_id = disk.filter.name

    def _cut(self, node: Driver) -> None:
        with self.rig.graph.change() as change:
            change.detach(node.children["backing"])


REASONS = {
    "mode": "its mode is secondary, not primary", "active backing": "active disk 'b-active' has no backing node",
    "hidden backing": "hidden disk 'b-hidden' has no backing node", "attached": "'b-secondary' is not exported",
    "length": "must have the same length", "emptied": "'b-hidden' .*cannot be emptied",
    "top-id": "top-id 'nobody' is not a node", "top-id root": "top-id 'b-filter' is not a root node",
}


@pytest.mark.parametrize("check", Wrong.CHECKS)
@pytest.mark.parametrize("others", ["alone", "and all that come later"])
def test_start_checks(check: str, others: str) -> None:
    async def scenario() -> None:
        later = Wrong.CHECKS[Wrong.CHECKS.index(check) + 1:]
        if check.startswith("top-id"):
            later = ()
        if check == "mode":  # the later ones take the graph apart
            later = tuple(one for one in later if one != "active backing")
        case = Wrong(check, *(later if others != "alone" else ()))
        await case.open()
        mode: Any = "primary" if check == "mode" else "secondary"
        with pytest.raises(ReplicationError, match=REASONS[check]) as refused:
            await case.rig.registry.start_all(mode)
        assert refused.value.step == "start"
        assert case.rig.disks[0].filter.stage is Stage.NONE

    run(scenario)


def test_start_checks_that_the_filter_lies_below_top_id() -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        await rig.graph.open({"driver": "null", "node-name": "other"})
        rig.disks[0].filter.options.top_id = "other"
        with pytest.raises(ReplicationError, match="'other' does not have the filter among its descendants"):
            await rig.registry.start_all("secondary")
        await rig.close()

    run(scenario)


@pytest.mark.parametrize(("options", "option"), [
    ({"mode": "secondary"}, "top-id"), ({"mode": "primary", "top-id": "x"}, "top-id"), ({"mode": "third"}, "mode"),
    ({}, "mode"), ({"mode": "primary", "file": None}, "file"),
])
def test_options_that_do_not_fit_are_named(options: dict[str, Any], option: str) -> None:
    async def scenario() -> None:
        rig = Rig()
        await rig.graph.open({"driver": "null", "node-name": "disk"})
        with pytest.raises(OptionError) as wrong:
            await rig.graph.open({"driver": "replication", "file": "disk", **options})
        assert option in str(wrong.value)
        assert list(rig.graph.nodes) == ["disk"]

    run(scenario)


# --- what holds while it runs ---


def test_the_primary_may_write_whatever_the_guest_of_the_view_shares() -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        disk = rig.disks[0]
        await rig.graph.detach_backend(disk.view)
        disk.view = rig.graph.attach_backend(rig.graph.find("a"), "a: guest", READ | WRITE, READ)
        await rig.enter("running")
        assert disk.filter.file.shared & DATA == DATA
        assert disk.secondary.data[4096:8192] == b"P" * 4096
        await rig.close()

    run(scenario)


def test_what_saves_the_checkpoint_cannot_be_removed_even_when_no_primary_is_there() -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        disk = rig.disks[0]
        await rig.enter("running")
        assert isinstance(disk.filter.buffer, HiddenDiskBuffer)
        cbw = disk.filter.buffer.cbw
        await rig.graph.detach_backend(disk.primary)
        with pytest.raises(OperationBlocked, match="'a-filter' keeps its checkpoint"):
            await rig.graph.close(cbw)
        view = await disk.read_view()
        disk.primary = rig.graph.attach_backend(cbw, "a: late primary", READ | WRITE)
        await disk.primary.pwrite(0, b"late")
        assert await disk.read_view() == view
        await rig.close()

    run(scenario)


def test_a_writer_that_would_pass_by_what_saves_the_checkpoint_is_refused() -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        await rig.enter("running")
        with pytest.raises(PermissionConflict):
            rig.graph.attach_backend(rig.disks[0].secondary, "somebody", READ | WRITE)
        await rig.close()

    run(scenario)


# --- what is undone, and when ---


def picture(rig: Rig) -> dict[str, Any]:
    """The graph as far as start changes it."""
    return {name: (node.read_only, dict(node.blockers),
                   {(edge.parent.description, edge.name, edge.taken, edge.shared) for edge in node.parents},
                   {child: edge.node.name for child, edge in node.children.items()})
            for name, node in rig.graph.nodes.items()}


async def freeze(rig: Rig, *parts: str) -> None:
    """Make nodes read-only, as `-blockdev` makes backing nodes."""
    disk = rig.disks[0]
    if "secondary" in parts:
        await rig.graph.detach_backend(disk.primary)
        disk.primary = rig.graph.attach_backend(disk.secondary, "a: reader", READ)
    await rig.graph.reopen([(rig.graph.find(f"a-{part}"), {"read-only": True}) for part in parts])


@pytest.mark.parametrize("step", ["reopen", "blockers", "filter", "empty active", "empty hidden"])
def test_a_start_that_fails_undoes_everything(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        await freeze(rig, "hidden", "secondary")
        hidden = rig.graph.find("a-hidden")

        async def fail(*_: object, **__: object) -> Any:
            raise OSError(errno.EACCES, "not allowed")

        def block(*_: object) -> Any:
            raise GraphError("not allowed")

        if step == "reopen":
            monkeypatch.setattr(hidden, "prepare_reopen", fail)
        elif step == "blockers":
            monkeypatch.setattr(rig.graph.find("a"), "block_operations", block)
        elif step == "filter":
            rig.graph.attach_backend(hidden, "somebody", READ, READ)  # shares no writes
        else:
            rig.gates.fail(f"a-{step.split()[1]}", "make_empty")
        before = picture(rig)
        with pytest.raises(ReplicationError) as failed:
            await rig.registry.start_all("secondary")
        assert failed.value.filter == "a-filter"
        assert picture(rig) == before
        assert rig.disks[0].filter.stage is Stage.NONE
        assert rig.disks[0].filter.buffer is None

    run(scenario)


@pytest.mark.parametrize("owned", [True, False], ids=["named", "anonymous"])
@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("end", ["stopped", "failed-over", "failover-failed", "closed"])
def test_flags_and_blockers_are_back_in_every_end(end: str, where: str, owned: bool, tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = await Rig.open(shape=Shape(directory=tmp_path if where == "file" else None, owned=owned))
        await freeze(rig, "hidden")
        disk, top = rig.disks[0], rig.graph.find("a")
        await rig.registry.start_all("secondary")
        hidden, active = rig.graph.find("a-hidden"), rig.graph.find("a-active")
        assert not hidden.read_only
        with pytest.raises(OperationBlocked, match="replicated by 'a-filter'"):
            top.check_operation("resize")
        await disk.primary.pwrite(4096, b"P" * 4096)
        if end == "closed":
            top.owned = disk.filter.owned = False
            await rig.graph.detach_backend(disk.view)
        else:
            if end == "failover-failed":
                rig.gates.fail("a-secondary", "write")
            await rig.registry.stop_all(end != "stopped")
            await rig.merged()
        assert not top.blockers
        gone = not owned and end != "failover-failed"
        for node in (hidden, active):
            assert (node.name in rig.graph.nodes) is not gone
        if not gone:
            assert hidden.read_only
            assert not active.read_only
        top.check_operation("resize")
        assert not any(node.driver == "copy-before-write" for node in rig.graph.nodes.values())

    run(scenario)


@pytest.mark.parametrize("end", ["stopped", "failed-over", "failover-failed"])
@pytest.mark.parametrize("guest", ["reads", "writes"])
def test_a_secondary_disk_that_was_read_only_is_again_unless_the_guest_now_writes_to_it(end: str, guest: str) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        await freeze(rig, "secondary")
        disk = rig.disks[0]
        if guest == "reads":
            await rig.graph.detach_backend(disk.view)
            disk.view = rig.graph.attach_backend(rig.graph.find("a"), "a: guest", READ)
        await rig.registry.start_all("secondary")
        assert not disk.secondary.read_only
        assert isinstance(disk.filter.buffer, HiddenDiskBuffer)
        primary = rig.graph.attach_backend(disk.filter.buffer.cbw, "a: late primary", READ | WRITE)
        await primary.pwrite(4096, b"P" * 4096)
        await rig.graph.detach_backend(primary)
        if end == "failover-failed":
            rig.gates.fail("a-secondary", "write")
        await rig.registry.stop_all(end != "stopped")
        await rig.merged()
        assert disk.secondary.read_only is (guest == "reads" and end != "failover-failed")
        if guest == "writes":
            await disk.view.pwrite(0, b"w")
        assert not rig.graph.find("a").blockers

    run(scenario)


# --- close, in each stage ---


@pytest.mark.parametrize("stage", STAGES)
def test_close(stage: StageName) -> None:
    """running: a stop without failover; failover: the commit is cancelled and waited for."""

    async def scenario() -> None:
        rig = await Rig.open(shape=Shape(owned=False))
        disk, top = rig.disks[0], rig.graph.find("a")
        await rig.enter(stage)
        rig.gates.open()
        top.owned = disk.filter.owned = False
        await rig.graph.detach_backend(disk.view)
        assert set(rig.graph.nodes) - {"a-secondary-file"} == {"a-secondary"}
        assert not rig.jobs.list()
        assert rig.registry.filters == []
        if stage == "running":
            assert disk.secondary.data[4096:8192] == b"P" * 4096
        assert {edge.parent.description for edge in disk.secondary.parents} == {"a: primary"}
        await rig.graph.detach_backend(disk.primary)
        await rig.graph.close(disk.secondary)

    run(scenario)


# --- several filters: all or nothing ---


@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_start_all_is_all_or_nothing(names: str, bad: int) -> None:
    async def scenario() -> None:
        rig = await Rig.open(tuple(names))
        disk = rig.disks[bad % len(names)]
        rig.gates.fail(f"{disk.name}-hidden", "make_empty")
        before = picture(rig)
        with pytest.raises(ReplicationError, match=f"'{disk.name}-filter'.*'{disk.name}-hidden'"):
            await rig.registry.start_all("secondary")
        assert picture(rig) == before
        assert all(disk.filter.stage is Stage.NONE for disk in rig.disks)
        await rig.registry.start_all("secondary")
        await rig.close()

    run(scenario)


def test_a_start_is_one_moment_for_all_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first disk is ready, the second takes long ► the primary writes to the first, then to the second."""

    async def scenario() -> None:
        rig = await Rig.open("ab")
        opening = asyncio.Event()
        set_up = HiddenDiskBuffer._set_up

        async def slowly(self: HiddenDiskBuffer) -> None:
            if self.secondary.name == "b-secondary":
                await opening.wait()
            await set_up(self)

        monkeypatch.setattr(HiddenDiskBuffer, "_set_up", slowly)
        starting = asyncio.create_task(rig.registry.start_all("secondary"))
        for _ in range(20):
            await asyncio.sleep(0)
        for disk in rig.disks:
            await disk.primary.pwrite(0, b"new")
        opening.set()
        await starting
        assert [(await disk.read_view())[:3] for disk in rig.disks] == [b"new", b"new"]
        await rig.close()

    run(scenario)


@pytest.mark.parametrize("part", ["active", "hidden"])
@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_checkpoint_all_is_all_or_nothing(names: str, bad: int, part: str) -> None:
    """D4: QEMU leaves the disks at different points."""

    async def scenario() -> None:
        rig = await Rig.open(tuple(names))
        await rig.enter("running")
        disk = rig.disks[bad % len(names)]
        views = [await each.read_view() for each in rig.disks]
        rig.gates.fail(f"{disk.name}-{part}", "make_empty")
        with pytest.raises(ReplicationError, match=f"'{disk.name}-filter'.*checkpoint.*{part} disk"):
            await rig.registry.checkpoint_all()
        assert [await each.read_view() for each in rig.disks] == views
        await rig.registry.checkpoint_all()
        assert [await each.read_view() for each in rig.disks] == [bytes(each.secondary.data) for each in rig.disks]
        await rig.close()

    run(scenario)


def test_a_promoted_filter_takes_part_in_what_comes_later_for_its_primaries() -> None:
    """The standby of one disk becomes the primary of it: start, checkpoint and stop leave its filter alone."""

    async def scenario() -> None:
        rig = await Rig.open()
        await rig.enter("failed-over")
        promoted = rig.disks[0]
        primary = await rig.add_primary("p", initial(1))
        await rig.registry.start_all("primary")
        assert (promoted.filter.stage, primary.filter.stage) == (Stage.DONE, Stage.RUNNING)
        await rig.registry.checkpoint_all()
        rig.registry.get_error_all()
        await rig.registry.stop_all(False)
        assert (promoted.filter.stage, primary.filter.stage) == (Stage.DONE, Stage.DONE)

    run(scenario)
