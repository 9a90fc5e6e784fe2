"""The instruments of the bench against a real server."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.servers import CONTESTANTS
from benchmarks.tools import Prober, Workload, WriteLog, fio, resident
from tests.peers import need

pytestmark = pytest.mark.interop


def test_the_prober_writes_what_is_read_later(tmp_path: Path) -> None:
    need("nbdkit")
    with CONTESTANTS["nbdkit"](tmp_path, 1 << 20) as endpoint:
        prober = Prober(endpoint.address)
        assert prober.size == 1 << 20
        prober.write(4096, b"x" * 512)
        with pytest.raises(OSError, match=r".") as caught:
            prober.write(1 << 30, b"x")
        assert caught.value.errno
        prober.close()
    assert (tmp_path / "disk.raw").read_bytes()[4096:4608] == b"x" * 512


def test_the_write_log_sees_a_pause(tmp_path: Path) -> None:
    need("nbdkit")
    with CONTESTANTS["nbdkit"](tmp_path, 1 << 20) as endpoint, \
            WriteLog(endpoint.address, endpoint.export, 1 << 20) as log:
        begin = time.perf_counter()
        with log.held():
            subprocess.run(["sleep", "0.05"], check=True)
        log.some_more()
    assert log.longest(begin) >= 0.05
    assert 0 < log.usual() < 0.05


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd", "QEMU standby", "QEMU view", "QEMU pair"])
def test_every_peer_starts_and_takes_fios_writes(tmp_path: Path, name: str) -> None:
    need("fio", "nbdkit", "qemu-nbd", "qemu-img", "qemu-system-x86_64")
    with CONTESTANTS[name](tmp_path, 4 << 20) as endpoint:
        assert fio(endpoint.uri, Workload("randwrite", 4096, 4), 4 << 20) > 0
        if endpoint.checkpoint is not None:
            endpoint.checkpoint()
        assert all(resident(process) > 1 << 20 for process in endpoint.processes.values())
