"""Every cell of the contract of the replication filter: what a request, or an operation, gets in which stage.

A test's id names the cell: ``secondary-failover-write``. *stopped* and *failed-over* are the two ways to be done.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from typing import Any

import pytest

from blockstep.block.driver import FAST
from blockstep.drivers.replication import Stage
from blockstep.errors import ReplicationError
from blockstep.jobs.job import Job
from tests.scenario.standby import STAGES, Disk, Rig, Shape, StageName, error_of, initial, run

pytestmark = pytest.mark.usefixtures("four_disks")

REQUESTS = ("write", "zeroes", "discard")

#: The enum value that a stage name stands for.
STAGE = {"none": Stage.NONE, "running": Stage.RUNNING, "failover": Stage.FAILOVER,
         "failover-failed": Stage.FAILOVER_FAILED, "stopped": Stage.DONE, "failed-over": Stage.DONE}


def request(disk: Disk, what: str, offset: int, length: int = 4096) -> Awaitable[Any]:
    """A request of the guest above the filter."""
    user = disk.view
    return {"read": lambda: user.pread(offset, length), "write": lambda: user.pwrite(offset, b"w" * length),
            "zeroes": lambda: user.write_zeroes(offset, length), "discard": lambda: user.discard(offset, length),
            "flush": user.flush}[what]()


def cells(*columns: tuple[str, ...]) -> list[Any]:
    """All combinations, each with its id."""
    combinations: list[tuple[str, ...]] = [()]
    for column in columns:
        combinations = [(*some, one) for some in combinations for one in column]
    return [pytest.param(*some, id="-".join(some)) for some in combinations]


def is_eio(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EIO


# --- requests in primary mode ---


@pytest.mark.parametrize(("mode", "stage", "what"), cells(("primary",), STAGES, ("read", *REQUESTS, "flush")))
def test_request(mode: str, stage: str, what: str) -> None:
    async def scenario() -> None:
        rig = Rig()
        disk = await rig.add_primary("a", initial(0))
        disk.filter.enter(STAGE[stage])
        before = bytes(disk.secondary.data)
        error = await error_of(request(disk, what, 100, 50))
        forwarded = stage == "running" and what != "read"
        assert forwarded is (error is None)
        assert forwarded or is_eio(error)
        assert bool(rig.gates.seen) is forwarded
        assert (bytes(disk.secondary.data) != before) is (forwarded and what != "flush")

    run(scenario)


@pytest.mark.parametrize(("mode", "stage", "what"), cells(("primary",), ("running",), (*REQUESTS, "flush")))
def test_lost_standby(mode: str, stage: str, what: str) -> None:
    """An error is remembered as the replication error, and the guest's request succeeds."""

    async def scenario() -> None:
        rig = Rig()
        disk = await rig.add_primary("a", initial(0))
        await rig.registry.start_all("primary")
        heard: list[OSError] = []
        disk.filter.on_error = heard.append
        rig.gates.fail("a-secondary", {"zeroes": "write_zeroes"}.get(what, what), errno.ENOSPC)
        assert await error_of(request(disk, what, 100, 50)) is None
        assert [error.errno for error in heard] == [errno.ENOSPC]
        with pytest.raises(ReplicationError, match=r"a-filter.*injected"):
            rig.registry.get_error_all()
        await rig.registry.stop_all(False)
        assert disk.filter.error is None

    run(scenario)


def test_fast_zeroes_are_forwarded_as_zeroes_of_any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        rig = Rig()
        disk = await rig.add_primary("a", initial(0))
        await rig.registry.start_all("primary")
        seen: list[int] = []

        async def note(offset: int, length: int, flags: int = 0) -> None:
            seen.append(flags)

        monkeypatch.setattr(disk.filter.file, "write_zeroes", note)
        await disk.view.write_zeroes(0, 512, FAST)
        assert seen == [0]

    run(scenario)


# --- requests in secondary mode ---


@pytest.mark.parametrize(("mode", "stage", "what"), cells(("secondary",), STAGES, ("read",)))
def test_read(mode: str, stage: StageName, what: str) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        disk = rig.disks[0]
        expected = bytearray(disk.secondary.data)
        expected[8192:12288] = b"V" * 4096
        await rig.enter(stage)
        assert disk.filter.stage is STAGE[stage]
        if stage == "none":
            assert is_eio(await error_of(request(disk, what, 4096, 8192)))
        elif stage == "stopped":
            assert await disk.view.pread(4096, 8192) == disk.secondary.data[4096:12288]
            assert disk.secondary.data[4096:8192] == b"P" * 4096
        else:
            assert await disk.view.pread(4096, 8192) == expected[4096:12288]
        await rig.close()

    run(scenario)


