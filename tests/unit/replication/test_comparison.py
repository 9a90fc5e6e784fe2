"""A full sync copies what differs, whatever the two disks hold and whatever the guest does meanwhile."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockstep.drivers  # noqa: F401  (they register themselves)
from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import Driver, Extent
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.block.status import status_through
from blockstep.jobs.registry import JobRegistry
from blockstep.replication import catch_up, comparison
from blockstep.replication.catch_up import Ask, CatchUp
from blockstep.replication.comparison import CLUSTER, SIZE, Content
from blockstep.replication.link import Link

KEY = bytes(range(SIZE))
#: In the tests a disk of some clusters has several windows, and a window several pieces.
WINDOW, PIECE = 4 * CLUSTER, CLUSTER

#: What a cluster of a disk holds: nothing was ever written, zeroes were, or something.
Kind = str
HOLE, ZEROES, ONE, OTHER = "hole", "zeroes", "one", "other"


def filled(kind: Kind, index: int, length: int) -> bytes:
    if kind in (HOLE, ZEROES):
        return bytes(length)
    return (kind.encode() + b"%d" % index + bytes(60)).ljust(256, b"x") * (length // 256) + b"y" * (length % 256)


def clusters(length: int) -> list[tuple[int, int]]:
    return [(at, min(CLUSTER, length - at)) for at in range(0, length, CLUSTER)]


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "WINDOW", WINDOW)
        patch.setattr(comparison, "_PIECE", PIECE)
        yield


class Disks:
    """A guest's disk, its link, and the standby's disk."""

    def __init__(self, here: list[Kind], there: list[Kind], length: int) -> None:
        self.length = length
        self.graph, self.jobs = Graph(), JobRegistry(on_event=lambda name, data: None)
        self._kinds = {"here": here, "there": there}

    async def __aenter__(self) -> Disks:
        graph = self.graph
        for name, kinds in self._kinds.items():
            node = await graph.open({"driver": "memory", "node-name": name, "size": self.length})
            for index, (kind, (at, count)) in enumerate(zip(kinds, clusters(self.length), strict=True)):
                if kind != HOLE:
                    await node.pwrite(at, filled(kind, index, count))
        link = await graph.open({"driver": "link", "node-name": "link", "file": "here"})
        assert isinstance(link, Link)
        self.link = link
        self.guest = graph.attach_backend(link, "guest", READ | WRITE)
        self.standby = graph.attach_backend(graph.find("there"), "standby")
        self.copied = DirtyBitmap(graph.find("there"), "copied", self.length, CLUSTER)
        with graph.change() as change:
            change.attach(link, "target", Role.TARGET, graph.find("there"))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.copied.remove()
        for user in (self.guest, self.standby):
            await self.graph.detach_backend(user)
        await self.graph.close(self.link)
        for name in self._kinds:
            await self.graph.close(self.graph.find(name))

    async def sync(self, ask: Ask | None = None) -> BaseException | None:
        async def content(offset: int, length: int, key: bytes) -> Content:
            return await comparison.content(self.standby, offset, length, key)

        graph = self.graph
        job = await self.jobs.create(
            CatchUp("sync", graph, graph.find("here"), graph.find("there"), self.link, None, ask or content))
        error = await job.wait()
        if error is None:
            assert (job.current, job.total) == (job.total, job.current)
            await self.link.settle()
            assert bytes(await self.standby.pread(0, self.length)) == bytes(await self.guest.pread(0, self.length))
        return error

    def were_copied(self) -> list[int]:
        return [index for index in range(len(clusters(self.length))) if self.copied.bits[index]]


a_kind = st.sampled_from([HOLE, ZEROES, ONE, ONE, OTHER])


@st.composite
def contents(draw: st.DrawFn) -> tuple[list[Kind], list[Kind], int]:
    here = draw(st.lists(a_kind, min_size=1, max_size=40))
    there = [draw(st.one_of(st.just(kind), a_kind)) for kind in here]
    return here, there, len(here) * CLUSTER - draw(st.sampled_from([0, 1, 512, CLUSTER - 1]))


@settings(deadline=None, max_examples=60)
@given(contents())
def test_what_is_told_of_a_disk_is_what_it_holds(disk: tuple[list[Kind], list[Kind], int]) -> None:
    here, _, length = disk

    async def main() -> None:
        async with Disks(here, [HOLE] * len(here), length) as disks:
            at, told = 0, b""
            while at < length:
                content = await comparison.content(disks.guest, at, length - at, KEY)
                told += bytes(-(-content.zeroes // CLUSTER) * SIZE) + content.digests
                at += content.told(length - at)
            assert told == b"".join(
                bytes(SIZE) if kind in (HOLE, ZEROES) else
                blake2b(filled(kind, index, count), digest_size=SIZE, key=KEY).digest()
                for index, (kind, (_, count)) in enumerate(zip(here, clusters(length), strict=True)))

    asyncio.run(main())


@settings(deadline=None, max_examples=60)
@given(contents())
def test_a_sync_copies_the_clusters_that_differ_and_no_others(disk: tuple[list[Kind], list[Kind], int]) -> None:
    here, there, length = disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catch_up, "_UNSEEN", 0)

        async def main() -> None:
            async with Disks(*disk) as disks:
                assert await disks.sync() is None
                assert disks.were_copied() == [
                    index for index, (_, count) in enumerate(clusters(length))
                    if filled(here[index], index, count) != filled(there[index], index, count)]

        asyncio.run(main())


def test_where_all_differs_less_and_less_is_compared() -> None:
    asked: list[int] = []

    async def main() -> None:
        count = 400
        async with Disks([ONE] * count, [OTHER] * (count - 8) + [ONE] * 8, count * CLUSTER) as disks:
            async def ask(offset: int, length: int, key: bytes) -> Content:
                asked.append(offset)
                return await comparison.content(disks.standby, offset, length, key)

            assert await disks.sync(ask) is None
            assert len(disks.were_copied()) >= count - 8

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catch_up, "_UNSEEN", 16 * WINDOW)
        asyncio.run(main())
    steps = [(after - before) // WINDOW for before, after in pairwise(asked)]
    assert steps[:7] == [1, 2, 3, 5, 9, 17, 17]


@pytest.mark.parametrize("when", ["asked", "looked"])
def test_what_the_guest_writes_while_its_disk_is_compared_is_copied(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the standby is asked, and in the moment in which a cluster has been looked at and found to be the same."""
    async def main() -> None:
        async with Disks([ONE] * 12, [ONE] * 12, 12 * CLUSTER) as disks:
            async def write(offset: int, length: int) -> None:
                for at in range(offset, offset + length, CLUSTER):
                    await disks.guest.pwrite(at + 77, b"written meanwhile")

            async def ask(offset: int, length: int, key: bytes) -> Content:
                content = await comparison.content(disks.standby, offset, length, key)
                if when == "asked":
                    await write(offset, content.told(length))
                return content

            look = comparison.digests

            async def look_and_write(user: Backend, offset: int, length: int, key: bytes) -> bytes:
                digests = await look(user, offset, length, key)
                if when == "looked" and user is not disks.standby:
                    await write(offset, length)
                return digests

            monkeypatch.setattr(comparison, "digests", look_and_write)
            assert await disks.sync(ask) is None
            assert disks.were_copied() == list(range(12))

    asyncio.run(main())


