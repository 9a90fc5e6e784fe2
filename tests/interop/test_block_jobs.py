"""One script of QMP commands, run by qemu-storage-daemon and by ours: the same answers, error classes and events.

What may differ is left out of the comparison: progress in bytes, sentences of errors, the states in which QEMU's jobs
stand still for a moment while it drains (paused and running again), and its jobs that could not be created but were
announced. Events are compared job by job, since two jobs at work have no common order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.qmp.client import Connection, connect
from blockstep.qmp.errors import CommandRefused
from tests.daemon import daemon
from tests.peers import need, run, started
from tests.scenarios import scenario

pytestmark = pytest.mark.interop

MiB = 1 << 20
#: More than a job copies at once, so that one with a low speed limit stands still in the middle.
SIZE = 4 * MiB
SLOW = 1000

#: Members of results and events that say how far a job is.
PROGRESS = {"len", "offset", "current-progress", "total-progress", "busy"}


class Peer:
    """A daemon that runs a script. ``log`` is what is compared."""

    def __init__(self, directory: Path, client: Connection, overlay: str) -> None:
        self.directory, self.client, self.overlay_driver = directory, client, overlay
        self.log: list[tuple[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._came = asyncio.Event()

    async def listen(self) -> None:
        async for event in self.client.events():
            self.events.append(event)
            self._came.set()

    async def setup(self, command: str, **arguments: Any) -> Any:
        """A command that is not compared. Underscores stand for hyphens."""
        return await self.client.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def do(self, command: str, **arguments: Any) -> None:
        """A command whose result, or class of error, is compared."""
        line = f"{command} {arguments}".replace(str(self.directory), "DIRECTORY")
        try:
            result = await self.setup(command, **arguments)
        except CommandRefused as error:
            self.log.append((line, error.error_class))
        else:
            self.log.append((line, without_progress(result)))

    async def until(self, job: str, status: str) -> None:
        """Wait for the next time that a job enters a state."""
        count = sum(is_status(event, job, status) for event in self.seen)
        async with asyncio.timeout(20):
            while sum(is_status(event, job, status) for event in self.events) <= count:
                self._came.clear()
                await self._came.wait()
        self.seen = self.events[:]

    seen: list[dict[str, Any]] = []  # noqa: RUF012 - replaced, never changed

    async def rests(self, job: str) -> None:
        """Wait until a job stands still. It is asked, since events of QEMU also say so where it only drains."""
        async with asyncio.timeout(20):
            while not any(shown["id"] == job and shown["status"] in ("paused", "standby")
                          for shown in await self.setup("query-jobs")):
                pass

    async def disk(self, name: str, size: int = SIZE, content: bytes = b"x") -> None:
        """A node over a file."""
        path = self.directory / f"{name}.img"
        path.write_bytes(content * (size // len(content)))
        await self.setup("blockdev-add", driver="file", node_name=name, filename=str(path))

    async def overlay(self, name: str, backing: str | None = None, size: int = SIZE) -> None:
        """A node over an empty overlay, in the peer's own format."""
        path = self.directory / f"{name}.overlay"
        if self.overlay_driver == "qcow2":
            run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
            where: dict[str, Any] = {"file": {"driver": "file", "filename": str(path)}}
        else:
            where = {"size": size}
        await self.setup("blockdev-add", driver=self.overlay_driver, node_name=name, backing=backing, **where)

    async def faulty(self, name: str, image: str, code: int, *, once: bool = False) -> None:
        """A node over ``image`` whose writes fail."""
        await self.setup("blockdev-add", driver="blkdebug", node_name=name, image=image, inject_error=[
            {"event": "none", "iotype": "write", "errno": code, "once": once, "immediately": True},
        ])

    @property
    def stories(self) -> dict[str, list[Any]]:
        """The events of each job."""
        stories: dict[str, list[Any]] = {}
        for event in self.events:
            data = without_progress(event["data"])
            job = data.get("device", data.get("id"))
            if event["event"] == "JOB_STATUS_CHANGE":
                told: Any = data["status"]
                awake = told in ("running", "ready") and told in stories.get(job, ())
                if told in ("paused", "standby") or awake:
                    continue
            else:
                told = (event["event"], data)
            stories.setdefault(job, []).append(told)
        return {job: story for job, story in stories.items() if story != ["created", "null"]}


