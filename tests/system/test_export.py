"""``blockstep export`` as a process: one raw file over NBD."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import BlockstepError
from blockstep.nbd.client import Client
from blockstep.nbd.dial import ClientTls
from blockstep.nbd.tls import client_context
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.testing.pair import environment
from blockstep.testing.processes import free_ports
from blockstep.units import MiB
from tests import certificates
from tests.scenarios import scenario


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MiB) + bytes(MiB))
    return path


class Exported:
    """A running export. ``uri`` is what it printed."""

    def __init__(self, process: asyncio.subprocess.Process, uri: str) -> None:
        self.process, self.uri = process, uri


@asynccontextmanager
async def exporting(*arguments: str | Path, **options: Any) -> AsyncIterator[Exported]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "blockstep", "export", *map(str, arguments), stdout=subprocess.PIPE,
        env={**environment(), **options.pop("env", {})}, **options)
    try:
        assert process.stdout
        async with asyncio.timeout(20):
            yield Exported(process, (await process.stdout.readline()).decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run(*arguments: str | Path) -> tuple[int, str]:
    """A blockstep command that is to fail: its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "blockstep", *map(str, arguments),
                                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    async with asyncio.timeout(20):
        said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


@scenario
async def test_a_file_is_served_on_a_unix_socket_and_changed_in_place(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "sock"
    async with exporting(image, "--socket", path, "--name", "vda") as server:
        assert server.uri == f"nbd+unix:///vda?socket={path}"
        client = await Client.connect(UnixAddress(str(path)), "vda")
        assert bytes(await client.pread(0, MiB)) == image.read_bytes()[:MiB]
        await client.pwrite(MiB + 1, b"written")
        await client.flush()
        assert image.read_bytes()[MiB + 1:].startswith(b"written")
        await client.close()
        with pytest.raises(BlockstepError):
            await Client.connect(UnixAddress(str(path)), "another")


@scenario
async def test_a_file_is_served_over_tcp(image: Path) -> None:
    port = free_ports()
    async with exporting(image, "--listen", f"127.0.0.1:{port}") as server:
        assert server.uri == f"nbd://127.0.0.1:{port}/"
        client = await Client.connect(InetAddress("127.0.0.1", port))
        assert client.info.size == 2 * MiB
        await client.close()


@scenario
async def test_read_only_refuses_writes_and_opens_files_that_cannot_be_written(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "sock"
    image.chmod(0o444)
    async with exporting(image, "--socket", path, "--read-only"):
        client = await Client.connect(UnixAddress(str(path)))
        with pytest.raises(OSError):
            await client.pwrite(0, b"x")
        assert len(await client.pread(0, 512)) == 512
        await client.close()


@scenario
async def test_sockets_that_systemd_passes_are_served(tmp_path: Path, image: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "activated"))
    listener.listen()

    # LISTEN_PID is the pid of the process itself: a shell knows it before it becomes blockstep.
    script = 'exec 3<&"$1"; export LISTEN_FDS=1 LISTEN_PID=$$; shift; exec "$@"'
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, "-", str(listener.fileno()), sys.executable, "-m", "blockstep", "export", str(image),
        env=environment(), pass_fds=[listener.fileno()])
    try:
        client = await Client.connect(UnixAddress(str(tmp_path / "activated")))  # waits in the listener's queue
        assert client.info.size == 2 * MiB
        await client.close()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    finally:
        listener.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@scenario
async def test_a_signal_finishes_what_is_in_flight(tmp_path: Path, image: Path, number: signal.Signals) -> None:
    path = tmp_path / "sock"
    async with exporting(image, "--socket", path) as server:
        client = await Client.connect(UnixAddress(str(path)))
        writes = [asyncio.ensure_future(client.pwrite(block * 4096, bytes([block + 1]) * 4096)) for block in range(200)]
        reading = asyncio.ensure_future(client.pread(0, 4096))
        await asyncio.sleep(0)  # all are on their way to the socket when the signal comes
        await asyncio.sleep(0)
        server.process.send_signal(number)
        async with asyncio.timeout(10):
            results = await asyncio.gather(*writes, reading, return_exceptions=True)
            assert await server.process.wait() == 0
        assert not path.exists()
        content = image.read_bytes()
        for block, result in enumerate(results[:-1]):
            if result is None:  # acknowledged, so it is there
                assert content[block * 4096] == block + 1
        client.yank()


@scenario
async def test_the_end_does_not_wait_for_a_client_that_does_nothing(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "sock"
    async with exporting(image, "--socket", path) as server:
        client = await Client.connect(UnixAddress(str(path)))
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(str(path))
        server.process.terminate()
        async with asyncio.timeout(5):
            assert await server.process.wait() == 0
        client.yank()
        silent.close()


@scenario
async def test_a_socket_that_a_killed_export_left_behind_is_taken_over(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "sock"
    async with exporting(image, "--socket", path) as server:
        server.process.kill()
        await server.process.wait()
    assert path.exists()
    async with exporting(image, "--socket", path):
        await (await Client.connect(UnixAddress(str(path)))).close()


@scenario
async def test_tls_required_keeps_plain_clients_out(tmp_path: Path, image: Path) -> None:
    keys = certificates.make(tmp_path / "keys", "server", "client", host="127.0.0.1")
    port = free_ports()
    async with exporting(image, "--listen", f"127.0.0.1:{port}", "--tls", "required", "--tls-certificates", keys,
                         "--tls-verify-peer") as server:
        assert server.uri.startswith("nbds://")
        address = InetAddress("127.0.0.1", port)
        client = await Client.connect(address, tls=ClientTls(client_context(keys), None, True))
        assert len(await client.pread(0, 512)) == 512
        await client.close()
        with pytest.raises((BlockstepError, OSError)):
            await Client.connect(address)


@pytest.mark.parametrize(("arguments", "error"), [
    (("/nowhere/at/all",), "No such file"),
    ((".", "--socket", "s", "--listen", "1.2.3.4:5"), "left out when --socket is given"),
    ((".", "--listen", "nonsense:port"), "port"),
    ((".",), "directory"),
])
@scenario
async def test_what_cannot_be_served_is_one_line_and_code_3(tmp_path: Path, arguments: tuple[str, ...],
                                                            error: str) -> None:
    code, said = await run("export", *arguments, *([] if len(arguments) > 1 else ["--socket", str(tmp_path / "s")]))
    assert code == 3
    assert error.lower() in said.lower()
    assert said.startswith("blockstep: ")
    assert len(said.splitlines()) == 1


@scenario
async def test_a_file_that_was_deleted_while_it_was_served_is_told_of(tmp_path: Path, image: Path) -> None:
    async with exporting(image, "--socket", tmp_path / "sock", stderr=subprocess.PIPE) as server:
        image.unlink()
        server.process.terminate()
        _, said = await server.process.communicate()
        assert said.decode().startswith(f"blockstep: {image} was deleted: its data end with this program")
        assert server.process.returncode == 0
