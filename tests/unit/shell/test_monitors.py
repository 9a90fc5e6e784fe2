"""How `graph` and `shell` find the server that is meant."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from blockstep.cli.monitors import find_monitor
from blockstep.nbd.tls import server_context
from blockstep.qmp.client import connect
from blockstep.shell.server import Server
from blockstep.testing.pair import environment
from blockstep.testing.processes import blockstep
from tests.certificates import make
from tests.scenarios import scenario
from tests.unit.qmp.support import Tick, serving


def test_a_path_is_a_path_and_the_rest_has_a_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert find_monitor(None, "here", None) == (Path("here"), None)
    assert find_monitor(None, "there/qmp", None) == (Path("there/qmp"), None)
    assert find_monitor(None, "unix:/run/qmp", None) == (Path("/run/qmp"), None)
    assert find_monitor(None, "host:4444", None) == (("host", 4444), None)
    assert find_monitor(None, "[::1]:4444", None) == (("::1", 4444), None)
    assert find_monitor(None, ":4444", None) == (("localhost", 4444), None)


@scenario
async def test_a_script_that_waits_for_its_next_line_takes_events_meanwhile(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _, path), asyncio.timeout(20):
        script = await asyncio.create_subprocess_exec(
            *blockstep("shell", "--socket", path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
        assert script.stdin is not None
        assert script.stdout is not None
        for _ in range(2):
            script.stdin.write(b"query-name\n")
            assert await script.stdout.readline() == b'{"name": "test"}\n'
            [monitor] = server.monitors
            for number in range(20):  # more than a kernel holds for a socket
                server.emit(Tick(count=number, text="x" * 100_000))
                await monitor._may_write.wait()
        script.stdin.close()
        assert await script.wait() == 0
        assert not server.cut_off


@scenario
async def test_a_monitor_behind_tls(tmp_path: Path) -> None:
    certificates = make(tmp_path / "certificates", "server", "client")
    async with serving(tmp_path) as (server, _, _):
        listener = await server.start_tcp("localhost", 0, server_context(certificates, verify_peer=True))
        assert isinstance(listener.address, tuple)
        address, context = find_monitor(None, f"localhost:{listener.address[1]}", certificates)
        async with connect(address, ssl=context) as qmp:
            assert await (await Server.of(qmp)).execute("query-name") == {"name": "test"}
