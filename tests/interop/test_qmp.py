"""QMP against its other speakers: QEMU as the oracle of what a server does, qemu.qmp and its shell as clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from blockstep.qmp.client import connect
from blockstep.qmp.errors import CommandRefused
from blockstep.qmp.server import Server
from blockstep.qmp.session import Call, Session
from tests import peers
from tests.unit.qmp.support import REGISTRY, VERSION, Context, Tick, served

pytestmark = pytest.mark.interop

REQUEST = b'{"execute":"query-name","id":7}'


class Raw:
    """QEMU's monitor at the level of bytes; a context manager."""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.file.readline()
        self.count = 0

    def answers(self, data: bytes) -> list[dict[str, Any]]:
        """What QEMU answers to ``data``, up to a last request behind it."""
        self.count += 1
        mark = f"mark {self.count}"
        self.socket.sendall(data + ended(mark))
        found = []
        while (answer := json.loads(self.file.readline())).get("id") != mark:
            found.append(answer)
        return found


def ended(mark: str) -> bytes:
    return b"\n\xff" + json.dumps({"execute": "query-name", "id": mark}).encode()


def ours(session: Session, data: bytes) -> list[dict[str, Any]]:
    """What we answer to ``data`` (a command that would run is its success)."""
    session.feed(data + ended("mark"))
    found = []
    while (item := session.next()) is not None:
        found.append(json.loads(item.succeeded(None) if isinstance(item, Call) else item.data))
    assert found.pop()["id"] == "mark"
    return found


def shape(answers: list[dict[str, Any]]) -> list[object]:
    """Class of the error, or None for success, and the id."""
    return [(answer["error"]["class"] if "error" in answer else None, answer.get("id")) for answer in answers]


def ready() -> Session:
    session = Session(REGISTRY.commands, VERSION)
    session.feed(b'{"execute": "qmp_capabilities"}')
    assert session.next() is not None
    return session


TOKENS = [REQUEST, b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"x", b"X", b"5", b"-", b".", b"e", b"true",
          b" ", b"\n", b"\t", b"\r", b"\x01", b"\xff", b"\xfe", "é".encode(), b'"a"', b"'b'", b"1e5", b'"\\n"', b"/",
          b"+", b".5", b'"execute"', b'"query-name"']


def test_malformed_input_gets_the_same_number_of_answers_from_both(tmp_path: Path) -> None:
    choice = random.Random(1)
    with peers.qemu_system(tmp_path) as first:
        first.close()  # QEMU serves one connection of a socket at a time
        with Raw(tmp_path / "qemu.qmp") as raw:
            raw.answers(b'{"execute":"qmp_capabilities"}')
            session = ready()
            for _ in range(1500):
                data = b"".join(choice.choice(TOKENS) for _ in range(choice.randint(1, 9)))
                assert shape(ours(session, data)) == shape(raw.answers(data)), data


@pytest.mark.parametrize("negotiated", [True, False])
def test_wrong_requests_get_the_same_class_from_both(tmp_path: Path, negotiated: bool) -> None:
    requests: list[bytes] = [
        b"{}", b"5 ", b"[]", b'"a"', b'{"id": 1}', b'{"execute": 5, "id": 1}', b'{"execute": "nonsense", "id": 1}',
        b'{"execute": "query-name", "arguments": 5, "id": 1}', b'{"execute": "query-name", "arguments": {"x": 1}}',
        b'{"execute": "query-name", "more": 5, "id": [1, {"a": null}]}', b'{"exec-oob": "query-name", "id": 1}',
        b'{"execute": "query-name", "exec-oob": "query-name"}', b"{'execute': 'query-name', 'id': 'it\\'s'}",
        b'{"execute": "query-name", "id": "\xc3("}', b'{"execute": "query-name", "id": "\\ud800"}',
        '{"execute": "query-name", "id": "é\U0001f600"}'.encode(), b'{"execute": "query-name",\n\n"id": null}',
        REQUEST * 3, b"[" * 1025 + b"\n" + REQUEST, b'{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}',
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["none"]}}',
        b'{"execute": "qmp_capabilities", "arguments": {"x": 1}}']
    if negotiated:
        requests.append(b'{"execute": "qmp_capabilities", "id": 1}')
    with peers.qemu_system(tmp_path) as first:
        first.close()
        session = ready() if negotiated else Session(REGISTRY.commands, VERSION)
        with Raw(tmp_path / "qemu.qmp") as raw:
            if negotiated:
                raw.answers(b'{"execute":"qmp_capabilities"}')
            for request in requests:
                assert shape(ours(session, request)) == shape(raw.answers(request)), request


