"""Nodes and edges.

A node has a name, children below it and parents above it. An edge (`Child`) belongs to its parent, which is
another node or a user of the graph (`blockstep.block.io.Backend`). Edges are where permissions live, and where a
request goes down: an edge holds the I/O methods of the node at its lower end as attributes of its own, so that
``await self.file.pread(offset, length)`` *is* the child's coroutine, with nothing in between. Who watches the
writes to a node (a dirty bitmap) stands between only while it is there: see `Node.watch`.

Only `blockstep.block.graph` changes edges.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Protocol

import msgspec

from blockstep.aio.inline import submit
from blockstep.block.permissions import (
    ALL,
    NONE,
    WRITE,
    WRITE_UNCHANGED,
    Permission,
    Role,
    default_child_permissions,
)
from blockstep.errors import OperationBlocked

if TYPE_CHECKING:
    from blockstep.block.driver import Driver

#: The options of a node, not looked at yet (`blockstep.block.registry.parse_options` does). They are those of some
#: driver: ``extra`` says so to whoever describes options.
AnyOptions = Annotated[dict[str, Any], msgspec.Meta(extra={"options": "driver"})]
#: A child in options: the name of a node that exists, or the options of a new one.
NodeRef = str | AnyOptions


#: `Node.live_options` of all drivers, but that of ``cache`` drivers with storage of their own have something to say.
LIVE_OPTIONS: Final = frozenset({"auto-read-only", "cache.direct", "cache.no-flush", "detect-zeroes", "discard",
                                 "force-share"})


class CacheOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """``cache.*``: how the host's page cache is used."""

    direct: bool = False  #: O_DIRECT: go past the page cache
    no_flush: bool = False  #: ignore flush: fast, and nothing is durable


class NodeOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, tag_field="driver"):
    """Options that all drivers have. A driver's own options are a subclass whose tag is the driver's name."""

    node_name: str | None = None
    read_only: bool = False
    auto_read_only: bool = False  #: be read-only where the storage cannot be written to
    force_share: bool = False  #: only together with read-only; readers keep nobody out anyway
    discard: Literal["ignore", "unmap"] = "ignore"
    detect_zeroes: Literal["off", "on", "unmap"] = "off"  #: taken, and of no effect: zeroes are written as data
    cache: CacheOptions = msgspec.field(default_factory=CacheOptions)


class Parent(Protocol):
    """The upper end of an edge."""

    @property
    def description(self) -> str:
        """Who that is, for messages."""


class Child:
    """An edge: ``parent`` uses ``node`` under ``name`` in ``role``, takes ``taken`` and shares ``shared``."""

    __slots__ = (
        "_taken", "begin_read", "begin_write", "block_status", "discard", "flush", "may_change", "may_write", "name",
        "node", "parent", "pread", "pwrite", "resize", "role", "shared", "submit_write", "write_zeroes",
    )

    begin_write: Callable[[int, Any], Awaitable[None] | None]

    def __init__(self, parent: Parent, name: str, role: Role, node: Driver,
                 taken: Permission = NONE, shared: Permission = ALL) -> None:
        self.parent = parent
        self.name = name
        self.role = role
        self.taken = taken
        self.shared = shared
        self.bind(node)

    @property
    def taken(self) -> Permission:
        """What the parent may do with the node."""
        return self._taken

    @taken.setter
    def taken(self, taken: Permission) -> None:
        self._taken = taken
        #: Whether writes of any kind are taken; asked for each write, so it is worked out once.
        self.may_write = bool(taken & (WRITE | WRITE_UNCHANGED))
        #: Whether writes that change what the node reads as are taken.
        self.may_change = bool(taken & WRITE)

    def bind(self, node: Driver) -> None:
        """Send requests to ``node`` from now on."""
        self.node = node
        self.pread = node.pread
        self.begin_read = node.begin_read
        self.flush = node.flush
        self.block_status = node.block_status
        self.resize = node.resize
        if node.watchers:
            self.begin_write = node.watched_pwrite
            self.submit_write = node.watched_submit_write
            self.pwrite = node.watched_pwrite
            self.write_zeroes = node.watched_write_zeroes
            self.discard = node.watched_discard
        else:
            self.begin_write = node.begin_write
            self.submit_write = node.submit_write
            self.pwrite = node.pwrite
            self.write_zeroes = node.write_zeroes
            self.discard = node.discard

    def __repr__(self) -> str:
        return f"<{self.parent.description} --{self.name}--> {self.node.name}>"


class Watcher(Protocol):
    """Is told of every change of a node's data, after it ended, however it ended (a dirty bitmap)."""

    def wrote(self, offset: int, length: int) -> None: ...


