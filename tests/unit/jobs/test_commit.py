"""Commit: the merge, the pivot, and what is left when it does not come to that."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.aio.inline import start
from blockstep.block.driver import Driver
from blockstep.block.graph import Change, Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import ALL, READ, WRITE, WRITE_UNCHANGED
from blockstep.errors import GraphError, OperationBlocked, OptionError, PermissionConflict
from blockstep.jobs.commit import CommitJob
from blockstep.units import KiB, MiB
from tests.unit.jobs.support import CANCELLABLE, HandClock, Listener, cancelled, picture, reach, settle

SIZE = 1 * MiB
PATTERN = random.Random(2).randbytes(SIZE)


class Chain:
    """guest -> top -> mid -> blkdebug 'base' -> memory"""

    async def open(self, size: int = SIZE, base_size: int | None = None) -> Chain:
        self.graph = graph = Graph()
        await graph.open({"driver": "memory", "node-name": "disk", "size": base_size or size})
        self.base: Any = await graph.open({"driver": "blkdebug", "node-name": "base", "file": "disk"})
        self.mid = await graph.open({"driver": "overlay", "node-name": "mid", "backing": "base", "size": size})
        self.top = await graph.open({"driver": "overlay", "node-name": "top", "backing": "mid"})
        self.guest = graph.attach_backend(self.top, "guest", READ | WRITE, READ | WRITE_UNCHANGED)
        await self.base.pwrite(0, PATTERN[:base_size or size])
        await self.mid.pwrite(10000, b"m" * 70000)
        await self.guest.pwrite(40000, b"t" * 100000)
        return self

    async def view(self) -> bytes:
        return bytes(await self.guest.pread(0, self.guest.length))


async def content(node: Driver) -> bytes:
    return bytes(await node.pread(0, node.length))


def test_an_active_commit_becomes_ready_and_pivots_at_complete() -> None:
    async def main() -> None:
        c = await Chain().open()
        before = await c.view()
        events = Listener()
        job = CommitJob("merge", c.graph, c.top, c.base, on_event=events)
        await job.launch()
        await reach(job, "ready")
        await c.guest.pwrite(5, b"while ready")
        job.complete()
        assert await job.wait() is None
        assert c.guest.node is c.base
        assert await c.view() == before[:5] + b"while ready" + before[16:] == await content(c.base)
        assert events.names == ["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"]
        assert not c.top.parents
        assert not c.top.watchers
        assert not any(node.blockers for node in c.graph.nodes.values())

    asyncio.run(main())


def test_an_internal_commit_completes_by_itself_and_moves_only_the_edge_it_was_given() -> None:
    async def main() -> None:
        c = await Chain().open()
        before = await c.view()
        other = c.graph.attach_backend(c.top, "other", READ, ALL)
        lift = c.top.block_operations("replication runs")
        seen: list[Change] = []
        job = CommitJob("merge", c.graph, c.top, c.base, auto_complete=True, internal=True,
                        replace_in=c.guest.edge, pivot=seen.append)
        await job.launch()
        assert await job.wait() is None
        assert c.guest.node is c.base
        assert other.node is c.top
        assert await c.view() == before
        assert len(seen) == 1
        lift()

    asyncio.run(main())


def test_an_intermediate_commit_puts_the_base_below_the_overlay() -> None:
    async def main() -> None:
        c = await Chain().open()
        before = await c.view()
        job = CommitJob("merge", c.graph, c.mid, c.base)
        await job.launch()
        assert await job.wait() is None
        assert c.top.children["backing"].node is c.base
        assert await c.view() == before
        assert (await content(c.base))[10000:80000] == b"m" * 70000

    asyncio.run(main())


def test_a_shorter_base_grows() -> None:
    async def main() -> None:
        c = await Chain().open(base_size=100000)
        before = await c.view()
        job = CommitJob("merge", c.graph, c.top, c.base, auto_complete=True)
        await job.launch()
        assert await job.wait() is None
        assert c.base.length == SIZE
        assert await c.view() == before

    asyncio.run(main())


def test_a_shorter_base_grows_when_nothing_is_in_flight_in_it() -> None:
    async def main() -> None:
        c = await Chain().open(base_size=100000)
        job = CommitJob("merge", c.graph, c.mid, c.base)
        await job.launch()
        c.base.suspend("read", "held")
        read: list[Any] = []
        assert not start(c.guest.pread(0, 512), lambda *ended: read.append(ended))
        await settle()
        assert c.base.length == 100000
        c.base.resume("held")
        assert await job.wait() is None
        assert read == [(PATTERN[:512], None)]
        assert c.base.length == SIZE

    asyncio.run(main())


def test_nodes_that_nobody_holds_by_name_go_with_the_pivot() -> None:
    async def main() -> None:
        graph = Graph()
        base = await graph.open({"driver": "memory", "node-name": "base", "size": SIZE})
        top = await graph.open({"driver": "overlay", "node-name": "top", "backing":
                                {"driver": "overlay", "node-name": "mid", "backing": "base"}}, owned=False)
        guest = graph.attach_backend(top, "guest", READ | WRITE)
        job = CommitJob("merge", graph, top, base, auto_complete=True)
        await job.launch()
        assert await job.wait() is None
        assert list(graph.nodes) == ["base"]
        assert guest.node is base

    asyncio.run(main())


def test_a_read_only_base_is_opened_for_the_merge_and_locked_again_unless_it_became_the_top() -> None:
    async def main(pivots: bool) -> None:
        graph = Graph()
        top = await graph.open({"driver": "overlay", "node-name": "top",
                                "backing": {"driver": "memory", "node-name": "base", "size": SIZE}})
        base = graph.find("base")
        graph.attach_backend(top, "guest", READ | WRITE)
        assert base.read_only
        job = CommitJob("merge", graph, top, base)
        await job.launch()
        await reach(job, "ready")
        assert not base.read_only
        if pivots:
            job.complete()
        else:
            job.cancel(force=True)
        await job.wait()
        assert base.read_only is not pivots

    asyncio.run(main(True))
    asyncio.run(main(False))


@pytest.mark.parametrize("when", CANCELLABLE)
def test_cancelled_in_any_state_the_graph_is_what_it_was_and_so_is_the_view(when: str) -> None:
    async def main() -> None:
        c = await Chain().open()
        before, was = await c.view(), picture(c.graph)
        job = CommitJob("merge", c.graph, c.top, c.base, auto_finalize=False)
        await cancelled(job, when, c.base)
        assert picture(c.graph) == was
        assert await c.view() == before
        assert c.guest.in_flight == 0

    asyncio.run(main())


def test_a_soft_cancel_of_a_ready_commit_leaves_a_whole_base_and_does_not_pivot() -> None:
    async def main() -> None:
        c = await Chain().open()
        was = picture(c.graph)
        events = Listener()
        job = CommitJob("merge", c.graph, c.top, c.base, on_event=events)
        await job.launch()
        await reach(job, "ready")
        await c.guest.pwrite(77, b"late")
        job.cancel()
        assert await job.wait() is None
        assert events.names[-1] == "BLOCK_JOB_COMPLETED"
        assert picture(c.graph) == was
        assert await content(c.base) == await c.view()

    asyncio.run(main())


@pytest.mark.parametrize("event", ["write", "flush"])
@pytest.mark.parametrize("in_pivot", [False, True])
def test_a_failing_base_fails_the_job_and_nothing_else(event: str, in_pivot: bool) -> None:
    async def main() -> None:
        c = await Chain().open()
        before, was = await c.view(), picture(c.graph)
        job = CommitJob("merge", c.graph, c.top, c.base, auto_finalize=False)
        if not in_pivot:
            c.base.fail(event)
        await job.launch()
        if in_pivot:
            await reach(job, "ready")
            job.complete()
            await reach(job, "pending")
            await c.guest.pwrite(0, before[:1])
            c.base.fail(event)
            job.finalize()
        error = await job.wait()
        assert isinstance(error, OSError)
        assert error.errno == errno.EIO
        c.base.clear_rules()
        assert picture(c.graph) == was
        assert await c.view() == before

    asyncio.run(main())


def test_a_pivot_that_the_graph_refuses_is_taken_back() -> None:
    async def main() -> None:
        c = await Chain().open()
        before, was = await c.view(), picture(c.graph)

        def refuse(change: Change) -> None:
            change.attach(c.base, "loop", c.guest.edge.role, c.top)

        job = CommitJob("merge", c.graph, c.top, c.base, auto_complete=True, pivot=refuse)
        await job.launch()
        assert isinstance(await job.wait(), GraphError)
        assert picture(c.graph) == was
        assert await c.view() == before

    asyncio.run(main())


def test_ignored_and_stopping_errors_are_tried_again() -> None:
    async def main(policy: str) -> None:
        c = await Chain().open()
        before = await c.view()
        clock = HandClock()
        c.base.fail("write", errno.ENOSPC, once=True)
        job = CommitJob("merge", c.graph, c.top, c.base, auto_complete=True, clock=clock, on_target_error=policy)
        await job.launch()
        if policy == "ignore":
            while job.status != "null":
                await clock.advance(0.2)
        else:
            await reach(job, "paused")
            assert job.io_status == "nospace"
            job.resume()
        assert await job.wait() is None
        assert await c.view() == before == await content(c.base)

    for policy in ("ignore", "stop", "enospc"):
        asyncio.run(main(policy))


def test_a_guest_that_never_stops_writing_cannot_keep_a_failover_commit_from_ending() -> None:
    async def main() -> None:
        c = await Chain().open(size=32 * MiB)
        writing = True
        model = bytearray(await c.view())

        async def write(guest: Backend) -> None:
            dice = random.Random(3)
            while writing:
                # Each pass of the job meets more than it had before: 64 scattered clusters a turn.
                for _ in range(64):
                    offset, data = dice.randrange(32 * MiB - 8), dice.randbytes(8)
                    await guest.pwrite(offset, data)
                    model[offset:offset + 8] = data
                await asyncio.sleep(0)

        writer = asyncio.create_task(write(c.guest))
        job = CommitJob("merge", c.graph, c.top, c.base, auto_complete=True)
        await job.launch()
        assert await job.wait() is None
        writing = False
        await writer
        assert c.guest.node is c.base
        assert await c.view() == model
        assert "mirror-top" not in {node.driver for node in c.graph.nodes.values()}

    asyncio.run(main())


def test_what_cannot_work_is_refused_before_anything_changes() -> None:
    async def main() -> None:
        c = await Chain().open()
        was = picture(c.graph)
        with pytest.raises(OptionError, match="base"):
            CommitJob("x", c.graph, c.base, c.top)
        with pytest.raises(OptionError):
            CommitJob("x", c.graph, c.top, c.top)
        reader = c.graph.attach_backend(c.base, "reader", READ, READ | WRITE_UNCHANGED)
        with pytest.raises(PermissionConflict, match="reader"):
            await CommitJob("x", c.graph, c.top, c.base).launch()
        await c.graph.detach_backend(reader)
        lift = c.base.block_operations("it rests")
        with pytest.raises(OperationBlocked, match="it rests"):
            await CommitJob("x", c.graph, c.top, c.base).launch()
        lift()
        assert picture(c.graph) == was

    asyncio.run(main())


class _Ops:
    write = st.tuples(st.just("write"), st.integers(0, 400 * KiB), st.integers(1, 70 * KiB), st.integers(1, 255))
    zero = st.tuples(st.just("zero"), st.integers(0, 400 * KiB), st.integers(1, 70 * KiB), st.just(0))
    turns = st.tuples(st.just("turns"), st.integers(1, 30), st.just(0), st.just(0))


@settings(max_examples=60)
@given(
    layers=st.tuples(*[st.lists(st.one_of(_Ops.write, _Ops.zero), max_size=4) for _ in range(3)]),
    during=st.lists(st.one_of(_Ops.write, _Ops.zero, _Ops.turns), max_size=12),
    mode=st.sampled_from(["background", "write-blocking"]), granularity=st.sampled_from([4096, 65536]),
    cluster=st.sampled_from([512, 4096, 65536]),
)
def test_the_view_never_changes_but_by_the_guest(layers: Any, during: Any, mode: Any, granularity: int,
                                                 cluster: int) -> None:
    size = 500 * KiB + 123

    async def apply(node: Any, model: bytearray, op: Any) -> None:
        what, offset, length, value = op
        if what == "turns":
            for _ in range(offset):
                await asyncio.sleep(0)
        elif what == "write":
            model[offset:offset + length] = bytes([value]) * length
            await node.pwrite(offset, bytes([value]) * length)
        else:
            model[offset:offset + length] = bytes(length)
            await node.write_zeroes(offset, length)

    async def main() -> None:
        graph = Graph()
        base = await graph.open({"driver": "memory", "node-name": "base", "size": size})
        await graph.open({"driver": "overlay", "node-name": "mid", "backing": "base", "cluster-size": cluster})
        top = await graph.open({"driver": "overlay", "node-name": "top", "backing": "mid", "cluster-size": cluster})
        guest = graph.attach_backend(top, "guest", READ | WRITE, READ | WRITE_UNCHANGED)
        model = bytearray(size)
        for node, ops in zip((base, graph.find("mid"), guest), layers, strict=True):
            for op in ops:
                await apply(node, model, op)
        job = CommitJob("merge", graph, top, base, copy_mode=mode, granularity=granularity, workers=2)
        await job.launch()
        for op in during:
            await apply(guest, model, op)
            assert await guest.pread(0, size) == model
        await reach(job, "ready")
        job.complete()
        assert await job.wait() is None
        assert guest.node is base
        assert await guest.pread(0, size) == model

    asyncio.run(main())
