"""The copy engine: what it copies, what it leaves out, and what it leaves behind when it fails."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.aio.copying import zero_runs
from blockstep.aio.rangelock import RangeLock
from blockstep.block.bitmap import Bitmap
from blockstep.block.driver import FAST, MAY_UNMAP, Buffer, Driver, not_supported
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.null import Null
from blockstep.jobs.block_copy import BlockCopy, Control, Pass, Side
from blockstep.units import GiB, KiB, MiB
from tests.disks import faulty, ram

PATTERN = random.Random(1).randbytes(1 << 20)


def engine(graph: Graph, source: Driver, target: Driver, control: Control | None = None,
           **options: object) -> BlockCopy:
    reader = graph.attach_backend(source, "reader", READ)
    writer = graph.attach_backend(target, "writer", READ | WRITE)
    return BlockCopy(reader.edge, writer.edge, (reader, writer), control, **options)  # type: ignore[arg-type]


def whole(node: Driver, granularity: int = 64 * KiB) -> Bitmap:
    bitmap = Bitmap(node.length, granularity)
    bitmap.set(0, node.length)
    return bitmap


async def read(node: Driver) -> bytes:
    return bytes(await node.pread(0, node.length))


@given(st.lists(st.sampled_from([b"\0" * 4096, b"\0" * 65536, b"x" * 3, b"\0" * 4095 + b"y", PATTERN[:70000]]),
                min_size=1, max_size=12))
def test_zero_runs_cover_the_data_and_tell_the_truth(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    at = 0
    for count, zero in zero_runs(data):
        assert zero is (not any(data[at:at + count]))
        at += count
    assert at == len(data)


@settings(max_examples=60)
@given(
    size=st.integers(1, 3 << 20), workers=st.integers(1, 4), granularity=st.sampled_from([512, 4096, 65536]),
    chunk=st.sampled_from([4096, 65536, 1 << 20]), seed=st.integers(0, 1 << 16), zero_target=st.booleans(),
)
def test_any_disk_arrives_as_it_is(size: int, workers: int, granularity: int, chunk: int, seed: int,
                                   zero_target: bool) -> None:
    async def main() -> None:
        dice = random.Random(seed)
        graph = Graph()
        source = await graph.open({"driver": "memory", "size": size})
        target = await graph.open({"driver": "memory", "size": size})
        for _ in range(dice.randrange(6)):
            offset = dice.randrange(size)
            await source.pwrite(offset, PATTERN[:min(size - offset, dice.randrange(1, 200000))])
        if not zero_target:
            await target.pwrite(0, (PATTERN * 3)[:size])
        copy = engine(graph, source, target, workers=workers, granularity=granularity, chunk=chunk,
                      written=Bitmap(size, granularity) if zero_target else None)
        todo = whole(source, granularity)
        await copy.copy(Pass(todo))
        assert await read(target) == await read(source)
        assert not todo.bits.any()
        assert copy.in_flight == 0
        assert copy.lock.idle

    asyncio.run(main())


def test_only_what_is_dirty_is_copied() -> None:
    async def main() -> None:
        graph = Graph()
        source = await ram(graph, "source", PATTERN[:1 << 18])
        target = await ram(graph, "target", 1 << 18)
        todo = Bitmap(source.length, 4096)
        todo.set(8192, 4096)
        todo.set(100000, 1)
        await engine(graph, source, target, granularity=4096).copy(Pass(todo))
        written = sorted(request[1:] for request in target.requests if request[0] == "write")
        assert written == [(8192, 4096), (98304, 4096)]

    asyncio.run(main())


def test_holes_are_not_read_and_a_zero_target_is_not_told() -> None:
    async def main() -> None:
        graph = Graph()
        source = await graph.open({"driver": "memory", "size": 256 * MiB})
        target = await ram(graph, "target", 256 * MiB)
        await source.pwrite(100 * MiB, b"x" * 65536)
        copy = engine(graph, source, target, written=Bitmap(source.length, 65536))
        await copy.copy(Pass(whole(source)))
        assert [what for what, *_ in target.requests] == ["write"]
        target.requests.clear()
        await source.write_zeroes(100 * MiB, 65536, 0)
        await copy.copy(Pass(whole(source)))
        assert not any(target.content[100 * MiB:100 * MiB + 65536])
        assert {what for what, *_ in target.requests} == {"zero"}

    asyncio.run(main())


async def long_hole(graph: Graph) -> Driver:
    """A source of 3 GiB that holds nothing."""
    return await graph.open({"driver": "memory", "node-name": "source", "size": 3 * GiB})


def test_a_long_hole_goes_in_long_requests_where_zeroes_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[int, int, int]] = []

    async def note(self: Null, offset: int, length: int, flags: int = 0) -> None:
        requests.append((offset, length, flags))

    async def main() -> None:
        graph = Graph()
        target = await graph.open({"driver": "null", "node-name": "target", "size": 3 * GiB})
        monkeypatch.setattr(Null, "write_zeroes", note)
        source = await long_hole(graph)
        await engine(graph, source, target).copy(Pass(whole(source)))
        assert sorted(requests) == [(at * GiB, GiB, FAST | MAY_UNMAP) for at in range(3)]

    asyncio.run(main())


def test_a_target_that_may_have_to_write_zeroes_is_not_asked_for_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[int, int]] = []
    refused: list[int] = []

    async def slow(self: Null, offset: int, length: int, flags: int = 0) -> None:
        if flags & FAST:
            refused.append(length)
            raise not_supported("fast zeroes")
        requests.append((offset, length))

    async def main() -> None:
        graph = Graph()
        target = await graph.open({"driver": "null", "node-name": "target", "size": 3 * GiB})
        monkeypatch.setattr(Null, "write_zeroes", slow)
        source = await long_hole(graph)
        await engine(graph, source, target, workers=1).copy(Pass(whole(source)))
        assert refused == [GiB]  # asked once
        assert requests == [(at, 64 * MiB) for at in range(0, 3 * GiB, 64 * MiB)]

    asyncio.run(main())


def test_what_is_written_into_a_long_hole_meanwhile_is_copied_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []
    throttled: list[int] = []

    class Slowly(Control):
        async def throttle(self, count: int) -> None:
            throttled.append(count)

    async def main() -> None:
        graph = Graph()
        source = await long_hole(graph)
        target = await graph.open({"driver": "null", "node-name": "target", "size": 3 * GiB})

        async def the_guest_writes(self: Null, offset: int, length: int, flags: int = 0) -> None:
            await source.pwrite(GiB + 100 * MiB, PATTERN * 3)

        async def note(self: Null, offset: int, data: Buffer, flags: int = 0) -> None:
            assert bytes(data) == PATTERN
            written.append((offset, len(data)))

        monkeypatch.setattr(Null, "write_zeroes", the_guest_writes)
        monkeypatch.setattr(Null, "pwrite", note)
        await engine(graph, source, target, Slowly(), workers=1).copy(Pass(whole(source)))
        assert written == [(GiB + at * MiB, MiB) for at in (100, 101, 102)]
        assert throttled == [MiB] * 1024

    asyncio.run(main())


def test_a_long_hole_in_which_zeroes_are_written_meanwhile_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [at * MiB for at in range(1, 41, 2)]
    zeroed: list[tuple[int, int]] = []

    async def note(self: Null, offset: int, length: int, flags: int = 0) -> None:
        zeroed.append((offset, length))

    async def read(self: Null, offset: int, data: Buffer, flags: int = 0) -> None:
        raise AssertionError("holes are not read")

    async def main() -> None:
        graph = Graph()
        base = await long_hole(graph)
        source = await graph.open({"driver": "overlay", "node-name": "top", "backing": "source"})
        target = await graph.open({"driver": "null", "node-name": "target", "size": 3 * GiB})

        class TheGuestIsFirst(RangeLock):
            async def take(self, start: int, end: int, shared: bool = False) -> int:
                for place in places:
                    await source.write_zeroes(place, MiB)
                return await super().take(start, end, shared)

        monkeypatch.setattr(Null, "write_zeroes", note)
        monkeypatch.setattr(Null, "pwrite", read)
        await engine(graph, source, target, workers=1, base=base, allocated_only=True, lock=TheGuestIsFirst()
                     ).copy(Pass(whole(source)))
        assert zeroed == [(place, MiB) for place in places]

    asyncio.run(main())


def test_zeroes_in_data_become_zeroes() -> None:
    async def main() -> None:
        graph = Graph()
        source = await ram(graph, "source", PATTERN[:65536] + bytes(131072) + PATTERN[:65536])
        target = await ram(graph, "target", b"\xff" * source.length)
        await engine(graph, source, target).copy(Pass(whole(source)))
        assert target.content == source.content
        assert ("zero", 65536, 131072) in target.requests

    asyncio.run(main())


def test_the_kernel_copies_between_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        graph = Graph()
        nodes = []
        for name, content in (("source", PATTERN), ("target", b"")):
            path = tmp_path / name
            path.write_bytes(content)
            with path.open("r+b") as file:
                file.truncate(len(PATTERN))
            nodes.append(await graph.open({"driver": "file", "filename": str(path)}))

        async def no_read(offset: int, length: int) -> bytes:
            raise AssertionError

        copy = engine(graph, *nodes)
        copy.source.pread = no_read  # type: ignore[method-assign]
        await copy.copy(Pass(whole(nodes[0])))
        assert (tmp_path / "target").read_bytes() == PATTERN

        def cannot(*args: int) -> int:
            raise OSError(errno.EXDEV, "no")

        monkeypatch.setattr("os.copy_file_range", cannot)
        copy = engine(graph, *nodes)
        (tmp_path / "target").write_bytes(bytes(len(PATTERN)))
        await copy.copy(Pass(whole(nodes[0])))
        assert (tmp_path / "target").read_bytes() == PATTERN
        for node in nodes:
            for edge in list(node.parents):
                await graph.detach_backend(edge.parent)  # type: ignore[arg-type]
            await graph.close(node)

    asyncio.run(main())


@pytest.mark.parametrize("by", ["os.copy_file_range", "blockstep.aio.copying.write_whole"])
def test_what_a_copy_wrote_before_it_failed_is_not_taken_for_zero(
        by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        graph = Graph()
        nodes = []
        for name, content in (("source", PATTERN), ("target", bytes(len(PATTERN)))):
            (tmp_path / name).write_bytes(content)
            nodes.append(await graph.open({"driver": "file", "filename": str(tmp_path / name)}))
        source, target = nodes

        def fails_half_way(*args: object) -> None:
            (tmp_path / "target").write_bytes(PATTERN)
            (tmp_path / "source").write_bytes(bytes(len(PATTERN)))  # the guest writes zeroes meanwhile
            raise OSError(errno.ENOSPC, "no room")

        monkeypatch.setattr(by, fails_half_way)
        copy = engine(graph, source, target, written=Bitmap(source.length, 65536), workers=1,
                      offload=by == "os.copy_file_range", in_threads=by != "os.copy_file_range")
        await copy.copy(Pass(whole(source)))
        assert not any(await read(target))
        for node in nodes:
            for edge in list(node.parents):
                await graph.detach_backend(edge.parent)  # type: ignore[arg-type]
            await graph.close(node)

    asyncio.run(main())


@pytest.mark.parametrize("side", ["read", "write"])
def test_a_failure_names_its_side_gives_the_range_back_and_leaves_nothing_in_flight(side: Side) -> None:
    class Watch(Control):
        sides: list[str]

        async def failed(self, side: Side, error: OSError) -> None:
            self.sides.append(side)
            raise error

    async def main() -> None:
        graph = Graph()
        source, _ = await faulty(graph, "source", PATTERN)
        target, _ = await faulty(graph, "target", len(PATTERN))
        bad = source if side == "read" else target
        bad.fail(side, errno.EIO, offset=4 * 65536)
        control = Watch()
        control.sides = []
        copy = engine(graph, source, target, control, chunk=65536, workers=3)
        todo = whole(source)
        with pytest.raises(OSError, match="injected"):
            await copy.copy(Pass(todo))
        assert control.sides == [side]
        assert todo.any(4 * 65536, 1)
        assert copy.in_flight == 0
        assert all(door.in_flight == 0 for door in copy.doors)
        assert copy.lock.idle
        bad.clear_rules()
        await copy.copy(Pass(todo))
        assert await read(target) == PATTERN

    asyncio.run(main())


def test_a_drain_waits_for_whole_chunks_and_nothing_moves_inside_it() -> None:
    async def main() -> None:
        graph = Graph()
        source, _ = await faulty(graph, "source", PATTERN)
        target, disk = await faulty(graph, "target", len(PATTERN))
        target.suspend("write", "held")
        copy = engine(graph, source, target, chunk=65536, workers=2)
        task = asyncio.create_task(copy.copy(Pass(whole(source))))
        await target.suspended("held")

        async def drain() -> None:
            async with graph.drained(source):
                done = bytes(disk.content)
                for _ in range(20):
                    await asyncio.sleep(0)
                assert done == disk.content
                assert copy.lock.idle

        draining = asyncio.create_task(drain())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not draining.done()
        target.resume("held")
        await draining
        await task
        assert disk.content == PATTERN

    asyncio.run(main())
