"""A standby's disk grows: its view stays the last checkpoint, whatever lies around the old end."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockstep.errors import OperationBlocked, OptionError, ReplicationError
from blockstep.replication.hidden_disk import HiddenDiskBuffer
from blockstep.replication.resize import check_growth, disks_of, unevenness
from tests.scenario.pair import until
from tests.scenario.standby import LENGTH, Disk, Request, Rig, Shape, run

#: What follows runs over both kinds of disks.
over_four_disks = pytest.mark.usefixtures("four_disks")

STEPS = ("primary", "view", "grow", "checkpoint")
#: A step, where (counted back from the end), and how many bytes.
Step = tuple[str, int, int]

steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, LENGTH), st.integers(1, 9000)), max_size=12)


class Model:
    """A disk as the primary has it, and as the view shows it."""

    def __init__(self, content: bytes) -> None:
        self.latest, self.view = bytearray(content), bytearray(content)

    def grow(self, length: int) -> None:
        for content in (self.latest, self.view):
            content.extend(bytes(length - len(content)))


async def play(rig: Rig, disk: Disk, model: Model, trace: list[Step]) -> None:
    for number, (step, back, count) in enumerate(trace):
        length = disk.view.length
        offset = max(0, length - 1 - back)
        data = bytes([number + 1]) * min(count, length - offset)
        if step == "primary":
            await disk.primary.pwrite(offset, data)
            model.latest[offset:offset + len(data)] = data
        elif step == "view":
            await disk.view.pwrite(offset, data)
            model.view[offset:offset + len(data)] = data
        elif step == "grow":
            await rig.registry.resize(disk.filter, length + count)
            model.grow(length + count)
        else:
            await rig.registry.checkpoint_all()
            model.view[:] = model.latest
        assert await disk.read_view() == model.view
        assert disk.secondary.data == model.latest


async def replicating(**options: Any) -> tuple[Rig, Disk, Model]:
    rig = await Rig.open(**options)
    [disk] = rig.disks
    await rig.registry.start_all("secondary")
    return rig, disk, Model(bytes(disk.secondary.data))


@over_four_disks
@given(steps, st.booleans())
@example([("view", 0, 1), ("grow", 0, 1), ("primary", 0, 4000), ("grow", 0, 9000), ("primary", 9000, 9000)], True)
@example([("primary", 0, 1), ("grow", 0, 5000), ("primary", 5000, 5001), ("checkpoint", 0, 1)], False)
def test_the_view_is_the_checkpoint_through_growths(trace: list[Step], failover: bool) -> None:
    async def main() -> None:
        rig, disk, model = await replicating(shape=Shape(hidden_cluster=512))
        await play(rig, disk, model, trace)
        await rig.registry.stop_all(failover)
        await rig.merged()
        assert await disk.read_view() == (model.view if failover else model.latest)
        await rig.close()

    asyncio.run(main())


@over_four_disks
def test_a_growth_before_the_start_and_overlays_in_files(tmp_path: Path) -> None:
    async def main() -> None:
        rig = await Rig.open(shape=Shape(directory=tmp_path))
        [disk] = rig.disks
        await rig.registry.resize(disk.filter, LENGTH + 5000)
        model = Model(bytes(disk.secondary.data))
        await rig.registry.start_all("secondary")
        await play(rig, disk, model, [("primary", 0, 3), ("grow", 0, 12345), ("primary", 12500, 12500),
                                      ("checkpoint", 0, 1), ("primary", 12500, 12500)])
        await rig.close()

    run(main)


@over_four_disks
def test_requests_that_are_in_flight_end_before_the_growth_and_later_ones_come_after_it() -> None:
    async def main() -> None:
        rig = await Rig.open()
        [disk] = rig.disks
        await rig.registry.start_all("secondary")
        rig.gates.close(disk.secondary.name)
        writing = Request(disk.primary.pwrite(LENGTH - 10, b"p" * 10))
        growing = asyncio.create_task(rig.registry.resize(disk.filter, 2 * LENGTH))
        await asyncio.sleep(0)
        reading = Request(disk.view.pread(LENGTH - 10, 10))
        assert (writing.ended, reading.ended, disk.view.length) == (False, False, LENGTH)
        rig.gates.open()
        rig.gates.release_all()
        await growing
        assert writing.error is None
        assert bytes(reading.value) != b"p" * 10, "the checkpoint"
        assert disk.view.length == 2 * LENGTH
        await rig.close()

    run(main)


@over_four_disks
@pytest.mark.parametrize("failing", ["a-active", "a-hidden", "a-secondary"])
@pytest.mark.parametrize("length", [LENGTH + 5000, LENGTH + 1])
def test_a_disk_that_cannot_grow_leaves_all_as_they_were(failing: str, length: int) -> None:
    async def main() -> None:
        rig, disk, model = await replicating()
        around = [("primary", 50, 40), ("view", 30, 20)]
        await play(rig, disk, model, around)
        rig.gates.fail(failing, "truncate", errno.ENOSPC)
        with pytest.raises(OSError, match="injected into truncate"):
            await rig.registry.resize(disk.filter, length)
        buffer = disk.filter.buffer
        assert isinstance(buffer, HiddenDiskBuffer)
        assert {node.length for node in (buffer.active, buffer.hidden, buffer.secondary)} == {LENGTH}
        assert buffer.cbw.done.length == LENGTH
        await play(rig, disk, model, [*around, ("grow", 0, 777), *around])
        await rig.close()

    run(main)


#: For whose bitmap there is no memory, and for whose L1 table no room.
ABSURD = 8_000_000 << 40


@over_four_disks
def test_an_absurd_length_leaves_all_as_they_were_and_the_next_one_works(tmp_path: Path) -> None:
    async def main() -> None:
        for directory in (None, tmp_path):
            rig, disk, model = await replicating(shape=Shape(directory=directory))
            around = [("primary", 50, 40), ("view", 30, 20)]
            await play(rig, disk, model, around)
            with pytest.raises(OSError, match=f"'a-active' cannot have {ABSURD} bytes"):
                await rig.registry.resize(disk.filter, ABSURD)
            assert {node.length for node in disks_of(disk.filter)} == {LENGTH}
            await play(rig, disk, model, [*around, ("grow", 0, 777), *around, ("checkpoint", 0, 1)])
            await rig.close()

    run(main)


@over_four_disks
@pytest.mark.parametrize("failing", ["a-active", "a-hidden", "a-secondary"])
def test_a_disk_that_fails_when_it_has_grown_is_put_back_with_the_others(failing: str) -> None:
    async def main() -> None:
        rig, disk, model = await replicating()
        around = [("primary", 50, 40), ("view", 30, 20)]
        await play(rig, disk, model, around)
        rig.gates.fail(failing, "truncate-done", errno.EIO)
        with pytest.raises(OSError, match="injected into truncate-done"):
            await rig.registry.resize(disk.filter, LENGTH + 5000)
        assert {node.length for node in disks_of(disk.filter)} == {LENGTH}
        await play(rig, disk, model, [*around, ("grow", 0, 777), *around, ("checkpoint", 0, 1)])
        await rig.close()

    run(main)


@over_four_disks
@pytest.mark.parametrize(("kept", "failing"), [("a-active", "a-hidden"), ("a-active", "a-secondary"),
                                               ("a-hidden", "a-secondary")])
def test_what_cannot_be_put_back_is_told_harms_nobody_and_goes_with_the_next_resize(kept: str, failing: str) -> None:
    async def main() -> None:
        rig, disk, model = await replicating()
        around = [("primary", 50, 40), ("view", 30, 20), ("checkpoint", 0, 1), ("primary", 50, 40)]
        await play(rig, disk, model, around)
        assert not unevenness(disk.filter)
        rig.gates.close(failing)
        growing = asyncio.create_task(rig.registry.resize(disk.filter, LENGTH + 5000))
        await until(lambda: rig.gates.waiting)
        rig.gates.fail(failing, "truncate", errno.ENOSPC)
        rig.gates.fail(kept, "truncate", errno.EIO)
        rig.gates.open()
        with pytest.raises(OSError, match=f"'{kept}' has {LENGTH + 5000} bytes now, and could not have {LENGTH} again"):
            await growing
        assert f"'{kept}' has {LENGTH + 5000} bytes" in unevenness(disk.filter)
        assert disk.primary.length == LENGTH
        await disk.primary.pwrite(LENGTH - 100, b"p" * 100)
        assert (await disk.read_view())[:LENGTH] == model.view
        model.latest[-100:] = b"p" * 100
        await rig.registry.resize(disk.filter, LENGTH + 777)
        model.grow(LENGTH + 777)
        assert not unevenness(disk.filter)
        await play(rig, disk, model, [*around, ("grow", 0, 9000), ("checkpoint", 0, 1)])
        await rig.close()

    run(main)


@over_four_disks
def test_a_growth_can_be_taken_back() -> None:
    async def main() -> None:
        rig, disk, model = await replicating()
        await play(rig, disk, model, [("primary", 50, 40), ("grow", 0, 12345)])
        await rig.registry.resize(disk.filter, LENGTH)
        del model.latest[LENGTH:], model.view[LENGTH:]
        await play(rig, disk, model, [("primary", 3000, 3000), ("view", 10, 5), ("grow", 0, 5), ("checkpoint", 0, 1)])
        await rig.close()

    run(main)


@over_four_disks
def test_others_cannot_resize_what_is_replicated() -> None:
    async def main() -> None:
        rig = await Rig.open()
        [disk] = rig.disks
        await rig.registry.start_all("secondary")
        with pytest.raises(OperationBlocked, match="it is replicated by 'a-filter'"):
            rig.graph.find("a").check_operation("resize")
        await rig.registry.stop_all(failover=False)
        rig.graph.find("a").check_operation("resize")
        with pytest.raises(ReplicationError, match="resize"):
            await rig.registry.resize(disk.filter, 2 * LENGTH)
        await rig.close()

    run(main)


@over_four_disks
def test_shrinking_is_refused_with_the_reason() -> None:
    check_growth(5, 5)
    with pytest.raises(OptionError, match="at least 5 bytes, as the disk has now: it can only grow, because"):
        check_growth(5, 4)
