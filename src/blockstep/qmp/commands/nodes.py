"""Nodes of the block graph: added, deleted, changed; and what they report.

``device`` and ``id`` are node names here: there are no guest devices, a disk is the node that stands for it.

Source: QEMU's QMP reference, "Block devices" and "Block core", for names, arguments and results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blockstep.aio.pool import in_thread
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.names import check_name
from blockstep.block.node import AnyOptions
from blockstep.block.reopen import reopen
from blockstep.block.resize import resize
from blockstep.block.write_threshold import set_write_threshold
from blockstep.drivers.create import CreateOptions
from blockstep.drivers.quorum import Quorum
from blockstep.drivers.throttle import Limits
from blockstep.errors import NodeNotFound
from blockstep.inventory.limits import set_limits, throttle_name
from blockstep.inventory.nodes import remove_node
from blockstep.jobs.create import CreateJob
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.errors import CommandError, ErrorClass
from blockstep.qmp.schema import Arguments, Event, Registry

commands = Registry()


def find(graph: Graph, name: str | None, error_class: ErrorClass = "GenericError") -> Driver:
    """The node of that name. Raises CommandError: most of QEMU's commands about nodes say GenericError."""
    try:
        return graph.find(name or "")
    except NodeNotFound as error:
        raise CommandError(str(error), error_class) from None


@contextmanager
def _missing_node_is_generic() -> Iterator[None]:
    """As `find`, where nodes are looked up deeper down."""
    try:
        yield
    except NodeNotFound as error:
        raise CommandError(str(error)) from None


def find_disk(graph: Graph, device: str | None, node_name: str | None) -> Driver:
    """The node that a command means which takes ``device`` or ``node-name``."""
    if (device is None) == (node_name is None):
        raise CommandError("either 'node-name' or 'device' must be given")
    return find(graph, node_name if device is None else device)


# --- events ---


@commands.event("BLOCK_IO_ERROR", rate_limit=1.0, per=("device", "operation"))
class BlockIoError(Event, kw_only=True):
    """A request of a client of a disk has failed; the client was told. ``operation``: flushes and discards write."""

    device: str
    node_name: str | UnsetType = UNSET
    operation: Literal["read", "write"]
    action: Literal["ignore", "report", "stop"]
    nospace: bool | UnsetType = UNSET
    reason: str


@commands.event("BLOCK_WRITE_THRESHOLD")
class BlockWriteThreshold(Event):
    """A node was written beyond its mark (block-set-write-threshold), which is thereby gone. All in bytes."""

    node_name: str
    amount_exceeded: int
    write_threshold: int


@commands.event("QUORUM_REPORT_BAD", rate_limit=1.0, per=("node_name",))
class QuorumReportBad(Event, kw_only=True):
    """A child of a quorum has failed, or (without ``error``) was outvoted. Sectors of 512 bytes."""

    operation: Literal["read", "write", "flush"] = msgspec.field(name="type")
    error: str | UnsetType = UNSET
    node_name: str
    sector_num: int
    sectors_count: int


@commands.event("QUORUM_FAILURE", rate_limit=1.0, per=("reference",))
class QuorumFailure(Event):
    """A request to a quorum has failed: too few of its children were good. Sectors of 512 bytes."""

    reference: str
    sector_num: int
    sectors_count: int


@commands.event("BLOCK_IMAGE_CORRUPTED")
class BlockImageCorrupted(Event, kw_only=True):
    """Metadata of an image cannot be right, and requests that need it fail; told once for a node, and once more if

    ``fatal``: the image was marked as corrupt, and has to be repaired before it is opened for writing again. ``offset``
    and ``size``: which bytes of the image's file it is about. ``device`` is always empty.
    """

    device: str
    node_name: str | UnsetType = UNSET
    msg: str
    offset: int | UnsetType = UNSET
    size: int | UnsetType = UNSET
    fatal: bool


@commands.event("BLOCK_IMAGE_REPAIRED")
class BlockImageRepaired(Event, kw_only=True):
    """An image with lazy refcounts was not closed in order, and was repaired when it was opened for writing."""

    node_name: str
    filename: str | UnsetType = UNSET
    corruptions_fixed: int
    leaks_fixed: int


@commands.event("BLOCK_STORAGE_FAULT")
class BlockStorageFault(Event, kw_only=True):
    """Somebody has deleted, moved, replaced or shortened the file of a node while it is in use, or has mended that.

    ``reason``: which file, what has become of it and what to do; empty if all is well again. Our own, not QEMU's.
    """

    node_name: str
    reason: str


