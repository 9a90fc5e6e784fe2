"""The control half of the graph: nodes come and go, edges change, all or nothing.

A change of edges is a `Change` (`blockstep.block.change`)::

    with graph.change() as change:
        change.attach(quorum, "children.1", Role.DATA, node)
        change.replace(old, new)

No request can see half of it; requests that are *in flight* across it are another matter: a change under live I/O
is made inside `Graph.drained`, which holds back new requests and waits for the others.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import msgspec

from blockstep.aio.endings import to_its_end
from blockstep.block.accounting import Accounts
from blockstep.block.change import Change as Change
from blockstep.block.driver import Driver, Prepared
from blockstep.block.io import Backend
from blockstep.block.names import check_name
from blockstep.block.node import CacheOptions, Node, NodeOptions, NodeRef
from blockstep.block.permissions import ALL, NONE, READ, Permission, Role
from blockstep.block.registry import parse_options
from blockstep.errors import GraphError, NodeNotFound, OptionError, noting, told

#: What a file says that is there and must not be written to.
_CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS}
#: Images that name each other as backing files: more are taken for a mistake.
_LONGEST_CHAIN = 100


class Graph:
    """All nodes of a process, by name."""

    def __init__(self) -> None:
        self.nodes: dict[str, Driver] = {}
        #: Those that are being opened or closed. Nobody finds them, but their names are taken.
        self.unfinished: dict[str, Driver] = {}
        #: Called with (event, data) for all that nodes report (`Node.report`), at once, in the strand that met it.
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        #: What the options of nodes refer to by id: throttle groups, TLS credentials.
        self.objects: dict[str, Any] = {}
        #: Of those users whose requests are counted.
        self.accounts = Accounts(self.attach, self.report)
        self._numbers = itertools.count(1)
        # Of each drained section: the nodes (by id) and the users that are held back.
        self._drains: list[tuple[set[int], list[Backend]]] = []

    def report(self, event: str, data: dict[str, Any]) -> None:
        """Tell all listeners of an event."""
        for listener in list(self.listeners):
            listener(event, data)

    # --- nodes ---

    def find(self, name: str) -> Driver:
        """The node of that name. Raises NodeNotFound."""
        try:
            return self.nodes[name]
        except KeyError:
            raise NodeNotFound(name) from None

    def is_taken(self, name: str) -> bool:
        """Whether a node has that name, or will have, or has still."""
        return name in self.nodes or name in self.unfinished

    def everything(self) -> list[Driver]:
        """All nodes, those too that are being opened or closed."""
        return [*self.nodes.values(), *self.unfinished.values()]

    async def open(
        self, options: Mapping[str, Any] | NodeOptions, *, owned: bool = True, strict: bool = True,
        _implied: tuple[NodeRef, ...] = ()
    ) -> Driver:
        """Open a node, and those of its children that are given as options.

        Raises OptionError, GraphError or OSError; then nothing of it is left open, and what went wrong with closing it
        again is a note on the error (`errors.told`). ``owned`` nodes stay until
        they are closed by name, others go with their last parent.
        """
        driver, checked = parse_options(options, strict)
        name = f"#block{next(self._numbers):03d}" if checked.node_name is None else checked.node_name
        if self.is_taken(name):
            raise OptionError("node-name", name, "a name that no other node has")
        if checked.node_name is not None:
            check_name("node-name", name)
        if checked.force_share and not checked.read_only:
            raise OptionError("force-share", True, "off, except with read-only")
        node = driver(name, checked)
        node.on_event = self.report
        node.objects = self.objects
        self.unfinished[name] = node
        try:
            for child_name, role, ref in child_references(driver, checked):
                await self._open_child(node, child_name, role, ref, strict, _implied)
            for child_name, role, ref in await node.implied_children():
                if ref in _implied or len(_implied) >= _LONGEST_CHAIN:
                    raise OptionError(child_name, ref, f"at the end of a chain of at most {_LONGEST_CHAIN} images, "
                                                       "none of which comes twice")
                await self._open_child(node, child_name, role, ref, strict, (*_implied, ref))
            await _open(node)
        except BaseException as error:
            with noting(error):
                await self._close_children(node)
            raise
        finally:
            del self.unfinished[name]
        self.nodes[name] = node
        node.owned = owned
        return node

    async def _open_child(self, node: Driver, name: str, role: Role, ref: NodeRef, strict: bool,
                          implied: tuple[NodeRef, ...]) -> None:
        if isinstance(ref, str):
            child = self.find(ref)
        else:
            try:
                child = await self.open(child_options(node.options, role, ref), owned=False, strict=strict,
                                        _implied=implied)
            except OptionError as error:
                # What an image names is no option of the user's, who would have to read the path of a whole chain.
                raise (error if implied else error.inside(name)) from None
            child.given = given_names(ref)
        try:
            with self.change() as change:
                change.attach(node, name, role, child)
        except BaseException as error:
            with noting(error):
                await self.close_unused(child)
            raise

    async def close(self, node: Driver) -> None:
        """Close a node that nobody uses, and those below that only it used. Raises GraphError if it is in use."""
        if node.parents:
            users = ", ".join(f"'{edge.parent.description}'" for edge in node.parents)
            raise GraphError(f"node '{node.name}' is in use by {users}")
        node.check_operation("remove")
        node.owned = False
        await self.close_unused(node)

    async def close_unused(self, node: Driver) -> None:
        """Close a node, and those below it, if it has no parents and is not held by name (and is still open).

        A node that is being closed is closed in order, also if the task is cancelled meanwhile: nobody else will do it.
        """
        if node.parents or node.owned or self.nodes.get(node.name) is not node:
            return
        self.unfinished[node.name] = self.nodes.pop(node.name)
        node.gone = True
        try:
            await to_its_end(node.close())
        except BaseException as error:
            with noting(error):
                await self._closed(node)
            raise
        await self._closed(node)

    async def _closed(self, node: Driver) -> None:
        del self.unfinished[node.name]
        self.accounts.node_closed(node)
        await self._close_children(node)

    async def _close_children(self, node: Driver) -> None:
        edges = list(node.children.values())
        for edge in edges:
            with self.change() as change:
                change.detach(edge)
        await self.close_all_unused([edge.node for edge in edges])

    async def close_all_unused(self, nodes: Iterable[Driver]) -> None:
        """`close_unused` of each, then raise what the first of them raised, with what came after as its notes."""
        failed: BaseException | None = None
        for node in nodes:
            try:
                await self.close_unused(node)
            except BaseException as error:
                if failed is None:
                    failed = error
                else:
                    failed.add_note(f"and then: {told(error)}")
        if failed is not None:
            raise failed

    # --- users ---

    def attach_backend(self, node: Driver, name: str, taken: Permission = READ, shared: Permission = ALL) -> Backend:
        """Use ``node``. Raises PermissionConflict, or GraphError if it is read-only and WRITE is taken.

        While the node is drained the new user's requests wait as those of the others do.
        """
        backend = Backend(name, node, taken, shared)
        self.attach(backend)
        return backend

    def attach(self, backend: Backend) -> None:
        """As `attach_backend`, of a user that is made already."""
        node = backend.node
        with self.change() as change:
            change.attach_backend(backend)
        for nodes, held in self._drains:
            if id(node) in nodes:
                backend.pause()
                held.append(backend)

    async def detach_backend(self, backend: Backend) -> None:
        """Stop using a node: waits for what is in flight, and closes the node if it belonged to nobody else.

        Requests that a drain holds back fail with ESHUTDOWN: they would come when nobody counts them any more.
        """
        backend.forget_held()
        await backend.idle()
        self.accounts.user_leaves(backend)
        node = backend.node
        node.parents.remove(backend.edge)
        with self.change() as change:
            change.refresh(node)
        await self.close_unused(node)

    async def flush(self, node: Driver) -> None:
        """Make durable what was written to a node, as a user of it does: changes of the graph wait for that."""
        async with self._in_use("flush", node) as (user,):
            await user.flush()

    @asynccontextmanager
    async def _in_use(self, name: str, *nodes: Driver) -> AsyncIterator[list[Backend]]:
        """Inside, nobody closes ``nodes``: they have users of that name. Raises NodeNotFound."""
        async with AsyncExitStack() as stack:
            users = []
            for node in nodes:
                users.append(self.attach_backend(node, name, NONE))
                stack.push_async_callback(self.detach_backend, users[-1])
            yield users

    # --- changes ---

    @contextmanager
    def change(self) -> Iterator[Change]:
        """An all-or-nothing change: see the module. Raises GraphError or PermissionConflict; then nothing changed."""
        change = Change()
        try:
            yield change
            change.finish()
        except BaseException:
            change.rollback()
            raise

    async def insert_filter(self, options: Mapping[str, Any] | NodeOptions, below: Driver) -> Driver:
        """Open a filter over ``below`` and put it under all of its parents, while requests go on."""
        node = await self.open(options, owned=False)
        try:
            async with self.drained(below):
                with self.change() as change:
                    change.replace(below, node)
        except BaseException as error:
            with noting(error):
                await self.close_unused(node)
            raise
        return node

    async def remove_filter(self, node: Driver, into: Driver | None = None) -> None:
        """Put what a filter filters (or ``into``) in its place, and close it if nobody holds it by name."""
        target = into or node.children["file"].node
        async with self.drained(node):
            with self.change() as change:
                change.replace(node, target)
        await self.close_unused(node)

    async def reopen(self, changes: Iterable[tuple[Driver, Mapping[str, Any]]],
                     rewire: Callable[[Change], None] = lambda change: None) -> None:
        """Change options (``read-only``, ``cache.direct``, ...) of open nodes, and edges, all of them or none.

        A node that becomes read-only is flushed first: at the end nobody would. Each driver prepares what can fail;
        then ``rewire`` changes edges and the permissions are checked; then all takes effect. The nodes are drained
        meanwhile, so that no request meets its storage half changed; a caller may hold them drained already.
        `blockstep.block.reopen` takes whole sets of options.
        """
        wanted = list(changes)
        access = [(node, bool(options.get("read-only", node.read_only))) for node, options in wanted]
        prepared: list[Prepared] = []
        async with self._in_use("reopen", *(node for node, _ in wanted)), self.drained(*(node for node, _ in wanted)):
            try:
                for (node, options), (_, read_only) in zip(wanted, access, strict=True):
                    if read_only and not node.read_only:
                        await node.flush()
                    prepared.append(await node.prepare_reopen({**options, "read-only": read_only}))
                with self.change() as change:
                    for node, read_only in access:
                        change.set_read_only(node, read_only)
                    rewire(change)
            except BaseException:
                for reopening in reversed(prepared):
                    reopening.abort()
                await _finish(prepared[::-1])
                raise
            for reopening in prepared:
                reopening.commit()
            await _finish(prepared)

    # --- drain ---

    @asynccontextmanager
    async def drained(self, *nodes: Driver) -> AsyncIterator[None]:
        """Inside, no request is in flight in any of ``nodes``, and none starts.

        Holds back all users above them, waits for what those have in flight, then for what the nodes on the way
        issue by themselves.
        """
        above = list(_bottom_up(nodes))
        users = {id(e.parent): e.parent for node in above for e in node.parents if isinstance(e.parent, Backend)}
        backends = list(users.values())
        section = {id(node) for node in above}, backends
        held: list[Driver] = []
        self._drains.append(section)
        for backend in backends:
            backend.pause()
        # What the users have in flight may be held up below the nodes as well.
        ways = list(dict.fromkeys([*above, *(node for each in backends for node in (each.node, *each.node.below()))]))
        for node in ways:
            node.expedite(True)
        try:
            for backend in list(backends):  # those that come meanwhile have nothing in flight
                await backend.idle()
            for node in above:
                held.append(node)
                await node.drain_begin()
            yield
        finally:
            for node in held:
                node.drain_end()
            for node in ways:
                node.expedite(False)
            self._drains = [one for one in self._drains if one is not section]
            for backend in backends:
                backend.resume()


def child_name(field: str) -> str:
    """What the child of an option field is called: as the option."""
    return field.replace("_", "-")


def child_references(driver: type[Driver], options: NodeOptions) -> Iterator[tuple[str, Role, NodeRef]]:
    """The children that the options name: (child name, role, node name or options). Lists give ``children.0`` ..."""
    for field, role in driver.child_roles.items():
        ref: NodeRef | list[NodeRef] | None = getattr(options, field)
        if isinstance(ref, list):
            yield from ((f"{child_name(field)}.{index}", role, item) for index, item in enumerate(ref))
        elif ref is not None and not (ref == {} and _may_be_implied(options, field)):
            yield child_name(field), role, ref


def _may_be_implied(options: NodeOptions, field: str) -> bool:
    """Whether {} is no options but what the node itself says (`Driver.implied_children`): where it is the default."""
    return any(each.name == field and each.default_factory is dict for each in msgspec.structs.fields(options))


def child_options(options: NodeOptions, role: Role, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a child that is given as options: those, and what it takes over from its parent's."""
    whole = dict(given)
    if options.read_only or role is Role.BACKING:
        whole.setdefault("read-only", True)
    elif options.discard != "ignore":
        whole.setdefault("discard", options.discard)
    if options.auto_read_only:
        whole.setdefault("auto-read-only", True)
    if options.force_share:
        whole.setdefault("force-share", True)
    if options.cache != CacheOptions() and isinstance(own := whole.get("cache", {}), Mapping):
        whole["cache"] = {**msgspec.to_builtins(options.cache), **own}
    return whole


def given_names(options: Mapping[str, Any]) -> frozenset[str]:
    """`Node.given` for these options."""
    cache = options.get("cache", {})
    return frozenset({*options, *(f"cache.{name}" for name in cache)} if isinstance(cache, Mapping) else options)


async def _finish(prepared: Sequence[Prepared]) -> None:
    for each in prepared:
        if each.finish is not None:
            await each.finish()


async def _open(node: Driver) -> None:
    try:
        await node.open()
    except (OSError, OptionError) as error:
        refused = error.option == "read-only" if isinstance(error, OptionError) else error.errno in _CANNOT_WRITE
        if not refused or not node.options.auto_read_only or node.read_only:
            raise
        node.read_only = True
        await node.open()


def _bottom_up(nodes: Iterable[Driver]) -> Iterator[Driver]:
    """The nodes and all above them, each once."""
    seen: set[int] = set()
    stack: list[Node] = list(nodes)
    while stack:
        node = stack.pop(0)
        if id(node) not in seen:
            seen.add(id(node))
            assert isinstance(node, Driver)
            yield node
            stack.extend(edge.parent for edge in node.parents if isinstance(edge.parent, Node))
