"""A standby's commands while others of them wait for requests that take their time."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.io import enter, leave
from blockstep.daemon.standby import Standby, StandbyConfig
from blockstep.errors import BlockstepError, OptionError, PeerRefused, ReplicationError
from blockstep.jobs.commit import CommitJob
from blockstep.nbd.client import Client
from blockstep.nbd.uri import Address, InetAddress, UnixAddress, parse_uri
from blockstep.qmp.commands import replication as qmp
from blockstep.replication.hidden_disk import HiddenDiskBuffer
from tests.scenario.pair import a_disk, buffers, content_of

pytestmark = pytest.mark.usefixtures("four_disks")

SIZE = 1 << 20


def test_a_promotion_and_an_end_in_good_order_are_not_written_to_one_file(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(OptionError, match=r"--state.*another name"):
            await Standby(StandbyConfig(
                pair="p", disks=(a_disk("d", tmp_path / "d.img"),), link=InetAddress("127.0.0.1", 0),
                view=UnixAddress(str(tmp_path / "view.nbd")), qmp=tmp_path / "qmp", state=tmp_path / "p.ended",
                buffer_memory=SIZE, **buffers(tmp_path))).open()

    asyncio.run(main())


class Caller:
    """A primary's control connection, as the standby sees it."""

    peer = "primary"

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def abort(self) -> None:
        self.gone.set()


def hello(instance: str = "P1", names: str = "d") -> qmp.AttachArguments:
    return qmp.AttachArguments(pair="p", instance=instance, silence=0.0,
                               disks=[qmp.AttachDisk(name=name, size=SIZE) for name in names])


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def with_standby(tmp_path: Path, test: Callable[[Standby], Awaitable[None]], names: str = "d",
                 view: Address | None = None) -> None:
    async def main() -> None:
        standby = Standby(StandbyConfig(
            pair="p", disks=tuple(a_disk(name, tmp_path / f"{name}.img") for name in names),
            link=InetAddress("127.0.0.1", 0), view=view or UnixAddress(str(tmp_path / "view.nbd")),
            qmp=tmp_path / "qmp", state=tmp_path / "promoted", buffer_memory=SIZE, **buffers(tmp_path)))
        await standby.open()
        try:
            await test(standby)
        finally:
            await standby.close()

    asyncio.run(main())


async def replicating(standby: Standby, caller: Any, names: str = "d") -> None:
    assert (await standby.link.attach(hello("P1", names), caller)).accepted
    await standby.link.commit(1, caller)


def link_of(standby: Standby) -> Any:
    return standby.disks["d"].link


@pytest.mark.parametrize("to", ["checkpoint", "latest"])
def test_a_promotion_in_the_middle_of_an_attach_leaves_no_way_in_for_the_primary(tmp_path: Path, to: Any) -> None:
    """attach cuts the old connection and waits for its write ► failover ► the write ends ► attach goes on."""

    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        old = link_of(standby)
        await enter(old)  # a write of the old connection takes its time
        again: Any = Caller()
        attaching = asyncio.create_task(standby.link.attach(hello(), again))
        await turns()
        promoting = asyncio.create_task(standby.fail_over(to))
        await turns()
        leave(old)
        await promoting
        with pytest.raises(ReplicationError, match="only the attached primary"):
            await attaching
        assert not (await standby.link.attach(hello(), again)).accepted
        assert link_of(standby) is None
        assert standby.link.server is not None
        assert len(standby.link.server.exports) == 0

    with_standby(tmp_path, test)


def test_two_attaches_at_a_time_leave_the_later_one(tmp_path: Path) -> None:
    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        old = link_of(standby)
        await enter(old)
        second: Any = Caller()
        third: Any = Caller()
        attaching = [asyncio.create_task(standby.link.attach(hello(), caller)) for caller in (second, third)]
        await turns()
        leave(old)
        answers = await asyncio.gather(*attaching, return_exceptions=True)
        assert isinstance(answers[0], ReplicationError)
        assert isinstance(answers[1], qmp.Attached)
        assert answers[1].accepted
        assert standby.situation.primary is third

    with_standby(tmp_path, test)


