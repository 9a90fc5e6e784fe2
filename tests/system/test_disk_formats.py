"""Disks of a pair that are images: how they are named, made, shown, refused and closed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path

import pytest

from blockstep.drivers.create import CreateQcow2
from blockstep.errors import BlockstepError
from blockstep.images.convert import Conversion, convert
from blockstep.images.opened import ImageName
from blockstep.testing.numbered import make_image
from blockstep.testing.pair import Pair, Side
from blockstep.units import MiB
from tests.peers import need, run
from tests.scenarios import scenario


def checked(path: Path) -> None:
    """qemu-img finds neither leaks nor anything worse."""
    need("qemu-img")
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


async def stopped(side: Side) -> None:
    side.send(signal.SIGTERM)
    assert await side.ended() == 0, side.printed


@pytest.mark.parametrize("format", ["qcow2", "overlay"])
@scenario
async def test_a_stop_in_order_leaves_both_disks_equal_and_their_images_clean(tmp_path: Path, format: str) -> None:
    async with Pair(tmp_path, disks=2, size=4 * MiB, format=format) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(200)
        async with pair.primary.clients() as (guest, _):
            await guest.write_zeroes(MiB, MiB)
            await guest.discard(2 * MiB, MiB)
            await guest.flush()
        for side in (pair.primary, pair.standby):
            assert [disk["format"] for disk in (await side.status())["disks"]] == [format, format]
        there = await pair.primary.read_disks()
        await stopped(pair.primary)
        await pair.standby.until(state="lost")
        await stopped(pair.standby)
        for role in ("primary", "standby"):
            for disk in range(2):
                assert await pair.file(role, disk) == b"".join(there[disk])
                if format == "qcow2":
                    checked(tmp_path / f"disk{disk}.{role}")
        left = {path.suffix for path in tmp_path.iterdir()} - {".original", ".primary", ".standby", ".log", ".ended"}
        assert not left, "the standby's buffers leave no files behind"


@scenario
async def test_the_disk_of_a_primary_may_have_backing_images_and_they_stay_as_they_are(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=4 * MiB, format="qcow2") as pair:
        base = tmp_path / "base.raw"
        make_image(base, 3 * MiB, 5)
        middle, top = tmp_path / "middle.qcow2", tmp_path / "disk0.primary"
        CreateQcow2(filename=str(middle), size=4 * MiB, backing_file="base.raw", backing_fmt="raw").create()
        CreateQcow2(filename=str(top), size=4 * MiB, backing_file="middle.qcow2", backing_fmt="qcow2").create()
        before = base.read_bytes(), middle.read_bytes()
        pair.originals[0].write_bytes(before[0].ljust(4 * MiB, b"\0"))
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(100)
        await pair.checkpoint_shows()
        await stopped(pair.primary)
        assert (base.read_bytes(), middle.read_bytes()) == before
        pair.writes.prove([[await pair.file("primary")]])
        await stopped(pair.standby)
        assert await pair.file("standby") == await pair.file("primary")


@scenario
async def test_an_image_is_never_taken_for_raw_content_nor_raw_content_for_an_image(tmp_path: Path) -> None:
    """The default is raw, whatever the file looks like: its bytes are the disk."""
    async with Pair(tmp_path, size=4 * MiB) as pair:
        image = tmp_path / "disk0.primary"
        CreateQcow2(filename=str(image), size=64 * MiB).create()
        with image.open("r+b") as file:
            file.truncate(4 * MiB)
        before = image.read_bytes()
        await pair.start()
        await pair.primary.until(health="healthy")
        assert b"".join((await pair.standby.read_disks())[0]) == before


def broken(path: Path, how: str) -> str:
    """Make a file that is no image to be used; returns its format for the command line."""
    CreateQcow2(filename=str(path), size=4 * MiB).create()
    with path.open("r+b") as file:
        if how == "dirty":
            file.seek(79)
            file.write(b"\x01")
        elif how == "corrupt":
            file.seek(79)
            file.write(b"\x02")
        elif how == "short":
            file.truncate(100)
        elif how == "raw":
            file.write(bytes(4096))
        elif how == "table":
            file.seek(40)
            file.write((12345).to_bytes(8, "big"))
    return "overlay" if how == "overlay" else "qcow2"


@pytest.mark.parametrize(("role", "how", "says"), [
    ("primary", "corrupt", "repair"), ("standby", "short", "header"), ("primary", "raw", "magic"),
    ("standby", "table", "l1_table_offset"), ("standby", "overlay", "overlay")])
@scenario
async def test_an_image_that_cannot_be_used_is_one_error_before_anything_is_changed(
        tmp_path: Path, role: str, how: str, says: str) -> None:
    path = tmp_path / "disk"
    format = broken(path, how)
    before = path.read_bytes()
    options = ["--standby", "127.0.0.1:1"] if role == "primary" else ["--link", "127.0.0.1:0"]
    with pytest.raises(BlockstepError) as refused:
        await Side.start(role, tmp_path, {"new": f"{tmp_path / 'new'},size=1M", "d": f"{path},format={format}"},
                         *options)
    said = (tmp_path / f"{role}.log").read_text()
    assert said.startswith("blockstep: ")
    assert said.count("\n") == 1, said
    assert says in said, (said, refused)
    assert str(path) in said
    assert path.read_bytes() == before
    assert not (tmp_path / "new").exists()


@scenario
async def test_a_missing_file_is_made_in_its_format(tmp_path: Path) -> None:
    need("qemu-img")
    options = ["--standby", "127.0.0.1:1"]
    side = await Side.start("primary", tmp_path, {"a": f"{tmp_path / 'a,b'},format=qcow2,size=3M",
                                                  "c": f"{tmp_path / 'c'},size=2M,format=overlay"}, *options)
    try:
        assert [disk["size"] for disk in (await side.status())["disks"]] == [3 * MiB, 2 * MiB]
        await stopped(side)
    finally:
        await side.close()
    assert '"format": "qcow2"' in run("qemu-img", "info", "--output=json", str(tmp_path / "a,b")).stdout
    assert (tmp_path / "c").read_bytes().startswith(b"BLKSTPOV")


@scenario
async def test_the_demo_works_on_a_copy_of_an_image(tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    make_image(raw, 4 * MiB, 3)
    await convert(Conversion([ImageName(str(raw), "raw")], ImageName(str(image), "qcow2")))
    before = image.read_bytes()
    from tests.system.test_commands import blockstep

    async with asyncio.timeout(50):
        code, said, error = await blockstep("demo", "--checkpoints", "1", "--disk", image, "--format", "qcow2")
    assert code == 0, error
    assert "proven:" in said
    assert image.read_bytes() == before
