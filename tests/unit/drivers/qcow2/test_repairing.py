"""Repairs of dirty images, made when these are opened, and the threads that they take."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockstep.aio import pool
from blockstep.block.graph import Graph
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.format import AT_INCOMPATIBLE, DIRTY
from blockstep.units import MiB
from tests.scenarios import scenario


def dirty(path: Path) -> Path:
    CreateQcow2(filename=str(path), size=MiB, lazy_refcounts=True).create()
    with path.open("r+b") as file:
        file.seek(AT_INCOMPATIBLE)
        file.write(DIRTY.to_bytes(8, "big"))
    return path


@pytest.mark.timeout(20)
@scenario
async def test_a_repair_takes_no_thread_that_its_own_requests_need(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_pool", ThreadPoolExecutor(1))  # as with 16 repairs at a time
    graph = Graph()
    node = await graph.open({"driver": "qcow2", "file": {
        "driver": "file", "filename": str(dirty(tmp_path / "disk"))}})
    await graph.close(node)


@scenario
async def test_an_opening_that_waits_for_the_repair_of_another_image_can_be_cancelled(tmp_path: Path) -> None:
    graph = Graph()
    for name in ("one", "two"):
        await graph.open({"driver": "blkdebug", "node-name": name, "file": {
            "driver": "file", "filename": str(dirty(tmp_path / name))}})
    one, two = graph.find("one"), graph.find("two")
    assert isinstance(one, Blkdebug)
    assert isinstance(two, Blkdebug)
    one.suspend("flush", "repair")
    first = asyncio.ensure_future(graph.open({"driver": "qcow2", "file": "one"}))
    await one.suspended("repair")
    second = asyncio.ensure_future(graph.open({"driver": "qcow2", "file": "two"}))
    for _ in range(100):  # up to where it waits: its header is in the page cache
        await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    one.resume("repair")
    await graph.close(await first)
    await graph.close(await graph.open({"driver": "qcow2", "file": "two"}))
