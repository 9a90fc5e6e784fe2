"""Nodes that users have added by name, and how nodes end together."""

from __future__ import annotations

from collections.abc import Awaitable

from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.node import Node
from blockstep.errors import GraphError, told
from blockstep.inventory.limits import lift_limits


async def remove_node(graph: Graph, node: Driver) -> None:
    """Close a node that nobody uses, its limits, and those of its children that came with it. Raises GraphError."""
    if not node.owned:
        raise GraphError(f"node '{node.name}' belongs to the node that it was added with, and goes with it")
    if node in graph.accounts.entrances:
        limited = graph.accounts.disk(node).name
        raise GraphError(f"node '{node.name}' holds the limits of disk '{limited}', and goes with them")
    entrance = graph.accounts.entrance(node)
    if entrance is not None and not entrance.parents and [edge.parent for edge in node.parents] == [entrance]:
        node.check_operation("remove")
        await lift_limits(graph, node)
    await graph.close(node)


async def tried(node: Node, work: Awaitable[None]) -> OSError | None:
    """Do one part of an end. An error comes back with the node's name, so that the other parts are done as well."""
    try:
        await work
    except OSError as error:
        return OSError(error.errno, f"node '{node.name}': {told(error)}")
    return None
