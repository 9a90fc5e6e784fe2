"""Every driver that keeps data keeps the contract. To test one more: add its subject. (``null`` forgets; it is out.)"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blockstep.drivers.nbd  # noqa: F401  registers the drivers
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.block.registry import driver_names
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server
from blockstep.testing.conformance import CHECKS, Check, Subject, content_of, run, run_trace, traces
from tests.disks import ram

Open = Callable[[Graph, Path, bytes], Awaitable[Driver]]

ALIGNED = 200 * 1024


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


def filled(**options: Any) -> Open:
    """A driver that begins empty, and gets its content by writing."""

    async def open_it(graph: Graph, path: Path, content: bytes) -> Driver:
        node = await graph.open(_placed({"size": len(content), **options}, path))
        await node.pwrite(0, content)
        return node

    return open_it


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


DISK = {"driver": "file", "filename": "@/disk"}
OTHER = {"driver": "file", "filename": "@/other"}

SUBJECTS = [
    Subject("test-ram", open_ram, below=bytes(200 * 1024 + 333)),
    same_file("file", driver="file", filename="@/disk"),
    same_file("file-direct", driver="file", filename="@/disk", cache={"direct": True}),
    same_file("file-discard", driver="file", filename="@/disk", discard="unmap"),
    same_file("throttle", driver="throttle", file=DISK, limits={"iops-total": 1_000_000}),
    same_file("blkdebug", driver="blkdebug", file=DISK),
    same_file("quorum-fifo", driver="quorum", children=[DISK, OTHER], vote_threshold=1, read_pattern="fifo"),
    same_file("quorum-votes", driver="quorum", children=[DISK, OTHER], vote_threshold=2),
    same_file("quorum-one", driver="quorum", children=[DISK], vote_threshold=1),
    Subject("blklog", over_file(driver="blklog", file=DISK, log=OTHER)),
    Subject("copy-before-write", over_file(driver="copy-before-write", file=DISK, target=OTHER)),
    over_nbd(),
]

#: Drivers without a subject of their own, and why.
LEFT_OUT = {
    "null": "keeps nothing",
    "replication": "answers only while it replicates; see tests/unit/replication",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_driver_keeps_the_contract(subject: Subject, check: Check, tmp_path: Path) -> None:
    run(check, subject, tmp_path)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_requests_read_as_a_model_of_plain_bytes(subject: Subject, tmp_path_factory: pytest.TempPathFactory,
                                                        data: st.DataObject) -> None:
    run_trace(subject, tmp_path_factory.mktemp("trace"), data.draw(traces(subject.length)))


def test_every_driver_has_a_subject_or_a_reason() -> None:
    covered = {name for name in driver_names() if any(subject.name.startswith(name) for subject in SUBJECTS)}
    assert set(driver_names()) - covered - LEFT_OUT.keys() == set()


def test_the_content_has_data_and_zeroes() -> None:
    content = content_of(ALIGNED)
    assert bytes(ALIGNED // 8) in content
    assert len(set(content)) == 256
