"""How `graph` and `shell` find the server that is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.cli.monitors import find_monitor
from blockstep.nbd.tls import server_context
from blockstep.qmp.client import connect
from blockstep.shell.server import Server
from tests.certificates import make
from tests.scenarios import scenario
from tests.unit.qmp.support import serving


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
async def test_a_monitor_behind_tls(tmp_path: Path) -> None:
    certificates = make(tmp_path / "certificates", "server", "client")
    async with serving(tmp_path) as (server, _, _):
        listener = await server.start_tcp("localhost", 0, server_context(certificates, verify_peer=True))
        assert isinstance(listener.address, tuple)
        address, context = find_monitor(None, f"localhost:{listener.address[1]}", certificates)
        async with connect(address, ssl=context) as qmp:
            assert await (await Server.of(qmp)).execute("query-name") == {"name": "test"}
