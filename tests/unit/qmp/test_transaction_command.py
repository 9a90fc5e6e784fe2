"""Transactions: all or nothing, of one moment, and together to the end if they are grouped."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.create import CreateQcow2
from blockstep.qmp.client import connect
from blockstep.qmp.commands.transaction import TransactionArguments, transaction
from blockstep.qmp.errors import CommandRefused
from tests.daemon import Daemon, daemon, refused
from tests.disks import faulty
from tests.scenarios import scenario
from tests.unit.jobs.support import settle
from tests.unit.qmp.disks import MiB, client, content, disks, everything, overlay

Action = dict[str, Any]
ABORT: Action = {"type": "abort", "data": {}}


def backup(job: str, device: str, target: str, **more: Any) -> Action:
    data = {"job-id": job, "device": device, "target": target, "sync": "full", **more}
    return {"type": "blockdev-backup", "data": data}


def bitmap(verb: str, name: str = "map", node: str = "a", **more: Any) -> Action:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name, **more}}


def merge(target: str, *others: str) -> Action:
    return {"type": "block-dirty-bitmap-merge", "data": {"node": "a", "target": target, "bitmaps": list(others)}}


def snapshot(node: str, over: str) -> Action:
    return {"type": "blockdev-snapshot", "data": {"node": node, "overlay": over}}


EVERY_ACTION = [bitmap("add", "new"), bitmap("enable", "off"), bitmap("disable"), merge("new", "map"), bitmap("clear"),
                bitmap("remove"), backup("job", "a", "b"), snapshot("c", "top")]


@pytest.mark.parametrize("count", range(1, len(EVERY_ACTION) + 1))
@scenario
async def test_whatever_came_before_the_action_that_fails_is_taken_back(tmp_path: Path, count: int) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", "c")
        await overlay(d, "top")
        guest = client(d, "a")
        for name in ("map", "off"):
            await d.qmp("block-dirty-bitmap-add", {"node": "a", "name": name, "disabled": name == "off"})
        await guest.pwrite(65536, b"x")
        before = everything(d)
        for last in (ABORT, bitmap("clear", "nope"), backup("other", "a", "nope")):
            with refused():
                await d.qmp("transaction", {"actions": [*EVERY_ACTION[:count], last]})
            assert everything(d) == before
        assert not [event for event in d.events if event["event"].startswith("BLOCK_JOB")]
        await d.qmp("transaction", {"actions": EVERY_ACTION[:count]})
        await d.inventory.graph.detach_backend(guest)


@scenario
async def test_every_action_does_what_its_command_does(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", "c")
        await overlay(d, "top")
        for name in ("map", "off"):
            await d.qmp("block-dirty-bitmap-add", {"node": "a", "name": name, "disabled": name == "off"})
        bitmaps = d.inventory.graph.find("a").bitmaps
        bitmaps["map"].set(65536, 1)
        await d.qmp("transaction", {"actions": EVERY_ACTION})
        await d.event("BLOCK_JOB_COMPLETED", device="job")
        assert await content(d, "b") == b"a" * MiB
        assert set(bitmaps) == {"new", "off"}
        assert list(bitmaps["new"].dirty()) == [(65536, 65536)]
        assert bitmaps["off"].enabled
        assert d.inventory.graph.find("top").children["backing"].node.name == "c"


@scenario
async def test_backups_of_two_disks_are_of_one_moment(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", "c", "d")
        await d.qmp("blockdev-add", {"driver": "blkdebug", "node-name": "slow", "file": "b"})
        slow = d.inventory.graph.find("slow")
        assert isinstance(slow, Blkdebug)
        guests = client(d, "a"), client(d, "slow")
        slow.suspend("write", "held")
        held = asyncio.ensure_future(guests[1].pwrite(0, b"first"))
        await slow.suspended("held")
        arguments = {"actions": [backup("one", "a", "c"), backup("two", "slow", "d")]}
        answer = asyncio.ensure_future(transaction(d.program, msgspec.convert(arguments, TransactionArguments)))
        await settle()
        later = asyncio.ensure_future(guests[0].pwrite(0, b"second"))  # may not be seen without the first
        await settle()
        assert not later.done()
        assert not d.inventory.jobs.list()
        slow.resume("held")
        await asyncio.gather(held, answer, later)
        for job in ("one", "two"):
            await d.event("BLOCK_JOB_COMPLETED", device=job)
        assert await content(d, "c") == b"a" * MiB
        assert (await content(d, "d"))[:6] == b"firstb"
        for guest in guests:
            await d.inventory.graph.detach_backend(guest)


@pytest.mark.parametrize("grouped", [False, True])
@scenario
async def test_grouped_jobs_succeed_or_fail_together(tmp_path: Path, grouped: bool) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", "c", "d", size=4 * MiB)
        await d.qmp("block-dirty-bitmap-add", {"node": "a", "name": "map"})
        d.inventory.graph.find("a").bitmaps["map"].set(65536, 1)
        incremental = {"sync": "incremental", "bitmap": "map"}
        await d.qmp("transaction", {
            "actions": [backup("quick", "a", "b", **incremental), backup("slow", "c", "d", speed=1)],
            "properties": {"completion-mode": "grouped" if grouped else "individual"}})
        await d.event("JOB_STATUS_CHANGE", id="quick", status="waiting" if grouped else "null")
        await d.qmp("job-cancel", {"id": "slow"})
        await d.event("JOB_STATUS_CHANGE", id="slow", status="null")
        await d.event("BLOCK_JOB_CANCELLED" if grouped else "BLOCK_JOB_COMPLETED", device="quick")
        kept = list(d.inventory.graph.find("a").bitmaps["map"].dirty())
        assert kept == ([(65536, 65536)] if grouped else [])


@pytest.mark.parametrize(("actions", "properties", "match"), [
    ([ABORT], {}, "abort"), ([{"type": "nope", "data": {}}], {}, "type"), ([bitmap("add", more=1)], {}, "data.more"),
    ([bitmap("add"), bitmap("add")], {}, "no other bitmap"),
    ([backup("j", "a", "b"), backup("j", "a", "c")], {}, "already"),
    ([backup("j", "a", "b"), backup("k", "a", "b")], {}, "uses it"), ([snapshot("a", "b")], {}, "backing"),
    ([{"type": "drive-backup", "data": {"device": "a", "target": "x", "sync": "full"}}], {}, "blockdev-backup"),
    ([bitmap("add")], {"completion-mode": "grouped"}, "grouped"), ([], {"completion-mode": "x"}, "completion-mode"),
    ([backup("j", "a", "b"), bitmap("add")], {"completion-mode": "grouped"}, "grouped"),
    ([bitmap("add"), bitmap("remove"), bitmap("clear")], {}, "in use"),
])
@scenario
async def test_a_bad_transaction_changes_nothing(tmp_path: Path, actions: list[Action], properties: dict[str, str],
                                                 match: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b", "c")
        before = everything(d)
        with refused(match=match):
            await d.qmp("transaction", {"actions": actions, "properties": properties})
        assert everything(d) == before


@scenario
async def test_an_empty_transaction_does_nothing(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        for mode in ("individual", "grouped"):
            await d.qmp("transaction", {"actions": [], "properties": {"completion-mode": mode}})


async def slow_disk(d: Daemon, name: str) -> Blkdebug:
    """A disk whose flush is held back, under the tag "slow"."""
    debug, _ = await faulty(d.inventory.graph, name, MiB)
    debug.suspend("flush_to_disk", "slow")
    return debug


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("first", "command", "arguments"), [
    (snapshot("a", "top"), "blockdev-del", {"node-name": "top"}),
    (snapshot("a", "top"), "block-export-del", {"id": "e"}),
    (backup("job", "a", "b"), "job-cancel", {"id": "job"}),
    (bitmap("add"), "block-dirty-bitmap-remove", {"node": "a", "name": "map"}),
    (bitmap("clear", "old"), "block-dirty-bitmap-remove", {"node": "a", "name": "old"}),
])
@scenario
async def test_another_monitor_finds_all_of_a_transaction_or_nothing(
        tmp_path: Path, first: Action, command: str, arguments: dict[str, str], fails: bool) -> None:
    async with daemon(tmp_path) as d, connect(d.path) as other:
        await disks(d, "a", "b")
        for name in ("top", "over"):
            await overlay(d, name)
        await d.qmp("block-dirty-bitmap-add", {"node": "a", "name": "old"})
        await d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
        await d.qmp("block-export-add", {"type": "nbd", "id": "e", "node-name": "a", "writable": True})
        slow = await slow_disk(d, "slow")
        if fails:
            slow.fail("flush_to_disk", once=True)
        taking = asyncio.ensure_future(d.qmp("transaction", {"actions": [first, snapshot("slow", "over")]}))
        await slow.suspended("slow")
        before = everything(d)
        with contextlib.suppress(CommandRefused):
            await other.execute(command, arguments)
        without = everything(d)
        slow.resume("slow")
        answer, = await asyncio.gather(taking, return_exceptions=True)
        if isinstance(answer, CommandRefused):
            assert everything(d) == without
            assert "internal" not in answer.description
        else:
            assert not fails
            assert everything(d) not in (before, without)


@scenario
async def test_a_persistent_bitmap_that_cannot_be_stored_is_not_added_and_nothing_else_is_done(tmp_path: Path) -> None:
    CreateQcow2(filename=str(tmp_path / "image"), size=MiB).create()
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        debug = await d.inventory.graph.open({"driver": "blkdebug", "node-name": "debug", "file": {
            "driver": "file", "filename": str(tmp_path / "image")}})
        assert isinstance(debug, Blkdebug)
        await d.qmp("blockdev-add", {"driver": "qcow2", "node-name": "image", "file": "debug"})
        before, actions = everything(d), [bitmap("add", node="image", persistent=True), backup("job", "a", "b")]
        debug.fail("pwritev")
        with refused(match="injected"):
            await d.qmp("transaction", {"actions": actions})
        assert everything(d) == before
        debug.clear_rules()
        with refused(match="abort"):
            await d.qmp("transaction", {"actions": [*actions, ABORT]})
        assert everything(d) == before
        await d.qmp("blockdev-del", {"node-name": "image"})
        await d.qmp("blockdev-add", {"driver": "qcow2", "node-name": "image", "file": "debug"})
        assert everything(d) == before
        await d.qmp("transaction", {"actions": actions})
        assert list(d.inventory.graph.find("image").bitmaps) == ["map"]
