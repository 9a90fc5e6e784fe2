"""Monitors that misbehave: crowds, noise, endless input, and one that never reads. Memory stays, others are served."""

from __future__ import annotations

import json
import select
import socket
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstep.testing.processes import QMP, blockstep, started
from blockstep.units import KiB, MiB

#: What a flood may add to the program's resident memory: the monitor's own bounds, and what the allocator keeps.
GROWTH = 12 * MiB


@dataclass
class Daemon:
    """A running ``blockstep daemon``, and a monitor that must be served whatever the others do."""

    process: subprocess.Popen[bytes]
    path: Path
    other: QMP

    def status(self, name: str) -> int:
        """A line of /proc/PID/status that is a number of kB, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * KiB for line in lines if line.startswith(f"{name}:"))

    @property
    def resident(self) -> int:
        return self.status("VmRSS")

    def files(self) -> int:
        return len([*Path(f"/proc/{self.process.pid}/fd").iterdir()])

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(self.path))
        return sock

    def served(self) -> None:
        assert self.other.execute("query-version")["qemu"]

    @contextmanager
    def serving_meanwhile(self) -> Iterator[None]:
        """While the block runs, the other monitor asks all the time; no answer may take a second."""
        slowest, errors, over = 0.0, [], threading.Event()

        def ask() -> None:
            nonlocal slowest
            try:
                while not over.is_set():
                    begin = time.perf_counter()
                    self.served()
                    slowest = max(slowest, time.perf_counter() - begin)
                    over.wait(0.002)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert not errors
        assert slowest < 1.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    path = tmp_path_factory.mktemp("flood") / "qmp"
    with started(blockstep("daemon", "--qmp", f"unix:{path}"), path) as process:
        other = QMP(path)
        other.execute("query-qmp-schema")
        yield Daemon(process, path, other)
        other.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does; the test's time-out is the limit."""
    while not condition():
        time.sleep(0.002)


