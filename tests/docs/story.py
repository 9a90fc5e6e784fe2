"""The commands of a page of documentation, run as a reader would run them.

A page is a *story*: its fenced ``console`` blocks are run from top to bottom, in one directory that stands for the
two hosts of the text, and what they left behind (running programs, files) is there for the blocks that follow.

    hosta$ blockstep checkpoint web            a command, on the host of the prompt (``$`` alone: on hosta)
    checkpoint 2 committed, paused the link for 1.1 ms
                                               what it prints: each line must be found in the real output, in
                                               this order; numbers, sizes, times and dates may be others, and
                                               ``...`` stands for anything

``sh`` blocks are run as scripts of hosta. A command that ends in ``&`` is a program that goes on running: the story
goes on when it has printed its first URI, and, for a primary, when its pair is healthy; or, for a daemon, when its
control socket is there.

Comments of HTML, which a reader of the page does not see, direct the test:

    <!-- not run: why -->            the next block is not run
    <!-- test: kill hosta -->        SIGKILL for all programs of a host, and an empty /run: it is dead
    <!-- test: exit 1 -->            the last command of the next block ends with this code (otherwise: 0)
    <!-- test: gone hosta -->        the programs of this host end, each with code 0
    <!-- test: until hosta COMMAND -->   wait until the command succeeds there

What names a host in the text is put in its place here: the paths of `PLACES` lie in the host's own directory, and
``hosta:PORT``, ``hostb:PORT`` and ``0.0.0.0:PORT`` become ports of this machine that are free; so do the forms
``host=...,PREFIX.port=PORT`` and ``"host": "...", "port": "PORT"``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blockstep.testing.processes import free_ports

ROOT: Final = Path(__file__).parents[2]
#: Directories of a host; in the test each host has its own.
PLACES: Final = ("/srv", "/etc/blockstep", "/run/blockstep", "/var/lib/blockstep")
HOSTS: Final = ("hosta", "hostb")
LIMIT: Final = 20.0

_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMENT = re.compile(r"^<!--\s*(not run|test):\s*(.*?)\s*-->$")
_PROMPT = re.compile(r"^(hosta|hostb)?\$ (.*)$")
_VARIES = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+|-?\d+(?:\.\d+)?(?:e-?\d+)?(?:\s?(?:ms|s|m|h|B|KiB|MiB|GiB|TiB)\b(?:/s)?)?(?: \d\ds)?")


@dataclass
class Block:
    """A fenced block: its language, where it stands, its lines, and what the comments before it say."""

    page: Path
    line: int
    language: str
    text: list[str]
    not_run: str = ""
    directives: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page. Directives that stand behind the last one become an empty block."""
    found: list[Block] = []
    pending: list[str] = []
    not_run = ""
    current: Block | None = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if current is not None:
            if line.startswith("```"):
                found.append(current)
                current = None
            else:
                current.text.append(line)
        elif comment := _COMMENT.match(line.strip()):
            if comment[1] == "not run":
                not_run = comment[2]
            else:
                pending.append(comment[2])
        elif fence := _FENCE.match(line):
            current = Block(page, number, fence[1], [], not_run, pending)
            pending, not_run = [], ""
    assert current is None, f"{page}: a fenced block has no end"
    if pending:
        found.append(Block(page, number, "", [], "", pending))
    return found


