"""The power fails: any sequence of requests, cut anywhere, with what was not flushed written in part and in any order.

All that reaches the file is recorded. A *cut* is a place in the record: what was written before the last flush that had
ended is there; of what came since, each sector of each write is there or not. In every such file a check finds leaks at
worst, it reads, byte by byte, as at the last flush of the disk or as it was written since, and a snapshot that is kept
in it still has what it had.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.block.driver import FUA, MAY_UNMAP, Buffer, Filter
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.node import NodeOptions, NodeRef
from blockstep.block.permissions import READ, RESIZE, WRITE, Role
from blockstep.block.registry import register
from blockstep.drivers.qcow2.check import check
from blockstep.drivers.qcow2.snapshots import apply_snapshot
from blockstep.errors import OptionError
from blockstep.testing.model import Content
from blockstep.units import KiB
from tests.disks import ram
from tests.peers import need, run
from tests.scenario.qcow2 import Sparse

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io")

LENGTH: Final = 300 * KiB + 512
SECTOR: Final = 512
#: Options of qemu-img create.
IMAGES: Final = ("compat=1.1,cluster_size=4k", "compat=1.1,cluster_size=512", "compat=0.10,cluster_size=4k",
                 "compat=1.1,cluster_size=16k,refcount_bits=64", "compat=1.1,cluster_size=16k,extended_l2=on",
                 "compat=1.1,cluster_size=4k,preallocation=metadata")


@dataclass
class Entry:
    """A write, or with ``data`` None a new length, or with neither a flush that has ended."""

    offset: int = -1
    data: bytes | None = None
    is_flush: bool = False


class RecorderOptions(NodeOptions, tag="test-recorder"):
    file: NodeRef


@register
class Recorder(Filter):
    """Writes down all that changes its child."""

    driver: ClassVar[str] = "test-recorder"
    Options = RecorderOptions
    options: RecorderOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}

    async def open(self) -> None:
        self.entries: list[Entry] = []

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        self.entries.append(Entry(offset, bytes(data)))
        await self.file.pwrite(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.pwrite(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        self.entries.append(Entry(offset, bytes(length)))
        await self.file.write_zeroes(offset, length)

    async def truncate(self, length: int) -> None:
        self.entries.append(Entry(length))
        await self.file.resize(length)

    async def flush(self) -> None:
        await self.file.flush()
        self.entries.append(Entry(is_flush=True))


@dataclass
class Moment:
    """What the disk may be when the record has ``count`` entries or more: ``sure``, at ``lengths`` that it may have."""

    count: int
    sure: Content
    lengths: tuple[int, ...]


@dataclass
class Run:
    """A sequence of requests, its record, and what is known of the disk at each moment."""

    base: bytes
    latest: bytearray
    recorder: Recorder
    moments: list[Moment] = field(default_factory=list)

    def now(self, sure: Content, *lengths: int) -> None:
        self.moments.append(Moment(len(self.recorder.entries), sure, lengths or (len(self.latest),)))

    def may(self, offset: int, data: bytes) -> None:
        """From now on these bytes may be those."""
        sure = self.moments[-1].sure.copy()
        sure.may_write(offset, data)
        self.now(sure)
        self.latest[offset:offset + len(data)] = data

    def settled(self) -> None:
        """All is durable."""
        self.now(Content(self.latest))

    async def do(self, user: Backend, step: tuple[str, int, int, int]) -> None:
        what, where, size, fill = step
        length = len(self.latest)
        offset = where % length
        count = min(size, length - offset)
        if what == "write":
            self.may(offset, bytes([fill]) * count)
            await user.pwrite(offset, bytes([fill]) * count, FUA if fill % 7 == 0 else 0)
        elif what == "zeroes":
            self.may(offset, bytes(count))
            await user.write_zeroes(offset, count, MAY_UNMAP if fill % 2 else 0)
        elif what == "discard":
            old = bytes(self.latest[offset:offset + count])
            self.may(offset, bytes(count))
            await user.discard(offset, count)
            got = bytes(await user.pread(offset, count))
            assert all(new in (0, before) for new, before in zip(got, old, strict=True))
            self.latest[offset:offset + count] = got
        elif what == "empty":
            shown = self.base[:length].ljust(length, b"\0")
            before = bytes(self.latest)
            self.may(0, shown)
            if await refused(user.node.make_empty()):
                self.latest[:] = before
        elif what == "truncate":
            await self._truncate(user, max(SECTOR, (length + (where % 3 - 1) * size) // SECTOR * SECTOR))
        if what == "flush" or (what == "write" and fill % 7 == 0):
            await user.flush()
            self.settled()

    async def _truncate(self, user: Backend, length: int) -> None:
        before = len(self.latest)
        self.now(self.moments[-1].sure.copy(), before, length)
        if await refused(user.truncate(length)):
            self.now(self.moments[-1].sure, before)
            return
        del self.latest[length:]
        self.latest.extend(bytes(length - len(self.latest)))
        self.settled()


async def refused(operation: Any) -> bool:
    """Whether this image cannot do that."""
    try:
        await operation
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return True
    return False


@cache
def image_of(options: str, snapshot: bool) -> bytes:
    """A new image with something in it; perhaps a snapshot named ``kept`` of just that."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(LENGTH))
        run("qemu-io", "-f", "qcow2", "-c", "write -P 200 10k 50k", "-c", "write -P 201 200k 3k", path)
        if snapshot:
            run("qemu-img", "snapshot", "-c", "kept", path)
        return path.read_bytes()


@dataclass
class Bytes:
    """What is in a file; behind ``data`` it is a hole up to ``length``."""

    data: bytearray
    length: int

    @classmethod
    def of(cls, image: bytes) -> Bytes:
        return cls(bytearray(image), len(image))

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset:offset + length].ljust(length, b"\0"))

    def write(self, offset: int, piece: bytes) -> None:
        end = offset + len(piece)
        self.data.extend(bytes(max(0, end - len(self.data))))
        self.data[offset:end] = piece
        self.length = max(self.length, end)

    def truncate(self, length: int) -> None:
        del self.data[length:]
        self.length = length

    async def as_node(self, graph: Graph, name: str) -> str:
        node = await graph.open({"driver": "test-sparse", "node-name": name, "size": self.length})
        assert isinstance(node, Sparse)
        await node.pwrite(0, self.data)
        return name


async def play(image: bytes, base: bytes | None, steps: list[tuple[str, int, int, int]]) -> Run | None:
    """Do the steps to the image, and not close it. None: it cannot be written to."""
    graph = Graph()
    backing = None
    if base is not None:
        backing = (await ram(graph, "base", base)).name
    recorder = await graph.open({"driver": "test-recorder", "node-name": "recorder",
                                 "file": await Bytes.of(image).as_node(graph, "file")})
    assert isinstance(recorder, Recorder)
    try:
        node = await graph.open({"driver": "qcow2", "file": "recorder", "backing": backing, "discard": "unmap",
                                 "l2-cache-size": 1 << 16, "refcount-cache-size": 1 << 16})
    except OptionError:
        return None
    user = graph.attach_backend(node, "guest", READ | WRITE | RESIZE)
    found = Run(base or b"", bytearray(await user.pread(0, LENGTH)), recorder)
    found.settled()
    for step in steps:
        await found.do(user, step)
    return found


def after_a_cut(image: bytes, entries: list[Entry], cut: int, rnd: random.Random) -> Bytes:
    """The file: whole up to the last flush before the cut, and some sectors of what came since."""
    file = Bytes.of(image)
    safe = max((index for index in range(cut) if entries[index].is_flush), default=-1)
    share = rnd.choice((0.0, 0.2, 0.5, 0.8, 1.0))
    for index in range(cut):
        entry = entries[index]
        if entry.is_flush:
            continue
        if entry.data is None:
            if index <= safe or rnd.random() < share:
                file.truncate(entry.offset)
        elif index <= safe:
            file.write(entry.offset, entry.data)
        else:
            for at, piece in _sectors(entry):
                if rnd.random() < share:
                    file.write(at, piece)
    return file


def _sectors(entry: Entry) -> Iterator[tuple[int, bytes]]:
    """The parts of a write that are there, or are not, as a whole."""
    assert entry.data is not None
    at, end = entry.offset, entry.offset + len(entry.data)
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        yield at, entry.data[at - entry.offset:stop - entry.offset]
        at = stop


async def content(image: Bytes, base: bytes | None) -> bytes:
    graph = Graph()
    backing = None
    if base is not None:
        backing = (await ram(graph, "base", base)).name
    node = await graph.open({"driver": "qcow2", "file": await image.as_node(graph, "file"), "backing": backing,
                             "read-only": True}, strict=True)
    try:
        return bytes(await node.pread(0, node.length))
    finally:
        await graph.close(node)


def judge(image: Bytes, base: bytes | None, moment: Moment, entered: int) -> None:
    """Whether an image can be what a cut after ``entered`` entries left."""
    texts: list[str] = []
    result = check(image.read, image.length, texts.append)
    assert not result.corruptions, texts[:5]
    got = asyncio.run(content(image, base))
    assert len(got) in moment.lengths
    seen = min(len(got), *moment.lengths, len(moment.sure.data))
    assert not (wrong := moment.sure.differs(got[:seen])), f"after {entered} entries: {wrong}"


def snapshot_of(image: Bytes) -> bytes:
    """What the snapshot ``kept`` has."""
    apply_snapshot(image.read, image.length, image.write, lambda: None, "kept")
    return asyncio.run(content(image, None))


_steps = st.tuples(
    st.sampled_from(("write", "write", "write", "zeroes", "discard", "flush", "flush", "empty", "truncate")),
    st.one_of(st.integers(0, LENGTH), st.sampled_from((0, 4096, 16384, LENGTH - 1))),
    st.sampled_from((1, 512, 4096, 5000, 16384, 70_000)), st.integers(1, 199))


@settings(max_examples=max(40, settings.default.max_examples // 20))
@given(options=st.sampled_from(IMAGES), snapshot=st.booleans(), backed=st.booleans(),
       steps=st.lists(_steps, min_size=2, max_size=16), seed=st.integers(0, 1 << 32))
def test_any_cut_leaves_leaks_at_worst_and_what_was_flushed(
        options: str, snapshot: bool, backed: bool, steps: list[tuple[str, int, int, int]], seed: int) -> None:
    rnd = random.Random(seed)
    image = image_of(options, snapshot)
    base = bytes(index // 512 % 199 + 1 for index in range(LENGTH // 2 + 99)) if backed else None
    found = asyncio.run(play(image, base, steps))
    if found is None:
        return
    entries = found.recorder.entries
    cuts = sorted({len(entries), *(moment.count for moment in found.moments),
                   *rnd.sample(range(len(entries) + 1), min(12, len(entries) + 1))})
    looked_at = rnd.choice(cuts)
    for cut in cuts:
        # What the disk may be at a cut is what it may be in the last moment that had begun by then.
        moment = [moment for moment in found.moments if moment.count <= cut][-1]
        crashed = after_a_cut(image, entries, cut, rnd)
        judge(crashed, base, moment, cut)
        if cut == looked_at:
            qemu_agrees(crashed)
            if snapshot:
                assert snapshot_of(crashed) == snapshot_of(Bytes.of(image))


def qemu_agrees(image: Bytes) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(image.data)
        os.truncate(path, image.length)
        said = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", path, check=False).stdout)
        assert not said.get("corruptions"), said
        assert not said["check-errors"], said
