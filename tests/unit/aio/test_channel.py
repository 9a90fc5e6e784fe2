"""The channel: bytes through it, back-pressure, and its three ends."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any

import pytest

from blockstep.aio.channel import Channel

TIMEOUT = 10.0


class Owner:
    def __init__(self, size: int = 65536) -> None:
        self.buffer = memoryview(bytearray(size))
        self.got = bytearray()
        self.ends: list[OSError | None] = []

    def get_buffer(self) -> memoryview:
        return self.buffer

    def received(self, count: int) -> None:
        self.got += self.buffer[:count]

    def lost(self, error: OSError | None) -> None:
        self.ends.append(error)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


def pair() -> tuple[Channel, Owner, Channel, Owner]:
    left, right = socket.socketpair()
    one, other = Owner(), Owner()
    return Channel(left, one), one, Channel(right, other), other


def test_what_does_not_fit_is_queued_by_reference_and_sent_in_order() -> None:
    async def main() -> None:
        left, _, _, other = pair()
        big = memoryview(bytes(range(256)) * 16384)
        left.send([b"<", big])
        assert left.unsent > 1 << 20
        left.send([b"", b">"])
        await until(lambda: not left.unsent)
        left.send([b"!"])
        await until(lambda: other.got.endswith(b"!"))
        assert bytes(other.got) == b"<" + bytes(big) + b">!"
        left.abort()

    asyncio.run(main())


def test_more_pieces_than_one_call_takes() -> None:
    async def main() -> None:
        left, _, _, other = pair()
        pieces = [struct.pack(">I", n) * 100 for n in range(3000)]
        left.send(pieces)
        await until(lambda: len(other.got) == 3000 * 400)
        assert bytes(other.got) == b"".join(pieces)
        left.abort()

    asyncio.run(main())


def test_a_paused_channel_receives_nothing_and_its_peer_is_told_of_room_later() -> None:
    async def main() -> None:
        left, _, right, other = pair()
        told: list[int] = []
        left.on_room = lambda: told.append(left.unsent)
        right.pause()
        assert right.is_paused
        left.send([bytes(4 << 20)])
        for _ in range(10):
            await asyncio.sleep(0)
        assert not other.got
        assert not told
        right.resume()
        await until(lambda: len(other.got) == 4 << 20)
        assert told == sorted(told, reverse=True)
        assert told[-1] == 0
        left.abort()

    asyncio.run(main())


def test_close_sends_all_first_and_both_sides_end_in_good_order() -> None:
    async def main() -> None:
        left, one, right, other = pair()
        left.send([bytes(3 << 20)])
        left.close()
        left.send([b"too late"])
        await left.wait_closed()
        await right.wait_closed()
        assert len(other.got) == 3 << 20
        assert one.ends == other.ends == [None]

    asyncio.run(main())


def test_abort_drops_what_is_queued_and_tells_its_owner_at_once() -> None:
    async def main() -> None:
        left, one, right, _ = pair()
        left.send([bytes(3 << 20)])
        left.abort()
        assert [type(error) for error in one.ends] == [ConnectionAbortedError]
        assert left.unsent == 0
        left.abort()
        left.close()
        left.send([b"dropped"])
        await right.wait_closed()
        assert len(one.ends) == 1

    asyncio.run(main())


def test_abort_of_a_tcp_connection_is_a_reset() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            peer = Owner()
            channel = Channel(listener.accept()[0], Owner())
            other = Channel(client, peer)
            channel.abort()
            await other.wait_closed()
            assert isinstance(peer.ends[0], ConnectionResetError)

    asyncio.run(main())


@pytest.mark.parametrize("last", [b"", b"not a word of TLS"])
def test_a_peer_that_is_gone_before_tls_can_start_ends_the_channel_as_everywhere(last: bytes) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.create_connection(listener.getsockname()) as peer:
            owner = Owner()
            channel = Channel(listener.accept()[0], owner)
            channel.pause()
            peer.sendall(last)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            with pytest.raises(OSError) as caught:
                await channel.start_tls(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), server_side=True)
            assert owner.ends == [caught.value]
            await channel.wait_closed()
            channel.abort()

    asyncio.run(main())


def test_a_socket_that_is_lost_on_its_way_into_tls_ends_the_channel_as_well() -> None:
    class Losing(ssl.SSLContext):
        def wrap_socket(self, sock: socket.socket, *args: Any, **options: Any) -> ssl.SSLSocket:
            socket.socket(fileno=sock.detach()).close()
            raise ConnectionResetError

    async def main() -> None:
        left, one, right, _ = pair()
        left.pause()
        with pytest.raises(ConnectionResetError) as caught:
            await left.start_tls(Losing(ssl.PROTOCOL_TLS_SERVER), server_side=True)
        assert one.ends == [caught.value]
        await left.wait_closed()
        await right.wait_closed()

    asyncio.run(main())


def test_sending_to_a_peer_that_is_gone_ends_the_channel_from_the_loop() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        owner = Owner()
        channel = Channel(left, owner)
        channel.pause()
        right.close()
        channel.send([b"x"])
        assert owner.ends == []
        await channel.wait_closed()
        assert isinstance(owner.ends[0], BrokenPipeError)

    asyncio.run(main())


def test_what_a_batch_gives_rise_to_is_called_at_its_end_and_not_in_its_middle() -> None:
    async def main() -> None:
        left, _, right, other = pair()
        order: list[str] = []

        def received(count: int) -> None:
            right.after_batch(lambda: order.append("after"))
            order.append("received")

        other.received = received  # type: ignore[method-assign]
        left.send([b"x"])
        await until(lambda: order)
        assert order == ["received", "after"]
        left.after_batch(lambda: order.append("soon"))
        assert order[-1] != "soon"
        await until(lambda: order[-1] == "soon")
        left.abort()
        right.abort()

    asyncio.run(main())
