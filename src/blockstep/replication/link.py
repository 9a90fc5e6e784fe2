"""The link: where a primary's writes part, one to its own disk and one to the standby.

    guest ──► link ──file────► the primary's disk
                └────target──► the standby's secondary disk (an nbd node), while there is one

What a write waits for is the user's choice (``ack``). With ``local`` it is done when the primary's disk has it, and
its copy waits in a bounded queue; when the queue is full, guests wait for room. With ``both`` it waits for the
standby as well. Whatever goes wrong beyond the link, a guest's write never fails for it and never waits for longer than
a deadline, from the moment in which it came, whatever it waits for (`look`): at the first error the link *lets go*
(`fail`), and all who wait go on.

The order of overlapping writes is the same on both sides: on this side a write is queued and on the disk before
anything else happens, or holds a range lock until it is; on the way to the standby it waits while an overlapping one
is out. A flush that does not go to the standby is a barrier on the way: what the guest writes after it is sent when
what it wrote before has been acknowledged. So what the standby has is at any moment a state that a crash of the
primary could have left.

**What the standby may lack.** Two bitmaps, from the first byte on: `since` is what was written since the last mark,
`closing` what was written before it and is not yet known to be durable on the standby. After a loss their union
is what has to be copied. After the death of the process it is what `ledger` says, if there is one.

**A checkpoint** holds writes back from the link, not from the guest::

    mark()     now: what came before belongs to the checkpoint, what comes is held
    settle()   wait until the standby has acknowledged all that came before
    ...        the standby takes its checkpoint
    release()  send what was held
    settled()  the standby's disk is flushed: forget `closing`, but for what this disk failed to write

`mark` does not wait, so marking the links of several disks one after the other is one point in time: a write that was
acknowledged before it is in, and one that was begun after it is not.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ClassVar, Final, Literal

from blockstep.aio.inline import Completion, start, submit
from blockstep.aio.rangelock import BusyRanges, RangeLock
from blockstep.block.bitmap import Bitmap
from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Buffer, Filter
from blockstep.block.node import Child, NodeOptions, NodeRef
from blockstep.block.permissions import ALL, NONE, Permission, Role
from blockstep.block.registry import register
from blockstep.errors import ConnectionLost
from blockstep.units import KiB, MiB

#: Requests on their way to the standby at a time, and their bytes: at the most, at first, and at the least.
WINDOW: Final = 128
WINDOW_BYTES: Final = 16 * MiB
_FIRST_WINDOW: Final = MiB
_LEAST_WINDOW: Final = 64 * KiB
#: How often per deadline the owner calls `Link.look`.
LOOKS: Final = 8
#: Bytes of a request without data. The standby may have to save what it overwrites, and has a deadline for it; for a
#: longer one of the guest it has as many deadlines.
AT_ONCE: Final = 512 * MiB
#: What a request without data counts for on its way.
SMALL: Final = 4096
Kind = Literal["pwrite", "write_zeroes", "discard", "barrier"]

#: Bytes for each bit of what the standby may lack: 2 MiB of memory for a full bitmap over 1 TiB.
GRANULARITY: Final = 65536
_SHIFT: Final = GRANULARITY.bit_length() - 1


class LinkOptions(NodeOptions, tag="link"):
    """``ack``: who has a write when the guest is told; ``queue``: bytes that may wait for the standby."""

    file: NodeRef
    ack: Literal["local", "both"] = "local"
    queue: int = 64 * MiB


class _Request:
    """A write on its way to the standby; called with its outcome."""

    __slots__ = ("data", "done", "end", "flags", "kind", "link", "offset", "weight")

    def __init__(self, link: Link, kind: Kind, offset: int, end: int, data: Buffer | None, flags: int,
                 done: Completion[None] | None) -> None:
        self.link, self.kind, self.offset, self.end, self.data, self.flags = link, kind, offset, end, data, flags
        #: Who waits for the standby.
        self.done = done
        #: What it counts for on the link, in bytes. In the queue it counts for all that it covers: a standby that
        #: has to save what a discard covers needs as much room for it as for a write.
        self.weight = end - offset if data is not None else 0 if kind == "barrier" else SMALL

    def __call__(self, error: BaseException | None) -> None:
        link = self.link
        if self not in link._out:  # the link has let go meanwhile
            return
        if error is None:
            link._acknowledged(self)
        else:
            link.fail(_as_os_error(error))


@register
class Link(Filter):
    """See the module."""

    driver: ClassVar[str] = "link"
    Options = LinkOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}
    options: LinkOptions
    target: Child

    async def open(self) -> None:
        self.since = Bitmap(self.length, GRANULARITY)
        self.closing = Bitmap(self.length, GRANULARITY)
        #: The same as both of them, in memory that outlives the process: set before this disk is written.
        self.ledger: Bitmap | None = None
        #: Whether writes go to the standby.
        self.on = False
        #: Bytes written since the last mark (a range written twice counts twice).
        self.written = 0
        #: Bytes that wait for the standby's acknowledgement.
        self.queued = 0
        #: Bytes that may wait for the standby before guests wait; at most what the option says.
        self.queue = self.options.queue
        #: Called once when the link lets go.
        self.on_fail: Callable[[OSError], None] = lambda error: None
        #: How this side's disk failed the guest last; None again with the first `mark` before which it wrote, and
        #: nothing failed. `on_trouble` is called when that changes, but for the same once more.
        self.trouble: OSError | None = None
        self.on_trouble: Callable[[], None] = lambda: None
        self._failing = False  # since the last mark
        #: Called when more than `alarm` bytes were written since the last mark (0: never).
        self.on_written: Callable[[], None] = lambda: None
        self.alarm = 0
        self._torn: Bitmap | None = None  # where a write failed here, and nothing has been copied since
        self._lock = RangeLock()  # from the guest: one of several overlapping writes at a time
        self._sent = BusyRanges()  # to the standby: likewise
        self._queue: deque[_Request] = deque()
        self._held: deque[_Request] | None = None
        self._marks = 0
        self._out: set[_Request] = set()
        self._in_flight_bytes = 0
        self._window = WINDOW_BYTES
        self._stalled = False
        self._carried = 0
        self._busy: deque[int] = deque(maxlen=LOOKS)
        self._looks = 0
        #: Who waits for the standby, and after how many looks it came.
        self._waiting: dict[Completion[None], int] = {}
        self._pumping = False
        self._flushing: set[Completion[None]] = set()
        self._waiting_for_room: deque[Completion[None]] = deque()
        self._waiting_for_end: list[Completion[None]] = []

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        if child.name == "target" and not self.on:
            return NONE, ALL  # a sync writes to it now
        return super().child_permissions(child, taken, shared)

    @property
    def behind(self) -> int:
        """Bytes that the standby may lack: what waits while the link is on, else what a resync has to copy."""
        return self.queued if self.on else self.since.count_or(self.closing)

    def lacking(self) -> list[Bitmap]:
        """What the standby may lack, if nothing is in flight: what is set in any of these."""
        return [self.since, self.closing, *([self._torn] if self._torn else [])]

    # --- on and off ---

    def switch_on(self, rest: Iterable[tuple[int, bytes]] = ()) -> None:
        """Send writes to ``target`` from now on, after ``rest``: (offset, data) that it lacks. Nothing is in flight."""
        self.on = True
        self._torn = None
        self._window = _FIRST_WINDOW if self.options.ack == "local" else WINDOW_BYTES
        self._busy.clear()
        self._stalled = False
        for offset, data in rest:
            end = offset + len(data)
            if data.count(0) == len(data):
                self._put(_Request(self, "write_zeroes", offset, end, None, MAY_UNMAP, None))
            else:
                self._put(_Request(self, "pwrite", offset, end, data, 0, None))

    def switch_off(self) -> None:
        """Stop sending; those who wait for the standby go on. What it may lack stays in the bitmaps."""
        self.on = False
        dropped = [*self._queue, *(self._held or ()), *self._out]
        self._queue.clear()
        self._out.clear()
        self._waiting.clear()
        self._held = None
        self.queued = self._in_flight_bytes = 0
        self._sent = BusyRanges()
        for request in dropped:
            if request.done:
                request.done.set_result(None)
        self._wake(self._flushing)
        self._make_room()
        self._wake(self._waiting_for_end)

    def fail(self, error: OSError) -> None:
        """Let go of a standby that cannot be written to."""
        if self.on:
            self.switch_off()
            self.on_fail(error)

    # --- requests of the guest ---

    def begin_write(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        if self.queued > self.queue or not self._lock.idle:
            return self.pwrite(offset, data)
        length = len(data)
        ledger = self.ledger
        first, end = offset >> _SHIFT, (offset + length - 1 >> _SHIFT) + 1
        if end - first == 1:  # as Bitmap.set does, without its calls
            self.since.bits[first] = 1
            if ledger is not None:
                ledger.bits[first] = 1
        else:
            self.since.bits[first:end] = True
            if ledger is not None:
                ledger.bits[first:end] = True
        try:
            writing = self.file.begin_write(offset, data)
        except OSError as error:
            self._tore(offset, length, error)
            raise
        if writing is not None:
            return self._write(offset, data, 0, writing, self._looks)
        # This disk has it, and nothing can have come in between: only the standby is left, in the queue's order.
        self.written += length
        done: Completion[None] | None = None
        if self.on:
            if self.options.ack == "both":
                done = Completion()
                self._waiting[done] = self._looks
            else:
                data = bytes(data)
            self._put(_Request(self, "pwrite", offset, offset + length, data, 0, done))
        if self.alarm and self.written > self.alarm:
            self.on_written()
        return done

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        came = self._looks
        if self.queued > self.queue:
            await self._room(came)
        await self._write(offset, data, flags, None, came)

    async def _write(self, offset: int, data: Buffer, flags: int, writing: Awaitable[None] | None, came: int) -> None:
        """To both disks. ``writing``: to this one, if that has been begun; nobody holds the lock then."""
        length = len(data)
        end = offset + length
        token = self._lock.try_take(offset, end) or await self._lock.take(offset, end)
        marks = self._marks
        try:
            self._count(offset, length)
            here = writing or self.file.pwrite(offset, data, flags)
            if not self.on:
                await here
            elif self.options.ack == "local":
                self._put(_Request(self, "pwrite", offset, end, bytes(data), 0, None))
                await here
            else:
                done: Completion[None] = Completion()
                self._waiting[done] = came
                self._put(_Request(self, "pwrite", offset, end, data, flags, done))
                try:
                    await here
                finally:
                    await done
        except OSError as error:
            self._tore(offset, length, error)
            raise
        finally:
            if marks != self._marks:  # the bit was taken away while the write was on its way to the disk
                self.since.set(offset, length)
            self._lock.give_back(token)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._both("write_zeroes", offset, length, flags, lambda: self.file.write_zeroes(offset, length, flags))

    async def discard(self, offset: int, length: int) -> None:
        await self._both("discard", offset, length, 0, lambda: self.file.discard(offset, length))

    async def truncate(self, length: int) -> None:
        """See `Driver`. Nothing may be in flight, and a standby that writes are sent to has that length already."""
        before = self.length
        try:
            with self.followed_by(filter(None, (self.since, self.closing, self._torn)), length):
                await self.file.resize(length)
        finally:
            if self.length == length > before and not self.on:
                self.since.set(before, length - before)

    async def flush(self) -> None:
        if not self.on:
            await self._flush()
            return
        if self.options.ack == "local":
            self._put(_Request(self, "barrier", 0, 0, None, 0, None))
            await self._flush()
            return
        done: Completion[None] = Completion()
        self._flushing.add(done)

        def flushed(_: Any, error: BaseException | None) -> None:
            if done in self._flushing:
                self._flushing.remove(done)
                done.set_result(None)
                if error:
                    self.fail(_as_os_error(error))

        start(self.target.flush(), flushed)
        try:
            await self._flush()
        finally:
            await done

    async def _both(
        self, kind: Kind, offset: int, length: int, flags: int, local: Callable[[], Awaitable[None]]
    ) -> None:
        came = self._looks
        if self.queued > self.queue:
            await self._room(came)
        token = await self._lock.take(offset, offset + length)
        try:
            self._count(offset, length)
            if flags & FAST:  # this disk may refuse, and then the standby must not have done it
                await local()
                local = _nothing
            done: Completion[None] | None = None
            if self.on:
                if self.options.ack == "both":
                    done = Completion()
                    self._waiting[done] = came + length // AT_ONCE * LOOKS
                flags &= ~FAST if done else ~(FAST | FUA)
                end = offset + length
                for at in range(offset, end, AT_ONCE):  # ranges so long go one after the other: the last ends last
                    self._put(_Request(self, kind, at, min(at + AT_ONCE, end), None, flags,
                                       done if end - at <= AT_ONCE else None))
            try:
                await local()
            finally:
                if done:
                    await done
        except OSError as error:
            if not flags & FAST or error.errno != errno.ENOTSUP:
                self._tore(offset, length, error)
            raise
        finally:
            self.since.set(offset, length)
            self._lock.give_back(token)

    def _count(self, offset: int, length: int) -> None:
        self.since.set(offset, length)
        if self.ledger is not None:
            self.ledger.set(offset, length)
        self.written += length
        if self.alarm and self.written > self.alarm:
            self.on_written()

    async def _flush(self) -> None:
        try:
            await self.file.flush()
        except OSError as error:
            self._failed(error)
            raise

    def _failed(self, error: OSError) -> None:
        self._failing = True
        before, self.trouble = self.trouble, error
        if before is None or before.errno != error.errno:
            self.on_trouble()

    def _tore(self, offset: int, length: int, error: OSError) -> None:
        """This disk failed a write, and may hold anything there; the standby may have taken it."""
        if self._torn is None:
            self._torn = Bitmap(self.length, GRANULARITY)
        self._torn.set(offset, length)
        self._failed(error)

    # --- the queue ---

    async def _room(self, came: int) -> None:
        while self.on and self.queued > self.queue:
            waiter: Completion[None] = Completion()
            self._waiting[waiter] = came
            self._waiting_for_room.append(waiter)
            await waiter

    def _make_room(self) -> None:
        while self._waiting_for_room and not (self.on and self.queued > self.queue):
            waiter = self._waiting_for_room.popleft()
            self._waiting.pop(waiter, None)
            waiter.set_result(None)

    def _put(self, request: _Request) -> None:
        self.queued += request.end - request.offset
        if self._held is not None:
            self._held.append(request)
        else:
            self._queue.append(request)
            self._pump()

    def _pump(self) -> None:
        """Send as much as the window takes. A request that overlaps one on its way waits, and all behind it."""
        if self._pumping:
            return
        queue, out, sent = self._queue, self._out, self._sent
        target = self.target
        self._pumping = True
        try:
            while queue and len(out) < WINDOW and self._in_flight_bytes < self._window:
                request = queue[0]
                if request.kind == "barrier":
                    if out:
                        break
                    queue.popleft()
                    continue
                if not sent.try_take(request.offset, request.end):
                    break
                queue.popleft()
                self._in_flight_bytes += request.weight
                out.add(request)
                if request.data is not None:
                    target.submit_write(request.offset, request.data, request.flags, request)
                elif request.kind == "write_zeroes":
                    submit(target.write_zeroes(request.offset, request.end - request.offset, request.flags), request)
                else:
                    submit(target.discard(request.offset, request.end - request.offset), request)
        finally:
            self._pumping = False

    def _acknowledged(self, request: _Request) -> None:
        self._out.remove(request)
        self._sent.give_back(request.offset, request.end)
        weight = request.weight
        self._in_flight_bytes -= weight
        self._carried += weight
        self.queued -= request.end - request.offset
        if request.done:
            del self._waiting[request.done]
            request.done.set_result(None)
        if self._queue:
            self._pump()
        if self._waiting_for_end and not self._queue and not self._out:
            self._wake(self._waiting_for_end)
        if self._waiting_for_room:
            self._make_room()

    def stall(self) -> None:
        """Send nothing more until the next `settle`: the standby has no room for more than what is queued."""
        if self.on and self._held is None:
            self._stalled, self._window = True, 0

    def _go_on(self) -> None:
        if self._stalled and self.on:
            self._stalled = False
            self._window = _FIRST_WINDOW if self.options.ack == "local" else WINDOW_BYTES
            self._pump()

    def look(self, seconds: float, deadline: float) -> None:
        """Called every ``seconds`` by the owner, `LOOKS` times per ``deadline`` of a request.

        What is on its way at a time is kept to what the link carries in a quarter of the deadline: a slow link that is
        full is not to be taken for a dead one. (With ``both`` a guest waits for each, so the deadline decides.) When a
        request of the guest has waited for the standby for as long as the deadline, be it for room in the queue, for
        those before it, for a checkpoint, or for its own answer, the link lets go; found out at the next look.
        """
        carried, self._carried = self._carried, 0
        self._looks += 1
        if not self.on:
            return
        if not self._queue or self._stalled:
            self._busy.clear()
        elif self.options.ack == "local":
            self._busy.append(carried)
            fitting = int(sum(self._busy) / len(self._busy) / seconds * deadline / 4)
            if fitting > self._window:
                self._window = min(2 * self._window, fitting, WINDOW_BYTES)
            elif len(self._busy) >= LOOKS // 2:
                self._window = max(_LEAST_WINDOW, fitting)
        waited = (self._looks - min(self._waiting.values(), default=self._looks) - 1) * seconds  # at the least
        if waited >= deadline:
            why = ("its buffer is full" if self._stalled else
                   "the queue to it is full" if self._waiting_for_room else "it is slow")
            self.fail(OSError(errno.ETIMEDOUT, f"{why}, and a request of the guest has waited for {waited:.1f} s"))

    @staticmethod
    def _wake(waiting: list[Completion[None]] | set[Completion[None]]) -> None:
        while waiting:
            waiting.pop().set_result(None)

    # --- checkpoints ---

    def mark(self) -> None:
        """All that was queued up to now belongs to the checkpoint; what comes is held back from the link."""
        assert self.on
        assert self._held is None
        if self.closing.bits.any():
            self.closing.merge(self.since)
            self.since.clear()
        else:
            self.since, self.closing = self.closing, self.since
        well = self.written > 0 and not self._failing
        self.written, self._failing = 0, False
        self._marks += 1
        self._held = deque()
        if well and self.trouble:
            self.trouble = None
            self.on_trouble()

    async def settle(self) -> None:
        """Wait until the standby has acknowledged what came before the mark. Raises ConnectionLost if it cannot."""
        self._go_on()
        while self.on and (self._queue or self._out):
            waiter: Completion[None] = Completion()
            self._waiting_for_end.append(waiter)
            await waiter
        if not self.on:
            raise ConnectionLost(f"link '{self.name}' has let go of the standby")

    def release(self) -> None:
        """Send what was held."""
        held, self._held = self._held, None
        if held:
            self._queue.extend(held)
            self._pump()

    def settled(self) -> None:
        """What came before the mark is durable on the standby."""
        self.closing.clear()
        for first, end in self._lock.held:  # the standby has it, and this disk has not ended it
            self.closing.set(first, end - first)
        if self._torn is not None:
            self.closing.merge(self._torn)
        if self.ledger is not None:
            self.ledger.bits[:] = self.since.bits | self.closing.bits

    async def drain_begin(self) -> None:
        if self._held is None and self.on:
            held: Completion[None] = Completion()  # all that the guest asks for meanwhile
            self._waiting[held] = self._looks
            try:
                await self.settle()
            except ConnectionLost:
                return  # nothing is on its way any more
            finally:
                self._waiting.pop(held, None)


async def _nothing() -> None:
    pass


def _as_os_error(error: BaseException) -> OSError:
    return error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