def test_our_client_with_qemu(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with connect(tmp_path / "qemu.qmp") as qmp:
            assert (await qmp.execute("query-status"))["status"] == "prelaunch"
            with pytest.raises(CommandRefused) as caught:
                await qmp.execute("block-job-cancel", {"device": "none"})
            assert caught.value.error_class == "DeviceNotActive"
            events = qmp.events("SHUTDOWN")
            await qmp.execute("quit")
            assert (await anext(events))["data"]["reason"] == "host-qmp-quit"

    with peers.qemu_system(tmp_path) as first:
        first.close()
        asyncio.run(scenario())


def test_the_librarys_client_with_our_server(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        qmp = QMPClient("test")
        await qmp.connect(str(path))
        assert await qmp.execute("query-name") == {"name": "test"}
        assert await qmp.execute("open", oob=True) == {}
        with pytest.raises(ExecuteError) as caught:
            await qmp.execute("nonsense")
        assert caught.value.error_class == "CommandNotFound"
        server.emit(Tick(count=1))
        assert (await qmp.events.get())["data"] == {"count": 1, "text": ""}
        await qmp.disconnect()

    served(tmp_path, scenario)


def test_the_librarys_shell_with_our_server(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        shell = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "qemu.qmp.qmp_shell", str(path), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={"HOME": str(tmp_path), "TERM": "dumb"})
        printed, _ = await shell.communicate(b"query-name\necho node-name=abc times=2\nnonsense\n")
        text = printed.decode()
        assert shell.returncode == 0, text
        assert '"name": "test"' in text
        assert '"node-name": "abcabc"' in text
        assert "CommandNotFound" in text
        assert context.log == ["abc"]

    served(tmp_path, scenario)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    """The socket of a running storage daemon."""
    path = tmp_path / "daemon.qmp"
    with peers.started(peers.blockstep("daemon", "--qmp", f"unix:{path}"), path):
        yield path


def shell(path: Path, lines: str, *options: str) -> str:
    """What the library's shell prints when it reads ``lines``."""
    done = subprocess.run([sys.executable, "-m", "qemu.qmp.qmp_shell", *options, str(path)], input=lines, text=True,
                          capture_output=True, timeout=30, env={"HOME": str(path.parent), "TERM": "dumb"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_librarys_shell_drives_the_storage_daemon(daemon: Path) -> None:
    printed = shell(daemon, """\
blockdev-add driver=null-co node-name=disk size=1048576
block-dirty-bitmap-add node=disk name=first
transaction(
block-dirty-bitmap-add node=disk name=second persistent=false
block-dirty-bitmap-disable node=disk name=first
)
blockdev-add driver=raw node-name=window file={'driver':'null-co','size':65536} offset=4096
query-named-block-nodes flat=true
blockdev-del node-name=nobody
query-block-jobs
""")
    assert "connected to QEMU" in printed.lower() or "Connected" in printed
    assert '"node-name": "window"' in printed
    assert '"name": "second"' in printed
    assert '"status": "disabled"' in printed or '"recording": false' in printed
    assert "GenericError" in printed
    assert printed.count('{"return": {}}') + printed.count('"return": {}') >= 4


def test_the_librarys_shell_has_the_human_monitors_commands_too(daemon: Path) -> None:
    printed = shell(daemon, "info block-jobs\ndrive_add 0 if=none,id=disk,driver=null-co\ninfo block\n", "-H")
    assert "No active jobs" in printed
    assert "OK" in printed
    assert "disk (disk): " in printed


OLDER_CLIENT = """
import json, sys
from qemu.qmp import ExecuteError
from qemu.qmp.legacy import QEMUMonitorProtocol
with QEMUMonitorProtocol(sys.argv[1]) as qmp:
    said = [qmp.connect()["QMP"]["capabilities"], qmp.cmd("query-status")]
    try:
        qmp.cmd("no-such-command")
    except ExecuteError as error:
        said.append(error.error_class)
    said += [qmp.cmd("stop"), qmp.cmd_obj({"execute": "cont", "id": "mine"}), qmp.pull_event(wait=10.0)]
print(json.dumps(said))
"""


def test_the_librarys_older_client_with_the_storage_daemon(daemon: Path) -> None:
    # A process of its own: that client leaves an event loop open behind it.
    said = json.loads(peers.run(sys.executable, "-c", OLDER_CLIENT, daemon).stdout)
    event = said.pop()
    assert said == [["oob"], {"running": True, "singlestep": False, "status": "running"}, "CommandNotFound", {},
                    {"return": {}, "id": "mine"}]
    assert event["event"] == "STOP"
    assert event["timestamp"].keys() == {"seconds", "microseconds"}


def test_the_librarys_client_sees_the_daemon_off(daemon: Path) -> None:
    async def scenario() -> None:
        qmp = QMPClient("test")
        await qmp.connect(str(daemon))
        with qmp.listener("SHUTDOWN") as events:
            replies = await asyncio.gather(*(qmp.execute("query-block-jobs") for _ in range(50)))
            assert replies == [[]] * 50
            assert await qmp.execute("query-yank", oob=True) == []
            await qmp.execute("quit")
            assert (await events.get())["data"] == {"guest": False, "reason": "host-qmp-quit"}
        await qmp.runstate_changed()
        with contextlib.suppress(EOFError):
            await qmp.disconnect()

    asyncio.run(scenario())
