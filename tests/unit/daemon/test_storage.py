"""The storage daemon in one process: commands of every area, events, and the end."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from blockstep.block.permissions import READ, WRITE
from blockstep.daemon import files
from blockstep.daemon.storage import AREAS
from blockstep.errors import ConnectionLost
from blockstep.jobs.mirror import MirrorJob
from blockstep.qmp.client import connect
from blockstep.qmp.schema import Registry
from tests.daemon import daemon, refused
from tests.scenarios import scenario


@scenario
async def test_it_offers_the_commands_of_all_areas(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        offered = {each["name"] for each in await d.qmp("query-commands")}
        assert offered == {*Registry.of(*AREAS).commands, "qmp_capabilities"}
        with refused("CommandNotFound"):
            await d.qmp("nonsense")


@scenario
async def test_two_daemons_in_one_process_have_nothing_in_common(tmp_path: Path) -> None:
    async with daemon(tmp_path, "one") as one, daemon(tmp_path, "two") as two:
        await one.inventory.graph.open({"driver": "null", "node-name": "disk"})
        assert "disk" not in two.inventory.graph.nodes
        assert await two.qmp("query-name") == {"name": "two"}


@scenario
async def test_a_stop_flushes_what_was_written_and_closes_every_node(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    flushed = []
    async with daemon(tmp_path) as d:
        file = await d.inventory.graph.open(
            {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk")})
        await d.inventory.graph.open({"driver": "raw", "node-name": "top", "file": "file"})
        flush = file.flush

        async def noted() -> None:
            flushed.append(d.inventory.graph.nodes.keys() >= {"file", "top"})
            await flush()

        file.flush = noted  # type: ignore[method-assign]
        for edge in file.parents:
            edge.bind(file)
    assert flushed == [True]
    assert d.inventory.graph.nodes == {}


@scenario
async def test_a_stop_flushes_what_was_written_to_a_node_below_an_overlay(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    synced = []
    async with daemon(tmp_path) as d:
        disk = await d.inventory.graph.open(
            {"driver": "file", "node-name": "secondary", "filename": str(tmp_path / "disk")})
        await d.inventory.graph.open({"driver": "overlay", "node-name": "hidden", "backing": "secondary"})
        await disk.pwrite(0, b"x")
        fdatasync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", lambda fd: (fdatasync(fd), synced.append(os.fstat(fd).st_ino)))
    assert synced == [(tmp_path / "disk").stat().st_ino]


@scenario
async def test_a_stop_tells_of_a_disk_that_could_not_be_flushed(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        node = await d.inventory.graph.open({"driver": "null", "node-name": "disk"})

        async def fail() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        node.flush = fail  # type: ignore[method-assign]
        lost = await d.program.close()
        assert [str(error) for error in lost] == ["[Errno 5] node 'disk': Input/output error"]


@scenario
async def test_monitors_hear_of_the_end(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        async with connect(d.path) as other:
            await d.qmp("quit")
            await d.program.wait()
            events = other.events("SHUTDOWN")
            await d.program.close()
            assert (await anext(events))["data"]["reason"] == "host-qmp-quit"


@scenario
async def test_no_command_begins_once_the_end_has_begun(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        ending = asyncio.ensure_future(d.program.close())
        await asyncio.sleep(0)  # it has begun
        with pytest.raises(ConnectionLost):
            await d.qmp("object-add", {"qom-type": "secret", "id": "late", "data": "x"})
        assert await ending == []
        assert not list(d.inventory.objects)


@scenario
async def test_a_stop_ends_replication_and_jobs_in_good_order(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        for name in ("secondary", "hidden", "active"):
            (tmp_path / name).write_bytes(bytes(1 << 20))
        await graph.open({"driver": "file", "node-name": "secondary", "filename": str(tmp_path / "secondary")})
        await graph.open({
            "driver": "replication", "node-name": "top", "mode": "secondary", "top-id": "top",
            "file": {"driver": "overlay", "node-name": "active", "memory-limit": 1 << 20,
                     "backing": {"driver": "overlay", "node-name": "hidden", "backing": "secondary",
                                 "memory-limit": 1 << 20}}})
        link = graph.attach_backend(graph.find("secondary"), "link", READ | WRITE)
        await d.inventory.replication.start_all("secondary")
        source, target = [await graph.open({"driver": "memory", "node-name": name, "size": 1 << 20})
                          for name in ("source", "target")]
        await d.inventory.jobs.create(MirrorJob("mirror", graph, source, target))
        await link.pwrite(0, b"from the primary")
        await graph.detach_backend(link)
    assert d.inventory.jobs.list() == []
    assert (tmp_path / "secondary").read_bytes().startswith(b"from the primary")


@scenario
async def test_what_others_do_to_the_file_of_a_node_is_an_event_and_told_of_the_node_until_it_is_mended(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    path.write_bytes(bytes(4096))
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "top", "file": {
            "driver": "file", "node-name": "file", "filename": str(path)}})
        path.rename(elsewhere)
        await d.program.look()
        said = f"{path} was moved away: put it back before this program ends"
        assert await d.event("BLOCK_STORAGE_FAULT") == {"node-name": "file", "reason": said}
        nodes = {node["node-name"]: node.get("fault") for node in await d.qmp("query-named-block-nodes")}
        assert nodes == {"top": None, "file": said}
        assert capfd.readouterr().err == f"blockstep: node 'file': {said}\n"
        elsewhere.rename(path)
        await d.program.look()
        assert await d.event("BLOCK_STORAGE_FAULT", reason="") == {"node-name": "file", "reason": ""}
        assert not any("fault" in node for node in await d.qmp("query-named-block-nodes"))
        path.unlink()
        await d.program.look()
        await d.qmp("blockdev-del", {"node-name": "top"})
        await d.program.look()
        assert len([event for event in d.events if event["event"] == "BLOCK_STORAGE_FAULT"]) == 3
    assert "was deleted" in capfd.readouterr().err


@scenario
async def test_files_are_looked_at_without_anybody_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EVERY", 0.001)
    (tmp_path / "disk").write_bytes(bytes(4096))
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk")})
        os.truncate(tmp_path / "disk", 512)
        assert "was shortened from 4096 to 512 bytes" in (await d.event("BLOCK_STORAGE_FAULT"))["reason"]


@scenario
async def test_a_file_that_is_deleted_before_the_end_is_told_of_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk")})
        (tmp_path / "disk").unlink()
        await d.program.close()
        assert "was deleted" in (await d.event("BLOCK_STORAGE_FAULT", **{"node-name": "file"}))["reason"]
