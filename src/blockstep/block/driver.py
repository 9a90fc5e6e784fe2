"""The driver contract: what a node of the block graph does with data.

A node *is* an instance of its driver. This module says what each operation promises; `blockstep.block.node`
says how a node hangs in the graph. The border (`blockstep.block.io`) has checked range, flags and permissions
before a driver sees a request, and drivers call each other without further checks, so:

* ``offset`` and ``length`` are bytes, lie inside the node, may have any alignment, and ``length`` is not 0;
* the data of a write is valid until the coroutine ends; a driver that wants it longer takes a copy;
* what a read returns belongs to nobody: the caller may keep it and must not write into it;
* a request that fails raises `OSError`; after a failed write the range holds old data, new data or a mixture;
* overlapping requests in flight may take effect in either order, unless a driver promises more;
* *durable* means: survives a crash of the machine. A write is durable after the next successful `flush` that was
  started after the write ended, or at its own return if it carries FUA.

Only what a driver changes is overridden: `Filter` passes everything on to its child ``file``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

from blockstep.aio import Buffer as Buffer
from blockstep.aio.inline import submit
from blockstep.aio.posix import Fault
from blockstep.aio.rangelock import RangeLock
from blockstep.block.node import Child, Node, NodeOptions, NodeRef
from blockstep.block.permissions import Role
from blockstep.errors import OptionError

#: The write is durable when it returns.
FUA: Final = 1
#: Zeroes may be stored as a hole.
MAY_UNMAP: Final = 2
#: Fail with ENOTSUP rather than write zeroes as slowly as data.
FAST: Final = 4


def _nothing() -> None:
    pass


class Extent(NamedTuple):
    """What a node knows about a run of bytes, without reading it."""

    length: int  #: bytes, more than 0
    data: bool = True  #: occupies storage
    zero: bool = False  #: reads as zeroes
    allocated: bool = True  #: the node itself decides the content; False: its backing node does
    depth: int = 1  #: layers down to the one that decides, 1 is this node; 0: nobody (set by `status`)


class Prepared:
    """A change of a node in its second half: everything that can fail is done, and nothing has changed yet.

    This is how several nodes change together or not at all: prepare all of them, then commit all of them.
    """

    __slots__ = ("abort", "commit", "finish")

    def __init__(self, commit: Callable[[], None] = _nothing, abort: Callable[[], None] = _nothing,
                 finish: Callable[[], Awaitable[None]] | None = None) -> None:
        #: Take effect, now. Cannot fail, does not wait.
        self.commit = commit
        #: Forget it; the node stays as it is.
        self.abort = abort
        #: Of a change of options only: what is to be done on the disk after all nodes have committed, or aborted, and
        #: before requests go on. Raises nothing.
        self.finish = finish


def not_supported(what: str) -> OSError:
    """The error of an operation that a driver does not have."""
    return OSError(errno.ENOTSUP, f"{os.strerror(errno.ENOTSUP)}: {what}")


class Driver(Node):
    """A node with data. See the module for the promises that hold for all operations."""

    #: The value of ``driver`` in the options.
    driver: ClassVar[str]
    #: What the options look like; a subclass of NodeOptions whose tag is ``driver``.
    Options: ClassVar[type[NodeOptions]]
    #: Whether `prepare_empty` works.
    can_be_emptied: ClassVar[bool] = False

    #: Bytes, a power of two: a write of a part of a cluster may read the rest of it from the backing node.
    cluster_size: int = 65536
    #: The node's size in bytes. Changes only in `truncate` (or a child's).
    length: int = 0
    #: Taken shared by who asks several nodes below this one for the status of a range, in one answer: while it is
    #: held, what they hold there moves from none to another. None: nobody moves anything.
    read_lock: RangeLock | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A driver that overrides `pread` or `pwrite` only is asked through it, whatever its base class does."""
        super().__init_subclass__(**kwargs)
        for operation, quick in (("pread", "begin_read"), ("pwrite", "begin_write")):
            if operation in cls.__dict__ and quick not in cls.__dict__:
                setattr(cls, quick, getattr(Driver, quick))

    # --- what lies below ---

    def chain(self) -> Iterator[Driver]:
        """The node, and what shows through it: what a filter filters, the backing node of others, and so on down."""
        node: Driver | None = self
        while node is not None:
            yield node
            edge = node.children.get("file" if node.is_filter else "backing")
            node = None if edge is None else edge.node

    def unfiltered(self) -> Driver:
        """The first node down from this one that is no filter: filters are no layers."""
        node = self
        while node.is_filter and "file" in node.children:
            node = node.children["file"].node
        return node

    def stored_in(self) -> Iterator[Driver]:
        """The node and those that it stands on: without backing nodes, and targets of filters. Parents come first."""
        yield self
        for child in self.children.values():
            if child.role not in (Role.BACKING, Role.TARGET):
                yield from child.node.stored_in()

    def shown_as(self) -> str | Driver | None:
        """What it is called where a file name is shown: a path, a URI, or a node below whose name is its name as well.

        None: it is called by its options. The node is open.
        """
        return None

    def occupied(self) -> int | None:
        """Bytes that it takes where its data lies, if that is known. Raises OSError."""
        return self.children["file"].node.occupied() if self.is_filter and "file" in self.children else None

    # --- life ---

    async def implied_children(self) -> Sequence[tuple[str, Role, NodeRef]]:
        """Children that an image itself names, to be opened like those of the options: (child name, role, options).

        Asked before `open`, when the children that the options name are attached and open.
        """
        return ()

    async def open(self) -> None:
        """Get hold of the storage. The children are attached and open. Sets `length`.

        Raises OSError, or OptionError for a bad combination; a driver that raises has released what it held.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Release everything. Nothing is in flight. Flushes nothing: who needs durability has flushed before."""

    # --- requests ---

    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes from ``offset`` on."""
        raise NotImplementedError

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        """Write all of ``data``. ``flags``: FUA."""
        raise not_supported("write")

    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]:
        """`pread` for those who count: the data if it is at hand, else a coroutine that has not begun.

        Coroutines that end at once cost 0.2 us each, in every layer. Who gets one begins it before anything else
        happens. A driver that overrides this may make its `pread` of it, calling it by the name of its class: in a
        subclass with a `pread` of its own ``self.begin_read`` is that.
        """
        return self.pread(offset, length)

    def begin_write(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        """`pwrite` without flags in the same way: None if it is done, or else what to await, at once.

        Where somebody else goes on with it (a reply from a peer), a `Completion` is best: it costs no coroutine.
        """
        return self.pwrite(offset, data)

    def submit_write(self, offset: int, data: Buffer, flags: int,
                     done: Callable[[BaseException | None], None]) -> None:
        """`pwrite` for those who count: ``done(error or None)`` is called at its end, perhaps before this returns."""
        submit(self.pwrite(offset, data, flags), done)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make a range read as zeroes. ``flags``: FUA, MAY_UNMAP, FAST."""
        if flags & FAST:
            raise not_supported("fast zeroes")
        end = offset + length
        while offset < end:
            piece = min(end - offset, len(ZEROES))
            await self.pwrite(offset, ZEROES[:piece], flags & FUA)
            offset += piece

    async def discard(self, offset: int, length: int) -> None:
        """Advice that the content of a range is not needed; afterwards it reads as old data or as zeroes."""

    async def flush(self) -> None:
        """Make all writes that have ended durable."""

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """What is known of the range: at least one extent, from ``offset`` on, together at most ``length``."""
        return [Extent(length)]

    def raw_range(self, offset: int, length: int) -> tuple[int, int] | None:
        """A file descriptor and an offset in it where the range lies as it is, for the kernel to copy from.

        None if there is no such place, and for filters. Good until the next write to the range, change of the
        options or make_empty. Copying *to* the place would go past the node: `clone_in` and `copy_in` do that.
        """
        return None

    def storage_fault(self) -> Fault | None:
        """What somebody else has done to the node's own storage since it was opened.

        May wait, and is called in a thread, beside requests, resizes and `close` (then it may say anything).
        Raises nothing.
        """
        return None

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Write clusters so that they take less room. Whole ones, at cluster boundaries; the disk may end in the last.

        Raises OSError: EINVAL for other ranges, ENOTSUP where nothing is compressed.
        """
        raise not_supported("compressed writes")

    async def clone_in(self, of: tuple[int, int], offset: int, length: int) -> bool:
        """Have the kernel write to a range what lies in a file, ``of`` (descriptor, offset), which may be shared then.

        False: not possible here, and nothing was done. Raises OSError; then the range is as after a failed write.
        """
        return False

    async def copy_in(self, of: tuple[int, int], offset: int, length: int,
                      piece: int) -> list[tuple[int, bool]] | None:
        """Write to a range what lies in a file, ``of`` (descriptor, offset), read and written in one go in a thread.

        Returns the range as runs of (bytes, whether they are zeroes); zeroes are looked for in pieces of ``piece``
        bytes (0: not at all), and the caller has to write them, or knows that they are there. None: this is not
        possible here, for this range, and nothing was done. Raises OSError; then the range is as after a failed write.
        """
        return None

    async def truncate(self, length: int) -> None:
        """Change the size; what is added reads as zeroes. Called through `Node.resize`.

        Raises OSError; then a disk that was to grow is as it was. One that was to shrink may have the new length:
        what is cut off has no way back.
        """
        raise not_supported("resize")

    async def prepare_empty(self) -> Prepared:
        """Get ready to drop all that the node itself holds, so that its backing node (or zeroes) shows through.

        In two halves, so that several nodes become empty together or not at all. Nothing must be in flight
        between the two. Takes the same time however much the node holds.
        """
        raise not_supported("make_empty")

    async def make_empty(self) -> None:
        """Drop all that the node itself holds. Durable after the next flush."""
        (await self.prepare_empty()).commit()

    def check_bitmap(self, name: str, granularity: int) -> None:
        """Whether the node can store a further bitmap. Raises OptionError: ``persistent``, if it cannot."""
        raise OptionError("persistent", True, f"off: node '{self.name}' (driver {self.driver}) does not store bitmaps")

    async def keep_bitmaps(self) -> None:
        """Make durable which of the node's bitmaps are persistent; nothing is in flight. Raises OSError."""

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        """Get ready to change options of the open node. ``options`` always has ``read-only``.

        Raises OptionError for an option that cannot be changed while the node is open. `Graph.reopen` flushes a node
        that becomes read-only, checks the permissions and sets `read_only`; a driver does what its storage needs
        (open the file anew).
        """
        for option in options:
            if option != "read-only":
                raise OptionError(option, options[option], "left alone: it cannot be changed while the node is open")
        return Prepared()


class Filter(Driver):
    """A driver that passes its child ``file`` through, except for what a subclass overrides."""

    is_filter = True
    file: Child

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.file.node.length

    async def open(self) -> None:
        pass

    async def pread(self, offset: int, length: int) -> Buffer:
        return await self.file.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self.file.pwrite(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.file.discard(offset, length)

    async def flush(self) -> None:
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self.file.block_status(offset, length)

    async def truncate(self, length: int) -> None:
        await self.file.resize(length)

    async def prepare_empty(self) -> Prepared:
        return await self.file.node.prepare_empty()


ZEROES: Final = memoryview(bytes(1 << 20))
