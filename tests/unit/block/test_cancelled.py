"""What opens, closes or changes nodes is cancelled at each place where it waits: nothing is left behind.

The descriptors of the process tell: a file that nobody holds any more would keep its lock for ever.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest

import blockstep.drivers  # noqa: F401
from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.block.reopen import reopen
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.create import CreateQcow2
from blockstep.drivers.overlay_image import OverlayImage
from blockstep.drivers.qcow2.format import AT_INCOMPATIBLE, DIRTY
from blockstep.images.files import made_anew

SIZE = 300_000
#: The task is cancelled when a wait begins (what is waited for goes on), or when it has just ended.
When = Literal["begins", "has ended"]


class Cut:
    """Awaits ``work``, and cancels the task at its wait number ``at``, and at so many that follow."""

    def __init__(self, work: Awaitable[None], at: int, when: When, again: int = 0) -> None:
        self._work, self._waits, self._when = work, range(at, at + again + 1), when

    def __await__(self) -> Generator[Any, Any, None]:
        task = asyncio.current_task()
        assert task is not None
        steps = self._work.__await__()
        go_on: Callable[[], Any] = partial(next, steps)
        for number in count():
            try:
                waiting = go_on()
            except StopIteration:
                return
            if number in self._waits:
                if self._when == "begins" or waiting is None:
                    task.cancel()
                else:
                    waiting.add_done_callback(lambda _: task.cancel())
            try:
                yield waiting
                go_on = partial(next, steps)
            except BaseException as error:
                go_on = partial(steps.throw, error)


def descriptors() -> set[str]:
    """What the process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the directory that is listed
            pass
    return found


#: Awaits work, cut off or not; says whether it ended by itself.
Cutter = Callable[[Awaitable[None]], Awaitable[bool]]


def everywhere(scenario: Callable[[Cutter], Awaitable[None]], when: When, again: int = 0) -> None:
    """Run a scenario again and again, with the work in it cut off at each of its waits; all has to be closed then."""

    async def go(at: int) -> bool:
        ended = False

        async def cut(work: Awaitable[None]) -> bool:
            nonlocal ended
            try:
                await Cut(work, at, when, again)
                ended = True
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                while task.uncancel():
                    pass
            return ended

        before = descriptors()
        await scenario(cut)
        assert descriptors() == before
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return ended

    for at in range(1000):
        if asyncio.run(go(at)):
            assert at > 0
            return
    raise AssertionError("it never ends")


def qcow2(path: Path, name: str, **options: Any) -> None:
    CreateQcow2(filename=str(path / name), size=SIZE, cluster_size=4096, **options).create()


def file(path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path), **options}


def nodes(path: Path) -> dict[str, dict[str, Any]]:
    """Options of nodes of the kinds that hold files; the files are made."""
    (path / "raw").write_bytes(bytes(SIZE))
    qcow2(path, "plain.qcow2")
    qcow2(path, "over.qcow2", backing_file="plain.qcow2", backing_fmt="qcow2")
    qcow2(path, "data.qcow2", data_file=str(path / "data"))
    overlay = {"driver": "overlay", "filename": str(path / "overlay"), "create": True, "size": SIZE}
    children = [file(path / "raw"), {"driver": "qcow2", "file": file(path / "plain.qcow2")}]
    return {
        "file": file(path / "raw"),
        "read-only file": file(path / "raw", **{"read-only": True}),
        "raw": {"driver": "raw", "file": file(path / "raw"), "offset": 512, "size": 1024},
        "qcow2": {"driver": "qcow2", "file": file(path / "plain.qcow2")},
        "chain": {"driver": "qcow2", "file": file(path / "over.qcow2")},
        "external data": {"driver": "qcow2", "file": file(path / "data.qcow2")},
        "dirty": {"driver": "qcow2", "file": file(path / "dirty.qcow2")},
        "overlay": overlay,
        "quorum": {"driver": "quorum", "vote-threshold": 1, "children": children},
    }


@pytest.mark.parametrize("again", [0, 1, 100])
@pytest.mark.parametrize("when", ["begins", "has ended"])
@pytest.mark.parametrize("kind", ["file", "read-only file", "raw", "qcow2", "chain", "external data", "overlay",
                                  "quorum", "dirty"])
