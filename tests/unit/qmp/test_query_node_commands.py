"""What the query commands show of nodes, disks, counters and the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from tests.daemon import Daemon, daemon, refused
from tests.scenarios import scenario

MiB = 1 << 20


def disk(path: Path, data: bytes = b"") -> str:
    path.write_bytes(data.ljust(MiB, b"\0"))
    return str(path)


def client(d: Daemon, name: str) -> Backend:
    """A user of a node, as an export is."""
    graph = d.inventory.graph
    return graph.accounts.attach(graph.find(name), "client", READ | WRITE)


async def view(d: Daemon, tmp_path: Path) -> None:
    """The shape of a standby's disk: top over active over hidden over parent0."""
    await d.qmp("blockdev-add", {"driver": "raw", "node-name": "parent0",
                                 "file": {"driver": "file", "filename": disk(tmp_path / "parent"), "node-name": "pf"}})
    await d.qmp("blockdev-add", {
        "driver": "replication", "mode": "secondary", "node-name": "childs0", "top-id": "colo-disk0",
        "file": {"driver": "overlay", "node-name": "active",
                 "backing": {"driver": "overlay", "node-name": "hidden", "backing": "parent0"}}})
    await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "colo-disk0", "read-pattern": "fifo",
                                 "vote-threshold": 1, "children": ["childs0"]})


async def by_name(d: Daemon, **arguments: Any) -> dict[str, Any]:
    return {node["node-name"]: node for node in await d.qmp("query-named-block-nodes", arguments)}


# --- nodes ---


@scenario
async def test_a_node_is_described(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "file", "node-name": "disk", "filename": disk(tmp_path / "disk", b"x"),
                                     "read-only": True, "cache": {"no-flush": True}})
        path = str(tmp_path / "disk")
        assert await d.qmp("query-named-block-nodes") == [{
            "file": path, "node-name": "disk", "ro": True, "drv": "file", "backing_file_depth": 0, "encrypted": False,
            "detect_zeroes": "off", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
            "image": {"filename": path, "format": "file", "virtual-size": MiB,
                      "actual-size": (tmp_path / "disk").stat().st_blocks * 512},
            "cache": {"writeback": True, "direct": False, "no-flush": True}, "write_threshold": 0}]


@scenario
async def test_backing_nodes_are_shown_in_their_chain_unless_flat(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await view(d, tmp_path)
        active = (await by_name(d))["active"]
        assert active["backing_file_depth"] == 2
        assert active["image"]["backing-image"]["backing-image"]["filename"] == str(tmp_path / "parent")
        assert active["image"]["cluster-size"] == 4096
        assert active["backing_file"] == active["image"]["backing-filename"]
        flat = await by_name(d, flat=True)
        assert "backing-image" not in flat["active"]["image"]
        assert flat.keys() == {"parent0", "pf", "childs0", "active", "hidden", "colo-disk0"}


@scenario
async def test_a_node_without_a_file_shows_its_options(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "q", "vote-threshold": 1, "read-pattern": "fifo",
                                     "children": [{"driver": "null", "size": 512, "node-name": "n"}]})
        assert (await by_name(d))["q"]["file"] == (
            'json:{"driver": "quorum", "vote-threshold": 1, "read-pattern": "fifo", '
            '"children": [{"driver": "null", "size": 512}]}')


@scenario
async def test_limits_threshold_and_bitmaps_are_shown(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "memory", "node-name": "disk", "size": MiB})
        await d.qmp("block_set_io_throttle", {
            "id": "disk", "bps": 0, "bps_rd": 10, "bps_wr": 0, "iops": 100, "iops_rd": 0, "iops_wr": 0, "iops_max": 500,
            "iops_max_length": 2, "group": "g"})
        await d.qmp("block-set-write-threshold", {"node-name": "disk", "write-threshold": 4096})
        bitmap = DirtyBitmap(d.inventory.graph.nodes["disk"], "dirty", MiB)
        bitmap.set(0, 1)
        node = (await by_name(d))["disk"]
        limits = {name: value for name, value in node.items() if name.startswith(("bps", "iops", "group"))}
        assert limits == {"bps": 0, "bps_rd": 10, "bps_wr": 0, "iops": 100, "iops_rd": 0, "iops_wr": 0, "iops_max": 500,
                          "iops_max_length": 2, "group": "g"}
        assert node["write_threshold"] == 4096
        assert node["dirty-bitmaps"] == [{"name": "dirty", "count": 65536, "granularity": 65536, "recording": True,
                                          "busy": False, "persistent": False}]


