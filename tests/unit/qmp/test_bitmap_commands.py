"""Dirty bitmaps over QMP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockstep.drivers.qcow2.create import new_header, write_image
from tests.daemon import Daemon, daemon, refused
from tests.scenarios import scenario
from tests.unit.qmp.disks import MiB, client, disks, everything

CLUSTER = 65536


async def bitmap(d: Daemon, verb: str, name: str = "map", node: str = "a", **more: Any) -> None:
    await d.qmp(f"block-dirty-bitmap-{verb}", {"node": node, "name": name, **more})


def dirty(d: Daemon, name: str, node: str = "a") -> list[tuple[int, int]]:
    return list(d.inventory.graph.find(node).bitmaps[name].dirty())


@scenario
async def test_a_bitmap_records_while_it_is_enabled_until_it_is_cleared(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a")
        guest = client(d, "a")
        await bitmap(d, "add")
        await guest.pwrite(CLUSTER, b"x")
        await bitmap(d, "disable")
        await guest.pwrite(3 * CLUSTER, b"x")
        assert dirty(d, "map") == [(CLUSTER, CLUSTER)]
        await bitmap(d, "enable")
        await guest.pwrite(5 * CLUSTER, b"x")
        assert dirty(d, "map") == [(CLUSTER, CLUSTER), (5 * CLUSTER, CLUSTER)]
        await bitmap(d, "clear")
        assert dirty(d, "map") == []
        await bitmap(d, "remove")
        assert d.inventory.graph.find("a").bitmaps == {}
        await d.inventory.graph.detach_backend(guest)


@scenario
async def test_merge_takes_names_and_bitmaps_of_other_nodes(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        for name, node, cluster in (("map", "a", 0), ("other", "a", 2), ("far", "b", 4)):
            await bitmap(d, "add", name, node, granularity=CLUSTER)
            d.inventory.graph.find(node).bitmaps[name].set(cluster * CLUSTER, 1)
        merge = {"node": "a", "target": "map", "bitmaps": ["other", {"node": "b", "name": "far"}]}
        await d.qmp("block-dirty-bitmap-merge", merge)
        assert [offset // CLUSTER for offset, _ in dirty(d, "map")] == [0, 2, 4]
        await d.qmp("block-dirty-bitmap-merge", {**merge, "bitmaps": []})
        before = everything(d)
        for wrong in ({"bitmaps": ["other", "nope"]}, {"target": "nope"}, {"node": "nope"},
                      {"bitmaps": [{"node": "nope", "name": "far"}]}, {"bitmaps": [{"node": "b"}]}, {"bitmaps": "b"}):
            with refused():
                await d.qmp("block-dirty-bitmap-merge", {**merge, **wrong})
        assert everything(d) == before


@pytest.mark.parametrize(("options", "match"), [
    ({"node": "nope"}, "no node"), ({"name": ""}, "name"), ({"name": "x" * 1024}, "1023"), ({}, "no other bitmap"),
    ({"name": "new", "granularity": 256}, "512"), ({"name": "new", "granularity": 700}, "power of two"),
    ({"name": "new", "granularity": -1}, "granularity"), ({"name": "new", "persistent": True}, "persistent"),
])
@scenario
async def test_a_bad_bitmap_is_not_added(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a")
        await bitmap(d, "add")
        before = everything(d)
        with refused(match=match):
            await d.qmp("block-dirty-bitmap-add", {"node": "a", "name": "map", **options})
        assert everything(d) == before


@pytest.mark.parametrize(("driver", "granularity"), [("memory", 65536), ("overlay", 4096)])
@scenario
async def test_the_granularity_is_that_of_the_disk(tmp_path: Path, driver: str, granularity: int) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": driver, "node-name": "a", "size": MiB})
        await bitmap(d, "add", disabled=True)
        found = d.inventory.graph.find("a").bitmaps["map"]
        assert (found.granularity, found.enabled) == (granularity, False)


@pytest.mark.parametrize("verb", ["remove", "clear", "enable", "disable"])
@scenario
async def test_a_bitmap_that_is_not_there_or_in_use_is_left_alone(tmp_path: Path, verb: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        await bitmap(d, "add")
        await d.qmp("blockdev-backup", {"job-id": "job", "device": "a", "target": "b", "sync": "full", "bitmap": "map",
                                        "bitmap-mode": "always", "auto-finalize": False})
        await d.event("JOB_STATUS_CHANGE", id="job", status="pending")
        before = everything(d)
        with refused(match="in use by job 'job'"):
            await bitmap(d, verb)
        with refused(match="nope"):
            await bitmap(d, verb, "nope")
        with refused(match="no node"):
            await bitmap(d, verb, node="nope")
        assert everything(d) == before
        await d.qmp("job-finalize", {"id": "job"})
        await bitmap(d, verb)


async def image(d: Daemon, path: Path, name: str = "img", **more: Any) -> None:
    """Open a qcow2 image, which is made if it is not there."""
    if not path.exists():
        with path.open("wb") as file:
            write_image(file.fileno(), new_header(8 * MiB), "off")
    await d.qmp("blockdev-add", {"driver": "qcow2", "node-name": name,
                                 "file": {"driver": "file", "filename": str(path)}, **more})


async def shown(d: Daemon, node: str = "img") -> list[dict[str, Any]]:
    nodes = {each["node-name"]: each for each in await d.qmp("query-named-block-nodes")}
    return nodes[node].get("dirty-bitmaps", [])


@scenario
async def test_a_persistent_bitmap_is_there_again_when_its_node_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    async with daemon(tmp_path) as d:
        await image(d, path)
        await bitmap(d, "add", "map", "img", persistent=True)
        await bitmap(d, "add", "off", "img", persistent=True, disabled=True, granularity=512)
        await bitmap(d, "add", "passing", "img")
        guest = client(d, "img")
        await guest.pwrite(CLUSTER, b"x")
        await d.inventory.graph.detach_backend(guest)
        await d.qmp("blockdev-del", {"node-name": "img"})
        await image(d, path, **{"read-only": True})
        expected = [
            {"name": "map", "count": CLUSTER, "granularity": CLUSTER, "recording": True, "busy": False,
             "persistent": True},
            {"name": "off", "count": 0, "granularity": 512, "recording": False, "busy": False, "persistent": True}]
        assert await shown(d) == expected
        for verb in ("clear", "remove", "disable"):
            with refused(match="read-only"):
                await bitmap(d, verb, "map", "img")
        with refused(match="read-only"):
            await bitmap(d, "add", "more", "img", persistent=True)
        with refused(match="read-only"):
            await d.qmp("block-dirty-bitmap-merge", {"node": "img", "target": "off", "bitmaps": ["map"]})
        assert await shown(d) == expected
        await bitmap(d, "add", "copy", "img")
        await d.qmp("block-dirty-bitmap-merge", {"node": "img", "target": "copy", "bitmaps": ["map"]})
        assert dirty(d, "copy", "img") == [(CLUSTER, CLUSTER)]
        # A backup that gives the bits back may use it as it is; made writable, the node lets it be changed.
        await d.qmp("blockdev-add", {"driver": "memory", "node-name": "target", "size": 8 * MiB})
        backup = {"device": "img", "target": "target", "sync": "bitmap", "bitmap": "map"}
        with refused(match="read-only"):
            await d.qmp("blockdev-backup", {**backup, "job-id": "one", "bitmap-mode": "on-success"})
        await d.qmp("blockdev-backup", {**backup, "job-id": "two", "bitmap-mode": "never"})
        await d.event("JOB_STATUS_CHANGE", id="two", status="null")
        assert dirty(d, "map", "img") == [(CLUSTER, CLUSTER)]
        options = {"driver": "qcow2", "node-name": "img", "file": {"driver": "file", "filename": str(path)}}
        await d.qmp("blockdev-reopen", options=[options])
        await bitmap(d, "clear", "map", "img")
        await d.qmp("blockdev-reopen", options=[{**options, "read-only": True}])
        assert [(each["name"], each["count"]) for each in await shown(d)] == [("map", 0), ("off", 0), ("copy", CLUSTER)]


@scenario
async def test_a_transaction_stores_its_bitmaps_or_does_not(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"

    def add(name: str, **more: Any) -> dict[str, Any]:
        return {"type": "block-dirty-bitmap-add", "data": {"node": "img", "name": name, "persistent": True, **more}}

    remove = {"type": "block-dirty-bitmap-remove", "data": {"node": "img", "name": "map"}}
    async with daemon(tmp_path) as d:
        await image(d, path)
        await bitmap(d, "add", "map", "img", persistent=True)
        before, crashed = await shown(d), tmp_path / "crashed.qcow2"
        for wrong in (add("bad", granularity=700), {"type": "abort", "data": {}}):
            with refused():
                await d.qmp("transaction", actions=[add("new"), remove, wrong])
            assert await shown(d) == before
            crashed.write_bytes(path.read_bytes())
            await image(d, crashed, "crashed")
            assert [each["name"] for each in await shown(d, "crashed")] == ["map"]
            await d.qmp("blockdev-del", {"node-name": "crashed"})
        await d.qmp("transaction", actions=[add("new"), remove])
        assert [each["name"] for each in await shown(d)] == ["new"]
        crashed.write_bytes(path.read_bytes())
        await image(d, crashed, "crashed")
        [lost] = await shown(d, "crashed")
        assert (lost["name"], lost["inconsistent"], lost["recording"]) == ("new", True, False)
        with refused(match="not inconsistent"):
            await d.qmp("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}})
            await d.qmp("block-export-add", {"type": "nbd", "id": "e", "node-name": "crashed", "bitmaps": ["new"]})
        with refused(match="inconsistent"):
            await d.qmp("transaction", actions=[{"type": "block-dirty-bitmap-clear", "data": {
                "node": "crashed", "name": "new"}}])
        await bitmap(d, "remove", "new", "crashed")
        assert await shown(d, "crashed") == []
