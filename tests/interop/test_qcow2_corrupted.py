"""The event BLOCK_IMAGE_CORRUPTED: what is told of an image whose metadata cannot be right, beside what QEMU tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.qcow2.format import COMPRESSED, COPIED, CORRUPT, OFFSET
from blockstep.nbd.client import Client
from blockstep.nbd.uri import UnixAddress
from blockstep.qmp.client import connect
from blockstep.testing.pair import environment
from blockstep.testing.processes import blockstep, started
from blockstep.units import KiB, MiB
from tests.interop.test_qcow2_driver import image_options
from tests.peers import need, run
from tests.scenarios import scenario
from tests.unit.drivers.qcow2.images import Damage

pytestmark = pytest.mark.interop

CLUSTER = 64 * KiB
#: Two L2 tables.
SIZE = 1024 * MiB
OTHER = 512 * MiB


def image(path: Path, entry: Callable[[Damage], int], options: str = "compat=1.1") -> None:
    """An image with two L2 tables; the entry of cluster 1 in the first one is ``entry``."""
    need("qemu-img", "qemu-io")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), str(SIZE))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "-c", f"write -P 1 {OTHER} 64k", str(path))
    damaged = Damage(path)
    damaged.put(damaged.l2 + 8, entry(damaged))
    damaged.save()


def is_corrupt(path: Path) -> bool:
    return bool(Damage(path).header.incompatible & CORRUPT)


async def told(path: Path, *places: int, read_only: bool = False) -> list[dict[str, Any]]:
    """The events of requests to these places of the disk, which all fail."""
    events: list[dict[str, Any]] = []
    graph = Graph()
    graph.listeners.append(lambda name, data: events.append({"event": name, **data}))
    node = await graph.open(image_options(path, **{"read-only": read_only}))
    user = graph.attach_backend(node, "test", READ if read_only else READ | WRITE)
    for place in places:
        with pytest.raises(OSError, match="the image is broken"):
            await (user.pread(place, 512) if read_only else user.pwrite(place, b"x"))
    await graph.detach_backend(user)
    await graph.close(node)
    return events


def test_data_where_metadata_is_is_told_once_and_the_image_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, lambda image: image.l1 | COPIED)
    place = Damage(path).l1
    [event] = asyncio.run(told(path, CLUSTER, 0, CLUSTER))
    assert is_corrupt(path)
    assert "another user" in event.pop("msg")
    assert event == {"event": "BLOCK_IMAGE_CORRUPTED", "device": "", "node-name": "disk", "offset": place,
                     "size": CLUSTER, "fatal": True}


def test_an_image_that_cannot_be_marked_is_told_of_and_not_as_fatal(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, lambda image: image.l1 | COPIED, "compat=0.10")
    [event] = asyncio.run(told(path, CLUSTER, 0, CLUSTER))
    assert event["fatal"] is False


@pytest.mark.parametrize("entry", [COPIED | 1 << 40 | 512, COPIED | 1 << 40 | 16, COMPRESSED | 1 << 45])
@pytest.mark.parametrize("read_only", [False, True])
def test_what_fails_requests_and_harms_nothing_is_told_once_and_marks_nothing(
        entry: int, read_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, lambda _: entry)
    before = path.read_bytes()
    [event] = asyncio.run(told(path, CLUSTER, CLUSTER, read_only=read_only))
    assert (event["event"], event["fatal"]) == ("BLOCK_IMAGE_CORRUPTED", False)
    assert not is_corrupt(path)
    assert not read_only or path.read_bytes() == before


def test_a_marking_comes_after_what_was_told_before(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, lambda image: COPIED | 1 << 40)
    damaged = Damage(path)
    damaged.put(damaged.u64(damaged.l1 + 8) & OFFSET, damaged.l2 | COPIED)
    damaged.save()
    events = asyncio.run(told(path, CLUSTER, OTHER, CLUSTER, OTHER))
    assert [event["fatal"] for event in events] == [False, True]


def test_a_mark_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, lambda image: image.l1 | COPIED)
    damaged = Damage(path)
    damaged.put((damaged.u64(damaged.l1 + 8) & OFFSET) + 8, damaged.l1 | COPIED)
    damaged.save()
    events: list[bool] = []

    async def go() -> None:
        graph = Graph()
        graph.listeners.append(lambda name, data: events.append(data["fatal"]))
        node = await graph.open({**image_options(path), "file": {
            "driver": "blkdebug", "file": {"driver": "file", "filename": str(path)},
            "inject-error": [{"event": "none", "iotype": "write", "sector": 0, "once": True, "errno": 28}]}})
        user = graph.attach_backend(node, "test", READ | WRITE)
        for place in (CLUSTER, OTHER + CLUSTER):
            assert events == [False] * bool(place > CLUSTER)
            assert not is_corrupt(path)
            with pytest.raises(OSError, match="the image is broken"):
                await user.pwrite(place, b"x")
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    assert events == [False, True]
    assert is_corrupt(path)


@pytest.mark.parametrize("program", [["qemu-storage-daemon"], blockstep("daemon")], ids=["qemu", "blockstep"])
@scenario
async def test_a_monitor_is_told_as_by_qemu(tmp_path: Path, program: list[str | Path]) -> None:
    need("qemu-storage-daemon")
    path, nbd, qmp = tmp_path / "disk.qcow2", tmp_path / "nbd", tmp_path / "qmp"
    image(path, lambda image: image.l1 | COPIED)
    place = Damage(path).l1
    before = path.read_bytes()
    command = [*program, "--chardev", f"socket,id=control,path={qmp},server=on,wait=off", "--monitor", "control",
               "--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={path}",
               "--nbd-server", f"addr.type=unix,addr.path={nbd}", "--export", "nbd,id=one,node-name=disk,writable=on"]
    with started(command, nbd, env=environment()):  # the monitor listens before it does
        async with connect(qmp) as monitor:
            events = monitor.events("BLOCK_IMAGE_CORRUPTED")
            client = await Client.connect(UnixAddress(str(nbd)), "disk")
            for _ in range(2):
                with pytest.raises(OSError):
                    await client.pwrite(CLUSTER, b"\xFF" * CLUSTER)
            data = (await anext(events))["data"]
            events.close()
            await client.close()
            assert data.pop("msg")
            assert data == {"device": "", "node-name": "disk", "offset": place, "size": CLUSTER, "fatal": True}
            await monitor.execute("quit")
    assert is_corrupt(path)
    after = bytearray(path.read_bytes())
    after[79] &= ~CORRUPT
    assert after == before
