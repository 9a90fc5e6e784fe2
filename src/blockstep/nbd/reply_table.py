"""What the server answers, taken apart and given to those who wait; pure.

A client's received bytes are a train of replies in any order, each with the cookie of its request:

    simple      magic, error, cookie                                 (data of a read behind it, if it was one)
    structured  magic, flags | type, cookie, length        payload   one or more chunks, the last has DONE
    extended    magic, flags | type, cookie, offset, length  payload

The first 16 bytes have one layout in all three. `ReplyTable` is fed through `get_buffer` and `received`, as a
channel does it, and keeps the table of requests that wait, `pending`:

    an acknowledgement   done(error or None): a plain callable; writes are most of the traffic
    `Read`, `Status`     objects that collect chunks, then call their ``done`` with themselves

One recv brings a batch of small replies into one buffer that is used again and again; the data of small reads is
copied out of it (4 KiB that the cache has just seen: 0.1 us, as dear as a memoryview of it, and it holds on to
nothing). While a long read is outstanding the batch is kept short, and what belongs to the long read goes from the
kernel right into the buffer that its caller will own.

The order of things: the table and the position in the batch are right before anyone is called, so whoever is
called may issue new requests or call `fail_all`. A peer that breaks the protocol raises ProtocolError out of
`received`; the requests stay in the table for `fail_all`. What a peer can make us allocate is bounded by what was
asked for, plus one block status chunk.

Source: proto.md, "Simple reply message", "Structured reply chunk message", "Structured reply types", and the
extension for extended headers.
"""

from __future__ import annotations

import errno
import struct
import sys
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from blockstep.errors import ConnectionLost, ProtocolError, explained
from blockstep.nbd import constants as c
from blockstep.nbd.wire import parse_error, parse_hole, parse_status

#: Bytes of one batch.
BATCH: Final = 256 << 10
#: A chunk longer than this is not collected in the batch.
LONG: Final = 32 << 10
#: Bytes of a batch while a long read is outstanding: what is copied of it at most.
SHORT_BATCH: Final = 4 << 10
#: The longest chunk of block status: 2^20 extended extents.
MAX_STATUS: Final = 8 + (16 << 20)
#: The longest error chunk: any that the protocol describes, with room for future fields.
MAX_ERROR: Final = 8 << 10
#: The most parts of a read, not touching each other, that have come: what is tiny and scattered is an attack.
MAX_PARTS: Final = 1 << 16

_HEAD: Final = struct.Struct(">IIQ")
_LENGTH: Final = struct.Struct(">I")
_OFFSET: Final = struct.Struct(">Q")
_OFFSET_LENGTH: Final = struct.Struct(">QQ")
_DONE: Final = c.REPLY_FLAG_DONE << 16
_DATA: Final = c.REPLY_TYPE_OFFSET_DATA
_WHOLE_DATA: Final = _DONE | _DATA
_DATA_HEAD: Final = struct.Struct(">IQ")
_EXTENDED_DATA: Final = struct.Struct(">8xQQ")
_SIMPLE: Final = c.SIMPLE_REPLY_MAGIC

#: The errors that the protocol names, in this system's numbers.
_ERRNO: Final = {c.EPERM: errno.EPERM, c.EIO: errno.EIO, c.ENOMEM: errno.ENOMEM, c.EINVAL: errno.EINVAL,
                 c.ENOSPC: errno.ENOSPC, c.EOVERFLOW: errno.EOVERFLOW, c.ENOTSUP: errno.ENOTSUP}


class LongBuffers:
    """The buffers of the last long reads, for the next ones.

    The memory of a long buffer is mapped, cleared and given back each time: more than the kernel's copy into it.
    So we keep a reference to each that we hand out; one that nobody else refers to (a memoryview refers to what
    it shows) is free again.
    """

    #: Buffers, and bytes in all of them together, that are kept.
    COUNT: Final = 16
    BYTES: Final = 16 << 20

    def __init__(self) -> None:
        self._kept: list[bytearray] = []
        self._bytes = 0

    def take(self, length: int) -> bytearray:
        """A buffer of ``length`` bytes, with anything in it."""
        kept = self._kept
        for index in range(len(kept)):
            if len(kept[index]) == length and _references(kept, index) == _ONLY_OURS:
                kept.append(kept.pop(index))
                return kept[-1]
        buffer = bytearray(length)
        kept.append(buffer)
        self._bytes += length
        while len(kept) > self.COUNT or self._bytes > self.BYTES:
            self._bytes -= len(kept.pop(0))
        return buffer


def _references(buffers: list[bytearray], index: int) -> int:
    return sys.getrefcount(buffers[index])


