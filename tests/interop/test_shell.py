"""``blockstep shell`` with a real QEMU at the other end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockstep.qmp.client import connect
from blockstep.shell.complete import complete
from blockstep.shell.server import Server
from tests.peers import blockstep, need, qemu_system, run

pytestmark = pytest.mark.interop


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Path]:
    """The QMP socket of a QEMU."""
    need("qemu-system-x86_64")
    with qemu_system(tmp_path) as qmp:
        qmp.close()  # it serves one connection at a time
        yield tmp_path / "qemu.qmp"


def test_a_script_of_commands(qemu: Path, tmp_path: Path) -> None:
    (tmp_path / "a b.img").write_bytes(bytes(1 << 20))
    lines = f"""
        # comments and empty lines are skipped
        blockdev_add driver=raw node_name=disk read_only=on file.driver=file file.filename="{tmp_path}/a b.img"
        blockdev-add driver=null-co node-name=none size=1048576
        blockdev-add driver=quorum node-name=two vote-threshold=1 children.0=disk children.1=none
        {{"execute": "query-named-block-nodes", "arguments": {{"flat": true}}}}
        query-status
    """
    done = run(*blockstep("shell", "--socket", qemu), stdin=lines)
    *_, nodes, status = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"disk", "two"} <= {node["node-name"] for node in nodes}
    assert status["running"] is False


def test_a_script_ends_with_its_first_failure(qemu: Path) -> None:
    done = run(*blockstep("shell", "--socket", qemu, "-c", "query-status", "-c", "blockdev-del node-name=none",
                          "-c", "query-name"), check=False)
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.startswith("blockstep: blockdev-del: ")


def test_completion_knows_qemus_commands(qemu: Path) -> None:
    async def scenario() -> None:
        async with connect(qemu) as qmp:
            server = await Server.of(qmp)

            def offers(line: str) -> set[str]:
                return {one.text for one in complete(line, server.catalogue).candidates}

            assert offers("x-colo") == {"x-colo-lost-heartbeat"}
            assert {"driver=", "node-name="} <= offers("blockdev-add ")
            assert {"filename="} <= offers("blockdev-add driver=qcow2 file.driver=file file.")
            assert {"file=", "file.", "backing=", "backing."} <= offers("blockdev-add driver=qcow2 ")
            assert offers("blockdev-mirror sync=") >= {"full", "top", "none"}
            assert complete("blockdev-add driver=raw file=", server.catalogue).things == "nodes"
            assert complete("block-job-cancel device=", server.catalogue).things == "jobs"
            await server.execute("blockdev-add driver=null-co node-name=here")
            assert await server.names("nodes") == ["here"]

    asyncio.run(scenario())
