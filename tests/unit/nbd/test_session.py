"""Connections that come and go, on a clock that the test moves."""

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from blockstep.aio.inline import start
from blockstep.errors import ConnectionLost, PeerRefused
from blockstep.nbd import constants as c
from blockstep.nbd.client import Client
from blockstep.nbd.session import Backoff, Session
from tests.unit.nbd.scripted import ALL_FLAGS, FakeClock, Peer, pair, run, turns


class World:
    """A session, the peers of the connections that it made, and a clock."""

    def __init__(self, flags: int = ALL_FLAGS, **options: Any) -> None:
        self.clock = FakeClock()
        self.flags = flags
        self.size = 1 << 20
        self.of_clients: dict[str, Any] = {}
        self.down: Exception | None = None
        self.connecting: asyncio.Event | None = None
        self.dials: list[float] = []
        self.peers: list[Peer] = []
        self.clients: list[Client] = []
        self.states: list[tuple[str, int | None]] = []
        self.ended: list[Any] = []
        self.session = Session(
            self._connect, clock=self.clock, chance=lambda: 0.0, backoff=Backoff(first=1.0, longest=8.0),
            on_state=lambda state, error: self.states.append((state, getattr(error, "errno", None))), **options)

    async def _connect(self) -> Client:
        self.dials.append(self.clock.now)
        if self.connecting is not None:
            await self.connecting.wait()
        if self.down is not None:
            raise self.down
        client, peer = pair(self.flags, self.size, **self.of_clients)
        self.clients.append(client)
        self.peers.append(peer)
        return client

    def watch(self, *requests: Coroutine[Any, Any, Any]) -> None:
        for request in requests:
            start(request, lambda value, error: self.ended.append(value if error is None else error))

    async def pass_time(self, seconds: float) -> None:
        """In small steps, with turns of the loop between them, so that a dial can follow a dial."""
        for _ in range(int(seconds * 4)):
            await turns(5)
            self.clock.advance(0.25)
        await turns(5)

    async def until(self, ready: Callable[[], object]) -> None:
        while not ready():
            await turns(1)


def test_outstanding_and_new_requests_wait_for_the_reconnection() -> None:
    async def test() -> None:
        world = World(reconnect_delay=10.0)
        await world.session.open()
        world.watch(world.session.pwrite(0, b"x"), world.session.pread(5, 1))
        first = [await world.peers[0].request() for _ in range(2)]
        world.peers[0].acknowledge(first[0][2])
        await world.until(lambda: world.ended)
        world.peers[0].sock.close()
        await world.until(lambda: world.session.connected == 0)
        world.watch(world.session.flush())
        await world.pass_time(1.0)
        again = [await world.peers[1].request() for _ in range(2)]
        assert [request[0] for request in again] == [c.CMD_READ, c.CMD_FLUSH]
        world.peers[1].acknowledge(again[1][2])
        world.peers[1].acknowledge(again[0][2], 0, b"y")
        await world.until(lambda: len(world.ended) == 3)
        assert world.ended == [None, None, b"y"]
        assert world.states == [("connected", None), ("lost", errno.ECONNRESET), ("connected", None)]
        assert world.session.losses == 1
        world.session.yank()
    run(test)


def test_what_changes_the_disk_and_got_no_answer_in_time_is_not_sent_again() -> None:
    """The server may still be at it: sent again it could take effect twice, the second time over a later write."""
    async def test() -> None:
        world = World(reconnect_delay=10.0)
        world.of_clients = {"timeout": 4.0, "clock": world.clock}
        await world.session.open()
        session = world.session
        world.watch(session.pwrite(0, b"x"), session.write_zeroes(0, 512), session.discard(0, 512), session.flush(),
                    session.pread(0, 1))
        await world.until(lambda: world.clients[0].outstanding == 5)
        await world.pass_time(4.5)
        assert [error.errno for error in world.ended] == [errno.ETIMEDOUT] * 3
        await world.pass_time(1.0)
        again = [await world.peers[1].request() for _ in range(2)]
        assert [request[0] for request in again] == [c.CMD_FLUSH, c.CMD_READ]
        world.watch(session.pwrite(0, b"y"))
        assert (await world.peers[1].request())[0] == c.CMD_WRITE
        world.session.yank()
    run(test)


def test_after_the_delay_requests_fail_at_once_and_dialling_goes_on() -> None:
    async def test() -> None:
        world = World(reconnect_delay=5.0)
        await world.session.open()
        world.down = ConnectionRefusedError(errno.ECONNREFUSED, "down")
        world.watch(world.session.flush())
        world.peers[0].sock.close()
        await world.until(lambda: world.session.connected == 0)
        await world.pass_time(4.75)
        assert not world.ended
        await world.pass_time(0.25)
        assert [error.errno for error in world.ended] == [errno.ECONNRESET]
        with pytest.raises(ConnectionLost):
            await world.session.pread(0, 1)
        await world.pass_time(40.0)
        pauses = [round(b - a, 2) for a, b in zip(world.dials[1:], world.dials[2:], strict=False)]
        assert pauses[:5] == [2.0, 4.0, 8.0, 8.0, 8.0]
        world.down = None
        await world.pass_time(8.0)
        assert world.session.connected == 1
        world.watch(world.session.flush())
        assert (await world.peers[1].request())[0] == c.CMD_FLUSH
        world.session.yank()
    run(test)


