"""Replication by commands: QEMU's names and our own, on a standby and on a primary in one process each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import ConnectionLost
from blockstep.nbd.client import Client
from blockstep.nbd.uri import UnixAddress
from tests.daemon import Daemon, daemon, refused
from tests.disks import Ram, faulty, ram
from tests.scenarios import scenario

SIZE = 1 << 16


class Standby:
    """A daemon with one replicated disk; ``parent`` is the client of its secondary disk, ``view`` of its view."""

    def __init__(self, d: Daemon, parent: Client, view: Client, secondary: Ram) -> None:
        self.d, self.parent, self.view, self.secondary = d, parent, view, secondary
        self.qmp = d.qmp

    async def sees(self) -> bytes:
        return bytes(await self.view.pread(0, 8))


@asynccontextmanager
async def standby(directory: Path) -> AsyncIterator[Standby]:
    async with daemon(directory) as d:
        graph = d.inventory.graph
        secondary = await ram(graph, "parent0", SIZE)
        await graph.open({"driver": "replication", "node-name": "childs0", "mode": "secondary", "top-id": "colo-disk0",
                          "file": {"driver": "overlay", "backing": {"driver": "overlay", "backing": "parent0"}}})
        await graph.open({"driver": "quorum", "node-name": "colo-disk0", "read-pattern": "fifo", "vote-threshold": 1,
                          "children": ["childs0"]})
        path = str(directory / "nbd")
        await d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        for name in ("parent0", "colo-disk0"):
            await d.qmp("nbd-server-add", device=name, writable=True)
        parent, view = [await Client.connect(UnixAddress(path), name) for name in ("parent0", "colo-disk0")]
        try:
            yield Standby(d, parent, view, secondary)
        finally:
            await parent.close()
            await view.close()


async def wait_merged(d: Daemon) -> None:
    await d.event("REPLICATION_FAILOVER", stage="done")


OURS = ("replication-start", {"mode": "secondary"}), ("replication-checkpoint", {}), ("replication-failover", {})
QEMUS = (("xen-set-replication", {"enable": True, "primary": False}), ("xen-colo-do-checkpoint", {}),
         ("xen-set-replication", {"enable": False, "primary": False, "failover": True}))
GUIDES = QEMUS[0], QEMUS[1], ("x-colo-lost-heartbeat", {})


@pytest.mark.parametrize("names", [OURS, QEMUS, GUIDES], ids=["ours", "xen", "guide"])
def test_a_standby_lives_through_start_checkpoint_and_failover(
        tmp_path: Path, names: tuple[tuple[str, dict[str, Any]], ...]) -> None:
    @scenario
    async def run() -> None:
        start, checkpoint, failover = names
        async with standby(tmp_path) as s:
            await s.qmp(*start)
            await s.parent.pwrite(0, b"primary1")
            assert await s.sees() == bytes(8)
            await s.qmp(*checkpoint)
            assert await s.sees() == b"primary1"
            await s.parent.pwrite(0, b"primary2")
            await s.view.pwrite(4, b"OWN!")
            assert (await s.qmp("query-colo-status")) == {"mode": "secondary", "last-mode": "none", "reason": "none"}
            await s.qmp(*failover)
            assert await s.sees() == b"primOWN!"
            with pytest.raises((ConnectionLost, OSError)):
                await s.parent.pwrite(0, b"too late")
            await wait_merged(s.d)
            assert await s.sees() == b"primOWN!" == s.secondary.content[:8]
            assert await s.qmp("query-colo-status") == {"mode": "none", "last-mode": "secondary", "reason": "request"}
            assert await s.d.event("COLO_EXIT") == {"mode": "secondary", "reason": "request"}
            assert await s.qmp("query-xen-replication-status") == {"error": False}
            await s.d.event("REPLICATION_CHECKPOINT", epoch=2)
            assert [event["data"]["state"] for event in s.d.events if event["event"] == "REPLICATION_STATE"] == [
                "replicating", "failover", "promoted"]

    run()


@scenario
async def test_stopping_a_standby_shows_what_the_primary_wrote(tmp_path: Path) -> None:
    for number, (command, arguments) in enumerate((
            ("replication-stop", {}), ("replication-failover", {"to": "latest"}),
            ("xen-set-replication", {"enable": False, "primary": False}))):
        directory = tmp_path / str(number)
        directory.mkdir()
        async with standby(directory) as s:
            await s.qmp("replication-start", mode="secondary")
            await s.parent.pwrite(0, b"primary1")
            await s.view.pwrite(0, b"own")
            await s.qmp(command, arguments)
            assert await s.sees() == b"primary1"
            assert (await s.qmp("query-replication"))["state"] == "stopped"


@scenario
async def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    async with standby(tmp_path) as s:
        for command, arguments in (
                ("replication-start", {"mode": "primary"}), ("replication-start", {"mode": "both"}),
                ("replication-start", {}), ("replication-checkpoint", {}), ("replication-stop", {}),
                ("replication-failover", {}), ("replication-failover", {"to": "yesterday"}),
                ("xen-set-replication", {"enable": True, "primary": True}), ("xen-set-replication", {"enable": True}),
                ("xen-set-replication", {"enable": True, "primary": False, "failover": False}),
                ("xen-set-replication", {"enable": False, "primary": False}),
                ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
                ("xen-colo-do-checkpoint", {}), ("x-colo-lost-heartbeat", {})):
            with refused():
                await s.qmp(command, arguments)
            assert (await s.qmp("query-replication"))["state"] == "waiting"
        status = await s.qmp("query-xen-replication-status")
        assert status["error"]
        assert "childs0" in status["desc"]
        assert await s.qmp("query-colo-status") == {"mode": "none", "last-mode": "none", "reason": "none"}
        await s.qmp("replication-start", mode="secondary")
        with refused(match="already"):
            await s.qmp("replication-start", mode="secondary")
        assert (await s.qmp("query-replication"))["state"] == "replicating"


@scenario
async def test_without_a_filter_qemus_commands_do_nothing_and_ours_say_so(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        for command, arguments in (
                ("xen-set-replication", {"enable": True, "primary": True}), ("xen-colo-do-checkpoint", {}),
                ("xen-set-replication", {"enable": False, "primary": True}),
                ("xen-set-replication", {"enable": False, "primary": True, "failover": True})):
            assert await d.qmp(command, arguments) == {}
        assert await d.qmp("query-xen-replication-status") == {"error": False}
        assert await d.qmp("query-colo-status") == {"mode": "none", "last-mode": "none", "reason": "none"}
        for command, arguments in (
                ("replication-start", {"mode": "primary"}), ("replication-checkpoint", {}), ("replication-stop", {}),
                ("replication-failover", {}), ("query-replication", {}), ("x-colo-lost-heartbeat", {})):
            with refused():
                await d.qmp(command, arguments)


@scenario
async def test_query_replication_has_the_members_of_a_pairs(tmp_path: Path) -> None:
    async with standby(tmp_path) as s:
        await s.qmp("replication-start", mode="secondary")
        committed = await s.qmp("replication-checkpoint")
        assert committed["epoch"] == 2
        await s.parent.pwrite(0, b"unseen")
        status = await s.qmp("query-replication")
        assert status["checkpoint"].pop("age") >= 0
        assert status == {
            "pair": "daemon", "role": "standby", "state": "replicating", "health": "healthy", "reason": "", "link": "",
            "peer": "", "ack": "", "checkpoint-every": 0.0, "checkpoint-bytes": 0, "checkpoint": committed,
            "disks": [{"name": "childs0", "format": "raw", "size": SIZE, "state": "running", "behind": 0,
                       "buffer-used": 4096, "buffer-limit": 0, "reason": "", "fault": ""}],
            "work": None, "exports": [f"nbd+unix:///colo-disk0?socket={tmp_path}/nbd"]}
        promoted = await s.qmp("replication-failover")
        assert (promoted["epoch"], promoted["exports"]) == (2, status["exports"])
        await wait_merged(s.d)
        status = await s.qmp("query-replication")
        assert (status["role"], status["state"], status["health"]) == ("promoted", "promoted", "degraded")


@scenario
async def test_a_merge_that_fails_is_told_and_can_be_repeated(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        debug, disk = await faulty(graph, "parent0", SIZE)
        await graph.open({"driver": "replication", "node-name": "childs0", "mode": "secondary", "top-id": "childs0",
                          "file": {"driver": "overlay", "backing": {"driver": "overlay", "backing": "parent0"}}})
        view = graph.attach_backend(graph.find("childs0"), "guest", taken=graph.find("childs0").cumulative()[0] | 3)
        await d.qmp("replication-start", mode="secondary")
        await view.pwrite(0, b"standby!")
        debug.fail("write", once=True)
        await d.qmp("replication-failover")
        failed = await d.event("REPLICATION_FAILOVER", stage="failed")
        assert "childs0" in failed["reason"]
        assert (await d.qmp("query-colo-status"))["reason"] == "error"
        status = await d.qmp("query-replication")
        assert (status["role"], status["state"], status["health"]) == ("promoted", "failover-failed", "at-risk")
        assert (await d.qmp("query-xen-replication-status"))["error"]
        assert bytes(await view.pread(0, 8)) == b"standby!"
        debug.clear_rules()
        await d.qmp("replication-failover")
        await wait_merged(d)
        assert disk.content[:8] == b"standby!"
        await graph.detach_backend(view)


@scenario
async def test_a_primary_whose_standby_is_lost_lives_on_alone(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        local = await ram(graph, "local", SIZE)
        debug, remote = await faulty(graph, "remote", SIZE)
        await graph.open({"driver": "replication", "node-name": "replication0", "mode": "primary", "file": "remote"})
        await graph.open({"driver": "quorum", "node-name": "colo-disk0", "read-pattern": "fifo", "vote-threshold": 1,
                          "children": ["local", "replication0"]})
        guest = graph.attach_backend(graph.find("colo-disk0"), "guest", taken=graph.find("local").cumulative()[0] | 3)
        assert (await d.qmp("query-replication"))["state"] == "waiting"
        await d.qmp("xen-set-replication", enable=True, primary=True)
        await guest.pwrite(0, b"forwards")
        assert local.content[:8] == remote.content[:8] == b"forwards"
        status = await d.qmp("query-replication")
        assert (status["role"], status["state"], status["health"]) == ("primary", "replicating", "healthy")
        debug.fail("write")
        await guest.pwrite(0, b"only one")
        error = await d.event("REPLICATION_IO_ERROR", disk="replication0")
        assert error["pair"] == "daemon"
        assert (await d.event("REPLICATION_STATE", state="offline"))["health"] == "at-risk"
        status = await d.qmp("query-replication")
        assert (status["state"], status["health"]) == ("offline", "at-risk")
        assert (await d.qmp("query-xen-replication-status"))["error"]
        with refused(match="no standby"):
            await d.qmp("replication-failover")
        await d.qmp("x-colo-lost-heartbeat")
        assert await d.event("COLO_EXIT") == {"mode": "primary", "reason": "request"}
        assert await d.qmp("query-colo-status") == {"mode": "none", "last-mode": "primary", "reason": "request"}
        await guest.pwrite(0, b"goes on!")
        assert local.content[:8] == b"goes on!"
        with refused():
            await d.qmp("x-colo-lost-heartbeat")
        await graph.detach_backend(guest)


@scenario
async def test_the_standby_can_be_lost_after_its_filter_was_removed(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        await ram(graph, "remote", SIZE)
        filter = await graph.open({"driver": "replication", "node-name": "r", "mode": "primary", "file": "remote"})
        await d.qmp("replication-start", mode="primary")
        await graph.close(filter)
        await d.qmp("x-colo-lost-heartbeat")
        assert (await d.qmp("query-colo-status"))["last-mode"] == "primary"


@pytest.mark.parametrize("mode", ["secondary", "primary"])
def test_a_disk_whose_file_was_moved_away_is_at_risk_until_it_is_back(tmp_path: Path, mode: str) -> None:
    path, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    path.write_bytes(bytes(SIZE))
    file: dict[str, Any] = {"driver": "file", "node-name": "local", "filename": str(path)}

    @scenario
    async def run() -> None:
        async with daemon(tmp_path) as d:
            graph = d.inventory.graph
            filter: dict[str, Any] = {"driver": "replication", "node-name": "filter", "mode": mode}
            if mode == "secondary":
                await graph.open({"driver": "raw", "node-name": "secondary", "file": file})
                filter |= {"top-id": "top", "file": {"driver": "overlay", "backing": {
                    "driver": "overlay", "backing": "secondary"}}}
                children = [filter]
                await d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
                await d.qmp("nbd-server-add", device="secondary", writable=True)
            else:
                children = [file, {**filter, "file": {"driver": "null", "size": SIZE}}]
            await graph.open({"driver": "quorum", "node-name": "top", "read-pattern": "fifo", "vote-threshold": 1,
                              "children": children})
            await d.qmp("replication-start", mode=mode)
            assert (await d.qmp("query-replication"))["health"] == "healthy"
            path.rename(elsewhere)
            status = await d.qmp("query-replication")
            [disk] = status["disks"]
            said = f"{path} was moved away: put it back before this program ends"
            assert (status["state"], status["health"], status["reason"]) == (
                "replicating", "at-risk", f"disk 'filter': {said}")
            assert (disk["fault"], disk["reason"]) == (said, said)
            assert (await d.event("REPLICATION_STATE", health="at-risk"))["reason"] == status["reason"]
            since = len(d.events)
            elsewhere.rename(path)
            status = await d.qmp("query-replication")
            assert (status["health"], status["reason"], status["disks"][0]["fault"]) == ("healthy", "", "")
            await d.event("REPLICATION_STATE", since, health="healthy")
            path.unlink()
            if mode == "secondary":
                await d.program.look()
                [fault] = (await d.qmp("replication-failover"))["faults"]
                assert fault.startswith(f"disk 'filter': {path} was deleted")
                await wait_merged(d)

    run()
