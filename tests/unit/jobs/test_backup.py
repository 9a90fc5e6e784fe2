"""Backup: the target is the source at one moment, whatever is written meanwhile."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.errors import GraphError, OptionError, PermissionConflict
from blockstep.jobs.backup import BackupJob
from blockstep.jobs.job import Job
from blockstep.jobs.transaction import JobTransaction
from blockstep.units import KiB
from tests.disks import Ram, faulty
from tests.unit.jobs.support import HandClock, Listener, picture, reach, settle

PATTERN = random.Random(7).randbytes(512 * KiB)


class Pair:
    """guest -> blkdebug 'source' -> ram, and blkdebug 'target' -> ram"""

    async def open(self, content: bytes = PATTERN, size: int | None = None) -> Pair:
        self.graph = Graph()
        self.source, self.disk = await faulty(self.graph, "source", content)
        self.target, self.copy = await faulty(self.graph, "target", len(content) if size is None else size)
        self.guest = self.graph.attach_backend(self.source, "guest", READ | WRITE)
        return self

    def job(self, **options: Any) -> BackupJob:
        return BackupJob("backup", self.graph, self.source, self.target, **options)


@settings(max_examples=60)
@given(
    writes=st.lists(st.tuples(st.integers(0, 300 * KiB), st.integers(1, 70 * KiB), st.integers(0, 30)), max_size=10),
    cluster=st.sampled_from([4096, 65536]), workers=st.integers(1, 3),
)
def test_the_target_is_the_source_when_the_job_began(writes: Any, cluster: int, workers: int) -> None:
    async def main() -> None:
        p = await Pair().open(PATTERN[:400 * KiB + 5])
        was = picture(p.graph)
        then = bytes(p.disk.content)
        job = p.job(cluster_size=cluster, workers=workers)
        await job.launch()
        for offset, length, turns in writes:
            await settle(turns)
            await p.guest.pwrite(offset, b"n" * length)
        assert await job.wait() is None
        assert p.copy.content == then
        assert p.copy.requests[-1][0] == "flush"
        assert picture(p.graph) == was
        assert job.current == job.total

    asyncio.run(main())


def test_sync_none_saves_only_what_is_overwritten_and_runs_until_it_is_cancelled() -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        events = Listener()
        job = p.job(sync="none", on_event=events)
        await job.launch()
        await p.guest.pwrite(70000, b"new")
        await settle()
        assert job.status == "running"
        assert [request for request in p.copy.requests if request[0] == "write"] == [("write", 65536, 65536)]
        assert p.copy.content[65536:131072] == PATTERN[65536:131072]
        job.cancel()
        assert isinstance(await job.wait(), OSError)
        assert events.names == ["BLOCK_JOB_CANCELLED"]
        assert picture(p.graph) == was

    asyncio.run(main())


def test_a_bitmap_chooses_the_clusters_and_starts_anew() -> None:
    async def main() -> None:
        p = await Pair().open()
        bitmap = DirtyBitmap(p.source, "changes", p.source.length)
        await p.guest.pwrite(3 * 65536, b"a")
        await p.guest.pwrite(5 * 65536, b"b")
        then = bytes(p.disk.content)
        p.target.suspend("write", "held")
        job = p.job(sync="bitmap", bitmap=bitmap)
        await job.launch()
        await p.target.suspended("held")
        await p.guest.pwrite(7 * 65536, b"later")  # neither dirty nor saved
        p.target.resume("held")
        assert await job.wait() is None
        expected = bytearray(len(PATTERN))
        for cluster in (3, 5):
            expected[cluster * 65536:(cluster + 1) * 65536] = then[cluster * 65536:(cluster + 1) * 65536]
        assert p.copy.content == expected
        assert list(bitmap.dirty()) == [(7 * 65536, 65536)]

    asyncio.run(main())


@pytest.mark.parametrize(("mode", "kept"), [("never", 4), ("on-success", 4), ("always", 3)])
def test_a_bitmap_gets_back_what_a_failed_backup_has_not_copied(mode: Any, kept: int) -> None:
    async def main() -> None:
        p = await Pair().open()
        bitmap = DirtyBitmap(p.source, "changes", p.source.length)
        for cluster in (0, 2, 4, 6):
            bitmap.set(cluster * 65536, 1)
        p.target.fail("write", offset=2 * 65536)
        job = p.job(sync="bitmap", bitmap=bitmap, bitmap_mode=mode, workers=1)
        await job.launch()
        assert isinstance(await job.wait(), OSError)
        assert bitmap.bits.count() == kept
        assert bitmap.busy is None

    asyncio.run(main())


@pytest.mark.parametrize(("mode", "fails", "kept"), [
    ("on-success", False, 0), ("on-success", True, 4), ("always", False, 0), ("always", True, 8),
])
def test_a_bitmap_beside_a_full_backup_says_what_the_next_one_has_to_copy(mode: Any, fails: bool, kept: int) -> None:
    async def main() -> None:
        p = await Pair().open()
        bitmap = DirtyBitmap(p.source, "changes")
        for cluster in (0, 2, 4, 6):
            bitmap.set(cluster * 65536, 1)
        if fails:
            p.target.fail("write", offset=3 * 65536)
        job = p.job(bitmap=bitmap, bitmap_mode=mode, workers=1, detect_zeroes=False)
        await job.launch()
        assert (await job.wait() is not None) is fails
        assert bitmap.bits.count() == kept

    asyncio.run(main())


@pytest.mark.parametrize(("sync", "mode"), [("none", "always"), ("full", "never"), ("top", "never")])
def test_a_bitmap_that_would_learn_nothing_is_refused(sync: Any, mode: Any) -> None:
    async def main() -> None:
        p = await Pair().open()
        with pytest.raises(OptionError, match="bitmap"):
            p.job(sync=sync, bitmap=DirtyBitmap(p.source, "changes"), bitmap_mode=mode)
        with pytest.raises(OptionError, match="given"):
            p.job(sync="bitmap")

    asyncio.run(main())


def test_sync_top_copies_what_the_source_itself_holds_and_saves_what_is_written_elsewhere() -> None:
    async def main() -> None:
        graph = Graph()
        base = await graph.open({"driver": "test-ram", "node-name": "base", "size": 256 * KiB})
        assert isinstance(base, Ram)
        base.content[:] = PATTERN[:256 * KiB]
        source = await graph.open({"driver": "overlay", "node-name": "source", "backing": "base",
                                   "cluster-size": 65536})
        guest = graph.attach_backend(source, "guest", READ | WRITE)
        await guest.pwrite(65536, b"s" * 65536)
        target, copy = await faulty(graph, "target", 256 * KiB)
        job = BackupJob("backup", graph, source, target, sync="top")
        await job.launch()
        assert await job.wait() is None
        assert bytes(copy.content) == bytes(65536) + b"s" * 65536 + bytes(131072)
        assert (job.current, job.total) == (256 * KiB, 256 * KiB)

    asyncio.run(main())


@pytest.mark.parametrize("first", [0, 1])
def test_several_backups_of_one_source_keep_their_moments_in_whatever_order_they_end(first: int) -> None:
    async def main() -> None:
        p = await Pair().open()
        second, copy = await faulty(p.graph, "second", len(PATTERN))
        was = picture(p.graph)
        jobs = [p.job(sync="none"), BackupJob("later", p.graph, p.source, second, sync="none")]
        await jobs[0].launch()
        await p.guest.pwrite(0, b"between")
        await jobs[1].launch()
        await p.guest.pwrite(0, b"after..")
        assert p.copy.content[:7] == PATTERN[:7]
        assert copy.content[:7] == b"between"
        for job, offset in ((jobs[first], 65536), (jobs[1 - first], 131072)):
            job.cancel()
            await job.wait()
            await p.guest.pwrite(offset, b"more")
        others = [p.copy, copy]
        assert others[first].content[65536:65540] == bytes(4)
        assert others[1 - first].content[65536:65540] == PATTERN[65536:65540]
        assert all(disk.content[131072:131076] == bytes(4) for disk in others)
        assert p.disk.content[131072:131076] == b"more"
        assert picture(p.graph) == was

    asyncio.run(main())


@pytest.mark.parametrize("what_breaks", ["break-guest-write", "break-snapshot"])
def test_when_old_content_cannot_be_saved_the_option_says_what_breaks(what_breaks: Any) -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        job = p.job(sync="none", on_cbw_error=what_breaks)
        await job.launch()
        p.target.fail("write", errno.ENOSPC)
        if what_breaks == "break-guest-write":
            with pytest.raises(OSError, match="injected"):
                await p.guest.pwrite(0, b"x")
            assert job.status == "running"
            job.cancel()
            await job.wait()
        else:
            await p.guest.pwrite(0, b"x")
            error = await job.wait()
            assert isinstance(error, OSError)
            assert error.errno == errno.ENOSPC
        assert picture(p.graph) == was

    asyncio.run(main())


@pytest.mark.parametrize("policy", ["report", "ignore", "stop"])
@pytest.mark.parametrize("side", ["read", "write"])
def test_errors_of_the_background_copy_follow_their_policy(policy: str, side: str) -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        clock = HandClock()
        (p.source if side == "read" else p.target).fail(side, once=True)
        job = p.job(on_source_error=policy, on_target_error=policy, clock=clock)
        await job.launch()
        if policy == "report":
            assert isinstance(await job.wait(), OSError)
        else:
            if policy == "stop":
                await reach(job, "paused")
                job.resume()
            while job.status != "null":
                await clock.advance(0.2)
            assert await job.wait() is None
            assert p.copy.content == PATTERN
        assert picture(p.graph) == was

    asyncio.run(main())


@pytest.mark.parametrize("when", ["running", "paused", "pending"])
def test_cancelled_in_any_state_the_graph_is_what_it_was(when: str) -> None:
    async def main() -> None:
        p = await Pair().open()
        was = picture(p.graph)
        job = p.job(auto_finalize=False)
        if when != "pending":
            p.target.suspend("write", "held")
        await job.launch()
        if when == "pending":
            await reach(job, "pending")
        else:
            await p.target.suspended("held")
            if when == "paused":
                job.pause()
        job.cancel()
        await settle(20)
        if when != "pending":
            assert job.status != "null"
            p.target.resume("held")
        await job.wait()
        assert job.cancelled
        assert picture(p.graph) == was

    asyncio.run(main())


def test_two_backups_of_a_transaction_end_together() -> None:
    async def main() -> None:
        together = JobTransaction()
        pairs = [await Pair().open(), await Pair().open()]
        pairs[1].target.fail("write")
        jobs: list[Job] = [p.job(transaction=together) for p in pairs]
        for job in jobs:
            await job.create()
        for job in jobs:
            job.start()
        assert all([await job.wait() for job in jobs])
        assert jobs[0].cancelled

    asyncio.run(main())


def test_a_target_that_is_too_small_is_refused() -> None:
    async def main() -> None:
        p = await Pair().open(size=1000)
        was = picture(p.graph)
        with pytest.raises(OptionError, match="target"):
            await p.job().launch()
        assert picture(p.graph) == was

    asyncio.run(main())


@pytest.mark.parametrize("sync", ["none", "full"])
def test_the_job_goes_on_when_the_last_user_of_the_source_goes(sync: Any) -> None:
    async def main() -> None:
        p = await Pair().open()
        p.target.suspend("write", "held")
        job = p.job(sync=sync)
        await job.launch()
        if sync == "full":
            await p.target.suspended("held")
        await p.graph.detach_backend(p.guest)
        p.target.resume("held")
        if sync == "none":
            job.cancel()
        error = await job.wait()
        assert (error is None) is (sync == "full")
        assert job.cancelled is (sync == "none")
        assert p.source.parents == []

    asyncio.run(main())


def test_nobody_writes_past_the_filter_even_if_the_source_had_no_user() -> None:
    async def main() -> None:
        p = await Pair().open()
        await p.graph.detach_backend(p.guest)
        was = picture(p.graph)
        job = p.job(sync="none")
        await job.launch()
        with pytest.raises(PermissionConflict, match="write"):
            p.graph.attach_backend(p.source, "late", READ | WRITE)
        assert job.filter is not None
        late = p.graph.attach_backend(job.filter, "late", READ | WRITE)
        await late.pwrite(0, b"new")
        assert p.copy.content[:3] == PATTERN[:3]
        job.cancel()
        await job.wait()
        assert late.node is p.source
        await p.graph.detach_backend(late)
        assert picture(p.graph) == was

    asyncio.run(main())


@pytest.mark.parametrize("users", [True, False])
def test_a_target_that_is_read_only_is_refused(users: bool) -> None:
    async def main() -> None:
        p = await Pair().open()
        if not users:
            await p.graph.detach_backend(p.guest)
        await p.graph.reopen([(p.target, {"read-only": True})])
        was = picture(p.graph)
        with pytest.raises(GraphError, match="read-only"):
            await p.job().launch()
        assert picture(p.graph) == was

    asyncio.run(main())
