"""One connection, against a peer that does what the test says."""

import asyncio
import errno
import ssl
import struct
from collections.abc import Coroutine
from typing import Any

import pytest

from blockstep.aio.inline import start
from blockstep.errors import ConnectionLost, ProtocolError
from blockstep.nbd import constants as c
from blockstep.nbd.client import CORK
from tests.unit.nbd.scripted import ALL_FLAGS, FakeClock, pair, run, turns


class Ended(list[Any]):
    """Collects what strands end with."""

    def watch(self, *coroutines: Coroutine[Any, Any, Any]) -> None:
        for coroutine in coroutines:
            start(coroutine, lambda value, error: self.append(value if error is None else error))


def codes(errors: list[Any]) -> list[int | None]:
    return [error.errno for error in errors if isinstance(error, ConnectionLost)]


def test_requests_of_one_turn_leave_together_and_replies_come_in_any_order() -> None:
    async def test() -> None:
        client, peer = pair()
        ended = Ended()
        ended.watch(client.pread(0, 4), client.pwrite(8, b"abcd"), client.flush(), client.pread(100, 2))
        requests = [await peer.request() for _ in range(4)]
        assert peer.receives == 1
        assert [request[0] for request in requests] == [c.CMD_READ, c.CMD_WRITE, c.CMD_FLUSH, c.CMD_READ]
        assert requests[1][3:] == (8, 4, b"abcd")
        for request, data in zip(reversed(requests), (b"xy", b"", b"", b"1234"), strict=True):
            peer.acknowledge(request[2], 0, data)
        while len(ended) < 4:
            await turns()
        assert ended == [b"xy", None, None, b"1234"]
        client.yank()
    run(test)


def test_requests_issued_from_a_batch_of_replies_leave_at_its_end() -> None:
    async def test() -> None:
        client, peer = pair()

        async def chain(offset: int) -> None:
            for _ in range(3):
                await client.pwrite(offset, b"x")
        ended = Ended()
        ended.watch(*(chain(offset) for offset in range(5)))
        for turn in range(3):
            requests = [await peer.request() for _ in range(5)]
            assert peer.receives == turn + 1
            peer.send(b"".join(struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, request[2]) for request in requests))
        while len(ended) < 5:
            await turns()
        client.yank()
    run(test)


def test_a_full_cork_does_not_wait_for_the_end_of_the_turn() -> None:
    async def test() -> None:
        client, peer = pair()
        client.submit_write(0, bytes(CORK + 1), 0, lambda error: None)
        assert peer.sock.recv(10)
        client.yank()
    run(test)


def test_submitted_writes_are_acknowledged_from_the_batch() -> None:
    async def test() -> None:
        client, peer = pair()
        got: list[tuple[int, BaseException | None]] = []
        for i in range(3):
            client.submit_write(i, b"x", c.CMD_FLAG_FUA if i == 1 else 0, lambda error, i=i: got.append((i, error)))
        requests = [await peer.request() for _ in range(3)]
        assert [request[1] for request in requests] == [0, c.CMD_FLAG_FUA, 0]
        peer.acknowledge(requests[2][2])
        peer.acknowledge(requests[0][2], c.ENOSPC)
        while len(got) < 2:
            await turns()
        assert got[0] == (2, None)
        assert isinstance(got[1][1], OSError)
        assert got[1][1].errno == errno.ENOSPC
        client.yank()
        assert isinstance(got[2][1], ConnectionLost)
        client.submit_write(0, b"x", 0, lambda error: got.append((9, error)))
        assert isinstance(got[3][1], ConnectionLost)
    run(test)


def test_a_yank_fails_all_at_once_each_with_its_own_error() -> None:
    async def test() -> None:
        heard: list[ConnectionLost] = []
        client, _peer = pair(on_lost=heard.append)
        ended = Ended()
        ended.watch(client.pread(0, 1 << 20), client.pwrite(0, b"x"), client.flush())
        await turns()
        client.yank()
        assert codes(ended) == [errno.ENOTCONN] * 3
        assert len({id(error) for error in ended}) == 3
        assert len(heard) == 1
        assert (client.outstanding, client.usable) == (0, False)
        with pytest.raises(ConnectionLost, match="yanked"):
            await client.flush()
        client.yank()
        assert len(heard) == 1
    run(test)


def test_a_yank_from_within_a_reply_is_safe() -> None:
    async def test() -> None:
        client, peer = pair()
        got: list[Any] = []
        client.submit_write(0, b"a", 0, lambda error: client.yank())
        client.submit_write(0, b"b", 0, got.append)
        requests = [await peer.request() for _ in range(2)]
        peer.send(b"".join(struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, request[2]) for request in requests))
        while not got:
            await turns()
        assert codes(got) == [errno.ENOTCONN]
        assert client.lost_because is not None
        assert client.lost_because.errno == errno.ENOTCONN
    run(test)


