"""Backup, mirror, commit and snapshot over QMP: what they do, and that a refusal changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import OptionError
from blockstep.qmp.commands.drive_target import target_options
from tests.daemon import Daemon, daemon, refused
from tests.scenarios import scenario
from tests.unit.qmp.disks import MiB, client, content, disks, everything, overlay


async def ended(d: Daemon, job: str = "job") -> dict[str, Any]:
    return await d.event("BLOCK_JOB_COMPLETED", device=job)


async def is_refused(d: Daemon, command: str, arguments: dict[str, Any], match: str,
                     error_class: str = "GenericError") -> None:
    before = everything(d)
    with refused(error_class, match):
        await d.qmp(command, arguments)
    assert everything(d) == before


# --- backup ---

BACKUP = {"job-id": "job", "device": "a", "target": "b", "sync": "full"}


@scenario
async def test_a_backup_is_the_disk_of_the_moment_of_the_answer(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", size=4 * MiB)
        guest = client(d, "a")
        await d.qmp("blockdev-backup", {**BACKUP, "speed": 1, "filter-node-name": "filter"})
        assert guest.node.name == "filter"
        await guest.pwrite(3 * MiB, b"later")
        await d.qmp("block-job-set-speed", {"device": "job", "speed": 0})
        assert await ended(d) == {"type": "backup", "device": "job", "len": 4 * MiB, "offset": 4 * MiB, "speed": 0}
        assert await content(d, "b", 4 * MiB) == b"a" * 4 * MiB
        await d.inventory.graph.detach_backend(guest)


@scenario
async def test_incremental_backups_copy_what_was_written_since_the_last(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        guest = client(d, "a")
        await d.qmp("block-dirty-bitmap-add", {"node": "a", "name": "map"})
        await guest.pwrite(65536, b"x")
        for job, copied in (("one", 65536), ("two", 0)):
            await d.qmp("blockdev-backup", {**BACKUP, "job-id": job, "sync": "incremental", "bitmap": "map"})
            assert (await ended(d, job))["len"] == copied
        assert await content(d, "b") == b"b" * 65536 + b"x" + b"a" * 65535 + b"b" * (MiB - 131072)
        await d.inventory.graph.detach_backend(guest)


@pytest.mark.parametrize(("options", "match"), [
    ({"device": "nope"}, "no node"), ({"target": "nope"}, "no node"), ({"target": "a"}, "another node"),
    ({"target": "short"}, "exactly"), ({"job-id": "9"}, "letter"), ({"compress": True}, "compressed"),
    ({"sync": "bitmap"}, "bitmap"), ({"sync": "incremental", "bitmap": "map", "bitmap-mode": "never"}, "incremental"),
    ({"bitmap-mode": "always"}, "no bitmap"), ({"bitmap": "map"}, "given with a bitmap"),
    ({"bitmap": "map", "bitmap-mode": "never"}, "learn nothing"), ({"filter-node-name": "map!"}, "letter"),
    ({"filter-node-name": "b"}, "no other node"), ({"on-source-error": "panic"}, "on-source-error"),
    ({"speed": -1}, "speed"), ({"x-perf": {"max-workers": 0}}, "max-workers"), ({"x": 1}, "not known"),
])
@scenario
async def test_a_bad_backup_does_not_start(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        await disks(d, "short", size=4096)
        await d.qmp("block-dirty-bitmap-add", {"node": "a", "name": "map"})
        await is_refused(d, "blockdev-backup", {**BACKUP, **options}, match)
        assert d.events == []


@scenario
async def test_the_device_gives_its_name_to_a_job_without_one_and_an_id_is_given_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", "c")
        await d.qmp("blockdev-backup", {"device": "a", "target": "b", "sync": "none"})
        assert [job["device"] for job in await d.qmp("query-block-jobs")] == ["a"]
        await is_refused(d, "blockdev-backup", {"device": "a", "target": "c", "sync": "none"}, "already")
        await is_refused(d, "blockdev-backup", {**BACKUP, "device": "c"}, "job 'a' uses it")


# --- mirror ---

MIRROR = {"job-id": "job", "device": "a", "target": "b", "sync": "full"}


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@scenario
async def test_a_mirror_follows_and_takes_the_place_of_the_device(tmp_path: Path, mode: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        guest = client(d, "a")
        await d.qmp("blockdev-mirror", {**MIRROR, "copy-mode": mode, "granularity": 4096, "buf-size": 65536})
        await d.event("BLOCK_JOB_READY", device="job")
        await guest.pwrite(5, b"now")
        await d.qmp("block-job-complete", {"device": "job"})
        await ended(d)
        assert guest.node.name == "b"
        assert await content(d, "b") == await content(d, "a") == b"a" * 5 + b"now" + b"a" * (MiB - 8)
        await d.inventory.graph.detach_backend(guest)


@scenario
async def test_a_mirror_that_is_ready_and_cancelled_leaves_a_copy(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        guest = client(d, "a")
        await d.qmp("blockdev-mirror", MIRROR)
        await d.event("BLOCK_JOB_READY", device="job")
        await d.qmp("block-job-cancel", {"device": "job"})
        assert "error" not in await ended(d)
        assert guest.node.name == "a"
        assert await content(d, "b") == b"a" * MiB
        await d.inventory.graph.detach_backend(guest)


@scenario
async def test_a_mirror_replaces_a_child_of_a_quorum(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "x", "y", "new")
        await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "a", "children": ["x", "y"], "vote-threshold": 1,
                                     "read-pattern": "fifo"})
        await d.qmp("blockdev-mirror", {**MIRROR, "target": "new", "replaces": "y"})
        await d.event("BLOCK_JOB_READY", device="job")
        await d.qmp("block-job-complete", {"device": "job"})
        await ended(d)
        assert [edge.node.name for edge in d.inventory.graph.find("a").children.values()] == ["x", "new"]
        assert await content(d, "new") == b"x" * MiB


@pytest.mark.parametrize(("options", "match"), [
    ({"device": "nope"}, "no node"), ({"target": "nope"}, "no node"), ({"target": "a"}, "another node"),
    ({"target": "short"}, "exactly"), ({"job-id": ""}, "letter"), ({"sync": "bitmap"}, "full, top or none"),
    ({"granularity": 100}, "power of two"), ({"buf-size": -1}, "buf-size"), ({"replaces": "nope"}, "no node"),
    ({"replaces": "b"}, "replaces"), ({"filter-node-name": "b"}, "no other node"), ({"copy-mode": "x"}, "copy-mode"),
])
@scenario
async def test_a_bad_mirror_does_not_start(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        await disks(d, "short", size=4096)
        await is_refused(d, "blockdev-mirror", {**MIRROR, **options}, match)
        assert d.events == []


# --- drive-mirror ---

DRIVE = {"job-id": "resync", "device": "a", "mode": "existing", "sync": "full", "format": "raw"}


@pytest.mark.parametrize("end", ["cancel", "complete"])
@scenario
async def test_a_drive_is_mirrored_to_an_export_and_the_connection_closed_unless_it_is_used(tmp_path: Path,
                                                                                            end: str) -> None:
    async with daemon(tmp_path, "other") as other, daemon(tmp_path) as d:
        await disks(other, "parent0")
        await other.qmp("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}})
        await other.qmp("nbd-server-add", {"device": "parent0", "writable": True})
        [address] = other.inventory.exports.addresses
        await disks(d, "a")
        guest = client(d, "a")
        await d.qmp("drive-mirror", {**DRIVE, "target": f"nbd://{address}/parent0"})
        await d.event("BLOCK_JOB_READY", device="resync")
        await guest.pwrite(0, b"now")
        await d.qmp(f"block-job-{end}", {"device": "resync"})
        await ended(d, "resync")
        assert await content(other, "parent0") == b"now" + b"a" * (MiB - 3)
        await d.event("JOB_STATUS_CHANGE", id="resync", status="null")
        assert guest.node.driver == ("memory" if end == "cancel" else "raw")
        assert (len(d.inventory.graph.nodes) == 1) is (end == "cancel")
        await d.inventory.graph.detach_backend(guest)


@scenario
async def test_a_drive_is_mirrored_to_a_file(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a")
        (tmp_path / "copy").write_bytes(bytes(MiB))
        await d.qmp("drive-mirror", {**DRIVE, "target": str(tmp_path / "copy"), "node-name": "copy"})
        assert "copy" in d.inventory.graph.nodes
        await d.event("BLOCK_JOB_READY", device="resync")
        await d.qmp("block-job-cancel", {"device": "resync"})
        await d.event("JOB_STATUS_CHANGE", id="resync", status="null")
        assert (tmp_path / "copy").read_bytes() == b"a" * MiB
        assert list(d.inventory.graph.nodes) == ["a"]


@pytest.mark.parametrize(("options", "match"), [
    ({"device": "nope"}, "no node"), ({"mode": "absolute-paths"}, "existing"), ({"format": "qcow2"}, "raw"),
    ({"target": "http://host/x"}, "NBD URI"), ({"target": "nbd+unix:///x?socket=/nonexistent/s"}, "No such file"),
    ({"target": "/nonexistent/file"}, "No such file"), ({"sync": "bitmap"}, "full, top or none"),
    ({"replaces": "a"}, "node-name"), ({"node-name": "a"}, "no other node"), ({"job-id": "9"}, "letter"),
    ({"target": "SHORT"}, "exactly"),
])
@scenario
async def test_a_bad_drive_mirror_leaves_nothing_open(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a")
        (tmp_path / "copy").write_bytes(bytes(MiB))
        (tmp_path / "short").write_bytes(bytes(4096))
        if options.get("target") == "SHORT":
            options = {"target": str(tmp_path / "short")}
        await is_refused(d, "drive-mirror", {**DRIVE, "target": str(tmp_path / "copy"), **options}, match)


@pytest.mark.parametrize(("target", "options"), [
    ("nbd://host:1/x", {"driver": "nbd", "uri": "nbd://host:1/x"}),
    ("nbd:host:1:exportname=x:y", {"driver": "nbd", "server": {"type": "inet", "host": "host", "port": "1"},
                                   "export": "x:y"}),
    ("nbd:[::1]:10809", {"driver": "nbd", "server": {"type": "inet", "host": "::1", "port": "10809"}, "export": ""}),
    ("nbd:unix:/a b:exportname=x", {"driver": "nbd", "server": {"type": "unix", "path": "/a b"}, "export": "x"}),
    ("file:a:b", {"driver": "file", "filename": "a:b"}),
    ("./a:b", {"driver": "file", "filename": "./a:b"}),
])
def test_targets_are_written_as_for_qemu(target: str, options: dict[str, Any]) -> None:
    assert target_options(target, None, unmap=False) == {"driver": "raw", "file": options}
    assert target_options(target, "n", unmap=True) == {
        "driver": "raw", "node-name": "n", "discard": "unmap", "file": {**options, "discard": "unmap"}}
    with pytest.raises(OptionError):
        target_options("ftp:x", None, unmap=False)


# --- commit ---


async def layers(d: Daemon) -> None:
    """base <- mid <- top, each with a write of its own."""
    await disks(d, "base")
    for number, (name, backing) in enumerate((("mid", "base"), ("top", "mid"))):
        await overlay(d, name, backing)
        await d.inventory.graph.find(name).pwrite(65536 * (number + 1), name.encode()[:1] * 65536)


@scenario
async def test_an_active_commit_is_ready_and_then_leaves_only_the_base(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await layers(d)
        guest = client(d, "top")
        was = await content(d, "top")
        await d.qmp("block-commit", {"job-id": "job", "device": "top"})
        await d.event("BLOCK_JOB_READY", device="job")
        await d.qmp("block-job-complete", {"device": "job"})
        await ended(d)
        assert guest.node.name == "base"
        assert await content(d, "base") == was
        await d.inventory.graph.detach_backend(guest)


@pytest.mark.parametrize("how", [{"top-node": "mid", "base-node": "base"}, {"top-node": "mid"}])
@scenario
async def test_a_layer_in_the_middle_goes_into_the_one_below(tmp_path: Path, how: dict[str, str]) -> None:
    async with daemon(tmp_path) as d:
        await layers(d)
        was = await content(d, "top")
        await d.qmp("block-commit", {"job-id": "job", "device": "top", **how})
        await ended(d)
        assert d.inventory.graph.find("top").children["backing"].node.name == "base"
        assert await content(d, "top") == was
        assert await content(d, "base") != was


@scenario
async def test_layers_can_be_named_by_their_files(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        (tmp_path / "base").write_bytes(bytes(MiB))
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "base",
                                     "file": {"driver": "file", "filename": str(tmp_path / "base")}})
        await overlay(d, "top", "base")
        await d.qmp("block-commit", {"job-id": "job", "device": "top", "base": str(tmp_path / "base")})
        await d.event("BLOCK_JOB_READY", device="job")


@pytest.mark.parametrize(("options", "match"), [
    ({"device": "mid"}, "backing node of another"), ({"device": "other"}, "another node"),
    ({"base-node": "other"}, "a layer of"), ({"top-node": "nope"}, "no node"), ({"base": "nope"}, "the file of"),
    ({"top-node": "mid", "top": "mid"}, "exclude"), ({"base-node": "top"}, "another node"),
    ({"top-node": "base"}, "another node"), ({"top-node": "mid", "base-node": "top"}, "a backing node of"),
    ({"backing-file": "x"}, "backing-file"), ({"top-node": "mid", "backing-file": "x"}, "backing-file"),
    ({"job-id": "9"}, "letter"),
])
@scenario
async def test_a_bad_commit_does_not_start(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    async with daemon(tmp_path) as d:
        await layers(d)
        await overlay(d, "other")
        await is_refused(d, "block-commit", {"job-id": "job", "device": "top", **options}, match)


@scenario
async def test_an_unknown_device_of_a_commit_is_not_found(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await is_refused(d, "block-commit", {"job-id": "job", "device": "nope"}, "nope", "DeviceNotFound")


# --- snapshot ---


@scenario
async def test_after_a_snapshot_users_write_to_the_overlay(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a")
        await overlay(d, "top")
        guest = client(d, "a")
        await d.qmp("blockdev-snapshot", {"node": "a", "overlay": "top"})
        await guest.pwrite(0, b"new")
        assert await content(d, "a") == b"a" * MiB
        assert bytes(await guest.pread(0, 5)) == b"newaa"
        await d.inventory.graph.detach_backend(guest)


@pytest.mark.parametrize(("node", "over", "match"), [
    ("nope", "top", "no node"), ("a", "nope", "no node"), ("a", "b", "can have a backing node"),
    ("a", "used", "no backing node yet"), ("base", "top", "backing node of 'used'"), ("a", "a", "backing node"),
    ("a", "busy", "in use by 'raw'"), ("a", "short", "at least"), ("top", "top", "cannot be a child|below"),
])
@scenario
async def test_a_bad_snapshot_changes_nothing(tmp_path: Path, node: str, over: str, match: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", "base")
        await overlay(d, "top")
        await overlay(d, "used", "base")
        await overlay(d, "busy")
        await overlay(d, "short", size=4096)
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "raw", "file": "busy"})
        await is_refused(d, "blockdev-snapshot", {"node": node, "overlay": over}, match)
