"""Counters of a disk's users: exact counts, failures apart from refusals, and one account for all users of a node."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep import drivers  # noqa: F401  registers them
from blockstep.block.accounting import SAMPLE, Account, CountedBackend
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE, Permission
from tests.scenarios import scenario

MiB = 1 << 20


@asynccontextmanager
async def counted(taken: Permission = READ | WRITE) -> AsyncIterator[tuple[Graph, Backend, Account, Any]]:
    """A user of a blkdebug node, its account, and the node."""
    graph = Graph()
    node: Any = await graph.open({"driver": "blkdebug", "node-name": "disk",
                                  "file": {"driver": "memory", "size": MiB}})
    user = graph.accounts.attach(node, "user", taken)
    account = graph.accounts.of(node)
    assert account is not None
    yield graph, user, account, node
    await graph.detach_backend(user)
    assert graph.accounts.of(node) is account
    await graph.close(node)
    assert graph.accounts.of(node) is None


@scenario
async def test_counts_and_bytes_are_exact() -> None:
    async with counted() as (_, user, account, _):
        for _ in range(3):
            await user.pwrite(4096, b"x" * 100)
        await user.write_zeroes(8192, 4096)
        assert bytes(await user.pread(4096, 100)) == b"x" * 100
        await user.discard(0, 512)
        await user.flush()
        assert (account.write.operations, account.write.bytes) == (4, 4396)
        assert (account.read.operations, account.read.bytes) == (1, 100)
        assert (account.unmap.operations, account.unmap.bytes) == (1, 512)
        assert (account.flush.operations, account.flush.bytes) == (1, 0)
        assert account.highest == 12288
        assert account.write.nanoseconds > 0


@scenario
async def test_requests_that_end_at_once_are_counted_as_exactly(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MiB))
    graph = Graph()
    node = await graph.open({"driver": "file", "node-name": "disk", "filename": str(tmp_path / "disk")})
    user = graph.accounts.attach(node, "user", READ | WRITE)
    account = graph.accounts.of(node)
    assert account is not None
    for number in range(3 * SAMPLE + 1):
        writing = user.begin_write(number * 4096, b"x" * 100)
        if writing is not None:
            await writing
        found = user.begin_read(number * 4096, 50)
        assert bytes(found if isinstance(found, bytes | bytearray) else await found) == b"x" * 50  # type: ignore[misc]
    assert (account.write.operations, account.write.bytes) == (3 * SAMPLE + 1, (3 * SAMPLE + 1) * 100)
    assert (account.read.operations, account.read.bytes) == (3 * SAMPLE + 1, (3 * SAMPLE + 1) * 50)
    assert account.highest == 3 * SAMPLE * 4096 + 100
    assert account.read.nanoseconds > 0
    await graph.detach_backend(user)
    await graph.close(node)


def test_a_new_kind_of_request_is_not_forgotten() -> None:
    requests = {name for name, method in vars(Backend).items() if not name.startswith("_")
                and (inspect.iscoroutinefunction(method) or name.startswith("begin_"))}
    assert requests - vars(CountedBackend).keys() == {"block_status", "truncate", "idle"}


@scenario
async def test_time_is_taken_of_every_sixteenth_request() -> None:
    async with counted() as (_, user, account, _):
        await user.pread(0, 512)
        first = account.read.nanoseconds
        assert first > 0
        for _ in range(SAMPLE - 1):
            await user.pread(0, 512)
        assert account.read.nanoseconds == first
        await user.pread(0, 512)
        assert account.read.nanoseconds > first


@scenario
async def test_a_failure_is_counted_apart_and_told() -> None:
    async with counted() as (_, user, account, node):
        told: list[str] = []
        account.on_error = lambda user, operation, error: told.append(operation)
        for event in ("read", "write", "write_zeroes", "discard", "flush"):
            node.fail(event)
        for request in (user.pread(0, 1), user.pwrite(0, b"x"), user.write_zeroes(0, 1), user.discard(0, 1),
                        user.flush()):
            with pytest.raises(OSError, match="injected"):
                await request
        assert told == ["read", "write", "write", "unmap", "flush"]
        tallies = (account.read, account.write, account.unmap, account.flush)
        assert [tally.failed for tally in tallies] == [1, 2, 1, 1]
        assert [tally.operations for tally in tallies] == [0, 0, 0, 0]
        assert not user.in_flight


@scenario
async def test_a_request_that_makes_no_sense_is_no_failure() -> None:
    async with counted(READ) as (_, user, account, _):
        for request in (user.pread(MiB, 1), user.pread(-1, 1), user.pwrite(0, b"x"), user.discard(0, 1)):
            with pytest.raises(OSError):
                await request
        assert bytes(await user.pread(0, 0)) == b""
        assert (account.read.invalid, account.write.invalid, account.unmap.invalid) == (2, 1, 1)
        assert not account.read.failed + account.write.failed + account.unmap.failed + account.read.operations


@scenario
async def test_users_that_come_and_go_share_the_account() -> None:
    async with counted() as (graph, user, account, node):
        await user.pread(0, 1)
        other = graph.accounts.attach(node, "other", READ)
        await other.pread(0, 1)
        await graph.detach_backend(other)
        plain = graph.attach_backend(node, "job", READ)
        await plain.pread(0, 1)
        await graph.detach_backend(plain)
        assert account.read.operations == 2


@scenario
async def test_a_counted_user_is_drained_as_others_are() -> None:
    async with counted() as (graph, user, account, node):
        node.suspend("read", "here")
        reading = user.pread(0, 1)
        waits_for = reading.send(None)
        assert user.in_flight == 1
        node.resume("here")
        assert waits_for.done()
        with pytest.raises(StopIteration):
            reading.send(None)
        async with graph.drained(node):
            held = user.pwrite(0, b"x")
            held.send(None)
            assert not user.in_flight
        with pytest.raises(StopIteration):
            held.send(None)
        assert (account.read.operations, account.write.operations) == (1, 1)


@scenario
async def test_users_take_their_account_along_when_their_disk_becomes_another_node() -> None:
    graph = Graph()
    events: list[dict[str, Any]] = []
    graph.listeners.append(lambda name, data: events.append(data))
    old = await graph.open({"driver": "null", "node-name": "old", "size": MiB})
    new: Any = await graph.open({"driver": "blkdebug", "node-name": "new", "file": {"driver": "null", "size": MiB}})
    user = graph.accounts.attach(old, "user", READ | WRITE)
    await user.pread(0, 1)
    account = graph.accounts.of(old)
    top = await graph.insert_filter({"driver": "blkdebug", "file": "old"}, old)
    assert graph.accounts.of(old) is account  # a job's filter is not the disk
    async with graph.drained(old):
        with graph.change() as change:
            change.replace(top, new)
    await graph.close_unused(top)
    assert graph.accounts.of(new) is account
    assert graph.accounts.of(old) is None
    other = graph.accounts.attach(new, "other", READ)
    await other.pread(0, 1)
    new.fail("read", once=True)
    with pytest.raises(OSError, match="injected"):
        await other.pread(0, 1)
    assert events[-1]["device"] == "new"
    await graph.detach_backend(user)
    await graph.detach_backend(other)
    await graph.close(old)
    assert graph.accounts.of(new) is account
    assert account is not None
    assert account.read.operations == 2
    await graph.close(new)