def test_a_new_connection_does_not_write_into_a_checkpoint_of_the_one_before(tmp_path: Path) -> None:
    """checkpoint waits for a read of the view ► the primary gives up, comes back ► the read ends ► it writes."""

    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        view = standby.disks["d"].view
        await link_of(standby).pwrite(0, b"1" * 4096)
        await enter(view)
        committing = asyncio.create_task(standby.link.commit(2, first))
        await turns()
        again: Any = Caller()
        attaching = asyncio.create_task(standby.link.attach(hello(), again))
        await turns()
        assert link_of(standby) is None
        leave(view)
        await committing
        assert (await attaching).accepted
        await link_of(standby).pwrite(4096, b"2" * 4096)
        assert await view.pread(0, 8192) == b"1" * 4096 + bytes(4096)

    with_standby(tmp_path, test)


def test_a_write_that_was_held_back_when_its_connection_was_cut_never_comes(tmp_path: Path) -> None:
    """checkpoint ► a write waits at the border ► its connection is cut, and its range resynced ► the drain ends."""

    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        view = standby.disks["d"].view
        await enter(view)
        committing = asyncio.create_task(standby.link.commit(2, first))
        await turns()
        late = asyncio.create_task(link_of(standby).pwrite(0, b"old!"))
        await turns()
        again: Any = Caller()
        attaching = asyncio.create_task(standby.link.attach(hello(), again))
        await turns()
        leave(view)
        await asyncio.gather(committing, late, attaching, return_exceptions=True)
        await link_of(standby).pwrite(0, b"new!")
        assert isinstance(late.exception(), OSError)
        assert await standby.graph.find("d-secondary").pread(0, 4) == b"new!"

    with_standby(tmp_path, test)


def test_a_primary_that_is_stale_and_dials_anew_finds_no_disk_of_its_successor(tmp_path: Path) -> None:
    """Its control connection may be half open: it does not know yet. Its disks' connections dial by themselves."""

    async def test(standby: Standby) -> None:
        stale: Any = Caller()
        answer = await standby.link.attach(hello("P1"), stale)
        link = InetAddress("127.0.0.1", standby.link.port)
        old = await Client.connect(link, f"{answer.prefix}d")
        await old.pwrite(0, b"old!")
        stale.gone.set()
        await turns()
        other: Any = Caller()
        answer_to_other = await standby.link.attach(hello("P2"), other)
        assert answer_to_other.accepted
        with pytest.raises(OSError):
            await old.pwrite(0, b"late")
        with pytest.raises(PeerRefused):
            await Client.connect(link, f"{answer.prefix}d")
        new = await Client.connect(link, f"{answer_to_other.prefix}d")
        assert bytes(await new.pread(0, 4)) == b"old!"
        new.yank()

    with_standby(tmp_path, test)


def test_a_checkpoint_that_ends_after_another_primary_came_does_not_make_that_one_known(tmp_path: Path) -> None:
    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        view = standby.disks["d"].view
        await enter(view)
        committing = asyncio.create_task(standby.link.commit(2, first))
        await turns()
        first.gone.set()
        await turns()
        other: Any = Caller()
        attaching = asyncio.create_task(standby.link.attach(hello("P2"), other))
        await turns()
        leave(view)
        await committing
        assert (await attaching).accepted
        other.gone.set()
        await turns()
        other = Caller()
        assert (await standby.link.attach(hello("P2"), other)).instance != "P2"

    with_standby(tmp_path, test)


