"""How block jobs start: ``blockdev-backup``, ``blockdev-mirror``, ``drive-mirror``, ``block-commit``.

Where QEMU asks for a device or a node, the name of a node is given here; a job without an id gets that name.

What is refused though QEMU has it: compression (no format of ours compresses); a mirror by bitmap; a drive-mirror
that would make its target (``mode=absolute-paths``), or whose format is not raw; a backing file's name, since no
format of ours stores it. Two lengths that differ are refused at once, where QEMU starts a mirror that then fails.

Source: QEMU's QMP reference, "Block core", the commands of these names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from blockstep.block.bitmap import find_bitmap
from blockstep.block.driver import Driver
from blockstep.block.names import check_name
from blockstep.block.permissions import Role
from blockstep.block.status import backing_of
from blockstep.errors import OptionError, noting
from blockstep.jobs import backup
from blockstep.jobs.commit import CommitJob
from blockstep.jobs.job import Job, JobOptions
from blockstep.jobs.mirror import MirrorJob
from blockstep.jobs.states import OnError
from blockstep.jobs.transaction import JobTransaction
from blockstep.qmp.commands.drive_target import target_options
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.commands.lookup import node_named
from blockstep.qmp.errors import CommandError
from blockstep.qmp.schema import Arguments, Registry
from blockstep.units import KiB, MiB

commands = Registry()

Sync = Literal["top", "full", "none", "incremental", "bitmap"]

_Policy = Annotated[OnError, Meta(description="What an I/O error on that side does to the job.")]
_FilterName = Annotated[str | None, Meta(description="Name of the filter that the job puts over the device.")]
#: Chunks in flight at most, whatever a user asks for.
_MOST_WORKERS = 64


class CopyArguments(Arguments, kw_only=True):
    """What all of these commands take."""

    job_id: Annotated[str | None, Meta(description="Id of the job. By default the name of the device.")] = None
    device: Annotated[str, Meta(description="What is copied from.")]
    speed: Annotated[int, Meta(ge=0, description="Bytes a second at most; 0: no limit.")] = 0
    auto_finalize: Annotated[bool, Meta(description="false: wait for block-job-finalize before the last step.")] = True
    auto_dismiss: Annotated[bool, Meta(description="false: stay in the list, until block-job-dismiss.")] = True


class Performance(Arguments):
    """Fine tuning of blockdev-backup."""

    use_copy_range: Annotated[bool, Meta(description="Taken, and of no effect: the kernel copies where it can.")] = True
    max_workers: Annotated[int, Meta(ge=1, description="Chunks in flight, at most 64.")] = 4
    max_chunk: Annotated[int, Meta(ge=0, description="Taken, and of no effect: a chunk has up to 1 MiB.")] = 0


class BackupArguments(CopyArguments, kw_only=True):
    """Arguments of blockdev-backup."""

    target: Annotated[str, Meta(description="What is copied to: as long as the device.")]
    sync: Annotated[Sync, Meta(description=(
        "full: everything. top: what the device's own layer holds. bitmap: what a dirty bitmap says. incremental: the "
        "same, with bitmap-mode=on-success. none: only what is about to be overwritten."))]
    bitmap: Annotated[str | None, Meta(description="A bitmap of the device.")] = None
    bitmap_mode: Annotated[backup.BitmapMode | None, Meta(description=(
        "What becomes of the bitmap. on-success: starts anew if the job succeeds. always: says at the end what was not "
        "copied. never: stays."))] = None
    compress: Annotated[bool, Meta(description="Refused.")] = False
    on_source_error: _Policy = OnError.REPORT
    on_target_error: _Policy = OnError.REPORT
    filter_node_name: _FilterName = None
    x_perf: Annotated[Performance, Meta(description="Fine tuning.")] = field(default_factory=Performance)


class _Mirroring(CopyArguments, kw_only=True):
    sync: Annotated[Sync, Meta(description=(
        "full: everything. top: what the device's own layer holds. none: only what is written from now on."))]
    replaces: Annotated[str | None, Meta(description=(
        "The node whose place the target takes on completion: the device, or a node whose data it shows."))] = None
    granularity: Annotated[int, Meta(ge=0, description=(
        "Bytes of a cluster, a power of two from 512 to 64 MiB; 0: 64 KiB."))] = 0
    buf_size: Annotated[int, Meta(ge=0, description="Bytes in flight at most, in steps of 1 MiB; 0: 4 MiB.")] = 0
    on_source_error: _Policy = OnError.REPORT
    on_target_error: _Policy = OnError.REPORT
    copy_mode: Annotated[Literal["background", "write-blocking"], Meta(description=(
        "write-blocking: the users' own writes go to both ends."))] = "background"


class MirrorArguments(_Mirroring, kw_only=True):
    """Arguments of blockdev-mirror."""

    target: Annotated[str, Meta(description="What is copied to: as long as the device.")]
    filter_node_name: _FilterName = None


class DriveMirrorArguments(_Mirroring, kw_only=True):
    """Arguments of drive-mirror."""

    target: Annotated[str, Meta(description="What is copied to: an NBD URI, nbd:HOST:PORT:exportname=NAME, or a file.")]
    format: Annotated[str | None, Meta(description="raw.")] = None
    node_name: Annotated[str | None, Meta(description="Name of the node that is made for the target.")] = None
    mode: Annotated[Literal["existing", "absolute-paths"], Meta(description=(
        "existing: the target is there. absolute-paths is refused."))] = "absolute-paths"
    unmap: Annotated[bool, Meta(description="Zeroes may become holes in the target.")] = True


class CommitArguments(CopyArguments, kw_only=True):
    """Arguments of block-commit."""

    base_node: Annotated[str | None, Meta(description="What is merged into. By default the lowest layer.")] = None
    base: Annotated[str | None, Meta(description="The same, by file name.")] = None
    top_node: Annotated[str | None, Meta(description="The first layer to merge. By default the device.")] = None
    top: Annotated[str | None, Meta(description="The same, by file name.")] = None
    backing_file: Annotated[str | None, Meta(description="Refused: no format of ours stores it.")] = None
    on_error: _Policy = OnError.REPORT
    filter_node_name: _FilterName = None


def _options(args: CopyArguments) -> JobOptions:
    return {"speed": args.speed, "auto_finalize": args.auto_finalize, "auto_dismiss": args.auto_dismiss}


def _id(args: CopyArguments) -> str:
    return check_name("job-id", args.device if args.job_id is None else args.job_id)


# --- backup ---


async def create_backup(context: Holder, args: BackupArguments, transaction: JobTransaction | None = None) -> Job:
    """A backup whose moment is now, and that has not started to copy."""
    source, target = node_named(context, args.device), node_named(context, args.target)
    if args.compress:
        raise CommandError(f"the target cannot be compressed: node '{target.name}' (driver {target.driver})")
    if target.length != source.length:
        raise OptionError("target", target.name, f"exactly {source.length} bytes long; it has {target.length}")
    sync, mode = _sync(args)
    bitmap = find_bitmap(source, args.bitmap) if args.bitmap is not None else None
    options = _options(args)
    if transaction is not None:
        options["transaction"] = transaction
    job = backup.BackupJob(
        _id(args), context.inventory.graph, source, target, sync=sync, bitmap=bitmap, bitmap_mode=mode,
        on_source_error=args.on_source_error, on_target_error=args.on_target_error,
        filter_node_name=args.filter_node_name, workers=min(args.x_perf.max_workers, _MOST_WORKERS),
        **options)
    return await context.inventory.jobs.create(job, start=False)


def _sync(args: BackupArguments) -> tuple[backup.Sync, backup.BitmapMode]:
    mode = args.bitmap_mode
    if args.sync == "incremental":
        if mode not in (None, "on-success"):
            raise OptionError("bitmap-mode", mode, "on-success, or left out, with sync=incremental")
        mode = "on-success"
    if args.bitmap is None and args.bitmap_mode is not None:
        raise OptionError("bitmap-mode", mode, "left out where there is no bitmap")
    if args.bitmap is not None and mode is None:
        raise OptionError("bitmap-mode", None, "given with a bitmap: on-success, always or never")
    return "bitmap" if args.sync == "incremental" else args.sync, mode or "on-success"


@commands.command("blockdev-backup")
async def blockdev_backup(context: Holder, args: BackupArguments) -> None:
    """Copy a device as it is now to another node, while it is used. At return the moment has been."""
    (await create_backup(context, args)).start()


# --- mirror ---


@commands.command("blockdev-mirror")
async def blockdev_mirror(context: Holder, args: MirrorArguments) -> None:
    """Make a node the same as a device that is used, and keep it so.

    When it is ready, block-job-complete puts it in the device's place; block-job-cancel leaves it as it is then.
    """
    target = node_named(context, args.target)
    await _start_mirror(context, args, target, args.filter_node_name)


@commands.command("drive-mirror")
async def drive_mirror(context: Holder, args: DriveMirrorArguments) -> None:
    """As blockdev-mirror, to an export or a file that the job opens, and closes unless it took the device's place."""
    graph = context.inventory.graph
    node_named(context, args.device)
    if args.mode != "existing":
        raise OptionError("mode", args.mode, "existing: make the target first")
    if args.format not in (None, "raw"):
        raise OptionError("format", args.format, "raw")
    if args.replaces is not None and args.node_name is None:
        raise OptionError("node-name", None, "given with replaces")
    target = await graph.open(target_options(args.target, args.node_name, args.unmap), owned=False)
    try:
        await _start_mirror(context, args, target)
    except BaseException as error:
        with noting(error):
            await graph.close_unused(target)
        raise


