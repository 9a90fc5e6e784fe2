"""A primary that loses its standby, or is told to stop, in the middle of what it does with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.io import leave
from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.primary import Primary, PrimaryConfig
from blockstep.daemon.standby import Standby, StandbyConfig
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.replication import coordinator as c
from blockstep.replication.link import Link

SIZE = 1 << 20


def with_pair(tmp_path: Path, test: Callable[[Primary, Standby], Awaitable[None]]) -> None:
    """The primary is not opened yet: `test` does that."""

    async def main() -> None:
        standby = Standby(StandbyConfig(
            pair="p", disks=tuple(DiskSpec(name, tmp_path / f"{name}.standby", SIZE) for name in "ab"),
            link=InetAddress("127.0.0.1", 0), view=UnixAddress(str(tmp_path / "view")), qmp=tmp_path / "s.qmp",
            state=tmp_path / "promoted",
            buffer_memory=SIZE, buffer_dir=None))
        await standby.open()
        primary = Primary(PrimaryConfig(
            pair="p", disks=tuple(DiskSpec(name, tmp_path / f"{name}.primary", SIZE) for name in "ab"),
            standby=InetAddress("127.0.0.1", standby.link.port), export=UnixAddress(str(tmp_path / "export")),
            qmp=tmp_path / "p.qmp", checkpoint_every=0.0, checkpoint_bytes=0))
        try:
            await test(primary, standby)
        finally:
            await primary.close()
            await standby.close()

    asyncio.run(main())


async def until(condition: Callable[[], object], limit: float = 10.0) -> None:
    async with asyncio.timeout(limit):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


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