@pytest.mark.parametrize("what", ["checkpoint", "resize"])
def test_a_command_whose_turn_comes_when_its_connection_has_been_replaced_is_refused(tmp_path: Path, what: str) -> None:
    """A resize waits for a read of the view ► a command waits for the resize ► the primary comes back ► they go on.

    The disks are being resynced then: a checkpoint would be of half of that, and a length that of another time.
    """

    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        disk = standby.disks["d"]
        await enter(disk.view)
        growing = asyncio.create_task(standby.registry.resize(disk.filter, SIZE + 4096))
        await turns()
        late = asyncio.create_task(
            standby.link.commit(2, first) if what == "checkpoint" else
            standby.link.resize_for_primary(qmp.PairResizeArguments(disk="d", size=2 * SIZE, now=SIZE), first))
        await turns()
        again: Any = Caller()
        attaching = asyncio.create_task(standby.link.attach(hello(), again))
        await turns()
        leave(disk.view)
        await growing
        with pytest.raises(ReplicationError, match=f"{what}.*only the attached primary"):
            await late
        assert (await attaching).accepted
        status = standby.status()
        assert (status.state, status.disks[0].size) == ("resyncing", SIZE)
        assert status.checkpoint
        assert status.checkpoint.epoch == 1
        assert "only the attached primary" not in status.reason

    with_standby(tmp_path, test)


def test_a_primary_that_comes_back_is_let_in_when_its_first_checkpoint_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first disk is ready, the second takes long ► the primary comes back ► what it writes is not in the view."""

    async def test(standby: Standby) -> None:
        opening = asyncio.Event()
        set_up = HiddenDiskBuffer._set_up

        async def slowly(self: HiddenDiskBuffer) -> None:
            if self.secondary.name == "e-secondary":
                await opening.wait()
            await set_up(self)

        monkeypatch.setattr(HiddenDiskBuffer, "_set_up", slowly)
        first: Any = Caller()
        assert (await standby.link.attach(hello("P1", "de"), first)).accepted
        starting = asyncio.create_task(standby.link.commit(1, first))
        await turns()
        again: Any = Caller()
        attaching = asyncio.create_task(standby.link.attach(hello("P1", "de"), again))
        await turns()
        assert not any(disk.link for disk in standby.disks.values())
        opening.set()
        await starting
        assert (await attaching).accepted
        for disk in standby.disks.values():
            assert disk.link
            await disk.link.pwrite(0, b"new")
        assert [await disk.view.pread(0, 3) for disk in standby.disks.values()] == [bytes(3), bytes(3)]
        assert standby.status().state == "resyncing"

    with_standby(tmp_path, test, "de")


def test_a_failover_that_fails_before_it_has_begun_with_a_disk_costs_nobody_the_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note takes its time, and fails. A primary that heard of a promotion meanwhile would be fenced for good."""

    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        written = asyncio.Event()

        async def fails(*_: Any) -> None:
            await written.wait()
            raise OSError(errno.EIO, "the disk of the note is bad")

        with monkeypatch.context() as patch:
            patch.setattr(standby.ends, "_write_down", fails)
            promoting = asyncio.create_task(standby.fail_over("checkpoint"))
            await turns()
            status = standby.status()
            assert (status.role, status.state) == ("standby", "failover")
            with pytest.raises(ReplicationError, match="only the attached primary"):
                await standby.link.commit(2, primary)
            with pytest.raises(BlockstepError, match="just being promoted"):
                await standby.link.attach(hello(), primary)
            written.set()
            with pytest.raises(OSError, match="of the note is bad"):
                await promoting
        status = standby.status()
        assert (status.role, status.state, status.health) == ("standby", "replicating", "healthy")
        await link_of(standby).pwrite(0, b"goes on")
        await standby.link.commit(2, primary)
        assert await standby.disks["d"].view.pread(0, 7) == b"goes on"
        await standby.fail_over("checkpoint")
        assert standby.status().role == "promoted"

    with_standby(tmp_path, test)


