"""A server that is at its limit of open files: one line says so, and who waits is served when others have gone."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from blockstep.testing.pair import environment
from blockstep.testing.processes import blockstep, started
from blockstep.units import MiB

#: Open files that the daemon may have; and clients, more than that and less than what a socket lets wait.
LIMIT, CLIENTS = 40, 60


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[IO[bytes]]:
    """What a daemon says that listens at ``nbd`` and ``qmp``."""
    (tmp_path / "disk").write_bytes(bytes(MiB))
    command = blockstep("daemon", "--blockdev", f"driver=file,node-name=disk,filename={tmp_path}/disk",
                        "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd", "--export",
                        "nbd,id=disk,node-name=disk", "--qmp", f"unix:{tmp_path}/qmp")
    with started(["sh", "-c", f'ulimit -n {LIMIT}; exec "$@"', "sh", *command], tmp_path / "nbd", tmp_path / "qmp",
                 env=environment(), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        with process.stderr as output:
            with dial(tmp_path / "qmp") as client:
                assert client.recv(1)  # nobody waits there
            yield output
            process.terminate()
            assert (process.wait(20), output.read()) == (0, b"")


def dial(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


@pytest.mark.parametrize(("name", "greeting"), [("nbd", b"NBDMAGIC"), ("qmp", b'{"QMP":{')])
def test_at_the_limit_of_open_files_clients_wait_and_are_served_in_the_end(
        daemon: IO[bytes], tmp_path: Path, name: str, greeting: bytes) -> None:
    clients = [dial(tmp_path / name) for _ in range(CLIENTS)]
    report = f"blockstep: new clients have to wait at {tmp_path / name}: Too many open files\n"
    assert daemon.readline().decode() == report
    assert clients[0].recv(8) == greeting
    for client in clients[:CLIENTS // 2]:
        client.close()
    for client in clients[CLIENTS // 2:]:
        assert client.recv(8) == greeting
        client.close()
