"""The data half of the graph: the border through which all requests enter.

A `Backend` is a user of a node: an export, a job, a guest's device. It is the only door into the graph, so what
must hold for every request is checked here, once: the range lies inside the node, the flags are known, the right
to do it was taken. Below the border drivers trust their input.

It is also where requests can be held back. Draining a node means: pause all Backends from which a request can
reach it, and wait until what they have in flight is done. See `blockstep.block.graph.Graph.drained`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Coroutine
from types import CoroutineType
from typing import Any, TypeVar

from blockstep.aio.inline import Completion
from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Buffer, Driver, Extent
from blockstep.block.node import Child
from blockstep.block.permissions import RESIZE, WRITE, WRITE_UNCHANGED, Permission, Role
from blockstep.block.status import status_through

T = TypeVar("T")


class Backend:
    """A user of a node. Made by `Graph.attach_backend`, given up with `Graph.detach_backend`.

    All operations may be called from any number of strands or tasks at a time. They raise OSError: EINVAL for a
    range outside the node, EPERM for what was not taken, ENOSPC for a write beyond the end, or whatever the
    driver met. While the node is drained they wait.
    """

    __slots__ = ("_gone", "_idle", "_paused", "_resumed", "_revoked", "edge", "in_flight", "name", "on_revoke")

    def __init__(self, name: str, node: Driver, taken: Permission, shared: Permission) -> None:
        self.name = name
        self.edge = Child(self, "root", Role.FILTERED, node, taken, shared)
        #: Requests that have passed the border and not ended yet.
        self.in_flight = 0
        self._paused = 0
        self._gone = False
        self._resumed: list[Completion[None]] = []
        self._idle: list[Completion[None]] = []
        self._revoked: str | None = None
        #: Called by `revoke`: an export drops its clients.
        self.on_revoke: Callable[[str], None] = lambda reason: None

    @property
    def description(self) -> str:
        return self.name

    @property
    def node(self) -> Driver:
        """The node that it uses; a graph change may have put another one there."""
        return self.edge.node

    @property
    def length(self) -> int:
        """The node's length in bytes, now."""
        return self.edge.node.length

    @property
    def read_only(self) -> bool:
        """Whether writes are refused here."""
        return not self.edge.may_change

    # --- requests ---

    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes from ``offset`` on."""
        if self._paused:
            await self._wait()
        if offset < 0 or length < 0 or offset + length > self.edge.node.length:
            raise _outside(offset, length, self.edge.node.length)
        if not length:
            return b""
        return await self._counted(self.edge.pread(offset, length))

    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]:
        """`pread` for those who count, see `Driver.begin_read`. A coroutine must be begun at once."""
        edge = self.edge
        if self._paused or offset < 0 or length <= 0 or offset + length > edge.node.length:
            return Backend.pread(self, offset, length)
        found = edge.begin_read(offset, length)
        return self._counted(found) if found.__class__ is CoroutineType else found

    def begin_write(self, offset: int, data: Buffer) -> Coroutine[Any, Any, None] | Completion[None] | None:
        """`pwrite` in the same way. A `Completion` needs nobody who awaits it; it may be watched instead."""
        edge = self.edge
        if (self._paused or not edge.may_write or offset < 0 or not data or offset + len(data) > edge.node.length):
            return Backend.pwrite(self, offset, data)
        writing = edge.begin_write(offset, data)
        if writing is None:
            return None
        if isinstance(writing, Completion):
            self.in_flight += 1
            writing.watch(self._ended)
            return writing
        return self._counted(writing)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        """Write all of ``data``, which must stay as it is until the end. ``flags``: FUA."""
        if self._paused:
            await self._wait()
        length = len(data)
        if offset < 0 or offset + length > self.edge.node.length:
            raise _outside(offset, length, self.edge.node.length, errno.ENOSPC)
        if not self.edge.may_write or flags & ~FUA:
            raise self._refused(flags & ~FUA)
        if not length:
            return
        await self._counted(self.edge.pwrite(offset, data, flags))

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes. ``flags``: FUA, MAY_UNMAP, FAST."""
        if self._paused:
            await self._wait()
        if offset < 0 or length < 0 or offset + length > self.edge.node.length:
            raise _outside(offset, length, self.edge.node.length, errno.ENOSPC)
        if not self.edge.may_write or flags & ~(FUA | MAY_UNMAP | FAST):
            raise self._refused(flags & ~(FUA | MAY_UNMAP | FAST))
        if length:
            await self._counted(self.edge.write_zeroes(offset, length, flags))

    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is not needed any more."""
        if self._paused:
            await self._wait()
        if offset < 0 or length < 0 or offset + length > self.edge.node.length:
            raise _outside(offset, length, self.edge.node.length)
        if not self.edge.may_change:
            raise self._refused(0)
        if length:
            await self._counted(self.edge.discard(offset, length))

    async def flush(self) -> None:
        """Make all writes that have ended durable."""
        if self._paused:
            await self._wait()
        await self._counted(self.edge.flush())

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """The range through all layers, as extents whose ``depth`` counts the layers (0: nobody holds it)."""
        if self._paused:
            await self._wait()
        if offset < 0 or length < 0 or offset + length > self.edge.node.length:
            raise _outside(offset, length, self.edge.node.length)
        if not length:
            return []
        return await self._counted(status_through(self.edge.node, offset, length))

    async def truncate(self, length: int) -> None:
        """Change the node's length."""
        if self._paused:
            await self._wait()
        if not self.edge.taken & RESIZE:
            raise self._refused(0)
        await self._counted(self.edge.resize(length))

    # --- revocation ---

    def revoke(self, reason: str) -> None:
        """Take the right to write away, now and for good: a stale primary must not write into its successor.

        Writes that come from here on, or that were held back, fail with ESHUTDOWN; those in flight end first.
        """
        self._revoked = reason
        self.edge.taken &= ~(WRITE | WRITE_UNCHANGED | RESIZE)
        self.on_revoke(reason)

    # --- drain ---

    def pause(self) -> None:
        """Hold back new requests. Calls nest. Does not wait: see `idle`."""
        self._paused += 1

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            waiter: Completion[None] = Completion()
            self._idle.append(waiter)
            await waiter

    def resume(self) -> None:
        """Undo one `pause`; the last one lets the held requests go on, in their order."""
        self._paused -= 1
        if not self._paused:
            self._let_go_on()

    def forget_held(self) -> None:
        """The user goes: what is held back, or comes while it would be, fails with ESHUTDOWN."""
        self._gone = True
        self._let_go_on()

    def _let_go_on(self) -> None:
        waiting, self._resumed = self._resumed, []
        for waiter in waiting:
            waiter.set_result(None)

    async def _wait(self) -> None:
        while self._paused:
            self._must_be_there()
            waiter: Completion[None] = Completion()
            self._resumed.append(waiter)
            await waiter

    def _must_be_there(self) -> None:
        if self._gone:
            raise OSError(errno.ESHUTDOWN, f"{os.strerror(errno.ESHUTDOWN)}: '{self.name}' has been detached")

    async def _counted(self, request: Awaitable[T]) -> T:
        self.in_flight += 1
        try:
            return await request
        finally:
            self.in_flight -= 1
            if self._idle:
                self._wake_idle()

    def _ended(self, _value: object, _error: BaseException | None) -> None:
        self.in_flight -= 1
        if self._idle:
            self._wake_idle()

    def _wake_idle(self) -> None:
        if not self.in_flight:
            waiting, self._idle = self._idle, []
            for waiter in waiting:
                waiter.set_result(None)

    def _refused(self, unknown_flags: int) -> OSError:
        if unknown_flags:
            return OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: unknown request flags {unknown_flags:#x}")
        if self._revoked:
            return OSError(errno.ESHUTDOWN, f"{os.strerror(errno.ESHUTDOWN)}: {self._revoked}")
        return OSError(errno.EPERM, f"{os.strerror(errno.EPERM)}: '{self.name}' is read-only")


async def enter(*backends: Backend) -> None:
    """Begin one piece of work that is several requests, through ``backends`` together; then use their edges.

    Until `leave` the work counts as in flight in all of them, so a drain waits for its end as a whole. Waits while
    any of them is drained, and holds none of them meanwhile. Raises OSError (ESHUTDOWN) if one has been detached.
    """
    while True:
        for backend in backends:
            backend._must_be_there()
            if backend._paused:
                await backend._wait()
                break
        else:
            break
    for backend in backends:
        backend.in_flight += 1


def leave(*backends: Backend) -> None:
    """The end of the work that began with `enter`."""
    for backend in backends:
        backend.in_flight -= 1
        if backend._idle:
            backend._wake_idle()


def _outside(offset: int, length: int, size: int, code: int = errno.EINVAL) -> OSError:
    return OSError(code, f"{os.strerror(code)}: {length} bytes at {offset} are not inside {size} bytes")
