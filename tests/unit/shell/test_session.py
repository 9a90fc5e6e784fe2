"""The shell at a terminal, which a test plays; and without one."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output.plain_text import PlainTextOutput

from blockstep.errors import ConnectionLost
from blockstep.qmp.client import connect
from blockstep.qmp.commands import core
from blockstep.shell.server import Server
from blockstep.shell.session import history_file, interact, open_history
from tests.daemon import daemon
from tests.scenarios import scenario
from tests.unit.qmp.support import serving, until

TAB, ENTER, CTRL_C, CTRL_D = "\t", "\r", "\x03", "\x04"


class Screen(io.StringIO):
    """What was printed so far, and a sign of each print."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = asyncio.Event()

    def write(self, text: str) -> int:
        self.changed.set()
        return super().write(text)


class Terminal:
    """Somebody who types at a shell, and reads what is printed."""

    def __init__(self, keys: PipeInput, screen: Screen, shell: asyncio.Future[None]) -> None:
        self._keys, self._screen, self.shell = keys, screen, shell

    def type(self, *texts: str) -> None:
        self._keys.send_text("".join(texts))

    async def until(self, condition: Callable[[str], bool]) -> None:
        """Wait for something on the screen."""
        async with asyncio.timeout(10):
            while not condition(self._screen.getvalue()):
                self._screen.changed.clear()
                await self._screen.changed.wait()


@asynccontextmanager
async def terminal(server: Path) -> AsyncIterator[Terminal]:
    screen = Screen()
    with create_pipe_input() as keys, create_app_session(input=keys, output=PlainTextOutput(screen)):
        async with connect(server) as qmp:
            shell = asyncio.ensure_future(interact(await Server.of(qmp), "test> ", InMemoryHistory()))
            try:
                yield Terminal(keys, screen, shell)
                async with asyncio.timeout(10):
                    await shell
            finally:
                shell.cancel()


@scenario
async def test_commands_are_executed_until_control_d(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d, terminal(d.path) as user:
        user.type("query-version", ENTER, "nonsense", ENTER, "query-version x", ENTER)
        await user.until(lambda text: '"qemu"' in text and "CommandNotFound" in text and "column 15" in text)
        user.type(CTRL_C, CTRL_D)


@scenario
async def test_tab_completes_and_exit_leaves(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d, terminal(d.path) as user:
        user.type("query-vers", TAB)
        await user.until(lambda text: "ion" in text)
        user.type(ENTER)
        await user.until(lambda text: '"qemu"' in text)
        user.type("exit", ENTER)


@scenario
async def test_names_of_what_the_server_holds_are_asked_for(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d, connect(d.path) as qmp:
        server = await Server.of(qmp)
        assert await server.names("jobs") == []
        if "query-named-block-nodes" in server.catalogue.commands:
            await d.qmp("blockdev-add", {"driver": "null", "node-name": "one"})
            assert await server.names("nodes") == ["one"]


@scenario
async def test_events_are_printed_while_a_line_is_typed(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d, terminal(d.path) as user:
        user.type("query-na")
        await user.until(lambda text: "query-na" in text)
        d.program.emit(core.Shutdown(reason="host-error"))
        await user.until(lambda text: 'SHUTDOWN {"guest": false, "reason": "host-error"}' in text)
        user.type("me", ENTER)
        await user.until(lambda text: '{\n  "name"' in text or "{}" in text)
        user.type(CTRL_D)


@scenario
async def test_control_c_ends_the_waiting_for_an_answer_and_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, context, path), terminal(path) as user:
        user.type("wait", ENTER)
        await until(lambda: context.running)
        os.kill(os.getpid(), signal.SIGINT)
        await user.until(lambda text: "not waited for any longer" in text)
        context.gate.set()
        user.type("query-name", ENTER)
        await user.until(lambda text: '"name": "test"' in text)
        user.type(CTRL_D)


@scenario
async def test_the_shell_ends_with_its_server(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        with pytest.raises(ConnectionLost):
            async with terminal(d.path) as user:
                await user.until(lambda text: "test>" in text)
                await d.program.qmp.stop()


def test_the_history_is_private_and_keeps_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = open_history()
    for line in ("query-status", " hidden", "object-add qom-type=secret id=s data=abc"):
        history.append_string(line)
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    assert history_file() == tmp_path / "blockstep" / "shell-history"
    assert [line for line in history_file().read_text().splitlines() if line.startswith("+")] == ["+query-status"]


def test_where_no_history_can_be_kept_the_shell_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert isinstance(open_history(), InMemoryHistory)


@scenario
async def test_help_knows_commands_and_their_arguments(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d, connect(d.path) as qmp:
        server = await Server.of(qmp)
        assert "query-version" in server.help("help").splitlines()
        assert server.help("help nonsense") == "there is no command nonsense"
        assert server.help("help quit") == "quit takes no arguments that the server tells of"
        assert json.dumps(await server.execute('{"execute": "query-name"}'))
