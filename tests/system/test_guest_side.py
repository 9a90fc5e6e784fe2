"""The side of a pair that faces guests: TLS, and sockets that are handed over."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from blockstep.errors import BlockstepError
from blockstep.nbd.client import Client
from blockstep.nbd.dial import ClientTls
from blockstep.nbd.tls import client_context
from blockstep.nbd.uri import parse_uri
from blockstep.testing.pair import Pair, Side, environment
from blockstep.units import MiB
from tests import certificates
from tests.scenarios import scenario


async def connect(uri: str, keys: Path | None) -> Client:
    parsed = parse_uri(uri)
    tls = ClientTls(client_context(keys), "127.0.0.1", True) if keys else None
    return await Client.connect(parsed.address, parsed.export, tls=tls, timeout=5.0)


async def uri_of(side: Side) -> str:
    [uri] = (await side.status())["exports"]
    return str(uri)


@scenario
async def test_guests_of_both_sides_speak_tls_at_the_address_that_the_status_names(tmp_path: Path) -> None:
    keys = certificates.make(tmp_path / "keys", "server", "client", host="127.0.0.1")
    others = certificates.make(tmp_path / "others", "server", "client", host="127.0.0.1")
    (others / "ca-cert.pem").write_bytes((keys / "ca-cert.pem").read_bytes())  # it trusts us, not the other way round
    async with Pair(tmp_path) as pair:
        await pair.start("--export-tls", str(keys), standby=["--export-tls", str(keys)])
        await pair.primary.until(health="healthy")
        for side in (pair.primary, pair.standby):
            uri = await uri_of(side)
            assert uri.startswith("nbds+unix:///disk0?socket=")
            guest = await connect(uri, keys)
            await guest.pwrite(0, b"x" * 5000)
            assert bytes(await guest.pread(0, 5000)) == b"x" * 5000
            guest.yank()
            for stranger in (None, others):
                with pytest.raises((BlockstepError, OSError)):
                    strange = await connect(uri, stranger)
                    await strange.pread(0, 512)  # with TLS 1.3 a client hears of its refusal after the handshake
        assert (await pair.primary.status())["health"] == "healthy"


@pytest.mark.parametrize("role", ["primary", "standby"])
@scenario
async def test_missing_certificates_of_the_guests_side_are_named_at_the_start(tmp_path: Path, role: str) -> None:
    link = ["--standby", "127.0.0.1:1"] if role == "primary" else ["--link", "127.0.0.1:0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "blockstep", role, *link, "--disk", f"a={tmp_path / 'disk'},size=1M", "--export-tls",
        str(tmp_path), "--socket", str(tmp_path / "nbd"), "--qmp", str(tmp_path / "qmp"),
        env=environment(), stderr=asyncio.subprocess.PIPE)
    _, printed = await process.communicate()
    assert process.returncode == 3
    assert b"server-cert.pem" in printed
    assert printed.count(b"\n") == 1


@pytest.mark.parametrize("role", ["primary", "standby"])
@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
@scenario
async def test_sockets_that_systemd_passes_are_where_guests_are_served(
    tmp_path: Path, role: str, family: socket.AddressFamily
) -> None:
    listener = socket.socket(family)
    listener.bind(str(tmp_path / "activated") if family == socket.AF_UNIX else ("127.0.0.1", 0))
    listener.listen()
    place = listener.getsockname()
    uri = (f"nbd+unix:///a?socket={place}" if family == socket.AF_UNIX else f"nbd://127.0.0.1:{place[1]}/a")
    link = ["--standby", "127.0.0.1:1"] if role == "primary" else ["--link", "127.0.0.1:0"]
    # LISTEN_PID is the pid of the process itself: a shell knows it before it becomes blockstep.
    script = 'exec 3<&"$1"; export LISTEN_FDS=1 LISTEN_PID=$$; shift; exec "$@"'
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, "-", str(listener.fileno()), sys.executable, "-u", "-m", "blockstep", role, *link,
        "--disk", f"a={tmp_path / 'disk'},size=1M", "--qmp", str(tmp_path / "qmp"),
        env=environment() | {"XDG_RUNTIME_DIR": str(tmp_path / "run")}, pass_fds=[listener.fileno()],
        stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        await process.stdout.readline()  # who it is
        assert (await process.stdout.readline()).decode().strip() == uri
        guest = await connect(uri, None)
        assert guest.info.size == MiB
        guest.yank()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert family != socket.AF_UNIX or os.path.exists(place), "the socket is not its own to remove"
    finally:
        listener.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


@scenario
async def test_port_0_is_told_as_the_port_that_it_became(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-u", "-m", "blockstep", "primary", "--standby", "127.0.0.1:1", "--listen", "127.0.0.1:0",
        "--disk", f"a={tmp_path / 'disk'},size=1M", "--qmp", str(tmp_path / "qmp"),
        env=environment(), stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        guest = await connect((await process.stdout.readline()).decode().strip(), None)
        assert guest.info.size == MiB
        guest.yank()
    finally:
        process.kill()
        await process.wait()