#: What `_references` counts of a buffer that only the list refers to; versions of Python differ in it.
_ONLY_OURS: Final = _references([bytearray(1)], 0)

Acknowledged = Callable[[BaseException | None], object]


class Read:
    """A read that waits. ``done(self)`` at its end: then ``error`` is set, or ``data`` is what was read."""

    __slots__ = ("_covered", "_parts", "data", "done", "error", "length", "offset")

    def __init__(self, offset: int, length: int, done: Callable[[Read], object]) -> None:
        self.offset, self.length, self.done = offset, length, done
        self.data: bytearray | None = None
        self.error: BaseException | None = None
        self._covered = 0
        self._parts: list[tuple[int, ...]] = []

    def cover(self, offset: int, length: int, long_buffers: LongBuffers | None = None) -> bytearray:
        """A content chunk covers a range of the request. Returns the read's buffer.

        It holds zeroes where nothing has come; one of ``long_buffers`` is taken if the chunk will fill all of it.
        """
        start = offset - self.offset
        if start < 0 or not length or start + length > self.length:
            raise ProtocolError(f"a chunk for {length} bytes at {offset} lies outside of the read of "
                                f"{self.length} bytes at {self.offset}")
        self._join(start, start + length)
        self._covered += length
        if self.data is None:
            self.data = (long_buffers.take(length) if long_buffers is not None and length == self.length
                         else bytearray(self.length))
        return self.data

    def _join(self, start: int, end: int) -> None:
        """Add a range to the parts that have come; those that touch become one."""
        parts = self._parts
        first = last = bisect_left(parts, (start,))
        if (first and parts[first - 1][1] > start) or (first < len(parts) and parts[first][0] < end):
            raise ProtocolError(f"two chunks of one read overlap at {self.offset + start}")
        if first and parts[first - 1][1] == start:
            first -= 1
            start = parts[first][0]
        if last < len(parts) and parts[last][0] == end:
            end = parts[last][1]
            last += 1
        parts[first:last] = [(start, end)]
        if len(parts) > MAX_PARTS:
            raise ProtocolError(f"a read in more than {MAX_PARTS} scattered parts")

    def check(self) -> None:
        """Raises ProtocolError unless all of the read has come."""
        if self._covered != self.length:
            raise ProtocolError(f"a read of {self.length} bytes ended after {self._covered} bytes")

    def finish(self) -> None:
        self.done(self)


class Status:
    """A block status request that waits. ``done(self)`` at its end: then ``error`` is set, or ``result`` has the
    extents, (length, flags) each, of every context id."""

    __slots__ = ("contexts", "done", "error", "offset", "result")

    def __init__(self, offset: int, contexts: frozenset[int], done: Callable[[Status], object]) -> None:
        self.offset, self.contexts, self.done = offset, contexts, done
        self.result: dict[int, list[tuple[int, int]]] = {}
        self.error: BaseException | None = None

    def add(self, context: int, extents: list[tuple[int, int]]) -> None:
        """A chunk tells the extents of one context."""
        if context not in self.contexts or context in self.result:
            raise ProtocolError(f"block status of context {context}, which is not selected or was told before")
        self.result[context] = extents

    def check(self) -> None:
        """Raises ProtocolError unless all contexts have come."""
        if len(self.result) != len(self.contexts):
            raise ProtocolError("a block status reply without all selected contexts")

    def finish(self) -> None:
        self.done(self)


class _Failed:
    """An acknowledgement whose error has come, but not yet its last chunk."""

    __slots__ = ("done", "error")

    def __init__(self, done: Acknowledged) -> None:
        self.done = done
        self.error: BaseException | None = None

    def check(self) -> None:
        """Nothing else was to come."""

    def finish(self) -> None:
        self.done(self.error)


Pending = Acknowledged | Read | Status | _Failed


