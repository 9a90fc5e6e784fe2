"""Snapshot: an empty overlay takes the place of a node, which stays as it is from then on, under it.

    users ──► node            users ──► overlay ──backing──► node
"""

from __future__ import annotations

from blockstep.block.driver import Driver, Prepared
from blockstep.block.graph import Change
from blockstep.block.permissions import Role
from blockstep.errors import GraphError, OperationBlocked, OptionError


def prepare_snapshot(node: Driver, overlay: Driver) -> Prepared:
    """Put ``overlay`` over ``node``, under all of its users. Call it, and what it returns, with ``node`` drained.

    Flush the node first: nobody does it later. Raises OptionError for an overlay that is none, GraphError
    (OperationBlocked, PermissionConflict) when one of the two is in use in a way that forbids it.
    """
    _check(node, overlay)
    change = Change()
    try:
        change.replace(node, overlay)
        change.attach(overlay, "backing", Role.BACKING, node)
        change.finish()
    except BaseException:
        change.rollback()
        raise
    return Prepared(abort=change.rollback)


def _check(node: Driver, overlay: Driver) -> None:
    node.check_operation("snapshot")
    overlay.check_operation("snapshot overlay")
    for edge in node.parents:
        if edge.role is Role.BACKING:
            raise OperationBlocked(node.name, "snapshot", f"it is the backing node of '{edge.parent.description}'")
    if "backing" not in overlay.child_roles:
        raise OptionError("overlay", overlay.name,
                          f"a node that can have a backing node; its driver is {overlay.driver}")
    if "backing" in overlay.children:
        raise OptionError("overlay", overlay.name, "a node that has no backing node yet")
    if overlay.parents:
        raise GraphError(f"node '{overlay.name}' is in use by '{overlay.parents[0].parent.description}'")
    if overlay.length < node.length:
        raise OptionError("overlay", overlay.name, f"at least {node.length} bytes long; it has {overlay.length}")