class Peer:
    """A monitor at the level of bytes that has negotiated."""

    def __init__(self, daemon: Daemon) -> None:
        self.socket = daemon.dial()
        self.file = self.socket.makefile("rb")
        self.marks = 0
        self.file.readline()
        self.socket.sendall(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
        assert json.loads(self.file.readline()) == {"return": {}}

    def recovers(self, noise: bytes) -> list[dict[str, Any]]:
        """The answers to ``noise``, all that come before the answer to a request behind it."""
        self.marks += 1
        mark = f"mark {self.marks}"
        self.socket.sendall(noise + b"\n\xff" + json.dumps({"execute": "query-name", "id": mark}).encode())
        answers = []
        while (answer := json.loads(self.file.readline())).get("id") != mark:
            answers.append(answer)
        assert "return" in answer
        return answers

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def test_a_thousand_connections_that_come_and_go_leave_nothing(daemon: Daemon) -> None:
    files = daemon.files()
    words = [b"", b'{"execute": "qmp_capabilities"}', b'{"execute": "qmp_capabilities"}{"execute": "query-qmp-schema"}',
             b'{"execute', b"\xff\xfe}}}]]", b'{"execute": "qmp_capabilities"}{"execute": "query-jobs"}' * 50]

    def knock(number: int) -> None:
        sock = daemon.dial()
        sock.sendall(words[number % len(words)])
        if number % 2:
            sock.recv(10)
        sock.close()

    for number in range(100):  # what is allocated once
        knock(number)
    resident = daemon.resident
    with daemon.serving_meanwhile():
        for number in range(1000):
            knock(number)
    until(lambda: daemon.files() <= files)
    assert daemon.resident - resident < GROWTH


def test_a_crowd_beyond_the_limit_is_turned_away_and_the_limit_is_there_again(daemon: Daemon) -> None:
    files = daemon.files()
    crowd: list[socket.socket] = []
    said: list[bytes] = []
    try:
        for _ in range(200):
            crowd.append(daemon.dial())
            said.append(crowd[-1].recv(4096)[:9])
        assert said[0] == b'{"QMP":{"'
        assert said[-1] == b'{"error":'
        daemon.served()
    finally:
        for sock in crowd:
            sock.close()
    until(lambda: daemon.files() <= files)
    Peer(daemon).close()


TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\\u12", b"\\ud800", b"null", b"tru", b"-", b"1e",
          b"0x1", b"\x00", b"\x1f", b"\x7f", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xfe", b"\xff", b"\n",
          b'"execute"', b'"exec-oob"', b'"arguments"', b'"id"', b'"query-name"', b'"query-block-jobs"', b"1" * 2000,
          b'{"execute":"query-name"}', b'{"exec-oob":"query-name"}', b'{"execute":"blockdev-add","arguments":{}}']
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=12)
NAMES = st.sampled_from(["execute", "exec-oob", "arguments", "id", "control", ""])


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """A request of the right or of a strange shape, from which something is taken, or into which something is put."""
    members = draw(st.dictionaries(NAMES, JSON | st.sampled_from(["query-name", "qmp_capabilities"]), max_size=4))
    text = json.dumps(members, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    begin = draw(st.integers(0, len(text)))
    end = draw(st.integers(begin, len(text)))
    return text[:begin] + draw(st.binary(max_size=6) | st.sampled_from(TOKENS)) + text[end:]


@given(st.lists(torn() | st.sampled_from(TOKENS) | st.binary(max_size=20), min_size=1, max_size=6).map(b"".join))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_monitor_recovers_from_malformed_input_of_every_shape(daemon: Daemon, noise: bytes) -> None:
    peer = Peer(daemon)
    try:
        for answer in peer.recovers(noise):
            assert answer.keys() <= {"return", "error", "id", "event", "data", "timestamp"}
            if "error" in answer:
                assert answer["error"].keys() == {"class", "desc"}
                assert answer["error"]["class"] in ("GenericError", "CommandNotFound")
    finally:
        peer.close()


@pytest.mark.parametrize("shape", [
    b'{"execute": "x', b"{'id': 'x", b'{"id": [1, 2, "x', b"[1,", b'{"execute": 1', b"true", b"@", b" ", b'{"a":1,"b":',
], ids=bytes.decode)
def test_64_MiB_without_a_newline_cost_no_memory(daemon: Daemon, shape: bytes) -> None:
    peer = Peer(daemon)
    filling = {b"[1,": b"1,", b'{"execute": 1': b"1", b"true": b"true", b" ": b" ", b"@": b" @", b'{"a":1,"b":': b"[ "}
    piece = filling.get(shape, string.ascii_letters.encode())
    block = piece * (MiB // len(piece))
    peer.socket.sendall(shape + block)
    resident, answers, over = daemon.resident, 0, threading.Event()

    def read() -> None:
        nonlocal answers
        while not over.is_set():
            try:
                answers += peer.socket.recv(MiB).count(b'{"error":')
            except TimeoutError:
                return

    reader = threading.Thread(target=read)
    if shape == b"@":  # an error for each
        block = block[: len(block) // 16]
    with daemon.serving_meanwhile():
        reader.start()
        for _ in range(63):
            peer.socket.sendall(block)
        peer.socket.sendall(b"\n\xff")
        over.set()
        peer.socket.sendall(b'{"execute": "query-name"}')
        reader.join()
    assert daemon.resident - resident < GROWTH
    assert answers >= 1 or shape == b" "
    peer.close()


@pytest.mark.parametrize("opening", [b"[", b"{", b'{"a":', b'[{"a":[', b'{"execute": "stop", "arguments": {"a": '])
def test_deep_nesting_is_refused_and_costs_no_memory(daemon: Daemon, opening: bytes) -> None:
    peer = Peer(daemon)
    resident = daemon.resident
    with daemon.serving_meanwhile():
        for depth in (200, 255, 256, 257, 1000, 100_000):
            answers = peer.recovers(opening * depth)
            assert answers
            assert all("error" in answer for answer in answers)
    assert daemon.resident - resident < GROWTH
    peer.close()


def test_a_monitor_that_never_reads_is_cut_off_when_events_pile_up(daemon: Daemon) -> None:
    deaf = Peer(daemon)
    resident = daemon.resident
    with daemon.serving_meanwhile():
        changer = QMP(daemon.path)
        closed = False
        for _ in range(40_000):
            changer.execute("stop")
            changer.execute("cont")
            if closed := _hung_up(deaf.socket):
                break
        changer.close()
    assert closed
    assert daemon.resident - resident < GROWTH
    deaf.close()


def test_answers_that_nobody_reads_hold_back_the_requests(daemon: Daemon) -> None:
    deaf = Peer(daemon)
    resident = daemon.resident
    deaf.socket.setblocking(False)
    request = b'{"execute": "query-qmp-schema"}' * 100
    sent = 0
    with daemon.serving_meanwhile(), pytest.raises(BlockingIOError):
        while sent < 64 * MiB:
            sent += deaf.socket.send(request)
            time.sleep(0)
    with daemon.serving_meanwhile():
        time.sleep(0.2)
    assert daemon.resident - resident < GROWTH
    deaf.close()


def _hung_up(sock: socket.socket) -> bool:
    """Whether the peer has closed, without reading what it sent."""
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return bool(poll.poll(0))
