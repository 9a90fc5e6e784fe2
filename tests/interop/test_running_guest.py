"""A running QEMU, and what its operator does with the primary of its disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.testing.pair import Pair
from blockstep.units import MiB
from tests.peers import QMP, need, qemu_system
from tests.scenarios import scenario

pytestmark = pytest.mark.interop


def _disk(node: str, socket: Path) -> dict[str, object]:
    return {"driver": "raw", "node-name": node, "cache": {"direct": True}, "discard": "unmap",
            "file": {"driver": "nbd", "export": "disk0", "server": {"type": "unix", "path": str(socket)}}}


def _size(qmp: QMP) -> int:
    """What the guest's device has, in bytes."""
    [disk] = [one for one in qmp.execute("query-block") if "/disk0/" in one.get("qdev", "")]
    return int(disk["inserted"]["image"]["virtual-size"])


@scenario
async def test_a_disk_that_has_grown_is_given_to_a_running_guest_as_the_documentation_says(tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    async with Pair(tmp_path, size=2 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        with qemu_system(tmp_path, "-machine", "pc", "-accel", "tcg") as qmp:
            qmp.ask("blockdev-add", _disk("before", pair.primary.nbd))
            qmp.ask("device_add", {"driver": "virtio-blk-pci", "drive": "before", "id": "disk0"})
            assert _size(qmp) == 2 * MiB
            await pair.primary.execute("block_resize", device="disk0", size=3 * MiB)

            qmp.ask("blockdev-add", _disk("grown", pair.primary.nbd))
            qmp.ask("qom-set", {"path": "/machine/peripheral/disk0", "property": "drive", "value": "grown"})
            qmp.ask("block_resize", {"node-name": "grown", "size": 3 * MiB})
            qmp.ask("blockdev-del", {"node-name": "before"})
            assert _size(qmp) == 3 * MiB