def pages() -> list[Path]:
    """README and everything in docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Story:
    """The two hosts of a page."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.programs: dict[str, list[subprocess.Popen[bytes]]] = {host: [] for host in HOSTS}
        self._ports: dict[tuple[str, str], int] = {}
        first = free_ports(12)
        self._reserve = list(range(first, first + 12, 2))  # each with one above it
        tools = directory / "bin"
        tools.mkdir()
        _script(tools / "blockstep", f'#!/bin/sh\nexec {sys.executable} -m blockstep "$@"\n')
        _script(tools / "scp", f"#!{sys.executable}\n" + _SCP.format(directory=str(directory), hosts=HOSTS))
        for host in HOSTS:
            for place in PLACES:
                (directory / host / place.lstrip("/")).mkdir(parents=True)

    # --- the text's names, and what they are here ---

    def here(self, host: str, text: str) -> str:
        """The text with this machine's paths and ports."""
        home = str(self.directory / host)
        for place in PLACES:
            text = re.sub(rf"(?<![\w:.~]){re.escape(place)}(?=[/\s\"']|$)", home + place, text)
        text = re.sub(r"\bunix:(?=/run/blockstep/)", f"unix:{home}", text)
        for between in (r":", r",(?:\w+\.)*port=", r'", "port": "'):
            text = re.sub(rf"\b(hosta|hostb|0\.0\.0\.0)({between})(\d+)",
                          lambda m: m[2].join(self._address(host, m[1], m[3]).split(":")), text)
        return text.replace("DNS:$host", "DNS:$host,IP:127.0.0.1")

    def _address(self, host: str, name: str, port: str) -> str:
        key = (host if name == "0.0.0.0" else name, port)
        if key not in self._ports:
            self._ports[key] = self._reserve.pop()
        return f"127.0.0.1:{self._ports[key]}"

    def _environment(self, host: str) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.directory / 'bin'}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100",
                "PYTHONPATH": str(ROOT / "src"), "RUNTIME_DIRECTORY": f"{self.directory / host}/run/blockstep",
                "STATE_DIRECTORY": f"{self.directory / host}/var/lib/blockstep"}

    # --- running ---

    def run(self, block: Block) -> None:
        """All of a block."""
        code = 0
        for directive in block.directives:
            match directive.split():
                case ["kill", host]:
                    self.kill(host)
                    for left in (self.directory / host / "run/blockstep").iterdir():
                        left.unlink()  # what is in /run does not outlive a host
                case ["exit", text]:
                    code = int(text)
                case ["gone", host]:
                    self._until(lambda: all(one.poll() is not None for one in self.programs[host]),
                                f"{block.where}: {host} still runs")
                    assert all(one.poll() == 0 for one in self.programs[host]), f"{block.where}: did not end well"
                    self.programs[host].clear()
                case ["until", host, *_]:
                    self._wait_for(block, host, directive.split(maxsplit=2)[2])
                case _:
                    raise AssertionError(f"{block.where}: unknown directive '{directive}'")
        if block.not_run:
            return
        if block.language == "sh":
            self._run(block, "hosta", "set -e\n" + "\n".join(block.text), [], code)
        elif block.language == "console":
            steps = _steps(block)
            for number, (host, command, output) in enumerate(steps):
                self._run(block, host, command, output, code if number == len(steps) - 1 else 0)

    def _run(self, block: Block, host: str, command: str, expected: list[str], code: int) -> None:
        program = command.split()[0]
        if block.language == "console" and not shutil.which(program, path=self._environment(host)["PATH"]):
            return  # a client that is not installed here
        command = self.here(host, command)
        if command.endswith("&"):
            output = self._start(block, host, command.removesuffix("&"))
        else:
            result = subprocess.run(["bash", "-c", command], cwd=self.directory / host / "srv", timeout=LIMIT,
                                    env=self._environment(host), stdin=subprocess.DEVNULL, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            output = result.stdout
            if result.returncode != code:
                raise AssertionError(f"{block.where}: {command}: exit code {result.returncode}\n"
                                     f"{output}\n{self._logs()}")
        self._compare(block, command, [self.here(host, line) for line in expected], output)

    def _start(self, block: Block, host: str, command: str) -> str:
        log = self.directory / f"{host}-{len(self.programs[host])}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(["bash", "-c", "exec " + command], cwd=self.directory / host / "srv",
                                       env=self._environment(host), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        self.programs[host].append(process)
        serves = re.compile(r"^nbds?(\+unix)?://.*\n", re.M)
        control = re.search(r"--qmp unix:(\S+)", command)
        self._until(lambda: bool(serves.search(log.read_text())) or process.poll() is not None
                    or (control is not None and Path(control[1]).exists()), f"{block.where}: {command}: does not serve")
        assert process.poll() is None, f"{block.where}: {command}\n{log.read_text()}"
        if command.split()[1] == "primary":
            self.wait_healthy(host)
        return log.read_text()

    def _wait_for(self, block: Block, host: str, command: str) -> None:
        def succeeds() -> bool:
            return subprocess.run(["bash", "-c", self.here(host, command)], env=self._environment(host),
                                  capture_output=True).returncode == 0

        self._until(succeeds, f"{block.where}: {command}\n{self._logs()}")

    def _logs(self) -> str:
        """What the programs have printed, and how those ended that did."""
        ends = [f"{host}: process {one.pid} ended with {one.returncode}"
                for host, programs in self.programs.items() for one in programs if one.poll() is not None]
        logs = [f"--- {log.name}\n{log.read_text()}" for log in sorted(self.directory.glob("*.log"))]
        return "\n".join([*ends, *logs])

    def wait_healthy(self, host: str) -> None:
        """Until all pairs of the host are well."""
        def healthy() -> bool:
            return subprocess.run(["blockstep", "status"], env=self._environment(host),
                                  capture_output=True).returncode == 0

        self._until(healthy, f"{host} is not healthy")

    @staticmethod
    def _until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    @staticmethod
    def _compare(block: Block, command: str, expected: list[str], output: str) -> None:
        printed = [_pattern_free(line) for line in output.splitlines()]
        position = 0
        for line in expected:
            if line.strip() in ("", "..."):
                continue
            wanted = re.compile(".*".join(re.escape(_pattern_free(part)) for part in line.split("...")))
            found = next((n for n in range(position, len(printed)) if wanted.fullmatch(printed[n])), None)
            assert found is not None, f"{block.where}: {command}\nshould print: {line}\nprinted:\n{output}"
            position = found + 1

    # --- the end ---

    def kill(self, host: str) -> None:
        """SIGKILL for everything that runs on a host."""
        for process in self.programs[host]:
            process.kill()
            process.wait()
        self.programs[host].clear()

    def close(self) -> None:
        """End what still runs."""
        for processes in self.programs.values():
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
        for host in HOSTS:
            for process in self.programs[host]:
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    pass
            self.kill(host)


def _steps(block: Block) -> list[tuple[str, str, list[str]]]:
    """(host, command, what it prints) of a console block; a line that ends in a backslash goes on in the next."""
    steps: list[tuple[str, str, list[str]]] = []
    continued = False
    for line in block.text:
        if continued:
            host, command, output = steps[-1]
            steps[-1] = (host, f"{command} {line.strip().removesuffix(chr(92)).strip()}", output)
            continued = line.endswith("\\")
        elif prompt := _PROMPT.match(line):
            steps.append((prompt[1] or "hosta", prompt[2].removesuffix("\\").strip(), []))
            continued = line.endswith("\\")
        else:
            assert steps, f"{block.where}: output without a command"
            steps[-1][2].append(line)
    return steps


def _pattern_free(line: str) -> str:
    return " ".join(_VARIES.sub("#", line).split())


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


_SCP = """\
# Copies between the hosts of a story: HOST:PATH lies in the host's directory.
import shutil, sys
from pathlib import Path

def where(name):
    host, colon, path = name.partition(":")
    return Path({directory!r}) / host / path.lstrip("/") if colon and host in {hosts!r} else Path(name)

*sources, target = [where(word) for word in sys.argv[1:] if not word.startswith("-")]
for source in sources:
    if source.is_dir():
        shutil.copytree(source, target / source.name, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
"""
