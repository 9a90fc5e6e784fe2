"""Limits that a user puts on a disk while it is in use (``block_set_io_throttle``).

    exports ──► throttle ──► disk ◄── jobs

A throttle filter is put between the disk and those of its users whose requests are counted; jobs do not pass it. It
stays while nobody uses the disk, and those who come later are sent through it: `Accounts.entrance`. It stays with its
users: when another node takes the disk's place (a snapshot, the end of a mirror), the limits are that one's. Disks in
one group share its limits.
"""

from __future__ import annotations

from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.drivers.throttle import Limits, Throttle, ThrottleGroup
from blockstep.errors import noting


def throttle_name(name: str) -> str:
    """The name of a limit of block_set_io_throttle (``bps_wr_max``) as a throttle group has it (``bps_write_max``)."""
    if name == "iops_size":
        return name
    unit, _, rest = name.partition("_")
    what, _, more = rest.partition("_")
    words = {"rd": "read", "wr": "write"}
    return "_".join(part for part in ((unit, words[what], more) if what in words else (unit, "total", rest)) if part)


def limits_of(graph: Graph, node: Driver) -> ThrottleGroup | None:
    """The group whose limits a disk keeps to, if any."""
    entrance = graph.accounts.entrance(node)
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
    async with graph.accounts.turn:
        present = limits_of(graph, node)
        name = group or (present.name if present is not None else node.name)
        found = graph.objects.get(name)
        made = None if isinstance(found, ThrottleGroup) else limits
        if present is None or present.name != name:
            await _join(graph, node, name, made)
        if isinstance(found, ThrottleGroup):
            found.set_limits(limits)


async def lift_limits(graph: Graph, node: Driver) -> None:
    """Let a disk go without limits."""
    async with graph.accounts.turn:
        entrance = graph.accounts.entrance(node)
        if entrance is not None:
            await graph.remove_filter(entrance)
            graph.accounts.entrances.remove(entrance)
            entrance.owned = False
            await graph.close_unused(entrance)


async def _join(graph: Graph, node: Driver, group: str, made: Limits | None) -> None:
    """Send the users of a disk through the group of that name, which is ``made`` if there is none."""
    entrance = graph.accounts.entrance(node)
    if isinstance(entrance, Throttle):
        await graph.reopen([(entrance, {"throttle-group": group, "limits": made})])
        entrance.options.throttle_group, entrance.options.limits = group, made
        return
    used = [user.node for user in graph.accounts.users(node)]
    top = max(used, key=lambda each: len(list(each.chain())), default=node)  # above the filters of jobs
    options = {} if made is None else {"limits": _given(made)}
    new = await graph.open({"driver": "throttle", "file": top.name, "throttle-group": group, **options})
    try:
        async with graph.drained(node):
            with graph.change() as change:
                for user in graph.accounts.users(node):
                    change.move(user.edge, new)
    except BaseException as error:
        new.owned = False
        with noting(error):
            await graph.close_unused(new)
        raise
    graph.accounts.entrances.append(new)


def _given(limits: Limits) -> dict[str, int]:
    """The limits as options: what differs from no limits."""
    none = Limits()
    return {name.replace("_", "-"): getattr(limits, name) for name in Limits.__struct_fields__
            if getattr(limits, name) != getattr(none, name)}
