"""The file driver against plain bytes, its locks, its errors, and what it does where storage would wait."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockstep.drivers  # noqa: F401
from blockstep.aio import posix
from blockstep.aio.cold import ColdReads
from blockstep.aio.copying import copy_pieces
from blockstep.aio.pool import in_thread
from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Extent
from blockstep.block.graph import Graph
from blockstep.drivers.file import File
from blockstep.errors import OptionError
from tests.devices import loop_device, release

SIZE = 300_001  # not a whole number of blocks
MiB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


async def opened(graph: Graph, path: Path, **options: Any) -> File:
    node = await graph.open({"driver": "file", "filename": str(path), **options})
    assert isinstance(node, File)
    return node


def direct(path: Path) -> dict[str, Any]:
    """The options of O_DIRECT, or a skip where the filesystem does not have it."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"{path.parent} is on a filesystem without O_DIRECT: {error}")
    return {"cache": {"direct": True}}


steps = st.lists(st.tuples(
    st.sampled_from(["write", "fua", "zero", "unmap", "discard", "flush", "read"]),
    st.integers(0, SIZE - 1), st.one_of(st.integers(1, 5000), st.integers(60_000, SIZE)),
), max_size=12)


@pytest.mark.parametrize("how", ["cached", "direct"])
@settings(max_examples=40)
@given(trace=steps)
def test_it_reads_like_plain_bytes(
        how: str, trace: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("file") / "disk"
    path.write_bytes(bytes(SIZE))
    options = direct(path) if how == "direct" else {}
    model = bytearray(SIZE)

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, path, discard="unmap", **options)
        for number, (verb, offset, length) in enumerate(trace, 1):
            length = min(length, SIZE - offset)
            if verb in ("write", "fua"):
                data = bytes([number]) * length
                await node.pwrite(offset, data, FUA if verb == "fua" else 0)
                model[offset:offset + length] = data
            elif verb in ("zero", "unmap"):
                await node.write_zeroes(offset, length, MAY_UNMAP if verb == "unmap" else 0)
                model[offset:offset + length] = bytes(length)
            elif verb == "discard":
                await node.discard(offset, length)
                found = bytes(await node.pread(offset, length))
                assert found in (bytes(length), model[offset:offset + length])
                model[offset:offset + length] = found
            elif verb == "flush":
                await node.flush()
            else:
                assert bytes(await node.pread(offset, length)) == model[offset:offset + length]
        assert bytes(await node.pread(0, SIZE)) == model
        at = 0
        for extent in await node.block_status(0, SIZE):
            assert extent.data or not any(model[at:at + extent.length])
            at += extent.length
        assert at == SIZE
        await graph.close(node)
        assert path.read_bytes() == model

    asyncio.run(scenario())


def test_misaligned_direct_writes_to_one_block_do_not_undo_each_other(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image, **direct(image))
        await asyncio.gather(*(node.pwrite(at * 7, bytes([at]) * 7) for at in range(1, 100)))
        expected = bytes(7) + b"".join(bytes([at]) * 7 for at in range(1, 100))
        assert bytes(await node.pread(0, 700)) == expected
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["cached", "direct"])
def test_reads_of_what_somebody_cut_off_fail_and_name_the_file(image: Path, how: str) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image, **(direct(image) if how == "direct" else {}))
        await node.pwrite(0, b"x" * 5000)
        os.truncate(image, 4096)
        assert bytes(await node.pread(4000, 96)) == b"x" * 96
        for offset, length in ((4000, 97), (200_000, 5), (0, SIZE)):
            with pytest.raises(OSError, match=f"{image} was shortened from {SIZE} to 4096 bytes") as caught:
                await node.pread(offset, length)
            assert caught.value.errno == errno.EIO
        await graph.close(node)

    asyncio.run(scenario())


