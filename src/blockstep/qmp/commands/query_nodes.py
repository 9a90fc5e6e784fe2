"""What there is: disks, nodes, their counters, the graph.

There are no guest devices. Where QEMU shows devices, a *disk* is shown, under its node name: a node that was added by
name and that no other such node stands on, or one that clients use or have used.

Counters are of clients (exports), from the first on, for as long as the node is open; jobs are not counted, nor is
what the human monitor's qemu-io does. A node that no client came to has zeroes, as with QEMU.

Source: QEMU's QMP reference, "Block core", for names and results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blockstep.block.accounting import Account, is_inserted
from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.node import Child, Parent
from blockstep.block.permissions import Permission
from blockstep.block.write_threshold import write_threshold
from blockstep.drivers.throttle import Limits
from blockstep.inventory.filenames import filename_of
from blockstep.inventory.inventory import Inventory
from blockstep.inventory.limits import limits_of, throttle_name
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.schema import Arguments, Registry, Result

commands = Registry()


# --- disks and nodes ---


class CacheInfo(Result):
    """How the host's page cache is used."""

    writeback: bool
    direct: bool
    no_flush: bool


class DirtyBitmapInfo(Result, kw_only=True):
    """A dirty bitmap. ``count`` and ``granularity`` in bytes."""

    name: str | UnsetType = UNSET
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | UnsetType = UNSET


class ImageInfo(Result, kw_only=True):
    """What a node stands for. Sizes in bytes; ``actual-size``: what it occupies, where that is known."""

    filename: str
    image_format: str = msgspec.field(name="format")
    virtual_size: int
    actual_size: int | UnsetType = UNSET
    cluster_size: int | UnsetType = UNSET
    backing_filename: str | UnsetType = UNSET
    full_backing_filename: str | UnsetType = UNSET
    backing_filename_format: str | UnsetType = UNSET
    backing_image: ImageInfo | UnsetType = UNSET


class NodeInfo(Result, kw_only=True):
    """A node. Limits are those of block_set_io_throttle. ``write_threshold``: 0: none.

    ``fault``: what has become of its file, if others have harmed that: the last BLOCK_STORAGE_FAULT. Ours.
    """

    file: str
    node_name: str | UnsetType = UNSET
    ro: bool
    drv: str
    backing_file: str | UnsetType = msgspec.field(name="backing_file", default=UNSET)
    backing_file_depth: int = msgspec.field(name="backing_file_depth")
    encrypted: bool
    detect_zeroes: Literal["off", "on", "unmap"] = msgspec.field(name="detect_zeroes")
    bps: int
    bps_rd: int = msgspec.field(name="bps_rd")
    bps_wr: int = msgspec.field(name="bps_wr")
    iops: int
    iops_rd: int = msgspec.field(name="iops_rd")
    iops_wr: int = msgspec.field(name="iops_wr")
    image: ImageInfo
    bps_max: int | UnsetType = msgspec.field(name="bps_max", default=UNSET)
    bps_rd_max: int | UnsetType = msgspec.field(name="bps_rd_max", default=UNSET)
    bps_wr_max: int | UnsetType = msgspec.field(name="bps_wr_max", default=UNSET)
    iops_max: int | UnsetType = msgspec.field(name="iops_max", default=UNSET)
    iops_rd_max: int | UnsetType = msgspec.field(name="iops_rd_max", default=UNSET)
    iops_wr_max: int | UnsetType = msgspec.field(name="iops_wr_max", default=UNSET)
    bps_max_length: int | UnsetType = msgspec.field(name="bps_max_length", default=UNSET)
    bps_rd_max_length: int | UnsetType = msgspec.field(name="bps_rd_max_length", default=UNSET)
    bps_wr_max_length: int | UnsetType = msgspec.field(name="bps_wr_max_length", default=UNSET)
    iops_max_length: int | UnsetType = msgspec.field(name="iops_max_length", default=UNSET)
    iops_rd_max_length: int | UnsetType = msgspec.field(name="iops_rd_max_length", default=UNSET)
    iops_wr_max_length: int | UnsetType = msgspec.field(name="iops_wr_max_length", default=UNSET)
    iops_size: int | UnsetType = msgspec.field(name="iops_size", default=UNSET)
    group: str | UnsetType = UNSET
    cache: CacheInfo
    write_threshold: int = msgspec.field(name="write_threshold")
    dirty_bitmaps: list[DirtyBitmapInfo] | UnsetType = UNSET
    fault: str | UnsetType = UNSET


