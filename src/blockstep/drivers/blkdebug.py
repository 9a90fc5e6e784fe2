"""Driver ``blkdebug``: a filter that fails or holds requests on purpose.

Each request is an *event*: read, write, write_zeroes, discard, flush, block_status, truncate, make_empty, open.
What happens at an event, in this order, before the child sees anything:

    1. set-state rules of the event move the filter from state to state (it starts in state 1)
    2. a request that meets a suspension is held under its tag until somebody resumes the tag
    3. the first inject-error rule that fits event, state, range fails the request; ``once`` rules are used up by it

So a rule can be added while a request hangs, and hits that very request. QEMU's names of these events are
understood (``read_aio``, ``write_aio``, ``flush_to_disk``, ``none`` for all requests, ...); those that name the
inside of an image format are refused, there is nothing here that would raise them.

``make_empty`` fails `prepare_empty`: the half of a checkpoint that may fail. The limits (``align``,
``max-transfer``, ...) turn the filter into a device with these limits: it refuses what does not keep them, with
EINVAL, or with ENOTSUP for zeroes and discards that are not whole multiples of the ``opt-`` sizes. Nobody above
rounds for it.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import ClassVar, Final, Literal

import msgspec

from blockstep.aio.inline import Completion
from blockstep.block.driver import Buffer, Extent, Filter, Prepared
from blockstep.block.node import NodeOptions, NodeRef
from blockstep.block.permissions import Role
from blockstep.block.registry import register
from blockstep.errors import OptionError

#: Our events, in the order of the module.
EVENTS: Final = (
    "read", "write", "write_zeroes", "discard", "flush", "block_status", "truncate", "make_empty", "open",
)

#: Matches every request (not open).
ANY: Final = "none"

_QEMU_EVENTS: Final = {
    "read_aio": "read", "read_backing_aio": "read", "readv_done": "read", "write_aio": "write", "pwritev": "write",
    "pwritev_zero": "write_zeroes", "flush_to_os": "flush", "flush_to_disk": "flush",
    "empty_image_prepare": "make_empty",
}

_IOTYPES: Final = {
    "read": "read", "write": "write", "write-zeroes": "write_zeroes", "discard": "discard", "flush": "flush",
    "block-status": "block_status",
}


class InjectError(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A rule that fails requests. Without a range it fits all; with one, requests that overlap it."""

    event: str = ANY
    state: int = 0  #: fits in this state only; 0: in all
    iotype: Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"] | None = None
    errno: int = errno.EIO
    sector: int = -1  #: of 512 bytes; -1: any
    offset: int | None = None  #: in bytes, with `length`; another way to give the range
    length: int = 1
    once: bool = False  #: forget the rule after its first hit
    immediately: bool = False  #: fail in the caller's frame; otherwise after one turn of the event loop

    def fits(self, event: str, state: int, offset: int, length: int) -> bool:
        """Whether a request of ``event`` in ``state`` is to fail."""
        if self.state not in (0, state) or not _same(self.event, event):
            return False
        if self.iotype is not None and _IOTYPES[self.iotype] != event:
            return False
        if self.offset is not None:
            return self.offset < offset + length and offset < self.offset + self.length
        return self.sector < 0 or (self.sector * 512 < offset + length and offset < (self.sector + 1) * 512)


