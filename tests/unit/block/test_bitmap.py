"""Bitmaps agree with sets of clusters, whatever is done to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockstep.drivers  # noqa: F401
from blockstep.block.bitmap import LONGEST_NAME, Bitmap, CountedBitmap, DirtyBitmap, find_bitmap
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.block.resize import resize
from blockstep.errors import OperationBlocked, OptionError
from blockstep.units import KiB, TiB
from tests.disks import Ram, ram

CLUSTER = 512


class Model:
    """A bitmap as a set of cluster numbers."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.clusters: set[int] = set()

    def touched(self, offset: int, length: int) -> set[int]:
        return set(range(offset // CLUSTER, -(-(offset + length) // CLUSTER)))

    def inside(self, offset: int, length: int) -> set[int]:
        end = offset + length
        last = -(-self.length // CLUSTER) if end >= self.length else end // CLUSTER
        return set(range(-(-offset // CLUSTER), last))

    def bytes_of(self, clusters: Iterable[int]) -> int:
        return sum(min((cluster + 1) * CLUSTER, self.length) - cluster * CLUSTER for cluster in clusters)


def members(bitmap: Bitmap) -> set[int]:
    found: set[int] = set()
    for offset, length in bitmap.dirty():
        found |= set(range(offset // CLUSTER, -(-(offset + length) // CLUSTER)))
    return found


ranges = st.tuples(st.integers(0, 9_999), st.integers(1, 10_000))
steps = st.lists(st.tuples(st.sampled_from(("set", "set", "set", "reset", "clear", "resize")), ranges), max_size=20)


@given(st.integers(1, 10_000), steps)
def test_a_bitmap_is_a_set_of_clusters(length: int, steps: list[tuple[str, tuple[int, int]]]) -> None:
    bitmap, model = Bitmap(length, CLUSTER), Model(length)
    for kind, (offset, size) in steps:
        offset %= model.length
        size = min(size, model.length - offset)
        if kind == "set":
            bitmap.set(offset, size)
            model.clusters |= model.touched(offset, size)
        elif kind == "reset":
            bitmap.reset(offset, size)
            model.clusters -= model.inside(offset, size)
        elif kind == "clear":
            bitmap.clear()
            model.clusters.clear()
        else:
            bitmap.resize(size)
            model.length = size
            model.clusters &= set(range(-(-size // CLUSTER)))
        assert members(bitmap) == model.clusters
        assert bitmap.count() == model.bytes_of(model.clusters)
        assert bitmap.length == model.length


@given(st.integers(1, 10_000), st.lists(ranges, max_size=6), ranges, st.integers(CLUSTER, 4000))
def test_questions_are_answered_as_by_a_set(
    length: int, marks: list[tuple[int, int]], asked: tuple[int, int], limit: int
) -> None:
    bitmap, model = Bitmap(length, CLUSTER), Model(length)
    for offset, size in marks:
        offset %= length
        size = min(size, length - offset)
        bitmap.set(offset, size)
        model.clusters |= model.touched(offset, size)
    offset = asked[0] % length
    size = min(asked[1], length - offset)
    assert bitmap.any(offset, size) == bool(model.clusters & model.touched(offset, size))

    at = offset
    for run, dirty in bitmap.extents(offset, size):
        assert run > 0
        assert all((cluster in model.clusters) == dirty for cluster in model.touched(at, run))
        at += run
    assert at == offset + size

    found = bitmap.next_dirty(offset, limit)
    later = sorted(cluster for cluster in model.clusters if cluster >= offset // CLUSTER)
    if not later:
        assert found is None
    else:
        assert found is not None
        assert found[0] == later[0] * CLUSTER
        assert 0 < found[1] <= limit
        assert found[0] + found[1] <= length
        assert model.touched(*found) <= model.clusters
        after = -(-(found[0] + found[1]) // CLUSTER)
        assert after not in model.clusters or found[1] + CLUSTER > limit or found[0] + found[1] == length

    # Whoever goes on where a run has ended comes to an end, also if the last cluster is a part of one.
    walked: set[int] = set()
    at = 0
    while (run := bitmap.next_dirty(at, limit)) is not None:
        assert run[0] >= at
        walked |= model.touched(*run)
        at = sum(run)
    assert walked == model.clusters


@given(st.lists(ranges, max_size=5), st.lists(ranges, max_size=5), st.sampled_from((128, 512, 4096)))
def test_merge_is_the_union(one: list[tuple[int, int]], other: list[tuple[int, int]], granularity: int) -> None:
    length = 10_000
    first, second, wanted = Bitmap(length, CLUSTER), Bitmap(length, granularity), Bitmap(length, CLUSTER)
    for offset, size in one:
        first.set(offset, min(size, length - offset))
        wanted.set(offset, min(size, length - offset))
    for offset, size in other:
        second.set(offset, min(size, length - offset))
    for offset, size in second.dirty():
        wanted.set(offset, size)
    first.merge(second)
    assert members(first) == members(wanted)


def test_a_bitmap_over_a_huge_disk_is_cheap_and_cleared_at_once() -> None:
    bitmap = Bitmap(64 * TiB, 64 * KiB)
    bitmap.set(63 * TiB, 1)
    assert bitmap.next_dirty(63 * TiB, 1 << 20) == (63 * TiB, 64 * KiB)
    bitmap.clear()
    assert not bitmap.any(63 * TiB, 1)


@pytest.mark.parametrize("granularity", [0, -1, 3, 65535])
def test_the_granularity_is_a_power_of_two(granularity: int) -> None:
    with pytest.raises(OptionError, match="power of two"):
        Bitmap(1000, granularity)


def test_a_dirty_bitmap_records_what_is_written_to_its_node() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk", 10_000)
        user = graph.attach_backend(disk, "guest", READ | WRITE)
        bitmap = DirtyBitmap(disk, "b0", disk.length, CLUSTER)
        assert disk.bitmaps == {"b0": bitmap}
        await user.pwrite(1000, b"x" * 100)
        await user.write_zeroes(5000, 1)
        await user.discard(9999, 1)
        assert members(bitmap) == {1, 2, 9, 19}
        assert bitmap.count() == 3 * CLUSTER + 10_000 - 19 * CLUSTER
        bitmap.enabled = False
        await user.pwrite(0, b"x")
        bitmap.enabled = True
        assert members(bitmap) == {1, 2, 9, 19}
        bitmap.remove()
        await user.pwrite(0, b"x")
        assert members(bitmap) == {1, 2, 9, 19}
        assert disk.bitmaps == {}
        assert disk.watchers == []

    asyncio.run(main())


def test_a_dirty_bitmap_follows_a_disk_that_grows() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk", 1000)
        bitmap = DirtyBitmap(disk, "b0", disk.length, CLUSTER)
        user = graph.attach_backend(disk, "guest", READ | WRITE)
        await user.pwrite(0, b"x")
        await disk.truncate(100_000)
        await user.pwrite(99_999, b"x")
        assert members(bitmap) == {0, 195}

    asyncio.run(main())


def test_a_disk_whose_dirty_bitmap_has_no_memory_to_follow_keeps_its_length() -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk", 1000)
        bitmap = DirtyBitmap(disk, "b0", disk.length, CLUSTER)
        with pytest.raises(OSError, match="a bitmap over 4611686018427387904 bytes"):
            await resize(graph, disk, 1 << 62)
        assert disk.length == bitmap.length == 1000
        await resize(graph, disk, 100_000)
        assert disk.length == bitmap.length == 100_000

    asyncio.run(main())


@settings(max_examples=60)
@given(st.integers(1, 10 * CLUSTER), st.data())
def test_what_either_of_two_has_set_counts_as_their_union(length: int, data: st.DataObject) -> None:
    first, second, union = (Bitmap(length, CLUSTER) for _ in range(3))
    for bitmap in (first, second):
        offset = data.draw(st.integers(0, length))
        bitmap.set(offset, data.draw(st.integers(0, length - offset)))
        union.merge(bitmap)
    assert first.count_or(second) == second.count_or(first) == union.count()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["set", "reset", "merge", "clear", "resize", "exchange", "count"]),
                          st.integers(0, 1 << 28), st.integers(1, 1 << 28)), max_size=12))
def test_a_counted_bitmap_counts_as_any_other(steps: list[tuple[str, int, int]]) -> None:
    plain, counted = Bitmap(1 << 28, CLUSTER), CountedBitmap(1 << 28, CLUSTER)
    other = Bitmap(1 << 28, 4096)
    other.set(1 << 26, 1 << 27)
    for what, offset, size in steps:
        for bitmap in (plain, counted):
            begin = min(offset, bitmap.length - 1)
            if what in ("set", "reset"):
                getattr(bitmap, what)(begin, min(size, bitmap.length - begin))
            elif what == "merge" and bitmap.length == other.length:
                bitmap.merge(other)
            elif what == "clear":
                bitmap.clear()
            elif what == "resize":
                bitmap.resize(size)
            elif what == "exchange":
                assert bitmap.exchange().length == bitmap.length
        if what == "count":
            assert counted.count() == plain.count()
    assert counted.bits == plain.bits
    assert counted.count() == plain.count()


# --- changes in two halves ---


def on_disk(test: Callable[[Ram], None]) -> None:
    async def main() -> None:
        test(await ram(Graph(), "disk", 10_000))

    asyncio.run(main())


def test_what_is_aborted_leaves_the_bitmap_as_it_was() -> None:
    def test(disk: Ram) -> None:
        bitmap, other = DirtyBitmap(disk, "b0", granularity=CLUSTER), DirtyBitmap(disk, "b1", granularity=128)
        bitmap.set(1000, 1)
        other.set(5000, 1)
        for prepare in (bitmap.prepare_clear, lambda: bitmap.prepare_enabled(False), bitmap.prepare_remove,
                        lambda: bitmap.prepare_merge([other]),
                        lambda: DirtyBitmap.prepare_add(disk, "b2", 512, enabled=False)):
            prepare().abort()
            assert members(bitmap) == {1}
            assert bitmap.enabled
            assert bitmap.busy is None
            assert disk.bitmaps == {"b0": bitmap, "b1": other}

    on_disk(test)


def test_what_is_committed_is_done() -> None:
    def test(disk: Ram) -> None:
        bitmap, other = DirtyBitmap(disk, "b0", granularity=CLUSTER), DirtyBitmap(disk, "b1", granularity=128)
        other.set(5000, 1)
        bitmap.prepare_merge([other]).commit()
        assert members(bitmap) == {9}
        bitmap.prepare_clear().commit()
        assert members(bitmap) == set()
        bitmap.prepare_enabled(False).commit()
        assert not bitmap.enabled
        DirtyBitmap.prepare_add(disk, "b2", 512, enabled=False).commit()
        assert (disk.bitmaps["b2"].granularity, disk.bitmaps["b2"].enabled) == (512, False)
        bitmap.prepare_remove().commit()
        assert set(disk.bitmaps) == {"b1", "b2"}

    on_disk(test)


def test_a_bitmap_in_use_is_left_alone_and_says_by_whom() -> None:
    def test(disk: Ram) -> None:
        bitmap, other = DirtyBitmap(disk, "b0"), DirtyBitmap(disk, "b1")
        release = bitmap.claim("job 'copy'")
        for refused in (bitmap.prepare_clear, bitmap.prepare_remove, lambda: bitmap.prepare_enabled(True),
                        lambda: bitmap.prepare_merge([other]), lambda: other.prepare_merge([bitmap]),
                        lambda: bitmap.claim("another")):
            with pytest.raises(OperationBlocked, match="job 'copy'"):
                refused()
        release()
        bitmap.prepare_remove().commit()

    on_disk(test)


def test_bitmaps_are_found_by_name_and_bad_ones_are_refused() -> None:
    def test(disk: Ram) -> None:
        bitmap = DirtyBitmap(disk, "b0")
        assert find_bitmap(disk, "b0") is bitmap
        with pytest.raises(OptionError, match="disk"):
            find_bitmap(disk, "nope")
        for name in ("", "b0", "x" * (LONGEST_NAME + 1)):
            with pytest.raises(OptionError, match="name"):
                DirtyBitmap(disk, name)
        for granularity in (0, 256, 513, 1 << 32):
            with pytest.raises(OptionError, match="granularity"):
                DirtyBitmap.prepare_add(disk, "b1", granularity)
        other = DirtyBitmap(disk, "b1", 5000)
        disk.length = 5000
        other.prepare_merge([bitmap]).commit()  # both follow the disk
        assert (bitmap.length, other.length) == (5000, 5000)
        assert set(disk.bitmaps) == {"b0", "b1"}

    on_disk(test)


def test_bitmaps_of_disks_of_different_lengths_cannot_be_merged() -> None:
    async def main() -> None:
        graph = Graph()
        one, two = DirtyBitmap(await ram(graph, "one", 1000), "b"), DirtyBitmap(await ram(graph, "two", 2000), "b")
        with pytest.raises(OptionError, match="1000 bytes"):
            one.prepare_merge([two])

    asyncio.run(main())