def is_status(event: dict[str, Any], job: str, status: str) -> bool:
    return event["event"] == "JOB_STATUS_CHANGE" and event["data"] == {"id": job, "status": status}


def without_progress(result: Any) -> Any:
    if isinstance(result, list):
        return sorted((without_progress(item) for item in result), key=lambda item: str(sorted(item.items())))
    if isinstance(result, dict):
        return {name: bool(value) if name == "error" else value
                for name, value in result.items() if name not in PROGRESS}
    return result


@asynccontextmanager
async def ours(directory: Path) -> AsyncIterator[Peer]:
    directory.mkdir()
    async with daemon(directory) as running:
        yield Peer(directory, running.client, "overlay")


@asynccontextmanager
async def qemus(directory: Path) -> AsyncIterator[Peer]:
    directory.mkdir()
    path = directory / "qmp.sock"
    pid = directory / "pid"
    words: list[str | Path] = [
        "qemu-storage-daemon", "--chardev", f"socket,id=monitor,path={path},server=on,wait=off",
        "--monitor", "chardev=monitor", "--pidfile", pid]
    with started(words):
        # It serves one connection at a time, so nobody may just try whether it listens; its pid comes after that.
        async with asyncio.timeout(20):
            while not pid.exists():  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.002)
        async with connect(path, timeout=20) as client:
            yield Peer(directory, client, "qcow2")


Script = Callable[[Peer], Awaitable[None]]
scripts: list[Script] = []


def script(run: Script) -> Script:
    scripts.append(run)
    return run


# --- scripts ---


@script
async def unknown_jobs(peer: Peer) -> None:
    for verb in ("pause", "resume", "cancel", "complete"):
        await peer.do(f"block-job-{verb}", device="nope")
        await peer.do(f"job-{verb}", id="nope")
    for verb in ("finalize", "dismiss"):
        await peer.do(f"block-job-{verb}", id="nope")
        await peer.do(f"job-{verb}", id="nope")
    await peer.do("block-job-set-speed", device="nope", speed=1)
    await peer.do("query-jobs")
    await peer.do("query-block-jobs")


@script
async def arguments_of_backup(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.disk("short", MiB)
    await peer.setup("block-dirty-bitmap-add", node="a", name="map")
    good = {"job_id": "job", "device": "a", "target": "b", "sync": "full"}
    for wrong in (
        {"device": "nope"}, {"target": "nope"}, {"target": "a"}, {"target": "short"}, {"job_id": ""}, {"job_id": "9"},
        {"sync": "some"}, {"speed": "fast"}, {"on_source_error": "panic"}, {"compress": True}, {"wrong": 1},
        {"filter_node_name": "a"}, {"filter_node_name": "9"},
        {"sync": "bitmap"}, {"sync": "incremental"}, {"bitmap_mode": "always"},
        {"sync": "bitmap", "bitmap": "map"}, {"sync": "bitmap", "bitmap": "nope", "bitmap_mode": "always"},
        {"sync": "incremental", "bitmap": "map", "bitmap_mode": "always"},
        {"bitmap": "map"}, {"bitmap": "map", "bitmap_mode": "never"},
        {"sync": "top", "bitmap": "map", "bitmap_mode": "never"},
        {"sync": "none", "bitmap": "map", "bitmap_mode": "always"},
    ):
        await peer.do("blockdev-backup", **{**good, **wrong})
    await peer.do("blockdev-backup", device="a")
    await peer.do("query-jobs")


@script
async def a_backup_by_itself(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.do("blockdev-backup", job_id="job", device="a", target="b", sync="full")
    await peer.until("job", "null")
    await peer.do("query-jobs")
    await peer.do("blockdev-backup", job_id="job", device="a", target="b", sync="top")
    await peer.until("job", "null")


@script
async def a_backup_step_by_step(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.disk("c")
    await peer.do("blockdev-backup", job_id="job", device="a", target="b", sync="full", auto_finalize=False,
                  auto_dismiss=False)
    await peer.until("job", "pending")
    await peer.do("query-jobs")
    await peer.do("query-block-jobs")
    for command in ("job-pause", "job-resume", "job-complete", "job-dismiss"):
        await peer.do(command, id="job")
    for command in ("block-job-pause", "block-job-resume", "block-job-complete"):
        await peer.do(command, device="job")
    await peer.do("block-job-set-speed", device="job", speed=5)
    await peer.do("blockdev-backup", job_id="job", device="c", target="b", sync="full")
    await peer.do("blockdev-backup", job_id="other", device="c", target="b", sync="full")
    await peer.do("blockdev-backup", job_id="other", device="b", target="c", sync="full")
    await peer.do("blockdev-mirror", job_id="other", device="c", target="b", sync="full")
    await peer.do("blockdev-del", node_name="b")
    await peer.do("job-finalize", id="job")
    await peer.do("query-jobs")
    await peer.do("query-block-jobs")
    for command in ("job-pause", "job-resume", "job-complete", "job-cancel", "job-finalize"):
        await peer.do(command, id="job")
    await peer.do("job-dismiss", id="job")
    await peer.do("query-jobs")
    await peer.do("blockdev-del", node_name="b")


@script
async def a_slow_backup_is_paused_and_cancelled(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    for dismiss in (True, False):
        await peer.do("blockdev-backup", job_id="job", device="a", target="b", sync="full", speed=SLOW,
                      auto_dismiss=dismiss)
        await peer.do("job-pause", id="job")
        await peer.rests("job")
        await peer.do("job-pause", id="job")
        await peer.do("query-jobs")
        await peer.do("query-block-jobs")
        await peer.do("block-job-resume", device="job")
        await peer.do("block-job-resume", device="job")
        await peer.do("query-block-jobs")
        for command in ("job-complete", "job-finalize", "job-dismiss", "job-resume"):
            await peer.do(command, id="job")
        await peer.do("block-job-set-speed", device="job", speed=-1)
        await peer.do("block-job-set-speed", device="job", speed=2 * SLOW)
        await peer.do("block-job-pause", device="job")
        await peer.do("block-job-cancel", device="job")
        if dismiss:
            await peer.do("block-job-cancel", device="job", force=True)
            await peer.until("job", "null")
        else:
            await peer.do("job-cancel", id="job")
            await peer.until("job", "concluded")
            await peer.do("query-jobs")
            await peer.do("query-block-jobs")
            await peer.do("block-job-dismiss", id="job")


@script
async def a_backup_of_nothing_runs_until_it_is_cancelled(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.do("blockdev-backup", job_id="job", device="a", target="b", sync="none", filter_node_name="filter")
    await peer.do("query-block-jobs")
    await peer.do("blockdev-del", node_name="filter")
    await peer.do("blockdev-del", node_name="a")
    await peer.setup("nbd-server-start", addr={"type": "unix", "data": {"path": str(peer.directory / "nbd")}})
    await peer.do("block-export-add", type="nbd", id="past", node_name="a", writable=True)
    await peer.do("block-export-add", type="nbd", id="over", node_name="filter", writable=True)
    await peer.do("block-export-add", type="nbd", id="target", node_name="b")
    await peer.do("block_resize", node_name="a", size=2 * SIZE)
    await peer.do("job-complete", id="job")
    await peer.do("block-job-cancel", device="job")
    await peer.until("job", "null")
    await peer.do("query-block-exports")
    await peer.do("blockdev-del", node_name="a")


@script
async def errors_of_a_target(peer: Peer) -> None:
    for number, (policy, code) in enumerate([("report", 5), ("report", 28), ("enospc", 5), ("enospc", 28),
                                             ("auto", 28), ("stop", 5), ("ignore", 5)]):
        job, stops = f"job{number}", policy == "stop" or (policy in ("enospc", "auto") and code == 28)
        await peer.disk(f"a{number}", MiB)
        await peer.disk(f"b{number}", MiB, b"y")
        await peer.faulty(f"bad{number}", f"b{number}", code, once=policy != "report")
        await peer.do("blockdev-backup", job_id=job, device=f"a{number}", target=f"bad{number}", sync="full",
                      on_target_error=policy, auto_dismiss=False, x_perf={"max-workers": 1})
        if stops:
            await peer.rests(job)
            await peer.do("query-block-jobs")
            await peer.do("block-job-resume", device=job)
        await peer.until(job, "concluded")
        await peer.do("query-jobs")
        await peer.do("job-dismiss", id=job)


@script
async def arguments_of_mirror(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    good = {"job_id": "job", "device": "a", "target": "b", "sync": "full"}
    for wrong in (
        {"device": "nope"}, {"target": "nope"}, {"target": "a"}, {"job_id": ""}, {"job_id": "9"},
        {"sync": "incremental"}, {"sync": "bitmap"}, {"copy_mode": "some"}, {"granularity": 100}, {"granularity": 768},
        {"granularity": 1 << 27}, {"buf_size": -1}, {"replaces": "nope"}, {"replaces": "b"}, {"on_target_error": "no"},
        {"filter_node_name": "b"}, {"filter_node_name": "9"}, {"unmap": True},
    ):
        await peer.do("blockdev-mirror", **{**good, **wrong})
    await peer.do("query-jobs")


@script
async def a_mirror_is_completed(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.do("blockdev-mirror", job_id="job", device="a", target="b", sync="full", copy_mode="write-blocking",
                  granularity=65536, buf_size=65536, filter_node_name="filter")
    await peer.until("job", "ready")
    await peer.do("query-jobs")
    await peer.do("query-block-jobs")
    await peer.do("blockdev-del", node_name="filter")
    await peer.do("blockdev-del", node_name="a")
    await peer.do("job-dismiss", id="job")
    await peer.do("block-job-pause", device="job")
    await peer.rests("job")
    await peer.do("query-jobs")
    await peer.do("block-job-complete", device="job")
    await peer.do("block-job-cancel", device="job")
    await peer.do("query-jobs")
    await peer.do("job-resume", id="job")
    await peer.until("job", "null")
    await peer.do("query-jobs")
    await peer.do("blockdev-del", node_name="a")
    await peer.do("blockdev-del", node_name="b")


@script
async def a_mirror_ends_softly_or_not(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    for sync in ("full", "top", "none"):
        await peer.do("blockdev-mirror", job_id="job", device="a", target="b", sync=sync)
        await peer.until("job", "ready")
        await peer.do("query-block-jobs")
        await peer.do("block-job-cancel", device="job")
        await peer.until("job", "null")
        await peer.do("blockdev-mirror", job_id="job", device="a", target="b", sync=sync)
        await peer.until("job", "ready")
        await peer.do("job-cancel", id="job")
        await peer.until("job", "null")
    await peer.do("query-jobs")


@script
async def a_mirror_step_by_step(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    for end in ("finalize", "cancel"):
        await peer.do("blockdev-mirror", job_id="job", device="a", target="b", sync="full", auto_finalize=False,
                      auto_dismiss=False)
        await peer.until("job", "ready")
        await peer.do("block-job-complete", device="job")
        await peer.until("job", "pending")
        await peer.do("block-job-complete", device="job")
        await peer.do("query-jobs")
        await peer.do(f"job-{end}", id="job")
        if end == "cancel":
            await peer.until("job", "concluded")
        await peer.do("query-jobs")
        await peer.do("block-job-dismiss", id="job")
        await peer.setup("blockdev-del", node_name="b")
        await peer.disk("b")
        await peer.setup("blockdev-del", node_name="a")
        await peer.disk("a")


@script
async def a_mirror_is_cancelled_before_it_is_ready(peer: Peer) -> None:
    await peer.disk("a", 64 * MiB)
    await peer.disk("b", 64 * MiB)
    await peer.do("blockdev-mirror", job_id="job", device="a", target="b", sync="full", speed=SLOW)
    await peer.do("job-complete", id="job")
    await peer.do("block-job-cancel", device="job")
    await peer.until("job", "null")


@script
async def others_use_the_ends_of_a_mirror(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.disk("c")
    await peer.overlay("top")
    await peer.setup("nbd-server-start", addr={"type": "unix", "data": {"path": str(peer.directory / "nbd")}})
    await peer.do("blockdev-mirror", job_id="job", device="a", target="b", sync="full")
    await peer.until("job", "ready")
    await peer.do("block-export-add", type="nbd", id="source", node_name="a", writable=True)
    await peer.do("block-export-add", type="nbd", id="target", node_name="b", writable=True)
    await peer.do("block_resize", node_name="a", size=2 * SIZE)
    await peer.do("block_resize", node_name="b", size=2 * SIZE)
    await peer.do("blockdev-snapshot", node="a", overlay="top")
    await peer.do("blockdev-mirror", job_id="more", device="a", target="c", sync="none")
    await peer.do("blockdev-backup", job_id="more", device="a", target="c", sync="none")
    await peer.do("block-dirty-bitmap-add", node="a", name="map")
    await peer.do("blockdev-reopen", options=[{"driver": "file", "node-name": "b", "read-only": True,
                                               "filename": str(peer.directory / "b.img")}])
    await peer.do("job-cancel", id="job")
    await peer.until("job", "null")
    await peer.do("query-block-exports")


@script
async def a_target_that_is_read_only(peer: Peer) -> None:
    await peer.disk("a")
    path = peer.directory / "b.img"
    path.write_bytes(bytes(SIZE))
    await peer.setup("blockdev-add", driver="file", node_name="b", read_only=True, filename=str(path))
    await peer.do("blockdev-mirror", job_id="mirror", device="a", target="b", sync="full")
    await peer.do("blockdev-backup", job_id="backup", device="a", target="b", sync="full")
    await peer.do("query-jobs")
    await peer.do("blockdev-del", node_name="a")
    await peer.do("blockdev-del", node_name="b")


@script
async def arguments_of_commit(peer: Peer) -> None:
    await peer.overlay("base")
    await peer.overlay("mid", "base")
    await peer.overlay("top", "mid")
    await peer.overlay("other")
    good = {"job_id": "job", "device": "top"}
    for wrong in (
        {"device": "nope"}, {"device": "other"}, {"device": "mid"}, {"job_id": "9"}, {"base_node": "nope"},
        {"base_node": "other"}, {"base_node": "top"}, {"top_node": "nope"}, {"top_node": "other"}, {"top_node": "base"},
        {"top_node": "mid", "base_node": "mid"}, {"top_node": "mid", "base_node": "top"}, {"backing_file": "x"},
        {"top_node": "top", "top": "x"}, {"base_node": "base", "base": "x"}, {"base": "nope"}, {"top": "nope"},
        {"speed": "x"}, {"on_error": "no"}, {"filter_node_name": "base"},
    ):
        await peer.do("block-commit", **{**good, **wrong})
    await peer.do("query-jobs")


@script
async def a_layer_in_the_middle_is_committed(peer: Peer) -> None:
    await peer.overlay("base")
    await peer.overlay("mid", "base")
    await peer.overlay("top", "mid")
    await peer.do("block-commit", job_id="job", device="top", top_node="mid", base_node="base")
    await peer.until("job", "null")
    await peer.do("blockdev-del", node_name="mid")
    await peer.do("blockdev-del", node_name="base")


@script
async def the_active_layer_is_committed(peer: Peer) -> None:
    await peer.overlay("base")
    await peer.overlay("top", "base")
    for verb, more in (("block-job-cancel", {}), ("block-job-cancel", {"force": True}), ("block-job-complete", {})):
        await peer.do("block-commit", job_id="job", device="top", auto_dismiss=False, **more and {"speed": 0})
        await peer.until("job", "ready")
        await peer.do("query-block-jobs")
        await peer.do(verb, device="job", **more)
        await peer.until("job", "concluded")
        await peer.do("query-jobs")
        await peer.do("job-dismiss", id="job")
    await peer.do("blockdev-del", node_name="base")


@script
async def snapshots(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.overlay("snap")
    await peer.overlay("snap2")
    await peer.setup("nbd-server-start", addr={"type": "unix", "data": {"path": str(peer.directory / "nbd")}})
    await peer.setup("block-export-add", type="nbd", id="export", node_name="a", name="a", writable=True)
    for node, overlay in (("nope", "snap"), ("a", "nope"), ("a", "a"), ("a", "b"), ("snap", "snap"), ("a", "snap"),
                          ("a", "snap"), ("a", "snap2"), ("snap", "a"), ("b", "snap"), ("snap", "snap2")):
        await peer.do("blockdev-snapshot", node=node, overlay=overlay)
        await peer.do("query-block-exports")
    await peer.do("blockdev-del", node_name="a")


@script
async def bitmaps(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b", MiB)
    good = {"node": "a", "name": "map"}
    for wrong in (
        {"node": "nope"}, {"name": ""}, {"name": "x" * 1024}, {"granularity": 0}, {"granularity": 256},
        {"granularity": 513}, {"granularity": -512}, {"granularity": 1 << 32}, {"persistent": True}, {"wrong": 1},
        {}, {}, {"name": "fine", "granularity": 512}, {"name": "off", "disabled": True}, {"name": "x" * 1023},
    ):
        await peer.do("block-dirty-bitmap-add", **{**good, **wrong})
    for verb in ("clear", "enable", "disable", "remove"):
        for wrong in ({"node": "nope"}, {"name": "nope"}, {}, {}):
            await peer.do(f"block-dirty-bitmap-{verb}", **{**good, **wrong})
    await peer.do("block-dirty-bitmap-add", node="b", name="short")
    await peer.do("block-dirty-bitmap-add", **good)
    for bitmaps in (["nope"], ["fine", "nope"], ["fine"], ["fine", "off", "map"], [{"node": "a", "name": "off"}],
                    [{"node": "b", "name": "short"}], [{"node": "nope", "name": "short"}], [{"node": "a"}], "fine"):
        await peer.do("block-dirty-bitmap-merge", node="a", target="map", bitmaps=bitmaps)
    await peer.do("block-dirty-bitmap-merge", node="a", target="nope", bitmaps=["map"])
    await peer.do("block-dirty-bitmap-merge", node="nope", target="map", bitmaps=["map"])


@script
async def a_bitmap_in_use(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.disk("c")
    for name in ("map", "other"):
        await peer.setup("block-dirty-bitmap-add", node="a", name=name)
    backup = {"job_id": "job", "device": "a", "target": "b", "sync": "full", "bitmap": "map", "bitmap_mode": "always"}
    await peer.do("blockdev-backup", **backup, speed=SLOW)
    for verb in ("clear", "enable", "disable", "remove"):
        await peer.do(f"block-dirty-bitmap-{verb}", node="a", name="map")
    await peer.do("block-dirty-bitmap-merge", node="a", target="map", bitmaps=["other"])
    await peer.do("block-dirty-bitmap-merge", node="a", target="other", bitmaps=["map"])
    await peer.do("blockdev-backup", **{**backup, "job_id": "second", "target": "c"})
    await peer.do("job-cancel", id="job")
    await peer.until("job", "null")
    await peer.do("block-dirty-bitmap-remove", node="a", name="map")


@script
async def backups_by_bitmap(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.setup("block-dirty-bitmap-add", node="a", name="map")
    await peer.setup("block-dirty-bitmap-add", node="a", name="off", disabled=True)
    for number, options in enumerate((
        {"sync": "incremental", "bitmap": "map"}, {"sync": "incremental", "bitmap": "off", "bitmap_mode": "on-success"},
        {"sync": "bitmap", "bitmap": "map", "bitmap_mode": "never"},
        {"sync": "bitmap", "bitmap": "off", "bitmap_mode": "always"},
        {"sync": "full", "bitmap": "map", "bitmap_mode": "on-success"},
        {"sync": "top", "bitmap": "map", "bitmap_mode": "always"},
    )):
        await peer.do("blockdev-backup", job_id=f"job{number}", device="a", target="b", auto_dismiss=False, **options)
        await peer.until(f"job{number}", "concluded")
        await peer.do("job-dismiss", id=f"job{number}")
    await peer.do("query-jobs")


def backup(job: str, device: str, target: str, **more: Any) -> dict[str, Any]:
    data = {"job-id": job, "device": device, "target": target, "sync": "full", **more}
    return {"type": "blockdev-backup", "data": data}


def change(verb: str, **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": data}


ABORT: dict[str, Any] = {"type": "abort", "data": {}}
GROUPED = {"completion-mode": "grouped"}


@script
async def transactions_of_bitmaps(peer: Peer) -> None:
    await peer.disk("a")
    add = change("add", node="a", name="map")
    for actions in (
        [], [ABORT], [{"type": "nope", "data": {}}], [add, add], [add, ABORT],
        [add, change("disable", node="a", name="map")],
        [change("enable", node="a", name="map"), ABORT],
        [change("remove", node="a", name="map"), ABORT], [change("remove", node="a", name="map"), add],
        [change("remove", node="a", name="map"), change("clear", node="a", name="map")],
        [change("add", node="a", name="b"), change("merge", node="a", target="b", bitmaps=["map"]),
         change("clear", node="a", name="map"), change("remove", node="a", name="map")],
        [change("merge", node="a", target="b", bitmaps=["nope"])], [change("add", node="a")],
        [change("clear", node="a", name="b", more=1)], [{"type": "drive-backup", "data": {}}],
    ):
        await peer.do("transaction", actions=actions)
        for name in ("map", "b"):
            await peer.do("block-dirty-bitmap-clear", node="a", name=name)
    await peer.do("transaction", actions=[change("clear", node="a", name="b")], properties=GROUPED)
    await peer.do("transaction", actions=[], properties={"completion-mode": "nope"})
    await peer.do("transaction", actions=[], properties=GROUPED)


@script
async def a_transaction_that_fails_leaves_nothing(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.disk("c")
    await peer.overlay("snap")
    add = change("add", node="a", name="map")
    snapshot = {"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "snap"}}
    for number, (actions, properties) in enumerate((
        ([backup("J", "a", "b"), ABORT], {}), ([backup("J", "a", "b"), ABORT], GROUPED),
        ([backup("J", "a", "b"), backup("J", "a", "c")], {}), ([backup("J", "a", "b"), backup("K", "a", "b")], {}),
        ([add, backup("J", "a", "b"), backup("K", "nope", "b")], {}), ([backup("J", "a", "b"), add], GROUPED),
        ([add, snapshot, ABORT], {}), ([snapshot, snapshot], {}), ([snapshot], GROUPED),
        ([add, backup("J", "a", "b", sync="incremental", bitmap="map"),
          change("clear", node="a", name="map")], {}),
    )):
        for action in actions:
            if action["type"] == "blockdev-backup":
                action["data"]["job-id"] = action["data"]["job-id"][0] + str(number)
        await peer.do("transaction", actions=actions, properties=properties)
        await peer.do("query-jobs")
        await peer.do("block-dirty-bitmap-clear", node="a", name="map")
    for name in "abc":
        await peer.do("blockdev-del", node_name=name)
    await peer.do("blockdev-del", node_name="snap")


@script
async def transactions_of_backups(peer: Peer) -> None:
    for name in "abcd":
        await peer.disk(name)
    slow = {"speed": SLOW}
    await peer.do("transaction", actions=[backup("one", "a", "b"), backup("two", "a", "c")])
    await peer.until("one", "null")
    if not any(is_status(event, "two", "null") for event in peer.seen):
        await peer.until("two", "null")
    await peer.do("transaction", actions=[backup("three", "a", "b", **{"auto-finalize": False}),
                                          backup("four", "c", "d")], properties=GROUPED)
    await peer.until("three", "pending")
    await peer.do("query-jobs")
    await peer.do("job-finalize", id="four")
    await peer.do("query-jobs")
    await peer.do("transaction", actions=[backup("five", "a", "b"), backup("six", "c", "d", **slow)],
                  properties=GROUPED)
    await peer.until("five", "waiting")
    await peer.do("query-jobs")
    await peer.do("job-cancel", id="six")
    await peer.until("five", "null")
    await peer.do("transaction", actions=[backup("seven", "a", "b"), backup("eight", "c", "d", **slow)])
    await peer.until("seven", "null")
    await peer.do("query-jobs")
    await peer.do("job-cancel", id="eight")
    await peer.until("eight", "null")
    await peer.do("query-jobs")


@script
async def snapshots_and_a_backup_of_one_moment(peer: Peer) -> None:
    await peer.disk("a")
    await peer.disk("b")
    await peer.overlay("snap")
    await peer.do("transaction", actions=[
        {"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "snap"}}, change("add", node="snap", name="map"),
        backup("job", "snap", "b")])
    await peer.until("job", "null")
    await peer.do("block-dirty-bitmap-clear", node="snap", name="map")
    await peer.do("blockdev-del", node_name="a")


@pytest.mark.parametrize("play", scripts, ids=lambda play: play.__name__)
def test_both_programs_answer_alike(play: Script, tmp_path: Path) -> None:
    need("qemu-storage-daemon", "qemu-img")

    @scenario
    async def main() -> None:
        peers = []
        for start, name in ((qemus, "qemu"), (ours, "ours")):
            async with start(tmp_path / name) as peer:
                listening = asyncio.ensure_future(peer.listen())
                await asyncio.sleep(0)
                await play(peer)
                listening.cancel()
                peers.append(peer)
        qemu, mine = peers
        assert mine.log == qemu.log
        assert mine.stories == qemu.stories

    main()