def test_what_somebody_cut_off_is_no_hole(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        os.truncate(image, MiB // 8)
        assert await node.block_status(0, MiB // 8) == [Extent(MiB // 8, data=False, zero=True)]
        with pytest.raises(OSError, match="was shortened"):
            await node.block_status(0, SIZE)
        await graph.close(node)

    asyncio.run(scenario())


def test_what_somebody_cut_off_is_not_copied_as_zeroes(tmp_path: Path) -> None:
    (tmp_path / "of").write_bytes(b"x" * MiB)
    of, to = os.open(tmp_path / "of", os.O_RDWR), os.open(tmp_path / "to", os.O_RDWR | os.O_CREAT)
    try:
        os.truncate(of, MiB - 1)
        with pytest.raises(posix.EndOfFile):
            copy_pieces((of, 0), (to, 0), MiB, 65536)
    finally:
        os.close(of)
        os.close(to)


# --- what somebody else does to the file ---


def put_another_there(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(SIZE))
    path.with_name("new").rename(path)


def exchange(path: Path) -> None:
    path.rename(path.with_name("old"))
    put_another_there(path)


@pytest.mark.parametrize(("do", "said", "lasting"), [
    (Path.unlink, "was deleted: its data end with this program; copy /proc/", True),
    (put_another_there, "was deleted, and another file put in its place: ", True),
    (lambda path: os.truncate(path, 100), f"was shortened from {SIZE} to 100 bytes: ", True),
    (lambda path: path.rename(path.with_name("old")), "was moved away: put it back", False),
    (exchange, "is not the one in use any more: put that back", False),
])
def test_a_fault_of_the_file_is_told(image: Path, do: Callable[[Path], object], said: str, lasting: bool) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        assert node.storage_fault() is None
        do(image)
        fault = node.storage_fault()
        assert fault is not None
        assert fault.text.startswith(f"{image} {said}")
        assert (fault.lasting, fault.torn) == (lasting, "shortened" in said)
        if "copy " in fault.text:
            copy = fault.text.partition("copy ")[2].partition(" ")[0]
            assert Path(copy).read_bytes() == bytes(SIZE)
        if not lasting:
            image.with_name("old").replace(image)
            assert node.storage_fault() is None
        await graph.close(node)

    asyncio.run(scenario())


def test_a_file_that_is_gone_from_its_server_is_a_fault(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(fd: int) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", stale)
            fault = node.storage_fault()
        assert fault == posix.Fault(f"{image} cannot be looked at: {os.strerror(errno.ESTALE)}", False)
        assert node.storage_fault() is None
        await graph.close(node)

    asyncio.run(scenario())


def test_its_own_resize_is_no_fault(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[posix.Fault | None] = []
    ftruncate = os.ftruncate

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)

        def looked_at(fd: int, length: int) -> None:
            faults.append(node.storage_fault())
            ftruncate(fd, length)
            faults.append(node.storage_fault())

        monkeypatch.setattr(os, "ftruncate", looked_at)
        for length in (1000, MiB):
            await node.truncate(length)
            faults.append(node.storage_fault())
        await graph.close(node)

    asyncio.run(scenario())
    assert faults == [None] * 6


@pytest.mark.parametrize("length", [1000, MiB])
def test_a_resize_beside_a_look_is_no_fault(length: int, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        length_of = posix.length_of

        def resized_in_between(fd: int) -> int:
            if length < SIZE:  # between its looks at the node's length and at the file's
                node.length = length
                os.ftruncate(fd, length)
                return length_of(fd)
            found = length_of(fd)  # between its look at the file's length and at the node's
            os.ftruncate(fd, length)
            node.length = length
            return found

        with monkeypatch.context() as patch:
            patch.setattr(posix, "length_of", resized_in_between)
            assert node.storage_fault() is None
        assert node.storage_fault() is None
        await graph.close(node)

    asyncio.run(scenario())


def test_of_a_passed_descriptor_only_the_length_is_looked_at(image: Path, tmp_path: Path) -> None:
    passed = os.open(image, os.O_RDWR)
    image.unlink()

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, Path(f"/dev/fd/{passed}"))
        os.close(passed)
        assert node.storage_fault() is None
        os.truncate(node.fd, 5)
        fault = node.storage_fault()
        assert fault is not None
        assert "was shortened" in fault.text
        await graph.close(node)

    asyncio.run(scenario())


def test_a_relative_name_is_looked_at_from_where_it_was_opened(
        image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image.parent)

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, Path(image.name))
        monkeypatch.chdir("/")
        assert node.storage_fault() is None
        await graph.close(node)

    asyncio.run(scenario())


def test_a_read_that_would_wait_goes_to_a_thread(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    pread = os.pread

    def would_wait(fd: int, length: int, offset: int) -> bytes:
        return b""

    def waits(fd: int, length: int, offset: int) -> bytes:
        threads.append(threading.current_thread().name)
        return pread(fd, length, offset)

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        await node.pwrite(5, b"data")
        node._read = would_wait
        node._cold = ColdReads(would_wait, clock=itertools.count().__next__)
        monkeypatch.setattr(os, "pread", waits)
        assert bytes(await node.pread(5, 4)) == b"data"
        await graph.close(node)

    asyncio.run(scenario())
    assert [name.startswith("blockstep-io") for name in threads] == [True]


def test_writes_rest_from_the_page_cache_after_one_that_waited(image: Path) -> None:
    times = itertools.chain([0.0, 5.0, 5.5, 6.5, 6.5], itertools.repeat(6.5))
    cached = posix.Cached(lambda: next(times))
    fd = os.open(image, os.O_RDWR)
    assert cached.write(fd, b"abc", 0) == 3  # took five seconds
    assert cached.write(fd, b"abc", 0) == 0
    assert cached.write(fd, b"abc", 0) == 3
    os.close(fd)


def test_after_a_failed_flush_nothing_is_called_durable_until_it_is_opened_anew(
        image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "the device lost a page")

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        await node.pwrite(0, b"x")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails)
            with pytest.raises(OSError, match="lost a page"):
                await node.flush()
        for _ in range(2):
            with pytest.raises(OSError, match="lost a page"):
                await node.flush()
        with pytest.raises(OSError, match="lost a page"):
            await node.pwrite(0, b"x", FUA)
        await node.pwrite(0, b"y")
        await graph.close(node)
        node = await opened(graph, image)
        await node.flush()
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize("second", ["flush", "write with FUA"])
def test_a_sync_in_flight_beside_one_that_failed_fails_too(
        image: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    """The kernel tells one of the two that pages were lost, and the other that all is well."""
    told = threading.Event()

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "the device lost a page")

    def is_well(*_: Any) -> None:
        assert told.wait(20)

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        monkeypatch.setattr(os, "fdatasync", fails)
        monkeypatch.setattr("blockstep.drivers.file.write_whole", is_well)
        first = asyncio.create_task(node.flush())
        beside = asyncio.create_task(node.flush() if second == "flush" else node.pwrite(0, b"x", FUA))
        with pytest.raises(OSError, match="lost a page"):
            await first
        told.set()
        with pytest.raises(OSError, match="lost a page"):
            await beside
        await graph.close(node)

    asyncio.run(scenario())


def test_flushes_that_wait_for_one_share_the_next(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a sync that began after it came, and two syncs never race for the kernel's one report."""
    begun: list[int] = []
    go_on = threading.Semaphore(0)

    def sync(fd: int) -> None:
        begun.append(fd)
        assert go_on.acquire(timeout=20)

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        monkeypatch.setattr(os, "fdatasync", sync)
        first = asyncio.create_task(node.flush())
        await asyncio.sleep(0)
        others = [asyncio.create_task(node.flush()) for _ in range(5)]
        await asyncio.sleep(0)
        go_on.release()
        await first
        assert not any(other.done() for other in others)
        go_on.release()
        await asyncio.gather(*others)
        assert len(begun) == 2
        go_on.release()
        await node.flush()
        assert len(begun) == 3
        await graph.close(node)

    asyncio.run(scenario())


def test_a_write_with_fua_that_succeeds_beside_a_flush_waits_for_what_that_is_told(
        image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells the flush that pages were lost; the write's success is heard of first."""
    written = threading.Event()

    def sync(fd: int) -> None:
        assert written.wait(20)
        raise OSError(errno.EIO, "the device lost a page")

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        monkeypatch.setattr(os, "fdatasync", sync)
        monkeypatch.setattr("blockstep.drivers.file.write_whole", lambda *_: written.set())
        flush = asyncio.create_task(node.flush())
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="lost a page"):
            await node.pwrite(0, b"x", FUA)
        with pytest.raises(OSError, match="lost a page"):
            await flush
        await graph.close(node)

    asyncio.run(scenario())


def test_without_flush_nothing_is_synced(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image, cache={"no-flush": True})
        monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("synced"))
        await node.pwrite(0, b"x", FUA)
        await node.flush()
        await graph.close(node)

    asyncio.run(scenario())


def test_fast_zeroes_are_refused_where_they_would_be_slow(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        monkeypatch.setattr("blockstep.drivers.file.zero_range", lambda *_: False)
        monkeypatch.setattr("blockstep.drivers.file.punch_hole", lambda *_: False)
        await node.pwrite(0, b"x" * SIZE)
        with pytest.raises(OSError) as caught:
            await node.write_zeroes(0, SIZE, FAST | MAY_UNMAP)
        assert caught.value.errno == errno.ENOTSUP
        await node.write_zeroes(0, SIZE, MAY_UNMAP)
        assert not any(await node.pread(0, SIZE))
        await graph.close(node)

    asyncio.run(scenario())


def test_fast_zeroes_of_a_device_are_holes_as_the_kernel_may_write_the_others(
        image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockstep.drivers.file.is_block_device", lambda fd: True)
    monkeypatch.setattr("blockstep.drivers.file.zero_range", lambda *_: pytest.fail("the kernel writes"))

    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        await node.pwrite(0, b"x" * SIZE)
        with pytest.raises(OSError) as caught:
            await node.write_zeroes(0, SIZE, FAST)
        assert caught.value.errno == errno.ENOTSUP
        await node.write_zeroes(0, SIZE, FAST | MAY_UNMAP)
        assert not any(await node.pread(0, SIZE))
        await graph.close(node)

    asyncio.run(scenario())


def test_discard_gives_space_back_only_when_asked_to(image: Path) -> None:
    async def scenario(discard: str) -> int:
        graph = Graph()
        node = await opened(graph, image, discard=discard)
        await node.pwrite(0, b"x" * SIZE)
        await node.flush()
        before = os.fstat(node.fd).st_blocks
        await node.discard(0, SIZE)
        after = os.fstat(node.fd).st_blocks
        await graph.close(node)
        return before - after

    assert asyncio.run(scenario("ignore")) == 0
    assert asyncio.run(scenario("unmap")) > 500


# --- opening ---


def test_one_writer_at_a_time_and_any_number_of_readers(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        writer = await opened(graph, image)
        readers = [await opened(graph, image, **{"read-only": True}) for _ in range(2)]
        with pytest.raises(OSError) as caught:
            await opened(graph, image)
        assert caught.value.errno == errno.EBUSY
        assert str(image) in str(caught.value)
        sharing = await opened(graph, image, locking="off")
        await graph.close(writer)
        writer = await opened(graph, image, locking="on")
        for node in (*readers, sharing, writer):
            await graph.close(node)

    asyncio.run(scenario())


def test_reopening_changes_rights_lock_and_cache_under_the_same_descriptor(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        fd = node.fd
        await graph.reopen([(node, {"read-only": True})])
        other = await opened(graph, image)  # the lock is free
        with pytest.raises(OSError) as caught:
            await graph.reopen([(node, {"read-only": False})])
        assert caught.value.errno == errno.EBUSY
        assert node.read_only
        await graph.close(other)
        await graph.reopen([(node, {"read-only": False, "cache.direct": direct(image)["cache"]["direct"]})])
        await node.pwrite(3, b"through")
        assert bytes(await node.pread(3, 7)) == b"through"
        with pytest.raises(OSError, match="open for writing"):
            await opened(graph, image)
        with pytest.raises(OptionError):
            await graph.reopen([(node, {"filename": "other"})])
        assert node.fd == fd
        await graph.close(node)

    asyncio.run(scenario())


@pytest.mark.parametrize(("name", "code"), [("absent", errno.ENOENT), (".", errno.EISDIR)])
def test_what_cannot_be_opened_is_named(tmp_path: Path, name: str, code: int) -> None:
    with pytest.raises(OSError) as caught:
        asyncio.run(opened(Graph(), tmp_path / name))
    assert caught.value.errno == code
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize("how", ["loop", "injected"])
def test_a_read_only_block_device_is_not_opened_for_writing(
        image: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "loop":
        device = loop_device(image)
        subprocess.run(["blockdev", "--setro", device], check=True)
    else:
        device, ioctl = image, fcntl.ioctl
        monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
        monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, argument: (
            struct.pack("@i", 1) if request == 0x125E else ioctl(fd, request, argument)))

    async def scenario() -> None:
        graph = Graph()
        with pytest.raises(OSError, match="read-only: open it read-only, or make it writable with 'blockdev --setrw'"
                           ) as caught:
            await opened(graph, device)
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(device))
        node = await opened(graph, device, **{"auto-read-only": True})
        assert node.read_only
        with pytest.raises(OSError, match="setrw"):
            await graph.reopen([(node, {"read-only": False})])
        await graph.close(node)

    try:
        asyncio.run(scenario())
    finally:
        if how == "loop":
            release(device)


def test_a_block_device_that_shrinks_or_loses_its_name(image: Path, tmp_path: Path) -> None:
    device = loop_device(image)
    name = tmp_path / "name"

    async def scenario() -> None:
        graph = Graph()
        try:
            os.mknod(name, stat.S_IFBLK | 0o600, device.stat().st_rdev)
            node = await opened(graph, name)
        except PermissionError as error:
            pytest.skip(f"no device nodes here: {error}")
        assert node.storage_fault() is None
        name.rename(tmp_path / "other")
        assert node.storage_fault() == posix.Fault(
            f"{name} is not the one in use any more: put that back before this program ends", False)
        os.mknod(name, stat.S_IFBLK | 0o600, device.stat().st_rdev)  # another node, of the same device
        assert node.storage_fault() is None
        os.truncate(image, MiB // 2)
        await in_thread(subprocess.run, ["losetup", "--set-capacity", device], check=True)
        fault = node.storage_fault()
        assert fault is not None
        assert fault.text.startswith(f"{name} was shortened from {MiB} to {MiB // 2} bytes")
        with pytest.raises(OSError, match="was shortened"):
            await node.pread(MiB // 2, 512)
        await graph.close(node)

    try:
        asyncio.run(scenario())
    finally:
        release(device)


def test_a_character_device_is_no_disk() -> None:
    with pytest.raises(OSError, match="neither a regular file nor a block device"):
        asyncio.run(opened(Graph(), Path("/dev/null")))


@pytest.mark.parametrize("read_only", [True, False])
def test_nobody_waits_for_the_other_end_of_a_pipe(tmp_path: Path, read_only: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="neither a regular file nor a block device"):
        asyncio.run(Graph().open({"driver": "file", "filename": str(tmp_path / "pipe"), "read-only": read_only}))


def test_resize_adds_zeroes(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await opened(graph, image)
        await node.pwrite(0, b"x" * SIZE)
        await node.truncate(1000)
        await node.truncate(MiB)
        assert bytes(await node.pread(0, 2000)) == b"x" * 1000 + bytes(1000)
        assert (await node.block_status(500_000, 1000)) == [Extent(1000, data=False, zero=True)]
        await graph.close(node)

    asyncio.run(scenario())


# --- threads ---


def test_a_cancelled_task_ends_only_when_its_thread_has() -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def work() -> None:
        begun.set()
        go_on.wait(10)
        done.append("work")

    async def scenario() -> None:
        task = asyncio.ensure_future(in_thread(work))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["work"]

    asyncio.run(scenario())


def test_a_device_follows_its_own_growth_and_shows_zeroes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockstep.drivers.file.is_block_device", lambda fd: True)
    path = tmp_path / "device"
    path.write_bytes(b"d" * 10_000)

    async def main() -> None:
        graph = Graph()
        node = await graph.open({"driver": "file", "filename": str(path), "discard": "unmap"})
        with pytest.raises(OSError, match=r"resize of the block device .* of 10000 bytes to 20000 bytes"):
            await node.truncate(20_000)
        assert node.length == 10_000
        with open(path, "ab") as file:
            file.write(b"what lay there before" * 1000)
        await node.truncate(31_000)
        assert node.length == 31_000
        assert bytes(await node.pread(0, 31_000)) == b"d" * 10_000 + bytes(21_000)
        await graph.close(node)

    asyncio.run(main())
