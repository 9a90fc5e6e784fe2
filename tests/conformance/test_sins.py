"""The conformance suite sees the sins that drivers commit: each breaks one promise, and the check of it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstep.block.driver import FUA, Buffer, Driver, Extent, Prepared
from blockstep.block.graph import Graph
from blockstep.testing import conformance
from blockstep.testing.conformance import CHECKS, LENGTH, Check, Subject, run
from tests.disks import Ram, ram


class AliasesReads(Ram):
    async def pread(self, offset: int, length: int) -> Buffer:
        return memoryview(self.content)[offset:offset + length]


class KeepsWrittenBuffers(Ram):
    kept: tuple[int, Buffer] = (0, b"")

    async def pread(self, offset: int, length: int) -> Buffer:
        start, data = self.kept
        self.content[start:start + len(data)] = data
        return await super().pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self.pread(0, 1)
        self.kept = offset, data


class WritesWholeSectors(Ram):
    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        padding = min(-len(data) % 512, self.length - offset - len(data))
        await super().pwrite(offset, bytes(data) + bytes(padding), flags)


class ReadsShort(Ram):
    async def pread(self, offset: int, length: int) -> Buffer:
        return (await super().pread(offset, length))[:65536]


class ReadsShortAtOnce(Ram):
    def begin_read(self, offset: int, length: int) -> Buffer:
        return bytes(self.content[offset:offset + min(length, 65535)])


class ForgetsWhatIsWrittenAtOnce(Ram):
    def begin_write(self, offset: int, data: Buffer) -> None:
        pass


class RefusesFua(Ram):
    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        if flags & FUA:
            raise OSError(22, "what is FUA?")
        await super().pwrite(offset, data)


class TakesZeroesForAdvice(Ram):
    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        first, end = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
        if first < end:
            await super().write_zeroes(first, end - first)


class DiscardsTooMuch(Ram):
    async def discard(self, offset: int, length: int) -> None:
        start, end = offset // 512 * 512, min(-(-(offset + length) // 512) * 512, self.length)
        self.content[start:end] = bytes(end - start)


class LiesAboutZeroes(Ram):
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, data=False, zero=True)]


class SaysTooMuch(Ram):
    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length + 1)]


class LeavesOldBytesBehindTheEnd(Ram):
    async def truncate(self, length: int) -> None:
        old = bytes(self.content[length:])
        await super().truncate(length)
        self.behind = getattr(self, "behind", {})
        if old:
            self.behind[length] = old
        for at, data in self.behind.items():
            part = data[:max(0, length - at)]
            self.content[at:at + len(part)] = part


class EmptiesBeforeItIsSure(Ram):
    async def prepare_empty(self) -> Prepared:
        self.content[:] = bytes(self.length)
        return Prepared()


class LosesConcurrentWrites(Ram):
    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        start, end = offset // 4096 * 4096, min(-(-(offset + len(data)) // 4096) * 4096, self.length)
        clusters = self.content[start:end]
        await asyncio.sleep(0)
        clusters[offset - start:offset - start + len(data)] = data
        self.content[start:end] = clusters


SINS: list[tuple[type[Ram], Check]] = [
    (AliasesReads, conformance.a_buffer_that_was_read_keeps_its_content),
    (KeepsWrittenBuffers, conformance.a_written_buffer_may_be_used_again_at_once),
    (WritesWholeSectors, conformance.writes_change_exactly_the_range),
    (ReadsShort, conformance.reads_return_exactly_the_range),
    (ReadsShortAtOnce, conformance.requests_that_are_begun_do_what_others_do),
    (ForgetsWhatIsWrittenAtOnce, conformance.requests_that_are_begun_do_what_others_do),
    (RefusesFua, conformance.writes_with_fua_and_flushes_succeed),
    (TakesZeroesForAdvice, conformance.zeroes_read_as_zeroes_with_all_flags),
    (DiscardsTooMuch, conformance.discarded_ranges_read_as_before_or_as_zeroes),
    (LiesAboutZeroes, conformance.status_covers_the_range_and_agrees_with_the_data),
    (LiesAboutZeroes, conformance.status_through_all_layers_covers_the_whole_range),
    (SaysTooMuch, conformance.status_covers_the_range_and_agrees_with_the_data),
    (LeavesOldBytesBehindTheEnd, conformance.truncate_keeps_what_stays_and_adds_zeroes),
    (EmptiesBeforeItIsSure, conformance.an_aborted_make_empty_changes_nothing),
    (LosesConcurrentWrites, conformance.concurrent_writes_to_neighbouring_bytes_all_land),
]


def sinner(kind: type[Ram]) -> Subject:
    async def open_it(graph: Graph, path: Path, content: bytes) -> Driver:
        node = await ram(graph, "disk", content)
        node.__class__ = kind
        for edge in node.parents:
            edge.bind(node)
        return node

    return Subject(kind.__name__, open_it, below=bytes(LENGTH))


@pytest.mark.parametrize(("kind", "check"), SINS, ids=lambda value: value.__name__)
def test_the_sin_is_seen(kind: type[Ram], check: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises((AssertionError, OSError)):
        run(check, sinner(kind), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_same_disk_without_sin_passes(check: Check, tmp_path: Path) -> None:
    run(check, sinner(Ram), tmp_path)
