"""Images with internal snapshots or with bitmaps are emptied, and keep them."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.images.commit import commit
from blockstep.images.opened import ImageName
from blockstep.units import KiB, MiB
from tests.interop.test_qcow2_bitmaps import Model, judge
from tests.interop.test_qcow2_driver import (
    SIZE,
    check,
    content,
    cuts,
    disk,
    image_options,
    log_of,
    made,
    some_requests,
)
from tests.peers import need, run

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10,cluster_size=4k", "compat=1.1,cluster_size=512",
                                     "compat=1.1,extended_l2=on,cluster_size=16k"])
def test_a_commit_empties_an_image_with_snapshots_and_the_snapshots_stay(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(options)
    model = made(path, options, base=rnd.randbytes(SIZE))

    async def write() -> None:
        async with disk(image_options(path)) as user:
            await some_requests(user, model, rnd, 25)

    asyncio.run(write())
    run("qemu-img", "snapshot", "-c", "kept", str(path))
    kept = bytes(model)
    asyncio.run(write())
    asyncio.run(commit(ImageName(str(path), "qcow2")))
    check(path)
    assert (tmp_path / "base").read_bytes() == model
    assert content(path) == model
    mapped = run("qemu-img", "map", "-f", "qcow2", str(path)).stdout
    assert str(path) not in mapped
    run("qemu-img", "snapshot", "-a", "kept", str(path))
    check(path)
    # What was below the snapshot has changed by the commit; what it held itself has not.
    held = bytearray(content(path))
    for line in run("qemu-img", "map", "-f", "qcow2", str(path)).stdout.splitlines()[1:]:
        offset, length, _, name = line.split(maxsplit=3)
        if name == str(path):
            begin, end = int(offset, 16), int(offset, 16) + int(length, 16)
            assert held[begin:end] == kept[begin:end]
    run("qemu-img", "snapshot", "-d", "kept", str(path))
    check(path)


def test_at_once_it_is_refused_with_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    run("qemu-img", "snapshot", "-c", "kept", str(path))

    async def go() -> None:
        async with disk(image_options(path)) as user:
            with pytest.raises(OSError, match="internal snapshots") as caught:
                await user.node.prepare_empty()
            assert caught.value.errno == errno.ENOTSUP
            await user.pwrite(0, bytes([1]) * SIZE)
            await user.node.make_empty()
            assert bytes(await user.pread(0, SIZE)) == bytes(SIZE)

    asyncio.run(go())
    check(path)


def test_a_crash_while_an_image_with_snapshots_is_emptied_leaves_leaks_at_worst(tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(6)
    model = made(path, "compat=1.1,cluster_size=512")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 300k", str(path))
    run("qemu-img", "snapshot", "-c", "kept", str(path))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 6 100k 300k", str(path))
    model[:400 * KiB] = bytes([5]) * 100 * KiB + bytes([6]) * 300 * KiB
    before = path.read_bytes()

    async def requests(user, log) -> None:  # type: ignore[no-untyped-def]
        await user.node.make_empty()
        await user.flush()
        await user.pwrite(7, b"x")
        await user.flush()

    log_of(path, requests)
    crashed = tmp_path / "crashed.qcow2"
    for cut, image in cuts(path, before, rnd, 25, share=0.7):
        crashed.write_bytes(image)
        check(crashed, 3)
        found = content(crashed)
        for at in range(0, SIZE, 512):
            assert found[at:at + 512] in (model[at:at + 512], bytes(512), bytes(7) + b"x" + bytes(504)), f"after {cut}"
        run("qemu-img", "snapshot", "-a", "kept", str(crashed))
        assert content(crashed) == bytes([5]) * 300 * KiB + bytes(SIZE - 300 * KiB)


def test_a_commit_leaves_the_bitmaps_as_they_are_as_with_qemu(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        base, top = tmp_path / f"{name}-base.qcow2", tmp_path / f"{name}.qcow2"
        made(base, "compat=1.1", 8 * MiB)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top))
        run("qemu-img", "bitmap", "--add", str(top), "since")
        run("qemu-img", "bitmap", "--add", "--disable", "-g", "512", str(top), "off")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 128k", str(top))
    asyncio.run(commit(ImageName(str(tmp_path / "ours.qcow2"), "qcow2")))
    run("qemu-img", "commit", "-q", "-f", "qcow2", str(tmp_path / "theirs.qcow2"))
    for name in ("ours", "theirs"):
        judge(tmp_path / f"{name}.qcow2", {"since": Model(64 * KiB, True, clusters={16, 17}), "off": Model(512, False)})
        check(tmp_path / f"{name}-base.qcow2")
    assert content(tmp_path / "ours.qcow2") == content(tmp_path / "theirs.qcow2")


@pytest.mark.parametrize("options", ["compat=1.1", "compat=1.1,cluster_size=512"])
def test_emptied_again_and_again_an_image_with_bitmaps_stays_small(options: str, tmp_path: Path) -> None:
    path, rnd = tmp_path / "disk.qcow2", random.Random(5)
    made(path, options)
    for number in range(3):
        run("qemu-img", "bitmap", "--add", "-g", "512", str(path), f"b{number}")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 1M", str(path))
    sizes = []

    async def go() -> None:
        graph = Graph()
        node = await graph.open(image_options(path))
        user = graph.attach_backend(node, "test", READ | WRITE)
        for turn in range(12):
            await user.pwrite(0, rnd.randbytes(SIZE // 2))
            await user.flush()
            await node.make_empty()
            if turn % 4 == 2:
                node.bitmaps[f"b{turn // 4}"].prepare_remove().commit()
                await node.keep_bitmaps()
            await user.pwrite(5000, b"written before the flush")
            await user.flush()
            sizes.append(path.stat().st_size)
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    assert sizes[-1] == sizes[5]
    judge(path, {})
    assert content(path) == bytes(5000) + b"written before the flush" + bytes(SIZE - 5024)