class Node:
    """What all nodes have. Drivers derive from `blockstep.block.driver.Driver`, which adds the data."""

    driver: ClassVar[str]
    is_filter: ClassVar[bool] = False
    #: Options that the driver looks at when it needs them, so that new ones can be put in their place at any time.
    live_options: ClassVar[frozenset[str]] = LIVE_OPTIONS
    #: The option fields that are children, with their roles, in the order in which they are opened.
    child_roles: ClassVar[dict[str, Role]] = {}

    if TYPE_CHECKING:  # the data half, in Driver
        pwrite: Callable[..., Awaitable[None]]
        truncate: Callable[[int], Awaitable[None]]
        length: int
        write_zeroes: Callable[..., Awaitable[None]]
        discard: Callable[..., Awaitable[None]]

    #: Whether it is closed, or being closed: nobody can begin to use it.
    gone: bool = False

    def __init__(self, name: str, options: NodeOptions) -> None:
        self.name = name
        self.options = options
        self.read_only = options.read_only
        self.children: dict[str, Child] = {}
        self.parents: list[Child] = []
        self.watchers: list[Watcher] = []
        self._indifferent: list[Watcher] = []  # those of them that do not want to hear of discards
        self.bitmaps: dict[str, Any] = {}
        #: Where `report` sends events; set by the graph that opened the node.
        self.on_event: Callable[[str, dict[str, Any]], None] | None = None
        #: What options refer to by id (`Graph.objects`); set by the graph that opened the node.
        self.objects: dict[str, Any] = {}
        #: operation -> reasons of those who block it; "*" blocks all
        self.blockers: dict[str, list[str]] = {}
        #: Whether it was added by name: such a node stays when its last parent goes.
        self.owned = False
        #: Of a node that came with its parent: the options that it was given, ``cache.direct`` and the like one by
        #: one; the others that it takes over from its parent follow that when it is reopened. None: all.
        self.given: frozenset[str] | None = None

    @property
    def description(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{self.driver} '{self.name}'>"

    # --- the graph around it ---

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        """What this node takes and shares on ``child``, given what its parents together take and share."""
        return default_child_permissions(child.role, taken, shared, self.read_only)

    def attached(self, child: Child) -> None:
        """An edge of this node has come (a driver may keep it under a name of its own)."""
        setattr(self, child.name.replace("-", "_"), child)

    def detached(self, child: Child) -> None:
        """An edge of this node has gone."""
        if getattr(self, child.name.replace("-", "_"), None) is child:
            delattr(self, child.name.replace("-", "_"))

    def cumulative(self) -> tuple[Permission, Permission]:
        """What all parents together take, and what all of them share."""
        taken, shared = NONE, ALL
        for edge in self.parents:
            taken |= edge.taken
            shared &= edge.shared
        return taken, shared

    def below(self) -> Iterator[Driver]:
        """All nodes below this one, each once, a parent before its children."""
        seen: set[int] = set()
        stack = [child.node for child in self.children.values()]
        while stack:
            node = stack.pop(0)
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                stack.extend(child.node for child in node.children.values())

    # --- operation blockers ---

    def block_operations(self, reason: str, *operations: str) -> Callable[[], None]:
        """Refuse ``operations`` (none given: all) on this node until the returned function is called."""
        for operation in operations or ("*",):
            self.blockers.setdefault(operation, []).append(reason)

        def lift() -> None:
            for operation in operations or ("*",):
                self.blockers[operation].remove(reason)
                if not self.blockers[operation]:
                    del self.blockers[operation]

        return lift

    def check_operation(self, operation: str) -> None:
        """Raises OperationBlocked, with the reason, if somebody blocks ``operation``."""
        for reason in (*self.blockers.get(operation, ()), *self.blockers.get("*", ())):
            raise OperationBlocked(self.name, operation, reason)

    # --- watchers ---

    def watch(self, watcher: Watcher, discards: bool = True) -> None:
        """Tell ``watcher`` of all writes, zeroes and (unless it does not want them) discards that end from now on."""
        self.watchers.append(watcher)
        if not discards:
            self._indifferent.append(watcher)
        self._rebind()

    def unwatch(self, watcher: Watcher) -> None:
        """The opposite of `watch`."""
        self.watchers.remove(watcher)
        self._indifferent = [each for each in self._indifferent if each is not watcher]
        self._rebind()

    def _rebind(self) -> None:
        for edge in self.parents:
            edge.bind(edge.node)

    def watched_submit_write(
        self, offset: int, data: Any, flags: int, done: Callable[[BaseException | None], None]
    ) -> None:
        submit(self.watched_pwrite(offset, data, flags), done)

    async def watched_pwrite(self, offset: int, data: Any, flags: int = 0) -> None:
        try:
            await self.pwrite(offset, data, flags)
        finally:
            for watcher in self.watchers:
                watcher.wrote(offset, len(data))

    async def watched_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        try:
            await self.write_zeroes(offset, length, flags)
        finally:
            for watcher in self.watchers:
                watcher.wrote(offset, length)

    async def watched_discard(self, offset: int, length: int) -> None:
        try:
            await self.discard(offset, length)
        finally:
            for watcher in self.watchers:
                if watcher not in self._indifferent:
                    watcher.wrote(offset, length)

    async def resize(self, length: int) -> None:
        """`Driver.truncate`, and the dirty bitmaps follow; all of it or nothing. Nothing is in flight."""
        with self.followed_by((bitmap for bitmap in self.bitmaps.values() if not bitmap.inconsistent), length):
            await self.truncate(length)

    @contextmanager
    def followed_by(self, bitmaps: Iterable[Any], length: int) -> Iterator[None]:
        """Within, the node gets ``length``; the bitmaps then have it too. Raises OSError (ENOMEM) before anything."""
        follow = [bitmap.prepare_resize(length) for bitmap in bitmaps]
        try:
            yield
        finally:
            if self.length == length:  # also when it failed, and could not be put back
                for commit in follow:
                    commit()

    # --- events ---

    def report(self, event: str, data: dict[str, Any]) -> None:
        """Tell the listeners of the graph (`Graph.listeners`) what happened; nobody may be listening."""
        if self.on_event is not None:
            self.on_event(event, data)

    # --- requests of its own ---

    def expedite(self, on: bool) -> None:
        """From a call with True to its match with False (they nest): delay nothing, a drain waits for the requests."""

    async def drain_begin(self) -> None:
        """Hold back requests that this node issues by itself (a queue), and wait for those that are out."""

    def drain_end(self) -> None:
        """Go on after `drain_begin`."""