def test_a_stop_that_fails_before_it_has_begun_with_a_disk_costs_nobody_the_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The primary's exports are cut, after a write that takes its time ► then the disk cannot be stopped."""

    async def fails(self: HiddenDiskBuffer) -> None:
        raise OSError(errno.EIO, "injected")

    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        writing = link_of(standby)
        await enter(writing)
        with monkeypatch.context() as patch:
            patch.setattr(HiddenDiskBuffer, "drop", fails)
            stopping = asyncio.create_task(standby.stop_replication())
            await turns()
            assert standby.status().state == "stopping"
            with pytest.raises(BlockstepError, match="just being stopped"):
                await standby.link.attach(hello(), primary)
            leave(writing)
            with pytest.raises(ReplicationError, match="injected"):
                await stopping
        assert (await standby.link.attach(hello(), primary)).accepted
        await standby.link.commit(2, primary)
        assert standby.status().health == "healthy"

    with_standby(tmp_path, test)


def test_a_standby_that_is_told_to_end_in_the_middle_of_a_failover_ends_with_what_was_chosen(tmp_path: Path) -> None:
    promoting: list[asyncio.Task[qmp.Promoted]] = []

    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        await link_of(standby).pwrite(0, b"latest")
        written, write_down = asyncio.Event(), standby.ends._write_down

        async def slowly(to: str, unmerged: list[str]) -> None:
            await written.wait()
            await write_down(to, unmerged)

        async def goes_on() -> None:
            await turns()
            written.set()

        standby.ends._write_down = slowly  # type: ignore[method-assign]
        promoting.append(asyncio.create_task(standby.fail_over("latest")))
        await turns()
        promoting.append(asyncio.create_task(goes_on()))  # type: ignore[arg-type]

    with_standby(tmp_path, test)
    assert promoting[0].result().epoch == 1
    assert content_of(tmp_path / "d.img")[:6] == b"latest"
    assert (tmp_path / "promoted").exists()


def failing_for_e(method: str) -> Any:
    """A method of the disk buffer that fails for disk e, before it does anything."""
    original = getattr(HiddenDiskBuffer, method)

    async def fails(self: HiddenDiskBuffer) -> None:
        if self.secondary.name == "e-secondary":
            raise OSError(errno.EIO, "injected")
        await original(self)

    return fails


ENDS: list[Any] = [("checkpoint", "fail_over", b"1"), ("latest", "drop", b"2")]


@pytest.mark.parametrize(("to", "step", "expected"), ENDS)
def test_a_failover_of_which_a_part_failed_goes_on_when_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any, step: str, expected: bytes
) -> None:
    """The first disk is promoted, the second cannot be: no primary comes in, status says which and what to do."""

    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        assert (await standby.link.attach(hello("P1", "de"), primary)).accepted
        for content in (b"1", b"2"):
            for disk in standby.disks.values():
                assert disk.link
                await disk.link.pwrite(0, content * 4096)
            if content == b"1":
                await standby.link.commit(1, primary)
        with monkeypatch.context() as patch:
            patch.setattr(HiddenDiskBuffer, step, failing_for_e(step))
            for _ in range(2):  # the second time finds d promoted, and leaves it alone
                with pytest.raises(ReplicationError, match=r"disk 'e' is not promoted.*checkpoint 1.*injected"):
                    await standby.fail_over(to)
                status = await standing_still(standby)
                assert (status.state, status.health, status.role) == ("failover-failed", "at-risk", "promoted")
                assert [disk.state for disk in status.disks] == ["promoted", "running"]
                assert "'blockstep failover" + (" --to latest" if to == "latest" else "'") in status.reason
                assert status.disks[0].reason == ""
                assert "injected" in status.disks[1].reason
                assert not (await standby.link.attach(hello("P1", "de"), primary)).accepted
        await standby.fail_over(to)
        status = await standing_still(standby)
        assert (status.state, status.reason) == ("promoted", "it has no standby of its own")
        assert [(disk.state, disk.reason) for disk in status.disks] == [("promoted", ""), ("promoted", "")]
        for name in "de":
            assert await standby.disks[name].view.pread(0, 4096) == expected * 4096
            assert await standby.graph.find(f"{name}-secondary").pread(0, 4096) == expected * 4096

    with_standby(tmp_path, test, "de")


