"""What a monitor can do, for programs: which commands, with which arguments and results, and which events.

Source: QEMU's QMP reference, "QMP introspection".
"""

from __future__ import annotations

import asyncio
from functools import lru_cache

from blockstep.block.registry import driver_names, options_type
from blockstep.qmp.introspect import AnyEntry, schema
from blockstep.qmp.schema import Arguments, Command, EventKind, Monitor, Registry
from blockstep.qmp.session import NEGOTIATION

commands = Registry()


@commands.command("query-qmp-schema")
async def query_qmp_schema(context: object, args: Arguments, monitor: Monitor) -> list[AnyEntry]:
    """The commands and events of this monitor, and all types that they use.

    Commands and events have their true names; types have names that may change.
    """
    offered = (NEGOTIATION, *monitor.commands.values())
    events, drivers = tuple(monitor.events.values()), tuple(driver_names())
    return await asyncio.to_thread(_schema, offered, events, drivers)


@lru_cache(maxsize=4)  # worked out once for each set of commands: it takes some 30 ms, beside the disks' requests
def _schema(offered: tuple[Command, ...], events: tuple[EventKind, ...], drivers: tuple[str, ...]) -> list[AnyEntry]:
    return schema(offered, events, {"driver": options_type})
