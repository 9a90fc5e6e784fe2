"""What a standby must show: a plain model, to hold the real one against.

    primary writes ──► secondary          view = the last checkpoint, and what the standby wrote since
    standby writes ──► view

A checkpoint makes the view what the primary wrote, on all disks or on none; stop puts the secondary itself in the
view's place, and failover the view in the secondary's.

**In doubt.** Some requests leave more than one content possible: a write that failed, a discard, two overlapping
writes in flight together. `Content` knows for each byte what it may be, and learns from what is read (`adopt`).
While no such thing happens, it allows exactly one content.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

#: Bytes that are compared at once.
_BLOCK: Final = 512


class Write(msgspec.Struct, eq=False):
    """A write that may, or may not, have reached its bytes."""

    offset: int
    data: bytes
    #: On the clock of its `Content`; `ended` is 0 while it is in flight.
    began: int = 0
    ended: int = 0
    #: Its content was succeeded by another while it was in flight: nobody knows which of them it reached.
    between: bool = False

    @property
    def end(self) -> int:
        return self.offset + len(self.data)

    def overlaps(self, other: Write) -> bool:
        """Whether both touch the same bytes."""
        return self.offset < other.end and other.offset < self.end


class Read(msgspec.Struct, eq=False):
    """A read in flight: what it may return is what was possible at any time while it ran."""

    offset: int
    length: int
    base: bytes
    writes: list[Write]


class Content:
    """The bytes of a disk, as far as they are known."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytearray(data)
        #: Writes that have begun and not ended.
        self.in_flight: list[Write] = []
        #: Writes that have ended, and whose bytes may be what they wrote.
        self.doubts: list[Write] = []
        #: Writes that have ended well, and were in flight together with one that still is.
        self._recent: list[Write] = []
        self._reads: list[Read] = []
        self._clock = 0

    # --- writes ---

    def write(self, offset: int, data: bytes) -> None:
        """A write that has ended well, with no other beside it."""
        self.end(self.begin(offset, data), True)

    def may_write(self, offset: int, data: bytes) -> None:
        """A write that failed, or a discard (of zeroes): old or new, byte by byte."""
        self.end(self.begin(offset, data), False)

    def begin(self, offset: int, data: bytes) -> Write:
        """A write is on its way."""
        self._clock += 1
        write = Write(offset, bytes(data), self._clock)
        self.in_flight.append(write)
        for read in self._reads:
            read.writes.append(write)
        return write

    def end(self, write: Write, done: bool) -> None:
        """It has ended: ``done``, or with any mixture of old and new in its bytes."""
        self._clock += 1
        write.ended = self._clock
        self.in_flight.remove(write)
        if done and not write.between:
            self._settle(write)
            self._recent.append(write)
        else:
            self.doubts.append(write)
        oldest = min((other.began for other in self.in_flight), default=self._clock)
        self._recent = [other for other in self._recent if other.ended > oldest]

    def _settle(self, write: Write) -> None:
        """Its bytes are now what it wrote, or what those wrote that were in flight together with it."""
        doubts = [piece for doubt in self.doubts
                  for piece in ([doubt] if doubt.ended > write.began else _without(doubt, write))]
        doubts += [_common(self.data, write, other) for other in self._recent
                   if other.ended > write.began and other.overlaps(write)]
        self.doubts = doubts
        self.data[write.offset:write.end] = write.data

    # --- reads ---

    def begin_read(self, offset: int, length: int) -> Read:
        """A read is on its way."""
        base = bytes(self.data[offset:offset + length])
        read = Read(offset, length, base, [*self.doubts, *self.in_flight])
        self._reads.append(read)
        return read

    def end_read(self, read: Read, got: bytes) -> str | None:
        """None if it may return ``got``; otherwise what is wrong with it."""
        self._reads.remove(read)
        return _difference(read.offset, read.base, read.writes, got)

    def differs(self, got: bytes, offset: int = 0) -> str | None:
        """None if the bytes from ``offset`` on may be ``got`` now; otherwise what is wrong with it."""
        return self.end_read(self.begin_read(offset, len(got)), got)

    def adopt(self, got: bytes) -> None:
        """All of it was read, with nothing in flight: there is no doubt any more."""
        assert not self.in_flight
        self.data[:] = got
        self.doubts.clear()

    def copy(self, in_flight: bool = False) -> Content:
        """The same content and doubts; what is in flight belongs to it, as a doubt, if ``in_flight``."""
        other = Content(self.data)
        other.doubts = [Write(write.offset, write.data)
                        for write in (*self.doubts, *(self.in_flight if in_flight else ()))]
        return other

    def succeed(self, other: Content) -> None:
        """Be from now on what ``other`` was: what is in flight there has been dropped with it, or comes here yet."""
        for write in other.in_flight:
            write.began, write.between = self._clock, True
            self.in_flight.append(write)

    def resize(self, length: int) -> None:
        """The disk has grown, by zeroes, or was cut off."""
        del self.data[length:]
        self.data.extend(bytes(length - len(self.data)))


