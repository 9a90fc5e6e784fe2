"""What the commands do, all but the plain reads and writes that `connection` runs itself.

A command is one entry of `_COMMANDS`: which flags it knows, whether it writes, and the coroutine that does it. What
must hold for each of them is checked here, once, before the coroutine exists, with the errors that the protocol names:

    unknown command, unknown or misplaced flag, range outside the export      EINVAL
    a write outside the export                                                ENOSPC
    a write on a read-only export                                             EPERM
    a read of more than the maximum payload                                   EOVERFLOW

A coroutine returns the pieces of its reply. Errors of storage are OSErrors; `nbd_error` turns them into the
protocol's eight.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Buffer
from blockstep.errors import ProtocolError
from blockstep.nbd import constants as c
from blockstep.nbd.contexts import extents_of
from blockstep.nbd.export import Export
from blockstep.nbd.forms import EXTENDED, Form, status_payload
from blockstep.nbd.wire import Request, parse_status_query

#: How much of a CACHE request is read at once, and at most.
_CACHE_PIECE: Final = 1 << 20
_CACHE_MOST: Final = 32 << 20
#: Of block status: some 250 bytes for each extent, and so much work that few may be at it together; for an answer of
#: one extent (REQ_ONE) as many are looked at as there are in the first window.
_STATUS_COST: Final = 16 << 20
#: Zeroes that storage may write at once rather than elsewhere.
_ZEROES_COST: Final = 64 << 10
#: Of a range without data: a byte for so many (as a power of two), for the bits of its clusters. 1 TiB takes 40 ms.
_RANGE_COST: Final = 16

_ERRORS: Final = {
    errno.EPERM: c.EPERM, errno.EROFS: c.EPERM, errno.EACCES: c.EPERM,
    errno.ENOMEM: c.ENOMEM,
    errno.EINVAL: c.EINVAL,
    errno.ENOSPC: c.ENOSPC, errno.EFBIG: c.ENOSPC, errno.EDQUOT: c.ENOSPC,
    errno.EOVERFLOW: c.EOVERFLOW,
    errno.ENOTSUP: c.ENOTSUP, errno.EOPNOTSUPP: c.ENOTSUP,
    errno.ESHUTDOWN: c.ESHUTDOWN,
}


def nbd_error(error: BaseException, request: Request) -> int:
    """The protocol's error for what a request met. ENOTSUP is for fast zeroes only; elsewhere it is EINVAL."""
    code = _ERRORS.get(error.errno or 0, c.EIO) if isinstance(error, OSError) else c.EIO
    if code == c.ENOTSUP and not (request[0] == c.CMD_WRITE_ZEROES and request[1] & c.CMD_FLAG_FAST_ZERO):
        return c.EINVAL
    return code


class Session(msgspec.Struct, frozen=True):
    """What a connection has agreed on with its client."""

    export: Export
    form: Form
    contexts: tuple[str, ...] = ()

    @property
    def extended(self) -> bool:
        """Whether the extended headers are in use."""
        return self.form is EXTENDED


Pieces = list[Buffer]
_Run = Callable[[Session, Request], Coroutine[Any, Any, Pieces]]


class _Command(msgspec.Struct, frozen=True):
    run: _Run
    flags: int
    writes: bool = False
    has_range: bool = True


def prepare(session: Session, request: Request) -> Coroutine[Any, Any, Pieces]:
    """The coroutine that does ``request`` and returns its reply. Raises OSError at once if it must not be done."""
    type, flags, _, offset, length, payload = request
    command = _COMMANDS.get(type)
    if command is None:
        raise OSError(errno.EINVAL, f"unknown command {type}")
    _check_flags(session, command, type, flags)
    if command.writes and session.export.read_only:
        raise OSError(errno.EPERM, "the export is read-only")
    if command.has_range and payload is None:
        size = session.export.length
        if offset + length > size:
            code = errno.ENOSPC if type in (c.CMD_WRITE, c.CMD_WRITE_ZEROES) else errno.EINVAL
            raise OSError(code, f"{length} bytes at {offset} are not inside the export of {size} bytes")
    return command.run(session, request)


def _check_flags(session: Session, command: _Command, type: int, flags: int) -> None:
    allowed = command.flags | c.CMD_FLAG_FUA
    if not session.form.chunks:
        allowed &= ~c.CMD_FLAG_DF
    if not session.extended:
        allowed &= ~c.CMD_FLAG_PAYLOAD_LEN
    if flags & ~allowed:
        raise OSError(errno.EINVAL, f"command {type} does not take the flags {flags & ~allowed:#x}")


def cost(request: Request) -> int:
    """How many bytes of memory the request may hold while it is in flight, or move if it ends at once."""
    type, _, _, _, length, payload = request
    if type == c.CMD_BLOCK_STATUS:
        return _STATUS_COST
    if type == c.CMD_READ or payload is not None:
        return length
    if type == c.CMD_CACHE:
        return min(length, _CACHE_MOST)
    if type in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
        at_once = min(length, _ZEROES_COST) if type == c.CMD_WRITE_ZEROES else 0
        return max(at_once, min(length >> _RANGE_COST, _STATUS_COST))
    return 0


