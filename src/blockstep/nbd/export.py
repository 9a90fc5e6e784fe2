"""What a server offers: exports, and the catalogue of them.

An export is a `Backend` (a user of a node) under a name. It can be served to any number of clients at a time, and
says so with CAN_MULTI_CONN: all connections share one node, and a flush on one covers what was written on all.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from blockstep.aio.inline import Completion
from blockstep.block.driver import Buffer, Extent
from blockstep.errors import BlockstepError, OptionError
from blockstep.nbd import constants as c

if TYPE_CHECKING:
    from blockstep.nbd.connection import Connection

#: Minimum block size, preferred block size, maximum payload: any alignment, whole pages at best.
BLOCK_SIZES: Final = (1, 4096, c.MAX_PAYLOAD)


class Storage(Protocol):
    """What an export serves; `blockstep.block.io.Backend` is one. Offsets and lengths are bytes."""

    @property
    def length(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    async def pread(self, offset: int, length: int) -> Buffer: ...
    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None: ...
    def begin_read(self, offset: int, length: int) -> Buffer | Coroutine[Any, Any, Buffer]: ...
    def begin_write(self, offset: int, data: Buffer) -> Coroutine[Any, Any, None] | Completion[None] | None: ...
    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...
    async def block_status(self, offset: int, length: int) -> list[Extent]: ...


class BitmapExtents(Protocol):
    """A bitmap that can be shown as ``qemu:dirty-bitmap:NAME``. Beyond its ``length`` anything may be dirty."""

    length: int

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        """The range as consecutive runs of (length in bytes, dirty)."""


class ExportInUse(BlockstepError):
    """An export cannot be removed safely: clients are connected to it."""

    def __init__(self, name: str, connections: int) -> None:
        super().__init__(f"export '{name}' is in use by {connections} connection{'s' if connections > 1 else ''}")
        self.name, self.connections = name, connections


class Export:
    """A named disk of a server."""

    def __init__(self, name: str, backend: Storage, *, read_only: bool = False, description: str = "",
                 multi_conn: bool = True, rotational: bool = False,
                 bitmaps: Mapping[str, BitmapExtents] | None = None, allocation_depth: bool = True) -> None:
        """``read_only`` holds as well if the backend is so. ``bitmaps`` are shown as dirty bitmaps, by name.

        ``allocation_depth``: offer qemu:allocation-depth.

        Raises OptionError if name or description is no string of the protocol (4096 bytes of UTF-8, no NUL).
        """
        _check_string("name", name)
        _check_string("description", description)
        self.name = name
        self.backend = backend
        self.description = description
        self.multi_conn = multi_conn
        self.rotational = rotational
        self.allocation_depth = allocation_depth
        self.bitmaps: dict[str, BitmapExtents] = dict(bitmaps or {})
        self.connections: set[Connection] = set()
        #: Called with each error that a client's request is answered with, whoever's fault it is.
        self.on_error: Callable[[OSError], None] = lambda error: None
        #: Requests of clients that the backend has not ended yet; those of clients that are gone count as well.
        self.in_flight = 0
        self._read_only = read_only
        self._idle: list[Completion[None]] = []

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._read_only or self.backend.read_only

    @property
    def length(self) -> int:
        """Bytes, now."""
        return self.backend.length

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """Minimum and preferred block size, maximum payload, in bytes."""
        return BLOCK_SIZES

    @property
    def flags(self) -> int:
        """Transmission flags, but for those that depend on the negotiation."""
        flags = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_CACHE
        if self.read_only:
            flags |= c.FLAG_READ_ONLY
        else:
            flags |= c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO
        if self.multi_conn:
            flags |= c.FLAG_CAN_MULTI_CONN
        if self.rotational:
            flags |= c.FLAG_ROTATIONAL
        return flags

    def context_names(self) -> list[str]:
        """The metadata contexts that a client can select."""
        depth = [c.QEMU_ALLOCATION_DEPTH] if self.allocation_depth else []
        return [c.BASE_ALLOCATION, *depth, *(c.QEMU_DIRTY_BITMAP + name for name in self.bitmaps)]

    async def wait_idle(self) -> None:
        """Wait until no request of any client, present or gone, is in flight in the backend."""
        while self.in_flight:
            waiter: Completion[None] = Completion()
            self._idle.append(waiter)
            await waiter

    def ended(self) -> None:
        """One request less in flight."""
        self.in_flight -= 1
        if not self.in_flight and self._idle:
            waiting, self._idle = self._idle, []
            for waiter in waiting:
                waiter.set_result(None)


class Exports:
    """The exports of a server by name. Implements `blockstep.nbd.handshake.Catalogue`."""

    def __init__(self) -> None:
        self._by_name: dict[str, Export] = {}
        #: The name of the export that a client gets who asks for the empty name.
        self.default: str | None = None

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._by_name.values()))

    def add(self, export: Export) -> None:
        """Offer an export. Raises OptionError if its name is taken."""
        if export.name in self._by_name:
            raise OptionError("name", export.name, "the name of no other export")
        self._by_name[export.name] = export

    def remove(self, name: str) -> Export:
        """Take an export away. Raises OptionError if there is none with this name."""
        if name not in self._by_name:
            raise OptionError("name", name, "the name of an export")
        return self._by_name.pop(name)

    def find(self, name: str) -> Export | None:
        """The export with this name, or the default export for the empty name."""
        export = self._by_name.get(name)
        if export is None and not name and self.default is not None:
            export = self._by_name.get(self.default)
        return export

    def list(self) -> Iterator[Export]:
        """All exports, in the order in which they were added."""
        return iter(self)


def _check_string(option: str, text: str) -> None:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = b"\0"
    if b"\0" in data or len(data) > c.MAX_STRING:
        raise OptionError(option, text, f"a string of at most {c.MAX_STRING} bytes of UTF-8 without NUL")
