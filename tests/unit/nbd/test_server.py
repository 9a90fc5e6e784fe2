"""The server at its socket: each command, its errors, its bounds, and its ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Extent
from blockstep.errors import OptionError
from blockstep.nbd import constants as c
from blockstep.nbd.connection import Limits
from blockstep.nbd.export import Export, ExportInUse
from blockstep.nbd.server import ClientEvent, Server, passed_sockets
from blockstep.nbd.wire import encode_status_query, parse_error, parse_status
from tests.unit.nbd.storage import SIMPLE, TIMEOUT, Client, Storage, connected, served

Scenario = Callable[[], Coroutine[Any, Any, None]]
FORMS = [{"structured": False}, {"structured": True}, {"extended": True}]
form = pytest.mark.parametrize("form", FORMS, ids=["simple", "structured", "extended"])


def error_of(replies: list[tuple[int, int, bytes]]) -> int:
    """The error that a request met, in whichever form."""
    kind, error, payload = replies[-1]
    return error if kind == SIMPLE else parse_error(memoryview(payload))[0] if kind & c.REPLY_TYPE_FLAG_ERROR else 0


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something is true."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


# --- commands ---

@form
def test_what_was_written_is_read(form: dict[str, bool]) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(**form)
            assert error_of(await client.ask(c.CMD_WRITE, 1000, payload=b"hello")) == 0
            reply = (await client.ask(c.CMD_READ, 999, 7, cookie=9, reads={9: 7}))[-1]
            if form.get("structured") or form.get("extended"):
                assert reply[2] == struct.pack(">Q", 999) + b"\0hello\0"
            else:
                assert reply == (SIMPLE, 0, b"\0hello\0")

    asyncio.run(main())


@pytest.mark.parametrize(("type", "flags", "call"), [
    (c.CMD_FLUSH, 0, ("flush",)),
    (c.CMD_TRIM, 0, ("discard", 4096, 8192)),
    (c.CMD_WRITE_ZEROES, 0, ("write_zeroes", 4096, 8192, MAY_UNMAP)),
    (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE, ("write_zeroes", 4096, 8192, 0)),
    (c.CMD_WRITE_ZEROES, c.CMD_FLAG_FUA | c.CMD_FLAG_FAST_ZERO, ("write_zeroes", 4096, 8192, MAY_UNMAP | FUA | FAST)),
    (c.CMD_CACHE, 0, ("pread", 4096, 8192)),
    (c.CMD_READ, c.CMD_FLAG_DF, ("pread", 4096, 8192)),
    (c.CMD_READ, c.CMD_FLAG_FUA, ("pread", 4096, 8192)),
])
@pytest.mark.parametrize("form", FORMS[1:], ids=["structured", "extended"])
def test_a_command_becomes_its_operation(form: dict[str, bool], type: int, flags: int, call: tuple[Any, ...]) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(**form)
            where = (0, 0) if type == c.CMD_FLUSH else (4096, 8192)
            assert error_of(await client.ask(type, *where, flags=flags)) == 0
            assert storage.calls == [call]

    asyncio.run(main())


@form
def test_fua_makes_write_and_trim_durable(form: dict[str, bool]) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(**form)
            await client.ask(c.CMD_WRITE, 0, flags=c.CMD_FLAG_FUA, payload=b"x")
            await client.ask(c.CMD_TRIM, 0, 5, flags=c.CMD_FLAG_FUA)
            assert storage.calls == [("pwrite", 0, 1, FUA), ("discard", 0, 5), ("flush",)]

    asyncio.run(main())


def test_a_structured_reply_to_a_read_is_a_chunk_even_without_bytes() -> None:
    async def main() -> None:
        async with served() as (_, client):
            await client.go(structured=True)
            assert await client.ask(c.CMD_READ, 100, 0) == [(c.REPLY_TYPE_NONE, 0, b"")]

    asyncio.run(main())


@pytest.mark.parametrize("type", [c.CMD_READ, c.CMD_WRITE, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES])
@form
def test_a_length_of_zero_is_a_success_without_an_operation(form: dict[str, bool], type: int) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(**form)
            flags = c.CMD_FLAG_PAYLOAD_LEN if client.extended and type == c.CMD_WRITE else 0
            assert error_of(await client.ask(type, 100, 0, flags)) == 0
            assert storage.calls == []

    asyncio.run(main())


MIB = 1 << 20


@pytest.mark.parametrize(("type", "offset", "length", "flags", "error"), [
    (c.CMD_READ, MIB - 1, 2, 0, c.EINVAL),
    (c.CMD_READ, 1 << 63, 1 << 31, 0, c.EINVAL),
    (c.CMD_WRITE_ZEROES, MIB, 1, 0, c.ENOSPC),
    (c.CMD_TRIM, MIB, 1, 0, c.EINVAL),
    (c.CMD_CACHE, MIB, 1, 0, c.EINVAL),
    (c.CMD_FLUSH, 1, 0, 0, c.EINVAL),
    (c.CMD_FLUSH, 0, 1, 0, c.EINVAL),
    (c.CMD_BLOCK_STATUS, 0, 1, 0, c.EINVAL),
    (8, 0, 0, 0, c.EINVAL),
    (c.CMD_READ, 0, 1, c.CMD_FLAG_NO_HOLE, c.EINVAL),
    (c.CMD_TRIM, 0, 1, c.CMD_FLAG_DF, c.EINVAL),
    (c.CMD_TRIM, 0, 1, 1 << 9, c.EINVAL),
])
@form
def test_a_bad_request_gets_the_error_that_the_protocol_names(
        form: dict[str, bool], type: int, offset: int, length: int, flags: int, error: int) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(**form)
            assert error_of(await client.ask(type, offset, length, flags)) == error
            assert storage.calls == []
            assert error_of(await client.ask(c.CMD_FLUSH)) == 0  # and the connection lives on

    asyncio.run(main())


@form
def test_a_write_outside_has_no_space_and_its_payload_is_consumed(form: dict[str, bool]) -> None:
    async def main() -> None:
        async with served() as (_, client):
            await client.go(**form)
            assert error_of(await client.ask(c.CMD_WRITE, MIB - 1, payload=b"xy")) == c.ENOSPC
            assert error_of(await client.ask(c.CMD_FLUSH)) == 0

    asyncio.run(main())


def test_a_read_above_the_maximum_payload_overflows() -> None:
    async def main() -> None:
        async with served(Storage(64 << 20)) as (_, client):
            await client.go()
            assert error_of(await client.ask(c.CMD_READ, 0, (32 << 20) + 1)) == c.EOVERFLOW

    asyncio.run(main())


def test_df_needs_structured_replies_and_payload_len_extended_headers() -> None:
    async def main() -> None:
        async with served() as (_, client):
            await client.go(structured=False)
            assert error_of(await client.ask(c.CMD_READ, 0, 1, c.CMD_FLAG_DF)) == c.EINVAL
            assert error_of(await client.ask(c.CMD_TRIM, 0, 1, c.CMD_FLAG_PAYLOAD_LEN)) == c.EINVAL

    asyncio.run(main())


@pytest.mark.parametrize("flags", [0, c.CMD_FLAG_FUA])
def test_an_extended_write_has_its_payload_also_when_the_client_forgets_payload_len_as_qemu_does(flags: int) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(extended=True)
            await client.send(client.request(c.CMD_WRITE, 7, 5, flags) + b"hello")
            assert (await client.replies(1))[0][0] == c.REPLY_TYPE_NONE
            assert storage.data[6:13] == b"\0hello\0"
            assert error_of(await client.ask(c.CMD_FLUSH)) == 0

    asyncio.run(main())


def test_a_payload_where_none_belongs_is_invalid() -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(extended=True)
            assert error_of(await client.ask(c.CMD_TRIM, 0, payload=b"what?")) == c.EINVAL
            assert error_of(await client.ask(c.CMD_FLUSH)) == 0
            assert storage.calls == [("flush",)]

    asyncio.run(main())


def test_a_block_status_for_more_contexts_than_there_are_is_not_taken_apart() -> None:
    async def main() -> None:
        async with served(Storage(8 << 20)) as (_, client):
            await client.go(extended=True, contexts=["base:allocation"])
            query = encode_status_query(4096, range(1 << 20))
            tracemalloc.start()
            try:
                assert error_of(await client.ask(c.CMD_BLOCK_STATUS, payload=query)) == c.EINVAL
                assert tracemalloc.get_traced_memory()[1] < 16 << 20
            finally:
                tracemalloc.stop()

    asyncio.run(main())


@pytest.mark.parametrize("type", [c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES])
def test_a_read_only_export_refuses_what_writes(type: int) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(export=Export("", storage, read_only=True)) as (_, client):
            replies = await client.go()
            assert struct.unpack(">HQH", replies[0][1])[2] & c.FLAG_READ_ONLY
            payload = b"x" if type == c.CMD_WRITE else b""
            assert error_of(await client.ask(type, 0, 1, payload=payload)) == c.EPERM
            assert storage.calls == []

    asyncio.run(main())


@pytest.mark.parametrize(("code", "error"), [
    (errno.EPERM, c.EPERM), (errno.EROFS, c.EPERM), (errno.EIO, c.EIO), (errno.ENOMEM, c.ENOMEM),
    (errno.EINVAL, c.EINVAL), (errno.ENOSPC, c.ENOSPC), (errno.EDQUOT, c.ENOSPC), (errno.EFBIG, c.ENOSPC),
    (errno.EOVERFLOW, c.EOVERFLOW), (errno.ENOTSUP, c.EINVAL), (errno.ESHUTDOWN, c.ESHUTDOWN),
    (errno.ENOENT, c.EIO)])
def test_errors_of_storage_become_the_protocols(code: int, error: int) -> None:
    async def main() -> None:
        storage = Storage()
        storage.fail = OSError(code, "the disk says no")
        async with served(storage) as (_, client):
            await client.go()
            for request in ({"type": c.CMD_READ, "length": 1}, {"type": c.CMD_WRITE, "payload": b"x"}):
                replies = await client.ask(**request)
                assert parse_error(memoryview(replies[0][2])) == (error, "the disk says no", None)

    asyncio.run(main())


def test_fast_zeroes_that_are_not_fast_are_not_supported() -> None:
    async def main() -> None:
        storage = Storage()
        storage.fail = OSError(errno.ENOTSUP, "slow")
        async with served(storage) as (_, client):
            await client.go()
            assert error_of(await client.ask(c.CMD_WRITE_ZEROES, 0, 1, c.CMD_FLAG_FAST_ZERO)) == c.ENOTSUP
            for type in (c.CMD_WRITE_ZEROES, c.CMD_TRIM):  # the protocol has it for nothing else
                assert error_of(await client.ask(type, 0, 1)) == c.EINVAL

    asyncio.run(main())


def test_a_bug_in_storage_is_an_io_error_for_the_client_and_is_reported() -> None:
    async def main() -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        storage = Storage()
        storage.fail = KeyError("oops")
        async with served(storage) as (_, client):
            await client.go()
            assert error_of(await client.ask(c.CMD_READ, 0, 1)) == c.EIO
            assert isinstance(reported[0]["exception"], KeyError)

    asyncio.run(main())


# --- block status ---

LAYERS = [Extent(100, True, False, True, 1), Extent(50, False, True, True, 1), Extent(50, False, True, True, 1),
          Extent(300, True, False, False, 2), Extent(500, False, True, False, 0)]


class Bitmap:
    length = 1 << 40

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return [(min(length, 10), True)] + ([(length - 10, False)] if length > 10 else [])


def status_export() -> Export:
    storage = Storage(1000)
    storage.extents = LAYERS
    return Export("", storage, bitmaps={"b": Bitmap()})


CONTEXTS = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"]


@pytest.mark.parametrize("form", FORMS[1:], ids=["structured", "extended"])
def test_block_status_answers_each_selected_context_with_merged_extents(form: dict[str, bool]) -> None:
    async def main() -> None:
        async with served(export=status_export()) as (_, client):
            await client.go(contexts=CONTEXTS, **form)
            replies = await client.ask(c.CMD_BLOCK_STATUS, 0, 1000)
            assert [parse_status(memoryview(data), client.extended) for _, _, data in replies] == [
                (0, [(100, 0), (100, 3), (300, 0), (500, 3)]),
                (1, [(200, 1), (300, 2), (500, 0)]),
                (2, [(10, 1), (990, 0)])]

    asyncio.run(main())


def test_req_one_gives_one_extent_for_each_context() -> None:
    async def main() -> None:
        async with served(export=status_export()) as (_, client):
            await client.go(contexts=CONTEXTS)
            replies = await client.ask(c.CMD_BLOCK_STATUS, 120, 500, c.CMD_FLAG_REQ_ONE)
            assert [parse_status(memoryview(data))[1] for _, _, data in replies] == [[(80, 3)], [(80, 1)], [(10, 1)]]

    asyncio.run(main())


def test_a_payload_limits_block_status_to_some_contexts() -> None:
    async def main() -> None:
        async with served(export=status_export()) as (_, client):
            await client.go(extended=True, contexts=CONTEXTS)
            replies = await client.ask(c.CMD_BLOCK_STATUS, 0, payload=struct.pack(">QI", 50, 1))
            assert [parse_status(memoryview(data), True) for _, _, data in replies] == [(1, [(50, 1)])]
            for bad in (struct.pack(">QII", 50, 1, 1), struct.pack(">QI", 50, 3), b"short", struct.pack(">Q", 50)):
                assert error_of(await client.ask(c.CMD_BLOCK_STATUS, 0, payload=bad)) == c.EINVAL

    asyncio.run(main())


# --- batches, order, memory ---

@form
def test_a_batch_is_answered_in_order_when_nothing_waits(form: dict[str, bool]) -> None:
    async def main() -> None:
        async with served() as (_, client):
            await client.go(**form)
            await client.send(*(client.request(c.CMD_WRITE, 100 * n, cookie=n, payload=b"%d" % n) for n in range(200)))
            assert [cookie for _, _, cookie, _, _ in await client.replies(200)] == list(range(200))

    asyncio.run(main())


def test_requests_that_wait_are_answered_when_they_end_and_others_pass_them() -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go()
            storage.hold = True
            await client.send(*(client.request(c.CMD_WRITE, n, cookie=n, payload=b"x") for n in range(3)))
            await until(lambda: len(storage.waiting) == 3)
            storage.hold = False
            assert error_of(await client.ask(c.CMD_FLUSH, cookie=77)) == 0
            storage.release()
            assert [reply[2] for reply in await client.replies(3)] == [0, 1, 2]

    asyncio.run(main())


def test_the_payload_of_a_waiting_write_is_not_overwritten_by_later_requests() -> None:
    async def main() -> None:
        storage = Storage(8 << 20)
        async with served(storage) as (_, client):
            await client.go()
            storage.hold = True
            size = 60000
            for n in range(40):
                await client.send(client.request(c.CMD_WRITE, n * size, cookie=n, payload=bytes([n]) * size))
                await until(lambda n=n: len(storage.waiting) == n + 1)
            storage.release()
            await client.replies(40)
            assert all(storage.data[n * size:(n + 1) * size] == bytes([n]) * size for n in range(40))

    asyncio.run(main())


def test_large_writes_and_reads_pass_whole_among_small_ones() -> None:
    async def main() -> None:
        storage = Storage(80 << 20)
        async with served(storage) as (_, client):
            await client.go(structured=False)
            for size in (1, 300_000, 5, 5 << 20, 100, 32 << 20, 7):
                data = os.urandom(min(size, 1000)) * (size // min(size, 1000))
                assert error_of(await client.ask(c.CMD_WRITE, 3, payload=data)) == 0
                back = await client.ask(c.CMD_READ, 3, len(data), cookie=4, reads={4: len(data)})
                assert back[0][2] == data

    asyncio.run(main())


def test_a_client_that_does_not_read_is_not_served_for_ever() -> None:
    async def main() -> None:
        storage = Storage(2 << 20)
        async with served(storage, limits=Limits(memory=4 << 20)) as (server, client):
            await client.go(structured=False)
            count = 100
            await client.send(*(client.request(c.CMD_READ, 0, 1 << 20, cookie=n) for n in range(count)))
            await until(lambda: any(connection.channel.is_paused for connection in server.connections))
            (connection,) = server.connections
            assert connection.channel.unsent < 6 << 20
            assert len(storage.calls) < 10
            replies = await client.replies(count, dict.fromkeys(range(count), 1 << 20))
            assert [reply[2] for reply in replies] == list(range(count))
            assert len(await client.ask(c.CMD_FLUSH)) == 1

    asyncio.run(main())


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage, limits=Limits(requests=4)) as (_, client):
            await client.go()
            storage.hold = True
            await client.send(*(client.request(c.CMD_WRITE, n, cookie=n, payload=b"x") for n in range(10)))
            await until(lambda: len(storage.waiting) == 4)
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(storage.calls) == 4
            storage.release()
            assert len(await client.replies(10)) == 10

    asyncio.run(main())


@pytest.mark.parametrize(("type", "flags", "length"), [
    (c.CMD_CACHE, 0, MIB), (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE, 64 << 10), (c.CMD_BLOCK_STATUS, 0, MIB)])
def test_a_flood_of_costly_requests_that_end_at_once_lets_others_have_their_turn(
        type: int, flags: int, length: int) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (_, client):
            await client.go(contexts=[c.BASE_ALLOCATION])
            count = 2000
            await client.send(*(client.request(type, 0, length, flags, cookie=n) for n in range(count)))
            done = [0]
            while done[-1] < count:
                await asyncio.sleep(0)
                done.append(len(storage.calls))
            steps = [after - before for before, after in pairwise(done)]
            assert max(steps) <= 4 * (16 << 20) // (64 << 10)
            assert len({reply[2] for reply in await client.replies(count)}) == count

    asyncio.run(main())


def test_answers_of_block_status_that_are_being_made_count_as_memory() -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage, limits=Limits(memory=64 << 20)) as (_, client):
            await client.go(contexts=[c.BASE_ALLOCATION])
            storage.hold = True
            await client.send(*(client.request(c.CMD_BLOCK_STATUS, 0, 512, cookie=n) for n in range(100)))
            await until(lambda: storage.waiting)
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(storage.waiting) == 4
            storage.release()
            assert len(await client.replies(100)) == 100

    asyncio.run(main())


# --- ends ---

def test_disconnect_finishes_what_is_in_flight_and_ignores_what_follows() -> None:
    async def main() -> None:
        storage, events = Storage(), []
        async with served(storage, events=events) as (_, client):
            await client.go(structured=False)
            storage.hold = True
            await client.send(client.request(c.CMD_WRITE, 0, cookie=5, payload=b"x"), client.request(c.CMD_DISC),
                              client.request(c.CMD_FLUSH))
            await until(lambda: storage.waiting)
            storage.release()
            assert await client.rest() == struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 5)
            await until(lambda: events[-1].what == "gone")
            assert events[-1].error is None
            assert storage.calls == [("pwrite", 0, 1, 0)]

    asyncio.run(main())


def test_a_broken_request_ends_the_connection_after_the_replies_to_earlier_ones() -> None:
    async def main() -> None:
        events: list[ClientEvent] = []
        async with served(events=events) as (_, client):
            await client.go(structured=False)
            await client.send(client.request(c.CMD_FLUSH, cookie=3), b"garbage, certainly no request")
            assert await client.rest() == struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 3)
            await until(lambda: events[-1].what == "gone")
            assert "magic" in str(events[-1].error)

    asyncio.run(main())


def test_a_write_of_more_than_the_maximum_payload_ends_the_connection() -> None:
    async def main() -> None:
        async with served(Storage(64 << 20)) as (_, client):
            await client.go()
            await client.send(client.request(c.CMD_WRITE, 0, (32 << 20) + 1))
            assert await client.rest() == b""

    asyncio.run(main())


def test_a_client_that_goes_away_in_mid_request_leaves_nothing_behind() -> None:
    async def main() -> None:
        storage, events = Storage(), []
        async with served(storage, events=events) as (server, client):
            await client.go()
            storage.hold = True
            await client.send(client.request(c.CMD_WRITE, 0, payload=b"x"), client.request(c.CMD_WRITE, 0, 9))
            await until(lambda: storage.waiting)
            export = server.exports.find("")
            assert export is not None
            client.sock.close()
            await until(lambda: events[-1].what == "gone")
            assert not server.connections
            assert not export.connections
            assert export.in_flight == 1
            storage.release()
            await export.wait_idle()
            assert storage.data[0] == ord("x")

    asyncio.run(main())


def test_the_handshake_has_a_deadline_and_the_transmission_phase_none() -> None:
    async def main() -> None:
        events: list[ClientEvent] = []
        async with served(events=events, limits=Limits(handshake=0.02)) as (_, client):
            await client.rest()
            assert isinstance(events[-1].error, TimeoutError)
        async with served(limits=Limits(handshake=0.05)) as (server, client):
            await client.go()
            (connection,) = server.connections
            assert connection._deadline is None

    asyncio.run(main())


def test_an_export_in_use_is_removed_only_the_hard_way() -> None:
    async def main() -> None:
        storage, events = Storage(), []
        async with served(storage, name="disk", events=events) as (server, client):
            await client.go("disk")
            with pytest.raises(ExportInUse, match="'disk' is in use by 1 connection"):
                await server.remove("disk")
            storage.hold = True
            await client.send(*(client.request(c.CMD_WRITE, n, cookie=n, payload=b"x") for n in range(2)))
            await until(lambda: len(storage.waiting) == 2)
            await server.remove("disk", "hard")
            assert events[-1].what == "gone"
            assert await client.rest() == b""
            assert server.exports.find("disk") is None
            with pytest.raises(OptionError):
                await server.remove("disk", "hard")
            storage.release()

    asyncio.run(main())


def test_a_hard_removal_in_the_middle_of_a_batch_starts_no_more_of_it() -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage, name="disk") as (server, client):
            await client.go("disk")
            plain = storage.pwrite

            async def revoke(offset: int, data: Any, flags: int = 0) -> None:
                await plain(offset, data, flags)
                if offset == 1:
                    await server.remove("disk", "hard")

            storage.pwrite = revoke  # type: ignore[method-assign]
            await client.send(*(client.request(c.CMD_WRITE, n, cookie=n, payload=b"x") for n in range(5)))
            await client.rest()
            assert [call[1] for call in storage.calls] == [0, 1]

    asyncio.run(main())


def test_a_large_write_waits_while_others_hold_the_servers_memory() -> None:
    async def main() -> None:
        storage = Storage(8 << 20)
        async with served(storage, memory=3 << 20) as (server, first):
            with connected(server) as second:
                for client in (first, second):
                    await client.go()
                storage.hold = True
                large = bytes(2 << 20)
                await first.send(first.request(c.CMD_WRITE, 0, cookie=1, payload=large))
                await until(lambda: len(storage.waiting) == 1)
                sending = asyncio.ensure_future(second.send(second.request(c.CMD_WRITE, 0, cookie=2, payload=large)))
                await until(lambda: any(connection._starving for connection in server.connections))
                assert len(storage.waiting) == 1
                storage.release()
                first.sock.close()
                await sending
                assert [reply[2:4] for reply in await second.replies(1)] == [(2, 0)]

    asyncio.run(main())


def test_a_client_waits_for_the_memory_that_its_own_writes_hold() -> None:
    async def main() -> None:
        storage = Storage(1 << 20)
        async with served(storage, memory=1 << 20) as (server, client):
            await client.go()
            storage.hold = True
            writes = [client.request(c.CMD_WRITE, 0, cookie=n, payload=bytes(900_000)) for n in range(3)]
            sending = asyncio.ensure_future(client.send(*writes))
            await until(lambda: any(connection._starving for connection in server.connections))
            storage.release()
            await sending
            assert [reply[2:4] for reply in await client.replies(3)] == [(0, 0), (1, 0), (2, 0)]

    asyncio.run(main())


def test_a_client_that_does_nothing_keeps_no_memory_from_others() -> None:
    async def main() -> None:
        storage = Storage(8 << 20)
        async with served(storage, memory=3 << 20) as (server, first):
            with connected(server) as second:
                for client in (first, second):
                    await client.go()
                    await client.send(client.request(c.CMD_WRITE, 0, cookie=1, payload=bytes(2 << 20)))
                    assert [reply[2:4] for reply in await client.replies(1)] == [(1, 0)]

    asyncio.run(main())


def test_a_client_that_gets_no_memory_for_long_is_cut_off() -> None:
    async def main() -> None:
        storage, events = Storage(8 << 20), []
        async with served(storage, memory=3 << 20, events=events, limits=Limits(handshake=0.5)) as (server, first):
            with connected(server) as second:
                for client in (first, second):
                    await client.go()
                storage.hold = True
                head = first.request(c.CMD_WRITE, 0, cookie=1, payload=bytes(2 << 20))
                await first.send(head)
                await until(lambda: storage.waiting)
                await second.send(head[:100_000])
                await second.rest()
                assert isinstance(events[-1].error, MemoryError)
                storage.release()

    asyncio.run(main())


@pytest.mark.parametrize(("type", "flags", "length"), [
    (c.CMD_BLOCK_STATUS, 0, 4096), (c.CMD_BLOCK_STATUS, c.CMD_FLAG_REQ_ONE, 4096), (c.CMD_TRIM, 0, 1 << 40)])
def test_of_all_clients_together_one_expensive_request_is_made_in_each_turn_of_the_loop(
    type: int, flags: int, length: int
) -> None:
    async def main() -> None:
        storage = Storage()
        storage.length = 1 << 40
        async with served(storage) as (server, first), AsyncExitStack() as stack:
            clients = [first, *(stack.enter_context(connected(server)) for _ in range(3))]
            for client in clients:
                await client.go(extended=True, contexts=["base:allocation"])
            storage.calls.clear()
            for client in clients:
                client.sock.send(b"".join(client.request(type, 0, length, flags, n) for n in range(5)))
            clients[3].sock.close()  # who goes away leaves the turn to others
            made = 0
            async with asyncio.timeout(TIMEOUT):
                while made < 15:
                    await asyncio.sleep(0)
                    assert len(storage.calls) <= made + 1
                    made = len(storage.calls)
            for client in clients[:3]:
                assert [reply[2] for reply in await client.replies(5)] == [0, 1, 2, 3, 4]

    asyncio.run(main())


def test_stop_answers_what_was_received_then_closes() -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (server, client):
            await client.go(structured=False)
            storage.hold = True
            await client.send(client.request(c.CMD_WRITE, 0, cookie=5, payload=b"x"))
            await until(lambda: storage.waiting)
            stopping = asyncio.ensure_future(server.stop())
            await asyncio.sleep(0)
            assert not stopping.done()
            storage.release()
            assert await client.rest() == struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 5)
            await stopping
            assert not server.connections

    asyncio.run(main())


@form
def test_what_comes_while_a_stopping_server_waits_is_answered_with_eshutdown(form: dict[str, bool]) -> None:
    async def main() -> None:
        storage = Storage()
        async with served(storage) as (server, client):
            await client.go(**form)
            storage.hold = True
            await client.send(client.request(c.CMD_WRITE, 0, cookie=5, payload=b"x"))
            await until(lambda: storage.waiting)
            stopping = asyncio.ensure_future(server.stop())
            await asyncio.sleep(0)
            calls = len(storage.calls)
            for type in (c.CMD_READ, c.CMD_WRITE, c.CMD_FLUSH):
                payload = b"y" * 5000 if type == c.CMD_WRITE else b""
                reply = await client.ask(type, 0, 0 if type == c.CMD_FLUSH else 5000, cookie=6, payload=payload)
                assert error_of(reply) == c.ESHUTDOWN
            assert len(storage.calls) == calls
            storage.release()
            [(kind, _, cookie, error, data)] = await client.replies(1)
            assert (cookie, error_of([(kind, error, data)])) == (5, 0)
            assert await client.rest() == b""
            await stopping

    asyncio.run(main())


def test_a_client_in_the_handshake_is_told_that_the_server_is_shutting_down() -> None:
    async def main() -> None:
        async with served(Storage()) as (server, client):
            await client.greet()
            stopping = asyncio.ensure_future(server.stop())
            await asyncio.sleep(0)
            assert await client.option(c.OPT_LIST) == [(c.REP_ERR_SHUTDOWN, b"the server is shutting down")]
            assert await client.rest() == b""
            await stopping

    asyncio.run(main())


def test_a_silent_client_in_the_handshake_holds_no_stop_up() -> None:
    async def main() -> None:
        async with served(Storage()) as (server, client):
            await client.greet()
            async with asyncio.timeout(5):
                await server.stop()
            assert not server.connections

    asyncio.run(main())


def test_stop_cuts_off_after_its_deadline() -> None:
    async def main() -> None:
        storage, events = Storage(), []
        async with served(storage, events=events) as (server, client):
            await client.go()
            storage.hold = True
            await client.send(client.request(c.CMD_FLUSH))
            await until(lambda: storage.waiting)
            await server.stop(0.01)
            assert isinstance(events[-1].error, TimeoutError)
            storage.release()

    asyncio.run(main())


# --- listeners ---

async def connect(address: Any, family: int = socket.AF_INET) -> Client:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, address)
    return Client(sock)


def test_several_listeners_serve_the_same_exports(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server()
        server.add(Export("disk", Storage()))
        ((host, port),) = await server.start_tcp("127.0.0.1", 0)
        await server.start_unix(tmp_path / "a.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "b.sock"))
        listener.listen()
        server.start_fd(listener.detach())
        for client in (await connect((host, port)), await connect(str(tmp_path / "a.sock"), socket.AF_UNIX),
                       await connect(str(tmp_path / "b.sock"), socket.AF_UNIX)):
            await client.go("disk")
            assert error_of(await client.ask(c.CMD_READ, 0, 10)) == 0
            client.sock.close()
        await server.stop()
        assert not (tmp_path / "a.sock").exists()

    asyncio.run(main())


def test_all_addresses_of_ipv6_are_open_to_ipv4_as_well() -> None:
    async def main() -> None:
        server = Server()
        server.add(Export("disk", Storage()))
        try:
            ((_, port),) = await server.start_tcp("::", 0)
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
        client = await connect(("127.0.0.1", port))
        await client.go("disk")
        client.sock.close()
        await server.stop()

    asyncio.run(main())


def test_without_a_host_both_families_listen_on_one_port() -> None:
    async def main() -> None:
        server = Server()
        server.add(Export("disk", Storage()))
        addresses = await server.start_tcp(None, 0)
        assert len({port for _, port in addresses}) == 1
        client = await connect(("127.0.0.1", addresses[0][1]))
        await client.go("disk")
        client.sock.close()
        await server.stop()

    asyncio.run(main())


def test_where_it_cannot_listen_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server()
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "none" / "s", tmp_path / ("x" * 200)):
            with pytest.raises(OSError, match=path.name):
                await server.start_unix(path)
        with pytest.raises(OSError, match=r"192\.0\.2\.1"):
            await server.start_tcp("192.0.2.1", 0)
        with pytest.raises(OSError, match=r"a\.\.b"):
            await server.start_tcp("a..b", 0)
        await server.stop()
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    asyncio.run(main())


def test_a_stale_socket_file_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        server, other = Server(), Server()
        await server.start_unix(path)
        with pytest.raises(OSError, match="in use"):
            await other.start_unix(path)
        await server.stop()

    asyncio.run(main())


def test_connections_beyond_the_limit_are_refused_until_one_leaves(tmp_path: Path) -> None:
    async def main() -> None:
        events: list[ClientEvent] = []
        server = Server(max_connections=1, on_client=events.append)
        server.add(Export("", Storage()))
        path = str(tmp_path / "s")
        await server.start_unix(path)
        first = await connect(path, socket.AF_UNIX)
        await first.go()
        second = await connect(path, socket.AF_UNIX)
        assert await second.rest() == b""
        assert [event.what for event in events] == ["connected", "ready", "refused"]
        first.sock.close()
        await until(lambda: events[-1].what == "gone")
        third = await connect(path, socket.AF_UNIX)
        await third.go()
        for client in (second, third):
            client.sock.close()
        await server.stop()

    asyncio.run(main())


def test_passed_sockets_are_taken_only_by_the_process_they_are_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert passed_sockets() == []
    assert "LISTEN_FDS" not in os.environ


def test_a_descriptor_that_does_not_listen_is_refused() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, pytest.raises(OptionError, match="listens"):
            Server().start_fd(theirs.detach())

    asyncio.run(main())
