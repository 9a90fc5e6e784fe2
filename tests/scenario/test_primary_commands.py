"""A primary in this process: what its program does in moments that a test of processes does not meet."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from blockstep.block.driver import Driver
from blockstep.daemon import good_end, promotion
from blockstep.daemon.primary import Primary, PrimaryConfig
from blockstep.daemon.standby import Standby
from blockstep.errors import BlockstepError, OptionError
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.qmp.commands.replication import PairResizeArguments, ReplicationState
from blockstep.qmp.schema import Monitor
from blockstep.replication import coordinator as c
from tests.scenario.pair import SIZE, a_disk, until, with_pair

pytestmark = pytest.mark.usefixtures("four_disks")


def config(directory: Path) -> PrimaryConfig:
    """One of a primary whose standby is not there."""
    return PrimaryConfig(pair="p", disks=(a_disk("d", directory / "d.img"),),
                         standby=InetAddress("127.0.0.1", 1), export=UnixAddress(str(directory / "nbd")),
                         qmp=directory / "qmp", state=directory / "ended")


@pytest.mark.parametrize("turns", range(3))
def test_a_primary_that_is_told_to_end_at_once_ends_quietly(tmp_path: Path, turns: int) -> None:
    async def main() -> None:
        primary = Primary(config(tmp_path))
        await primary.open()
        for _ in range(turns):
            await asyncio.sleep(0)
        await primary.close()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert [str(one.message) for one in told if issubclass(one.category, RuntimeWarning)] == []


@pytest.mark.parametrize(("durable", "asked", "full"), [(0, 0, False), (-1, 0, False), (-2, 0, False),
                                                      (1, 1, True), (0, 1, False), (-1, -1, True), (-2, -1, True)])
def test_a_standby_at_a_checkpoint_that_is_forgotten_or_was_never_asked_for_gets_everything(
        tmp_path: Path, durable: int, asked: int, full: bool) -> None:
    """It says that this primary has committed, and it was another one: one of the hosts was put back to a snapshot.

    After one that is older than the last that is durable the primary does not know any more what was written.
    """
    syncs: list[bool] = []

    async def test(primary: Primary, standby: Standby) -> None:
        begin = primary.sync.begin

        async def noted(full: bool) -> None:
            syncs.append(full)
            await begin(full)

        primary.sync.begin = noted  # type: ignore[method-assign]
        await primary.open()
        await until(lambda: primary.coordinator.protected)
        for _ in range(3):
            await primary.checkpoint()
        await primary.checkpoints.settled()
        primary.checkpoints.durable += durable
        primary.coordinator.asked += asked
        primary.disks["a"].link.fail(OSError(errno.EIO, "cut"))
        await until(lambda: primary.coordinator.protected)

    with_pair(tmp_path, test)
    assert syncs == [True, full]


def test_a_primary_that_could_not_start_leaves_the_note_of_its_last_end(tmp_path: Path) -> None:
    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        await until(lambda: primary.coordinator.protected)

    with_pair(tmp_path, test)
    note = tmp_path / "primary.ended"
    before = json.loads(note.read_bytes())

    async def main() -> None:
        right = replace(config(tmp_path), disks=tuple(a_disk(name, tmp_path / f"{name}.primary") for name in "ab"),
                        state=note)
        for wrong in (replace(right, export=UnixAddress("x" * 200)), replace(right, export_tls=tmp_path / "none")):
            primary = Primary(wrong)
            with pytest.raises((OSError, BlockstepError)):
                await primary.open()

    asyncio.run(main())
    end = good_end.read(note, "p", [a_disk(name, tmp_path / f"{name}.primary") for name in "ab"])
    assert end is not None
    assert (end.instance, end.epoch, end.asked) == (before["instance"], before["epoch"], before["asked"])
    assert end.asked == end.epoch > 0


def test_a_primary_whose_disks_never_were_the_standbys_checkpoint_does_not_note_that_they_are(tmp_path: Path) -> None:
    """A new one finds a standby that has an older one's checkpoint, and is stopped before it has copied its disks."""
    async def test(new: Primary, standby: Standby) -> None:
        old = Primary(replace(new.config, state=tmp_path / "old.ended"))
        await old.open()
        await until(lambda: old.coordinator.protected)
        await old.close()
        begun = asyncio.Event()

        async def begin(full: bool) -> None:
            begun.set()
            await asyncio.Event().wait()

        new.sync.begin = begin  # type: ignore[method-assign]
        await new.open()
        await begun.wait()
        assert new.coordinator.epoch == standby.situation.epoch > 0

    with_pair(tmp_path, test)
    disks = [a_disk(name, tmp_path / f"{name}.primary") for name in "ab"]
    end = good_end.read(tmp_path / "primary.ended", "p", disks)
    assert end is not None
    assert (end.epoch, end.disks["a"].lacks) == (0, b"")


def test_how_old_the_checkpoint_is_outlives_a_primary_that_took_none(tmp_path: Path) -> None:
    now = 100.0

    async def main() -> None:
        nonlocal now
        primary = Primary(config(tmp_path), lambda: now)
        await primary.open()
        primary.checkpoints.committed_at = now
        now += 50
        await primary.close()
        primary = Primary(config(tmp_path), lambda: now)
        await primary.open()
        assert primary.status().checkpoint is None
        now += 50
        await primary.close()

    asyncio.run(main())
    end = good_end.read(tmp_path / "ended", "p", config(tmp_path).disks)
    assert end is not None
    assert 100 <= end.age < 120


