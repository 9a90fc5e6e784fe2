"""Persistent bitmaps of qcow2 images beside QEMU: loaded from each other, and after a crash not believed."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import MAY_UNMAP
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, RESIZE, WRITE
from blockstep.block.reopen import reopen
from blockstep.errors import OperationBlocked, OptionError
from blockstep.units import KiB, MiB
from tests.interop.test_qcow2_driver import check, content, cuts, disk, image_options, made
from tests.peers import need, qemu_nbd, run

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

SIZE: Final = 1 * MiB + 12 * KiB
IMAGES: Final = ("compat=1.1", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=4k,refcount_bits=1",
                 "compat=1.1,extended_l2=on,cluster_size=16k", "compat=1.1,data_file=DATA")


@dataclass
class Model:
    """What a persistent bitmap should be."""

    granularity: int
    enabled: bool
    inconsistent: bool = False
    clusters: set[int] = field(default_factory=set)

    def wrote(self, offset: int, length: int) -> None:
        if self.enabled and not self.inconsistent:
            self.clusters.update(range(offset // self.granularity, -(-(offset + length) // self.granularity)))

    def fit(self, length: int) -> None:
        self.clusters = {each for each in self.clusters if each * self.granularity < length}


def told(path: Path) -> dict[str, tuple[int, set[str]]]:
    """Name of each bitmap -> its granularity and flags, by qemu-img."""
    done = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", str(path)], timeout=60)
    found = json.loads(done)["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: (each["granularity"], set(each["flags"])) for each in found}


def dirty_by_qemu(path: Path, name: str, granularity: int) -> set[int]:
    """The dirty clusters of a bitmap, by a client of a qemu-nbd that serves the image."""
    with qemu_nbd(path.parent, path, "-r", "-B", name, image_format="qcow2") as uri:
        runs = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri).stdout)
    return {cluster for each in runs if each["type"] for cluster in range(
        each["offset"] // granularity, -(-(each["offset"] + each["length"]) // granularity))}


def judge(path: Path, models: dict[str, Model], leaks: bool = False) -> None:
    """QEMU finds the bitmaps as they should be, and nothing wrong."""
    check(path, *([3] if leaks else []))
    # Of one that is not consistent, the disk has the mode of an earlier time.
    assert {name: (granularity, flags - {"auto"} if "in-use" in flags else flags)
            for name, (granularity, flags) in told(path).items()} == {
        name: (each.granularity, {"in-use"} if each.inconsistent else {"auto"} if each.enabled else set())
        for name, each in models.items()}
    usable = [name for name, each in models.items() if not each.inconsistent]
    for name in usable[:2]:
        assert dirty_by_qemu(path, name, models[name].granularity) == models[name].clusters


class Runner:
    """An image, open or not, and what its disk and its bitmaps should be."""

    def __init__(self, path: Path, data: bytearray, rnd: random.Random) -> None:
        self.path, self.data, self.rnd = path, data, rnd
        self.models: dict[str, Model] = {}
        self.graph = Graph()
        self.options = image_options(path, **{"l2-cache-size": 4096, "refcount-cache-size": 4096, "backing": None})

    async def open(self) -> None:
        self.graph = Graph()
        self.node = await self.graph.open(self.options)
        self.user = self.graph.attach_backend(self.node, "test", READ | WRITE | RESIZE)
        self.compare()

    async def close(self) -> None:
        await self.graph.detach_backend(self.user)
        await self.graph.close(self.node)

    def compare(self) -> None:
        stored = {name: each for name, each in self.node.bitmaps.items() if each.persistent}
        assert stored.keys() == self.models.keys()
        for name, model in self.models.items():
            bitmap = stored[name]
            assert (bitmap.inconsistent, bitmap.granularity) == (model.inconsistent, model.granularity)
            if not model.inconsistent:
                assert bitmap.enabled == model.enabled
                count = -(-self.node.length // model.granularity)
                assert {each for each in range(count) if bitmap.bits[each]} == model.clusters

    async def step(self, kind: str) -> None:
        rnd, names = self.rnd, list(self.models)
        usable = [name for name, each in self.models.items() if not each.inconsistent]
        if kind == "write":
            offset = rnd.randrange(len(self.data))
            length = min(rnd.choice((1, 512, 70_000)), len(self.data) - offset)
            if rnd.random() < 0.3:
                await self.user.write_zeroes(offset, length, MAY_UNMAP)
                self.data[offset:offset + length] = bytes(length)
            else:
                self.data[offset:offset + length] = data = rnd.randbytes(length)
                await self.user.pwrite(offset, data)
            for model in self.models.values():
                model.wrote(offset, length)
        elif kind == "add" and len(names) < 5:
            name, granularity, enabled = f"b{rnd.randrange(1000)}", rnd.choice((512, 4096, 65536)), rnd.random() < 0.8
            if name not in self.models:
                DirtyBitmap.prepare_add(self.node, name, granularity, enabled, persistent=True).commit()
                await self.node.keep_bitmaps()
                self.models[name] = Model(granularity, enabled)
        elif kind == "remove" and names:
            name = rnd.choice(names)
            self.node.bitmaps[name].prepare_remove().commit()
            await self.node.keep_bitmaps()
            del self.models[name]
        elif kind == "clear" and usable:
            name = rnd.choice(usable)
            self.node.bitmaps[name].prepare_clear().commit()
            self.models[name].clusters.clear()
        elif kind == "toggle" and usable:
            model = self.models[name := rnd.choice(usable)]
            model.enabled = not model.enabled
            self.node.bitmaps[name].prepare_enabled(model.enabled).commit()
        elif kind == "merge" and len(usable) > 1:
            target, other = rnd.sample(usable, 2)
            self.node.bitmaps[target].prepare_merge([self.node.bitmaps[other]]).commit()
            ours, theirs = self.models[target], self.models[other]
            for each in theirs.clusters:
                first = each * theirs.granularity
                last = min(first + theirs.granularity, len(self.data)) - 1
                ours.clusters.update(range(first // ours.granularity, last // ours.granularity + 1))
        elif kind == "flush":
            await self.user.flush()
        elif kind == "resize":
            length = rnd.choice((SIZE, SIZE // 2, SIZE + 300 * KiB)) & -512
            await self.user.truncate(length)
            self.data[:] = self.data[:length].ljust(length, b"\0")
            for model in self.models.values():
                model.fit(length)
        elif kind == "empty":
            await self.node.make_empty()
            self.data[:] = bytes(len(self.data))
        elif kind == "restart":
            await self.close()
            judge(self.path, self.models)
            await self.open()
        elif kind == "reopen":
            taken = self.user.edge.taken
            with self.graph.change() as change:
                change.take(self.user.edge, READ, self.user.edge.shared)
            await reopen(self.graph, [{**self.options, "read-only": True}])
            judge(self.path, self.models)
            await reopen(self.graph, [self.options])
            self.compare()
            with self.graph.change() as change:
                change.take(self.user.edge, taken, self.user.edge.shared)
        elif kind == "crash":
            await self.user.flush()
            image = self.path.read_bytes()
            await self.close()
            self.path.write_bytes(image)
            for model in self.models.values():
                model.inconsistent = True
            judge(self.path, self.models, leaks=True)
            run("qemu-img", "check", "-q", "-r", "leaks", str(self.path))
            await self.open()


_STEPS: Final = ("write", "write", "write", "write", "add", "add", "remove", "clear", "toggle", "merge", "flush",
                 "resize", "empty", "restart", "restart", "reopen", "crash")


@pytest.mark.parametrize("options", IMAGES)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), steps=st.lists(st.sampled_from(_STEPS), min_size=10, max_size=30))
def test_bitmaps_are_what_a_plain_model_says(
    options: str, tmp_path_factory: pytest.TempPathFactory, seed: int, steps: list[str]
) -> None:
    path = tmp_path_factory.mktemp("image") / "disk.qcow2"
    runner = Runner(path, made(path, options), random.Random(seed))

    async def go() -> None:
        await runner.open()
        for step in ["add", "write", *steps]:
            await runner.step(step)
            runner.compare()
        assert bytes(await runner.user.pread(0, len(runner.data))) == runner.data
        await runner.close()

    asyncio.run(go())
    judge(path, runner.models)
    assert content(path) == runner.data


def test_bitmaps_of_qemu_are_used_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1,cluster_size=4k")
    run("qemu-img", "bitmap", "--add", "-g", "512", str(path), "fine")
    run("qemu-img", "bitmap", "--add", "--disable", str(path), "off")
    run("qemu-io", "-f", "qcow2", "-c", "write 64k 1k", str(path))

    async def go() -> None:
        async with disk(image_options(path)) as user:
            assert told(path) == {"fine": (512, {"auto", "in-use"}), "off": (4096, {"in-use"})}
            await user.pwrite(MiB, b"x")
        async with disk(image_options(path, **{"read-only": True})) as user:
            assert list(user.node.bitmaps["fine"].dirty()) == [(64 * KiB, KiB), (MiB, 512)]
            with pytest.raises(OperationBlocked, match="read-only"):
                user.node.bitmaps["fine"].prepare_clear()
            with pytest.raises(OptionError, match="read-only"):
                DirtyBitmap.prepare_add(user.node, "new", persistent=True)

    asyncio.run(go())
    run("qemu-io", "-f", "qcow2", "-c", "write 128k 512", str(path))
    judge(path, {"fine": Model(512, True, clusters={128, 129, 256, 2048}), "off": Model(4096, False)})
    run("qemu-img", "bitmap", "--merge", "fine", str(path), "off")
    assert dirty_by_qemu(path, "off", 4096) == {16, 32, 256}


@pytest.mark.parametrize("options", ["compat=1.1", "compat=1.1,cluster_size=512"])
def test_the_first_bitmap_comes_and_the_last_goes_in_an_image_with_a_backing_file(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = made(path, options, base=random.Random(2).randbytes(SIZE))

    async def go(remove: bool) -> None:
        async with disk(image_options(path)) as user:
            if remove:
                user.node.bitmaps["new"].prepare_remove().commit()
            else:
                DirtyBitmap.prepare_add(user.node, "new", 4096, persistent=True).commit()
            await user.node.keep_bitmaps()
            await user.pwrite(0, b"x")

    model[0] = ord("x")
    for _ in range(3):
        asyncio.run(go(False))
        judge(path, {"new": Model(4096, True, clusters={0})})
        assert content(path) == model
        run("qemu-img", "rebase", "-u", "-b", "base", "-F", "raw", "-f", "qcow2", str(path))  # writes all of the header
        asyncio.run(go(True))
        judge(path, {})
        assert content(path) == model


@pytest.mark.parametrize("options", ["compat=1.1", "compat=1.1,cluster_size=512"])
def test_after_a_crash_at_any_write_no_bitmap_that_is_believed_misses_a_change(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(options)
    made(path, options)
    run("qemu-img", "bitmap", "--add", "-g", "4096", str(path), "all")
    before = path.read_bytes()

    async def go() -> None:
        path.with_name("log").write_bytes(b"")
        file = {"driver": "blklog", "node-name": "log", "file": {"driver": "file", "filename": str(path)},
                "log": {"driver": "file", "filename": str(path.with_name("log"))}}
        plain = {**image_options(path, backing=None), "file": "log"}
        graph = Graph()
        await graph.open(file)
        for turn in range(3):
            node = await graph.open(plain)
            user = graph.attach_backend(node, "test", READ | WRITE)
            for _ in range(4):
                await user.pwrite(rnd.randrange(SIZE - 9000), rnd.randbytes(9000))
                if rnd.random() < 0.3:
                    await user.flush()
            if turn == 1:
                await node.make_empty()
                await user.pwrite(rnd.randrange(SIZE - 9000), rnd.randbytes(9000))
            DirtyBitmap.prepare_add(node, f"new{turn}", persistent=True).commit()
            await node.keep_bitmaps()
            if turn:
                node.bitmaps[f"new{turn - 1}"].prepare_remove().commit()
                await node.keep_bitmaps()
            await graph.detach_backend(user)
            await reopen(graph, [{**plain, "read-only": True}])
            await reopen(graph, [plain])
            user = graph.attach_backend(node, "test", READ | WRITE)
            await user.pwrite(rnd.randrange(SIZE - 9000), rnd.randbytes(9000))
            await graph.detach_backend(user)
            await graph.close(node)
        await graph.close(graph.find("log"))

    asyncio.run(go())
    believed = 0
    crashed = tmp_path / "crashed.qcow2"
    for cut, image in cuts(path, before, rnd, 70, share=0.7):
        crashed.write_bytes(image)
        check(crashed, 3)
        flags = told(crashed).get("all", (0, {"in-use"}))[1]
        if "in-use" not in flags:
            believed += 1
            data = content(crashed)
            changed = {at // 4096 for at in range(0, len(data), 512) if data[at:at + 512].strip(b"\0")}
            assert changed <= dirty_by_qemu(crashed, "all", 4096), f"after {cut} entries"
    assert believed
