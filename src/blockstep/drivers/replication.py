"""Driver ``replication``: the filter where the two ends of a replicated disk meet its block graph.

    mode=primary                                  mode=secondary

    quorum (fifo)                                 the standby's view
     ├── primary disk                                  │
     └── replication ──file──► nbd client          replication ──file──► active ──► hidden ──► secondary disk
                                                       └─ buffer: keeps active and hidden

It never alters data. In primary mode it forwards writes and swallows their errors, so that a lost standby never
fails the guest; in secondary mode it is the view of the last checkpoint. What a request gets depends on the stage:

    stage            primary   secondary
    none             EIO       EIO                 not started
    running          go on     go on               replicating
    failover         EIO       go on               the failover commit runs
    failover-failed  EIO       reads go on;        that commit failed: writes go where the data is
                               writes split
    done             EIO       go on               stopped, or failed over

("go on" in primary mode: a read still gets EIO, quorum reads the primary disk.)

The filter decides nothing by itself: `blockstep.replication` moves it from stage to stage. It talks to what keeps
the checkpoint through the small interface `DiskBuffer` and never to the hidden disk itself.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Awaitable, Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import FAST, Buffer, Driver, Extent, Filter, Prepared
from blockstep.block.node import Child, NodeOptions, NodeRef
from blockstep.block.permissions import DATA, READ, Permission, Role
from blockstep.block.registry import register
from blockstep.errors import OptionError

Mode = Literal["primary", "secondary"]
#: Sends the piece of a write at (offset, length) to a node.
Send = Callable[[Driver | Child, int, int], Awaitable[None]]


class Stage(enum.Enum):
    """Where a filter stands; see the module."""

    NONE = "none"
    RUNNING = "running"
    FAILOVER = "failover"
    FAILOVER_FAILED = "failover-failed"
    DONE = "done"


class _Answer(enum.Enum):
    REFUSE = enum.auto()
    GO_ON = enum.auto()
    SPLIT = enum.auto()


class _Row(NamedTuple):
    reads: _Answer
    writes: _Answer


_REFUSED = _Row(_Answer.REFUSE, _Answer.REFUSE)
_OPEN = _Row(_Answer.GO_ON, _Answer.GO_ON)

#: What a request gets. Walked by the tests.
ANSWERS: dict[tuple[Mode, Stage], _Row] = {
    ("primary", Stage.NONE): _REFUSED,
    ("primary", Stage.RUNNING): _Row(_Answer.REFUSE, _Answer.GO_ON),
    ("primary", Stage.FAILOVER): _REFUSED,
    ("primary", Stage.FAILOVER_FAILED): _REFUSED,
    ("primary", Stage.DONE): _REFUSED,
    ("secondary", Stage.NONE): _REFUSED,
    ("secondary", Stage.RUNNING): _OPEN,
    ("secondary", Stage.FAILOVER): _OPEN,
    ("secondary", Stage.FAILOVER_FAILED): _Row(_Answer.GO_ON, _Answer.SPLIT),
    ("secondary", Stage.DONE): _OPEN,
}


class DiskBuffer(Protocol):
    """What keeps a checkpoint while the primary writes on. One of them may serve several filters.

    `blockstep.replication.hidden_disk` is the first; a journal of epochs is to be the second.
    """

    #: Taken shared by a request of the view over the bytes that it may read from the secondary disk.
    view_lock: RangeLock
    #: Requests of the view are widened to this many bytes when they take `view_lock` (copy-up of the active disk).
    view_alignment: int
    #: The disk that the primary writes to, and that the standby lives on from after a failover.
    secondary: Driver

    @property
    def entrance(self) -> Driver:
        """What the primary writes to, above `secondary`: here what it overwrites is kept."""

    @property
    def used(self) -> int:
        """Bytes kept since the last checkpoint, as far as they take room."""

    async def prepare_checkpoint(self) -> Prepared:
        """Get ready to move the view to what the primary wrote; `Prepared.commit` moves it. Nothing is in flight."""

    async def drop(self) -> None:
        """Stop; the view is what the primary wrote."""

    async def fail_over(self) -> None:
        """Stop; the view is the checkpoint and the standby's own writes. They are merged in the background.

        After a failure, of this call or of the merge: go on.
        """

    async def merged(self) -> None:
        """Wait until the merge after a failover has ended, one way or the other, and all is put back."""

    async def give_back(self) -> None:
        """Let go of the room of what is forgotten; later requests tell if that cannot be."""

    async def give_up(self) -> None:
        """Stop, and forget the checkpoint and the standby's own writes: all is as before the start.

        The filter does not run any more; what its view has in flight is waited for. Raises BlockstepError or OSError:
        the next start forgets what could not be forgotten.
        """

    async def close(self) -> None:
        """The filter is being closed: end whatever runs, and wait for it."""

    async def split(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """The range as runs of (length, whether the buffer holds it)."""

    async def view_is_written(self) -> bool:
        """Whether the standby itself has written into its view since the last checkpoint."""


class ReplicationOptions(NodeOptions, tag="replication"):
    """``mode``; ``top-id``: the node at the top of the standby's view (secondary mode only); ``file``."""

    mode: Mode
    file: NodeRef
    top_id: str | None = None