@commands.event("NBD_CONNECTION")
class NbdConnection(Event):
    """The connection of an nbd node to its server has come, or was lost (``error`` says why).

    ``size``: of the export that it has come to, in bytes. If the node has another, block_resize gives it this one.
    """

    node_name: str
    state: Literal["connected", "lost"]
    size: int | UnsetType = UNSET
    error: str | UnsetType = UNSET


# --- nodes come and go ---


class NodeArguments(Arguments):
    """Arguments of blockdev-del."""

    node_name: Annotated[str, Meta(description="The node.")]


class ReopenArguments(Arguments):
    """Arguments of blockdev-reopen."""

    options: Annotated[list[AnyOptions], Meta(
        description="For each node all of its options, as for blockdev-add: what is left out gets its default.")]


class CreateArguments(Arguments):
    """Arguments of blockdev-create."""

    job_id: Annotated[str, Meta(description="A name for the job.")]
    options: Annotated[CreateOptions, Meta(description="What to make.")]


class ChangeArguments(Arguments):
    """Arguments of x-blockdev-change: either ``child`` or ``node``."""

    parent: Annotated[str, Meta(description="The quorum.")]
    child: Annotated[str | None, Meta(description="The child to remove, as children.1.")] = None
    node: Annotated[str | None, Meta(description="The node to add as a child.")] = None


class IothreadArguments(Arguments):
    """Arguments of x-blockdev-set-iothread."""

    node_name: Annotated[str, Meta(description="The node.")]
    iothread: Annotated[str | None, Meta(description="null: the main loop, where all nodes are.")]
    force: Annotated[bool, Meta(description="Of no effect.")] = False


@commands.command("blockdev-add")
async def blockdev_add(context: Holder, args: AnyOptions) -> None:
    """Open a node, and those of its children that are given as options.

    The options are those of its driver: see the pages of the drivers. ``node-name`` is required at the top.
    """
    if "node-name" not in args:
        raise CommandError("'node-name' must be given for the node at the top")
    with _missing_node_is_generic():
        await context.inventory.graph.open(args)


@commands.command("blockdev-del")
async def blockdev_del(context: Holder, args: NodeArguments) -> None:
    """Close a node that nobody uses, and those of its children that came with it."""
    graph = context.inventory.graph
    await remove_node(graph, find(graph, args.node_name))


@commands.command("blockdev-reopen")
async def blockdev_reopen(context: Holder, args: ReopenArguments) -> None:
    """Give open nodes new options, all of them or none.

    What can change: read-only, cache, discard, the throttle group, and the nodes under file and backing.
    """
    with _missing_node_is_generic():
        await reopen(context.inventory.graph, args.options)


@commands.command("blockdev-create")
async def blockdev_create(context: Holder, args: CreateArguments) -> None:
    """Make an image file, in a job that has to be dismissed (job-dismiss). No node is opened.

    A file that a node has, also one that only reads it, is left alone.
    """
    check_name("job-id", args.job_id)
    args.options.check()
    await in_thread(args.options.check_unused, context.inventory.graph)
    await context.inventory.jobs.create(CreateJob(args.job_id, args.options.create))


@commands.command("x-blockdev-change")
async def x_blockdev_change(context: Holder, args: ChangeArguments) -> None:
    """Add a node to a quorum as a child, or remove a child, while the quorum is in use.

    What is added is not filled. A child keeps its name, children.N, as long as it is there.
    """
    graph = context.inventory.graph
    parent = find(graph, args.parent)
    if (args.child is None) == (args.node is None):
        raise CommandError("either 'child' or 'node' must be given, and not both")
    if not isinstance(parent, Quorum):
        raise CommandError(f"node '{parent.name}' ({parent.driver}) does not take children at run time; a quorum does")
    if args.child is not None:
        await parent.remove_child(graph, args.child)
        return
    node = find(graph, args.node)
    async with graph.drained(parent):  # from here on nothing waits: nobody else begins to use the node
        if node.parents:
            raise CommandError(f"node '{node.name}' is in use by '{node.parents[0].parent.description}'")
        await parent.add_child(graph, node)


@commands.command("x-blockdev-set-iothread")
async def x_blockdev_set_iothread(context: Holder, args: IothreadArguments) -> None:
    """Refused, except for null: there are no iothreads here, all nodes are served by the main loop."""
    find(context.inventory.graph, args.node_name)
    if args.iothread is not None:
        raise CommandError(f"there is no iothread '{args.iothread}': all nodes are served by the main loop")


# --- size and limits ---


class ResizeArguments(Arguments):
    """Arguments of block_resize: ``node-name`` or ``device``."""

    size: Annotated[int, Meta(ge=0, description="Bytes.")]
    node_name: Annotated[str | None, Meta(description="The node.")] = None
    device: Annotated[str | None, Meta(description="The node, too.")] = None


