"""Other programs, started for a test or a benchmark: ready when they are needed, gone when the block ends.

A server is ready when it accepts a connection, and not a fixed time after its start: `started` and `monitored` try
until it does, and fail at once, with what the program printed, when it ends before that. What it prints goes to a file
without a name, so that a talkative program never waits for somebody to read.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from blockstep.errors import BlockstepError

#: Where `free_ports` looks, from there on.
_FIRST_PORT = 10240
#: Seconds that a program may take to listen, to end after SIGTERM, and to answer one command.
START_LIMIT, END_LIMIT, COMMAND_LIMIT = 20.0, 5.0, 50.0

#: Where a server listens: the path of a unix socket, or (host, port).
Address = Path | tuple[str, int]


class ProcessFailed(BlockstepError):
    """A program ended, or does not answer. ``printed`` is what it wrote to both of its outputs."""

    def __init__(self, command: Sequence[str], what: str, printed: str) -> None:
        super().__init__(f"{' '.join(command)}\n{what}\n{printed}".strip())
        self.command, self.what, self.printed = command, what, printed


@contextmanager
def started(command: Sequence[str | Path], *listens_on: Address, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives as long as the block; the block starts when it accepts connections everywhere it should.

    ``options`` go to Popen. At the end of the block the process gets SIGTERM, then SIGKILL if it does not go. A monitor
    of QEMU is nothing to wait for here, see `monitored`. Raises ProcessFailed.
    """
    with _running(command, options) as (process, failed):
        for address in listens_on:
            _first_connection(address, process, failed).close()
        yield process


@contextmanager
def monitored(command: Sequence[str | Path], path: Path, **options: Any) -> Iterator[tuple[
        QMP, subprocess.Popen[bytes]]]:
    """`started`, for a program with a QMP monitor on a unix socket: yields a connection to it, and the process.

    That connection is the only one that is made. A monitor of QEMU serves one client at a time, and greets the next one
    twice if the first was gone before it was greeted.
    """
    with _running(command, options) as (process, failed):
        connection = _first_connection(path, process, failed)
        try:
            qmp = QMP(connection)
        except (EOFError, OSError) as error:
            connection.close()
            raise failed(f"hung up before it had greeted: {error}") from None
        try:
            yield qmp, process
        finally:
            qmp.close()


@contextmanager
def _running(command: Sequence[str | Path], options: dict[str, Any]) -> Iterator[tuple[
        subprocess.Popen[bytes], Callable[[str], ProcessFailed]]]:
    """A process that lives as long as the block; and the error that tells what it did, with what it has printed."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as output:

        def failed(what: str) -> ProcessFailed:
            output.seek(0)
            return ProcessFailed(words, what, output.read().decode(errors="replace"))

        options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **options}
        process = subprocess.Popen(words, **options)
        try:
            yield process, failed
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process, kindly at first, and wait for it. One that was stopped by SIGSTOP ends too."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(*command: str | Path, timeout: float = COMMAND_LIMIT, check: bool = True,
        stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return what it printed. Raises ProcessFailed if it fails and ``check``."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, input=stdin, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ProcessFailed(words, f"did not end within {timeout:g} s", str(error.output or "")) from None
    if check and done.returncode:
        raise ProcessFailed(words, f"ended with {done.returncode}", done.stdout + done.stderr)
    return done


def connect(address: Address, timeout: float = COMMAND_LIMIT) -> socket.socket:
    """A blocking connection. Raises OSError."""
    if not isinstance(address, Path):
        return socket.create_connection(address, timeout)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout)
        connection.connect(str(address))
    except BaseException:
        connection.close()
        raise
    return connection


def _first_connection(address: Address, process: subprocess.Popen[bytes],
                      failed: Callable[[str], ProcessFailed]) -> socket.socket:
    deadline = time.monotonic() + START_LIMIT
    pause = 0.001
    while True:
        with contextlib.suppress(OSError):
            return connect(address)
        if process.poll() is not None:
            raise failed(f"ended with {process.returncode} before it listened on {address}")
        if time.monotonic() > deadline:
            raise failed(f"does not listen on {address} after {START_LIMIT:g} s")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def unix_uri(path: Path, export: str = "") -> str:
    """The NBD URI of an export on a unix socket."""
    return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(path))}"


def nbd_uri(address: Address, export: str = "") -> str:
    """The NBD URI of an export at any address."""
    if isinstance(address, Path):
        return unix_uri(address, export)
    host, port = address
    return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{quote(export, safe='')}"


def free_ports(count: int = 1, host: str = "127.0.0.1") -> int:
    """The first of ``count`` adjacent TCP ports that nobody uses now.

    For programs that cannot be told port 0, or that are started again where they were. No socket that is given any port
    gets one of these: they lie below those that the kernel gives out.
    """
    given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        first = _FIRST_PORT + secrets.randbelow(max(given_out - _FIRST_PORT, 8192) - count)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server((host, port)))
            except OSError:
                continue
            return first


def blockstep(*arguments: str | Path, before: str = "") -> list[str | Path]:
    """The words of a blockstep command line, run by this interpreter from the package that it imports.

    ``before``: statements that it executes before, each with a semicolon.
    """
    return [sys.executable, "-c", f"{before}import sys; from blockstep.cli import main; sys.exit(main())", *arguments]


class QMP:
    """A blocking QMP client: one command at a time, events kept aside in `events`."""

    def __init__(self, peer: Address | socket.socket) -> None:
        """``peer``: where it listens, or a connection to it. Raises OSError, EOFError when the peer hangs up."""
        self._socket = peer if isinstance(peer, socket.socket) else connect(peer)
        self._file = self._socket.makefile("rwb")
        self.events: list[dict[str, Any]] = []
        try:
            greeting = self._file.readline()
            if not greeting:
                raise EOFError("the peer hung up")
            self.greeting = json.loads(greeting)["QMP"]
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """The command's return value. An underscore in an argument's name stands for a hyphen.

        Raises RuntimeError with the peer's class and description when it answers with an error, EOFError when it
        hangs up.
        """
        return self.ask(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def ask(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """`execute`, with the names of the arguments as they are."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
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
            elif "return" in message:  # QEMU 7.2, connected to while it starts, may greet a second time
                return message["return"]

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


@contextmanager
def qemu_system(directory: Path, *arguments: str | Path, name: str = "qemu") -> Iterator[tuple[
        QMP, subprocess.Popen[bytes]]]:
    """QEMU's block layer without a guest (``-machine none``). Yields its QMP connection and the process."""
    path = directory / f"{name}.qmp"
    command: list[str | Path] = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none",
                                 "-S", "-qmp", f"unix:{path},server=on,wait=off", *arguments]
    with monitored(command, path) as (qmp, process):
        yield qmp, process