async def _start_mirror(context: Holder, args: _Mirroring, target: Driver,
                        filter_node_name: str | None = None) -> None:
    source = node_named(context, args.device)
    if args.sync == "incremental" or args.sync == "bitmap":
        raise OptionError("sync", args.sync, "full, top or none")
    replaces = node_named(context, args.replaces) if args.replaces is not None else None
    await context.inventory.jobs.create(MirrorJob(
        _id(args), context.inventory.graph, source, target, sync=args.sync, copy_mode=args.copy_mode, pivot=True,
        replaces=replaces, filter_node_name=filter_node_name, granularity=args.granularity or 64 * KiB,
        on_source_error=args.on_source_error, on_target_error=args.on_target_error,
        workers=min(max(1, (args.buf_size or 4 * MiB) // MiB), _MOST_WORKERS),
        **_options(args)))


# --- commit ---


@commands.command("block-commit")
async def block_commit(context: Holder, args: CommitArguments) -> None:
    """Merge layers of a device into the one below them.

    If the first of them is the device itself, its users' writes are followed; it becomes ready, and
    block-job-complete puts the base in its place. Else the layers above are put over the base when it is done.

    Errors: DeviceNotFound if there is no such device.
    """
    device = context.inventory.graph.find(args.device)
    if any(edge.role is Role.BACKING for edge in device.parents):
        raise CommandError(f"node '{device.name}' is no device: it is the backing node of another")
    top = _layer(context, device, "top", args.top_node, args.top) or device
    base = _layer(context, device, "base", args.base_node, args.base) or _lowest(device)
    if base is top:
        raise OptionError("base", base.name, f"another node than the top '{top.name}'")
    if args.backing_file is not None:
        raise OptionError("backing-file", args.backing_file, "left out: the layers above do not store it")
    await context.inventory.jobs.create(CommitJob(
        _id(args), context.inventory.graph, top, base, active=top is device, on_source_error=args.on_error,
        on_target_error=args.on_error, filter_node_name=args.filter_node_name, **_options(args)))


def _layer(context: Holder, device: Driver, which: str, name: str | None, filename: str | None) -> Driver | None:
    """The layer of ``device`` that the user means, if any."""
    if name is not None and filename is not None:
        raise CommandError(f"'{which}-node' and '{which}' exclude each other")
    layers = list(device.chain())
    if filename is not None:
        for layer in layers:
            if _filename(layer) == filename:
                return layer
        raise OptionError(which, filename, f"the file of a layer of '{device.name}'")
    if name is None:
        return None
    node = node_named(context, name)
    if node not in layers:
        raise OptionError(f"{which}-node", name, f"a layer of '{device.name}'")
    return node


def _lowest(device: Driver) -> Driver:
    lowest = device
    while (below := backing_of(lowest)) is not None:
        lowest = below
    return lowest


def _filename(node: Driver) -> str | None:
    """The file in which a node's data is, if it is in one."""
    while "file" in node.children:
        node = node.children["file"].node
    return getattr(node.options, "filename", None)
