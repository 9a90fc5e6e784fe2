"""Dirty bitmaps: ``block-dirty-bitmap-*``.

Each command is one change in two halves (`blockstep.block.bitmap`); a transaction takes the first halves of several.

Source: QEMU's QMP reference, "Block core", the commands ``block-dirty-bitmap-*``.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from blockstep.block.bitmap import DirtyBitmap, find_bitmap
from blockstep.block.driver import Prepared
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.commands.lookup import node_named
from blockstep.qmp.schema import Arguments, Registry

commands = Registry()


class BitmapName(Arguments):
    """A bitmap of a node."""

    node: Annotated[str, Meta(description="The node.")]
    name: Annotated[str, Meta(description="The bitmap.")]


class BitmapAdd(BitmapName):
    """Arguments of block-dirty-bitmap-add."""

    granularity: Annotated[Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] | None, Meta(description=(
        "Bytes of a cluster, a power of two from 512 on. By default the node's clusters, from 4 to 64 KiB."))] = None
    persistent: Annotated[bool, Meta(description=(
        "Store it in the image when the node is closed; qcow2 images can. After a crash it is inconsistent."))] = False
    disabled: Annotated[bool, Meta(description="Do not record writes yet.")] = False


class BitmapMerge(Arguments):
    """Arguments of block-dirty-bitmap-merge."""

    node: Annotated[str, Meta(description="The node of the target, and of bitmaps that are given by name only.")]
    target: Annotated[str, Meta(description="The bitmap that gets the bits.")]
    bitmaps: Annotated[list[str | BitmapName], Meta(description="Those whose bits it gets; they stay as they are.")]


def bitmap_named(context: Holder, name: BitmapName) -> DirtyBitmap:
    """The bitmap. Raises CommandError, OptionError."""
    return find_bitmap(node_named(context, name.node), name.name)


def prepare_add(context: Holder, args: BitmapAdd) -> Prepared:
    """The first half of block-dirty-bitmap-add."""
    node = node_named(context, args.node)
    granularity = args.granularity
    if granularity is None:
        granularity = min(max(4096, node.cluster_size), 65536)
    return DirtyBitmap.prepare_add(node, args.name, granularity, enabled=not args.disabled,
                                   persistent=args.persistent)


async def add(context: Holder, args: BitmapAdd) -> Prepared:
    """The same, and that there is such a persistent bitmap is durable."""
    prepared = prepare_add(context, args)
    if args.persistent:
        try:
            await keep(context, args.node)
        except BaseException:
            prepared.abort()
            raise
    return prepared


def prepare_merge(context: Holder, args: BitmapMerge) -> Prepared:
    """The first half of block-dirty-bitmap-merge."""
    others = [BitmapName(node=args.node, name=other) if isinstance(other, str) else other for other in args.bitmaps]
    target = bitmap_named(context, BitmapName(node=args.node, name=args.target))
    return target.prepare_merge([bitmap_named(context, other) for other in others])


async def keep(context: Holder, name: str) -> None:
    """Make durable which bitmaps a node stores. Raises OSError."""
    node = node_named(context, name)
    async with context.inventory.graph.drained(node):
        await node.keep_bitmaps()


@commands.command("block-dirty-bitmap-add")
async def block_dirty_bitmap_add(context: Holder, args: BitmapAdd) -> None:
    """Record from now on what is written to a node. The bitmap lives as long as the node is open, or is persistent.

    That there is a persistent one is durable at return; if that fails, there is none.
    """
    (await add(context, args)).commit()


@commands.command("block-dirty-bitmap-remove")
async def block_dirty_bitmap_remove(context: Holder, args: BitmapName) -> None:
    """Forget a bitmap that nobody uses. If it is persistent, it is gone from the image at return."""
    bitmap = bitmap_named(context, args)
    bitmap.prepare_remove().commit()
    if bitmap.persistent:
        await keep(context, args.node)


@commands.command("block-dirty-bitmap-clear")
async def block_dirty_bitmap_clear(context: Holder, args: BitmapName) -> None:
    """Reset all bits. Takes the same few microseconds however many are set."""
    bitmap_named(context, args).prepare_clear().commit()


@commands.command("block-dirty-bitmap-enable")
async def block_dirty_bitmap_enable(context: Holder, args: BitmapName) -> None:
    """Record writes from now on."""
    bitmap_named(context, args).prepare_enabled(True).commit()


@commands.command("block-dirty-bitmap-disable")
async def block_dirty_bitmap_disable(context: Holder, args: BitmapName) -> None:
    """Record no writes until it is enabled again; the bits stay."""
    bitmap_named(context, args).prepare_enabled(False).commit()


@commands.command("block-dirty-bitmap-merge")
async def block_dirty_bitmap_merge(context: Holder, args: BitmapMerge) -> None:
    """Set in a bitmap what is set in any of others: all of them, or none if one of them cannot be merged."""
    prepare_merge(context, args).commit()
