"""Driver ``memory``: a disk in RAM, sparse, gone when it is closed.

The content lies in a memfd: the kernel gives out a page when it is first written, and takes it back when a hole is
punched for zeroes or a discard. Nothing waits for a device, so all requests end at once, except that copies and
holes of many megabytes go to a thread. Nothing is ever durable; flush and FUA succeed.
"""

from __future__ import annotations

import os
from typing import ClassVar, Final

from blockstep.aio.copying import clone
from blockstep.aio.pool import in_thread
from blockstep.aio.posix import INLINE, punch_hole, read_whole, set_length, write_whole
from blockstep.block.driver import MAY_UNMAP, ZEROES, Buffer, Driver, Extent
from blockstep.block.node import NodeOptions
from blockstep.block.registry import register
from blockstep.drivers.file import file_status
from blockstep.errors import OptionError

#: Zeroes up to this many bytes are written; a hole costs a system call more than it saves.
_FEW_ZEROES: Final = 64 << 10
#: Holes of more bytes are punched in a thread: freeing 1 MiB takes some 50 us.
_LONG_HOLE: Final = 4 << 20


class MemoryOptions(NodeOptions, tag="memory"):
    """``size``: the length in bytes."""

    size: int


@register
class Memory(Driver):
    """See the module."""

    driver: ClassVar[str] = "memory"
    Options = MemoryOptions
    options: MemoryOptions

    async def open(self) -> None:
        if self.options.size < 0:
            raise OptionError("size", self.options.size, "0 or more bytes")
        self.fd = os.memfd_create("blockstep-memory")
        try:
            set_length(self.fd, self.options.size, self.name)
        except OSError:
            os.close(self.fd)
            raise
        self.length = self.options.size

    async def close(self) -> None:
        await in_thread(os.close, self.fd)

    def occupied(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    async def pread(self, offset: int, length: int) -> Buffer:
        if length <= INLINE:
            return os.pread(self.fd, length, offset)
        return await in_thread(read_whole, self.fd, length, offset)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        if len(data) > INLINE or os.pwrite(self.fd, data, offset) != len(data):
            await in_thread(write_whole, self.fd, data, offset)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if length <= _FEW_ZEROES and not flags & MAY_UNMAP:
            await self.pwrite(offset, ZEROES[:length])
        else:
            await self.discard(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        if length <= _LONG_HOLE:
            punch_hole(self.fd, offset, length)
        else:
            await in_thread(punch_hole, self.fd, offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return file_status(self.fd, offset, length)

    def raw_range(self, offset: int, length: int) -> tuple[int, int] | None:
        return self.fd, offset

    async def clone_in(self, of: tuple[int, int], offset: int, length: int) -> bool:
        return await in_thread(clone, of, (self.fd, offset), length)

    async def truncate(self, length: int) -> None:
        set_length(self.fd, length, self.name)
        self.length = length
