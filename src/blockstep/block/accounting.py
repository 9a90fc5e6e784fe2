"""What the users of a disk have asked of it: how often, how much, how long it took, and what failed.

A `CountedBackend` is a `Backend` that keeps an `Account`. Guests' users are such; jobs are not, nor is anything in a
program that shows no counters. All users of one disk share its account, also those that are gone; they take it along
when the graph puts another node under them: `Accounts`.

Counts and bytes are exact. Time is not taken for each request, as that would cost more than all the rest: it is
taken for each 16th of its kind, and counts 16-fold. Added to a request: 60 ns (the counts 40, the time 15 on average).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from time import perf_counter_ns
from types import CoroutineType
from typing import Any, Final, Literal, TypeVar

from blockstep.block.driver import Buffer, Driver
from blockstep.block.io import Backend
from blockstep.block.permissions import ALL, READ, Permission

#: Requests for one whose time is taken; a power of two.
SAMPLE: Final = 16

#: How a request is refused that should not have been made: no fault of the disk.
_REFUSALS: Final = {errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.ESHUTDOWN}

Operation = Literal["read", "write", "flush", "unmap"]
T = TypeVar("T")


class Tally:
    """The requests of one kind. ``nanoseconds`` is their time in all, as far as it is known."""

    __slots__ = ("bytes", "failed", "invalid", "nanoseconds", "operations")

    def __init__(self) -> None:
        self.operations = self.bytes = self.nanoseconds = self.failed = self.invalid = 0


class Account:
    """The counters of one disk. ``highest`` is the end of the write that went furthest, in bytes."""

    __slots__ = ("flush", "highest", "on_error", "read", "unmap", "write")

    def __init__(self) -> None:
        self.read, self.write, self.flush, self.unmap = Tally(), Tally(), Tally(), Tally()
        self.highest = 0
        #: Called with each request that failed: whose it was, what it was, and why.
        self.on_error: Callable[[Backend, Operation, OSError], None] = lambda user, operation, error: None


class CountedBackend(Backend):
    """See the module. Zeroes count as writes, discards as unmap."""

    __slots__ = ("account",)

    def __init__(self, name: str, node: Driver, taken: Permission, shared: Permission, account: Account) -> None:
        super().__init__(name, node, taken, shared)
        self.account = account

    # The hot path. A sixteenth goes the long way, where time is taken.

    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]:
        tally = self.account.read
        if not length or not tally.operations & (SAMPLE - 1):
            return self.pread(offset, length)
        try:
            found = super().begin_read(offset, length)
        except OSError as error:
            self._failed(tally, "read", error)
            raise
        if found.__class__ is CoroutineType:
            return self._count("read", tally, found, length, SAMPLE)
        tally.operations += 1
        tally.bytes += length
        return found

    def begin_write(self, offset: int, data: Buffer) -> Coroutine[Any, Any, None] | None:
        account = self.account
        tally = account.write
        if not data or not tally.operations & (SAMPLE - 1):
            return self.pwrite(offset, data)
        try:
            writing = super().begin_write(offset, data)
        except OSError as error:
            self._failed(tally, "write", error)
            raise
        if writing is not None:
            return self._count_write(writing, offset, len(data))
        tally.operations += 1
        tally.bytes += len(data)
        if offset + len(data) > account.highest:
            account.highest = offset + len(data)
        return None

    async def pread(self, offset: int, length: int) -> Buffer:
        if not length:
            return b""
        return await self._count("read", self.account.read, super().pread(offset, length), length, SAMPLE)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        if length := len(data):
            await self._count_write(super().pwrite(offset, data, flags), offset, length)

    async def _count_write(self, writing: Awaitable[None], offset: int, length: int) -> None:
        await self._count("write", self.account.write, writing, length, SAMPLE)
        self.account.highest = max(self.account.highest, offset + length)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._count("write", self.account.write, super().write_zeroes(offset, length, flags), length)
        self.account.highest = max(self.account.highest, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        await self._count("unmap", self.account.unmap, super().discard(offset, length), length)

    async def flush(self) -> None:
        await self._count("flush", self.account.flush, super().flush(), 0)

    async def _count(self, operation: Operation, tally: Tally, request: Awaitable[T], length: int,
                     one_in: int = 1) -> T:
        """Do a request and count it. Time is taken of one in ``one_in``."""
        began = 0 if tally.operations & (one_in - 1) else perf_counter_ns()
        try:
            result = await request
        except OSError as error:
            if error.errno in _REFUSALS:
                tally.invalid += 1
            else:
                self._failed(tally, operation, error)
            raise
        tally.operations += 1
        tally.bytes += length
        if began:
            tally.nanoseconds += (perf_counter_ns() - began) * one_in
        return result

    def _failed(self, tally: Tally, operation: Operation, error: OSError) -> None:
        tally.failed += 1
        self.account.on_error(self, operation, error)


class Accounts:
    """The counted users of a graph, what was counted of each disk, and which of them are sent through a filter first.

    ``attach`` lets a user in (`Graph.attach`), ``report`` takes the event of a request that failed.
    """

    def __init__(self, attach: Callable[[Backend], None], report: Callable[[str, dict[str, Any]], None]) -> None:
        self._attach, self._report = attach, report
        self._users: list[CountedBackend] = []
        # By the names of disks; of users that are gone as well.
        self._accounts: dict[str, Account] = {}
        #: Filters that counted users of a disk are sent through; see `entrance`.
        self.entrances: list[Driver] = []
        #: Held by who changes these: one at a time.
        self.turn = asyncio.Lock()

    def attach(self, node: Driver, name: str, taken: Permission = READ, shared: Permission = ALL) -> Backend:
        """As `Graph.attach_backend`, for users whose requests are counted (`of`) and limited (`entrances`)."""
        account = self.of(node)
        if account is None:
            account = Account()
            account.on_error = self._io_error
        user = CountedBackend(name, self.entrance(node) or node, taken, shared, account)
        self._attach(user)
        self._users.append(user)
        self._accounts[node.name] = account
        return user

    def of(self, node: Driver) -> Account | None:
        """What is counted for a disk: of those who use it now, or else of those who did so last."""
        for user in self.users(node):
            return user.account
        account = self._accounts.get(node.name)
        return None if account in [user.account for user in self._users] else account  # they have moved on

    def users(self, node: Driver) -> list[CountedBackend]:
        """Those who use a disk now."""
        return [user for user in self._users if self.disk(user.node) is node]

    def entrance(self, node: Driver) -> Driver | None:
        """The filter that users of a disk are sent through, if there is one."""
        return next((entrance for entrance in self.entrances if self.disk(entrance) is node), None)

    def user_leaves(self, user: Backend) -> None:
        """Any user of the graph goes; the account of a counted one stays with the disk that it used last."""
        if isinstance(user, CountedBackend) and user in self._users:
            self._users.remove(user)
            if user.account not in [other.account for other in self._users]:
                self._accounts = {name: each for name, each in self._accounts.items() if each is not user.account}
                self._accounts[self.disk(user.node).name] = user.account

    def node_closed(self, node: Driver) -> None:
        """A node is gone; its name may come again."""
        self._accounts.pop(node.name, None)
        self.entrances = [entrance for entrance in self.entrances if entrance is not node]

    def disk(self, node: Driver) -> Driver:
        """The disk of one who uses ``node``: that, or what is below filters that jobs and limits have put before it."""
        for each in node.chain():
            if not is_inserted(each):
                break
        return each

    def _io_error(self, user: Backend, operation: Operation, error: OSError) -> None:
        name = self.disk(user.node).name
        self._report("BLOCK_IO_ERROR", {
            "device": name, "node-name": name, "operation": "read" if operation == "read" else "write",
            "action": "report", "nospace": error.errno == errno.ENOSPC, "reason": error.strerror or str(error)})


def is_inserted(node: Driver) -> bool:
    """Whether it is a filter that a job, which lets nobody else touch it, or limits have put before a disk."""
    return node.is_filter and (not node.owned or node.options.node_name is None or "*" in node.blockers)