class DiskInfo(Result, kw_only=True):
    """A disk. ``device`` is its node name; ``type``, ``removable`` and ``locked`` are always the same."""

    device: str
    kind: str = msgspec.field(name="type")
    removable: bool
    locked: bool
    inserted: NodeInfo | UnsetType = UNSET


class FlatArguments(Arguments):
    """Arguments of query-named-block-nodes."""

    flat: Annotated[bool, Meta(description="Leave out backing-image: backing nodes are in the list anyway.")] = False


@commands.command("query-block")
async def query_block(context: Holder, args: Arguments) -> list[DiskInfo]:
    """All disks."""
    inventory = context.inventory
    return [DiskInfo(device=node.name, kind="unknown", removable=True, locked=False,
                     inserted=node_info(inventory, node))
            for node in disks(inventory.graph)]


@commands.command("query-named-block-nodes")
async def query_named_block_nodes(context: Holder, args: FlatArguments) -> list[NodeInfo]:
    """All nodes, those included that came with others."""
    inventory = context.inventory
    return [node_info(inventory, node, args.flat) for node in inventory.graph.nodes.values()]


def disks(graph: Graph) -> list[Driver]:
    """The nodes that are shown as disks; see the module."""
    return [node for node in graph.nodes.values()
            if node.owned and not is_inserted(node)
            and (graph.accounts.of(node) is not None or not any(above.owned for above in _above(graph, node)))]


def _above(graph: Graph, node: Driver) -> Iterator[Driver]:
    """All nodes above; the filters of jobs and limits do not count, and hide nothing above them."""
    for edge in node.parents:
        if isinstance(edge.parent, Driver):
            if not is_inserted(edge.parent):
                yield edge.parent
            yield from _above(graph, edge.parent)


def node_info(inventory: Inventory, node: Driver, flat: bool = False) -> NodeInfo:
    """One node."""
    backing = _own_backing(node)
    group = limits_of(inventory.graph, node)
    cache = node.options.cache
    info = NodeInfo(
        file=filename_of(node), node_name=node.name, ro=node.read_only, drv=node.driver,
        backing_file=UNSET if backing is None else filename_of(backing),
        backing_file_depth=0 if flat else len(list(node.chain())) - 1,  # QEMU counts filters, too
        encrypted=False, detect_zeroes="off", bps=0, bps_rd=0, bps_wr=0, iops=0, iops_rd=0, iops_wr=0,
        image=image_info(node, flat),
        group=UNSET if group is None else group.name,
        cache=CacheInfo(writeback=True, direct=cache.direct, no_flush=cache.no_flush),
        write_threshold=write_threshold(node), fault=inventory.faults.get(node.name, UNSET))
    if group is not None:
        _show_limits(info, group.limits)
    bitmaps = [bitmap for bitmap in node.bitmaps.values() if isinstance(bitmap, DirtyBitmap)]
    if bitmaps:
        info.dirty_bitmaps = [
            DirtyBitmapInfo(name=bitmap.name, count=bitmap.count(), granularity=bitmap.granularity,
                            recording=bitmap.enabled, busy=bitmap.busy is not None,
                            persistent=bitmap.persistent, inconsistent=bitmap.inconsistent or UNSET)
            for bitmap in bitmaps]
    return info


_LIMITS: Final = [name for name in NodeInfo.__struct_fields__ if name.startswith(("bps", "iops"))]


def _show_limits(info: NodeInfo, limits: Limits) -> None:
    """As QEMU: a burst where there is one, and its length with it."""
    for name in _LIMITS:
        value = getattr(limits, throttle_name(name))
        burst = name.removesuffix("_length")
        if not name.endswith(("max", "max_length", "size")) or getattr(limits, throttle_name(burst)):
            setattr(info, name, value)


def image_info(node: Driver, flat: bool = False) -> ImageInfo:
    """What a node stands for, and unless ``flat`` all that it stands on."""
    backing, occupied = _own_backing(node), node.occupied()
    info = ImageInfo(filename=filename_of(node), image_format=node.driver, virtual_size=node.length,
                     actual_size=UNSET if occupied is None else occupied)
    if node.can_be_emptied:
        info.cluster_size = node.cluster_size
    if node.is_filter and not flat and "file" in node.children:  # QEMU shows what is filtered in that place, too
        info.backing_image = image_info(node.children["file"].node)
    if backing is not None:
        info.backing_filename = info.full_backing_filename = filename_of(backing)
        info.backing_filename_format = backing.driver
        if not flat:
            info.backing_image = image_info(backing)
    return info


