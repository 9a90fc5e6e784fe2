"""Images that a QEMU with lazy refcounts was killed over: repaired when they are opened for writing."""

from __future__ import annotations

import asyncio
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.qcow2.format import AT_INCOMPATIBLE, CORRUPT, DIRTY, EXTENDED_L2
from blockstep.errors import OptionError
from blockstep.testing.processes import blockstep, unix_uri
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
from tests.peers import need, run, started
from tests.unit.drivers.qcow2.images import Damage
from tests.unit.qmp.support import until

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")


def crashed(path: Path, *commands: str, options: str = "", size: int = SIZE) -> bytearray:
    """An image whose QEMU has written, flushed, and then been killed. Returns what it reads as."""
    model = made(path, f"compat=1.1,lazy_refcounts=on{options}", size)
    words = [word for command in (*commands, "flush", "abort") for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], capture_output=True, timeout=60, check=False)
    assert bits(path) == DIRTY
    assert run("qemu-img", "check", path, check=False).returncode == 2
    return model


def bits(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[AT_INCOMPATIBLE:AT_INCOMPATIBLE + 8], "big") & ~EXTENDED_L2


@pytest.mark.parametrize("options", ["", ",cluster_size=512", ",cluster_size=4k,refcount_bits=1", ",extended_l2=on"])
def test_it_is_repaired_told_of_and_used(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = crashed(path, "write -P 1 0 300k", "write -P 2 500k 70k", "write -z 100k 64k", options=options)
    model[:300 * KiB], model[500 * KiB:570 * KiB] = bytes([1]) * (300 * KiB), bytes([2]) * (70 * KiB)
    model[100 * KiB:164 * KiB] = bytes(64 * KiB)
    events: list[tuple[str, Any]] = []

    async def go() -> None:
        async with disk(image_options(path, **{"read-only": True})) as user:
            assert bytes(await user.pread(0, SIZE)) == model
        assert bits(path) == DIRTY
        graph = Graph()
        graph.listeners.append(lambda name, data: events.append((name, data)))
        node = await graph.open(image_options(path))
        check(path)
        user = graph.attach_backend(node, "test", READ | WRITE)
        await some_requests(user, model, random.Random(options), 30)
        assert bytes(await user.pread(0, SIZE)) == model
        await graph.detach_backend(user)
        await graph.close(node)

    asyncio.run(go())
    [(name, data)] = events
    assert (name, data["node-name"], data["filename"]) == ("BLOCK_IMAGE_REPAIRED", "disk", str(path))
    assert data["corruptions-fixed"] > 0
    assert bits(path) == 0
    check(path)
    assert content(path) == model


def test_its_bitmaps_are_inconsistent_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1,lazy_refcounts=on")
    run("qemu-img", "bitmap", "--add", str(path), "lost")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "abort", str(path)],
                   capture_output=True, timeout=60, check=False)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            assert user.node.bitmaps["lost"].inconsistent

    asyncio.run(go())
    judge(path, {"lost": Model(65536, True, inconsistent=True)})


def test_a_power_cut_in_the_repair_leaves_an_image_that_the_next_one_repairs(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    crashed(path, *(f"write -P {value} {value * 64}k 4k" for value in range(1, 15)), options=",cluster_size=512")
    expected = content(path.rename(tmp_path / "copy.qcow2"))
    path.write_bytes((tmp_path / "copy.qcow2").read_bytes())
    crashed(path, *(f"write -P {value} {value * 64}k 4k" for value in range(1, 15)), options=",cluster_size=512")
    before = path.read_bytes()

    async def requests(user: Any, log: Any) -> None:
        await user.flush()

    log_of(path, requests)
    again = tmp_path / "again.qcow2"

    async def go() -> None:
        async with disk(image_options(again)) as user:
            await user.pwrite(SIZE - 1000, b"written")

    for cut, image in cuts(path, before, random.Random(7), 30, share=0.7):
        again.write_bytes(image)
        asyncio.run(go())
        check(again)
        assert content(again) == expected[:SIZE - 1000] + b"written" + expected[SIZE - 993:], f"after {cut}"


def test_the_event_loop_goes_on_meanwhile_and_who_gives_up_leaves_it_dirty(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 12 * MiB
    crashed(path, "write -P 1 0 11M", options=",cluster_size=512", size=size)

    async def go() -> None:
        graph = Graph()
        opening = asyncio.ensure_future(graph.open(image_options(path)))
        await until(lambda: "disk" in graph.unfinished and graph.unfinished["disk"].children)
        await asyncio.sleep(0.001)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert not graph.nodes
        assert bits(path) == DIRTY
        turns = 0
        opening = asyncio.ensure_future(graph.open(image_options(path)))
        while not opening.done():
            await asyncio.sleep(0.001)
            turns += 1
        await graph.close(await opening)
        assert turns > 10

    asyncio.run(go())
    assert bits(path) == 0
    check(path)


def test_what_cannot_be_repaired_and_what_is_corrupt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    crashed(path, "write -P 1 0 300k")
    image = Damage(path)
    image.put(AT_INCOMPATIBLE, DIRTY | CORRUPT)
    image.save()

    async def go(**options: Any) -> bool:
        async with disk(image_options(path, **options)) as user:
            return user.node.read_only

    with pytest.raises(OptionError, match="corrupt"):
        asyncio.run(go())
    assert asyncio.run(go(**{"auto-read-only": True}))
    image.put(AT_INCOMPATIBLE, DIRTY)
    image.put(40, 1 << 50)  # the L1 table is nowhere, and so nobody knows what is in use
    image.save()
    with pytest.raises(OptionError, match="cannot be repaired"):
        asyncio.run(go())
    assert asyncio.run(go(**{"auto-read-only": True}))


def test_the_command_line_says_so_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    crashed(path, "write -P 1 0 300k")
    done = run(*blockstep("img", "resize", "-f", "qcow2", path, "2M"))
    assert done.stderr.startswith(f"blockstep: {path} was not closed in order, and has been repaired: ")
    crashed(path, "write -P 1 0 300k")
    socket = tmp_path / "nbd"
    with (tmp_path / "stderr").open("w+") as said, started(
            blockstep("export", "--format", "qcow2", "--socket", socket, path), socket, stderr=said):
        run("nbdinfo", "--size", unix_uri(socket))
        said.seek(0)
        assert "has been repaired" in said.read()
    assert bits(path) == 0
    check(path)
