"""What comes while a save, or a change of the header, is on its way to the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE
from blockstep.block.resize import resize
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.check import check
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.drivers.qcow2.format import Extension, build_header, parse_header
from blockstep.units import KiB, MiB, TiB
from tests.disks import ram
from tests.scenarios import scenario


@asynccontextmanager
async def disk(path: Path, **options: Any) -> AsyncIterator[tuple[Backend, Qcow2, Blkdebug]]:
    """A user of the image, its node, and the node of its file."""
    graph = Graph()
    file = await graph.open({"driver": "blkdebug", "node-name": "file", "discard": "unmap", "file": {
        "driver": "file", "filename": str(path)}})
    node = await graph.open({"driver": "qcow2", "node-name": "disk", "file": "file", "discard": "unmap", **options})
    assert isinstance(node, Qcow2)
    assert isinstance(file, Blkdebug)
    user = graph.attach_backend(node, "user", READ | WRITE)
    yield user, node, file
    await graph.detach_backend(user)
    await graph.close(node)
    await graph.close(file)


def assert_clean(image: bytes) -> None:
    result = check(lambda offset, length: image[offset:offset + length], len(image))
    assert result.clean, result


@scenario
async def test_the_refcount_table_grows_again_while_a_longer_one_is_being_saved(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    CreateQcow2(filename=str(path), size=64 * MiB, cluster_size=512, refcount_bits=64).create()
    async with disk(path) as (user, node, file):
        refcounts, at = node._refcounts, 0

        async def grow() -> None:
            nonlocal at
            length = len(refcounts.table)
            while len(refcounts.table) == length:
                await user.pwrite(at, b"\x01" * 64 * KiB)
                at += 64 * KiB

        await grow()
        file.suspend("flush", "save")
        saving = asyncio.ensure_future(user.flush())
        await file.suspended("save")
        await grow()
        file.resume("save")
        await saving
        for _ in range(3):  # clusters that are free are used again
            await user.flush()
            await user.pwrite(at, b"\x02" * 64 * KiB)
    assert_clean(path.read_bytes())


@scenario
async def test_a_flush_that_is_cancelled_after_an_emptying_leaves_the_image_on_the_disk_to_be_spared(
        tmp_path: Path) -> None:
    path = tmp_path / "disk"
    CreateQcow2(filename=str(path), size=64 * MiB).create()
    async with disk(path) as (user, node, file):
        await user.pwrite(0, b"\x01" * MiB)
        await user.flush()
        await node.make_empty()
        file.suspend("discard", "given back")
        flush = asyncio.ensure_future(user.flush())
        await file.suspended("given back")
        flush.cancel()
        await asyncio.wait([flush])
        file.resume("given back")
        await user.pwrite(0, b"\x02" * 4 * MiB)
        await user.flush()
        await node.make_empty()
        await user.pwrite(8 * MiB, b"\x03" * 8 * MiB)
        (tmp_path / "crashed").write_bytes(path.read_bytes())
    async with disk(tmp_path / "crashed") as (user, _, _):
        assert bytes(await user.pread(0, 4 * MiB)) == b"\x02" * 4 * MiB


@scenario
async def test_a_resize_waits_for_a_header_that_is_being_changed_for_bitmaps(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"
    CreateQcow2(filename=str(path), size=64 * MiB).create()
    async with disk(path) as (_, node, _):
        DirtyBitmap(node, "bitmap", persistent=True)
        await node.keep_bitmaps()
    image = bytearray(path.read_bytes())
    header = parse_header(image[:64 * KiB])
    begin = build_header(header.replaced(extensions=(*header.extensions, Extension(0x12345678, b"unknown"))))
    image[:len(begin)] = begin  # what is behind the bitmaps' extension has to move
    path.write_bytes(image)
    graph = Graph()
    await ram(graph, "store", bytes(image))
    file = await graph.open({"driver": "blkdebug", "node-name": "file", "file": "store"})
    node = await graph.open({"driver": "qcow2", "node-name": "disk", "file": "file"})
    assert isinstance(file, Blkdebug)
    assert isinstance(node, Qcow2)
    change = node._change_header

    async def held(extension: Any) -> None:
        file.suspend("write", "header")
        await change(extension)

    monkeypatch.setattr(node, "_change_header", held)
    node.bitmaps["bitmap"].prepare_remove().commit()
    keeping = asyncio.ensure_future(node.keep_bitmaps())
    await file.suspended("header")
    resizing = asyncio.ensure_future(resize(graph, node, 8 * TiB))  # its L1 table has to move
    for _ in range(500):  # in memory nothing else takes time
        await asyncio.sleep(0)
    file.resume("header")
    await asyncio.gather(keeping, resizing)
    await graph.close(node)
    user = graph.attach_backend(file, "user")
    after = bytes(await user.pread(0, user.length))
    await graph.detach_backend(user)
    assert parse_header(after[:64 * KiB]).size == node.length == 8 * TiB
    assert_clean(after)


@scenario
async def test_others_have_their_turns_while_many_clusters_become_free(tmp_path: Path) -> None:
    path, graph, turns = tmp_path / "disk", Graph(), 0
    CreateQcow2(filename=str(path), size=4 * MiB, cluster_size=512, preallocation="metadata").create()
    store = await ram(graph, "store", path.read_bytes())
    node = await graph.open({"driver": "qcow2", "node-name": "disk", "file": "store"})
    user = graph.attach_backend(node, "user", READ | WRITE)
    for offset in range(0, 3 * MiB, KiB):  # 3072 that have no neighbours, and some of which all become free
        await user.discard(offset, 512)
    await user.discard(3 * MiB, MiB)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.ensure_future(others())
    await user.flush()
    beside.cancel()
    assert turns >= 3072 // 256
    await graph.detach_backend(user)
    await graph.close(node)
    assert_clean(bytes(store.content))
    assert check(lambda offset, length: bytes(store.content[offset:offset + length]),
                 len(store.content)).allocated_clusters == 3072
