"""How a program is started for a test: when it is ready, and what is said of one that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blockstep.testing.processes import ProcessFailed, monitored, started

#: Listens, and serves its first client alone, as a monitor of QEMU does.
ONE_CLIENT = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    client, _ = listener.accept()
    if len(sys.argv) > 2:
        sys.exit("no luck")
    file = client.makefile("rw")
    for answer in ({"QMP": {}}, {"return": {}}, {"return": "first"}):
        print(json.dumps(answer), file=file, flush=True)
        file.readline()
"""


def test_a_monitor_sees_one_connection_the_one_that_is_used(tmp_path: Path) -> None:
    with monitored([sys.executable, "-c", ONE_CLIENT, tmp_path / "qmp"], tmp_path / "qmp") as (qmp, _):
        assert qmp.execute("which-client") == "first"


def test_a_program_that_ends_before_it_greets_shows_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="no luck"), \
            monitored([sys.executable, "-c", ONE_CLIENT, tmp_path / "qmp", "fail"], tmp_path / "qmp"):
        pass


def test_a_program_that_ends_before_it_listens_shows_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="no luck"), \
            started([sys.executable, "-c", "import sys; sys.exit('no luck')"], tmp_path / "never"):
        pass
