"""One script that knows QEMU's replication, run unchanged against QEMU, against us, and against a mix."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.nbd.client import Client
from blockstep.nbd.uri import Address, InetAddress, UnixAddress
from blockstep.testing.processes import free_ports, stop
from tests.programs import BLOCKSTEP, BLOCKSTEP_OVERLAY, QEMU, Program
from tests.scenarios import scenario

pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "drive_replication.py"
SIZE = 1 << 20


class Script:
    """The script, running."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, step: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(step, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line.startswith(f"{step} "), f"{step}: the script has ended"
        return json.loads(line.removeprefix(f"{step} "))


@contextmanager
def script(directory: Path, primary: Program, secondary: Program) -> Iterator[tuple[Script, int]]:
    """The script between two programs, and the port of the secondary's NBD server."""
    for name in ("primary", "secondary"):
        (directory / f"{name}.img").write_bytes(b"same" * (SIZE // 4))
    for name in ("active", "hidden"):
        secondary.make_overlay(directory / f"{name}.img", SIZE)
    port = free_ports()
    words = [str(directory), str(directory / "primary.qmp"), str(directory / "secondary.qmp"), str(port),
             secondary.overlay]
    with primary.started(directory, "primary") as (one, _), secondary.started(directory, "secondary") as (two, _):
        one.close()
        two.close()  # QEMU's socket takes one client at a time
        with subprocess.Popen([sys.executable, str(SCRIPT), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True) as process:
            try:
                yield Script(process), port
            finally:
                stop(process)


async def _read(address: Address, export: str) -> bytes:
    client = await Client.connect(address, export)
    try:
        return bytes(await client.pread(0, SIZE))
    finally:
        await client.close()


@pytest.mark.parametrize("secondary", [QEMU, BLOCKSTEP, BLOCKSTEP_OVERLAY],
                         ids=lambda program: f"secondary-{program.name}-{program.overlay}")
@pytest.mark.parametrize("primary", [QEMU, BLOCKSTEP], ids=lambda program: f"primary-{program.name}")
def test_the_script_runs_unchanged(tmp_path: Path, primary: Program, secondary: Program) -> None:
    @scenario
    async def run() -> None:
        before = b"same" * (SIZE // 4)
        with script(tmp_path, primary, secondary) as (step, port):
            assert step("setup") == [["guest"], ["parent0", "view"]]
            assert step("status") == [True, True]
            assert step("start") == [{}, {}]
            assert step("status") == [False, False]
            view, guest = InetAddress("127.0.0.1", port), UnixAddress(str(tmp_path / "primary.nbd"))

            client = await Client.connect(guest, "guest")
            await client.pwrite(4096, b"1" * 8192)
            assert await _read(view, "view") == before
            assert step("checkpoint") == [{}, {}]
            checkpoint = before[:4096] + b"1" * 8192 + before[12288:]
            assert await _read(view, "view") == checkpoint
            await client.pwrite(8192, b"2" * 65536)
            own = await Client.connect(view, "view")
            await own.pwrite(0, b"own " * 128)
            await own.close()
            assert step("wrong") == ["GenericError"] * 15

            assert step("failover") == [{}, {}]
            promoted = b"own " * 128 + checkpoint[512:]
            assert await _read(view, "view") == promoted
            assert step("detach") == [{}, {}, {}]
            await client.pwrite(0, b"3" * 512)
            assert (await _read(guest, "guest"))[:16384] == b"3" * 512 + before[512:4096] + b"1" * 4096 + b"2" * 8192
            # QEMU 7.2 may hang in nbd-server-stop while a client is just leaving: this one stays.
            assert bytes(await client.pread(0, 512)) == b"3" * 512
            assert step("teardown") == [{}] * 7 + [[], []]
            client.yank()
            assert (tmp_path / "secondary.img").read_bytes() == promoted

    run()