@register
class Replication(Filter):
    """See the module."""

    driver: ClassVar[str] = "replication"
    Options = ReplicationOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}
    options: ReplicationOptions
    buffer: DiskBuffer | None = None

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        # Below the view the primary writes, whatever a guest of the view puts up with: what it reads does not change.
        return super().child_permissions(child, taken | READ, shared | DATA)

    @property
    def read_lock(self) -> RangeLock | None:  # type: ignore[override]
        return self.buffer.view_lock if self.buffer else None

    async def open(self) -> None:
        self.mode: Mode = self.options.mode
        if self.mode == "secondary" and self.options.top_id is None:
            raise OptionError("top-id", None, "the node name of the standby's top node in mode=secondary")
        if self.mode == "primary" and self.options.top_id is not None:
            raise OptionError("top-id", self.options.top_id, "absent in mode=primary")
        #: Whether it was stopped with a failover: it takes part in later operations by ignoring them.
        self.failed_over = False
        #: The first I/O error since the start; see `blockstep.replication.registry`.
        self.error: OSError | None = None
        #: Called with each I/O error that the guest is not told of.
        self.on_error: Callable[[OSError], None] = lambda error: None
        self.enter(Stage.NONE)

    async def close(self) -> None:
        if self.buffer:
            await self.buffer.close()

    def enter(self, stage: Stage) -> None:
        """Move to ``stage``: the requests that come from now on get its answers."""
        self.stage = stage
        self._reads, self._writes = ANSWERS[self.mode, stage]

    def fail(self, error: OSError) -> None:
        """Remember an error that no guest is told of."""
        self.error = self.error or error
        self.on_error(error)

    # --- requests ---

    async def pread(self, offset: int, length: int) -> Buffer:
        if self._reads is _Answer.REFUSE:
            raise self._refused("read")
        if self.buffer is None:
            return await self.file.pread(offset, length)
        lock = self.buffer.view_lock
        end = offset + length
        token = lock.try_take(offset, end, True) or await lock.take(offset, end, True)
        try:
            return await self.file.pread(offset, length)
        finally:
            lock.give_back(token)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        if self._writes is _Answer.GO_ON and self.mode == "primary":  # the path of a running pair, spelled out
            try:
                await self.file.pwrite(offset, data, flags)
            except OSError as error:
                self.fail(error)
            return
        await self._write(offset, len(data), lambda to, at, count: to.pwrite(
            at, memoryview(data)[at - offset:at - offset + count], flags))

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if self.mode == "primary":
            flags &= ~FAST  # slow zeroes are no reason to lose the standby
        await self._write(offset, length, lambda to, at, count: to.write_zeroes(at, count, flags))

    async def discard(self, offset: int, length: int) -> None:
        await self._write(offset, length, lambda to, at, count: to.discard(at, count))

    async def flush(self) -> None:
        if self._writes is _Answer.REFUSE:
            raise self._refused("flush")
        if self.mode == "primary":
            await self._swallow(self.file.flush())
        else:
            await self.file.flush()
            if self._writes is _Answer.SPLIT and self.buffer:
                await self.buffer.secondary.flush()

    async def truncate(self, length: int) -> None:
        if self._writes is _Answer.REFUSE:
            raise self._refused("resize")
        await self.file.resize(length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        if self._reads is _Answer.REFUSE:
            raise self._refused("block status")
        return await self.file.block_status(offset, length)

    # --- how writes go on ---

    async def _write(self, offset: int, length: int, send: Send) -> None:
        if self._writes is _Answer.REFUSE:
            raise self._refused("write")
        if self.mode == "primary":
            await self._swallow(send(self.file, offset, length))
        elif self.buffer is None:
            await send(self.file, offset, length)
        else:
            await self._write_view(self.buffer, offset, length, send)

    async def _swallow(self, request: Awaitable[None]) -> None:
        try:
            await request
        except OSError as error:
            self.fail(error)

    async def _write_view(self, buffer: DiskBuffer, offset: int, length: int, send: Send) -> None:
        mask = buffer.view_alignment - 1
        start, end = offset & ~mask, (offset + length + mask) & ~mask
        lock = buffer.view_lock
        # Split writes take turns: one past the active disk would be lost in a copy-up beside it, of the same cluster.
        shared = self._writes is _Answer.GO_ON
        token = lock.try_take(start, end, shared) or await lock.take(start, end, shared)
        try:
            if self._writes is _Answer.GO_ON:
                await send(self.file, offset, length)
                return
            for count, held in await buffer.split(offset, length):
                await send(self.file if held else buffer.secondary, offset, count)
                offset += count
        finally:
            lock.give_back(token)

    def _refused(self, what: str) -> OSError:
        state = "not started" if self.stage is Stage.NONE else self.stage.value
        where = f"replication filter '{self.name}', mode {self.mode}, {state}"
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {what} on {where}")
