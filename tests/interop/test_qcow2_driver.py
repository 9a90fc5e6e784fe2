"""The driver qcow2 beside QEMU: it reads what QEMU made, QEMU reads what it made and finds nothing wrong with it."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstep.block.driver import FUA, MAY_UNMAP
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, RESIZE, WRITE
from blockstep.drivers.blklog import FLUSH_FLAG, read_log
from blockstep.drivers.qcow2.create import new_header, write_image
from blockstep.drivers.qcow2.format import RAW_EXTERNAL, parse_header
from blockstep.errors import OptionError
from blockstep.units import KiB, MiB
from tests.peers import need, run

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io")

SIZE: Final = 1 * MiB + 64 * KiB

#: Options of qemu-img create.
IMAGES: Final = (
    "compat=1.1", "compat=0.10", "compat=1.1,cluster_size=512", "compat=0.10,cluster_size=4k",
    "compat=1.1,cluster_size=4k,refcount_bits=1", "compat=1.1,cluster_size=512,refcount_bits=64",
    "compat=1.1,cluster_size=16k,refcount_bits=4", "compat=1.1,cluster_size=4k,lazy_refcounts=on",
    "compat=1.1,cluster_size=2M", "compat=1.1,preallocation=metadata",
    "extended_l2=on", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M,refcount_bits=1",
    "data_file=DATA", "data_file=DATA,cluster_size=4k", "data_file=DATA,extended_l2=on",
    "data_file=DATA,data_file_raw=on", "data_file=DATA,data_file_raw=on,cluster_size=512",
    "data_file=DATA,data_file_raw=on,extended_l2=on,cluster_size=16k",
)


def image_options(path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}, **options}


@asynccontextmanager
async def disk(options: dict[str, Any]) -> AsyncIterator[Backend]:
    """A user of a disk in a graph of its own, which is closed in order at the end."""
    graph = Graph()
    node = await graph.open(options)
    user = graph.attach_backend(node, "test", READ | (WRITE | RESIZE if not node.read_only else READ))
    try:
        yield user
    finally:
        await graph.detach_backend(user)
        await graph.close(node)


def content(path: Path) -> bytes:
    """What an image reads as, by qemu-img."""
    plain = path.with_suffix(".plain")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(plain))
    found = plain.read_bytes()
    if parse_header(path.read_bytes()[:1 << 21]).autoclear & RAW_EXTERNAL:
        assert path.with_suffix(".data").read_bytes()[:len(found)] == found
    return found


def check(path: Path, *allowed: int) -> None:
    """qemu-img check finds nothing wrong; 3 among ``allowed``: leaks at most."""
    result = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True, timeout=30)
    assert result.returncode in (0, *allowed), result.stdout + result.stderr


def with_data_file(options: str, path: Path) -> str:
    """Options of qemu-img create, with the path of an external data file beside the image where they say DATA."""
    return options.replace("DATA", str(path.with_suffix(".data")))


def made(path: Path, options: str, size: int = SIZE, base: bytes | None = None) -> bytearray:
    """An image of qemu-img; with ``base``, over a raw file of that content. Returns what it reads as."""
    backing: list[str] = []
    if base is not None:
        path.with_name("base").write_bytes(base)
        backing = ["-b", "base", "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", with_data_file(options, path), *backing, str(path), str(size))
    return bytearray((base or b"")[:size].ljust(size, b"\0"))


async def some_requests(user: Backend, model: bytearray, rnd: random.Random, count: int) -> None:
    """Random requests to a disk and to its model."""
    length = len(model)
    for _ in range(count):
        offset = rnd.choice((rnd.randrange(length), rnd.randrange(length) & -4096))
        size = min(length - offset, rnd.choice((1, 512, 4096, 4096, 65536, 300_000)))
        kind = rnd.choice(("write", "write", "write", "zero", "discard", "flush", "read"))
        if kind == "write":
            model[offset:offset + size] = data = rnd.randbytes(size)
            await user.pwrite(offset, data, rnd.choice((0, 0, FUA)))
        elif kind == "zero":
            model[offset:offset + size] = bytes(size)
            await user.write_zeroes(offset, size, rnd.choice((0, FUA, MAY_UNMAP)))
        elif kind == "discard":
            await user.discard(offset, size)
            data = bytes(await user.pread(offset, size))
            assert all(got in (0, old) for got, old in zip(data, model[offset:offset + size], strict=True))
            model[offset:offset + size] = data
        elif kind == "flush":
            await user.flush()
        else:
            assert bytes(await user.pread(offset, size)) == model[offset:offset + size]


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("options", IMAGES)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_random_requests_leave_an_image_that_qemu_reads_alike(
    options: str, backed: bool, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    if backed and ("preallocation" in options or "raw=on" in options):
        return
    path, rnd = tmp_path_factory.mktemp("image") / "disk.qcow2", random.Random(seed)
    model = made(path, options, base=rnd.randbytes(SIZE // 2 + 77) if backed else None)

    async def go() -> None:
        async with disk(image_options(path, **{"l2-cache-size": 4096, "refcount-cache-size": 4096})) as user:
            await some_requests(user, model, rnd, 40)
            assert bytes(await user.pread(0, SIZE)) == model

    asyncio.run(go())
    check(path)
    assert content(path) == model


@pytest.mark.parametrize("options", IMAGES)
def test_an_image_is_used_by_qemu_and_by_us_in_turns(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(options)
    model = made(path, options)

    async def ours() -> None:
        async with disk(image_options(path)) as user:
            assert bytes(await user.pread(0, SIZE)) == model
            await some_requests(user, model, rnd, 15)
            assert bytes(await user.pread(0, SIZE)) == model

    for value in range(1, 4):
        offset, size = rnd.randrange(SIZE // 2) & -512, 123 * KiB
        zero = rnd.randrange(SIZE - 70 * KiB) & -512
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {value} {offset} {size}", "-c", f"write -z {zero} 64k",
            "-c", f"discard {zero} 32k", str(path))
        model[offset:offset + size] = bytes([value]) * size
        model[zero:zero + 64 * KiB] = bytes(64 * KiB)
        asyncio.run(ours())
        check(path)
        assert content(path) == model


@pytest.mark.parametrize("options", ["compat=1.1", "extended_l2=on"])
def test_a_file_that_ends_inside_of_a_cluster_grows_for_what_is_written_there(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(7)
    model = made(path, options)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4k", str(path))
    model[:4096] = b"\x01" * 4096
    with path.open("r+b") as file:
        file.truncate((path.stat().st_size - 1 & -65536) + 4096)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            model[2048:60_000] = data = rnd.randbytes(60_000 - 2048)
            await user.pwrite(2048, data)

    asyncio.run(go())
    check(path)
    assert content(path) == model


@pytest.mark.parametrize("options", [*IMAGES, "compat=1.1,compression_type=zstd"])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_what_qemu_wrote_is_read(options: str, compressed: bool, tmp_path: Path) -> None:
    if compressed and ("preallocation" in options or "DATA" in options):
        pytest.skip("qemu-img has no compressed images with preallocation, and none with external data files")
    path, rnd = tmp_path / "disk.qcow2", random.Random(options)
    plain = tmp_path / "plain"
    data = bytearray(b"".join(bytes([rnd.randrange(256)]) * 512 for _ in range(SIZE // 512)))
    data[100 * KiB:300 * KiB] = bytes(200 * KiB)
    plain.write_bytes(data)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *(["-c"] if compressed else []), "-o",
        with_data_file(options, path), str(plain), str(path))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 5k 7k", "-c", "write -z 700k 30k", str(path))
    data[5 * KiB:12 * KiB], data[700 * KiB:730 * KiB] = b"\x09" * (7 * KiB), bytes(30 * KiB)

    async def go() -> None:
        async with disk(image_options(path, **{"read-only": True})) as user:
            assert bytes(await user.pread(0, SIZE)) == data
            for _ in range(100):
                offset = rnd.randrange(SIZE - 5000)
                assert bytes(await user.pread(offset, 5000)) == data[offset:offset + 5000]
        async with disk(image_options(path)) as user:
            await some_requests(user, data, rnd, 30)

    asyncio.run(go())
    check(path)
    assert content(path) == data


def test_a_chain_is_found_by_the_names_in_the_headers(tmp_path: Path) -> None:
    data = made(tmp_path / "low.qcow2", "compat=1.1", base=random.Random(1).randbytes(SIZE))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 64k 64k", str(tmp_path / "low.qcow2"))
    json_name = '{"driver": "qcow2", "file.driver": "file", "file.filename": "%s"}' % (tmp_path / "low.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"json:{json_name}", "-F", "qcow2",
        str(tmp_path / "mid.qcow2"))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", str(tmp_path / "top.qcow2"),
        str(2 * SIZE))
    data[64 * KiB:128 * KiB] = b"\x01" * (64 * KiB)

    async def go() -> None:
        async with disk(image_options(tmp_path / "top.qcow2")) as user:
            assert bytes(await user.pread(0, 2 * SIZE)) == data + bytes(SIZE)
            await user.pwrite(0, b"top")
            extents = await user.block_status(0, 2 * SIZE)
            assert [extent.depth for extent in extents if extent.allocated][:3] == [1, 3, 4]
        async with disk(image_options(tmp_path / "top.qcow2", backing=None)) as user:
            assert bytes(await user.pread(3, 1000)) == data[3:1003]  # the rest of its cluster was copied
            assert bytes(await user.pread(64 * KiB, 64 * KiB)) == bytes(64 * KiB)

    asyncio.run(go())
    check(tmp_path / "top.qcow2")


@pytest.mark.parametrize("name", [
    "json:" + "[" * 1000, "json:" + '{"a":' * 200, 'json:{"driver": {}}', 'json:{"a.b": 1, "a": 2}',
    'json:{"driver": "raw", "file": {"driver": "file", "filename": "\\u0000"}}'])
def test_a_backing_name_made_on_purpose_is_an_error_as_any_other(name: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as image:
        write_image(image.fileno(), new_header(SIZE, backing_file=name, backing_fmt="raw"), "off")

    async def go() -> None:
        with pytest.raises((OptionError, OSError)):
            await Graph().open(image_options(path))

    asyncio.run(go())


@pytest.mark.parametrize("options", ["compat=1.1,cluster_size=4k", "extended_l2=on,cluster_size=16k", "extended_l2=on"])
def test_a_snapshot_keeps_what_it_has_while_the_disk_is_written(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(3)
    model = made(path, options)

    async def write() -> None:
        async with disk(image_options(path)) as user:
            assert bytes(await user.pread(0, SIZE)) == model
            await some_requests(user, model, rnd, 40)

    asyncio.run(write())
    kept = bytes(model)
    run("qemu-img", "snapshot", "-c", "kept", str(path))
    asyncio.run(write())
    check(path)
    assert content(path) == model
    run("qemu-img", "snapshot", "-a", "kept", str(path))
    check(path)
    assert content(path) == kept
    model[:] = kept
    asyncio.run(write())
    run("qemu-img", "snapshot", "-d", "kept", str(path))
    check(path)
    assert content(path) == model


@pytest.mark.parametrize("options", [
    "compat=1.1", "compat=1.1,cluster_size=512", "compat=0.10,cluster_size=4k", "extended_l2=on",
    "extended_l2=on,cluster_size=16k", "data_file=DATA", "data_file=DATA,extended_l2=on,cluster_size=16k",
    "data_file=DATA,data_file_raw=on", "data_file=DATA,data_file_raw=on,extended_l2=on,cluster_size=16k"])
def test_the_size_changes_both_ways(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(4)
    model = made(path, options, base=None if "raw" in options else rnd.randbytes(SIZE))

    async def go() -> None:
        async with disk(image_options(path)) as user:
            for length in (SIZE - 300 * KiB, 4 * SIZE, SIZE // 3 & -512, 3 * SIZE + 512):
                await some_requests(user, model, rnd, 10)
                await user.truncate(length)
                del model[length:]
                model.extend(bytes(length - len(model)))
                assert bytes(await user.pread(0, length)) == model

    asyncio.run(go())
    check(path)
    assert content(path) == model


@pytest.mark.parametrize("options", ["compat=1.1,cluster_size=4k", "extended_l2=on,cluster_size=16k",
                                     "data_file=DATA,cluster_size=4k", "data_file=DATA,extended_l2=on"])
def test_emptied_images_stay_small_however_often(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(5)
    base = rnd.randbytes(SIZE)
    made(path, options, base=base)
    sizes = []

    async def go() -> None:
        async with disk(image_options(path)) as user:
            for _ in range(12):
                await user.pwrite(0, rnd.randbytes(SIZE // 2))
                await user.flush()
                await user.node.make_empty()
                assert bytes(await user.pread(0, SIZE)) == base
                await user.pwrite(5000, b"written before the flush")
                await user.flush()
                sizes.append(path.stat().st_size)

    asyncio.run(go())
    assert sizes[-1] == sizes[4]
    check(path)
    assert content(path) == base[:5000] + b"written before the flush" + base[5024:]


def log_of(path: Path, requests: Callable[[Backend, Any], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Do requests to an image whose file is logged, and do not close it."""

    async def go() -> None:
        graph = Graph()
        options_ = image_options(path, **options)
        options_["file"] = {"driver": "blklog", "node-name": "log", "file": options_["file"],
                            "log": {"driver": "file", "filename": str(path.with_name("log"))}}
        path.with_name("log").write_bytes(b"")
        node = await graph.open(options_)
        await requests(graph.attach_backend(node, "test", READ | WRITE), graph.find("log"))
        await graph.find("log").close()

    asyncio.run(go())