@pytest.mark.parametrize("sin", [
    struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 999), struct.pack(">IIQ", 1, 0, 1),
    struct.pack(">IHHQI", c.STRUCTURED_REPLY_MAGIC, 1, 0, 1, 0) + bytes(12)])
def test_a_peer_that_breaks_the_protocol_is_dropped(sin: bytes) -> None:
    async def test() -> None:
        heard: list[ConnectionLost] = []
        client, peer = pair(on_lost=heard.append)
        ended = Ended()
        ended.watch(client.pread(0, 10), client.flush())
        await peer.request()
        await peer.request()
        peer.send(sin)
        while not heard:
            await turns()
        assert codes(ended) == [errno.EPROTO] * 2
        assert isinstance(heard[0].__cause__, ProtocolError)
        assert await peer.ended()
    run(test)


@pytest.mark.parametrize("partial", [b"", struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 1) + b"half"])
def test_a_peer_that_goes_away_fails_what_is_outstanding(partial: bytes) -> None:
    async def test() -> None:
        client, peer = pair()
        ended = Ended()
        ended.watch(client.pread(0, 100))
        await peer.request()
        if partial:
            peer.send(partial)
        peer.sock.close()
        while not ended:
            await turns()
        assert codes(ended) == [errno.ECONNRESET]
    run(test)


def test_the_number_of_a_tls_error_is_not_taken_for_an_errno() -> None:
    """Number 1 is all that OpenSSL says; as an errno it would be: operation not permitted."""
    async def test() -> None:
        client, _ = pair()
        ended = Ended()
        ended.watch(client.pread(0, 4))
        client.lost(ssl.SSLError(1, "[SSL: BAD_RECORD_TYPE] bad record type"))
        assert codes(ended) == [errno.EPROTO]
        assert "Protocol error: [SSL: BAD_RECORD_TYPE]" in str(ended[0])
        client._channel.abort()
    run(test)


def test_a_peer_that_never_answers_is_cut_off_at_the_deadline() -> None:
    async def test() -> None:
        clock = FakeClock()
        client, peer = pair(timeout=8.0, clock=clock)
        ended = Ended()
        ended.watch(client.pwrite(0, b"x"))
        clock.advance(4.5)
        ended.watch(client.flush())
        assert (await peer.request())[0] == c.CMD_WRITE
        clock.advance(3.0)
        assert not ended
        clock.advance(1.5)
        assert codes(ended) == [errno.ETIMEDOUT] * 2
    run(test)


def test_the_deadline_is_of_the_oldest_request_and_ends_with_the_last() -> None:
    async def test() -> None:
        clock = FakeClock()
        client, peer = pair(timeout=8.0, clock=clock)
        ended = Ended()
        for _ in range(6):
            ended.watch(client.flush())
            clock.advance(5.0)
            peer.acknowledge((await peer.request())[2])
            while client.outstanding:
                await turns()
        assert ended == [None] * 6
        clock.advance(100.0)
        assert clock.next_call is None
        assert client.usable
        ended.watch(client.flush())
        clock.advance(7.9)
        assert len(ended) == 6
        clock.advance(1.2)
        assert codes(ended) == [errno.ETIMEDOUT]
    run(test)


def test_close_waits_for_answers_and_says_good_bye() -> None:
    async def test() -> None:
        client, peer = pair()
        write = asyncio.create_task(_as_task(client.pwrite(0, b"x")))
        await turns()
        close = asyncio.create_task(client.close())
        await turns()
        assert not close.done()
        with pytest.raises(ConnectionLost, match="closed"):
            await client.flush()
        peer.acknowledge((await peer.request())[2])
        assert (await peer.request())[0] == c.CMD_DISC
        assert await peer.ended()
        await write
        await close
    run(test)


def test_close_does_not_wait_for_ever() -> None:
    async def test() -> None:
        clock = FakeClock()
        client, _peer = pair(clock=clock)
        ended = Ended()
        ended.watch(client.flush())
        close = asyncio.create_task(client.close(timeout=3.0))
        await turns()
        clock.advance(3.0)
        await close
        assert len(codes(ended)) == 1
    run(test)


