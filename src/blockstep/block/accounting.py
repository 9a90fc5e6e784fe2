"""What the users of a disk have asked of it: how often, how much, how long it took, and what failed.

A `CountedBackend` is a `Backend` that keeps an `Account`. Guests' users are such; jobs are not, nor is anything in a
program that shows no counters. All users of one disk share its account, also those that are gone; they take it along
when the graph puts another node under them. See `Graph.account_of`.

Counts and bytes are exact. Time is not taken for each request, as that would cost more than all the rest: it is
taken for each 16th of its kind, and counts 16-fold. Added to a request: 60 ns (the counts 40, the time 15 on average).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Final, Literal

from blockstep.block.driver import FUA, Buffer, Driver
from blockstep.block.io import Backend
from blockstep.block.permissions import Permission

#: Requests for one whose time is taken; a power of two.
SAMPLE: Final = 16

#: How a request is refused that should not have been made: no fault of the disk.
_REFUSALS: Final = {errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.ESHUTDOWN}

Operation = Literal["read", "write", "flush", "unmap"]


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

    # The two that are asked for most are `Backend`'s, spelled out once more: a call of them would cost as much again.

    async def pread(self, offset: int, length: int) -> Buffer:
        tally = self.account.read
        began = 0 if tally.operations & (SAMPLE - 1) else perf_counter_ns()
        if self._paused:
            await self._wait()
        if offset < 0 or length <= 0 or offset + length > self.edge.node.length:
            tally.invalid += length != 0
            return await super().pread(offset, length)  # which says what is wrong
        self.in_flight += 1
        try:
            data = await self.edge.pread(offset, length)
        except OSError as error:
            self._failed(tally, "read", error)
            raise
        finally:
            self.in_flight -= 1
            if self._idle:
                self._wake_idle()
        tally.operations += 1
        tally.bytes += length
        if began:
            tally.nanoseconds += (perf_counter_ns() - began) * SAMPLE
        return data

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        account = self.account
        tally = account.write
        began = 0 if tally.operations & (SAMPLE - 1) else perf_counter_ns()
        if self._paused:
            await self._wait()
        edge, length = self.edge, len(data)
        end = offset + length
        if offset < 0 or not length or end > edge.node.length or not edge.may_write or flags & ~FUA:
            tally.invalid += length != 0
            await super().pwrite(offset, data, flags)  # as above
            return
        self.in_flight += 1
        try:
            await edge.pwrite(offset, data, flags)
        except OSError as error:
            self._failed(tally, "write", error)
            raise
        finally:
            self.in_flight -= 1
            if self._idle:
                self._wake_idle()
        tally.operations += 1
        tally.bytes += length
        if end > account.highest:
            account.highest = end
        if began:
            tally.nanoseconds += (perf_counter_ns() - began) * SAMPLE

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._count("write", self.account.write, super().write_zeroes(offset, length, flags), length)
        self.account.highest = max(self.account.highest, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        await self._count("unmap", self.account.unmap, super().discard(offset, length), length)

    async def flush(self) -> None:
        await self._count("flush", self.account.flush, super().flush(), 0)

    async def _count(self, operation: Operation, tally: Tally, request: Awaitable[None], length: int) -> None:
        """One of the rarer requests: the time of each is taken."""
        began = perf_counter_ns()
        try:
            await request
        except OSError as error:
            if error.errno in _REFUSALS:
                tally.invalid += 1
            else:
                self._failed(tally, operation, error)
            raise
        tally.operations += 1
        tally.bytes += length
        tally.nanoseconds += perf_counter_ns() - began

    def _failed(self, tally: Tally, operation: Operation, error: OSError) -> None:
        tally.failed += 1
        self.account.on_error(self, operation, error)