# --- disks ---


async def names(d: Daemon) -> list[str]:
    return [entry["device"] for entry in await d.qmp("query-block")]


@scenario
async def test_disks_are_the_nodes_on_top_and_those_that_clients_use(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        assert await d.qmp("query-block") == []
        await view(d, tmp_path)
        assert await names(d) == ["colo-disk0"]
        user = client(d, "parent0")
        assert await names(d) == ["parent0", "colo-disk0"]
        await d.inventory.graph.detach_backend(user)
        entry = (await d.qmp("query-block"))[1]
        assert (entry["type"], entry["locked"], entry["inserted"]["drv"]) == ("unknown", False, "quorum")


@scenario
async def test_a_disk_with_limits_is_one_disk(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "null", "node-name": "disk"})
        zero = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
        await d.qmp("block_set_io_throttle", {"id": "disk", "iops": 5, **zero})
        assert await names(d) == ["disk"]
        assert (await d.qmp("query-block"))[0]["inserted"]["iops"] == 5


# --- counters ---


@scenario
async def test_counters_are_those_of_clients(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await view(d, tmp_path)
        user = client(d, "parent0")
        await user.pwrite(512, bytes(1024))
        await user.pread(0, 100)
        with pytest.raises(OSError):
            await user.pread(MiB, 1)
        await d.inventory.graph.detach_backend(user)
        found = {entry["device"]: entry for entry in await d.qmp("query-blockstats")}
        assert found.keys() == {"parent0", "colo-disk0"}
        stats = found["parent0"]["stats"]
        assert (stats["wr_operations"], stats["wr_bytes"], stats["wr_highest_offset"]) == (1, 1024, 1536)
        assert (stats["rd_operations"], stats["rd_bytes"], stats["invalid_rd_operations"]) == (1, 100, 1)
        assert found["parent0"]["parent"]["node-name"] == "pf"
        below = found["colo-disk0"]["parent"]["parent"]
        assert (below["node-name"], below["backing"]["node-name"]) == ("active", "hidden")
        assert found["colo-disk0"]["stats"]["rd_operations"] == 0


@scenario
async def test_counters_of_all_nodes(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await view(d, tmp_path)
        found = await d.qmp("query-blockstats", {"query-nodes": True})
        assert {entry["node-name"] for entry in found} == d.inventory.graph.nodes.keys()
        assert not [entry for entry in found if "device" in entry or "backing" in entry]


# --- the graph ---


@scenario
async def test_the_graph_has_nodes_users_and_permissions(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "top",
                                     "file": {"driver": "memory", "node-name": "low", "size": MiB}})
        user = client(d, "top")
        jobs = [graph.attach_backend(graph.nodes[name], f"job 'copy'{what}", READ)
                for name, what in (("low", ", source"), ("top", ""))]
        answer = await d.qmp("x-debug-query-block-graph")
        ids = {node["name"]: node["id"] for node in answer["nodes"]}
        assert {node["name"]: node["type"] for node in answer["nodes"]} == {
            "top": "block-driver", "low": "block-driver", "client": "block-backend", "copy": "block-job"}
        edges = {(edge["parent"], edge["child"]): edge for edge in answer["edges"]}
        assert edges.keys() == {(ids["top"], ids["low"]), (ids["client"], ids["top"]), (ids["copy"], ids["low"]),
                                (ids["copy"], ids["top"])}
        assert edges[ids["client"], ids["top"]]["perm"] == ["consistent-read", "write"]
        assert edges[ids["client"], ids["top"]]["name"] == "root"
        assert edges[ids["copy"], ids["low"]]["name"] == "source"
        assert edges[ids["top"], ids["low"]]["shared-perm"] == ["consistent-read", "write", "write-unchanged", "resize"]
        for backend in (user, *jobs):
            await graph.detach_backend(backend)


# --- refusals ---


@pytest.mark.parametrize(("command", "arguments", "match"), [
    ("query-block", {"bogus": 1}, "bogus"),
    ("query-named-block-nodes", {"flat": "yes"}, "flat"),
    ("query-blockstats", {"query-nodes": 1}, "query-nodes"),
    ("x-debug-query-block-graph", {"bogus": 1}, "bogus"),
])
@scenario
async def test_arguments_that_make_no_sense(
    tmp_path: Path, command: str, arguments: dict[str, Any], match: str
) -> None:
    async with daemon(tmp_path) as d:
        with refused(match=match):
            await d.qmp(command, arguments)
