"""Cut off connections that hang, at once and whatever they are doing: ``yank``.

What can be yanked here is the connection of a node with driver ``nbd``. When it is cut off, its requests in flight
fail, and so do all later ones; the node does not dial again. A client of an export is cut off by removing the export
(``block-export-del``, mode hard). There are no migrations, and monitors are not cut off by one another: naming such an
instance is answered as QEMU answers for one that it does not have.

Source: QEMU's QMP reference, "Yank".
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from blockstep.drivers.nbd import Nbd
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.errors import CommandError
from blockstep.qmp.schema import Arguments, Registry, Result

commands = Registry()


class BlockNodeInstance(Result, tag_field="type", tag="block-node", forbid_unknown_fields=True):
    """The connection of a node with driver nbd."""

    node_name: str


class ChardevInstance(Result, tag_field="type", tag="chardev", forbid_unknown_fields=True):
    """A character device. There is never one to yank."""

    id: str


class MigrationInstance(Result, tag_field="type", tag="migration", forbid_unknown_fields=True):
    """The migration. There is never one."""


Instance = BlockNodeInstance | ChardevInstance | MigrationInstance


class YankArguments(Arguments):
    """Arguments of yank."""

    instances: Annotated[list[Instance], Meta(description="What to cut off: all of it, or nothing.")]


@commands.command("yank", oob=True)
async def yank(context: Holder, args: YankArguments) -> None:
    """Cut connections off, now.

    Errors: DeviceNotFound if one of the instances is not there; then nothing was cut off.
    """
    found = [_find(context, instance) for instance in args.instances]
    for node in found:
        node.yank()


@commands.command("query-yank", oob=True)
async def query_yank(context: Holder, args: Arguments) -> list[Instance]:
    """What `yank` can cut off."""
    return [BlockNodeInstance(node_name=node.name)
            for node in context.inventory.graph.everything() if isinstance(node, Nbd)]


def _find(context: Holder, instance: Instance) -> Nbd:
    if isinstance(instance, BlockNodeInstance):
        for node in context.inventory.graph.everything():
            if isinstance(node, Nbd) and node.name == instance.node_name:
                return node
    raise CommandError(f"there is no instance {msgspec.json.encode(instance).decode()} to yank", "DeviceNotFound")
