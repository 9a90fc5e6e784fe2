"""Change the length of a node that may be in use."""

from __future__ import annotations

from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.permissions import ALL, RESIZE


async def resize(graph: Graph, node: Driver, length: int) -> None:
    """Give ``node`` another length; what is added reads as zeroes. Nothing is in flight meanwhile.

    Raises OperationBlocked; PermissionConflict if a user does not put up with it; GraphError if the node is read-only;
    OSError if the storage cannot do it (ENOTSUP, ENOSPC). Then the length is what it was.
    """
    node.check_operation("resize")
    door = graph.attach_backend(node, "block_resize", RESIZE, ALL & ~RESIZE)  # one at a time
    try:
        async with graph.drained(node):
            await door.edge.resize(length)
    finally:
        await graph.detach_backend(door)
