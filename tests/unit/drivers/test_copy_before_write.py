"""Copy-before-write, beside what the conformance suite and the scenarios of a standby say of it."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Literal

import pytest

from blockstep.block.driver import FAST, MAY_UNMAP
from blockstep.block.graph import Graph
from blockstep.drivers.copy_before_write import CopyBeforeWrite
from blockstep.drivers.file import File
from blockstep.drivers.overlay import Overlay
from blockstep.units import GiB, KiB, MiB
from tests.disks import ram


def test_zeroes_are_fast_only_where_nothing_has_to_be_saved() -> None:
    async def main() -> None:
        graph = Graph()
        disk, saved = await ram(graph, "disk", b"x" * 256 * KiB), await ram(graph, "saved", 256 * KiB)
        await graph.open({"driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "saved"})
        top = graph.find("top")
        await top.pwrite(0, b"y" * 64 * KiB)
        await top.write_zeroes(0, 64 * KiB, FAST | MAY_UNMAP)
        with pytest.raises(OSError, match="old content has to be saved") as caught:
            await top.write_zeroes(0, 128 * KiB, FAST | MAY_UNMAP)
        assert caught.value.errno == errno.ENOTSUP
        assert disk.content == bytes(64 * KiB) + b"x" * 192 * KiB
        await top.write_zeroes(0, 128 * KiB, MAY_UNMAP)
        assert saved.content == b"x" * 128 * KiB + bytes(128 * KiB)

    asyncio.run(main())


@pytest.mark.parametrize("breaks", ["break-guest-write", "break-snapshot"])
def test_what_cannot_be_read_to_save_it_breaks_what_was_chosen(breaks: str, tmp_path: Path) -> None:
    """Also where the disk says so at once, and not when it is waited for."""
    async def main() -> None:
        graph, heard = Graph(), list[OSError]()
        (tmp_path / "disk").write_bytes(b"x" * 64 * KiB)
        disk = await graph.open({"driver": "file", "node-name": "disk", "filename": str(tmp_path / "disk")})
        await ram(graph, "saved", 64 * KiB)
        top = await graph.open({"driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "saved",
                                "cluster-size": 4096, "on-cbw-error": breaks})
        assert isinstance(top, CopyBeforeWrite)
        assert isinstance(disk, File)
        top.on_error = heard.append

        def broken(fd: int, length: int, offset: int) -> bytes:
            raise OSError(errno.EIO, "no")

        disk._read = broken
        if breaks == "break-snapshot":
            assert top.begin_write(0, b"y" * 4096) is None
            assert top.broken is heard[0]
        else:
            with pytest.raises(OSError, match="no"):
                top.begin_write(0, b"y" * 4096)
        assert len(heard) == 1

    asyncio.run(main())


@pytest.mark.parametrize("what", ["zeroes", "discard", "shrink"])
def test_holes_are_saved_as_holes_however_long_they_are(
    what: Literal["zeroes", "discard", "shrink"], tmp_path: Path
) -> None:
    """A guest discards all of its disk when it makes a filesystem: what a sparse disk has to save of it is little."""
    size, data = 100 * GiB + 777, bytes(range(1, 251)) * 20

    async def main() -> None:
        graph = Graph()
        file = tmp_path / "disk"
        file.touch()
        with open(file, "r+b") as disk:
            disk.truncate(size)
        await graph.open({"driver": "file", "node-name": "disk", "filename": str(file), "discard": "unmap"})
        saved = await graph.open({"driver": "overlay", "node-name": "saved", "backing": "disk", "memory-limit": MiB})
        assert isinstance(saved, Overlay)
        top = await graph.open({"driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "saved",
                                "cluster-size": 4096})
        places = [1000, 7 * GiB - 100, size - len(data)]
        for place in places:
            await graph.find("disk").pwrite(place, data)
        await top.pwrite(5 * GiB + 5, b"saved before")
        if what == "zeroes":
            await top.write_zeroes(1, size - 2, MAY_UNMAP)
        elif what == "discard":
            await top.discard(1, size - 2)
        else:
            await top.resize(3)
        assert saved.used < MiB
        for place in places:
            assert bytes(await saved.pread(place - 100, 100 + len(data))) == bytes(100) + data
        assert not any(await saved.pread(5 * GiB, 8192))
        if what == "zeroes":
            await top.pwrite(6 * GiB, b"new")
            assert not any(await saved.pread(6 * GiB, 8192))
        for name in ("top", "saved", "disk"):
            await graph.close(graph.find(name))

    asyncio.run(main())


def test_zeroes_within_what_is_overwritten_take_no_room() -> None:
    async def main() -> None:
        graph, size = Graph(), 2 * MiB + 5
        before = bytearray(size)
        before[MiB:MiB + 4096] = random.Random(1).randbytes(4096)
        await ram(graph, "disk", bytes(before))
        saved = await graph.open({"driver": "overlay", "node-name": "saved", "backing": "disk"})
        assert isinstance(saved, Overlay)
        top = await graph.open({"driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "saved",
                                "cluster-size": 4096})
        await top.pwrite(1, b"n" * (size - 1))
        assert saved.used <= 132 * KiB  # the piece with the data, and the end
        assert bytes(await saved.pread(0, size)) == before

    asyncio.run(main())
