"""yank and query-yank: a connection that hangs is cut off at once, and only if all that was named is there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockstep.block.permissions import READ
from tests.daemon import daemon, refused
from tests.disks import faulty
from tests.scenarios import scenario


@scenario
async def test_a_hanging_connection_is_cut_off_at_once(tmp_path: Path) -> None:
    async with daemon(tmp_path, "server") as server, daemon(tmp_path, "client") as client:
        debug, _ = await faulty(server.inventory.graph, "disk")
        path = str(tmp_path / "nbd")
        await server.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        await server.qmp("nbd-server-add", device="disk", writable=True)
        graph = client.inventory.graph
        node = await graph.open({"driver": "nbd", "node-name": "far", "export": "disk", "reconnect-delay": 60,
                                 "server": {"type": "unix", "path": path}})
        guest = graph.attach_backend(node, "guest", READ)
        assert await client.qmp("query-yank") == [{"type": "block-node", "node-name": "far"}]
        debug.suspend("read", "hangs")
        read = asyncio.ensure_future(guest.pread(0, 512))
        await debug.suspended("hangs")

        far = {"type": "block-node", "node-name": "far"}
        for instances in ([far, {"type": "block-node", "node-name": "nobody"}], [far, {"type": "migration"}],
                          [far, {"type": "chardev", "id": "compat_monitor0"}]):
            with refused("DeviceNotFound"):
                await client.qmp("yank", instances=instances)
        for wrong in ([far, {"type": "disk"}], [{"type": "block-node"}], "far"):
            with refused():
                await client.qmp("yank", instances=wrong)
        assert not read.done()

        await client.qmp("yank", instances=[far])
        with pytest.raises(OSError):
            await read
        with pytest.raises(OSError):
            await guest.pread(0, 512)
        debug.resume("hangs")
        await graph.detach_backend(guest)


@scenario
async def test_nothing_to_yank(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        assert await d.qmp("query-yank") == []
        assert await d.qmp("yank", instances=[]) == {}
        with refused(match="'instances' is missing"):
            await d.qmp("yank")
