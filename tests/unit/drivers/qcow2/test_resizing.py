"""Growth over a backing node that grows as well, resizes that fail at any moment, and what they leave behind."""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import Buffer, Filter
from blockstep.block.graph import Graph
from blockstep.block.node import NodeOptions, NodeRef
from blockstep.block.permissions import READ, RESIZE, WRITE, Role
from blockstep.block.registry import register
from blockstep.block.reopen import reopen
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.qcow2.check import check
from blockstep.drivers.qcow2.format import AT_SIZE, parse_header
from blockstep.errors import told
from blockstep.images.resize import Preallocation, resize
from blockstep.units import KiB
from tests.disks import ram
from tests.scenarios import scenario

#: Not a whole number of clusters of any size.
BEFORE = 300 * KiB + 77


class FailingOptions(NodeOptions, tag="test-failing"):
    file: NodeRef


@register
class Failing(Filter):
    """A file of which one request fails, without effect: the one after ``good`` more; ``dead``: and all after it."""

    driver: ClassVar[str] = "test-failing"
    Options = FailingOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}
    good: int | None = None
    dead = False

    def _comes_by(self) -> None:
        if self.good is not None:
            self.good -= 1
            if self.good < 0:
                self.good = -1 if self.dead else None
                raise OSError(errno.ENOSPC, "injected")

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        self._comes_by()
        assert data
        assert offset + len(data) <= self.length
        await super().pwrite(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self._comes_by()
        await super().write_zeroes(offset, length, flags)

    async def truncate(self, length: int) -> None:
        self._comes_by()
        await super().truncate(length)

    async def flush(self) -> None:
        self._comes_by()
        await super().flush()


async def failing_file(graph: Graph, path: Path) -> Failing:
    """The file as a node named file."""
    await graph.open({"driver": "file", "node-name": "plain", "filename": str(path)})
    file = await graph.open({"driver": "test-failing", "node-name": "file", "file": "plain"})
    assert isinstance(file, Failing)
    return file


async def refusal(request: Awaitable[None]) -> OSError | None:
    try:
        await request
    except OSError as error:
        return error
    return None


def assert_whole(image: bytes) -> None:
    result = check(lambda offset, length: image[offset:offset + length], len(image))
    assert not result.corruptions, result


@pytest.mark.parametrize("raw", [False, True])
@scenario
async def test_a_growth_that_fails_at_any_moment_leaves_the_image_as_it_was(tmp_path: Path, raw: bool) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "data"
    beside = {"data_file": str(data), "data_file_raw": True} if raw else {}
    after, good, failed = 2500 * KiB, 0, True
    while failed:
        CreateQcow2(filename=str(path), size=BEFORE, cluster_size=512, **beside).create()  # type: ignore[arg-type]
        graph = Graph()
        await ram(graph, "below", b"\x07" * 2 * BEFORE)
        file = await failing_file(graph, path)
        node = await graph.open({"driver": "qcow2", "file": "file", "backing": None if raw else "below"})
        user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
        await user.pwrite(BEFORE - 5, b"here!")
        await user.flush()
        before = bytes(await user.pread(0, BEFORE))
        file.good = good
        error = await refusal(user.truncate(after))
        failed, file.good = error is not None or file.good is None, None
        if error is not None:
            assert told(error) == "injected"
            assert user.length == BEFORE
            assert bytes(await user.pread(0, BEFORE)) == before
            if raw:
                assert data.stat().st_size == BEFORE
            await user.truncate(BEFORE + 1)
            assert bytes(await user.pread(0, BEFORE + 1)) == before + b"\0"
        await graph.detach_backend(user)
        for name in (node.name, "file", "plain"):
            await graph.close(graph.find(name))
        assert_whole(path.read_bytes())
        good += 1
    assert good > 10


@pytest.mark.parametrize("options", [
    {"cluster_size": 512}, {"version": "v2"}, {"extended_l2": True, "cluster_size": 16 * KiB}], ids=str)
@scenario
async def test_a_disk_whose_growth_is_cut_off_anywhere_has_zeroes_where_it_is_longer(
        tmp_path: Path, options: dict[str, Any]) -> None:
    path, after, good, failed = tmp_path / "disk.qcow2", 2 * BEFORE, 0, True
    lengths = set()
    while failed:
        CreateQcow2(filename=str(path), size=BEFORE, **options).create()
        graph = Graph()
        await ram(graph, "below", b"\x07" * 2 * BEFORE)
        file = await failing_file(graph, path)
        node = await graph.open({"driver": "qcow2", "file": "file", "backing": "below"})
        user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
        await user.pwrite(BEFORE - 500, b"\x08" * 500)
        await user.truncate(BEFORE - 100)  # and what was there is left in the cluster
        file.good, file.dead = good, True
        failed = await refusal(user.truncate(after)) is not None
        good += 1
        await graph.open({"driver": "qcow2", "node-name": "again", "backing": "below", "read-only": True,
                          "file": {"driver": "file", "filename": str(path)}})
        again = graph.find("again")
        lengths.add(again.length)
        expected = b"\x07" * (BEFORE - 500) + b"\x08" * 400
        assert bytes(await again.pread(0, again.length)) == expected.ljust(again.length, b"\0")
        assert_whole(path.read_bytes())
        file.good = None
        await graph.detach_backend(user)
        for name in ("again", node.name, "file", "plain"):
            await graph.close(graph.find(name))
    assert lengths == {BEFORE - 100, after}


@scenario
async def test_what_is_written_after_a_storage_was_away_in_a_growth_is_there_later(tmp_path: Path) -> None:
    path, after, good, failed = tmp_path / "disk.qcow2", 2500 * KiB, 0, True
    while failed:
        CreateQcow2(filename=str(path), size=BEFORE, cluster_size=512).create()
        graph = Graph()
        file = await failing_file(graph, path)
        node = await graph.open({"driver": "qcow2", "file": "file"})
        user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
        file.good, file.dead = good, True
        failed = await refusal(user.truncate(after)) is not None
        file.good = None
        await user.pwrite(0, b"\x07" * BEFORE)
        await user.flush()
        await graph.open({"driver": "qcow2", "node-name": "again", "read-only": True,
                          "file": {"driver": "file", "filename": str(path)}})
        again = graph.find("again")
        assert again.length == user.length
        assert bytes(await again.pread(0, BEFORE)) == b"\x07" * BEFORE
        await graph.detach_backend(user)
        for name in ("again", node.name, "file", "plain"):
            await graph.close(graph.find(name))
        assert_whole(path.read_bytes())
        good += 1


@pytest.mark.parametrize("empties", [False, True])
@scenario
async def test_a_bitmap_that_could_not_be_added_is_not_written_where_others_are_by_now(
        tmp_path: Path, empties: bool) -> None:
    path, good, failed = tmp_path / "disk.qcow2", 0, True
    while failed:
        CreateQcow2(filename=str(path), size=BEFORE, cluster_size=1024).create()
        graph = Graph()
        file = await failing_file(graph, path)
        disk = {"driver": "qcow2", "node-name": "disk", "file": "file", "read-only": False}
        node = await graph.open(disk)
        added = DirtyBitmap.prepare_add(node, "new", persistent=True)
        file.good = good
        failed = await refusal(node.keep_bitmaps()) is not None
        file.good = None
        if failed:
            added.abort()
        for _ in range(3):
            if empties:
                await node.make_empty()
            await node.pwrite(0, b"\x07" * BEFORE)
            await node.flush()
        await reopen(graph, [{**disk, "read-only": True}])
        await reopen(graph, [disk])
        assert bytes(await node.pread(0, BEFORE)) == b"\x07" * BEFORE
        assert list(node.bitmaps) == ([] if failed else ["new"])
        await graph.close(node)
        assert_whole(path.read_bytes())
        for name in ("file", "plain"):
            await graph.close(graph.find(name))
        good += 1
    assert good > 3


@scenario
async def test_a_shrinking_that_fails_at_any_moment_leaves_one_of_the_two_lengths_and_the_header_says_which(
        tmp_path: Path) -> None:
    path, after, good, failed = tmp_path / "disk.qcow2", 60 * KiB + 5, 0, True
    lengths = set()
    while failed:
        CreateQcow2(filename=str(path), size=BEFORE, cluster_size=512).create()
        graph = Graph()
        file = await failing_file(graph, path)
        node = await graph.open({"driver": "qcow2", "file": "file"})
        user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
        await user.pwrite(0, b"\x07" * BEFORE)
        await user.flush()
        file.good = good
        error = await refusal(user.truncate(after))
        failed, file.good = error is not None, None
        length = user.length
        assert length == after or (failed and length == BEFORE)
        lengths.add(length)
        assert bytes(await user.pread(0, length)) == b"\x07" * length
        await user.flush()
        assert parse_header(path.read_bytes()[:512]).size == length
        await user.truncate(after)
        await user.truncate(BEFORE)
        assert bytes(await user.pread(0, BEFORE)) == b"\x07" * after + bytes(BEFORE - after)
        await graph.detach_backend(user)
        for name in (node.name, "file", "plain"):
            await graph.close(graph.find(name))
        assert_whole(path.read_bytes())
        good += 1
    assert lengths == {BEFORE, after}


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"data_file": "data"}, {"version": "v2"}], ids=str)
@scenario
async def test_a_disk_that_grows_does_not_show_again_what_a_shrinking_was_cut_short_over(
        tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "disk.qcow2"
    CreateQcow2(filename=str(path), size=BEFORE, cluster_size=16 * KiB, **options).create()
    graph = Graph()
    disk = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    node = await graph.open(disk)
    await node.pwrite(0, b"\x07" * BEFORE)
    await node.write_zeroes(200 * KiB, 64 * KiB)
    await graph.close(node)
    after = 100 * KiB
    with path.open("r+b") as file:  # as a crash leaves it: the new length is durable, and nothing else is
        file.seek(AT_SIZE)
        file.write(after.to_bytes(8, "big"))
    node = await graph.open(disk)
    user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
    await user.truncate(400 * KiB)
    assert bytes(await user.pread(0, 400 * KiB)) == b"\x07" * after + bytes(300 * KiB)
    assert all(extent.zero for extent in await user.block_status(112 * KiB, 288 * KiB))
    await graph.detach_backend(user)
    await graph.close(node)
    assert_whole(path.read_bytes())


@scenario
async def test_subclusters_behind_the_end_of_a_data_file_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    CreateQcow2(filename=str(path), size=64 * KiB, cluster_size=16 * KiB, extended_l2=True, data_file="data").create()
    graph = Graph()
    data = await graph.open({"driver": "test-failing", "file": {"driver": "file", "filename": str(tmp_path / "data")}})
    node = await graph.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)},
                             "data-file": data.name})
    user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
    await user.pwrite(62 * KiB, b"\x07" * 2 * KiB)
    await user.truncate(60 * KiB)
    await user.pwrite(40 * KiB, b"\x08" * 20 * KiB)
    assert bytes(await user.pread(0, 60 * KiB)) == bytes(40 * KiB) + b"\x08" * 20 * KiB
    await graph.detach_backend(user)
    for each in (node, data):
        await graph.close(each)


