"""Every driver that keeps data keeps the contract. To test one more: add its subject. (``null`` forgets; it is out.)"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import blockstep.drivers.nbd  # noqa: F401  registers the drivers
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.block.registry import driver_names
from blockstep.drivers.create import CreateQcow2
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server
from blockstep.testing.conformance import CHECKS, Check, Step, Subject, content_of, run, run_trace, traces
from blockstep.units import KiB
from tests.disks import ram

Open = Callable[[Graph, Path, bytes], Awaitable[Driver]]

#: What a backing node reads as.
BELOW = content_of(200 * KiB + 333)[::-1]


def over_file(**options: Any) -> Open:
    """A driver over a raw file; ``@`` in a string option stands for the directory."""

    async def open_it(graph: Graph, path: Path, content: bytes) -> Driver:
        (path / "disk").write_bytes(content)
        (path / "other").write_bytes(content)
        return await graph.open(_placed(options, path))

    return open_it


def again(**options: Any) -> Callable[[Graph, Path], Awaitable[Driver]]:
    """The same without making the files anew."""

    async def open_it(graph: Graph, path: Path) -> Driver:
        return await graph.open(_placed(options, path))

    return open_it


def _placed(options: Any, path: Path) -> Any:
    if isinstance(options, str):
        return options.replace("@", str(path))
    if isinstance(options, dict):
        return {name.replace("_", "-"): _placed(value, path) for name, value in options.items()}
    if isinstance(options, list):
        return [_placed(item, path) for item in options]
    return options


def over_backing(**options: Any) -> Open:
    """A driver over a backing node with other content; it gets its own by writing."""

    async def open_it(graph: Graph, path: Path, content: bytes) -> Driver:
        (path / "disk").write_bytes(BELOW[:len(content)])
        node = await graph.open(_placed({**options, **({"create": True} if "filename" in options else {})}, path))
        await node.pwrite(0, content)
        return node

    return open_it


async def open_memory(graph: Graph, path: Path, content: bytes) -> Driver:
    node = await graph.open({"driver": "memory", "size": len(content)})
    await node.pwrite(0, content)
    return node


async def over_window(graph: Graph, path: Path, content: bytes) -> Driver:
    """A raw node that shows a part of a file."""
    (path / "disk").write_bytes(b"x" * 1000 + content + b"x" * 1000)
    return await graph.open({"driver": "raw", "offset": 1000, "size": len(content), "file": _placed(DISK, path)})


def same_file(name: str, **options: Any) -> Subject:
    """A subject over a raw file that can be opened again."""
    return Subject(name, over_file(**options), again(**options))


async def open_ram(graph: Graph, path: Path, content: bytes) -> Driver:
    return await ram(graph, "disk", content)


def over_nbd(**options: Any) -> Subject:
    """The nbd driver over our own server, which exports a disk of another graph."""
    servers: list[Server] = []

    async def open_it(graph: Graph, path: Path, content: bytes) -> Driver:
        behind = Graph()
        disk = await ram(behind, "disk", content)
        server = Server()
        servers.append(server)
        server.add(Export("disk", behind.attach_backend(disk, "export", READ | WRITE)))
        await server.start_unix(path / "socket")
        return await graph.open({"driver": "nbd", "node-name": "nbd", "path": str(path / "socket"), "export": "disk",
                                 **options})

    async def close() -> None:
        await servers.pop().stop()

    return Subject("nbd", open_it, resizes=False, close=close)


def over_qcow2(small: int, **options: Any) -> Subject:
    """A qcow2 image over a raw file with other content; its clusters have 2 ** ``small`` bytes."""
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": "@/image"}, **options}

    async def open_it(graph: Graph, path: Path, content: bytes) -> Driver:
        (path / "disk").write_bytes(BELOW[:len(content)])
        CreateQcow2(filename=str(path / "image"), size=len(content), cluster_size=1 << small,
                    backing_file="disk", backing_fmt="raw").create()
        node = await graph.open(_placed(image, path))
        await node.pwrite(0, content)
        return node

    return Subject(f"qcow2-{small}", open_it, again(**image), below=BELOW)


DISK = {"driver": "file", "filename": "@/disk"}
OTHER = {"driver": "file", "filename": "@/other"}
OVERLAY = {"driver": "overlay", "backing": DISK}
IMAGE = {**OVERLAY, "filename": "@/overlay"}

SUBJECTS = [
    Subject("test-ram", open_ram, below=bytes(len(BELOW))),
    same_file("file", driver="file", filename="@/disk"),
    same_file("file-direct", driver="file", filename="@/disk", cache={"direct": True}),
    same_file("file-discard", driver="file", filename="@/disk", discard="unmap"),
    Subject("memory", open_memory),
    Subject("overlay-in-memory", over_backing(**OVERLAY), below=BELOW),
    Subject("overlay-spilled", over_backing(**OVERLAY, memory_limit=65536, spill_dir="@"), below=BELOW),
    Subject("overlay-in-a-file", over_backing(**IMAGE), again(**IMAGE), below=BELOW),
    Subject("overlay-of-small-clusters", over_backing(**IMAGE, cluster_size=4096), again(**IMAGE), below=BELOW),
    over_qcow2(16),
    over_qcow2(9, l2_cache_size=2048, refcount_cache_size=2048),
    same_file("raw", driver="raw", file=DISK),
    Subject("raw-window", over_window, resizes=False),
    same_file("throttle", driver="throttle", file=DISK, limits={"iops-total": 1_000_000}),
    same_file("blkdebug", driver="blkdebug", file=DISK),
    same_file("quorum-fifo", driver="quorum", children=[DISK, OTHER], vote_threshold=1, read_pattern="fifo"),
    same_file("quorum-votes", driver="quorum", children=[DISK, OTHER], vote_threshold=2),
    same_file("quorum-one", driver="quorum", children=[DISK], vote_threshold=1),
    Subject("blklog", over_file(driver="blklog", file=DISK, log=OTHER)),
    # The target is so long that the disk can grow: see the driver's truncate.
    Subject("copy-before-write", over_file(driver="copy-before-write", file=DISK,
                                           target={"driver": "memory", "size": 64 << 20})),
    over_nbd(),
]

#: Drivers without a subject of their own, and why.
LEFT_OUT = {
    "link": "its promises are about two disks; see tests/unit/replication/test_link.py",
    "host_device": "file, for block devices",
    "null": "keeps nothing",
    "null-aio": "keeps nothing",
    "null-co": "keeps nothing",
    "replication": "answers only while it replicates; see tests/unit/replication",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_driver_keeps_the_contract(subject: Subject, check: Check, tmp_path: Path) -> None:
    run(check, subject, tmp_path)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=traces(len(BELOW)))
def test_random_requests_read_as_a_model_of_plain_bytes(
    subject: Subject, tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    run_trace(subject, tmp_path_factory.mktemp("trace"), steps)


def test_every_driver_has_a_subject_or_a_reason() -> None:
    shipped = {name for name in driver_names() if not name.startswith("test-")}
    covered = {name for name in shipped if any(subject.name.startswith(name) for subject in SUBJECTS)}
    assert shipped - covered - LEFT_OUT.keys() == set()


def test_the_content_has_data_and_zeroes() -> None:
    content = content_of(200 * KiB)
    assert bytes(25 * KiB) in content
    assert len(set(content)) == 256