#: Where a write of the guest goes, for a range that only the secondary, the hidden, or the active disk holds.
GOES_TO = {"none": ("nowhere",) * 3, "running": ("active",) * 3, "failover": ("active",) * 3,
           "failover-failed": ("secondary", "active", "active"), "stopped": ("secondary",) * 3,
           "failed-over": ("secondary",) * 3}
HELD_BY = {"secondary": 12288, "hidden": 4096, "active": 8192}


@pytest.mark.parametrize(("mode", "stage", "what", "held_by"),
                         cells(("secondary",), STAGES, REQUESTS, tuple(HELD_BY)))
def test_write(mode: str, stage: StageName, what: str, held_by: str) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        disk = rig.disks[0]
        await rig.enter(stage)
        rig.gates.seen.clear()
        error = await error_of(request(disk, what, HELD_BY[held_by]))
        goes_to = GOES_TO[stage][tuple(HELD_BY).index(held_by)]
        event = {"zeroes": "write_zeroes"}.get(what, what)
        reached = {node for node, seen in rig.gates.seen if seen == event}
        assert reached == ({f"a-{goes_to}"} if goes_to != "nowhere" else set())
        assert is_eio(error) if goes_to == "nowhere" else error is None
        if error is None:
            content = await disk.view.pread(HELD_BY[held_by], 4096)
            assert content == (b"w" * 4096 if what == "write" else bytes(4096))
        await rig.close()

    run(scenario)


@pytest.mark.parametrize(("mode", "stage", "what"), cells(("secondary",), ("failover-failed",), REQUESTS))
def test_write_that_is_split(mode: str, stage: StageName, what: str) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        disk = rig.disks[0]
        await rig.enter(stage)
        expected = bytearray(await disk.read_view())
        await error_of(request(disk, what, 4000, 9000))
        after = await disk.read_view()
        if what == "discard":
            assert all(new in (old, 0) for old, new in zip(expected[4000:13000], after[4000:13000], strict=True))
        else:
            assert after[4000:13000] == (b"w" if what == "write" else b"\0") * 9000
        assert after[:4000] == expected[:4000]
        assert after[13000:] == expected[13000:]
        await rig.close()

    run(scenario)


#: The nodes that a flush of the guest must reach.
FLUSHED = {"none": set(), "running": {"a-active"}, "failover": {"a-active"},
           "failover-failed": {"a-active", "a-secondary"}, "stopped": {"a-secondary"}, "failed-over": {"a-secondary"}}


@pytest.mark.parametrize(("mode", "stage", "what"), cells(("secondary",), STAGES, ("flush",)))
def test_flush(mode: str, stage: StageName, what: str) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        await rig.enter(stage)
        rig.gates.seen.clear()
        error = await error_of(request(rig.disks[0], what, 0))
        assert {node for node, event in rig.gates.seen if event == "flush"} == FLUSHED[stage]
        assert is_eio(error) if stage == "none" else error is None
        await rig.close()

    run(scenario)


@pytest.mark.parametrize(("mode", "stage", "what"),
                         cells(("secondary",), ("running", "failover", "stopped", "failed-over"), REQUESTS))
def test_error_of_a_write_goes_to_the_guest(mode: str, stage: StageName, what: str) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        await rig.enter(stage)
        event = {"zeroes": "write_zeroes"}.get(what, what)
        node = "secondary" if stage in ("stopped", "failed-over") else "active"
        rig.gates.fail(f"a-{node}", event, errno.ENOSPC)
        error = await error_of(request(rig.disks[0], what, 8192))
        assert isinstance(error, OSError)
        assert error.errno == errno.ENOSPC
        await rig.close()

    run(scenario)


# --- the operations ---

#: go on, ignored (no error, nothing changes), refused (an error, nothing changes), reported (the I/O error)
OPERATIONS = {
    "start": {"none": "go on", "running": "refused", "failover": "ignored", "failover-failed": "refused",
              "stopped": "ignored", "failed-over": "ignored"},
    "checkpoint": {"none": "refused", "running": "go on", "failover": "ignored", "failover-failed": "refused",
                   "stopped": "ignored", "failed-over": "ignored"},
    "get_error": {"none": "refused", "running": "ignored", "failover": "ignored", "failover-failed": "reported",
                  "stopped": "refused", "failed-over": "ignored"},
    "stop(false)": {"none": "refused", "running": "go on", "failover": "ignored", "failover-failed": "refused",
                    "stopped": "refused", "failed-over": "ignored"},
}
OPERATIONS["stop(true)"] = OPERATIONS["stop(false)"]