async def standing_still(standby: Standby) -> qmp.PairStatus:
    await standby.ends._merged()
    await turns()
    return standby.status()


def test_a_merge_that_failed_is_done_anew_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: CommitJob) -> None:
        raise OSError(errno.EIO, "the disk is bad")

    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        await link_of(standby).pwrite(0, b"since" * 1000)
        view = standby.disks["d"].view
        await view.pwrite(70000, b"mine")
        with monkeypatch.context() as patch:
            patch.setattr(CommitJob, "run", fails)
            await standby.fail_over("checkpoint")
            status = await standing_still(standby)
        assert (status.state, status.disks[0].state) == ("failover-failed", "failover-failed")
        assert "disk 'd' is promoted, but not merged: " in status.reason
        assert "the disk is bad" in status.disks[0].reason
        await view.pwrite(4096, b"between")
        await standby.fail_over("checkpoint")
        status = await standing_still(standby)
        assert (status.state, status.health, status.disks[0].reason) == ("promoted", "degraded", "")
        content = await standby.graph.find("d-secondary").pread(0, 80000)
        assert content == bytes(4096) + b"between" + bytes(70000 - 4103) + b"mine" + bytes(9996)
        assert not standby.graph.find("d").blockers

    with_standby(tmp_path, test)


def test_a_repeated_failover_changes_nothing_and_cannot_choose_again(tmp_path: Path) -> None:
    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        first = await asyncio.gather(*(standby.fail_over("checkpoint") for _ in range(3)))
        await standing_still(standby)
        assert {answer.epoch for answer in (*first, await standby.fail_over("checkpoint"))} == {1}
        with pytest.raises(ReplicationError, match="promoted with --to checkpoint"):
            await standby.fail_over("latest")
        with pytest.raises(ReplicationError, match="it is promoted"):
            await standby.stop_replication()

    with_standby(tmp_path, test)


@pytest.mark.parametrize("gone", [False, True])
def test_half_of_a_resync_is_not_the_latest_state_of_the_disks(tmp_path: Path, gone: bool) -> None:
    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        first.gone.set()
        await turns()
        again: Any = Caller()
        assert (await standby.link.attach(hello("P2"), again)).accepted
        await link_of(standby).pwrite(0, b"half")
        if gone:
            again.gone.set()
            await turns()
        with pytest.raises(ReplicationError, match=r"has not ended.*'--to checkpoint' takes checkpoint 1"):
            await standby.fail_over("latest")
        with pytest.raises(ReplicationError, match=r"has not ended.*'blockstep stop --quit'"):
            await standby.stop_replication()
        assert standby.status().state == ("lost" if gone else "resyncing")
        await standby.fail_over("checkpoint")
        assert await standby.disks["d"].view.pread(0, 4) == bytes(4)

    with_standby(tmp_path, test)


def test_a_resync_that_has_ended_is_the_latest_state_of_the_disks(tmp_path: Path) -> None:
    async def test(standby: Standby) -> None:
        first: Any = Caller()
        await replicating(standby, first)
        again: Any = Caller()
        assert (await standby.link.attach(hello(), again)).accepted
        await standby.link.commit(2, again)
        await link_of(standby).pwrite(0, b"last")
        await standby.fail_over("latest")
        assert await standby.disks["d"].view.pread(0, 4) == b"last"

    with_standby(tmp_path, test)


def test_a_stop_of_which_a_part_failed_goes_on_when_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary, "de")
        with monkeypatch.context() as patch:
            patch.setattr(HiddenDiskBuffer, "drop", failing_for_e("drop"))
            with pytest.raises(ReplicationError, match="injected"):
                await standby.stop_replication()
        status = standby.status()
        assert (status.state, status.health) == ("stopped", "at-risk")
        assert [disk.state for disk in status.disks] == ["stopped", "running"]
        assert "'blockstep stop' again" in status.reason
        await standby.stop_replication()
        status = standby.status()
        assert (status.health, [disk.state for disk in status.disks]) == ("degraded", ["stopped", "stopped"])

    with_standby(tmp_path, test, "de")