def _own_backing(node: Driver) -> Driver | None:
    """The backing node; a filter has none here, whatever it filters."""
    edge = node.children.get("backing")
    return None if edge is None else edge.node


# --- counters ---


class TimedCounters(Result):
    """Of QEMU; none are kept here."""

    interval_length: int = msgspec.field(name="interval_length")
    min_rd_latency_ns: int = msgspec.field(name="min_rd_latency_ns")
    max_rd_latency_ns: int = msgspec.field(name="max_rd_latency_ns")
    avg_rd_latency_ns: int = msgspec.field(name="avg_rd_latency_ns")
    min_wr_latency_ns: int = msgspec.field(name="min_wr_latency_ns")
    max_wr_latency_ns: int = msgspec.field(name="max_wr_latency_ns")
    avg_wr_latency_ns: int = msgspec.field(name="avg_wr_latency_ns")
    min_flush_latency_ns: int = msgspec.field(name="min_flush_latency_ns")
    max_flush_latency_ns: int = msgspec.field(name="max_flush_latency_ns")
    avg_flush_latency_ns: int = msgspec.field(name="avg_flush_latency_ns")
    avg_rd_queue_depth: float = msgspec.field(name="avg_rd_queue_depth")
    avg_wr_queue_depth: float = msgspec.field(name="avg_wr_queue_depth")


class Counters(Result):
    """Counters of clients' requests. Bytes and operations are exact; of reads and writes the time is estimated
    from each 16th. ``wr_highest_offset``: the end of the write that went furthest."""

    rd_bytes: int = msgspec.field(name="rd_bytes")
    wr_bytes: int = msgspec.field(name="wr_bytes")
    unmap_bytes: int = msgspec.field(name="unmap_bytes")
    rd_operations: int = msgspec.field(name="rd_operations")
    wr_operations: int = msgspec.field(name="wr_operations")
    flush_operations: int = msgspec.field(name="flush_operations")
    unmap_operations: int = msgspec.field(name="unmap_operations")
    rd_total_time_ns: int = msgspec.field(name="rd_total_time_ns")
    wr_total_time_ns: int = msgspec.field(name="wr_total_time_ns")
    flush_total_time_ns: int = msgspec.field(name="flush_total_time_ns")
    unmap_total_time_ns: int = msgspec.field(name="unmap_total_time_ns")
    wr_highest_offset: int = msgspec.field(name="wr_highest_offset")
    rd_merged: int = msgspec.field(name="rd_merged")
    wr_merged: int = msgspec.field(name="wr_merged")
    unmap_merged: int = msgspec.field(name="unmap_merged")
    failed_rd_operations: int = msgspec.field(name="failed_rd_operations")
    failed_wr_operations: int = msgspec.field(name="failed_wr_operations")
    failed_flush_operations: int = msgspec.field(name="failed_flush_operations")
    failed_unmap_operations: int = msgspec.field(name="failed_unmap_operations")
    invalid_rd_operations: int = msgspec.field(name="invalid_rd_operations")
    invalid_wr_operations: int = msgspec.field(name="invalid_wr_operations")
    invalid_flush_operations: int = msgspec.field(name="invalid_flush_operations")
    invalid_unmap_operations: int = msgspec.field(name="invalid_unmap_operations")
    account_invalid: bool = msgspec.field(name="account_invalid")
    account_failed: bool = msgspec.field(name="account_failed")
    timed_stats: list[TimedCounters] = msgspec.field(name="timed_stats")


class Statistics(Result, kw_only=True):
    """Counters of a disk or a node, and of what it stands on: ``parent`` is its storage, as QEMU has it."""

    device: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    stats: Counters
    parent: Statistics | UnsetType = UNSET
    backing: Statistics | UnsetType = UNSET


class StatisticsArguments(Arguments):
    """Arguments of query-blockstats."""

    query_nodes: Annotated[bool, Meta(description="All nodes, in place of the disks.")] = False


@commands.command("query-blockstats")
async def query_blockstats(context: Holder, args: StatisticsArguments) -> list[Statistics]:
    """Counters of all disks, or of all nodes."""
    graph = context.inventory.graph
    if args.query_nodes:
        return [_statistics(graph, node, chain=False) for node in graph.nodes.values()]
    found = []
    for node in disks(graph):
        statistics = _statistics(graph, node)
        statistics.device = node.name
        found.append(statistics)
    return found


