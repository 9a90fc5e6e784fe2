"""A primary that loses its standby, or is told to stop, in the middle of what it does with it."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.io import leave
from blockstep.daemon.primary import Primary
from blockstep.daemon.standby import Standby
from blockstep.nbd import dial
from blockstep.nbd.uri import Address, UnixAddress
from blockstep.replication import coordinator as c
from blockstep.replication.catch_up import CatchUp
from blockstep.replication.link import LOOKS, Link
from blockstep.testing import clock
from tests.scenario.pair import SIZE, turns, until, with_pair
from tests.scenario.pair_world import MAX_STALL, Shape, World

pytestmark = pytest.mark.usefixtures("four_disks")


def test_a_sync_that_ends_after_its_standby_was_let_go_leaves_the_link_off(tmp_path: Path) -> None:
    """The last section waits for a request of the guest ► stop ► the control connection closes slowly ► it goes on."""

    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        guest = primary.disks["a"].backend

        def hold(name: str, data: Mapping[str, Any]) -> None:
            if data == {"id": "sync-a", "status": "pending"}:
                guest.in_flight += 1

        primary.jobs.on_event = hold
        await until(lambda: guest.in_flight)
        await turns()
        closing = asyncio.Event()
        control = primary.standby.control
        assert control is not None
        close = control.close

        async def slowly() -> None:
            await closing.wait()
            await close()

        control.close = slowly  # type: ignore[method-assign]
        stopping = asyncio.create_task(primary.stop_replication())
        await turns()
        leave(guest)
        await turns()
        is_on = primary.disks["a"].link.on
        closing.set()
        await stopping
        assert not is_on
        await guest.pwrite(0, b"alone")

    with_pair(tmp_path, test)


def test_a_sync_that_fails_does_not_wait_for_those_of_the_other_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the first disk may take hours yet when that of the second one fails."""

    async def test(primary: Primary, standby: Standby) -> None:
        copying = asyncio.Event()
        copy = CatchUp._copy_dirty

        async def copy_one(job: CatchUp) -> None:
            if job.id == "sync-b":
                raise OSError(errno.EIO, "broken")
            while not job.cancelled:
                copying.set()
                await job.sleep()

        async def leave_nothing_out(job: CatchUp, *_: Any) -> None:
            pass

        monkeypatch.setattr(CatchUp, "_copy_dirty", copy_one)
        monkeypatch.setattr(CatchUp, "_compare", leave_nothing_out)
        await primary.open()
        await copying.wait()
        await until(lambda: primary.coordinator.state is c.State.OFFLINE)
        assert primary.coordinator.reason == "broken"
        monkeypatch.setattr(CatchUp, "_copy_dirty", copy)
        await until(lambda: primary.coordinator.protected)

    with_pair(tmp_path, test)


@pytest.mark.parametrize("ack", ["local", "both"])
def test_a_half_open_link_is_noticed_within_max_stall_and_no_write_waits_for_longer(tmp_path: Path, ack: Any) -> None:
    longest = MAX_STALL * (1 + 2 / LOOKS)

    async def test() -> None:
        time = asyncio.get_running_loop().time
        world = World(tmp_path, Shape(sizes=(SIZE,), ack=ack))
        await world.open()
        guest, stop, waited = world.clients["guest", "a"], asyncio.Event(), [0.0]

        async def write() -> None:
            while not stop.is_set():
                began, offset, data = time(), len(waited) % 16 * 65536, bytes([len(waited) % 256]) * 65536
                known = world.model.disks["a"].begin("guest", offset, data)
                world.written(offset, len(data))
                await guest.pwrite(offset, data)
                if known:
                    world.model.disks["a"].end("guest", known, True)
                waited.append(time() - began)
                await asyncio.sleep(0.01)

        try:
            await clock.until(lambda: world.primary.coordinator.protected, 5.0)
            writer = asyncio.create_task(write())
            await clock.until(lambda: len(waited) > 50, 5.0)
            world.proxy.half_open()
            await clock.until(lambda: world.primary.coordinator.state is c.State.OFFLINE, longest)
            before = len(waited)
            await clock.until(lambda: len(waited) > before + 50, 5.0)
            world.proxy.heal()
            await clock.until(lambda: world.primary.coordinator.protected, 10.0)
            stop.set()
            await writer
            assert max(waited) <= longest
            assert max(waited) > MAX_STALL / 2  # else nothing has been held up
            await world.primary.checkpoint()
            both = [bytes(await world.clients[side, "a"].pread(0, SIZE)) for side in ("guest", "view")]
            assert len(set(both)) == 1, "the two ends differ"
        finally:
            await world.close()

    clock.run(test())


def test_a_connection_that_hangs_in_an_attach_is_given_up_after_max_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent: list[socket.socket] = []
    connected = dial.open_socket

    async def hung(address: Address) -> socket.socket:
        if isinstance(address, UnixAddress) or silent:
            return await connected(address)
        silent.extend(socket.socketpair())
        silent[0].setblocking(False)
        return silent[0]

    async def test() -> None:
        world = World(tmp_path, Shape())
        await world.open()
        try:
            await clock.until(lambda: "does not answer" in world.primary.coordinator.reason, MAX_STALL + 0.1)
            await clock.until(lambda: world.primary.coordinator.protected, 2.0)
        finally:
            await world.close()

    monkeypatch.setattr(dial, "open_socket", hung)
    clock.run(test())
    silent[1].close()


def test_a_disk_that_grows_while_its_standby_is_attached_is_copied_to_its_end(tmp_path: Path) -> None:
    """The growth waits for a request of the guest ► the standby is attached, with the old length ► the disk grows."""

    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        guest, size = primary.disks["a"].backend, SIZE + 70000
        guest.in_flight += 1
        growing = asyncio.create_task(primary.resize("a", size))
        await until(lambda: primary.coordinator.state is c.State.SYNCING)
        await turns()
        leave(guest)
        await growing
        await guest.pwrite(size - 4, b"tail")
        await until(lambda: primary.coordinator.protected)
        await primary.checkpoint()
        view = standby.disks["a"].view
        assert view.length == size
        assert bytes(await view.pread(size - 4, 4)) == b"tail"

    with_pair(tmp_path, test)


def test_a_loss_while_the_syncs_are_being_set_up_is_recovered_from(tmp_path: Path) -> None:
    """The setup of the first disk's job waits for a request of the guest ► the standby is lost ► the request ends."""

    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        guest = primary.disks["a"].backend
        guest.in_flight += 1
        await until(lambda: primary.jobs.list())
        await turns()
        primary._post(c.Failed("lost"))
        await turns()
        leave(guest)
        await until(lambda: primary.coordinator.protected)
        await guest.pwrite(0, b"both")
        await primary.checkpoint()

    with_pair(tmp_path, test)


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError()])
def test_writes_held_for_a_checkpoint_whose_answer_is_unknown_are_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """The standby may not have begun with it yet: what came after the mark must not get there before it has."""

    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        await until(lambda: primary.coordinator.protected)
        released: list[Link] = []
        monkeypatch.setattr(Link, "release", lambda link: released.append(link))

        async def unanswered(command: str, **arguments: Any) -> None:
            await primary.disks["a"].backend.pwrite(0, b"after the mark")
            raise error

        primary.standby.ask = unanswered  # type: ignore[method-assign]
        primary._post(c.Due())
        await until(lambda: primary.coordinator.state is c.State.OFFLINE)
        assert not released
        monkeypatch.undo()
        del primary.standby.ask
        await until(lambda: primary.coordinator.protected)

    with_pair(tmp_path, test)
