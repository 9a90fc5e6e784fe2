"""``blockdev-snapshot``.

Source: QEMU's QMP reference, "Block core", the command of this name.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from blockstep.block.driver import Prepared
from blockstep.block.snapshot import prepare_snapshot
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.commands.lookup import node_named
from blockstep.qmp.schema import Arguments, Registry

commands = Registry()


class SnapshotArguments(Arguments):
    """Arguments of blockdev-snapshot."""

    node: Annotated[str, Meta(description="What stays as it is.")]
    overlay: Annotated[str, Meta(description=(
        "An open node without a backing node, best an empty one, that nobody uses and that is long enough."))]


async def flush(context: Holder, args: SnapshotArguments) -> None:
    """What comes before the command's halves; ``args.node`` is drained, from here on."""
    node = node_named(context, args.node)
    if not node.read_only:
        await node.flush()


def prepare(context: Holder, args: SnapshotArguments) -> Prepared:
    """The first half of the command."""
    return prepare_snapshot(node_named(context, args.node), node_named(context, args.overlay))


@commands.command("blockdev-snapshot", features=["allow-write-only-overlay"])
async def blockdev_snapshot(context: Holder, args: SnapshotArguments) -> None:
    """Put an overlay in the place of a node, which becomes its backing node: what is written goes to the overlay."""
    async with context.inventory.graph.drained(node_named(context, args.node)):
        await flush(context, args)
        prepare(context, args).commit()