def _statistics(graph: Graph, node: Driver, chain: bool = True) -> Statistics:
    found = Statistics(node_name=node.name, stats=counters(graph.accounts.of(node) or Account()))
    storage = node.children.get("file") or node.children.get("children.0")
    if storage is not None:
        found.parent = _statistics(graph, storage.node, chain)
    backing = _own_backing(node)
    if backing is not None and chain:
        found.backing = _statistics(graph, backing, chain)
    return found


def counters(account: Account) -> Counters:
    """An account as QEMU shows it."""
    read, write, flush, unmap = account.read, account.write, account.flush, account.unmap
    return Counters(
        rd_bytes=read.bytes, wr_bytes=write.bytes, unmap_bytes=unmap.bytes,
        rd_operations=read.operations, wr_operations=write.operations,
        flush_operations=flush.operations, unmap_operations=unmap.operations,
        rd_total_time_ns=read.nanoseconds, wr_total_time_ns=write.nanoseconds,
        flush_total_time_ns=flush.nanoseconds, unmap_total_time_ns=unmap.nanoseconds,
        wr_highest_offset=account.highest, rd_merged=0, wr_merged=0, unmap_merged=0,
        failed_rd_operations=read.failed, failed_wr_operations=write.failed,
        failed_flush_operations=flush.failed, failed_unmap_operations=unmap.failed,
        invalid_rd_operations=read.invalid, invalid_wr_operations=write.invalid,
        invalid_flush_operations=flush.invalid, invalid_unmap_operations=unmap.invalid,
        account_invalid=True, account_failed=True, timed_stats=[])


# --- the graph ---

PermissionName = Literal["consistent-read", "write", "write-unchanged", "resize"]


class GraphNode(Result):
    """A node, a job, or another user (an export)."""

    id: int
    kind: Literal["block-backend", "block-job", "block-driver"] = msgspec.field(name="type")
    name: str


class GraphEdge(Result):
    """``parent`` uses ``child`` under ``name``; ``perm`` is what it takes, ``shared-perm`` what others may."""

    parent: int
    child: int
    name: str
    perm: list[PermissionName]
    shared_perm: list[PermissionName]


class GraphInfo(Result):
    """Result of x-debug-query-block-graph."""

    nodes: list[GraphNode]
    edges: list[GraphEdge]


_JOB: Final = re.compile(r"job '(.*?)'(?:, (.*))?")


@commands.command("x-debug-query-block-graph")
async def x_debug_query_block_graph(context: Holder, args: Arguments) -> GraphInfo:
    """The graph: nodes, users, and edges with their permissions. The ids hold within one answer."""
    nodes = [GraphNode(id=number, kind="block-driver", name=node.name)
             for number, node in enumerate(context.inventory.graph.nodes.values(), 1)]
    ids: dict[object, int] = {node.name: node.id for node in nodes}
    edges = []
    for node in context.inventory.graph.nodes.values():
        for edge in node.parents:
            key, kind, name = _user(edge.parent)
            if key not in ids:
                ids[key] = len(ids) + 1
                nodes.append(GraphNode(id=ids[key], kind=kind, name=name))
            edges.append(GraphEdge(parent=ids[key], child=ids[node.name], name=_edge_name(edge),
                                   perm=_names(edge.taken), shared_perm=_names(edge.shared)))
    return GraphInfo(nodes=nodes, edges=edges)


def _user(parent: Parent) -> tuple[object, Literal["block-backend", "block-job", "block-driver"], str]:
    """What tells it apart, what it is, what it is called. All users of one job are that job."""
    if isinstance(parent, Driver):
        return parent.name, "block-driver", parent.name
    if job := _JOB.fullmatch(parent.description):
        return ("job", job[1]), "block-job", job[1]
    return ("user", id(parent)), "block-backend", parent.description


def _edge_name(edge: Child) -> str:
    job = None if isinstance(edge.parent, Driver) else _JOB.fullmatch(edge.parent.description)
    return edge.name if job is None else job[2] or "main node"


def _names(permissions: Permission) -> list[PermissionName]:
    return [name for name, flag in _PERMISSIONS.items() if flag in permissions]


_PERMISSIONS: Final[dict[PermissionName, Permission]] = {
    "consistent-read": Permission.CONSISTENT_READ, "write": Permission.WRITE,
    "write-unchanged": Permission.WRITE_UNCHANGED, "resize": Permission.RESIZE,
}
