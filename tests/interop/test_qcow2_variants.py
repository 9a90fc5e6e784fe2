"""Extended L2 entries and external data files: images made by us, the data file's rules, crashes."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstep.block.driver import MAY_UNMAP, Buffer, Filter
from blockstep.block.graph import Graph
from blockstep.block.node import NodeOptions, NodeRef
from blockstep.block.permissions import READ, RESIZE, WRITE, Role
from blockstep.block.registry import register
from blockstep.block.reopen import reopen
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.format import COPIED
from blockstep.errors import OptionError
from blockstep.units import KiB, MiB
from tests.interop.test_qcow2_driver import SIZE, check, content, disk, image_options, made, some_requests
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import Damage

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io")

#: Options of `CreateQcow2`.
CREATIONS = [
    {"extended_l2": extended, "cluster_size": cluster_size, "preallocation": preallocation, **data}
    for extended in (False, True) for cluster_size in (16384, 65536) for preallocation in ("off", "metadata")
    for data in ({}, {"data_file": "disk.data"}, {"data_file": "disk.data", "data_file_raw": True})
    if extended or data
]


def named(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def create(path: Path, options: dict[str, Any]) -> None:
    if "data_file" in options:  # qemu-img begins a relative name at its own directory
        options = {**options, "data_file": str(path.with_name(options["data_file"]))}
    CreateQcow2(filename=str(path), size=SIZE, **options).create()


@pytest.mark.parametrize("options", CREATIONS, ids=named)
def test_what_we_make_is_an_image_for_qemu(options: dict[str, Any], tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(1)
    create(path, options)
    model = bytearray(SIZE)
    check(path)
    assert content(path) == model
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 5k 7k", "-c", "write -z 700k 30k", "-c", "discard 64k 8k",
        str(path))
    model[5 * KiB:12 * KiB] = b"\x09" * (7 * KiB)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            await some_requests(user, model, rnd, 25)
            assert bytes(await user.pread(0, SIZE)) == model

    asyncio.run(go())
    check(path)
    assert content(path) == model


@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
@pytest.mark.parametrize("options", [each for each in CREATIONS if each["preallocation"] == "off"], ids=named)
def test_block_status_tells_what_qemu_tells(
    options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    path, rnd = tmp_path_factory.mktemp("image") / "disk.qcow2", random.Random(seed)
    create(path, options)
    found: list[tuple[int, int, bool]] = []

    async def go() -> None:
        async with disk(image_options(path)) as user:
            await some_requests(user, bytearray(SIZE), rnd, 12)
            await user.flush()
            offset = 0
            while offset < SIZE:
                for extent in await user.block_status(offset, SIZE - offset):
                    found.append((offset, extent.length, extent.allocated and not extent.zero))
                    offset += extent.length

    asyncio.run(go())
    ours = bytearray(SIZE // 512)
    for offset, length, data in found:
        for sector in range(offset // 512, (offset + length) // 512):
            ours[sector] = data
    theirs = bytearray(SIZE // 512)
    for each in json.loads(run("qemu-img", "map", "-f", "qcow2", "--output=json", str(path)).stdout):
        for sector in range(each["start"] // 512, (each["start"] + each["length"]) // 512):
            theirs[sector] = each["present"] and not each["zero"]
    if "data_file" in options:  # qemu-img does not always look for the holes of a data file
        assert all(one <= other for one, other in zip(ours, theirs, strict=True))
    else:
        assert ours == theirs


def test_subclusters_are_allocated_and_zeroed_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "extended_l2=on", base=b"\x07" * SIZE)

    async def go() -> list[tuple[int, bool, bool]]:
        async with disk(image_options(path)) as user:
            await user.pwrite(8 * KiB, b"\x01" * (4 * KiB))
            await user.pwrite(20 * KiB + 512, b"\x02" * 512)
            await user.write_zeroes(9 * KiB, 3 * KiB, MAY_UNMAP)
            await user.discard(30 * KiB, 4 * KiB)
            return [(extent.length // KiB, extent.allocated and extent.depth == 1, extent.zero)
                    for extent in await user.block_status(0, 40 * KiB)]

    # The subclusters have 2 KiB. Half of the second one that was written, and what was written into 2 KiB, are data.
    assert asyncio.run(go()) == [(8, False, False), (2, True, False), (2, True, True), (8, False, False),
                                 (2, True, False), (8, False, False), (4, True, True), (6, False, False)]
    check(path)
    found = content(path)
    assert found[:8 * KiB] == b"\x07" * (8 * KiB)
    assert found[20 * KiB:22 * KiB] == b"\x07" * 512 + b"\x02" * 512 + b"\x07" * KiB


def test_a_cluster_of_subclusters_that_all_became_zero_gives_its_place_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "extended_l2=on")

    async def go() -> None:
        async with disk(image_options(path)) as user:
            await user.pwrite(0, b"\x01" * (64 * KiB))
            await user.flush()
            for offset in range(0, 64 * KiB, 8 * KiB):
                await user.discard(offset, 8 * KiB)
            await user.flush()
            await user.pwrite(64 * KiB, b"\x02" * (64 * KiB))

    asyncio.run(go())
    check(path)
    assert json.loads(run("qemu-img", "check", "--output=json", str(path)).stdout)["allocated-clusters"] == 1


# --- external data files ---


def refused(path: Path, said: str, error: type[Exception] = OptionError, **options: Any) -> None:
    async def go() -> None:
        graph = Graph()
        with pytest.raises(error, match=said):
            await graph.open(image_options(path, **options))
        assert not graph.nodes

    asyncio.run(go())


def test_a_data_file_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    made(path, "data_file=DATA")
    os.truncate(data, SIZE - 1)
    refused(path, f"a file of {SIZE} bytes or more")
    data.unlink()
    refused(path, "disk.data", OSError)
    data.symlink_to(path)
    refused(path, "another file than the image")
    refused(path, "another file than the image", **{"read-only": True, "data-file": {
        "driver": "file", "filename": str(path)}})
    plain = tmp_path / "plain.qcow2"
    made(plain, "compat=1.1")
    refused(plain, "no external data file", **{"data-file": {"driver": "file", "filename": str(plain)},
                                               "read-only": True})


def test_a_raw_data_file_over_a_backing_node_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "data_file=DATA,data_file_raw=on")
    refused(path, "backing", backing={"driver": "null-co", "size": SIZE, "read-zeroes": True})


def test_data_elsewhere_than_the_disk_has_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "data_file=DATA,data_file_raw=on")
    image = Damage(path)
    image.put(image.l2, 64 * KiB | COPIED)
    image.save()

    async def go() -> None:
        async with disk(image_options(path)) as user:
            for request in (user.pread(0, 512), user.pwrite(100, b"x"), user.pwrite(MiB, b"x")):
                with pytest.raises(OSError, match="lies where the disk has it"):
                    await request

    asyncio.run(go())


@pytest.mark.parametrize("options", ["", ",extended_l2=on"])
def test_what_the_entries_of_a_raw_data_file_leave_out_is_in_the_file(options: str, tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    made(path, f"data_file=DATA,data_file_raw=on{options}")
    data.write_bytes(b"\x05" * SIZE)
    image = Damage(path)
    image.put(image.l1, 0)
    image.save()

    async def go() -> None:
        async with disk(image_options(path)) as user:
            assert bytes(await user.pread(0, SIZE)) == data.read_bytes()
            await user.pwrite(100, b"word")
            assert bytes(await user.pread(0, SIZE)) == data.read_bytes()

    asyncio.run(go())
    assert data.read_bytes()[99:105] == b"\x05word\x05"


def test_the_data_file_can_be_named_by_the_options(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "data_file=DATA,data_file_raw=on")
    other = tmp_path / "elsewhere"
    other.write_bytes(b"\x05" * SIZE)

    async def go() -> None:
        data = {"driver": "file", "filename": str(other)}
        async with disk(image_options(path, **{"data-file": data})) as user:
            assert bytes(await user.pread(1000, 1000)) == b"\x05" * 1000
            await user.write_zeroes(100, 5000)
            await user.pwrite(200, b"word")

    asyncio.run(go())
    assert other.read_bytes()[99:300] == b"\x05" + bytes(100) + b"word" + bytes(96)
    assert (tmp_path / "disk.data").read_bytes() == bytes(SIZE)


def test_an_image_with_a_data_file_is_made_writable_and_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "data_file=DATA")

    async def go() -> None:
        graph = Graph()
        options = {"driver": "qcow2", "node-name": "disk", "read-only": True, "file": {
            "driver": "file", "node-name": "file", "filename": str(path)}}
        node = await graph.open(options)
        for read_only in (False, True):
            await reopen(graph, [{**options, "read-only": read_only}])
            user = graph.attach_backend(node, "test", READ if read_only else READ | WRITE)
            if not read_only:
                await user.pwrite(0, b"written")
            assert bytes(await user.pread(0, 7)) == b"written"
            await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    check(path)
    assert content(path)[:7] == b"written"


def test_a_data_file_is_a_child_as_in_qemu_and_none_can_be_added(tmp_path: Path) -> None:
    path, plain = tmp_path / "disk.qcow2", tmp_path / "plain.qcow2"
    made(path, "data_file=DATA")
    made(plain, "compat=1.1")

    async def go() -> None:
        graph = Graph()
        node = await graph.open(image_options(path))
        assert list(node.children) == ["file", "data-file"]
        options = {"driver": "qcow2", "node-name": "plain", "file": {
            "driver": "file", "node-name": "file", "filename": str(plain)}}
        other = await graph.open(options)
        with pytest.raises(OptionError, match=r"data-file.*has none"):
            await reopen(graph, [{**options, "data-file": node.children["data-file"].node.name}])
        for each in (other, node):
            await graph.close(each)

    asyncio.run(go())


def test_a_raw_data_file_is_the_disk_at_any_moment(tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(8)
    model = made(path, "data_file=DATA,data_file_raw=on,extended_l2=on")

    async def go() -> None:
        async with disk(image_options(path, discard="unmap")) as user:
            for _ in range(40):
                await some_requests(user, model, rnd, 1)
                assert (tmp_path / "disk.data").read_bytes() == model
            with pytest.raises(OSError, match="raw external data file"):
                await user.node.make_empty()

    asyncio.run(go())
    check(path)


def test_a_discard_reaches_the_data_file(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    made(path, "data_file=DATA")

    async def go(discard: str) -> int:
        async with disk(image_options(path, discard=discard)) as user:
            await user.pwrite(0, b"\x01" * SIZE)
            await user.flush()
            await user.discard(0, SIZE)
        return data.stat().st_blocks

    assert asyncio.run(go("ignore")) > 0
    assert asyncio.run(go("unmap")) == 0


# --- crashes ---

#: What happened to the files, in order: (name, offset, data), (name, length), (name,) for a flush.
Event = tuple[Any, ...]
EVENTS: dict[str, list[Event]] = {}


class RecorderOptions(NodeOptions, tag="test-two-files"):
    file: NodeRef
    log: str
    name: str


@register
class Recorder(Filter):
    """Writes down, in a list that several files share, what happens to a file."""

    driver: ClassVar[str] = "test-two-files"
    Options = RecorderOptions
    options: RecorderOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        EVENTS[self.options.log].append((self.options.name, offset, bytes(data)))
        await self.file.pwrite(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        EVENTS[self.options.log].append((self.options.name, offset, bytes(length)))
        await self.file.write_zeroes(offset, length, flags)

    async def truncate(self, length: int) -> None:
        EVENTS[self.options.log].append((self.options.name, length))
        await self.file.resize(length)

    async def flush(self) -> None:
        await self.file.flush()
        EVENTS[self.options.log].append((self.options.name,))


def crashed_files(before: dict[str, bytes], events: list[Event], rnd: random.Random | None) -> dict[str, bytearray]:
    """The files after these events; with ``rnd``, those since each file's last flush happened or not."""
    files = {name: bytearray(data) for name, data in before.items()}
    safe = {name: max((at for at, event in enumerate(events) if event == (name,)), default=-1) for name in files}
    for at, event in enumerate(events):
        file = files[event[0]]
        if len(event) == 1 or (rnd is not None and at > safe[event[0]] and rnd.random() < 0.5):
            continue
        if len(event) == 2:
            file[:] = file[:event[1]].ljust(event[1], b"\0")
        else:
            file.extend(bytes(max(0, event[1] + len(event[2]) - len(file))))
            file[event[1]:event[1] + len(event[2])] = event[2]
    return files