class ReplyTable:
    """Decodes replies and completes the requests in `pending`."""

    def __init__(self, structured: bool = False, extended: bool = False) -> None:
        #: Requests that wait, by cookie, oldest first.
        self.pending: dict[int, Pending] = {}
        #: How many of them are reads longer than LONG; the issuer counts up, we count down.
        self.long_reads = 0
        #: The server has answered ESHUTDOWN: it wants no more requests.
        self.shutting_down = False
        self._magic = c.EXTENDED_REPLY_MAGIC if extended else c.STRUCTURED_REPLY_MAGIC if structured else 0
        self._header = c.EXTENDED_REPLY_SIZE if extended else c.STRUCTURED_REPLY_SIZE
        self._extended = extended
        # Where the (low half of the) payload's length stands in a chunk's header, and all of it.
        self._length_at = 24 if extended else 16
        self._unpack_length = (_OFFSET if extended else _LENGTH).unpack_from
        # The same, and the offset of the data behind the header.
        self._unpack_data = (_EXTENDED_DATA if extended else _DATA_HEAD).unpack_from
        self._batch = bytearray(BATCH)
        self._view = memoryview(self._batch)
        self._filled = 0
        self._long_buffers = LongBuffers()
        # The rest of a long chunk, received in place; and what is to be done with it then.
        self._rest: memoryview | None = None
        self._then: Callable[[], None] | None = None

    def get_buffer(self) -> memoryview:
        """Where the next bytes go."""
        if self._rest is not None:
            return self._rest
        if self.long_reads and not self._filled:
            return self._view[:SHORT_BATCH]
        return self._view[self._filled:]

    def received(self, count: int) -> None:
        """Take ``count`` bytes from the last `get_buffer`. Raises ProtocolError."""
        if self._rest is not None:
            rest = self._rest[count:]
            if len(rest):
                self._rest = rest
                return
            then = self._then
            self._rest = self._then = None
            assert then is not None
            then()
            return
        end = self._filled + count
        # Whoever is called below may call fail_all, never us: the batch is ours until we return.
        self._filled = 0
        batch, unpack, take = self._batch, _HEAD.unpack_from, self.pending.pop
        header, length_at, length_of = self._header, self._length_at, self._unpack_length
        data_head = self._unpack_data
        position = 0
        while end - position >= 16:
            magic, word, cookie = unpack(batch, position)
            if magic == _SIMPLE and not self._extended:
                entry = take(cookie, None)
                if callable(entry) and not word:
                    position += 16
                    entry(None)
                    continue
                used = self._simple(entry, word, cookie, position, end)
            elif magic == self._magic:
                if word == _DONE and end - position >= header and not length_of(batch, position + length_at)[0]:
                    entry = take(cookie, None)
                    if callable(entry):
                        position += header
                        entry(None)
                        continue
                    if entry is not None:
                        self.pending[cookie] = entry
                elif word == _WHOLE_DATA and end - position >= header + 8:
                    entry = self.pending.get(cookie)
                    if type(entry) is Read and entry.data is None:
                        size, at = data_head(batch, position + 16)
                        after = position + header + size
                        if size - 8 == entry.length and at == entry.offset and after <= end:
                            del self.pending[cookie]
                            if size - 8 > LONG:
                                self.long_reads -= 1
                            entry.data = batch[position + header + 8:after]
                            position = after
                            entry.done(entry)
                            continue
                used = self._chunk(word, cookie, position, end)
            else:
                raise ProtocolError(f"a reply begins with {magic:#x}")
            if used == 0:
                break
            position += used
        if self._rest is None and position < end:
            if position:
                batch[:end - position] = batch[position:end]
            self._filled = end - position

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """Fail all requests, each with an error of its own."""
        failed = list(self.pending.values())
        self.pending.clear()
        self.long_reads = 0
        self._rest = self._then = None
        for entry in failed:
            if isinstance(entry, (Read, Status, _Failed)):
                entry.error = make_error()
                entry.finish()
            else:
                entry(make_error())

    # Simple replies.

    def _simple(self, entry: Pending | None, code: int, cookie: int, position: int, end: int) -> int:
        """A simple reply that is no plain success. Returns the bytes used, 0 if some are missing."""
        if entry is None:
            raise self._unknown(cookie)
        if not isinstance(entry, (Read, Status, _Failed)):
            entry(self._error(code))
            return 16
        self.pending[cookie] = entry
        if self._magic and not (code and isinstance(entry, Status)):
            raise ProtocolError("a simple reply where chunks are due")
        if code:
            entry.error = self._error(code)
            self._finish(entry, cookie)
            return 16
        assert isinstance(entry, Read)  # without structured replies there are no others
        return self._content(entry, cookie, _DONE, position, position + 16, entry.offset, entry.length, end)

    # Chunks.

    def _chunk(self, word: int, cookie: int, position: int, end: int) -> int:
        """A structured or extended chunk. Returns the bytes used, 0 if some are missing."""
        header = self._header
        if end - position < header:
            return 0
        entry = self.pending.get(cookie)
        if entry is None:
            raise self._unknown(cookie)
        length: int
        if self._extended:
            offset, length = _OFFSET_LENGTH.unpack_from(self._batch, position + 16)
            if isinstance(entry, (Read, Status)) and offset != entry.offset:
                raise ProtocolError(f"a chunk with offset {offset} to a request at {entry.offset}")
        else:
            length = self._unpack_length(self._batch, position + self._length_at)[0]
        kind = word & 0xFFFF
        if kind == c.REPLY_TYPE_NONE:
            if length or not word & _DONE:
                raise ProtocolError("a NONE chunk with a payload or without DONE")
            if isinstance(entry, (Read, Status, _Failed)):
                self._finish(entry, cookie)
            else:
                del self.pending[cookie]
                entry(None)
            return header
        body = position + header
        if kind == _DATA:
            if not isinstance(entry, Read) or length < 9:
                raise ProtocolError(f"a data chunk of {length} bytes to a request that is no read, or empty")
            if end - body < 8:
                return 0
            offset = _OFFSET.unpack_from(self._batch, body)[0]
            return self._content(entry, cookie, word, position, body + 8, offset, length - 8, end)
        if kind & c.REPLY_TYPE_FLAG_ERROR:
            limit = MAX_ERROR
        elif kind == c.REPLY_TYPE_OFFSET_HOLE and isinstance(entry, Read):
            limit = 12
        elif isinstance(entry, Status) and kind == (
                c.REPLY_TYPE_BLOCK_STATUS_EXT if self._extended else c.REPLY_TYPE_BLOCK_STATUS):
            limit = MAX_STATUS
        else:
            raise ProtocolError(f"a chunk of type {kind} that does not belong to its request")
        if length > limit:
            raise ProtocolError(f"a chunk of type {kind} with {length} bytes")
        if end - body >= length:
            self._payload(entry, cookie, word, self._batch[body:body + length])
            return header + length
        if length <= LONG:
            return 0
        payload = bytearray(length)
        self._receive_rest(memoryview(payload), body, end, lambda: self._payload(entry, cookie, word, payload))
        return end - position

    def _content(self, read: Read, cookie: int, word: int, position: int, body: int, offset: int, length: int,
                 end: int) -> int:
        """Data of a read: ``length`` bytes for ``offset``, in the batch from ``body`` on as far as they are."""
        done = word & _DONE
        if end - body >= length:
            used = body + length - position
            if done and length == read.length and offset == read.offset and read.data is None and not read.error:
                del self.pending[cookie]
                if length > LONG:
                    self.long_reads -= 1
                read.data = self._batch[body:body + length]
                read.done(read)
                return used
            start = offset - read.offset
            read.cover(offset, length)[start:start + length] = self._view[body:body + length]
            if done:
                self._finish(read, cookie)
            return used
        if length <= LONG:
            return 0
        start = offset - read.offset
        target = memoryview(read.cover(offset, length, self._long_buffers))[start:start + length]
        self._receive_rest(target, body, end, lambda: self._finish(read, cookie) if done else None)
        return end - position

    def _receive_rest(self, target: memoryview, body: int, end: int, then: Callable[[], None]) -> None:
        """Copy what the batch has of a payload, and receive the rest of it in place."""
        have = end - body
        target[:have] = self._view[body:end]
        self._rest, self._then = target[have:], then

    def _payload(self, entry: Pending, cookie: int, word: int, payload: bytearray) -> None:
        """A chunk that is no data, complete."""
        kind = word & 0xFFFF
        view = memoryview(payload)
        if kind & c.REPLY_TYPE_FLAG_ERROR:
            code, message, _ = parse_error(view, kind == c.REPLY_TYPE_ERROR_OFFSET)
            error = self._error(code, message)
            if not isinstance(entry, (Read, Status, _Failed)):
                entry = self.pending[cookie] = _Failed(entry)
            entry.error = entry.error or error
        elif isinstance(entry, Read):
            entry.cover(*parse_hole(view))
        elif isinstance(entry, Status):
            entry.add(*parse_status(view, self._extended))
        if word & _DONE:
            assert isinstance(entry, (Read, Status, _Failed))
            self._finish(entry, cookie)

    def _finish(self, entry: Read | Status | _Failed, cookie: int) -> None:
        """The last chunk has come."""
        if entry.error is None:
            entry.check()
        self.pending.pop(cookie, None)
        if isinstance(entry, Read) and entry.length > LONG:
            self.long_reads -= 1
        entry.finish()

    # Errors.

    def _error(self, code: int, message: str = "") -> OSError:
        if code == c.ESHUTDOWN:
            self.shutting_down = True
            return ConnectionLost(message or "the server is shutting down", errno.ESHUTDOWN)
        number = _ERRNO.get(code, errno.EINVAL)
        return OSError(number, explained(number, message))

    def _unknown(self, cookie: int) -> ProtocolError:
        return ProtocolError(f"a reply with cookie {cookie:#x}, which no request has")