def test_a_server_that_shuts_down_gets_no_new_requests_and_a_good_bye() -> None:
    async def test() -> None:
        client, peer = pair()
        ended = Ended()
        ended.watch(client.flush(), client.pread(0, 1))
        first, second = await peer.request(), await peer.request()
        peer.acknowledge(first[2], c.ESHUTDOWN)
        while not ended:
            await turns()
        assert not client.usable
        peer.acknowledge(second[2], 0, b"y")
        assert (await peer.request())[0] == c.CMD_DISC
        assert ended[1] == b"y"
        assert codes(ended) == [errno.ESHUTDOWN]
    run(test)


def test_a_cancelled_task_leaves_the_connection_usable() -> None:
    async def test() -> None:
        client, peer = pair()
        task = asyncio.create_task(_as_task(client.pwrite(0, b"x")))
        first = await peer.request()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ended = Ended()
        ended.watch(client.flush())
        second = await peer.request()
        peer.acknowledge(first[2])
        peer.acknowledge(second[2])
        while not ended:
            await turns()
        assert ended == [None]
        client.yank()
    run(test)


@pytest.mark.parametrize("block", [1, 512])
def test_requests_of_any_alignment_do_what_they_say(block: int) -> None:
    async def test() -> None:
        disk = bytearray(i % 251 for i in range(1 << 20))
        model = bytearray(disk)
        client, peer = pair(minimum_block=block, maximum_payload=64 << 10)
        serving = asyncio.create_task(peer.serve(disk, block))
        for offset, length in ((0, 512), (3, 5), (510, 4), (511, 1026), (1024, 1), (100_001, 200_003), (1536, 512)):
            data = bytes((offset + i) % 256 for i in range(length))
            await client.pwrite(offset, data)
            model[offset:offset + length] = data
            assert await client.pread(offset, length) == data
            await client.write_zeroes(offset + 1, length)
            model[offset + 1:offset + 1 + length] = bytes(length)
            await client.discard(offset, length)
            await client.cache(offset, length)
            assert disk == model
        await client.close()
        requests = await serving
        assert max(length for command, _, _, length in requests if command in (c.CMD_READ, c.CMD_WRITE)) <= 64 << 10
    run(test)


def test_misaligned_writes_to_one_block_do_not_undo_each_other() -> None:
    async def test() -> None:
        disk = bytearray(4096)
        client, peer = pair(minimum_block=512, size=4096)
        serving = asyncio.create_task(peer.serve(disk, 512))
        await asyncio.gather(*(_as_task(client.pwrite(i * 100, bytes([i + 1]) * 100)) for i in range(30)),
                             _as_task(client.pwrite(3072, b"z" * 512)))
        assert disk == b"".join(bytes([i + 1]) * 100 for i in range(30)) + bytes(72) + b"z" * 512 + bytes(512)
        await client.close()
        await serving
    run(test)


def test_fua_that_the_server_lacks_becomes_a_flush() -> None:
    async def test() -> None:
        client, peer = pair(ALL_FLAGS & ~c.FLAG_SEND_FUA)
        serving = asyncio.create_task(peer.serve(bytearray(10)))
        await client.pwrite(0, b"x", c.CMD_FLAG_FUA)
        await client.write_zeroes(0, 1, c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE)
        await client.close()
        assert [request[:2] for request in await serving] == [
            (c.CMD_WRITE, 0), (c.CMD_FLUSH, 0), (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE), (c.CMD_FLUSH, 0),
            (c.CMD_DISC, 0)]
    run(test)


def test_what_the_server_does_not_offer_is_not_sent() -> None:
    async def test() -> None:
        client, _peer = pair(c.FLAG_HAS_FLAGS)
        await client.flush()
        for request in (client.discard(0, 1), client.write_zeroes(0, 1), client.cache(0, 1), client.block_status(0, 1)):
            with pytest.raises(OSError) as caught:
                await request
            assert caught.value.errno == errno.ENOTSUP
        client.yank()
    run(test)


def test_block_status_is_cut_to_what_was_asked() -> None:
    async def test() -> None:
        client, peer = pair(minimum_block=512, structured=True, contexts={c.BASE_ALLOCATION: 4})
        ended = Ended()
        ended.watch(client.block_status(700, 1000))
        command, _, cookie, offset, length, _ = await peer.request()
        assert (command, offset, length) == (c.CMD_BLOCK_STATUS, 512, 1536)
        payload = struct.pack(">I", 4) + struct.pack(">IIIIII", 512, 0, 512, 3, 4096, 1)
        peer.send(struct.pack(">IHHQI", c.STRUCTURED_REPLY_MAGIC, 1, c.REPLY_TYPE_BLOCK_STATUS, cookie, len(payload))
                  + payload)
        while not ended:
            await turns()
        assert ended == [[(324, 0), (512, 3), (164, 1)]]
        client.yank()
    run(test)


async def _as_task(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine
