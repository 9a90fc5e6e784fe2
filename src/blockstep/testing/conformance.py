"""The driver contract as a test suite: every promise of `blockstep.block.driver`, for any driver.

A driver is tested by describing it once, as a `Subject`: how to open a node that has a given content, and which of
the optional operations it has. `CHECKS` are the promises, one coroutine each; run them all::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_driver(check, tmp_path):
        run(check, Subject("mine", open_mine), tmp_path)

Each check gets a `Case`: a fresh graph, the node, a user of it through the border, and a model of what the node
must read as. `run_trace` with the strategy `traces` does the same with random requests. Needs `hypothesis`.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal

import msgspec
from hypothesis import strategies as st

from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Buffer, Driver
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import NONE, READ, RESIZE, WRITE
from blockstep.units import KiB

#: Bytes of a node under test, if it does not say another length: no whole sectors, pages or clusters.
LENGTH: Final = 200 * KiB + 333
#: Offsets and lengths that meet the borders of sectors, pages and clusters from both sides, and no border at all.
ODD_RANGES: Final = ((0, 1), (1, 1), (511, 2), (512, 512), (4095, 4098), (4096, 4096), (65535, 3), (65536, 65536),
                     (12345, 54321), (131071, 65538))


class Subject(msgspec.Struct, frozen=True):
    """A driver under test."""

    name: str
    #: Open a node with exactly this content; files go into the directory. ``length`` bytes are given.
    open: Callable[[Graph, Path, bytes], Awaitable[Driver]]
    #: Open again what `open` made and somebody closed; None: it does not outlive the node.
    reopen: Callable[[Graph, Path], Awaitable[Driver]] | None = None
    #: What the node reads as after make_empty; None: it cannot be emptied.
    below: bytes | None = None
    resizes: bool = True
    length: int = LENGTH
    #: Let go of what `open` got besides the node (a server, say).
    close: Callable[[], Awaitable[None]] | None = None


class Case(msgspec.Struct):
    """One opened subject."""

    subject: Subject
    path: Path
    graph: Graph
    node: Driver
    user: Backend
    #: What the node must read as.
    model: bytearray
    random: random.Random = msgspec.field(default_factory=lambda: random.Random(1))

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write to node and model."""
        await self.user.pwrite(offset, data, flags)
        self.model[offset:offset + len(data)] = data

    async def begun_write(self, offset: int, data: bytes) -> None:
        """The same as an export does it."""
        writing = self.user.begin_write(offset, data)
        if writing is not None:
            await writing
        self.model[offset:offset + len(data)] = data

    async def begun_read(self, offset: int, length: int) -> Buffer:
        """A read as an export does it."""
        found = self.user.begin_read(offset, length)
        return found if isinstance(found, bytes | bytearray | memoryview) else await found

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero a range of node and model."""
        await self.user.write_zeroes(offset, length, flags)
        self.model[offset:offset + length] = bytes(length)

    async def verify(self) -> None:
        """The node reads as the model says, byte for byte."""
        data = bytes(await self.user.pread(0, len(self.model)))
        if len(data) != len(self.model):
            raise AssertionError(f"a read of {len(self.model)} bytes returned {len(data)}")
        if data != self.model:
            at = next(i for i, (got, wanted) in enumerate(zip(data, self.model, strict=True)) if got != wanted)
            raise AssertionError(f"byte {at} is {data[at]:#04x} and should be {self.model[at]:#04x}")


Check = Callable[[Case], Awaitable[None]]


def content_of(length: int) -> bytes:
    """The content that checks begin with: random data with a run of zeroes in its middle; the same each time."""
    data = bytearray(random.Random(length).randbytes(length))
    data[length // 3:length // 3 + length // 8] = bytes(length // 8)
    return bytes(data)


def run(check: Check, subject: Subject, path: Path) -> None:
    """Run one check on a fresh node of ``subject``. Raises AssertionError, or what the driver raised."""
    asyncio.run(_run(check, subject, path))


async def _run(check: Check, subject: Subject, path: Path) -> None:
    graph, content = Graph(), content_of(subject.length)
    node = await subject.open(graph, path, content)
    try:
        user = graph.attach_backend(node, "conformance", READ | WRITE | (RESIZE if subject.resizes else NONE))
        case = Case(subject, path, graph, node, user, bytearray(content))
        await check(case)
        await graph.detach_backend(case.user)
        for left in [node for node in graph.nodes.values() if not node.parents]:
            await graph.close(left)
    finally:
        if subject.close is not None:
            await subject.close()


# --- reads and writes ---


async def reads_return_exactly_the_range(case: Case) -> None:
    assert case.node.length == len(case.model)
    await case.verify()
    length = len(case.model)
    for offset, size in (*ODD_RANGES, (length - 1, 1), (length - 777, 777)):
        data = await case.user.pread(offset, size)
        assert len(data) == size
        assert bytes(data) == case.model[offset:offset + size], f"{size} bytes at {offset}"


async def writes_change_exactly_the_range(case: Case) -> None:
    for offset, size in (*ODD_RANGES, (len(case.model) - 1, 1)):
        await case.write(offset, case.random.randbytes(size))
        await case.verify()


async def requests_that_are_begun_do_what_others_do(case: Case) -> None:
    for offset, size in (*ODD_RANGES, (len(case.model) - 1, 1)):
        await case.begun_write(offset, case.random.randbytes(size))
        await case.verify()
        data = bytes(await case.begun_read(max(0, offset - 100), size))
        assert data == case.model[max(0, offset - 100):][:size], f"{size} bytes at {max(0, offset - 100)}"


async def all_kinds_of_buffers_can_be_written(case: Case) -> None:
    data = case.random.randbytes(5000)
    for offset, buffer in ((100, data), (6000, bytearray(data)), (12000, memoryview(bytearray(data))[:4999])):
        await case.user.pwrite(offset, buffer)
        case.model[offset:offset + len(buffer)] = buffer
    await case.verify()


async def a_written_buffer_may_be_used_again_at_once(case: Case) -> None:
    for size in (100, 4096, 70000):
        buffer = bytearray(case.random.randbytes(size))
        case.model[4096:4096 + size] = buffer
        await case.user.pwrite(4096, memoryview(buffer))
        buffer[:] = b"\xee" * size
        await case.verify()


async def a_buffer_that_was_read_keeps_its_content(case: Case) -> None:
    for offset, size in ((0, 4096), (3, 5000), (65536, 65536)):
        kept = await case.user.pread(offset, size)
        before = bytes(kept)
        await case.write(offset, case.random.randbytes(size))
        await case.zero(offset + 1, size // 2)
        assert bytes(kept) == before


async def writes_with_fua_and_flushes_succeed(case: Case) -> None:
    await case.user.flush()
    await case.write(777, case.random.randbytes(9999), FUA)
    await case.user.flush()
    await case.user.flush()
    await case.verify()


# --- zeroes and discards ---


async def zeroes_read_as_zeroes_with_all_flags(case: Case) -> None:
    for flags in (0, FUA, MAY_UNMAP, FUA | MAY_UNMAP):
        for offset, size in ODD_RANGES:
            await case.write(offset, case.random.randbytes(size))
            await case.zero(offset, size, flags)
        await case.verify()


async def fast_zeroes_are_zeroes_or_not_supported(case: Case) -> None:
    for flags in (FAST, FAST | MAY_UNMAP):
        try:
            await case.zero(65536, 65536, flags)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            data = bytes(await case.user.pread(65536, 65536))
            assert all(got in (0, wanted) for got, wanted in zip(data, case.model[65536:131072], strict=True))
            case.model[65536:131072] = data
    await case.verify()


async def discarded_ranges_read_as_before_or_as_zeroes(case: Case) -> None:
    for offset, size in ODD_RANGES:
        await case.user.discard(offset, size)
        data = bytes(await case.user.pread(offset, size))
        for got, wanted in zip(data, case.model[offset:offset + size], strict=True):
            assert got in (0, wanted)
        case.model[offset:offset + size] = data
        await case.verify()


# --- status ---


async def status_covers_the_range_and_agrees_with_the_data(case: Case) -> None:
    await case.zero(65536, 65536, MAY_UNMAP)
    await case.write(70000, b"island")
    for start, size in ((0, len(case.model)), *ODD_RANGES):
        offset, end = start, start + size
        while offset < end:
            extents = await case.node.block_status(offset, end - offset)
            assert extents, f"no extent at {offset}"
            for extent in extents:
                assert extent.length > 0
                assert offset + extent.length <= end, "more than was asked for"
                if extent.zero and extent.allocated:
                    data = await case.user.pread(offset, extent.length)
                    assert not any(data), f"{extent} at {offset} does not read as zeroes"
                offset += extent.length


async def status_through_all_layers_covers_the_whole_range(case: Case) -> None:
    await case.zero(65536, 65536, MAY_UNMAP)
    await case.write(70000, b"island")
    offset = 0
    for extent in await case.user.block_status(0, len(case.model)):
        data = bytes(await case.user.pread(offset, extent.length))
        assert not (extent.zero and any(data)), f"{extent} at {offset} does not read as zeroes"
        offset += extent.length
    assert offset == len(case.model)


# --- length ---


async def truncate_keeps_what_stays_and_adds_zeroes(case: Case) -> None:
    before = len(case.model)
    if not case.subject.resizes:
        await fails(case.node.truncate(before + 512), errno.ENOTSUP, errno.EINVAL, errno.EPERM)
        assert case.node.length == before
        await case.verify()
        return
    await case.write(before - 10, b"0123456789")
    for length in (before + 70001, before - 5, before + 513):
        await case.user.truncate(length)
        assert case.node.length == case.user.length == length
        case.model[length:] = b""
        case.model.extend(bytes(length - len(case.model)))
        await case.verify()
    await case.write(before + 500, b"end of disk!!")
    await case.verify()


# --- make_empty ---


async def make_empty_shows_what_is_below(case: Case) -> None:
    below = case.subject.below
    if below is None:
        await fails(case.node.prepare_empty(), errno.ENOTSUP)
        return
    for _ in range(2):
        await case.write(5, b"to be dropped")
        await case.node.make_empty()
        case.model[:] = below
        await case.verify()


async def an_aborted_make_empty_changes_nothing(case: Case) -> None:
    if case.subject.below is None:
        return
    await case.write(5, b"to be kept")
    (await case.node.prepare_empty()).abort()
    await case.verify()
    await case.write(100_000, b"more to be kept")
    await case.verify()
    (await case.node.prepare_empty()).commit()
    case.model[:] = case.subject.below
    await case.verify()


# --- many at a time ---


async def concurrent_writes_to_neighbouring_bytes_all_land(case: Case) -> None:
    pieces, offset = [], 0
    while offset < len(case.model):
        size = min(case.random.choice((1, 333, 512, 4096, 5000)), len(case.model) - offset)
        pieces.append((offset, case.random.randbytes(size)))
        offset += size
    case.random.shuffle(pieces)
    await asyncio.gather(*(case.write(offset, data) for offset, data in pieces))
    await case.verify()


async def concurrent_overlapping_writes_leave_one_of_them_in_each_byte(case: Case) -> None:
    values = range(1, 17)
    await asyncio.gather(*(case.user.pwrite(1000 + value, bytes((value,)) * 9000) for value in values))
    data = bytes(await case.user.pread(1016, 8984))
    assert set(data) <= set(values)
    assert bytes(await case.user.pread(1016, 8984)) == data


async def reads_and_flushes_go_on_beside_writes(case: Case) -> None:
    async def read_half() -> None:
        assert bytes(await case.user.pread(100_000, 50_000)) == case.model[100_000:150_000]

    requests: list[Awaitable[None]] = []
    for index in range(16):
        requests += (case.write(index * 6000, case.random.randbytes(6000)), read_half(), case.user.flush())
    await asyncio.gather(*requests)
    await case.verify()


# --- the border ---


async def a_user_without_the_right_cannot_write(case: Case) -> None:
    reader = case.graph.attach_backend(case.node, "reader", READ)
    assert reader.read_only
    await fails(reader.pwrite(0, b"x"), errno.EPERM)
    await fails(reader.write_zeroes(0, 10), errno.EPERM)
    await fails(reader.discard(0, 10), errno.EPERM)
    await fails(reader.truncate(0), errno.EPERM)
    assert bytes(await reader.pread(0, 100)) == case.model[:100]
    await case.graph.detach_backend(reader)
    await case.verify()


async def requests_beyond_the_end_are_refused(case: Case) -> None:
    length = len(case.model)
    await fails(case.user.pread(length, 1), errno.EINVAL)
    await fails(case.user.pread(-1, 1), errno.EINVAL)
    await fails(case.user.pwrite(length - 1, b"xx"), errno.ENOSPC)
    await fails(case.user.write_zeroes(length - 1, 2), errno.ENOSPC)
    await fails(case.user.discard(length - 1, 2), errno.EINVAL)
    await case.verify()


# --- over time ---


async def what_was_flushed_is_there_after_closing_and_opening_again(case: Case) -> None:
    if case.subject.reopen is None:
        return
    await case.write(4000, case.random.randbytes(70000))
    await case.zero(10000, 20000, MAY_UNMAP)
    await case.user.flush()
    await case.graph.detach_backend(case.user)
    for node in [node for node in case.graph.nodes.values() if not node.parents]:
        await case.graph.close(node)
    case.graph = Graph()
    case.node = await case.subject.reopen(case.graph, case.path)
    case.user = case.graph.attach_backend(case.node, "conformance again", READ | WRITE)
    await case.verify()


#: All promises.
CHECKS: Final[tuple[Check, ...]] = (
    reads_return_exactly_the_range,
    writes_change_exactly_the_range,
    requests_that_are_begun_do_what_others_do,
    all_kinds_of_buffers_can_be_written,
    a_written_buffer_may_be_used_again_at_once,
    a_buffer_that_was_read_keeps_its_content,
    writes_with_fua_and_flushes_succeed,
    zeroes_read_as_zeroes_with_all_flags,
    fast_zeroes_are_zeroes_or_not_supported,
    discarded_ranges_read_as_before_or_as_zeroes,
    status_covers_the_range_and_agrees_with_the_data,
    status_through_all_layers_covers_the_whole_range,
    truncate_keeps_what_stays_and_adds_zeroes,
    make_empty_shows_what_is_below,
    an_aborted_make_empty_changes_nothing,
    concurrent_writes_to_neighbouring_bytes_all_land,
    concurrent_overlapping_writes_leave_one_of_them_in_each_byte,
    reads_and_flushes_go_on_beside_writes,
    a_user_without_the_right_cannot_write,
    requests_beyond_the_end_are_refused,
    what_was_flushed_is_there_after_closing_and_opening_again,
)

# --- random requests ---

Step = tuple[Literal["write", "zero", "discard", "flush", "read", "empty", "status"], int, int, int]


def traces(length: int) -> st.SearchStrategy[list[Step]]:
    """Lists of requests (kind, offset, size, flags or fill byte) to a disk of ``length`` bytes, near borders."""
    borders = [border + step for border in range(0, length, 4096) for step in (-1, 0, 1) if 0 <= border + step < length]
    offsets = st.one_of(st.sampled_from(borders), st.integers(0, length - 1))
    sizes = st.one_of(st.sampled_from((1, 511, 512, 513, 4096, 65536)), st.integers(1, 100_000))
    kinds = st.sampled_from(("write", "write", "write", "zero", "discard", "flush", "read", "empty", "status"))
    return st.lists(st.tuples(kinds, offsets, sizes, st.integers(0, 255)), max_size=25)


def run_trace(subject: Subject, path: Path, steps: list[Step]) -> None:
    """Do ``steps`` one after the other on a fresh node; after all of them it reads as a model of plain bytes says."""

    async def check(case: Case) -> None:
        for step in steps:
            await _do(case, *step)
        await case.verify()

    run(check, subject, path)


async def _do(case: Case, kind: str, offset: int, size: int, value: int) -> None:
    size = min(size, len(case.model) - offset)
    if kind == "write":
        data = random.Random(value).randbytes(size)
        await (case.begun_write(offset, data) if value & 6 == 6 else case.write(offset, data, value & FUA))
    elif kind == "zero":
        await case.zero(offset, size, value & (FUA | MAY_UNMAP))
    elif kind == "discard":
        await case.user.discard(offset, size)
        data = bytes(await case.user.pread(offset, size))
        assert all(got in (0, old) for got, old in zip(data, case.model[offset:offset + size], strict=True))
        case.model[offset:offset + size] = data
    elif kind == "flush":
        await case.user.flush()
    elif kind == "read":
        read = case.begun_read if value & 1 else case.user.pread
        assert bytes(await read(offset, size)) == case.model[offset:offset + size]
    elif kind == "empty" and case.subject.below is not None:
        await case.node.make_empty()
        case.model[:] = case.subject.below
    elif kind == "status":
        for extent in await case.user.block_status(offset, size):
            assert not (extent.zero and any(case.model[offset:offset + extent.length]))
            offset += extent.length


async def fails(request: Awaitable[object], *codes: int) -> OSError:
    """Await ``request``, which must raise OSError with one of ``codes``; returns the error."""
    try:
        await request
    except OSError as error:
        if error.errno in codes:
            return error
        wanted = ", ".join(errno.errorcode[code] for code in codes)
        raise AssertionError(f"it failed with {error!r} and should have failed with {wanted}") from error
    raise AssertionError("it succeeded and should have failed")