def cuts(path: Path, before: bytes, rnd: random.Random, count: int, ends: Collection[int] = (),
         share: float = 0.5) -> Iterator[tuple[int, bytes]]:
    """The image of `log_of` as a crash may leave it: cut off after some entries of the log, ``ends`` among them.

    Of those since the last flush a ``share`` is there, by chance; at ``ends`` all of them.
    """
    with path.with_name("log").open("rb") as log:
        entries = list(read_log(log))
    for cut in sorted({*ends, *rnd.sample(range(len(entries) + 1), min(count, len(entries) + 1))}):
        image = bytearray(before)
        safe = max((index for index in range(cut) if entries[index].flags & FLUSH_FLAG), default=0)
        for index, entry in enumerate(entries[:cut]):
            if index < safe or cut in ends or rnd.random() < share:
                image.extend(bytes(max(0, entry.offset + len(entry.data) - len(image))))
                image[entry.offset:entry.offset + len(entry.data)] = entry.data
        yield cut, bytes(image)


@pytest.mark.parametrize("options", ["compat=1.1", "compat=1.1,cluster_size=512", "compat=0.10,cluster_size=4k",
                                     "extended_l2=on", "extended_l2=on,cluster_size=16k"])
def test_a_crash_at_any_write_leaves_leaks_at_worst_and_what_was_flushed(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(options)
    base = rnd.randbytes(SIZE // 2)
    model = made(path, options, base=base)
    before = path.read_bytes()
    # (entries of the log, what the disk reads as) at the end of each flush
    flushed: list[tuple[int, bytes]] = [(0, bytes(model))]

    async def requests(user: Backend, log: Any) -> None:
        for step in range(12):
            await some_requests(user, model, rnd, 5)
            if step % 4 == 3:
                await user.node.make_empty()
                model[:] = base.ljust(SIZE, b"\0")
                await some_requests(user, model, rnd, 3)
            await user.flush()
            flushed.append((log._entries, bytes(model)))

    log_of(path, requests, **{"l2-cache-size": 4096, "refcount-cache-size": 4096})
    crashed = tmp_path / "crashed.qcow2"
    ends = dict(flushed)
    for count, image in cuts(path, before, rnd, 60, ends):
        crashed.write_bytes(image)
        check(crashed, 3)
        if count in ends:
            assert content(crashed) == ends[count], f"after {count} entries"


@pytest.mark.parametrize("grows", [False, True])
def test_a_disk_that_is_made_writable_sees_what_was_written_meanwhile_or_refuses(grows: bool, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = made(path, "compat=1.1" if grows else "compat=1.1,preallocation=metadata")

    async def go() -> None:
        graph = Graph()
        file = {"driver": "file", "node-name": "file", "filename": str(path)}
        node = await graph.open({"driver": "qcow2", "file": file, "read-only": True})
        reader = graph.attach_backend(node, "reader", READ)
        assert bytes(await reader.pread(0, SIZE)) == model
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 128k", str(path))
        model[64 * KiB:192 * KiB] = b"\x07" * (128 * KiB)
        run("qemu-io", "-f", "qcow2", "-c", "write -z -u 256k 128k", str(path))
        if grows:
            with pytest.raises(OptionError, match="opening it anew"):
                await graph.reopen([(each, {"read-only": False}) for each in (node, graph.find("file"))])
            return
        await graph.reopen([(each, {"read-only": False}) for each in (node, graph.find("file"))])
        user = graph.attach_backend(node, "writer", READ | WRITE)
        await some_requests(user, model, random.Random(8), 30)
        await graph.detach_backend(user)
        await graph.reopen([(each, {"read-only": True}) for each in (node, graph.find("file"))])
        check(path)
        assert bytes(await reader.pread(0, SIZE)) == model
        await graph.detach_backend(reader)
        await graph.close(node)

    asyncio.run(go())
    assert content(path) == model


# --- what is refused ---


def refuses(path: Path, said: str) -> None:
    async def go() -> None:
        with pytest.raises(OptionError, match=said):
            await Graph().open(image_options(path))

    asyncio.run(go())


def test_an_encrypted_image_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    with path.open("r+b") as image:  # qemu-img measures the processor before it encrypts, and fails on a busy one
        image.seek(32)
        image.write((2).to_bytes(4, "big"))
    refuses(path, "LUKS")


def test_an_image_that_is_corrupt_is_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    with path.open("r+b") as file:
        file.seek(79)
        file.write(bytes([2]))

    async def go() -> None:
        with pytest.raises(OptionError, match="corrupt"):
            await Graph().open(image_options(path))
        async with disk(image_options(path, **{"read-only": True})) as user:
            assert bytes(await user.pread(0, 10)) == bytes(10)

    asyncio.run(go())


def test_a_refcount_table_that_names_one_block_often_is_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    with path.open("r+b") as file:
        file.seek(64 * KiB)
        block = file.read(8)
        file.seek(64 * KiB)
        file.write(block * 8192)

    async def go() -> None:
        with pytest.raises(OptionError, match="refcount block"):
            await Graph().open(image_options(path))
        async with disk(image_options(path, **{"read-only": True})) as user:
            assert bytes(await user.pread(0, 10)) == bytes(10)

    asyncio.run(go())


def test_a_chain_that_loops_is_refused_at_once(tmp_path: Path) -> None:
    for name, below in (("a", "b"), ("b", "a")):
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", f"{below}.qcow2", "-F", "qcow2",
            str(tmp_path / f"{name}.qcow2"), "1M")

    async def go() -> None:
        graph = Graph()
        with pytest.raises(OptionError, match="twice"):
            await graph.open(image_options(tmp_path / "a.qcow2"))
        assert not graph.nodes

    asyncio.run(go())
