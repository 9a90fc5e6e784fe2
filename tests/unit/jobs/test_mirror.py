"""Mirror: in sync while the guest writes, in both copy modes; bitmaps; faults; the end."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.block.resize import resize
from blockstep.errors import OperationBlocked, OptionError, PermissionConflict
from blockstep.jobs.mirror import MirrorJob
from blockstep.units import KiB, MiB
from tests.disks import Ram, faulty
from tests.unit.jobs.support import CANCELLABLE, HandClock, Listener, cancelled, picture, reach, settle

PATTERN = random.Random(4).randbytes(512 * KiB)
MODES = ["background", "write-blocking"]


class Pair:
    """guest -> blkdebug 'source' -> ram, and blkdebug 'target' -> ram"""

    async def open(self, content: bytes = PATTERN, target: bytes | int | None = None) -> Pair:
        self.graph = Graph()
        self.source, self.disk = await faulty(self.graph, "source", content)
        self.target, self.copy = await faulty(self.graph, "target", len(content) if target is None else target)
        self.guest = self.graph.attach_backend(self.source, "guest", READ | WRITE)
        return self

    def job(self, **options: Any) -> MirrorJob:
        return MirrorJob("mirror", self.graph, self.source, self.target, **options)


def wrote(disk: Ram) -> list[tuple[int, int]]:
    return [(offset, length) for what, offset, length in disk.requests if what in ("write", "zero")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pivot", [False, True])
def test_a_full_mirror_is_the_source_at_its_end(mode: Any, pivot: bool) -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        events = Listener()
        job = p.job(copy_mode=mode, pivot=pivot, on_event=events)
        await job.launch()
        await reach(job, "ready")
        assert p.copy.content == p.disk.content
        assert job.block_info()["ready"]
        await p.guest.pwrite(3, b"now")
        if mode == "write-blocking":
            assert p.copy.content == p.disk.content
            assert job.actively_synced
        job.complete()
        assert await job.wait() is None
        assert p.copy.content == p.disk.content
        assert p.guest.node is (p.target if pivot else p.source)
        if not pivot:
            assert picture(p.graph) == was
        assert job.current == job.total
        assert events.names == ["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"]

    asyncio.run(main())


def test_an_empty_mirror_flushes_the_target_before_it_says_ready() -> None:
    async def main() -> None:
        p = await Pair().open()
        bitmap = DirtyBitmap(p.source, "changes", p.source.length)
        job = p.job(sync="bitmap", bitmap=bitmap)
        await job.launch()
        await reach(job, "ready")
        assert p.copy.requests == [("flush", 0, 0)]
        job.cancel(force=True)
        await job.wait()

    asyncio.run(main())


def test_a_bitmap_says_what_is_copied() -> None:
    async def main() -> None:
        p = await Pair().open()
        bitmap = DirtyBitmap(p.source, "changes", p.source.length, 4096)
        await p.guest.pwrite(70000, b"x")
        job = p.job(sync="bitmap", bitmap=bitmap, bitmap_mode="on-success", auto_complete=True, granularity=4096)
        await job.launch()
        with pytest.raises(OperationBlocked):
            await p.job(sync="bitmap", bitmap=bitmap, internal=True).launch()
        assert await job.wait() is None
        assert wrote(p.copy) == [(69632, 4096)]
        assert not bitmap.bits.any()
        assert bitmap.busy is None

    asyncio.run(main())


@pytest.mark.parametrize(("mode", "kept"), [("never", 8), ("on-success", 8), ("always", 4)])
def test_a_failed_resync_goes_on_where_it_ended_if_asked(mode: Any, kept: int) -> None:
    async def main() -> None:
        p = await Pair().open()
        bitmap = DirtyBitmap(p.source, "changes", p.source.length)
        bitmap.set(0, p.source.length)
        p.target.fail("write", offset=4 * 65536)
        job = p.job(sync="bitmap", bitmap=bitmap, bitmap_mode=mode, workers=1)
        # Chunk by chunk, so that half of it is done before the error.
        original = job.make_engine

        def small(*doors: Any) -> Any:
            engine = original(*doors)
            engine.chunk = 65536
            return engine

        job.make_engine = small  # type: ignore[method-assign]
        await job.launch()
        assert isinstance(await job.wait(), OSError)
        assert bitmap.bits.count() == kept

    asyncio.run(main())


@pytest.mark.parametrize("begin", [MirrorJob.create, MirrorJob.launch])
def test_a_resync_that_is_cancelled_before_it_begins_leaves_its_bitmap_as_it_was(begin: Any) -> None:
    async def main() -> None:
        p = await Pair().open()
        bitmap = DirtyBitmap(p.source, "changes", p.source.length)
        bitmap.set(65536, 2 * 65536)
        job = p.job(sync="bitmap", bitmap=bitmap, bitmap_mode="always")
        await begin(job)
        await p.guest.pwrite(5 * 65536, b"meanwhile")
        job.cancel()
        assert isinstance(await job.wait(), OSError)
        assert wrote(p.copy) == []
        assert list(bitmap.bits.search(1)) == [1, 2, 5]

    asyncio.run(main())


@pytest.mark.parametrize("mode", MODES)
def test_a_write_of_a_part_of_a_cluster_never_makes_the_rest_of_it_clean(mode: Any) -> None:
    async def main() -> None:
        p = await Pair().open()
        job = p.job(copy_mode=mode, auto_complete=True)
        p.target.suspend("write", "held")  # the background copy comes not farther than its first chunk
        await job.launch()
        await p.target.suspended("held")
        job.pause()
        job.dirty.set(0, p.source.length)  # as if nothing had been copied
        p.copy.content[:] = bytes(len(PATTERN))
        guest = asyncio.create_task(p.guest.pwrite(65536 + 100, b"sub-granularity"))
        await settle()
        p.target.resume("held")
        await guest
        assert job.dirty.any(65536, 1)
        job.resume()
        assert await job.wait() is None
        assert p.copy.content == p.disk.content

    asyncio.run(main())


def test_write_blocking_converges_under_a_load_that_background_never_catches_up_with() -> None:
    async def main() -> None:
        p = await Pair().open(bytes(4 * MiB))
        writing = True

        async def load() -> None:
            dice = random.Random(5)
            while writing:
                for _ in range(200):
                    await p.guest.pwrite(dice.randrange(4 * MiB - 100), dice.randbytes(dice.randrange(1, 100)))
                await asyncio.sleep(0)

        task = asyncio.create_task(load())
        same = []
        job = p.job(copy_mode="write-blocking", pivot=lambda change: same.append(p.copy.content == p.disk.content))
        await job.launch()
        await reach(job, "ready")
        assert not job.dirty.bits.any()
        job.complete()
        assert await job.wait() is None
        assert same == [True]
        writing = False
        await task

    asyncio.run(main())


def test_the_copy_mode_can_be_changed_on_the_way_but_not_back() -> None:
    async def main() -> None:
        p = await Pair().open()
        job = p.job()
        await job.launch()
        await reach(job, "ready")
        assert job.filter is None
        job.change(copy_mode="write-blocking")
        await settle()
        await p.guest.pwrite(0, b"both")
        assert p.copy.content[:4] == b"both"
        with pytest.raises(OptionError):
            job.change(copy_mode="background")
        job.complete()
        assert await job.wait() is None

    asyncio.run(main())


@pytest.mark.parametrize("policy", ["report", "stop"])
def test_a_target_that_fails_under_write_blocking_never_fails_the_guest(policy: str) -> None:
    async def main() -> None:
        p = await Pair().open()
        job = p.job(copy_mode="write-blocking", on_target_error=policy, auto_dismiss=False)
        await job.launch()
        await reach(job, "ready")
        p.target.fail("write")
        await p.guest.pwrite(1000, b"guest")
        if policy == "report":
            assert isinstance(await job.wait(), OSError)
        else:
            await reach(job, "standby")
            p.target.clear_rules()
            job.resume()
            await reach(job, "ready")
            job.complete()
            assert await job.wait() is None
            assert p.copy.content == p.disk.content
        assert p.disk.content[1000:1005] == b"guest"
        assert p.guest.node is p.source

    asyncio.run(main())


def test_a_target_that_is_too_small_or_in_use_is_refused() -> None:
    async def main() -> None:
        p = await Pair().open(target=1000)
        was = picture(p.graph)
        with pytest.raises(OptionError, match="target"):
            await p.job().launch()
        p.copy.length = len(PATTERN)
        writer = p.graph.attach_backend(p.target, "writer", WRITE)
        with pytest.raises(PermissionConflict, match="writer"):
            await p.job().launch()
        await p.graph.detach_backend(writer)
        with pytest.raises(OptionError, match="bitmap"):
            p.job(sync="bitmap")
        assert picture(p.graph) == was

    asyncio.run(main())


def test_a_target_known_to_be_zero_is_told_only_what_is_not() -> None:
    async def main() -> None:
        content = bytearray(4 * MiB)
        content[70000:70010] = b"0123456789"
        p = await Pair().open(bytes(content))
        job = p.job(target_is_zero=True, auto_complete=True)
        await job.launch()
        assert await job.wait() is None
        assert wrote(p.copy) == [(65536, 65536)]
        assert p.copy.content == p.disk.content

    asyncio.run(main())


def test_only_the_top_layer_is_copied_with_sync_top_and_only_the_new_with_none() -> None:
    async def main(sync: Any, expected: bytes) -> None:
        graph = Graph()
        base = await graph.open({"driver": "memory", "node-name": "base", "size": 256 * KiB})
        await base.pwrite(0, b"b" * 256 * KiB)
        top = await graph.open({"driver": "overlay", "node-name": "top", "backing": "base"})
        target = await graph.open({"driver": "memory", "node-name": "target", "size": 256 * KiB})
        guest = graph.attach_backend(top, "guest", READ | WRITE)
        await guest.pwrite(4096, b"t" * 4096)
        job = MirrorJob("m", graph, top, target, sync=sync)
        await job.launch()
        await reach(job, "ready")
        await guest.pwrite(128 * KiB, b"n" * 4096)
        job.complete()
        assert await job.wait() is None
        assert set(await target.pread(0, 128 * KiB)) == set(expected)
        assert await target.pread(128 * KiB, 4096) == b"n" * 4096

    asyncio.run(main("top", b"\0t"))
    asyncio.run(main("none", b"\0"))
    asyncio.run(main("full", b"bt"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", CANCELLABLE)
def test_cancelled_in_any_state_the_graph_is_what_it_was(mode: Any, when: str) -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        job = p.job(copy_mode=mode, auto_finalize=False, pivot=True)
        await cancelled(job, when, p.target)
        assert picture(p.graph) == was
        assert p.guest.in_flight == 0

    asyncio.run(main())


def test_a_drain_of_the_source_in_the_middle_of_everything_ends() -> None:
    async def main() -> None:
        p = await Pair().open()
        p.target.suspend("write", "held")
        job = p.job(copy_mode="write-blocking", auto_complete=True)
        await job.launch()
        await p.target.suspended("held")
        # This write waits for the lock of the chunk that hangs in the target; the drain waits for this write.
        guest = asyncio.create_task(p.guest.pwrite(0, b"waits"))
        await settle()
        assert not guest.done()

        async def drain() -> None:
            async with p.graph.drained(p.source, p.target):
                assert guest.done()

        draining = asyncio.create_task(drain())
        await settle()
        p.target.resume("held")
        await draining
        assert await job.wait() is None
        assert p.copy.content == p.disk.content

    asyncio.run(main())


def test_the_speed_limit_and_the_time_left_are_true() -> None:
    async def main() -> None:
        clock = HandClock()
        p = await Pair().open(random.Random(6).randbytes(8 * MiB))
        job = p.job(speed=1 * MiB, clock=clock)
        await job.launch()
        await clock.advance(3.9)
        assert 3 * MiB <= job.current <= 5 * MiB
        assert job.total == 8 * MiB
        assert job.time_left == pytest.approx(4, abs=1.5)
        job.set_speed(0)
        await clock.advance(0.1)
        await reach(job, "ready")
        job.cancel(force=True)
        await job.wait()

    asyncio.run(main())


@settings(max_examples=80)
@given(
    ops=st.lists(st.one_of(
        st.tuples(st.just("write"), st.integers(0, 300 * KiB), st.integers(1, 9000), st.integers(1, 255)),
        st.tuples(st.just("zero"), st.integers(0, 300 * KiB), st.integers(1, 90000), st.just(0)),
        st.tuples(st.just("discard"), st.integers(0, 300 * KiB), st.integers(1, 9000), st.just(0)),
        st.tuples(st.just("turns"), st.integers(1, 40), st.just(0), st.just(0)),
        st.tuples(st.just("fault"), st.integers(0, 400 * KiB), st.just(0), st.just(0)),
    ), max_size=25),
    mode=st.sampled_from(MODES), granularity=st.sampled_from([512, 4096, 65536]), pivot=st.booleans(),
)
def test_whatever_the_guest_does_both_ends_are_the_same_at_the_end(ops: Any, mode: Any, granularity: int,
                                                                  pivot: bool) -> None:
    async def main() -> None:
        p = await Pair().open(PATTERN[:400 * KiB + 77])
        model = bytearray(p.disk.content)
        job = p.job(copy_mode=mode, granularity=granularity, pivot=pivot, workers=2, on_target_error="ignore",
                    clock=Hurried())
        await job.launch()
        tasks = []
        for what, offset, length, value in ops:
            if what == "turns":
                await settle(offset)
            elif what == "fault":
                p.target.fail("write", once=True, offset=offset, immediately=False)
            elif what == "write":
                await asyncio.gather(*tasks)
                model[offset:offset + length] = bytes([value]) * length
                tasks = [asyncio.create_task(p.guest.pwrite(offset, bytes([value]) * length))]
            elif what == "zero":
                await p.guest.write_zeroes(offset, length)
                await asyncio.gather(*tasks)
                p.disk.content[offset:offset + length] = p.disk.content[offset:offset + length]
                model[:] = p.disk.content
            else:
                await p.guest.discard(offset, length)
        await asyncio.gather(*tasks)
        await reach(job, "ready")
        p.target.clear_rules()
        job.complete()
        assert await job.wait() is None
        assert p.copy.content == p.disk.content == model
        assert p.guest.node is (p.target if pivot else p.source)

    asyncio.run(main())


class Hurried(HandClock):
    """A clock on which every wait is over at the next turn."""

    def call_later(self, delay: float, callback: Any, *args: Any) -> Any:
        self.now += delay
        return asyncio.get_running_loop().call_soon(callback, *args)


def test_complete_in_standby_waits_for_resume() -> None:
    async def main() -> None:
        p = await Pair().open()
        job = p.job()
        await job.launch()
        await reach(job, "ready")
        job.pause()
        job.complete()
        await settle()
        assert job.status == "standby"
        job.resume()
        assert await job.wait() is None

    asyncio.run(main())


def test_a_named_filter_is_there_from_the_beginning_and_lets_all_through_until_it_is_needed() -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        job = p.job(filter_node_name="top")
        await job.launch()
        await reach(job, "ready")
        assert p.guest.node.name == "top"
        assert not job.actively_synced
        await p.guest.pwrite(0, b"here only")
        assert p.copy.content != p.disk.content
        job.change(copy_mode="write-blocking")
        await settle()
        assert job.actively_synced
        await p.guest.pwrite(9, b"on both")
        assert p.copy.content == p.disk.content
        job.complete()
        assert await job.wait() is None
        assert picture(p.graph) == was

    asyncio.run(main())


@pytest.mark.parametrize(("name", "right"), [("target", "no other node"), ("9", "letter")])
def test_a_filter_name_that_is_taken_or_bad_is_refused(name: str, right: str) -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        with pytest.raises(OptionError, match=right):
            await p.job(filter_node_name=name).launch()
        assert picture(p.graph) == was

    asyncio.run(main())


def test_the_target_can_take_the_place_of_a_node_that_the_source_shows() -> None:
    async def main() -> None:
        p = await Pair().open()
        below = p.source.children["file"].node
        job = p.job(replaces=below, pivot=True)
        await job.launch()
        await reach(job, "ready")
        job.complete()
        assert await job.wait() is None
        assert p.guest.node is p.source
        assert p.source.children["file"].node is p.target
        other, _ = await faulty(p.graph, "other", len(PATTERN))
        with pytest.raises(OptionError, match="replaces"):
            await p.job(replaces=other, pivot=True).launch()

    asyncio.run(main())


def test_a_job_whose_filter_has_no_users_any_more_goes_on() -> None:
    async def main() -> None:
        p = await Pair().open()
        job = p.job(copy_mode="write-blocking")
        await job.launch()
        await reach(job, "ready")
        await p.graph.detach_backend(p.guest)
        assert "#mirror-top-mirror" in p.graph.nodes
        job.complete()
        assert await job.wait() is None
        assert p.copy.content == p.disk.content
        assert sorted(p.graph.nodes) == sorted({*p.graph.nodes} - {"#mirror-top-mirror"})

    asyncio.run(main())


@pytest.mark.parametrize("below", [False, True])
def test_the_source_keeps_its_length_while_it_is_mirrored(below: bool) -> None:
    async def main() -> None:
        p = await Pair().open()
        node = p.disk if below else p.source
        job = p.job()
        await job.launch()
        with pytest.raises((PermissionConflict, OperationBlocked)):
            await resize(p.graph, node, MiB)
        await reach(job, "ready")
        job.cancel(force=True)
        await job.wait()
        p.source.suspend("read", "hangs")
        reading = asyncio.ensure_future(p.guest.pread(0, 512))
        await p.source.suspended("hangs")
        resizing = asyncio.ensure_future(resize(p.graph, node, MiB))
        await settle()  # it waits for the request; its new length is still to come
        with pytest.raises(PermissionConflict):
            await p.job().launch()
        with pytest.raises(PermissionConflict):
            await resize(p.graph, node, 2 * MiB)
        p.source.resume("hangs")
        await asyncio.gather(reading, resizing)
        assert p.guest.length == MiB

    asyncio.run(main())
