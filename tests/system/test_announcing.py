"""What a server prints at its start, where it cannot be printed: serving is what it is for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from blockstep.testing.pair import environment
from blockstep.testing.processes import blockstep, free_ports, started
from blockstep.units import MiB

GONE, FULL = "a reader that has gone", "a full disk"
SAID = {GONE: b"", FULL: b"blockstep: what is served could not be printed: No space left on device\n"}


@pytest.mark.parametrize("output", [GONE, FULL])
@pytest.mark.parametrize("name", ["export", "standby", "primary"])
def test_a_server_that_cannot_print_what_it_serves_serves_it(tmp_path: Path, name: str, output: str) -> None:
    disk, nbd = tmp_path / "disk", tmp_path / "nbd"
    disk.write_bytes(bytes(MiB))
    pair = ("--pair", "web", "--disk", f"disk={disk}", "--qmp", tmp_path / "qmp")
    words = {"export": (disk,), "standby": (*pair, "--link", "127.0.0.1:0", "--state", tmp_path / "state"),
             "primary": (*pair, "--standby", f"127.0.0.1:{free_ports()}")}[name]
    reader, pipe = os.pipe()
    os.close(reader)
    with os.fdopen(pipe, "wb") as gone, Path("/dev/full").open("wb") as full, started(
            blockstep(name, *words, "--socket", nbd), nbd, env=environment(), stdout={GONE: gone, FULL: full}[output],
            stderr=subprocess.PIPE) as process:
        process.terminate()
        said = process.communicate(timeout=20)[1].splitlines(keepends=True)
        of_this = [line for line in said if b"the standby lacks" not in line]  # the primary has none
        assert (b"".join(of_this), process.returncode) == (SAID[output], 0)
