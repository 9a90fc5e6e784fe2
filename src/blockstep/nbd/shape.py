"""Requests of any shape made into such as a server takes: aligned, and not too long.

    minimum block  ├──────┼──────┼──────┼──────┼──────┤
    read                ▒▒▒▒▒▒▒▒▒▒▒▒                      widened, and the middle handed out
    write               ▒▒▒▒▒▒▒▒▒▒▒▒                      first and last block read, modified, written
    zeroes              ▒▒▒▒▒▒▒▒▒▒▒▒                      ends like a write, the middle as zeroes
    trim, cache         ▒▒▒▒▒▒▒▒▒▒▒▒                      advice: narrowed, and widened
    block status        ▒▒▒▒▒▒▒▒▒▒▒▒                      widened, and the ends cut off

Between the reading and the writing of a misaligned write nobody else may write these blocks: it takes
`Client.blocks` exclusively over them, aligned writes take it shared. That holds for one connection: who writes
the same block through another one has to know. Servers with a minimum block of 1 need none of this.

What is longer than the maximum payload goes out in pieces, all at once; the request fails with the first piece's
error, after all have ended. FUA that a server does not have becomes a flush behind the write.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Final

from blockstep.aio import Buffer
from blockstep.aio.inline import together
from blockstep.nbd import constants as c

if TYPE_CHECKING:
    from blockstep.nbd.client import Client

#: The longest request without data: 32 bits hold it, and all minimum blocks divide it.
_LONGEST: Final = 1 << 31
_LONGEST_EXTENDED: Final = 1 << 62


async def read(client: Client, offset: int, length: int) -> Buffer:
    """`Client.pread`."""
    start, end = _widen(client, offset, length)
    pieces = await _all(client.read_as_is(at, count)
                        for at, count in _split(start, end, client.info.maximum_payload))
    data: Buffer = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    return data if len(data) == length else memoryview(data)[offset - start:offset - start + length]


async def write(client: Client, offset: int, data: Buffer, flags: int) -> None:
    """`Client.pwrite`."""
    emulate = flags & c.CMD_FLAG_FUA and not client.info.flags & c.FLAG_SEND_FUA
    if emulate:
        flags &= ~c.CMD_FLAG_FUA
    start, end = _widen(client, offset, len(data))
    aligned = end - start == len(data)
    if client.info.minimum_block == 1:
        await _write(client, start, data, flags)
    else:
        token = await client.blocks.take(start, end, shared=aligned)
        try:
            await _write(client, start, data if aligned else await _modify(client, offset, data), flags)
        finally:
            client.blocks.give_back(token)
    if emulate:
        await client.flush()


async def zero(client: Client, offset: int, length: int, flags: int) -> None:
    """`Client.write_zeroes`."""
    emulate = flags & c.CMD_FLAG_FUA and not client.info.flags & c.FLAG_SEND_FUA
    if emulate:
        flags &= ~c.CMD_FLAG_FUA
    start, end = _narrow(client, offset, length)
    if start > offset:
        await write(client, offset, bytes(start - offset), flags & c.CMD_FLAG_FUA)
    if start < end:
        token = await client.blocks.take(start, end, shared=True)
        try:
            await _all(client.request(c.CMD_WRITE_ZEROES, flags, at, count)
                       for at, count in _split(start, end, _longest(client)))
        finally:
            client.blocks.give_back(token)
    if end < offset + length:
        await write(client, end, bytes(offset + length - end), flags & c.CMD_FLAG_FUA)
    if emulate:
        await client.flush()


async def trim(client: Client, offset: int, length: int) -> None:
    """`Client.discard`."""
    start, end = _narrow(client, offset, length)
    if start < end:
        token = await client.blocks.take(start, end, shared=True)
        try:
            await _all(client.request(c.CMD_TRIM, 0, at, count) for at, count in _split(start, end, _longest(client)))
        finally:
            client.blocks.give_back(token)


async def cache(client: Client, offset: int, length: int) -> None:
    """`Client.cache`."""
    start, end = _widen(client, offset, length)
    await _all(client.request(c.CMD_CACHE, 0, at, count) for at, count in _split(start, end, _longest(client)))


async def status(client: Client, offset: int, length: int, context: int) -> list[tuple[int, int]]:
    """`Client.block_status`, of the context with this id."""
    start, end = _widen(client, offset, length)
    told = (await client.status_as_is(start, min(end - start, _longest(client))))[context]
    extents = []
    skip, left = offset - start, length
    for told_length, flags in told:
        dropped = min(skip, told_length)
        skip -= dropped
        count = min(told_length - dropped, left)
        left -= count
        if count:
            extents.append((count, flags))
    if not extents:
        raise OSError(errno.EIO, "the server told of less than one of its own blocks")
    return extents


async def _write(client: Client, offset: int, data: Buffer, flags: int) -> None:
    if len(data) <= client.info.maximum_payload:
        await client.write_as_is(offset, data, flags)
        return
    view = memoryview(data)
    await _all(client.write_as_is(at, view[at - offset:at - offset + count], flags)
               for at, count in _split(offset, offset + len(data), client.info.maximum_payload))


async def _modify(client: Client, offset: int, data: Buffer) -> bytes:
    """``data`` with what stands around it in its first and last block."""
    block = client.info.minimum_block
    end = offset + len(data)
    before, after = offset % block, -end % block
    first = end - end % block == offset - before
    head = tail = b""
    if before or (first and after):
        head = bytes(await client.read_as_is(offset - before, block))
    if after:
        tail = head if first else bytes(await client.read_as_is(end + after - block, block))
    return b"".join((head[:before], data, tail[block - after:] if after else b""))


async def _all(requests: Iterator[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run them together; raise the first error when all have ended."""
    results = await together(requests)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _widen(client: Client, offset: int, length: int) -> tuple[int, int]:
    block = client.info.minimum_block
    return offset & -block, (offset + length + block - 1) & -block


def _narrow(client: Client, offset: int, length: int) -> tuple[int, int]:
    """The whole blocks inside; if there are none, an empty range inside of it."""
    block = client.info.minimum_block
    start, end = (offset + block - 1) & -block, (offset + length) & -block
    return (start, end) if start < end else (offset + length, offset + length)


def _split(start: int, end: int, longest: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, longest):
        yield at, min(longest, end - at)


def _longest(client: Client) -> int:
    return _LONGEST_EXTENDED if client.info.extended else _LONGEST
