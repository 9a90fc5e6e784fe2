"""Requests to one image at the same time, over a file that makes each of them wait."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest

from blockstep.block.driver import FUA, MAY_UNMAP, Buffer, Filter
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.node import NodeOptions, NodeRef
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.block.registry import register
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.check import check
from blockstep.units import KiB, MiB

SIZE = 2 * MiB
#: Each worker has slices of this many bytes to itself: smaller than a cluster, so that clusters are shared.
SLICE = 3 * KiB


class WaitingOptions(NodeOptions, tag="test-waiting"):
    file: NodeRef
    seed: int = 0


@register
class Waiting(Filter):
    """Every request waits for some turns of the event loop, before and after it takes effect."""

    driver: ClassVar[str] = "test-waiting"
    Options = WaitingOptions
    options: WaitingOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}

    async def open(self) -> None:
        self._random = random.Random(self.options.seed)
        #: The next request waits for this before it takes effect.
        self.held: asyncio.Event | None = None

    async def _wait(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            await held.wait()
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)

    async def pread(self, offset: int, length: int) -> Buffer:
        await self._wait()
        data = await self.file.pread(offset, length)
        await self._wait()
        return data

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self._wait()
        await self.file.pwrite(offset, data, flags)
        await self._wait()

    async def flush(self) -> None:
        await self._wait()


async def worker(user: Backend, model: bytearray, rnd: random.Random, number: int, workers: int) -> None:
    """Requests to the worker's own slices: it knows what they read as, whatever the others do."""
    slices = [offset for offset in range(0, SIZE - SLICE, SLICE) if offset // SLICE % workers == number]
    for _ in range(60):
        start = rnd.choice(slices)
        offset = start + rnd.randrange(SLICE)
        size = min(start + SLICE - offset, rnd.choice((1, 100, 512, SLICE)))
        kind = rnd.choice(("write", "write", "write", "zero", "read", "flush"))
        if kind == "write":
            model[offset:offset + size] = data = rnd.randbytes(size)
            await user.pwrite(offset, data, rnd.choice((0, 0, 0, FUA)))
        elif kind == "zero":
            model[offset:offset + size] = bytes(size)
            await user.write_zeroes(offset, size, rnd.choice((0, MAY_UNMAP)))
        elif kind == "read":
            assert bytes(await user.pread(offset, size)) == model[offset:offset + size]
        else:
            await user.flush()


async def whole_clusters(user: Backend, rnd: random.Random, start: int) -> None:
    """Discards, reads and writes of the same clusters at the same time: any result but the content of others."""
    async def one(value: int) -> None:
        kind, offset = rnd.choice(("write", "discard", "read", "zero")), start + rnd.randrange(8) * 4 * KiB
        if kind == "write":
            await user.pwrite(offset, bytes([value]) * 4096)
        elif kind == "discard":
            await user.discard(offset, 4 * KiB)
        elif kind == "zero":
            await user.write_zeroes(offset, 4 * KiB, MAY_UNMAP)
        else:
            assert set(bytes(await user.pread(offset, 4096))) <= {0, 0xEE}

    for _ in range(30):
        await asyncio.gather(*(one(0xEE) for _ in range(6)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("cluster_size", "options"), [
    (512, {}), (4096, {}), (65536, {}), (16384, {"extended_l2": True}), (65536, {"extended_l2": True}),
    (4096, {"data_file": "data"}), (16384, {"data_file": "data", "extended_l2": True})], ids=str)
def test_no_request_meets_the_data_of_another(
    cluster_size: int, options: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    path, rnd = tmp_path / "disk", random.Random(seed)
    base = rnd.randbytes(SIZE // 2)
    (tmp_path / "base").write_bytes(base)
    backed = bool(seed & 1)
    CreateQcow2(filename=str(path), size=SIZE + 32 * KiB, cluster_size=cluster_size,
                backing_file="base" if backed else None, backing_fmt="raw" if backed else None, **options).create()
    model = bytearray((base if backed else b"").ljust(SIZE, b"\0"))

    async def go() -> None:
        graph = Graph()
        node = await graph.open({
            "driver": "qcow2", "l2-cache-size": 4 * cluster_size, "refcount-cache-size": 4 * cluster_size,
            "file": {"driver": "test-waiting", "seed": seed, "file": {"driver": "file", "filename": str(path)}},
            **({"data-file": {"driver": "test-waiting", "seed": -seed, "file": {
                "driver": "file", "filename": str(tmp_path / "data")}}} if "data_file" in options else {})})
        user = graph.attach_backend(node, "test", READ | WRITE)
        await asyncio.gather(*(worker(user, model, random.Random(seed + each), each, 12) for each in range(12)),
                             whole_clusters(user, rnd, SIZE))
        assert bytes(await user.pread(0, SIZE)) == model
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    with path.open("rb") as file:
        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)
        result = check(read, path.stat().st_size)
    assert (result.corruptions, result.leaks) == (0, 0)


@pytest.mark.parametrize("late", ["read", "write"])
def test_a_cluster_is_not_used_again_before_the_requests_to_it_have_ended(late: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    CreateQcow2(filename=str(path), size=SIZE).create()

    async def go() -> None:
        graph = Graph()
        node = await graph.open({"driver": "qcow2", "file": {
            "driver": "test-waiting", "node-name": "file", "file": {"driver": "file", "filename": str(path)}}})
        user = graph.attach_backend(node, "test", READ | WRITE)
        file = graph.find("file")
        assert isinstance(file, Waiting)
        await user.pwrite(0, b"\x01" * 65536)
        await user.flush()
        release = file.held = asyncio.Event()
        request = asyncio.ensure_future(user.pread(0, 4096) if late == "read" else user.pwrite(0, b"late"))
        await asyncio.sleep(0)
        assert file.held is None  # the request is there, and waits
        await user.discard(0, 65536)
        for _ in range(3):
            await user.flush()
            await user.pwrite(65536, b"\x02" * 65536)
        release.set()
        data = await request
        if data is not None:
            assert set(bytes(data)) <= {0, 1}
        assert bytes(await user.pread(65536, 65536)) == b"\x02" * 65536
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())


def test_a_discard_that_fails_is_no_error_of_the_write_that_finds_the_place_free(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    CreateQcow2(filename=str(path), size=SIZE).create()

    async def go() -> None:
        graph = Graph()
        node = await graph.open({"driver": "qcow2", "discard": "unmap", "file": {
            "driver": "blkdebug", "inject-error": [{"event": "discard"}], "file": {
                "driver": "file", "filename": str(path)}}})
        user = graph.attach_backend(node, "test", READ | WRITE)
        for _ in range(3):
            await user.pwrite(0, b"\x01" * 65536)
            await user.flush()
            await user.discard(0, 65536)
            await user.flush()
        await node.make_empty()
        await user.flush()
        await user.pwrite(0, b"\x02" * 65536)
        assert bytes(await user.pread(0, 65536)) == b"\x02" * 65536
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    image = path.read_bytes()
    assert check(lambda offset, length: image[offset:offset + length], len(image)).clean
