"""A command imports what it needs, and no more: that is most of the time that it takes.

Each is run in a process of its own, which tells at its end what it has imported.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

import pytest

from blockstep import cli
from blockstep.drivers.create import CreateQcow2
from blockstep.testing.pair import environment

PROGRAM = """
import sys
from blockstep.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""

#: What no command needs to ask a running program something, or to say what is wrong.
HEAVY = {"typer", "click", "pydantic", "rich", "msgspec", "bitarray", "zstandard", "prompt_toolkit"}
#: Of blockstep, what every command has; with the module of the command itself.
OURS = {"cli", "cli.words", "errors", "forms", "streams", "units"}
ASKING = OURS | {"aio", "aio.endings", "cli.control", "cli.signals", "places", "qmp", "qmp.client", "qmp.errors"}

#: The facts that the commands look for in an answer.
ANSWER: dict[str, Any] = {
    "pair": "web", "role": "primary", "peer": "", "state": "replicating", "health": "healthy", "reason": "",
    "checkpoint": None, "checkpoint-every": 0, "checkpoint-bytes": 0, "ack": "local", "work": None, "disks": [],
    "exports": ["nbd://here/a"], "epoch": 3, "pause": 0.001, "seconds": 0.01, "faults": []}


def imported(directory: Path, *words: str | Path, code: int = 0) -> tuple[set[str], set[str]]:
    """What ``blockstep WORDS`` imports: the modules of blockstep without that word, and the names of others."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, words)], cwd=directory, capture_output=True,
                          text=True, timeout=30, env={**environment(), "RUNTIME_DIRECTORY": str(directory)})
    assert done.returncode == code, done.stdout + done.stderr
    names = done.stderr.splitlines()[-1].split()
    return ({name.removeprefix("blockstep.") for name in names if name.startswith("blockstep.")},
            {name.partition(".")[0] for name in names} - {"blockstep"})


@contextmanager
def answering(path: Path, answers: int) -> Iterator[None]:
    """A control socket that answers so many commands of one client, each with `ANSWER`, and hangs up."""

    def say(connection: socket, message: dict[str, Any]) -> None:
        connection.sendall(json.dumps({key: value for key, value in message.items() if value is not None}).encode())
        connection.sendall(b"\n")

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            say(connection, {"QMP": {"version": {}, "capabilities": []}})
            for number in range(answers + 1):  # the first one negotiates, and has no id
                command = json.loads(connection.recv(4096))
                say(connection, {"return": ANSWER if number else {}, "id": command.get("id")})

    with socket(AF_UNIX) as listening:
        listening.settimeout(30)
        listening.bind(str(path))
        listening.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(("words", "answers", "code"), [
    ("status", 1, 0), ("status --json", 1, 0), ("checkpoint", 1, 0), ("stop --quit", 1, 3), ("resize disk 2G", 1, 0),
    ("failover", 2, 0), ("failover --to latest --json", 1, 0), ("events", 1, 3)])  # they are given no events
def test_who_asks_a_running_program_imports_none_of_what_it_is_made_of(
        tmp_path: Path, words: str, answers: int, code: int) -> None:
    path = tmp_path / "qmp"
    with answering(path, answers):
        ours, others = imported(tmp_path, *words.split(), "--qmp", path, code=code)
    assert "qmp.client" in ours
    assert ours <= ASKING | {f"cli.{words.split()[0]}"}
    assert not others & HEAVY


@pytest.mark.parametrize("words", ["status", "failover --to latest", "events web"])
def test_to_say_that_nothing_runs_takes_no_event_loop(tmp_path: Path, words: str) -> None:
    _, others = imported(tmp_path, *words.split(), code=3)
    assert not others & (HEAVY | {"asyncio", "ssl", "qemu", "dataclasses"})


def test_the_version_takes_next_to_nothing(tmp_path: Path) -> None:
    ours, others = imported(tmp_path, "--version")
    assert ours <= {"cli", "errors", "streams"}
    assert not others & (HEAVY | {"asyncio", "ssl", "json", "dataclasses", "typing", "re"})


def test_the_modules_of_commands_import_typing_for_mypy_only() -> None:
    for path in Path(cli.__file__).parent.glob("*.py"):
        at_once = [each for each in ast.parse(path.read_text()).body if isinstance(each, ast.Import | ast.ImportFrom)]
        assert not [each for each in at_once if "typing" in ast.unparse(each).split()], path


@pytest.mark.parametrize("words", ["--help", "failover --help"])
def test_the_help_asks_no_command_for_what_it_works_with(tmp_path: Path, words: str) -> None:
    ours, others = imported(tmp_path, *words.split())
    assert not {name for name in ours if name.partition(".")[0] in ("daemon", "drivers", "block", "jobs", "qmp")}
    assert not others & {"asyncio", "msgspec", "bitarray", "prompt_toolkit", "qemu"}


def test_a_check_of_an_image_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    """Typer, asyncio and the models of options take ten times as long as the check of a small image."""
    CreateQcow2(filename=str(tmp_path / "disk"), size=1 << 20).create()
    _, others = imported(tmp_path, "img", "check", "disk")
    assert not others & {"typer", "click", "rich", "asyncio", "msgspec", "ctypes", "json", "ssl", "dataclasses",
                         "inspect", "pathlib", "typing", "re"}


@pytest.mark.parametrize("words", [
    "export none", "primary --disk a=none --standby localhost", "standby --disk a=none --link localhost:0"])
def test_what_serves_disks_imports_no_words_and_drivers_of_others(tmp_path: Path, words: str) -> None:
    ours, others = imported(tmp_path, *words.split(), code=3)
    assert "drivers.file" in ours
    assert not ours & {"drivers.blkdebug", "drivers.blklog", "drivers.null", "drivers.quorum", "drivers.qcow2.driver",
                       "drivers.create", "daemon.storage", "daemon.startup", "qmp.commands.nodes",
                       "qmp.commands.transaction", "qmp.commands.human"}
    assert not others & {"typer", "click", "pydantic", "rich", "prompt_toolkit", "zstandard"}