@pytest.mark.parametrize("options", [{"cluster_size": 512}, {"extended_l2": True}, {"data_file": "data"}], ids=str)
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@scenario
async def test_an_image_that_does_not_get_its_places_has_its_old_length(
        tmp_path: Path, mode: Preallocation, options: dict[str, Any]) -> None:
    path, good, failed = tmp_path / "disk.qcow2", 0, True
    before, after = 100 * KiB, 600 * KiB
    while failed:
        CreateQcow2(filename=str(path), size=before, **options).create()
        graph = Graph()
        file = await failing_file(graph, path)
        node = await graph.open({"driver": "qcow2", "file": "file"})
        user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
        await user.pwrite(0, b"\x07" * before)
        await user.flush()
        file.good = good
        error = await refusal(resize(user, after, preallocation=mode))
        failed, file.good = error is not None, None
        assert user.length == (before if failed else after)
        assert bytes(await user.pread(0, user.length)) == (b"\x07" * before).ljust(user.length, b"\0")
        assert failed or all(extent.allocated for extent in await user.block_status(0, after))
        await graph.detach_backend(user)
        for name in (node.name, "file", "plain"):
            await graph.close(graph.find(name))
        assert_whole(path.read_bytes())
        good += 7
    assert good > 7


@pytest.mark.parametrize("version", ["v2", "v3"])
@scenario
async def test_what_a_disk_gained_hides_what_its_backing_node_gains_later_until_it_is_emptied(
        tmp_path: Path, version: str) -> None:
    path = tmp_path / "disk.qcow2"
    CreateQcow2(filename=str(path), size=BEFORE, version=version).create()  # type: ignore[arg-type]
    graph = Graph()
    below = await ram(graph, "below", b"\x07" * BEFORE)
    node = await graph.open({"driver": "qcow2", "backing": "below", "file": {"driver": "file", "filename": str(path)}})
    user = graph.attach_backend(node, "user", READ | WRITE | RESIZE)
    after = 4 * BEFORE
    await user.truncate(after)
    await below.truncate(after)
    below.content[BEFORE:] = b"\x08" * (after - BEFORE)
    assert bytes(await user.pread(0, after)) == b"\x07" * BEFORE + bytes(after - BEFORE)
    extents = await user.block_status(0, after)
    assert sum(extent.length for extent in extents if extent.depth == 2) == BEFORE
    assert all(extent.zero for extent in extents if extent.depth == 1)

    await user.pwrite(2 * BEFORE, b"here")  # the rest of its cluster is what was to be seen
    await user.write_zeroes(BEFORE - 10, 20)
    await user.discard(3 * BEFORE, BEFORE)
    expected = bytearray(b"\x07" * BEFORE + bytes(after - BEFORE))
    expected[2 * BEFORE:2 * BEFORE + 4] = b"here"
    expected[BEFORE - 10:BEFORE] = bytes(10)
    assert bytes(await user.pread(0, after)) == expected

    await node.make_empty()
    assert bytes(await user.pread(0, after)) == bytes(below.content)
    await graph.detach_backend(user)
    await graph.close(node)
