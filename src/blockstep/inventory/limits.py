"""Limits that a user puts on a disk while it is in use (``block_set_io_throttle``).

    exports ──► throttle ──► disk ◄── jobs

A throttle filter is put between the disk and those of its users whose requests are counted; jobs do not pass it. It
stays while nobody uses the disk, and those who come later are sent through it: `Accounts.entrances`. Disks in one group
share its limits.
"""

from __future__ import annotations

from blockstep.block.accounting import CountedBackend
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.drivers.throttle import Limits, Throttle, ThrottleGroup
from blockstep.errors import noting


def limits_of(graph: Graph, node: Driver) -> ThrottleGroup | None:
    """The group whose limits a disk keeps to, if any."""
    entrance = graph.accounts.entrances.get(node.name)
    return entrance.group if isinstance(entrance, Throttle) else None


async def set_limits(graph: Graph, node: Driver, limits: Limits, group: str | None = None) -> None:
    """Hold a disk to ``limits``, in the group of that name (the one that it is in; else one of its own).

    All members of the group get the limits. No limits at all: as before there were any. Raises OptionError for
    limits that contradict each other, or for a name that something else has; then nothing has changed.
    """
    limits.check()
    if limits == Limits():
        await lift_limits(graph, node)
        return
    present = limits_of(graph, node)
    name = group or (present.name if present is not None else node.name)
    found = graph.objects.get(name)
    if isinstance(found, ThrottleGroup):
        found.set_limits(limits)
    if present is not None and present.name == name:
        return
    entrance = graph.accounts.entrances.get(node.name)
    options = {"throttle-group": name, **({} if isinstance(found, ThrottleGroup) else {"limits": _given(limits)})}
    if isinstance(entrance, Throttle):
        made = None if isinstance(found, ThrottleGroup) else limits
        await graph.reopen([(entrance, {"throttle-group": name, "limits": made})])
        entrance.options.throttle_group, entrance.options.limits = name, made
        return
    new = await graph.open({"driver": "throttle", "file": node.name, **options})
    try:
        await _put_before(graph, node, new)
    except BaseException as error:
        new.owned = False
        with noting(error):
            await graph.close_unused(new)
        raise
    graph.accounts.entrances[node.name] = new


async def lift_limits(graph: Graph, node: Driver) -> None:
    """Let a disk go without limits."""
    entrance = graph.accounts.entrances.get(node.name)
    if entrance is not None:
        await graph.remove_filter(entrance)
        del graph.accounts.entrances[node.name]
        entrance.owned = False
        await graph.close_unused(entrance)


async def _put_before(graph: Graph, node: Driver, new: Driver) -> None:
    async with graph.drained(node):
        with graph.change() as change:
            for edge in list(node.parents):
                if isinstance(edge.parent, CountedBackend):
                    change.move(edge, new)


def _given(limits: Limits) -> dict[str, int]:
    """The limits as options: what differs from no limits."""
    none = Limits()
    return {name.replace("_", "-"): getattr(limits, name) for name in Limits.__struct_fields__
            if getattr(limits, name) != getattr(none, name)}