def test_a_primary_leaves_the_memory_of_a_promotion_alone(tmp_path: Path) -> None:
    """On a host whose standby was promoted, with the options of that one: a standby would not be refused any more."""
    promotion.write(tmp_path / "ended", "p", 1, "latest", [])

    async def main() -> None:
        with pytest.raises(OptionError, match=r"--state.*another file.*promotion"):
            await Primary(config(tmp_path)).open()

    asyncio.run(main())
    with pytest.raises(OptionError, match="was promoted"):
        promotion.check(tmp_path / "ended", "p")


def test_many_requests_at_a_time_are_few_checkpoints(tmp_path: Path) -> None:
    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        await until(lambda: primary.coordinator.protected)
        epoch = primary.coordinator.epoch
        answers = await asyncio.gather(*(primary.checkpoint() for _ in range(8)))
        assert {answer.epoch for answer in answers} == {epoch + 1}

    with_pair(tmp_path, test)


def test_what_is_announced_of_a_checkpoint_that_another_one_follows_at_once_is_what_lasts(tmp_path: Path) -> None:
    async def test(primary: Primary, standby: Standby) -> None:
        told: list[str] = []
        primary.emit = lambda event: told.append(event.state) if isinstance(  # type: ignore[method-assign]
            event, ReplicationState) else None
        await primary.open()
        await until(lambda: primary.coordinator.protected)
        primary.coordinator.reason = "the last checkpoint failed"  # so that the next one is news
        await asyncio.gather(primary.checkpoint(), primary.checkpoint())
        assert told == ["syncing", "replicating", "replicating"]

    with_pair(tmp_path, test)


def faulty(node: Driver, *lengths: int, grows: bool = False) -> Callable[[], None]:
    """Let it fail to get these lengths, ``grows``: when it has a greater one already. Returns what ends that."""
    truncate = node.truncate

    async def fail(length: int) -> None:
        if length not in lengths:
            await truncate(length)
            return
        if grows and length > node.length:
            await truncate(length)
        raise OSError(errno.EIO, f"{node.name} is faulty")

    node.truncate = fail  # type: ignore[method-assign]
    return lambda: delattr(node, "truncate")


@pytest.mark.parametrize("part", ["active", "hidden", "secondary"])
def test_a_growth_that_cannot_be_taken_back_on_the_standby_is_told_until_the_next_one(
    tmp_path: Path, part: str
) -> None:
    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        await until(lambda: primary.status().health == "healthy")
        heal = [faulty(primary.graph.find("a-disk"), 2 * SIZE), faulty(standby.graph.find(f"a-{part}"), SIZE)]
        with pytest.raises(BlockstepError, match=rf"\(a-disk is faulty\).*'a-{part}' .*\(a-{part} is faulty\)"):
            await primary.resize("a", 2 * SIZE)
        told = primary.status()
        assert told.health == "degraded"
        assert told.disks[0].reason in told.reason
        assert told.disks[0].reason.startswith(f"it has {SIZE} bytes on this side, and disk 'a' of the standby cannot")
        assert [disk.size for disk in told.disks] == [SIZE, SIZE]
        await primary.checkpoint()
        for each in heal:
            each()
        await primary.resize("a", 3 * SIZE)
        assert primary.status().health == standby.status().health == "healthy"
        assert [side.status().disks[0].size for side in (primary, standby)] == [3 * SIZE] * 2

    with_pair(tmp_path, test)


def test_a_growth_whose_standby_is_lost_meanwhile_does_not_say_that_all_is_as_before(tmp_path: Path) -> None:
    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        await until(lambda: primary.status().health == "healthy")
        resize = standby.link.resize_for_primary

        async def lost(args: PairResizeArguments, monitor: Monitor) -> None:
            await resize(args, monitor)
            primary._post(c.Failed("a link was cut"))

        standby.link.resize_for_primary = lost  # type: ignore[method-assign]
        with pytest.raises(BlockstepError, match=f"it has {SIZE} bytes on this side; the standby, which is gone"):
            await primary.resize("a", 2 * SIZE)
        assert standby.disks["a"].view.length == 2 * SIZE
        await until(lambda: primary.status().health == "healthy")
        assert [side.status().disks[0].size for side in (primary, standby)] == [SIZE] * 2

    with_pair(tmp_path, test)


def test_a_disk_that_grew_and_failed_takes_its_standby_along(tmp_path: Path) -> None:
    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        await until(lambda: primary.status().health == "healthy")
        heal = faulty(primary.graph.find("a-disk"), 2 * SIZE, SIZE, grows=True)
        with pytest.raises(BlockstepError, match=f"could not have {SIZE} again.*it has {2 * SIZE} bytes on this side"):
            await primary.resize("a", 2 * SIZE)
        assert f"a resize failed, and it has {2 * SIZE} bytes on this side" in primary.status().reason
        disk = primary.disks["a"].backend
        await disk.pwrite(2 * SIZE - 5, b"write")
        await until(lambda: primary.status().health == "healthy")
        assert [side.status().disks[0].size for side in (primary, standby)] == [2 * SIZE] * 2
        await primary.checkpoint()
        assert bytes(await standby.disks["a"].view.pread(2 * SIZE - 5, 5)) == b"write"
        heal()
        await primary.resize("a", 3 * SIZE)

    with_pair(tmp_path, test)


def test_a_disk_that_cannot_be_closed_in_order_is_told_of_when_all_are_closed(tmp_path: Path) -> None:
    async def main() -> None:
        primary = Primary(replace(config(tmp_path), disks=tuple(a_disk(name, tmp_path / name) for name in "ab")))
        await primary.open()
        disk = primary.graph.find("a-disk")
        close = disk.close

        async def fail() -> None:
            await close()
            raise OSError(errno.EIO, "not all was stored")

        disk.close = fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="node 'a-disk': not all was stored"):
            await primary.close()
        assert not primary.graph.nodes

    asyncio.run(main())