async def _read(session: Session, request: Request) -> Pieces:
    _, _, cookie, offset, length, _ = request
    if length > c.MAX_PAYLOAD:
        raise OSError(errno.EOVERFLOW, f"a read may have at most {c.MAX_PAYLOAD} bytes")
    if not length:
        return [session.form.nothing(cookie, offset)]
    data = await session.export.backend.pread(offset, length)
    return [session.form.read(cookie, offset, length), data]


async def _write(session: Session, request: Request) -> Pieces:
    _, flags, cookie, offset, length, payload = request
    size = session.export.length
    if offset + length > size:
        raise OSError(errno.ENOSPC, f"{length} bytes at {offset} are not inside the export of {size} bytes")
    if length:
        assert payload is not None
        await session.export.backend.pwrite(offset, payload, FUA if flags & c.CMD_FLAG_FUA else 0)
    elif flags & c.CMD_FLAG_FUA:
        await session.export.backend.flush()
    return [session.form.done(cookie, offset)]


async def _flush(session: Session, request: Request) -> Pieces:
    _, _, cookie, offset, length, _ = request
    if offset or length:
        raise OSError(errno.EINVAL, "a flush has no range")
    if not session.export.read_only:
        await session.export.backend.flush()
    return [session.form.done(cookie, offset)]


async def _trim(session: Session, request: Request) -> Pieces:
    _, flags, cookie, offset, length, _ = request
    if length:
        await session.export.backend.discard(offset, length)
    if flags & c.CMD_FLAG_FUA:
        await session.export.backend.flush()
    return [session.form.done(cookie, offset)]


async def _cache(session: Session, request: Request) -> Pieces:
    _, _, cookie, offset, length, _ = request
    end = offset + min(length, _CACHE_MOST)
    for position in range(offset, end, _CACHE_PIECE):
        await session.export.backend.pread(position, min(_CACHE_PIECE, end - position))
    return [session.form.done(cookie, offset)]


async def _write_zeroes(session: Session, request: Request) -> Pieces:
    _, flags, cookie, offset, length, _ = request
    if length:
        how = 0 if flags & c.CMD_FLAG_NO_HOLE else MAY_UNMAP
        if flags & c.CMD_FLAG_FUA:
            how |= FUA
        if flags & c.CMD_FLAG_FAST_ZERO:
            how |= FAST
        await session.export.backend.write_zeroes(offset, length, how)
    return [session.form.done(cookie, offset)]


async def _block_status(session: Session, request: Request) -> Pieces:
    _, flags, cookie, offset, length, payload = request
    wanted: tuple[int, ...] = tuple(range(len(session.contexts)))
    if payload is not None:
        length, wanted = _status_query(session, payload)
    size = session.export.length
    if not wanted or not length or offset + length > size:
        raise OSError(errno.EINVAL, "block status needs a selected context and a range inside the export")
    answers = await extents_of(session.export, [session.contexts[number] for number in wanted],
                               offset, length, bool(flags & c.CMD_FLAG_REQ_ONE), session.extended)
    kind = c.REPLY_TYPE_BLOCK_STATUS_EXT if session.extended else c.REPLY_TYPE_BLOCK_STATUS
    return [session.form.chunk(cookie, offset, kind, status_payload(number, extents, session.extended),
                               number == wanted[-1])
            for number, extents in zip(wanted, answers, strict=True)]


def _status_query(session: Session, payload: memoryview) -> tuple[int, tuple[int, ...]]:
    known = len(session.contexts)
    try:  # what is longer has one of them twice: not to be taken apart, it may have millions
        length, wanted = parse_status_query(payload[:8 + 4 * (known + 1)])
    except ProtocolError as error:
        raise OSError(errno.EINVAL, str(error)) from None
    if len(set(wanted)) != len(wanted) or any(number >= known for number in wanted):
        raise OSError(errno.EINVAL, "block status asks for an unknown context, or for one of them twice")
    return length, wanted


_COMMANDS: Final[dict[int, _Command]] = {
    c.CMD_READ: _Command(_read, c.CMD_FLAG_DF),
    c.CMD_WRITE: _Command(_write, 0, writes=True),
    c.CMD_FLUSH: _Command(_flush, 0, has_range=False),
    c.CMD_TRIM: _Command(_trim, 0, writes=True),
    c.CMD_CACHE: _Command(_cache, 0),
    c.CMD_WRITE_ZEROES: _Command(_write_zeroes, c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO, writes=True),
    c.CMD_BLOCK_STATUS: _Command(_block_status, c.CMD_FLAG_REQ_ONE | c.CMD_FLAG_PAYLOAD_LEN),
}