BytesPerSecond = Annotated[int, Meta(description="Bytes a second.")]
RequestsPerSecond = Annotated[int, Meta(description="Requests a second.")]
BytesInBurst = Annotated[int, Meta(description="Bytes a second in a burst; 0: a tenth of a second's worth at once.")]
RequestsInBurst = Annotated[int, Meta(description="Requests a second in a burst; 0: a tenth of a second's at once.")]
BurstLength = Annotated[int, Meta(description="Seconds that a burst may last.")]


class ThrottleArguments(Arguments, kw_only=True):
    """Arguments of block_set_io_throttle: ``id`` or ``device``, and limits per second; 0: no limit."""

    id: Annotated[str | None, Meta(description="The node.")] = None
    device: Annotated[str | None, Meta(description="The node, too.", extra={"features": ["deprecated"]})] = None
    bps: BytesPerSecond
    bps_rd: BytesPerSecond = msgspec.field(name="bps_rd")
    bps_wr: BytesPerSecond = msgspec.field(name="bps_wr")
    iops: RequestsPerSecond
    iops_rd: RequestsPerSecond = msgspec.field(name="iops_rd")
    iops_wr: RequestsPerSecond = msgspec.field(name="iops_wr")
    bps_max: BytesInBurst = msgspec.field(name="bps_max", default=0)
    bps_rd_max: BytesInBurst = msgspec.field(name="bps_rd_max", default=0)
    bps_wr_max: BytesInBurst = msgspec.field(name="bps_wr_max", default=0)
    iops_max: RequestsInBurst = msgspec.field(name="iops_max", default=0)
    iops_rd_max: RequestsInBurst = msgspec.field(name="iops_rd_max", default=0)
    iops_wr_max: RequestsInBurst = msgspec.field(name="iops_wr_max", default=0)
    bps_max_length: BurstLength = msgspec.field(name="bps_max_length", default=1)
    bps_rd_max_length: BurstLength = msgspec.field(name="bps_rd_max_length", default=1)
    bps_wr_max_length: BurstLength = msgspec.field(name="bps_wr_max_length", default=1)
    iops_max_length: BurstLength = msgspec.field(name="iops_max_length", default=1)
    iops_rd_max_length: BurstLength = msgspec.field(name="iops_rd_max_length", default=1)
    iops_wr_max_length: BurstLength = msgspec.field(name="iops_wr_max_length", default=1)
    iops_size: Annotated[int, Meta(
        description="Bytes for which a request counts as one; longer ones count as several. 0: all count as one.",
    )] = msgspec.field(name="iops_size", default=0)
    group: Annotated[str | None, Meta(description="Disks in one group share its limits. Default: its own.")] = None

    def limits(self) -> Limits:
        """The limits in our names."""
        given = {name: getattr(self, name) for name in self.__struct_fields__ if name.startswith(("bps", "iops"))}
        return Limits(**{throttle_name(name): value for name, value in given.items()})


class ThresholdArguments(Arguments):
    """Arguments of block-set-write-threshold."""

    node_name: Annotated[str, Meta(description="The node.")]
    write_threshold: Annotated[int, Meta(ge=0, description="Bytes from the start of the node; 0: none.")]


@commands.command("block_resize")
async def block_resize(context: Holder, args: ResizeArguments) -> None:
    """Change the length of a node, while it is in use if its users put up with that.

    A block device and an NBD export can only be given the length that they have got by other means. A client of an
    export that asks for the size sees the new one when it connects again.
    """
    graph = context.inventory.graph
    await resize(graph, find_disk(graph, args.device, args.node_name), args.size)


@commands.command("block_set_io_throttle")
async def block_set_io_throttle(context: Holder, args: ThrottleArguments) -> None:
    """Hold the clients of a disk to limits, those that are there and those that come; jobs are not limited.

    Total values exclude those for reads and writes. All limits 0: no limits any more.
    """
    if (args.id is None) == (args.device is None):
        raise CommandError("either 'id' or 'device' must be given, and not both")
    graph = context.inventory.graph
    node = find(graph, args.id if args.device is None else args.device, "DeviceNotFound")
    await set_limits(graph, node, args.limits(), args.group)


@commands.command("block-set-write-threshold")
async def block_set_write_threshold(context: Holder, args: ThresholdArguments) -> None:
    """Have the event BLOCK_WRITE_THRESHOLD sent, once, when a node is written beyond a mark."""
    set_write_threshold(find(context.inventory.graph, args.node_name), args.write_threshold)
