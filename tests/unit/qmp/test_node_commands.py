"""Commands about nodes: what they do, and that a refusal has QEMU's class and changes nothing."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from blockstep.aio.posix import OpenFile
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.quorum import Quorum
from blockstep.drivers.throttle import Limits, Throttle
from blockstep.inventory.limits import limits_of, set_limits
from blockstep.qmp.commands.nodes import ChangeArguments, x_blockdev_change
from tests.daemon import Daemon, daemon, refused
from tests.disks import faulty, ram
from tests.scenarios import scenario

MiB = 1 << 20


def disk(path: Path) -> str:
    path.write_bytes(bytes(MiB))
    return str(path)


async def memory(d: Daemon, *names: str, size: int = MiB) -> None:
    for name in names:
        await d.qmp("blockdev-add", {"driver": "memory", "node-name": name, "size": size})


def client(d: Daemon, name: str) -> Backend:
    """A user of a node, as an export is."""
    graph = d.inventory.graph
    return graph.accounts.attach(graph.find(name), "client", READ | WRITE)


# --- blockdev-add, blockdev-del ---


@scenario
async def test_add_and_delete(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        nodes = d.inventory.graph.nodes
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "disk",
                                     "file": {"driver": "file", "filename": disk(tmp_path / "disk")}})
        assert len(nodes) == 2
        await d.qmp("blockdev-del", {"node-name": "disk"})
        assert not nodes


@pytest.mark.parametrize(("options", "match"), [
    ({"driver": "null"}, "node-name"),
    ({"driver": "null", "node-name": "there"}, "no other node"),
    ({"driver": "null", "node-name": "9"}, "letter"),
    ({"driver": "null", "node-name": "new", "bogus": 1}, "bogus"),
    ({"driver": "bogus", "node-name": "new"}, "driver"),
    ({"node-name": "new"}, "driver"),
    ({"driver": "qcow2", "node-name": "new", "file": "there"}, "magic"),
    ({"driver": "file", "node-name": "new", "filename": "/nonexistent/file"}, "No such file"),
    ({"driver": "raw", "node-name": "new", "file": "nobody"}, "nobody"),
    ({"driver": "raw", "node-name": "new", "file": {"driver": "raw", "file": "nobody"}}, "nobody"),
    ({"driver": "raw", "node-name": "new", "file": {"driver": "null", "node-name": "there"}}, "no other node"),
])
@scenario
async def test_what_cannot_be_added(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "there")
        with refused(match=match):
            await d.qmp("blockdev-add", options)
        assert [*d.inventory.graph.nodes] == ["there"]


@scenario
async def test_what_cannot_be_deleted(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "top", "file": "disk"})
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "other",
                                     "file": {"driver": "null", "node-name": "inner"}})
        with refused(match="in use by 'top'"):
            await d.qmp("blockdev-del", {"node-name": "disk"})
        with refused(match="belongs to"):
            await d.qmp("blockdev-del", {"node-name": "inner"})
        with refused(match="nobody"):
            await d.qmp("blockdev-del", {"node-name": "nobody"})
        lift = d.inventory.graph.nodes["top"].block_operations("a job needs it")
        with refused(match="a job needs it"):
            await d.qmp("blockdev-del", {"node-name": "top"})
        lift()
        assert {*d.inventory.graph.nodes} == {"disk", "top", "other", "inner"}


# --- blockdev-reopen ---


@scenario
async def test_reopen_of_several(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        sets = [{"driver": "file", "node-name": name, "filename": disk(tmp_path / name)} for name in ("a", "b")]
        for options in sets:
            await d.qmp("blockdev-add", options)
        await d.qmp("blockdev-reopen", {"options": [{**options, "read-only": True} for options in sets]})
        assert all(node.read_only for node in d.inventory.graph.nodes.values())


@scenario
async def test_reopen_is_all_or_nothing(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        good = {"driver": "file", "node-name": "a", "filename": disk(tmp_path / "a")}
        await d.qmp("blockdev-add", good)
        for bad in ({"driver": "null", "node-name": "a"}, {**good, "node-name": "nobody"}, {"driver": "null"},
                    {**good, "filename": "elsewhere"}, {**good, "bogus": 1}):
            await memory(d, "m")
            with refused():
                await d.qmp("blockdev-reopen", {"options": [
                    {"driver": "memory", "node-name": "m", "size": MiB, "read-only": True}, bad]})
            assert not d.inventory.graph.nodes["m"].read_only
            await d.qmp("blockdev-del", {"node-name": "m"})


# --- blockdev-create ---


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
@scenario
async def test_a_job_makes_a_file(tmp_path: Path, preallocation: str) -> None:
    async with daemon(tmp_path) as d:
        path = tmp_path / "new"
        path.write_bytes(b"old")
        await d.qmp("blockdev-create", {"job-id": "make", "options": {
            "driver": "file", "filename": str(path), "size": 3 * MiB + 512, "preallocation": preallocation}})
        await d.event("JOB_STATUS_CHANGE", id="make", status="concluded")
        assert path.stat().st_size == 3 * MiB + 512
        assert path.read_bytes().strip(b"\0") == b""
        assert (path.stat().st_blocks * 512 >= 3 * MiB) == (preallocation != "off")
        assert [job.id for job in d.inventory.jobs.list()] == ["make"]
        assert not [event for event in d.events if event["event"].startswith("BLOCK_JOB")]


@scenario
async def test_a_job_makes_an_overlay(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-create", {"job-id": "make", "options": {
            "driver": "overlay", "filename": str(tmp_path / "new"), "size": MiB, "cluster-size": 65536}})
        await d.event("JOB_STATUS_CHANGE", id="make", status="concluded")
        await d.qmp("blockdev-add", {"driver": "overlay", "node-name": "new",
                                     "file": {"driver": "file", "filename": str(tmp_path / "new")}})
        assert d.inventory.graph.nodes["new"].length == MiB
        assert d.inventory.graph.nodes["new"].cluster_size == 65536


@scenario
async def test_a_file_that_cannot_be_made_is_the_jobs_error(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-create", {"job-id": "make", "options": {
            "driver": "file", "filename": str(tmp_path / "no" / "new"), "size": 1}})
        await d.event("JOB_STATUS_CHANGE", id="make", status="concluded")
        assert "No such file" in d.inventory.jobs.find("make").info()["error"]


@pytest.mark.parametrize("read_only", [False, True])
@scenario
async def test_a_file_in_use_is_left_alone(tmp_path: Path, read_only: bool) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "file", "node-name": "disk", "filename": disk(tmp_path / "disk"),
                                     "read-only": read_only})
        (tmp_path / "link").symlink_to("disk")
        image = {"driver": "qcow2", "size": 512, "filename": str(tmp_path / "new"), "data-file": "link"}
        for options in ({"driver": "file", "filename": str(tmp_path / "disk"), "size": 1},
                        {"driver": "overlay", "filename": str(tmp_path / "link"), "size": 1}, image):
            with refused(match="another file"):
                await d.qmp("blockdev-create", {"job-id": "make", "options": options})
        assert not d.inventory.jobs.list()
        assert (tmp_path / "disk").stat().st_size == MiB
        assert not (tmp_path / "new").exists()


@scenario
async def test_a_file_that_another_program_writes_to_is_left_alone(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        with closing(OpenFile(disk(tmp_path / "disk"), writable=True)):
            await d.qmp("blockdev-create", {"job-id": "make", "options": {
                "driver": "file", "filename": str(tmp_path / "disk"), "size": 1}})
            await d.event("JOB_STATUS_CHANGE", id="make", status="concluded")
            assert "writing" in d.inventory.jobs.find("make").info()["error"]
        assert (tmp_path / "disk").stat().st_size == MiB


@pytest.mark.parametrize(("arguments", "match"), [
    ({"job-id": "make", "options": {"driver": "file", "filename": "x"}}, "size"),
    ({"job-id": "make", "options": {"driver": "file", "filename": "x", "size": -1}}, "size"),
    ({"job-id": "make", "options": {"driver": "file", "filename": "x", "size": 1, "preallocation": "metadata"}}, "pre"),
    ({"job-id": "make", "options": {"driver": "nbd", "size": 1}}, "nbd"),
    ({"job-id": "make", "options": {"driver": "overlay", "filename": "x", "size": 1, "cluster-size": 3}}, "cluster"),
    ({"job-id": "8", "options": {"driver": "file", "filename": "x", "size": 1}}, "job-id"),
])
@scenario
async def test_what_cannot_be_made(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        with refused(match=match):
            await d.qmp("blockdev-create", arguments)
        assert not d.inventory.jobs.list()


# --- x-blockdev-change ---


async def quorum(d: Daemon) -> Quorum:
    await memory(d, "local", "standby")
    await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "colo-disk0", "read-pattern": "fifo",
                                 "vote-threshold": 1, "children": ["local"]})
    node = d.inventory.graph.nodes["colo-disk0"]
    assert isinstance(node, Quorum)
    return node


@scenario
async def test_a_quorum_gets_a_child_and_loses_it(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        node = await quorum(d)
        user = client(d, "colo-disk0")
        for _ in range(2):  # the name is the same again, as QEMU's scripts expect
            await d.qmp("x-blockdev-change", {"parent": "colo-disk0", "node": "standby"})
            assert [*node.children] == ["children.0", "children.1"]
            await user.pwrite(0, b"both")
            assert bytes(await d.inventory.graph.nodes["standby"].pread(0, 4)) == b"both"
            await d.qmp("x-blockdev-change", {"parent": "colo-disk0", "child": "children.1"})
            assert [*node.children] == ["children.0"]
        await d.inventory.graph.detach_backend(user)


@scenario
async def test_a_node_that_two_monitors_add_at_a_time_is_added_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        debug, _ = await faulty(graph, "local")
        await ram(graph, "standby")
        await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "q", "vote-threshold": 1, "children": ["local"],
                                     "read-pattern": "fifo"})
        user = client(d, "q")
        debug.suspend("write", "slow")
        writing = asyncio.ensure_future(user.pwrite(0, bytes(512)))
        await debug.suspended("slow")
        adding = [asyncio.ensure_future(x_blockdev_change(d.program, ChangeArguments(parent="q", node="standby")))
                  for _ in range(2)]
        await asyncio.sleep(0)  # both have begun, and wait for the write
        debug.resume("slow")
        await writing
        one, other = await asyncio.gather(*adding, return_exceptions=True)
        assert (one, str(other)) == (None, "node 'standby' is in use by 'q'")
        assert [*graph.find("q").children] == ["children.0", "children.1"]
        await graph.detach_backend(user)


@pytest.mark.parametrize(("arguments", "match"), [
    ({"parent": "colo-disk0"}, "either"),
    ({"parent": "colo-disk0", "child": "children.0", "node": "standby"}, "either"),
    ({"parent": "colo-disk0", "child": "children.1"}, "no child"),
    ({"parent": "colo-disk0", "child": "children.0"}, "vote-threshold"),
    ({"parent": "colo-disk0", "node": "nobody"}, "nobody"),
    ({"parent": "colo-disk0", "node": "local"}, "in use"),
    ({"parent": "colo-disk0", "node": "short"}, "bytes"),
    ({"parent": "nobody", "node": "standby"}, "nobody"),
    ({"parent": "standby", "node": "short"}, "quorum"),
])
@scenario
async def test_a_change_that_makes_no_sense(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        node = await quorum(d)
        await memory(d, "short", size=512)
        with refused(match=match):
            await d.qmp("x-blockdev-change", arguments)
        assert [*node.children] == ["children.0"]


@scenario
async def test_there_are_no_iothreads(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        await d.qmp("x-blockdev-set-iothread", {"node-name": "disk", "iothread": None})
        with refused(match="iothread0"):
            await d.qmp("x-blockdev-set-iothread", {"node-name": "disk", "iothread": "iothread0"})
        with refused(match="nobody"):
            await d.qmp("x-blockdev-set-iothread", {"node-name": "nobody", "iothread": None})


# --- block_resize ---


@pytest.mark.parametrize("word", ["node-name", "device"])
@scenario
async def test_a_disk_in_use_gets_another_size(tmp_path: Path, word: str) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "disk",
                                     "file": {"driver": "file", "filename": disk(tmp_path / "disk")}})
        user = client(d, "disk")
        await d.qmp("block_resize", {word: "disk", "size": 2 * MiB})
        assert user.length == 2 * MiB == (tmp_path / "disk").stat().st_size
        await user.pwrite(2 * MiB - 1, b"x")
        await d.inventory.graph.detach_backend(user)


@scenario
async def test_what_cannot_be_resized(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        await d.qmp("blockdev-add", {"driver": "null", "node-name": "fixed", "read-only": True})
        for arguments, match in (
                ({"size": 1}, "node-name"), ({"node-name": "disk", "device": "disk", "size": 1}, "device"),
                ({"node-name": "nobody", "size": 1}, "nobody"), ({"node-name": "disk", "size": -1}, "size"),
                ({"node-name": "fixed", "size": 1}, "read-only")):
            with refused(match=match):
                await d.qmp("block_resize", arguments)
        await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "q", "vote-threshold": 1, "children": ["disk"]})
        with refused(match="does not share"):
            await d.qmp("block_resize", {"node-name": "disk", "size": 2 * MiB})
        lift = d.inventory.graph.nodes["q"].block_operations("replication runs", "resize")
        with refused(match="replication runs"):
            await d.qmp("block_resize", {"node-name": "q", "size": 2 * MiB})
        lift()
        assert d.inventory.graph.nodes["disk"].length == MiB


# --- block_set_io_throttle ---

NONE: dict[str, Any] = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@scenario
async def test_limits_hold_for_those_who_are_there_and_those_who_come(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        await memory(d, "disk")
        before = client(d, "disk")
        await d.qmp("block_set_io_throttle", {**NONE, "device": "disk", "iops_wr": 10, "iops_wr_max": 20})
        after = client(d, "disk")
        job = graph.attach_backend(graph.find("disk"), "job", READ)
        assert before.node is after.node is graph.accounts.entrance(graph.find("disk"))
        assert job.node is graph.find("disk")
        group = limits_of(graph, graph.find("disk"))
        assert group is not None
        assert (group.limits.iops_write, group.limits.iops_write_max) == (10, 20)
        await d.qmp("block_set_io_throttle", {**NONE, "id": "disk", "bps": 1000})
        assert (group.limits.iops_write, group.limits.bps_total) == (0, 1000)
        await d.qmp("block_set_io_throttle", {**NONE, "id": "disk"})
        assert before.node is after.node is graph.find("disk")
        assert not graph.accounts.entrances
        assert not graph.objects
        for user in (before, after, job):
            await graph.detach_backend(user)


@scenario
async def test_disks_share_the_limits_of_a_group_and_may_change_groups(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        await memory(d, "a", "b")
        for name in ("a", "b"):
            await d.qmp("block_set_io_throttle", {**NONE, "id": name, "iops": 10, "group": "g"})
        group = limits_of(graph, graph.find("a"))
        assert group is not None
        assert group is limits_of(graph, graph.find("b"))
        await d.qmp("block_set_io_throttle", {**NONE, "id": "b", "iops": 99, "group": "other"})
        assert group.limits.iops_total == 10
        other = limits_of(graph, graph.find("b"))
        assert other is not None
        assert (other.name, other.limits.iops_total) == ("other", 99)


@scenario
async def test_a_disk_with_limits_can_be_deleted(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        await d.qmp("block_set_io_throttle", {**NONE, "id": "disk", "iops": 10})
        await d.qmp("blockdev-del", {"node-name": "disk"})
        assert not d.inventory.graph.nodes


@scenario
async def test_the_filter_that_holds_limits_goes_with_them_only(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        await memory(d, "disk", "other")
        await d.qmp("block_set_io_throttle", {**NONE, "id": "disk", "iops": 10})
        [entrance] = graph.accounts.entrances
        with refused(match="limits of disk 'disk'"):
            await d.qmp("blockdev-del", {"node-name": entrance.name})
        with graph.change() as change:  # a snapshot: another node takes the disk's place
            change.move(entrance.children["file"], graph.find("other"))
        user = client(d, "disk")
        assert user.node is graph.find("disk")
        await graph.detach_backend(user)
        await d.qmp("blockdev-del", {"node-name": "disk"})
        assert graph.accounts.entrance(graph.find("other")) is entrance
        await d.qmp("block_set_io_throttle", {**NONE, "id": "other"})
        assert [*graph.nodes] == ["other"]


async def limited(d: Daemon, name: str, guest: Backend) -> list[int]:
    """What holds a guest, one after the other, in operations a second; it is what the server shows."""
    [shown] = [each["inserted"]["iops"] for each in await d.qmp("query-block") if each["device"] == name]
    found = [node.group.limits.iops_total for node in guest.node.chain() if isinstance(node, Throttle)]
    assert [shown] == (found or [0])
    return found


@scenario
async def test_limits_stay_with_the_guest_when_a_snapshot_takes_the_disks_place(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        await d.qmp("blockdev-add", {"driver": "overlay", "node-name": "top", "size": MiB})
        guest = client(d, "disk")
        await d.qmp("block_set_io_throttle", {**NONE, "id": "disk", "iops": 10})
        await d.qmp("blockdev-snapshot", {"node": "disk", "overlay": "top"})
        later = client(d, "top")
        for iops in (10, 20):
            assert await limited(d, "top", guest) == await limited(d, "top", later) == [iops]
            await d.qmp("block_set_io_throttle", {**NONE, "id": "top", "iops": 20})
        await d.qmp("block_set_io_throttle", {**NONE, "id": "top"})
        assert guest.node is later.node is d.inventory.graph.find("top")
        for user in (guest, later):
            await d.inventory.graph.detach_backend(user)


@pytest.mark.parametrize("name", [{}, {"filter-node-name": "named"}], ids=["a filter without a name", "one with"])
@scenario
async def test_limits_hold_a_guest_whose_disk_is_being_backed_up(name: dict[str, str], tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk", "target")
        guest = client(d, "disk")
        await d.qmp("blockdev-backup", {"job-id": "job", "device": "disk", "target": "target", "sync": "none", **name})
        await d.qmp("block_set_io_throttle", {**NONE, "id": "disk", "iops": 10})
        assert [each["device"] for each in await d.qmp("query-block")] == ["disk", "target"]
        assert await limited(d, "disk", guest) == [10]
        await d.qmp("job-cancel", {"id": "job"})
        await d.event("JOB_STATUS_CHANGE", id="job", status="null")
        assert await limited(d, "disk", guest) == [10]
        await d.qmp("block_set_io_throttle", {**NONE, "id": "disk"})
        assert guest.node is d.inventory.graph.find("disk")
        await d.inventory.graph.detach_backend(guest)


@scenario
async def test_limits_that_two_monitors_set_at_a_time_are_set_one_after_the_other(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        debug, _ = await faulty(graph, "disk")
        guest = client(d, "disk")
        for limits in ((10, 20), (0, 0)):
            debug.suspend("read", "slow")
            reading = asyncio.ensure_future(guest.pread(0, 512))
            await debug.suspended("slow")
            setting = [asyncio.ensure_future(set_limits(graph, debug, Limits(iops_total=iops), f"g{iops}"))
                       for iops in limits]
            await asyncio.sleep(0)  # both have begun, and the first waits for the read
            debug.resume("slow")
            await asyncio.gather(reading, *setting)
            held = [iops for iops in limits[1:] if iops]
            assert await limited(d, "disk", guest) == held
            assert list(graph.objects) == [f"g{iops}" for iops in held]
        await graph.detach_backend(guest)


@scenario
async def test_limits_that_make_no_sense(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        for arguments in (
                {"id": "disk", "iops": 5, "iops_rd": 5}, {"id": "disk", "iops": 10, "iops_max": 5}, {"iops": 5},
                {"id": "disk", "device": "disk"}, {"id": "disk", "bps_max": 5}):
            with refused():
                await d.qmp("block_set_io_throttle", {**NONE, **arguments})
        with refused("DeviceNotFound"):
            await d.qmp("block_set_io_throttle", {**NONE, "id": "nobody"})
        assert [*d.inventory.graph.nodes] == ["disk"]
        assert not d.inventory.graph.accounts.entrances


# --- events ---


@scenario
async def test_the_write_threshold_is_told_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        user = client(d, "disk")
        await d.qmp("block-set-write-threshold", {"node-name": "disk", "write-threshold": 5000})
        await user.pwrite(0, bytes(5000))
        await user.discard(8192, 4096)
        await user.write_zeroes(0, 8192)
        await user.pwrite(8192, b"x")
        found = await d.event("BLOCK_WRITE_THRESHOLD")
        assert found == {"node-name": "disk", "amount-exceeded": 3192, "write-threshold": 5000}
        await d.qmp("query-version")
        assert len([event for event in d.events if event["event"] == "BLOCK_WRITE_THRESHOLD"]) == 1
        assert not d.inventory.graph.nodes["disk"].watchers
        await d.inventory.graph.detach_backend(user)


@scenario
async def test_a_threshold_can_be_taken_back(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        for threshold in (5000, 6000, 0):
            await d.qmp("block-set-write-threshold", {"node-name": "disk", "write-threshold": threshold})
            assert len(d.inventory.graph.nodes["disk"].watchers) == bool(threshold)
        with refused(match="nobody"):
            await d.qmp("block-set-write-threshold", {"node-name": "nobody", "write-threshold": 1})


@scenario
async def test_a_failed_request_of_a_client_is_an_event(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "storage")
        await d.qmp("blockdev-add", {"driver": "blkdebug", "node-name": "disk", "image": "storage", "inject-error": [
            {"event": "write_aio", "errno": 28}, {"event": "read_aio", "errno": 5}]})
        user = client(d, "disk")
        with pytest.raises(OSError, match="No space"):
            await user.pwrite(0, b"x")
        with pytest.raises(OSError, match="Input/output"):
            await user.pread(0, 1)
        written = await d.event("BLOCK_IO_ERROR", operation="write")
        assert (written["device"], written["node-name"], written["nospace"]) == ("disk", "disk", True)
        assert written["action"] == "report"
        read = await d.event("BLOCK_IO_ERROR", operation="read")
        assert not read["nospace"]
        assert "Input/output" in read["reason"]
        await d.inventory.graph.detach_backend(user)


@scenario
async def test_a_quorum_reports_a_bad_child_and_a_failure(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "good", "storage")
        await d.qmp("blockdev-add", {"driver": "blkdebug", "node-name": "bad", "image": "storage",
                                     "inject-error": [{"event": "write_aio"}]})
        await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "q", "vote-threshold": 2,
                                     "children": ["good", "bad"]})
        user = client(d, "q")
        with pytest.raises(OSError, match="Input/output"):
            await user.pwrite(512, bytes(512))
        bad = await d.event("QUORUM_REPORT_BAD")
        assert bad == {"type": "write", "node-name": "bad", "sector-num": 1, "sectors-count": 1,
                       "error": "Input/output error"}
        failure = await d.event("QUORUM_FAILURE")
        assert failure == {"reference": "q", "sector-num": 1, "sectors-count": 1}
        await d.inventory.graph.detach_backend(user)


@scenario
async def test_an_nbd_node_tells_of_its_connection(tmp_path: Path) -> None:
    async with daemon(tmp_path, "server") as server, daemon(tmp_path, "client") as d:
        await memory(server, "disk")
        path = str(tmp_path / "nbd.sock")
        await server.qmp("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        await server.qmp("nbd-server-add", {"device": "disk", "writable": True})
        await d.qmp("blockdev-add", {"driver": "nbd", "node-name": "remote", "export": "disk",
                                     "server": {"type": "unix", "path": path}})
        size = d.inventory.graph.find("remote").length
        assert await d.event("NBD_CONNECTION") == {"node-name": "remote", "state": "connected", "size": size}
        await server.qmp("nbd-server-stop")
        assert "error" in await d.event("NBD_CONNECTION", state="lost")


@scenario
async def test_an_nbd_node_has_its_length_until_it_is_given_what_the_export_has_got(tmp_path: Path) -> None:
    async with daemon(tmp_path, "server") as server, daemon(tmp_path, "client") as d:
        far = await ram(server.inventory.graph, "disk", bytes(1 << 20))
        path = str(tmp_path / "nbd.sock")

        async def serve() -> None:
            await server.qmp("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
            await server.qmp("nbd-server-add", {"device": "disk", "writable": True})

        await serve()
        await d.qmp("blockdev-add", {"driver": "nbd", "node-name": "remote", "export": "disk", "reconnect-delay": 20.0,
                                     "server": {"type": "unix", "path": path}})
        await d.qmp("blockdev-add", {"driver": "memory", "node-name": "saved", "size": 4 << 20})
        await d.qmp("blockdev-add", {
            "driver": "copy-before-write", "node-name": "top", "file": "remote", "target": "saved"})
        graph = d.inventory.graph
        user = graph.attach_backend(graph.find("top"), "user", READ | WRITE)
        with refused(match="resize of the NBD export of 1048576 bytes to 2097152 bytes"):
            await d.qmp("block_resize", {"node-name": "top", "size": 2 << 20})
        await server.qmp("nbd-server-stop")
        await far.truncate(2 << 20)
        await serve()
        await d.event("NBD_CONNECTION", state="connected", size=2 << 20)
        assert (user.length, graph.find("remote").length) == (1 << 20, 1 << 20)
        await user.pwrite((1 << 20) - 4096, bytes(4096))
        far.content[1 << 20:] = b"x" * (1 << 20)
        await d.qmp("block_resize", {"node-name": "top", "size": 2 << 20})
        assert not any(await user.pread(1 << 20, 1 << 20))
        await user.pwrite((2 << 20) - 4096, b"y" * 4096)
        assert far.content.endswith(b"y" * 4096)
        await graph.detach_backend(user)
