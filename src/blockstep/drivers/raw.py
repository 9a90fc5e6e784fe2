"""Driver ``raw``: the bytes of its child ``file`` as a disk, all of them or a window.

Without options it stands for "this is no image format" and shows the child as it is. ``offset`` and ``size`` cut a
window out of it: a partition, or one of several disks in a file. A request returns the child's own coroutine with
the offset moved, so the layer costs a function call. Permissions pass through as by a filter; it is none, because
with a window it is not the same disk as its child.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from typing import Any, ClassVar

from blockstep.block.driver import Buffer, Driver, Extent, not_supported
from blockstep.block.node import Child, NodeOptions, NodeRef
from blockstep.block.permissions import RESIZE, Permission, Role
from blockstep.block.registry import register
from blockstep.block.status import status_through
from blockstep.errors import OptionError


class RawOptions(NodeOptions, tag="raw"):
    """``file``: the child; ``offset``, ``size``: the window in bytes (default: up to the child's end)."""

    file: NodeRef
    offset: int = 0
    size: int | None = None


@register
class Raw(Driver):
    """See the module."""

    driver: ClassVar[str] = "raw"
    Options = RawOptions
    options: RawOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}
    file: Child

    @property
    def length(self) -> int:  # type: ignore[override]
        size = self.options.size
        return max(0, self.file.node.length - self._offset) if size is None else size

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        """A window of fixed size needs what lies under it to stay as long as it is."""
        taken, shared = super().child_permissions(child, taken, shared)
        return taken, shared if self.options.size is None else shared & ~RESIZE

    async def open(self) -> None:
        self._offset = self.options.offset
        there = self.file.node.length
        if not 0 <= self._offset <= there:
            raise OptionError("offset", self._offset, f"from 0 to the child's length, {there}")
        size = self.options.size
        if size is not None and not 0 <= size <= there - self._offset:
            raise OptionError("size", size, f"from 0 to {there - self._offset}, which the child has from the offset on")

    def shown_as(self) -> Driver | None:
        return None if self.options.offset or self.options.size is not None else self.file.node

    def occupied(self) -> int | None:
        return self.file.node.occupied()

    def pread(self, offset: int, length: int) -> Coroutine[Any, Any, Buffer]:
        return self.file.pread(offset + self._offset, length)

    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]:
        return self.file.begin_read(offset + self._offset, length)

    def begin_write(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        return self.file.begin_write(offset + self._offset, data)

    def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> Coroutine[Any, Any, None]:
        return self.file.pwrite(offset + self._offset, data, flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> Coroutine[Any, Any, None]:
        return self.file.write_zeroes(offset + self._offset, length, flags)

    def discard(self, offset: int, length: int) -> Coroutine[Any, Any, None]:
        return self.file.discard(offset + self._offset, length)

    def flush(self) -> Coroutine[Any, Any, None]:
        return self.file.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        extents = await status_through(self.file.node, offset + self._offset, length)
        return [extent._replace(allocated=True, depth=1) for extent in extents]

    def raw_range(self, offset: int, length: int) -> tuple[int, int] | None:
        return self.file.node.raw_range(offset + self._offset, length)

    async def truncate(self, length: int) -> None:
        if self.options.size is not None:
            raise not_supported("resize of a window with a fixed size")
        await self.file.resize(self._offset + length)
