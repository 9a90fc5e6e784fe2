"""Strangers: noise on every socket, crowds that only knock, monitors that never read. A pair takes no notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockstep.testing.pair import Pair, Side
from tests.scenarios import scenario

Address = str | tuple[str, int]


def sockets(pair: Pair) -> dict[str, Address]:
    host, _, port = pair.link.rpartition(":")
    return {"link": (host, int(port)), "control": (host, int(port) + 1), "view": str(pair.standby.nbd),
            "guest": str(pair.primary.nbd), "primary's QMP": str(pair.directory / "primary.qmp"),
            "standby's QMP": str(pair.directory / "standby.qmp")}


def dial(address: Address) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.setblocking(False)
    return sock


@asynccontextmanager
async def working(pair: Pair) -> AsyncIterator[None]:
    """A pair that replicates under load, and does so still after the block."""
    async with pair.writing() as writes:
        await pair.written(20)
        yield
        await pair.written(20)
        assert writes.error is None
        for side in (pair.primary, pair.standby):
            status = await side.status(timeout=2.0)
            assert status["health"] == "healthy", status
            assert not [event for event in side.events if event["event"] == "REPLICATION_STATE"
                        and event["data"]["state"] in ("offline", "lost")]
        await pair.checkpoint_shows()


def noises() -> list[bytes]:
    source = random.Random(7)
    greeting = b"NBDMAGICIHAVEOPT"
    return [
        b"",
        b"\n" * 1000,
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b'{"execute": "qmp_capabilities"}\n{"execute": "pair-checkpoint", "arguments": {"epoch": -1}}\n',
        b'{"execute": "qmp_capabilities"}\n{"execute": "pair-attach", "arguments": {"pair": "test"}}\n',
        b'{"execute": "qmp_capabilities"}\n{"execute": "quit-not"}\n[[[[[{{{{\xff\xfe',
        b"[" * 100_000,
        b"\x00\x00\x00\x03" + greeting + source.randbytes(64),
        b"\x00\x00\x00\x03" + b"IHAVEOPT" + b"\x00\x00\x00\x07" + b"\xff\xff\xff\xff" + b"x" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + source.randbytes(500),
        *(source.randbytes(source.randrange(1, 70_000)) for _ in range(12)),
    ]


@pytest.mark.parametrize("where", ["link", "control", "view", "guest", "primary's QMP", "standby's QMP"])
@scenario
async def test_noise_on_a_socket_disturbs_nobody(tmp_path: Path, where: str) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        address = sockets(pair)[where]
        loop = asyncio.get_running_loop()

        async def say(noise: bytes) -> None:
            with dial(address) as sock, contextlib.suppress(OSError):
                await loop.sock_connect(sock, address)
                await loop.sock_sendall(sock, noise)
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        while await loop.sock_recv(sock, 65536):
                            pass

        async with working(pair):
            await asyncio.gather(*(say(noise) for noise in noises()))
        for side in (pair.primary, pair.standby):
            assert "Traceback" not in side.printed


def open_files(side: Side) -> int:
    return len(list(Path(f"/proc/{side.process.pid}/fd").iterdir()))


@scenario
async def test_a_thousand_connections_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        loop = asyncio.get_running_loop()
        async with working(pair):
            before = {side: open_files(side) for side in (pair.primary, pair.standby)}
            for address in sockets(pair).values():
                for _ in range(10):
                    crowd = [dial(address) for _ in range(17)]
                    for sock in crowd:
                        with contextlib.suppress(OSError):
                            await loop.sock_connect(sock, address)
                    for sock in crowd:
                        sock.close()
            for side, files in before.items():
                async with asyncio.timeout(5):
                    while open_files(side) > files:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
        for side in (pair.primary, pair.standby):
            assert "Traceback" not in side.printed


@scenario
async def test_connections_that_say_nothing_keep_nobody_out(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        loop = asyncio.get_running_loop()
        addresses = sockets(pair)
        silent = [(dial(addresses[where]), addresses[where]) for where in ("link", "view", "guest") for _ in range(60)]
        for sock, address in silent:
            await loop.sock_connect(sock, address)
        async with working(pair):
            async with pair.standby.clients() as (client,):
                await client.pread(0, 512)
        for sock, _ in silent:
            sock.close()


@scenario
async def test_a_monitor_that_never_reads_holds_nobody_up(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start("--checkpoint-every", "20ms")
        await pair.primary.until(health="healthy")
        deaf = []
        for side in ("primary", "standby"):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(tmp_path / f"{side}.qmp"))
            sock.sendall(b'{"execute": "qmp_capabilities"}\n')
            sock.setblocking(False)
            asking = json.dumps({"execute": "query-replication"}).encode() + b"\n"
            with contextlib.suppress(BlockingIOError):
                for _ in range(20_000):
                    sock.send(asking)
            deaf.append(sock)
        epoch = (await pair.primary.status(timeout=1.0))["checkpoint"]["epoch"]
        async with pair.writing() as writes:
            await pair.written(50)
            await pair.primary.until(lambda status: status["checkpoint"]["epoch"] > epoch + 3)
            assert writes.error is None
        await pair.standby.status(timeout=1.0)
        for sock in deaf:
            sock.close()


@scenario
async def test_what_a_primary_says_is_not_taken_from_a_stranger(tmp_path: Path) -> None:
    """Commands on the control port that do not come from the attached primary change nothing."""
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.write(20)
        with socket.create_connection(sockets(pair)["control"]) as stranger, stranger.makefile("rwb") as file:
            stranger.settimeout(5)
            file.readline()
            for command, arguments in (("qmp_capabilities", {}), ("pair-checkpoint", {"epoch": 999}),
                                       ("replication-failover", {}), ("quit", {})):
                file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                file.flush()
                answer = json.loads(file.readline())
                assert ("return" in answer) is (command == "qmp_capabilities"), answer
        assert await pair.proven(pair.standby) == 0
        assert (await pair.primary.status())["health"] == "healthy"
        assert (await pair.standby.status())["checkpoint"]["epoch"] < 999
