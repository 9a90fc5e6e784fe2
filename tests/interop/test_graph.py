"""``blockstep graph`` draws a real QEMU."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.peers import blockstep, need, qemu_system, run

pytestmark = pytest.mark.interop


def test_a_running_qemu_can_be_drawn(tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    with qemu_system(tmp_path) as qmp:
        qmp.execute("blockdev-add", driver="raw", node_name="disk",
                    file={"driver": "file", "node-name": "low", "filename": str(tmp_path / "disk.img")})
        qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
        qmp.execute("block-export-add", type="nbd", id="out", node_name="disk", writable=True, name="disk")
        qmp.close()  # it serves one connection at a time

        tree = [line.split() for line in _graph(tmp_path).splitlines()]
        assert tree[1] == ["out", "export", "nbd"]
        assert tree[2] == ["└─", "disk", "raw", "1", "MiB", "rw--", "rwu-", "root"]
        assert tree[3][:5] == ["└─", "low", "file", "1", "MiB"]
        assert tree[3][-1] == str(tmp_path / "disk.img")
        assert len(json.loads(_graph(tmp_path, "--json"))["boxes"]) == 3
        assert _graph(tmp_path, "--format", "dot").startswith("digraph")
        ElementTree.fromstring(_graph(tmp_path, "--format", "svg"))


def _graph(directory: Path, *options: str) -> str:
    return run(*blockstep("graph", "--socket", directory / "qemu.qmp", *options)).stdout
