"""Dirty bitmaps over QMP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