def test_an_opening_or_a_closing_that_is_cancelled_leaves_nothing_open(
        kind: str, when: When, again: int, tmp_path: Path) -> None:
    options = nodes(tmp_path)[kind]
    graph = Graph()

    async def open_and_close() -> None:
        await graph.close(await graph.open(options))

    async def scenario(cut: Cutter) -> None:
        if kind == "dirty":
            qcow2(tmp_path, "dirty.qcow2")
            with open(tmp_path / "dirty.qcow2", "r+b") as image:
                image.seek(AT_INCOMPATIBLE)
                image.write(DIRTY.to_bytes(8, "big"))
        await cut(open_and_close())
        assert not graph.everything()

    everywhere(scenario, when, again)


@pytest.mark.parametrize("when", ["begins", "has ended"])
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", ["file", "qcow2", "external data", "overlay"])
def test_a_change_of_options_that_is_cancelled_has_happened_or_has_not(
        kind: str, read_only: bool, when: When, tmp_path: Path) -> None:
    options = {**nodes(tmp_path)[kind], "node-name": "disk"}
    if options.pop("create", False):
        OverlayImage(options["filename"], writable=True, locking="off", length=SIZE, cluster_size=4096).close()

    async def scenario(cut: Cutter) -> None:
        graph = Graph()
        node = await graph.open({**options, "read-only": not read_only})
        before = descriptors()
        ended = await cut(reopen(graph, [{**options, "read-only": read_only}]))
        assert node.read_only is read_only or not ended
        user = graph.attach_backend(node, "test", READ if node.read_only else READ | WRITE)
        if not node.read_only:
            await user.pwrite(0, b"written")
        await user.pread(0, SIZE)
        await graph.detach_backend(user)
        if not ended and node.read_only is not read_only:
            assert descriptors() == before
        await graph.close(node)

    everywhere(scenario, when)


@pytest.mark.parametrize("when", ["begins", "has ended"])
def test_a_file_that_is_not_made_after_all_leaves_the_old_one_free(when: When, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")

    async def anew() -> None:
        async with made_anew(str(path)) as part:
            await asyncio.sleep(0)
            Path(part).write_bytes(b"new")

    async def scenario(cut: Cutter) -> None:
        ended = await cut(anew())
        assert path.read_bytes() == b"new" or not ended
        assert os.listdir(tmp_path) == ["image"]

    everywhere(scenario, when)


def test_a_child_that_cannot_be_closed_in_order_does_not_keep_the_others_open(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(SIZE))

    async def go() -> None:
        before = descriptors()
        graph = Graph()
        children = [{"driver": "blklog", "file": {"driver": "null-co", "size": SIZE}, "log": {
            "driver": "blkdebug", "file": {"driver": "memory", "size": 1 << 20}, "inject-error": [
                {"event": "flush_to_disk", "errno": 5}]}}, file(tmp_path / "raw")]
        node = await graph.open({"driver": "quorum", "vote-threshold": 1, "children": children})
        with pytest.raises(OSError):
            await graph.close(node)
        assert not graph.everything()
        assert descriptors() == before

    asyncio.run(go())


@pytest.mark.parametrize("cancels", [1, 3])
def test_a_closing_that_has_begun_is_done_in_order_before_it_is_cancelled(cancels: int, tmp_path: Path) -> None:
    qcow2(tmp_path, "image")

    async def go() -> None:
        graph = Graph()
        debug = await graph.open({"driver": "blkdebug", "node-name": "debug", "file": file(tmp_path / "image")})
        assert isinstance(debug, Blkdebug)
        options = {"driver": "qcow2", "node-name": "image", "file": "debug"}
        node = await graph.open(options)
        DirtyBitmap(node, "kept", persistent=True)
        debug.suspend("flush_to_disk", "slow")
        closing = asyncio.ensure_future(graph.close(node))
        await debug.suspended("slow")
        for _ in range(cancels):
            closing.cancel()
            await asyncio.sleep(0)
        assert "image" in graph.unfinished
        debug.resume("slow")
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not graph.unfinished
        node = await graph.open(options)
        assert not node.bitmaps["kept"].inconsistent
        await graph.close(node)

    asyncio.run(go())
