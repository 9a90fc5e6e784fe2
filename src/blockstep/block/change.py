"""Changes of the graph's edges: any number of steps, all of them or none.

Edges are moved one after the other, each with its undo; at the end the permissions of all nodes that were touched are
worked out anew, from the top down, and checked. If anything is refused, all steps are taken back, last first, and the
graph is what it was. A change does not wait, so no request can see half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from blockstep.block.driver import Driver
from blockstep.block.io import Backend
from blockstep.block.node import Child
from blockstep.block.permissions import RESIZE, WRITE, WRITE_UNCHANGED, Permission, Role
from blockstep.errors import GraphError, NodeNotFound, PermissionConflict


class Change:
    """One all-or-nothing change. Made by `Graph.change`; the steps take effect at once, the checks come at its end."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._touched: dict[int, Driver] = {}

    def attach(self, parent: Driver, name: str, role: Role, node: Driver) -> Child:
        """Give ``parent`` a child. Raises GraphError if it has one of that name, or if that would make a cycle."""
        _check_there(parent, node)
        if name in parent.children:
            raise GraphError(f"node '{parent.name}' has a child '{name}' already")
        if node is parent or any(below is parent for below in node.below()):
            raise GraphError(f"node '{node.name}' cannot be a child of '{parent.name}', which lies below it")
        edge = Child(parent, name, role, node)
        parent.children[name] = edge
        node.parents.append(edge)
        parent.attached(edge)

        def undo() -> None:
            del parent.children[name]
            node.parents.remove(edge)
            parent.detached(edge)

        self._did(undo, parent, node)
        return edge

    def detach(self, edge: Child) -> None:
        """Take a child away from its parent node."""
        parent = edge.parent
        assert isinstance(parent, Driver)
        position = list(parent.children).index(edge.name)
        del parent.children[edge.name]
        edge.node.parents.remove(edge)
        parent.detached(edge)

        def undo() -> None:
            items = list(parent.children.items())
            items.insert(position, (edge.name, edge))
            parent.children = dict(items)
            edge.node.parents.append(edge)
            parent.attached(edge)

        self._did(undo, parent, edge.node)

    def attach_backend(self, backend: Backend) -> None:
        """Let a user in."""
        _check_there(backend.node)
        backend.node.parents.append(backend.edge)
        self._did(lambda: backend.node.parents.remove(backend.edge), backend.node)

    def move(self, edge: Child, node: Driver) -> None:
        """Put ``node`` at the lower end of an edge."""
        _check_there(node)
        old = edge.node
        if isinstance(edge.parent, Driver) and (node is edge.parent or edge.parent in list(node.below())):
            raise GraphError(f"node '{node.name}' cannot be a child of '{edge.parent.name}', which lies below it")

        def undo() -> None:
            if edge in node.parents:  # a user may have left meanwhile
                node.parents.remove(edge)
                old.parents.append(edge)
                edge.bind(old)

        old.parents.remove(edge)
        node.parents.append(edge)
        edge.bind(node)
        self._did(undo, old, node)

    def replace(self, old: Driver, new: Driver) -> None:
        """Put ``new`` under all parents of ``old``, except those that lie below ``new`` (a filter keeps ``old``)."""
        inside = {id(new), *(id(node) for node in new.below())}
        for edge in list(old.parents):
            if id(edge.parent) not in inside:
                self.move(edge, new)

    def take(self, edge: Child, taken: Permission, shared: Permission) -> None:
        """Change what a user takes and shares."""
        before = edge.taken, edge.shared

        def undo() -> None:
            edge.taken, edge.shared = before

        edge.taken, edge.shared = taken, shared
        self._did(undo, edge.node)

    def refresh(self, node: Driver) -> None:
        """Work out anew what ``node`` takes from its children: its own mind has changed."""
        self._did(lambda: None, node)

    def set_read_only(self, node: Driver, read_only: bool) -> None:
        """Change whether writes may reach ``node``. The storage is reopened by `Graph.reopen`, which calls this."""
        before = node.read_only

        def undo() -> None:
            node.read_only = before

        node.read_only = read_only
        self._did(undo, node)

    # --- the end ---

    def _did(self, undo: Callable[[], None], *nodes: Driver) -> None:
        self._undo.append(undo)
        for node in nodes:
            self._touched[id(node)] = node

    def finish(self) -> None:
        """Work out and check the permissions of all that was touched, and of what lies below."""
        for node in _top_down(self._touched.values()):
            _check(node)
            taken, shared = node.cumulative()
            for child in node.children.values():
                wanted = node.child_permissions(child, taken, shared)
                if wanted != (child.taken, child.shared):
                    before = child.taken, child.shared
                    self._undo.append(lambda c=child, b=before: _restore(c, b))  # type: ignore[misc]
                    child.taken, child.shared = wanted

    def rollback(self) -> None:
        """Take all steps back."""
        while self._undo:
            self._undo.pop()()


def _check(node: Driver) -> None:
    for edge in node.parents:
        if node.read_only and edge.taken & (WRITE | WRITE_UNCHANGED | RESIZE):
            raise GraphError(f"node '{node.name}' is read-only, and '{edge.parent.description}' wants to write to it")
        for other in node.parents:
            missing = edge.taken & ~other.shared
            if other is not edge and missing:
                raise PermissionConflict(node.name, edge.parent.description, other.parent.description, str(missing))


def _restore(child: Child, permissions: tuple[Permission, Permission]) -> None:
    child.taken, child.shared = permissions


def _top_down(nodes: Iterable[Driver]) -> list[Driver]:
    """The nodes and all below them, each after all of its parents in the list."""
    order: list[Driver] = []
    seen: set[int] = set()

    def visit(node: Driver) -> None:
        if id(node) not in seen:
            seen.add(id(node))
            for child in node.children.values():
                visit(child.node)
            order.append(node)

    for node in nodes:
        visit(node)
    return order[::-1]


def _check_there(*nodes: Driver) -> None:
    """Raise NodeNotFound for one that was closed while somebody who has found it waited for something else."""
    for node in nodes:
        if node.gone:
            raise NodeNotFound(node.name)