class SetState(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A rule that, at an event, moves the filter from ``state`` (0: from any) to ``new_state``."""

    event: str
    state: int = 0
    new_state: int = msgspec.field(name="new_state")  # as QEMU spells it


class BlkdebugOptions(NodeOptions, tag="blkdebug"):
    """``file`` (or QEMU's name for it, ``image``): the child. The limits are bytes; 0: no limit."""

    file: NodeRef | None = None
    image: NodeRef | None = None
    inject_error: list[InjectError] = msgspec.field(default_factory=list)
    set_state: list[SetState] = msgspec.field(default_factory=list)
    align: int = 0
    max_transfer: int = 0
    max_write_zero: int = 0
    opt_write_zero: int = 0
    max_discard: int = 0
    opt_discard: int = 0

    def __post_init__(self) -> None:
        if self.image is not None:
            if self.file is not None:
                raise ValueError("both 'file' and 'image' are given; they are two names of one thing")
            self.file, self.image = self.image, None
        if self.file is None:
            raise ValueError("'file', the node to pass requests to, is missing")


@register
class Blkdebug(Filter):
    """See the module. All methods of its own may be called at any time, with requests in flight."""

    driver: ClassVar[str] = "blkdebug"
    Options = BlkdebugOptions
    options: BlkdebugOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}

    def __init__(self, name: str, options: NodeOptions) -> None:
        super().__init__(name, options)
        #: What set-state rules move; may be set.
        self.state = 1
        self._errors: list[InjectError] = []
        self._states: list[SetState] = []
        self._suspensions: list[tuple[str, str]] = []  # (event, tag) that wait for a request
        self._held: dict[str, list[Completion[None]]] = {}
        self._watchers: dict[str, list[Completion[None]]] = {}

    async def open(self) -> None:
        for error in self.options.inject_error:
            self.add_rule(error)
        for change in self.options.set_state:
            self.add_rule(change)
        await self._event("open", 0, 0)

    async def close(self) -> None:
        pass

    # --- rules ---

    def add_rule(self, rule: InjectError | SetState) -> None:
        """Have one more rule, after those that are there. Raises OptionError for an unknown event."""
        rule = msgspec.structs.replace(rule, event=event_name(rule.event))
        if isinstance(rule, InjectError):
            self._errors.append(rule)
        else:
            self._states.append(rule)

    def fail(self, event: str, code: int = errno.EIO, *, once: bool = False, offset: int | None = None,
             length: int = 1, immediately: bool = True) -> None:
        """Short for adding an `InjectError`."""
        self.add_rule(InjectError(event=event, errno=code, once=once, offset=offset, length=length,
                                  immediately=immediately))

    def clear_rules(self) -> None:
        """Forget all rules, those of the options as well. Suspensions stay."""
        self._errors, self._states = [], []

    # --- suspension ---

    def suspend(self, event: str, tag: str) -> None:
        """Hold the next request of ``event`` under ``tag``: one request for each call."""
        self._suspensions.append((event_name(event), tag))

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is held under ``tag`` now."""
        return bool(self._held.get(tag))

    async def suspended(self, tag: str) -> None:
        """Wait until a request is held under ``tag``."""
        if not self.is_suspended(tag):
            waiter: Completion[None] = Completion()
            self._watchers.setdefault(tag, []).append(waiter)
            await waiter

    def resume(self, tag: str) -> None:
        """Let all requests that are held under ``tag`` go on, at once, and take back suspensions not met yet.

        Raises OptionError if ``tag`` is unknown.
        """
        known = [entry for entry in self._suspensions if entry[1] == tag]
        held = self._held.pop(tag, [])
        if not known and not held:
            raise OptionError("tag", tag, "that of a suspension")
        self._suspensions = [entry for entry in self._suspensions if entry[1] != tag]
        for request in held:
            request.set_result(None)

    # --- requests ---

    async def pread(self, offset: int, length: int) -> Buffer:
        await self._event("read", offset, length)
        self._check_limits(offset, length, self.options.max_transfer)
        return await self.file.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self._event("write", offset, len(data))
        self._check_limits(offset, len(data), self.options.max_transfer)
        await self.file.pwrite(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._event("write_zeroes", offset, length)
        self._check_limits(offset, length, self.options.max_write_zero, self.options.opt_write_zero)
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._event("discard", offset, length)
        self._check_limits(offset, length, self.options.max_discard, self.options.opt_discard)
        await self.file.discard(offset, length)

    async def flush(self) -> None:
        await self._event("flush", 0, 0)
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._event("block_status", offset, length)
        return await self.file.block_status(offset, length)

    async def truncate(self, length: int) -> None:
        await self._event("truncate", length, 0)
        await self.file.resize(length)

    async def prepare_empty(self) -> Prepared:
        await self._event("make_empty", 0, 0)
        return await self.file.node.prepare_empty()

    async def _event(self, event: str, offset: int, length: int) -> None:
        state = self.state  # all rules see the state before the event
        for rule in self._states:
            if _same(rule.event, event) and rule.state in (0, state):
                self.state = rule.new_state
        if self._suspensions:
            await self._hold(event)
        for error in self._errors:
            if error.fits(event, state, offset, length):
                if error.once:
                    self._errors.remove(error)
                if not error.immediately:
                    await asyncio.sleep(0)
                raise OSError(error.errno, f"{os.strerror(error.errno)}: injected by '{self.name}' into {event}")

    async def _hold(self, event: str) -> None:
        for entry in self._suspensions:
            if _same(entry[0], event):
                self._suspensions.remove(entry)
                tag = entry[1]
                request: Completion[None] = Completion()
                self._held.setdefault(tag, []).append(request)
                for waiter in self._watchers.pop(tag, []):
                    asyncio.get_running_loop().call_soon(waiter.set_result, None)
                await request
                return

    def _check_limits(self, offset: int, length: int, most: int, multiple: int = 0) -> None:
        align = self.options.align
        if align and (offset % align or length % align):
            raise _refused(errno.EINVAL, f"{length} bytes at {offset} are not aligned to {align}")
        if most and length > most:
            raise _refused(errno.EINVAL, f"{length} bytes are more than the limit of {most}")
        if multiple and (offset % multiple or length % multiple):
            raise _refused(errno.ENOTSUP, f"{length} bytes at {offset} are no multiple of {multiple}")


def event_name(event: str) -> str:
    """Our name of an event that may be given by QEMU's. Raises OptionError for one that cannot happen here."""
    name = _QEMU_EVENTS.get(event, event)
    if name not in EVENTS and name != ANY:
        raise OptionError("event", event, "one of " + ", ".join((*EVENTS, ANY, *_QEMU_EVENTS)))
    return name


def _same(wanted: str, event: str) -> bool:
    return wanted == event or (wanted == ANY and event != "open")


def _refused(code: int, reason: str) -> OSError:
    return OSError(code, f"{os.strerror(code)}: {reason}")