#: In primary mode a checkpoint does nothing, and a failover is no other than a stop.
PRIMARY = {**OPERATIONS, "checkpoint": dict.fromkeys(STAGES, "ignored")}


async def operate(rig: Rig, operation: str, mode: Any) -> BaseException | None:
    registry = rig.registry

    async def get_error() -> None:
        registry.get_error_all()

    return await error_of({"start": lambda: registry.start_all(mode), "checkpoint": registry.checkpoint_all,
                           "get_error": get_error, "stop(false)": lambda: registry.stop_all(False),
                           "stop(true)": lambda: registry.stop_all(True)}[operation]())


@pytest.mark.parametrize(("mode", "stage", "operation"), cells(("secondary",), STAGES, tuple(OPERATIONS)))
def test_operation_of_a_secondary(mode: str, stage: StageName, operation: str) -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        disk = rig.disks[0]
        await rig.enter(stage)
        before = disk.filter.stage
        error = await operate(rig, operation, mode)
        outcome = OPERATIONS[operation][stage]
        assert (error is None) is (outcome in ("go on", "ignored")), error
        if error:
            assert isinstance(error, ReplicationError)
            assert error.filter == "a-filter"
            assert ("injected" in str(error)) is (outcome == "reported")
        if outcome == "go on":
            after = {"start": Stage.RUNNING, "checkpoint": Stage.RUNNING, "stop(false)": Stage.DONE,
                     "stop(true)": Stage.FAILOVER}[operation]
            assert disk.filter.stage is after
        else:
            assert disk.filter.stage is before
        await rig.close()

    run(scenario)


@pytest.mark.parametrize(("mode", "stage", "operation"),
                         cells(("primary",), ("none", "running", "stopped"), tuple(PRIMARY)))
def test_operation_of_a_primary(mode: str, stage: StageName, operation: str) -> None:
    async def scenario() -> None:
        rig = Rig()
        disk = await rig.add_primary("a", initial(0))
        disk.filter.enter(STAGE[stage])
        error = await operate(rig, operation, mode)
        assert (error is None) is (PRIMARY[operation][stage] in ("go on", "ignored")), error
        if PRIMARY[operation][stage] == "go on":
            assert disk.filter.stage is (Stage.RUNNING if operation == "start" else Stage.DONE)
        else:
            assert disk.filter.stage is STAGE[stage]

    run(scenario)


def test_a_failover_ends_by_itself_and_its_result_is_the_secondary_disk() -> None:
    async def scenario() -> None:
        rig = await Rig.open(shape=Shape(owned=False))
        disk = rig.disks[0]
        await rig.enter("failover")
        view = await disk.view.pread(4096, 8192)
        rig.gates.open()
        assert await rig.merged() == [None]
        assert disk.filter.stage is Stage.DONE
        assert disk.filter.file.node is disk.secondary
        assert disk.secondary.data[4096:12288] == view
        assert set(rig.graph.nodes) - {"a-secondary-file"} == {"a", "a-filter", "a-secondary"}
        await rig.close()

    run(scenario)


def test_a_failover_whose_merge_cannot_begin_is_one_that_failed() -> None:
    """Of two disks the first cannot be merged: its view lives on, and the second fails over."""

    async def scenario() -> None:
        rig = await Rig.open(("a", "b"))
        await rig.enter("running")
        first, second = rig.disks
        views = [await disk.read_view() for disk in rig.disks]
        blocker = await rig.jobs.create(Job("failover-a-filter"), start=False)  # has the name that the merge needs
        await rig.registry.stop_all(True)
        blocker.cancel()
        await rig.merged()
        assert (first.filter.stage, second.filter.stage) == (Stage.FAILOVER_FAILED, Stage.DONE)
        assert [await disk.read_view() for disk in rig.disks] == views
        with pytest.raises(ReplicationError, match="'a-filter'"):
            rig.registry.get_error_all()
        assert not rig.graph.find("a").blockers
        await rig.close()

    run(scenario)


def test_an_error_of_copy_before_write_is_the_replication_error_and_the_primarys() -> None:
    async def scenario() -> None:
        rig = await Rig.open()
        await rig.enter("running")
        disk = rig.disks[0]
        view = await disk.read_view()
        rig.gates.fail("a-hidden", "write", errno.ENOSPC)
        error = await error_of(disk.primary.pwrite(0, b"new"))
        assert isinstance(error, OSError)
        assert error.errno == errno.ENOSPC
        with pytest.raises(ReplicationError, match="No space left"):
            rig.registry.get_error_all()
        assert await disk.read_view() == view
        await rig.close()

    run(scenario)