@pytest.mark.parametrize("options", [
    "compat=1.1", "extended_l2=on", "extended_l2=on,cluster_size=16k", "data_file=DATA",
    "data_file=DATA,extended_l2=on,cluster_size=16k", "data_file=DATA,data_file_raw=on",
    "data_file=DATA,data_file_raw=on,extended_l2=on"])
@pytest.mark.parametrize("seed", range(2))
def test_a_power_cut_leaves_leaks_at_worst_and_what_was_flushed(options: str, seed: int, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(f"{options}{seed}")
    raw = "raw=on" in options
    base = None if raw else rnd.randbytes(SIZE // 2)
    model = made(path, options, base=base)
    names = {"image": path, "data": path.with_suffix(".data")} if "DATA" in options else {"image": path}
    before = {name: file.read_bytes() for name, file in names.items()}
    events = EVENTS[options] = []
    flushed: list[tuple[int, bytes]] = [(0, bytes(model))]

    def recorded(name: str) -> dict[str, Any]:
        return {"driver": "test-two-files", "log": options, "name": name,
                "file": {"driver": "file", "filename": str(names[name])}}

    async def go() -> None:
        graph = Graph()
        node = await graph.open({
            "driver": "qcow2", "l2-cache-size": 4096, "refcount-cache-size": 4096, "file": recorded("image"),
            **({"data-file": recorded("data")} if "data" in names else {})})
        user = graph.attach_backend(node, "test", READ | WRITE | RESIZE)
        for step in range(8):
            await some_requests(user, model, rnd, 5)
            if step % 4 == 3 and not raw:
                await user.node.make_empty()
                model[:] = (base or b"")[:len(model)].ljust(len(model), b"\0")
                await some_requests(user, model, rnd, 3)
            if step in (2, 5):
                await user.truncate(length := SIZE - 300 * KiB if step == 2 else SIZE + 128 * KiB)
                flushed.append((len(events), bytes(model[:length]).ljust(length, b"\0")))
                model[:] = flushed[-1][1]
            await user.flush()
            flushed.append((len(events), bytes(model)))
        for name in names:
            recorder = node.children["file" if name == "image" else "data-file"].node
            await recorder.children["file"].node.close()

    asyncio.run(go())
    after = tmp_path / "crashed.qcow2"
    ends = dict(flushed)
    for count in sorted({*ends, *rnd.sample(range(len(events)), min(25, len(events)))}):
        files = crashed_files(before, events[:count], None if count in ends else rnd)
        for name, data in files.items():
            (after if name == "image" else names[name]).write_bytes(data)
        check(after, 3)
        if count in ends:
            assert content_of(after, names) == ends[count], f"after {count} events"
        if raw:
            found = content_of(after, names)  # the file may have grown before the disk, or be cut after it
            assert found == files["data"][:len(found)], f"after {count} events"


def content_of(path: Path, names: dict[str, Path]) -> bytes:
    """What a copy of the image reads as; its data file has the name that it had."""
    plain = path.with_suffix(".plain")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(plain))
    return plain.read_bytes()