class Disk:
    """One disk of a standby."""

    def __init__(self, data: bytes) -> None:
        #: Everything the primary wrote.
        self.secondary = Content(data)
        #: What a guest on the standby sees.
        self.view = Content(data)


class Standby:
    """Several disks that share their points in time."""

    def __init__(self, disks: dict[str, bytes]) -> None:
        self.disks = {name: Disk(data) for name, data in disks.items()}

    def checkpoint(self) -> None:
        """All views move to what the primary wrote; what the standby wrote is dropped."""
        for disk in self.disks.values():
            disk.view = disk.secondary.copy()

    def stop(self) -> None:
        """Without failover: the secondary disk is the view from now on."""
        for disk in self.disks.values():
            disk.view = disk.secondary

    def fail_over(self) -> None:
        """The view lives on; what the primary wrote since the checkpoint is gone, and it writes no more."""
        for disk in self.disks.values():
            disk.secondary = disk.view


def _without(doubt: Write, write: Write) -> list[Write]:
    """The pieces of a doubt that a later write has not made good."""
    if not doubt.overlaps(write):
        return [doubt]
    head = doubt.data[:max(0, write.offset - doubt.offset)]
    tail = doubt.data[write.end - doubt.offset:] if write.end < doubt.end else b""
    pieces = ((doubt.offset, head), (doubt.end - len(tail), tail))
    return [Write(offset, data, doubt.began, doubt.ended) for offset, data in pieces if data]


def _common(data: bytearray, write: Write, earlier: Write) -> Write:
    """What is there now where both have written."""
    start, end = max(write.offset, earlier.offset), min(write.end, earlier.end)
    return Write(start, bytes(data[start:end]), earlier.began, earlier.ended)


def _difference(offset: int, base: bytes, writes: Iterable[Write], got: bytes) -> str | None:
    """Looked at in blocks first: a byte takes a thousand times as long alone."""
    if got == base:
        return None
    possible = list(writes)
    if len(got) > _BLOCK:
        blocks = (slice(start, start + _BLOCK) for start in range(0, len(got), _BLOCK))
        return next((wrong for block in blocks
                     if (wrong := _difference(offset + block.start, base[block], possible, got[block]))), None)
    end = offset + len(got)
    possible = [write for write in possible if write.offset < end and offset < write.end]
    if any(write.data[max(0, offset - write.offset):end - write.offset] == got for write in possible):
        return None
    for index, (expected, byte) in enumerate(zip(base, got, strict=True)):
        at = offset + index
        if byte != expected and not any(write.offset <= at < write.end and write.data[at - write.offset] == byte
                                        for write in possible):
            others = sorted({write.data[at - write.offset] for write in possible if write.offset <= at < write.end})
            return f"byte {at} is {byte:#04x}, not {expected:#04x}" + "".join(f" or {o:#04x}" for o in others)
    return None
