"""The helpers that start the peers: they start, they serve, they end, and a failure shows what was printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import peers
from tests.peers import ProcessFailed, need, started

pytestmark = pytest.mark.interop


def test_nbdkit_serves_while_the_block_lasts(tmp_path: Path) -> None:
    need("nbdinfo")
    with peers.nbdkit(tmp_path, "memory", "64M") as uri:
        assert peers.run("nbdinfo", "--size", uri).stdout.strip() == str(64 << 20)
    assert peers.run("nbdinfo", "--size", uri, check=False).returncode != 0


def test_qemu_nbd_serves_one_client_after_the_other(tmp_path: Path) -> None:
    need("nbdinfo")
    image = tmp_path / "disk.raw"
    image.touch()
    os.truncate(image, 1 << 20)
    with peers.qemu_nbd(tmp_path, image, export="disk a") as uri:
        for _ in range(2):
            assert peers.run("nbdinfo", "--size", uri).stdout.strip() == str(1 << 20)


def test_nbdsh_runs_a_script(tmp_path: Path) -> None:
    with peers.nbdkit(tmp_path, "pattern", "1M") as uri:
        assert peers.nbdsh(f"h.connect_uri({uri!r}); print(h.pread(8, 4096).hex())") == "0000000000001000\n"


def test_qemu_answers_on_its_qmp_socket(tmp_path: Path) -> None:
    with peers.qemu_system(tmp_path) as qmp:
        assert qmp.execute("query-version")["qemu"]["major"] >= 5
        with pytest.raises(RuntimeError, match="CommandNotFound"):
            qmp.execute("no-such-command")


def test_a_program_that_ends_too_early_shows_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="no luck"), \
            started(["sh", "-c", "echo no luck; exit 3"], tmp_path / "never.sock"):
        pass
    with pytest.raises(ProcessFailed) as caught:
        peers.run("sh", "-c", "echo no luck >&2; exit 3")
    assert caught.value.printed == "no luck\n"
