"""The overlay against a plain model of bytes, its limits, and its image after crashes at every point."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockstep.drivers  # noqa: F401
from blockstep.aio import pool
from blockstep.aio.inline import Completion
from blockstep.block.driver import FAST, FUA, Buffer
from blockstep.block.graph import Graph
from blockstep.block.node import NodeOptions
from blockstep.block.registry import register
from blockstep.drivers import overlay, overlay_image, overlay_saver
from blockstep.drivers.memory import Memory
from blockstep.drivers.overlay import Overlay
from blockstep.errors import OptionError

SIZE = 20_000  # not a whole number of clusters
CLUSTER = 512


class SlowOptions(NodeOptions, tag="test-slow-memory"):
    size: int


@register
class SlowMemory(Memory):
    """A backing node whose reads wait until the test lets them go."""

    driver = "test-slow-memory"
    Options = SlowOptions  # type: ignore[assignment]
    gate: Completion[None] | None = None

    async def pread(self, offset: int, length: int) -> Buffer:
        data = bytes(await super().pread(offset, length))
        if self.gate:
            await self.gate
        return data


async def opened(graph: Graph, base: bytes | None, **options: Any) -> Overlay:
    """An overlay with `base` below it (None: nothing)."""
    if base is not None:
        options["backing"] = {"driver": "memory", "size": len(base), "node-name": "base", "read-only": False}
    options.setdefault("cluster-size", CLUSTER)
    node = await graph.open({"driver": "overlay", **options})
    assert isinstance(node, Overlay)
    if base:
        await graph.find("base").pwrite(0, base)
    return node


def text(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3000)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))
operations = st.lists(st.one_of(
    st.tuples(st.sampled_from(["write", "zero", "discard", "read", "fua"]), ranges),
    st.tuples(st.sampled_from(["empty", "flush", "reopen"]), st.just((0, SIZE))),
), max_size=20)


@pytest.mark.parametrize("kind", ["memory", "spill", "file"])
@pytest.mark.parametrize("base_length", [SIZE, 7_777, None])
@settings(max_examples=40)
@given(trace=operations)
def test_it_reads_like_plain_bytes_over_plain_bytes(
        kind: str, base_length: int | None, trace: list[tuple[str, tuple[int, int]]],
        tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("overlay")
    extra: dict[str, Any] = {"size": SIZE}
    if kind == "spill":
        extra |= {"memory-limit": 4 * CLUSTER, "spill-dir": str(directory)}
    if kind == "file":
        extra |= {"filename": str(directory / "image"), "create": True}
    base = None if base_length is None else text(1, base_length)
    below = (base or b"").ljust(SIZE, b"\0")

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, base, **extra)
        model = bytearray(below)
        for number, (verb, (offset, length)) in enumerate(trace):
            if verb in ("write", "fua"):
                data = text(number, length)
                await node.pwrite(offset, data, FUA if verb == "fua" else 0)
                model[offset:offset + length] = data
            elif verb == "zero":
                await node.write_zeroes(offset, length)
                model[offset:offset + length] = bytes(length)
            elif verb == "discard":
                await node.discard(offset, length)
                for at in range(offset, offset + length):
                    cluster = at // CLUSTER * CLUSTER
                    if offset <= cluster and min(cluster + CLUSTER, SIZE) <= offset + length:
                        model[at] = 0
            elif verb == "empty":
                await node.make_empty()
                model[:] = below
                assert not node.holds(0, SIZE)
                assert node.used == 0
            elif verb == "flush":
                await node.flush()
            elif verb == "reopen" and kind == "file":
                await graph.close(node)
                node = await opened(graph, base, **extra)
            elif verb == "read":
                assert bytes(await node.pread(offset, length)) == model[offset:offset + length]
            assert bytes(await node.pread(0, SIZE)) == model
        await agrees_with_its_status(node, bytes(model), below)
        await graph.close(node)

    asyncio.run(scenario())


async def agrees_with_its_status(node: Overlay, content: bytes, below: bytes) -> None:
    extents = await node.block_status(0, SIZE)
    assert sum(extent.length for extent in extents) == SIZE
    at = data = 0
    for extent in extents:
        piece = content[at:at + extent.length]
        if not extent.allocated:
            assert piece == below[at:at + extent.length]
        if extent.zero:
            assert not any(piece)
        assert node.holds(at, extent.length) == extent.allocated
        place = node.raw_range(at, extent.length)
        if place is not None:
            assert extent.data
            assert os.pread(place[0], extent.length, place[1]) == piece
        at += extent.length
        data += extent.length if extent.data else 0
    assert data <= node.used <= data + CLUSTER


def test_a_write_to_a_cluster_that_is_being_completed_is_not_lost() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await graph.open({"driver": "overlay", "cluster-size": CLUSTER, "backing": {
            "driver": "test-slow-memory", "size": SIZE, "node-name": "base"}})
        base = graph.find("base")
        assert isinstance(base, SlowMemory)
        base.gate = Completion()
        part = asyncio.ensure_future(node.pwrite(100, b"part"))
        await asyncio.sleep(0)
        whole = asyncio.ensure_future(node.pwrite(0, b"W" * CLUSTER))
        await asyncio.sleep(0)
        assert not part.done()
        assert not whole.done()
        gate, base.gate = base.gate, None
        gate.set_result(None)
        await asyncio.gather(part, whole)
        assert bytes(await node.pread(0, CLUSTER)) == b"W" * CLUSTER
        await graph.close(node)

    asyncio.run(scenario())


def test_beyond_its_limit_it_is_full_until_it_is_emptied() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, None, size=SIZE, limit=2 * CLUSTER)
        await node.pwrite(0, bytes(2 * CLUSTER))
        with pytest.raises(OSError) as caught:
            await node.pwrite(5 * CLUSTER, b"x")
        assert caught.value.errno == errno.ENOSPC
        assert "limit" in str(caught.value)
        assert not node.holds(5 * CLUSTER, 1)
        await node.pwrite(3, b"where it is, it goes on")
        await node.write_zeroes(4 * CLUSTER, 8 * CLUSTER)  # zeroes take no space
        await node.discard(0, CLUSTER)
        await node.pwrite(5 * CLUSTER, b"x")
        await node.make_empty()
        await node.pwrite(5 * CLUSTER, bytes(2 * CLUSTER))
        await graph.close(node)

    asyncio.run(scenario())


def test_beyond_its_memory_it_is_full_without_a_place_to_spill() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, None, **{"size": SIZE, "memory-limit": 2 * CLUSTER})
        await node.pwrite(0, bytes(2 * CLUSTER))
        with pytest.raises(OSError) as caught:
            await node.pwrite(5 * CLUSTER, b"x")
        assert caught.value.errno == errno.ENOSPC
        assert "spill-dir" in str(caught.value)
        await graph.close(node)

    asyncio.run(scenario())


def test_a_spill_that_fails_leaves_things_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the spill directory is full")

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, None, **{"size": SIZE, "memory-limit": CLUSTER, "spill-dir": str(tmp_path)})
        await node.pwrite(0, b"m" * CLUSTER)
        with monkeypatch.context() as patch:
            patch.setattr("blockstep.drivers.overlay.write_whole", full)
            with pytest.raises(OSError, match="spill directory is full"):
                await node.pwrite(CLUSTER + 7, b"x")
        assert node.used == CLUSTER
        assert not node.holds(CLUSTER, 1)
        await node.discard(0, CLUSTER)  # room in memory again: the cluster goes there
        await node.pwrite(CLUSTER + 7, b"x")
        assert bytes(await node.pread(CLUSTER, 9)) == bytes(7) + b"x" + bytes(1)
        await graph.close(node)
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scenario())


def test_the_spill_file_has_no_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, None, **{"size": SIZE, "memory-limit": 0, "spill-dir": str(tmp_path)})
        await node.pwrite(1000, b"spilled")
        assert bytes(await node.pread(1000, 7)) == b"spilled"
        assert node.raw_range(1000, 7) is None
        assert list(tmp_path.iterdir()) == []
        await graph.close(node)

    asyncio.run(scenario())


def test_what_was_emptied_does_not_become_more_and_more_on_a_busy_machine(tmp_path: Path) -> None:
    """Where the thread that frees it, which has the lowest priority, gets nowhere."""
    def held(begin: str) -> int:
        return sum(name.startswith(begin) for name in files())

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, None, **{"size": SIZE, "memory-limit": CLUSTER, "spill-dir": str(tmp_path)})
        most = held("/memfd:blockstep") + 1  # what was emptied last
        for _ in range(3):
            await node.pwrite(0, bytes(2 * CLUSTER))
            assert held(str(tmp_path)) == 1
            while held("/memfd:blockstep") > most:  # noqa: ASYNC110 - another thread is at it
                await asyncio.sleep(0)
            prepared = await node.prepare_empty()
            prepared.commit()
        await graph.close(node)
        assert held(str(tmp_path)) == 0

    go_on = threading.Event()
    pool._releasing.submit(go_on.wait)
    try:
        asyncio.run(scenario())
    finally:
        go_on.set()


def files() -> list[str]:
    """What this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def test_prepared_and_aborted_it_holds_what_it_held() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, None, size=SIZE)
        await node.pwrite(0, b"kept")
        (await node.prepare_empty()).abort()
        assert bytes(await node.pread(0, 4)) == b"kept"
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_a_resize_adds_reads_as_zeroes_whatever_is_below(kind: str, tmp_path: Path) -> None:
    extra = {"filename": str(tmp_path / "image"), "create": True} if kind == "file" else {}

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, b"b" * SIZE, **extra)
        await node.pwrite(SIZE - 10, b"x" * 10)
        await node.truncate(10_000)
        assert bytes(await node.pread(0, 10_000)) == b"b" * 10_000
        await node.pwrite(9_990, b"y" * 10)
        await node.truncate(SIZE + 1000)
        assert bytes(await node.pread(9_980, SIZE + 1000 - 9_980)) == \
            b"b" * 10 + b"y" * 10 + bytes(SIZE + 1000 - 10_000)
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [SIZE + 70_000, 5000])
@pytest.mark.parametrize("step", ["save", "file"])
def test_a_resize_that_fails_leaves_the_image_as_it_was(
    step: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"

    def fail_once(place: Any, name: str) -> None:
        call = getattr(place, name)

        def fail(*args: Any) -> Any:
            monkeypatch.setattr(place, name, call)
            raise OSError(errno.ENOSPC, "injected")

        monkeypatch.setattr(place, name, fail)

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, b"b" * SIZE, filename=str(path), create=True)
        await node.pwrite(SIZE - 10, b"x" * 10)
        await node.write_zeroes(0, CLUSTER)
        before, size = bytes(await node.pread(0, SIZE)), path.stat().st_size
        fail_once(*{"save": (overlay_image.OverlayImage, "sync_new_state"), "file": (overlay, "set_length")}[step])
        with pytest.raises(OSError, match="injected") as caught:
            await node.truncate(length)
        assert not hasattr(caught.value, "__notes__")
        assert (node.length, path.stat().st_size) == (SIZE, size)
        assert bytes(await node.pread(0, SIZE)) == before
        await graph.close(node)
        node = await opened(graph, b"b" * SIZE, filename=str(path))
        assert bytes(await node.pread(0, SIZE)) == before
        await node.truncate(length)
        assert node.length == length
        await graph.close(node)

    asyncio.run(scenario())


