"""stop and cont: the requests of guests wait, those of peers go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockstep.nbd.client import Client
from blockstep.nbd.uri import UnixAddress
from tests.daemon import Daemon, daemon, refused
from tests.disks import faulty, ram
from tests.scenarios import scenario


async def served(d: Daemon, *nodes: str) -> list[Client]:
    path = str(d.path.with_suffix(".nbd"))
    await d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    for node in nodes:
        await d.qmp("nbd-server-add", device=node, writable=True)
    return [await Client.connect(UnixAddress(path), node) for node in nodes]




def states(d: Daemon) -> list[str]:
    return [event["event"] for event in d.events if event["event"] in ("STOP", "RESUME")]


@scenario
async def test_guests_wait_between_stop_and_cont(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        disk = await ram(d.inventory.graph, "disk")
        (guest,) = await served(d, "disk")
        assert await d.qmp("query-status") == {"running": True, "singlestep": False, "status": "running"}
        await guest.pwrite(0, b"before")
        await d.qmp("stop")
        await d.event("STOP")
        assert disk.requests[-1][0] == "flush"
        assert await d.qmp("query-status") == {"running": False, "singlestep": False, "status": "paused"}
        write = asyncio.ensure_future(guest.pwrite(0, b"during"))
        await d.qmp("nbd-server-add", device="disk", name="later")
        later = await Client.connect(UnixAddress(str(d.path.with_suffix(".nbd"))), "later")
        read = asyncio.ensure_future(later.pread(0, 6))
        await d.qmp("stop")
        assert disk.content[:6] == b"before"
        await d.qmp("cont")
        await d.event("RESUME")
        await write
        await read
        assert disk.content[:6] == b"during"
        await d.qmp("cont")
        assert states(d) == ["STOP", "RESUME"]
        assert all("data" not in event for event in d.events if event["event"] in ("STOP", "RESUME"))
        await guest.close()
        await later.close()


@scenario
async def test_peers_are_served_while_guests_wait(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "parent0")
        await d.inventory.graph.open({"driver": "overlay", "node-name": "top", "backing": "parent0"})
        (peer,) = await served(d, "parent0")
        await d.qmp("stop")
        await peer.pwrite(0, b"of the primary")
        await peer.close()


@scenario
async def test_a_stop_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        debug, disk = await faulty(d.inventory.graph, "disk")
        (guest,) = await served(d, "disk")
        debug.suspend("write", "held")
        write = asyncio.ensure_future(guest.pwrite(0, b"on its way"))
        await debug.suspended("held")
        stop = asyncio.ensure_future(d.qmp("stop"))
        await d.event("STOP")
        assert not stop.done()
        debug.resume("held")
        await stop
        assert disk.content[:10] == b"on its way"
        await write
        await guest.close()


@scenario
async def test_a_flush_that_fails_is_told_and_guests_wait_all_the_same(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        debug, _ = await faulty(d.inventory.graph, "disk")
        other = await ram(d.inventory.graph, "other")
        guest, client = await served(d, "disk", "other")
        debug.fail("flush", once=True)
        with refused(match="node 'disk': Input/output error"):
            await d.qmp("stop")
        assert other.requests == [("flush", 0, 0)]
        await client.close()
        assert (await d.qmp("query-status"))["status"] == "paused"
        await d.qmp("cont")
        await guest.pread(0, 512)
        await guest.close()


@scenario
async def test_the_end_does_not_wait_for_guests_that_are_held_back(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "disk")
        (guest,) = await served(d, "disk")
        await d.qmp("stop")
        read = asyncio.ensure_future(guest.pread(0, 512))
        await asyncio.wait_for(d.inventory.exports.close(), 5)
        with pytest.raises(OSError):
            await read
        await guest.close()


@scenario
async def test_neither_takes_arguments(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        for command in ("stop", "cont"):
            with refused(match="'now' is not known"):
                await d.qmp(command, now=True)
        assert (await d.qmp("query-status"))["status"] == "running"
