"""Persistent bitmaps of qcow2 images that cannot be stored, used or believed: errors by name."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, RESIZE, WRITE
from blockstep.drivers.qcow2.create import new_header, write_image
from blockstep.errors import OperationBlocked, OptionError
from blockstep.units import MiB
from tests.interop.test_qcow2_bitmaps import SIZE, Model, judge, told
from tests.interop.test_qcow2_driver import check, disk, image_options, made
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import our_repair

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")


async def over_faults(path: Path, *rules: dict[str, Any]) -> tuple[Graph, Any, Any]:
    """The image over a file that fails as ``rules`` say once its ``state`` is set to 2."""
    graph = Graph()
    faulty = await graph.open({"driver": "blkdebug", "node-name": "faulty", "file": {
        "driver": "file", "filename": str(path)}, "inject-error": [{"state": 2, **rule} for rule in rules]})
    return graph, faulty, await graph.open({"driver": "qcow2", "node-name": "disk", "file": "faulty"})


@pytest.mark.parametrize("failing", ["write", "flush"])
def test_bitmaps_that_cannot_be_stored_are_told_of(failing: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    run("qemu-img", "bitmap", "--add", str(path), "kept")

    async def go() -> None:
        graph, faulty, node = await over_faults(path, {"event": failing, "errno": 28, "once": True})
        user = graph.attach_backend(node, "test", READ | WRITE)
        await user.pwrite(0, b"x")
        await user.flush()
        await graph.detach_backend(user)
        faulty.state = 2
        with pytest.raises(OSError, match="'kept' of node 'disk' could not be stored, and are inconsistent"):
            await graph.close(node)
        assert "disk" not in graph.nodes
        await graph.close(faulty)

    asyncio.run(go())
    run("qemu-img", "check", "-q", "-r", "leaks", str(path))
    judge(path, {"kept": Model(65536, True, inconsistent=True)})


@pytest.mark.parametrize("marked", [True, False])
def test_a_change_to_read_only_that_fails_leaves_no_bitmap_that_could_miss_a_write(
    marked: bool, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    run("qemu-img", "bitmap", "--add", str(path), "kept")

    async def go() -> None:
        graph, faulty, node = await over_faults(path, {"event": "write", "errno": 5})
        writer = graph.attach_backend(node, "writer", READ | WRITE | RESIZE)
        assert told(path)["kept"][1] == {"auto", "in-use"}

        def now_it_fails(change: Any) -> None:
            assert told(path)["kept"][1] == {"auto"}
            faulty.state = 1 if marked else 2
            raise OptionError("read-only", True, "off")

        with pytest.raises(OptionError):
            await graph.reopen([(node, {"read-only": True})], now_it_fails)
        assert not node.read_only
        if marked:
            await writer.pwrite(0, b"x")
            assert told(path)["kept"][1] == {"auto", "in-use"}
        else:
            for write in (writer.pwrite(0, b"x"), writer.discard(0, 4096), writer.write_zeroes(0, 4096),
                          writer.truncate(SIZE // 2)):
                with pytest.raises(OSError, match="could not be marked"):
                    await write
            faulty.state = 1
            await graph.detach_backend(writer)
            await graph.reopen([(node, {"read-only": True})])
            await graph.reopen([(node, {"read-only": False})])
            writer = graph.attach_backend(node, "writer", READ | WRITE)
            await writer.pwrite(0, b"x")
        await graph.detach_backend(writer)
        await graph.close(node)
        await graph.close(faulty)

    asyncio.run(go())
    judge(path, {"kept": Model(65536, True, clusters={0})})


def test_a_bitmap_that_a_job_changes_keeps_its_node_writable(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")

    async def go() -> None:
        async with disk(image_options(path)) as user:
            bitmap = DirtyBitmap(user.node, "kept", persistent=True)
            release = bitmap.claim("job 'backup'")
            with pytest.raises(OptionError, match="job 'backup' uses bitmap 'kept'"):
                await user.node.prepare_reopen({"read-only": True})
            release()

    asyncio.run(go())
    judge(path, {"kept": Model(65536, True)})


def test_what_has_no_room_is_refused_when_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=0.10")

    def refused(said: str, granularity: int = 65536) -> None:
        async def go() -> None:
            async with disk(image_options(path, backing=None)) as user:
                with pytest.raises(OptionError, match=said):
                    DirtyBitmap.prepare_add(user.node, "new", granularity, persistent=True)
                assert not user.node.bitmaps

        asyncio.run(go())

    refused("version 2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(path), "8T")
    refused("larger granularity", 512)
    with path.open("wb") as image:  # with a backing file's name behind which the extension has no room
        write_image(image.fileno(), new_header(MiB, cluster_size=512, backing_file="b" * 360, backing_fmt="raw"), "off")
    refused("fit in 512")


def test_a_disk_does_not_grow_beyond_what_its_bitmaps_can_say(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(path), "2T")

    async def go() -> None:
        async with disk(image_options(path)) as user:
            DirtyBitmap.prepare_add(user.node, "fine", 512, persistent=True).commit()
            for length in (4 << 40, 0):
                with pytest.raises(OSError, match="'fine' could not be stored"):
                    await user.truncate(length)
            assert user.length == 2 << 40

    asyncio.run(go())
    judge(path, {"fine": Model(512, True)})


def test_what_an_inconsistent_bitmap_is_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    run("qemu-img", "bitmap", "--add", str(path), "lost")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "abort", str(path)], capture_output=True, timeout=60, check=False)
    assert told(path) == {"lost": (65536, {"auto", "in-use"})}

    async def go() -> None:
        async with disk(image_options(path)) as user:
            lost = user.node.bitmaps["lost"]
            other = DirtyBitmap(user.node, "other")
            await user.pwrite(0, b"x")
            await user.truncate(2 * SIZE)
            assert (lost.inconsistent, lost.enabled, lost.count()) == (True, False, 0)
            for use in (lost.prepare_clear, lambda: lost.prepare_enabled(True), lambda: lost.claim("somebody"),
                        lambda: lost.prepare_merge([other]), lambda: other.prepare_merge([lost])):
                with pytest.raises(OperationBlocked, match="full backup"):
                    use()
            with pytest.raises(OptionError, match="no other bitmap"):
                DirtyBitmap.prepare_add(user.node, "lost")
        check(path)
        assert told(path) == {"lost": (65536, {"auto", "in-use"})}
        async with disk(image_options(path)) as user:
            user.node.bitmaps["lost"].prepare_remove().commit()
            await user.node.keep_bitmaps()
            assert told(path) == {}
        check(path)

    asyncio.run(go())


# --- directories that somebody has made up ---

_KINDS: Final = {
    "size of the directory": (0, 8, 8, "directory"), "place of the directory": (0, 16, 8, "directory"),
    "number": (0, 0, 4, "nb_bitmaps|directory"),
    "place of a table": (1, 0, 8, "table"), "size of a table": (1, 8, 4, "table"),
    "flags": (1, 12, 4, "flags"), "type": (1, 16, 1, "type"), "granularity": (1, 17, 1, "granularity|larger|table"),
    "name": (1, 18, 2, "name|directory"), "extra": (1, 20, 4, "directory"), "place of bits": (2, 0, 8, "table entry"),
}


def places(data: bytearray) -> tuple[int, int, int]:
    """Where the extension, the first entry of the directory, and the first entry of its table are."""
    extension = data.index((0x23852875).to_bytes(4, "big")) + 8
    directory = int.from_bytes(data[extension + 16:extension + 24], "big")
    return extension, directory, int.from_bytes(data[directory:directory + 8], "big")


def opens(path: Path, said: str | None) -> None:
    """It is refused with those words, read-only or not; or (None) not."""

    async def go(read_only: bool) -> None:
        if said is None:
            async with disk(image_options(path, **{"read-only": read_only})):
                return
        with pytest.raises(OptionError, match=said):
            await Graph().open(image_options(path, **{"read-only": read_only}))

    for read_only in (True, False):
        asyncio.run(go(read_only))


@pytest.mark.parametrize("kind", _KINDS)
def test_a_field_of_the_bitmaps_that_is_wrong_is_named_and_repair_gives_the_bitmaps_up(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1")
    run("qemu-img", "bitmap", "--add", str(path), "first")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(path))
    where, at, size, said = _KINDS[kind]
    good = bytearray(path.read_bytes())
    at += places(good)[where]
    for value in (1 << size * 8 - 1, (1 << size * 8) - 1, 1 << 40, 1 << 60, 65537, 31, 63):
        bad = good[:]
        if value >= 1 << size * 8 or (kind, value) in (("granularity", 31), ("name", 63)):
            continue
        bad[at:at + size] = value.to_bytes(size, "big")
        path.write_bytes(bad)
        opens(path, said)
    our_repair(path, "all")
    opens(path, None)
    check(path)