def test_without_a_delay_requests_fail_with_the_connection() -> None:
    async def test() -> None:
        world = World()
        await world.session.open()
        world.watch(world.session.pwrite(0, b"x"))
        world.clients[0].yank()
        assert len(world.ended) == 1
        with pytest.raises(ConnectionLost):
            await world.session.flush()
        got: list[Any] = []
        world.session.submit_write(0, b"x", 0, got.append)
        assert isinstance(got[0], ConnectionLost)
        await world.pass_time(1.0)
        assert world.session.connected == 1
        world.session.yank()
    run(test)


def test_a_request_that_is_lost_again_and_again_fails_in_the_end() -> None:
    async def test() -> None:
        world = World(reconnect_delay=3.0)
        await world.session.open()
        world.watch(world.session.flush())
        for _ in range(10):
            world.clients[-1].yank()
            await world.pass_time(1.0)
            if world.ended:
                break
        assert isinstance(world.ended[0], ConnectionLost)
        assert world.clock.now <= 4.0
        world.session.yank()
    run(test)


@pytest.mark.parametrize(("flags", "count"), [(ALL_FLAGS, 3), (ALL_FLAGS & ~c.FLAG_CAN_MULTI_CONN, 1)])
def test_as_many_connections_as_asked_for_if_the_server_offers_multi_conn(flags: int, count: int) -> None:
    async def test() -> None:
        world = World(flags, connections=3)
        await world.session.open()
        await turns(20)
        assert world.session.connected == count
        world.session.yank()
    run(test)


def test_requests_go_to_the_least_loaded_and_survive_the_loss_of_one_connection() -> None:
    async def test() -> None:
        world = World(connections=2, reconnect_delay=1.0)
        await world.session.open()
        await turns(20)
        world.watch(*(world.session.pwrite(i, b"x") for i in range(4)))
        assert [client.outstanding for client in world.clients] == [2, 2]
        world.clients[0].yank()
        assert [client.outstanding for client in world.clients[:2]] == [0, 4]
        assert world.states == [("connected", None)]
        for _ in range(4):
            world.peers[1].acknowledge((await world.peers[1].request())[2])
        await world.until(lambda: len(world.ended) == 4)
        assert world.ended == [None] * 4
        await turns(20)
        assert world.session.connected == 2
        world.session.yank()
    run(test)


def test_open_tries_once_or_until_its_time_is_over() -> None:
    async def test() -> None:
        world = World()
        world.down = PeerRefused("no such export")
        with pytest.raises(PeerRefused):
            await world.session.open()
        assert world.dials == [0.0]
        opening = asyncio.ensure_future(world.session.open(timeout=10.0))
        await turns()
        await world.pass_time(12.0)
        with pytest.raises(PeerRefused):
            await opening
        assert world.dials == [0.0, 0.0, 1.0, 3.0, 7.0]
        opening = asyncio.ensure_future(world.session.open(timeout=10.0))
        await turns()
        world.down = None
        await world.pass_time(2.0)
        await opening
        assert world.session.connected == 1
        world.session.yank()
    run(test)


def test_a_yank_ends_it_for_good() -> None:
    async def test() -> None:
        world = World(reconnect_delay=10.0, connections=2)
        await world.session.open()
        await turns(20)
        world.watch(world.session.flush(), world.session.pread(0, 1))
        world.session.yank()
        assert [type(error) for error in world.ended] == [ConnectionLost] * 2
        await world.pass_time(20.0)
        assert len(world.dials) == 2
        with pytest.raises(ConnectionLost, match="yanked"):
            await world.session.flush()
    run(test)


@pytest.mark.parametrize("at", ["pause", "connect"])
def test_a_yank_ends_the_opening(at: str) -> None:
    async def test() -> None:
        world = World()
        world.down = ConnectionRefusedError(errno.ECONNREFUSED, "down")
        if at == "connect":
            world.connecting = asyncio.Event()
        opening = asyncio.ensure_future(world.session.open(timeout=10.0))
        await world.until(lambda: world.dials)
        await turns()
        world.session.yank()
        with pytest.raises(ConnectionLost, match="yanked"):
            await asyncio.wait_for(opening, 5)
        world.down = None
        await world.pass_time(20.0)
        assert (len(world.dials), world.session.connected) == (1, 0)
    run(test)


def test_a_yank_fails_those_who_wait() -> None:
    async def test() -> None:
        world = World(reconnect_delay=10.0)
        await world.session.open()
        world.down = ConnectionRefusedError(errno.ECONNREFUSED, "down")
        world.clients[0].yank()
        world.watch(world.session.flush())
        assert not world.ended
        world.session.yank()
        assert isinstance(world.ended[0], ConnectionLost)
        assert world.clock.next_call is None
    run(test)


def test_a_new_size_is_seen_with_the_reconnection() -> None:
    async def test() -> None:
        world = World()
        await world.session.open()
        world.size = 2 << 20
        world.clients[0].yank()
        await world.pass_time(1.0)
        assert world.session.info.size == 2 << 20
        world.session.yank()
    run(test)


def test_close_says_good_bye_on_all_connections() -> None:
    async def test() -> None:
        world = World(connections=2)
        await world.session.open()
        await turns(20)
        await world.session.close()
        for peer in world.peers:
            assert (await peer.request())[0] == c.CMD_DISC
    run(test)


@pytest.mark.parametrize(("attempt", "chance", "pause"), [
    (0, 0.0, 0.1), (1, 0.0, 0.2), (0, 0.5, 0.075), (20, 0.0, 16.0), (20, 1.0, 8.0), (10_000, 0.0, 16.0)])
def test_pauses_double_are_bounded_and_jittered(attempt: int, chance: float, pause: float) -> None:
    assert Backoff().pause(attempt, chance) == pytest.approx(pause)
