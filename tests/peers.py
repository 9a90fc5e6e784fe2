"""The programs of others that tests talk to: whether they are here, and how they are started.

    pytestmark = pytest.mark.interop

    def test_fio_verifies_what_it_wrote(tmp_path):
        need("fio", "nbdkit")                        # skips, and says which Debian package would help
        with nbdkit(tmp_path, "memory", "64M") as uri:
            run("fio", f"--uri={uri}", ...)

A peer listens on a unix socket in the test's own directory, so that tests never meet. It is ready when it
accepts a connection: `started` tries until it does, and fails at once, with what the peer printed, when the peer
ends.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

#: Program -> the Debian package that has it.
PACKAGES = {
    "fio": "fio",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nbdsh": "python3-libnbd",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
}

#: Seconds that a peer may take to listen, to end, or to do one command.
START_LIMIT, END_LIMIT, COMMAND_LIMIT = 20.0, 5.0, 50.0

#: What was missed in this session: package -> number of tests skipped for it. Printed by conftest.
missed: dict[str, int] = {}


def need(*programs: str) -> None:
    """Skip the calling test (or module, when called at its top) unless all ``programs`` are installed."""
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        packages = sorted({PACKAGES.get(name, name) for name in absent})
        for package in packages:
            missed[package] = missed.get(package, 0) + 1
        pytest.skip(f"needs {', '.join(absent)} (Debian: {' '.join(packages)})", allow_module_level=True)


def run(*command: str | Path, check: bool = True,
        stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return what it printed. A failure shows the output, if ``check``."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, input=stdin,
                          stdin=subprocess.DEVNULL if stdin is None else None, timeout=COMMAND_LIMIT)
    if check and done.returncode:
        words = " ".join(map(str, command))
        pytest.fail(f"{words}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def nbdsh(script: str) -> str:
    """Run ``script`` in nbdsh (libnbd's Python shell, with its handle ``h``) and return what it printed."""
    return run("nbdsh", "-c", script).stdout


def unix_uri(path: Path, export: str = "") -> str:
    """The NBD URI of an export on a unix socket."""
    return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(path))}"


@contextmanager
def started(command: Sequence[str | Path], listens_on: Path | tuple[str, int] | None = None,
            **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives as long as the block; the block starts when it accepts connections.

    ``listens_on`` is the path of a unix socket, or (host, port); None: do not wait. ``options`` go to Popen. At
    the end of the block it gets SIGTERM, and SIGKILL if it does not go.
    """
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          **options) as process:
        try:
            if listens_on is not None:
                wait_listening(listens_on, process)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process, kindly at first, and wait for it. A stopped (SIGSTOP) one ends too."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_listening(address: Path | tuple[str, int], process: subprocess.Popen[Any] | None = None) -> None:
    """Return when somebody accepts connections at ``address``; fail if ``process`` ends or time runs out."""
    deadline = time.monotonic() + START_LIMIT
    pause = 0.001
    while not _accepts(address):
        if process is not None and process.poll() is not None:
            printed = process.stdout.read().decode(errors="replace") if process.stdout else ""
            pytest.fail(f"{process.args} ended with {process.returncode} before it listened:\n{printed}")
        if time.monotonic() > deadline:
            pytest.fail(f"nobody listens on {address} after {START_LIMIT:g} s")
        time.sleep(pause)  # between two tries; the wait ends with the first that succeeds
        pause = min(pause * 2, 0.05)


def _accepts(address: Path | tuple[str, int]) -> bool:
    family = socket.AF_UNIX if isinstance(address, Path) else (
        socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    with socket.socket(family) as probe:
        try:
            probe.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            return False
        return True


@contextmanager
def nbdkit(directory: Path, *arguments: str | Path, name: str = "nbdkit") -> Iterator[str]:
    """nbdkit with ``arguments`` (plugin and its parameters, or options before them). Yields the URI."""
    need("nbdkit")
    path = directory / f"{name}.sock"
    with started(["nbdkit", "--foreground", "--exit-with-parent", f"--unix={path}", *arguments], path):
        yield unix_uri(path)


@contextmanager
def qemu_nbd(directory: Path, image: str | Path, *options: str, image_format: str = "raw", export: str = "",
             name: str = "qemu-nbd") -> Iterator[str]:
    """qemu-nbd serving ``image`` to any number of clients. Yields the URI."""
    need("qemu-nbd")
    path = directory / f"{name}.sock"
    command: list[str | Path] = ["qemu-nbd", "--persistent", "--shared=0", f"--socket={path}",
                                 f"--format={image_format}", f"--export-name={export}", *options, image]
    with started(command, path):
        yield unix_uri(path, export)


class QMP:
    """A blocking QMP client: one command at a time, events kept aside in `events`."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(COMMAND_LIMIT)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")
        self.events: list[dict[str, Any]] = []
        self.greeting = json.loads(self._file.readline())["QMP"]
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """The command's return value. An underscore in an argument's name stands for a hyphen.

        Raises RuntimeError with the peer's class and description when it answers with an error.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": words}).encode() + b"\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            if not line:
                raise EOFError(f"{command}: the peer hung up")
            message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{command}: {message['error']['class']}: {message['error']['desc']}")
            else:
                return message["return"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextmanager
def qemu_system(directory: Path, *arguments: str | Path, name: str = "qemu") -> Iterator[QMP]:
    """QEMU's block layer without a guest (``-machine none``). Yields its QMP connection."""
    need("qemu-system-x86_64")
    path = directory / f"{name}.qmp"
    command: list[str | Path] = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none",
                                 "-S", "-qmp", f"unix:{path},server=on,wait=off", *arguments]
    with started(command, path):
        qmp = QMP(path)
        try:
            yield qmp
        finally:
            qmp.close()


def blockstep(*arguments: str | Path) -> list[str | Path]:
    """The words of a blockstep command, for `run` or `started`: this interpreter, this checkout."""
    return [sys.executable, "-c", "import sys; from blockstep.cli import main; sys.exit(main())", *arguments]
