"""The storage daemon in one process: commands of every area, events, and the end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from blockstep.daemon.storage import AREAS
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