def test_a_standby_that_ends_goes_on_with_a_failover_of_which_a_part_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary, "de")
        link = standby.disks["e"].link
        assert link
        await link.pwrite(0, b"since")
        with monkeypatch.context() as patch:
            patch.setattr(HiddenDiskBuffer, "fail_over", failing_for_e("fail_over"))
            with pytest.raises(ReplicationError, match="injected"):
                await standby.fail_over("checkpoint")

    with_standby(tmp_path, test, "de")
    assert not any(content_of(tmp_path / "e.img"))


def test_a_checkpoint_that_could_not_be_given_up_in_order_is_none_any_more_and_the_next_attach_goes_on(
    tmp_path: Path
) -> None:
    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        standby.link._no_room = True
        hidden = standby.graph.find("d-hidden")

        async def fail() -> Any:
            raise OSError(errno.ENOSPC, "full")

        hidden.prepare_empty = fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="full"):
            await standby.link.attach(hello(), primary)
        del hidden.prepare_empty  # type: ignore[method-assign]
        assert standby.status().checkpoint is None
        assert (await standby.link.attach(hello(), primary)).accepted
        await standby.link.commit(2, primary)
        assert (standby.status().state, standby.status().health) == ("replicating", "healthy")

    with_standby(tmp_path, test)


def test_a_standby_is_not_healthy_while_its_primary_copies_over_an_old_checkpoint(tmp_path: Path) -> None:
    """Its view is whole, but of a time before the primary was lost."""

    async def test(standby: Standby) -> None:
        told: list[tuple[str, str]] = []
        standby.emit = lambda event: told.append((event.state, event.health)) if isinstance(  # type: ignore[method-assign]
            event, qmp.ReplicationState) else None
        primary: Any = Caller()
        await replicating(standby, primary)
        assert (standby.status().state, standby.status().health) == ("replicating", "healthy")
        primary.gone.set()
        await turns()
        again: Any = Caller()
        assert (await standby.link.attach(hello("P2"), again)).accepted
        status = standby.status()
        assert (status.state, status.health) == ("resyncing", "degraded")
        assert "the view stays at checkpoint 1" in status.reason
        await standby.link.commit(2, again)
        assert (standby.status().state, standby.status().reason) == ("replicating", "")
        assert told == [("syncing", "at-risk"), ("replicating", "healthy"), ("lost", "at-risk"),
                        ("resyncing", "degraded"), ("replicating", "healthy")]

    with_standby(tmp_path, test)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::", ""])
def test_port_0_is_nowhere_said_but_the_one_that_it_became(tmp_path: Path, host: str) -> None:
    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        status = standby.status()
        promoted = await standby.fail_over("checkpoint")
        assert promoted.exports == standby.exports == status.exports == standby.status().exports
        [uri] = promoted.exports
        address = parse_uri(uri).address
        assert isinstance(address, InetAddress)
        server = standby._view_server
        assert server
        assert {listener.sock.getsockname()[1] for listener in server._listeners} == {address.port}
        assert status.link.endswith(f":{standby.link.port}")
        assert standby.link.port

    with_standby(tmp_path, test, view=InetAddress(host, 0))


def test_a_standby_that_cannot_put_its_disks_back_to_the_checkpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(self: CommitJob) -> None:
        raise OSError(5, "the disk is bad")

    async def test(standby: Standby) -> None:
        primary: Any = Caller()
        await replicating(standby, primary)
        await link_of(standby).pwrite(0, b"since")
        monkeypatch.setattr(CommitJob, "run", fails)

    with pytest.raises(ReplicationError, match="the disk is bad"):
        with_standby(tmp_path, test)
