"""``blockstep img`` and ``blockstep export --format`` as processes: signals, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockstep.nbd.client import Client
from blockstep.nbd.uri import UnixAddress
from blockstep.testing.pair import environment
from blockstep.units import MiB
from tests.scenarios import scenario
from tests.system.test_export import exporting


def img(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "blockstep", "img", *map(str, arguments)], capture_output=True,
                          text=True, timeout=30, env=environment())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["raw", "qcow2", "overlay"])
def test_a_conversion_that_is_told_to_stop_leaves_the_old_file(tmp_path: Path, kind: str,
                                                               number: signal.Signals) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(4 * MiB))
    target.write_bytes(b"old")
    process = subprocess.Popen(
        [sys.executable, "-m", "blockstep", "img", "convert", "-r", "1M", "-p", "-f", "raw", "-O", kind,
         str(source), str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    try:
        assert process.stdout is not None
        assert b"(0.00/100%)" in process.stdout.read(20)
        deadline = time.monotonic() + 10
        while not list(tmp_path.glob(".target.*.part")):
            assert time.monotonic() < deadline
        process.send_signal(number)
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert said == b""
    assert target.read_bytes() == b"old"
    left = {path.name for path in tmp_path.iterdir()} - {"source", "target"}
    assert left == ({f".target.{process.pid}.part"} if killed else set())


def test_a_terminal_gets_a_bar_without_being_asked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(MiB))
    master, slave = os.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "blockstep", "img", "convert", "-f", "raw", str(source), str(tmp_path / "target")],
            stdin=slave, stdout=slave, stderr=slave, env={**environment(), "TERM": "xterm", "COLUMNS": "100"})
        os.close(slave)
        shown = b""
        try:
            while data := os.read(master, 4096):
                shown += data
        except OSError:  # the other end is closed
            pass
        assert process.wait(20) == 0
    finally:
        os.close(master)
    assert b"Converting" in shown
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@scenario
async def test_an_image_of_a_format_is_served_and_closed_by_sigterm(tmp_path: Path) -> None:
    for kind in ("qcow2", "overlay"):
        image, path = tmp_path / f"disk.{kind}", tmp_path / f"{kind}.sock"
        assert img("create", "-f", kind, image, "4M").returncode == 0
        async with exporting("--format", kind, "--socket", path, image) as server:
            client = await Client.connect(UnixAddress(str(path)))
            assert client.info.size == 4 * MiB
            await client.pwrite(MiB, b"data" * 1024)
            await client.close()
            server.process.send_signal(signal.SIGTERM)
            assert await server.process.wait() == 0
        assert img("convert", "-f", kind, image, tmp_path / "raw").returncode == 0
        assert (tmp_path / "raw").read_bytes() == bytes(MiB) + b"data" * 1024 + bytes(3 * MiB - 4096)
        if kind == "qcow2":
            assert img("check", image).returncode == 0


@scenario
async def test_the_format_is_what_the_user_says(tmp_path: Path) -> None:
    """A raw disk that looks like an image stays a raw disk, unless the user asks for a look."""
    image, path = tmp_path / "disk", tmp_path / "sock"
    assert img("create", "-f", "qcow2", image, "4M").returncode == 0
    for options, size in (((), image.stat().st_size), (("--format", "raw"), image.stat().st_size),
                          (("--format", "auto"), 4 * MiB)):
        async with exporting(*options, "--socket", path, image) as server:
            client = await Client.connect(UnixAddress(str(path)))
            assert client.info.size == size
            await client.close()
            server.process.send_signal(signal.SIGTERM)
            assert await server.process.wait() == 0


def test_a_wrong_format_is_one_line_that_names_the_option(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    for kind, says in (("bla", "--format: 'bla' is not valid"), ("qcow2", "magic")):
        result = subprocess.run([sys.executable, "-m", "blockstep", "export", "--format", kind, str(image)],
                                capture_output=True, text=True, timeout=20, env=environment())
        assert result.returncode == 3
        assert says in result.stderr
        assert result.stderr.count("\n") == 1
