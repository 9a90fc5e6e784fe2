"""A listening socket that cannot accept for a while."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockstep.aio import acceptor
from blockstep.aio.acceptor import Acceptor


class Listening(socket.socket):
    """Fails to accept as often as it is told."""

    def __init__(self, path: Path) -> None:
        super().__init__(socket.AF_UNIX)
        self.failures: list[int] = []
        self.tries = 0
        self.bind(str(path))
        self.listen()

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.failures:
            code = self.failures.pop(0)
            raise OSError(code, os.strerror(code))
        return super().accept()


class Peers:
    """Who has been accepted, and what has been reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = Listening(path)
        self.accepted: list[socket.socket] = []
        self.reports: list[dict[str, Any]] = []
        self.came, self.reported = asyncio.Event(), asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(self.report)

    def report(self, loop: asyncio.AbstractEventLoop, report: dict[str, Any]) -> None:
        self.reports.append(report)
        self.reported.set()

    def accept(self, sock: socket.socket) -> None:
        self.accepted.append(sock)
        self.came.set()

    def connect(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.path))

    async def until_accepted(self, count: int) -> None:
        while len(self.accepted) < count:
            self.came.clear()
            await self.came.wait()

    def close(self) -> None:
        for sock in self.accepted:
            sock.close()


def listening(tmp_path: Path, test: Callable[[Peers], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        peers = Peers(tmp_path / "s")
        try:
            await test(peers)
        finally:
            peers.close()

    asyncio.run(main())


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPROTO, errno.EPERM])
def test_a_shortage_is_reported_once_and_those_who_wait_are_accepted_when_it_is_over(tmp_path: Path, code: int) -> None:
    async def test(peers: Peers) -> None:
        peers.sock.failures = [code] * 5
        listener = Acceptor(peers.sock, peers.accept, pause=0)
        for _ in range(3):
            peers.connect()
        listener.start()
        await peers.until_accepted(3)
        listener.close()
        [report] = peers.reports
        assert str(peers.path) in report["message"]
        assert os.strerror(code) in report["message"]
        assert "exception" not in report

    listening(tmp_path, test)


def test_a_shortage_of_later_is_reported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "SILENCE", 0)

    async def test(peers: Peers) -> None:
        peers.sock.failures = [errno.EMFILE, errno.EMFILE]
        listener = Acceptor(peers.sock, peers.accept, pause=0)
        peers.connect()
        listener.start()
        await peers.until_accepted(1)
        listener.close()
        assert len(peers.reports) == 2

    listening(tmp_path, test)


def test_between_two_tries_the_loop_is_left_alone(tmp_path: Path) -> None:
    async def test(peers: Peers) -> None:
        peers.sock.failures = [errno.EMFILE] * 1000
        listener = Acceptor(peers.sock, peers.accept)
        peers.connect()
        listener.start()
        await peers.reported.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert peers.sock.tries == 1
        listener.close()

    listening(tmp_path, test)


def test_others_have_a_turn_between_many_who_connect_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "AT_ONCE", 2)

    async def test(peers: Peers) -> None:
        listener = Acceptor(peers.sock, peers.accept)
        for _ in range(5):
            peers.connect()
        listener.start()
        counts = []
        while len(peers.accepted) < 5:
            await asyncio.sleep(0)
            counts.append(len(peers.accepted))
        listener.close()
        assert {2, 4, 5} <= {*counts} <= {0, 2, 4, 5}

    listening(tmp_path, test)


def test_a_closed_one_does_not_try_again(tmp_path: Path) -> None:
    async def test(peers: Peers) -> None:
        peers.sock.failures = [errno.EMFILE]
        listener = Acceptor(peers.sock, peers.accept, pause=0)
        peers.connect()
        listener.start()
        await peers.reported.wait()
        listener.close()
        listener.close()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not peers.accepted
        assert len(peers.reports) == 1

    listening(tmp_path, test)
