"""Copy-before-write, beside what the conformance suite and the scenarios of a standby say of it."""

from __future__ import annotations

import asyncio
import errno

import pytest

from blockstep.block.driver import FAST, MAY_UNMAP
from blockstep.block.graph import Graph
from blockstep.units import KiB
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