def test_zeroes_in_a_growth_that_find_no_room_take_it_back() -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, b"b" * SIZE, size=10, limit=0)
        assert bytes(await node.pread(0, 10)) == b"b" * 10
        with pytest.raises(OSError, match="holds its limit"):
            await node.truncate(SIZE)
        assert (node.length, bytes(await node.pread(0, 10))) == (10, b"b" * 10)
        await graph.close(node)

    asyncio.run(scenario())


def test_zeroes_alone_on_a_page_of_the_map_outlive_a_resize(tmp_path: Path) -> None:
    pages = 3
    size = (pages * CLUSTER) << overlay_image.PAGE_SHIFT

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, b"b" * size, filename=str(tmp_path / "image"), create=True)
        await node.write_zeroes(size // 2, CLUSTER)
        await node.truncate(size + 1)
        await graph.close(node)
        node = await opened(graph, b"b" * size, filename=str(tmp_path / "image"))
        assert bytes(await node.pread(size // 2, 2 * CLUSTER)) == bytes(CLUSTER) + b"b" * CLUSTER
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize(("options", "named"), [
    ({"cluster-size": 1000, "size": 1}, "cluster-size"),
    ({"cluster-size": 256, "size": 1}, "cluster-size"),
    ({"size": -1}, "size"),
    ({}, "size"),
    ({"size": 1, "spill-dir": "/nowhere/at/all"}, "spill-dir"),
    ({"size": 1, "create": True}, "create"),
    ({"size": 1, "filename": "x", "memory-limit": 1}, "memory-limit"),
])
def test_a_wrong_option_is_named(options: dict[str, Any], named: str) -> None:
    async def scenario() -> None:
        with pytest.raises(OptionError) as caught:
            await Graph().open({"driver": "overlay", **options})
        assert caught.value.option == named

    asyncio.run(scenario())


# --- the image ---


async def image_of(path: Path, **options: Any) -> tuple[Graph, Overlay]:
    graph = Graph()
    return graph, await opened(graph, None, filename=str(path), **options)


def read_back(path: Path) -> bytes:
    """What an image holds that is opened after a crash."""
    async def scenario() -> bytes:
        graph, node = await image_of(path, **{"read-only": True})
        try:
            return bytes(await node.pread(0, node.length))
        finally:
            await graph.close(node)

    return asyncio.run(scenario())


def damaged(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes()[:64 << 10])
    change(content)
    with path.open("r+b") as file:
        file.write(content)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with three flushed generations; the last holds "third" at 0."""
    path = tmp_path / "image"

    async def scenario() -> None:
        graph, node = await image_of(path, create=True, size=SIZE)
        for word in (b"first", b"second", b"third"):
            await node.make_empty()
            await node.pwrite(0, word)
            await node.flush()
        await graph.close(node)

    asyncio.run(scenario())
    return path


def test_an_image_outlives_the_process(image: Path) -> None:
    assert read_back(image) == b"third".ljust(SIZE, b"\0")


@pytest.mark.parametrize(("at", "what"), [(0, "not an overlay image"), (8, "version"), (20, "header")])
def test_a_bad_image_says_what_is_wrong(image: Path, at: int, what: str) -> None:
    damaged(image, lambda content: content.__setitem__(at, content[at] ^ 0x55))
    with pytest.raises(OSError, match=what) as caught:
        read_back(image)
    assert caught.value.filename == str(image)


def test_of_two_states_the_valid_one_counts(image: Path) -> None:
    newest = 4096 + 4096 * (overlay_image.OverlayImage(
        str(image), writable=False, locking="off").generation & 1)
    damaged(image, lambda content: content.__setitem__(newest + 9, content[newest + 9] ^ 1))
    read_back(image)  # the older state: what it holds has been given back, but it is consistent
    damaged(image, lambda content: content.__setitem__(slice(4096, 12288), bytes(8192)))
    with pytest.raises(OSError, match="neither of its two states"):
        read_back(image)


def test_a_second_writer_is_kept_out(image: Path) -> None:
    async def scenario() -> None:
        graph, node = await image_of(image)
        with pytest.raises(OSError) as caught:
            await image_of(image)
        assert caught.value.errno == errno.EBUSY
        assert str(image) in str(caught.value)
        await graph.close(node)

    asyncio.run(scenario())


def test_a_read_only_image_can_become_writable_and_back(image: Path) -> None:
    async def scenario() -> None:
        graph, node = await image_of(image, **{"read-only": True})
        await graph.reopen([(node, {"read-only": False})])
        await node.pwrite(0, b"4th--")
        await graph.reopen([(node, {"read-only": True})])
        await graph.close(node)

    asyncio.run(scenario())
    assert read_back(image) == b"4th--".ljust(SIZE, b"\0")


def test_fast_zeroes_of_an_image_are_refused_where_they_would_be_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, None, filename=str(tmp_path / "image"), create=True, size=SIZE)
        await node.pwrite(0, b"x" * SIZE)
        monkeypatch.setattr("blockstep.drivers.overlay.punch_hole", lambda *_: False)
        with pytest.raises(OSError, match="fast zeroes") as caught:
            await node.write_zeroes(0, SIZE, FAST)
        assert caught.value.errno == errno.ENOTSUP
        assert bytes(await node.pread(0, SIZE)) == b"x" * SIZE
        await node.write_zeroes(0, SIZE)
        assert not any(await node.pread(0, SIZE))
        await graph.close(node)

    asyncio.run(scenario())


def test_zeroes_that_fail_in_a_long_cluster_show_nothing_of_before_the_last_emptying(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        graph = Graph()
        for place in (overlay, overlay_saver):  # what was there before stays there
            monkeypatch.setattr(place, "punch_hole", lambda *_: False)
        node = await opened(graph, None, filename=str(tmp_path / "image"), create=True, size=2 << 20,
                            **{"cluster-size": 2 << 20})
        await node.pwrite(0, b"x" * (2 << 20))
        await node.make_empty()

        write_runs, room = Overlay._write_runs, 1 << 20

        async def write_what_fits(self: Overlay, offset: int, data: Buffer) -> None:
            nonlocal room
            await write_runs(self, offset, memoryview(data)[:room])
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Overlay, "_write_runs", write_what_fits)
        with pytest.raises(OSError, match="No space"):
            await node.write_zeroes(0, 2 << 20)
        assert not any(await node.pread(0, 2 << 20))
        await graph.close(node)

    asyncio.run(scenario())
