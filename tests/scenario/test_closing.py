"""What a monitor sees of a program that ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockstep.daemon.primary import Primary
from blockstep.daemon.standby import Standby
from blockstep.errors import ConnectionLost
from blockstep.qmp.client import open_connection
from tests.scenario.pair import with_pair


@pytest.mark.parametrize("role", ["primary", "standby"])
def test_a_command_that_comes_while_the_disks_are_taken_down_is_not_begun(
        tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing left that its answer could be about: the connection ends without one."""
    told: list[object] = []

    async def test(primary: Primary, standby: Standby) -> None:
        await primary.open()
        side, path = (primary, "p.qmp") if role == "primary" else (standby, "s.qmp")
        monitor = await open_connection(tmp_path / path)
        assert (await monitor.execute("query-replication"))["role"] == role
        users = [disk.view for disk in standby.disks.values()] + [disk.backend for disk in primary.disks.values()]
        real = side.graph.detach_backend

        async def detach_backend(backend: Any) -> None:
            await real(backend)
            if backend in users and not told:
                asking = asyncio.get_running_loop().create_task(monitor.execute("query-replication"))
                await asyncio.wait([asking], timeout=0.2)
                await monitor.close()
                told.extend(await asyncio.gather(asking, return_exceptions=True))

        monkeypatch.setattr(side.graph, "detach_backend", detach_backend)

    with_pair(tmp_path, test)
    assert [type(each) for each in told] == [ConnectionLost]