def test_while_a_part_is_looked_at_nothing_is_missing_in_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        count = 24
        async with Disks([ONE] * count, [HOLE] * 8 + [OTHER] * 4 + [ONE] * 12, count * CLUSTER - 1) as disks:
            seen: list[tuple[int, int]] = []

            def watched(look: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
                async def run(user: Backend, *args: Any) -> Any:
                    seen.extend((job.current, job.total) for job in disks.jobs.list())
                    return await look(user, *args)
                return run

            monkeypatch.setattr(comparison, "data", watched(comparison.data))
            monkeypatch.setattr(comparison, "digests", watched(comparison.digests))
            assert await disks.sync() is None
            assert {total for _, total in seen} == {disks.length}
            assert sorted(seen) == seen
            assert seen[-1][0] > 0

    asyncio.run(main())


def test_the_status_of_a_long_range_is_asked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In how many extents it is nobody knows before."""
    most, asked = 8 * CLUSTER, []

    async def status(node: Driver, offset: int, length: int) -> list[Extent]:
        asked.append(length)
        return await status_through(node, offset, length)

    async def main() -> None:
        count = 1000
        async with Disks([HOLE] * (count - 1) + [ONE], [HOLE] * count, count * CLUSTER) as disks:
            monkeypatch.setattr(comparison, "STATUS", most)
            monkeypatch.setattr(comparison, "status_through", status)
            assert await disks.sync() is None
            assert disks.were_copied() == [count - 1]
            assert max(asked) == most

    asyncio.run(main())


async def says_nothing(offset: int, length: int, key: bytes) -> Content | None:
    return None


async def says_nothing_of_the_rest(offset: int, length: int, key: bytes) -> Content | None:
    return Content(WINDOW, b"") if offset < WINDOW else None


@pytest.mark.parametrize(("ask", "copied"), [(says_nothing, 12), (says_nothing_of_the_rest, 12 - 4)])
def test_what_a_standby_cannot_say_is_copied(ask: Ask, copied: int) -> None:
    async def main() -> None:
        async with Disks([HOLE] * 4 + [ONE] * 8, [HOLE] * 4 + [ONE] * 8, 12 * CLUSTER) as disks:
            assert await disks.sync(ask) is None
            assert len(disks.were_copied()) == copied

    asyncio.run(main())


def test_a_disk_that_cannot_be_read_to_compare_it_is_named() -> None:
    async def main() -> None:
        async with Disks([ONE] * 4, [ONE] * 4, 4 * CLUSTER) as disks:
            async def broken(offset: int, length: int) -> bytes:
                raise OSError(errno.EIO, "bad sector")

            disks.graph.find("here").pread = broken  # type: ignore[method-assign]
            error = await disks.sync()
            assert "disk 'link' of this side: bad sector" in str(error)

    asyncio.run(main())


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), ValueError("a bug")])
@pytest.mark.parametrize("late", [False, True])
def test_an_error_on_the_way_ends_the_sync(error: Exception, late: bool) -> None:
    async def main() -> None:
        async with Disks([ONE] * 12, [ONE] * 12, 12 * CLUSTER) as disks:
            async def ask(offset: int, length: int, key: bytes) -> Content:
                if late and not offset:
                    return await comparison.content(disks.standby, offset, length, key)
                raise error

            assert await disks.sync(ask) is error

    asyncio.run(main())


@pytest.mark.parametrize(("content", "length"), [
    (Content(0, b""), CLUSTER), (Content(-CLUSTER, b""), CLUSTER), (Content(CLUSTER + 1, b""), 2 * CLUSTER),
    (Content(2 * CLUSTER, b""), CLUSTER), (Content(0, bytes(SIZE + 1)), 2 * CLUSTER),
    (Content(-CLUSTER, bytes(2 * SIZE)), 9), (Content(0, bytes(2 * SIZE)), CLUSTER),
])
def test_what_is_no_answer_is_refused(content: Content, length: int) -> None:
    with pytest.raises(ValueError, match="bytes of zeroes"):
        content.told(length)


@pytest.mark.parametrize(("content", "length", "told"), [
    (Content(7, b""), 7, 7), (Content(CLUSTER, b""), 2 * CLUSTER, CLUSTER), (Content(0, bytes(SIZE)), 7, 7),
    (Content(CLUSTER, bytes(SIZE)), CLUSTER + 1, CLUSTER + 1),
])
def test_how_much_an_answer_tells(content: Content, length: int, told: int) -> None:
    assert content.told(length) == told
