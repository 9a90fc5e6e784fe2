"""Nodes by name, with the class of error that clients of QEMU expect of most commands."""

from __future__ import annotations

from blockstep.block.driver import Driver
from blockstep.errors import NodeNotFound
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.errors import CommandError


def node_named(context: Holder, name: str) -> Driver:
    """The node. Raises CommandError with GenericError, not DeviceNotFound."""
    try:
        return context.inventory.graph.find(name)
    except NodeNotFound as error:
        raise CommandError(str(error)) from None
