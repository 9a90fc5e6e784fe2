"""Block replication in a storage daemon: QEMU's commands for it, and our own names of the same operations.

    replication-start mode=M       xen-set-replication enable=true primary=...
    replication-checkpoint         xen-colo-do-checkpoint
    replication-stop               xen-set-replication enable=false, and nothing else for failover
    replication-failover           xen-set-replication enable=false failover=true, x-colo-lost-heartbeat
    query-replication              query-xen-replication-status, query-colo-status

The operations are those over all filters of the process (`blockstep.replication.registry`): all of them, or none.

**And the commands of a pair.** ``blockstep primary`` and ``blockstep standby`` have commands of the same names. Where
the names are the same, so are arguments and results, so that ``blockstep status`` and others can ask either; what a
daemon does not have is empty: it does not know its peer or its link, it takes no checkpoints by itself, and what a
primary's filter has not forwarded is lost and not counted (``behind`` is 0). Two things are different because the
programs are. The two ends of a pair talk to each other, so that a checkpoint on the primary is one on the standby;
here whoever drives the two daemons does that, as with QEMU: a checkpoint of a primary alone moves nobody's view. And
``replication-start`` is here only: a pair starts by itself.

**And QEMU.** A failover of a filter that is not running is an error, while QEMU says nothing. With QEMU COLO begins
with a migration; here with a start. ``COLO_EXIT`` comes at each end of replication.

Source: QEMU's QMP reference, "Xen and COLO replication" commands and ``COLO_EXIT``.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from blockstep.block.driver import Driver
from blockstep.drivers.replication import Replication, Stage
from blockstep.errors import ReplicationError
from blockstep.inventory.inventory import Inventory
from blockstep.qmp.commands import replication as pair
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.errors import CommandError
from blockstep.qmp.schema import Arguments, Event, Registry, Result

commands = Registry()
for shared in (pair.ReplicationState, pair.ReplicationCheckpoint, pair.ReplicationFailover, pair.ReplicationIoError):
    commands.events[shared.kind.name] = shared.kind

ColoMode = Literal["none", "primary", "secondary"]


class StartArguments(Arguments):
    """Arguments of replication-start."""

    mode: Annotated[Literal["primary", "secondary"], Meta(description="Which end of the replication this process is.")]


class SetReplicationArguments(Arguments):
    """Arguments of xen-set-replication."""

    enable: Annotated[bool, Meta(description="Start, or stop.")]
    primary: Annotated[bool, Meta(description="Which end this is. Of no account when it stops.")]
    failover: Annotated[bool | None, Meta(description="When it stops: live on from the checkpoint.")] = None


class XenStatus(Result):
    """Result of query-xen-replication-status. ``desc`` is there if there is an error."""

    error: bool
    desc: str | UnsetType = UNSET


class ColoStatus(Result):
    """Result of query-colo-status: what this process is, what it was last, and why it is that no more.

    ``reason``: none, it has not ended; request, a command ended it; processing, a promotion is being merged; error,
    that failed.
    """

    mode: ColoMode
    last_mode: ColoMode
    reason: Literal["none", "request", "error", "processing"]


@commands.event("COLO_EXIT")
class ColoExit(Event):
    """Replication has ended here. ``mode``: what this was."""

    mode: ColoMode
    reason: Literal["none", "request", "error", "processing"]


# --- our own ---


@commands.command("replication-start")
async def replication_start(context: Holder, args: StartArguments) -> None:
    """Start all replication filters, or none. The standby's first: its start is its first checkpoint."""
    if not context.inventory.replication.filters:
        raise CommandError("there is no replication filter to start")
    await context.inventory.colo.start(args.mode)


@commands.command("replication-checkpoint")
async def replication_checkpoint(context: Holder, args: Arguments) -> pair.Committed:
    """Move the views of a standby to what the primary wrote, all of them or none. On a primary nothing happens.

    ``pause``: seconds for which the views' requests were held back, at most.
    """
    _some_filter(context.inventory, "checkpoint")
    colo = context.inventory.colo
    await colo.checkpoint()
    return pair.Committed(epoch=colo.epoch, pause=colo.pause)


@commands.command("replication-failover")
async def replication_failover(context: Holder, args: pair.FailoverArguments) -> pair.Promoted:
    """Promote this standby. From then on its old primary's writes are refused, and its clients cut off.

    Answers when the views can be used; merging goes on as a job, and REPLICATION_FAILOVER says when it is done. May be
    repeated after a failure. ``to`` latest: the views are what the primary wrote.
    """
    inventory = context.inventory
    standby = [filter for filter in inventory.replication.filters if filter.mode == "secondary"]
    if not standby:
        raise CommandError("this is no standby: it has no replication filter in mode secondary")
    began = time.monotonic()
    if args.to == "latest":
        await inventory.colo.stop()
    else:
        await inventory.colo.fail_over()
    return pair.Promoted(epoch=inventory.colo.epoch, seconds=time.monotonic() - began,
                         exports=_uris(inventory, standby), faults=inventory.colo.faults())


@commands.command("replication-stop")
async def replication_stop(context: Holder, args: Arguments) -> None:
    """End replication. A primary's disks live on alone; the views of a standby are what the primary wrote last."""
    _some_filter(context.inventory, "stop")
    await context.inventory.colo.stop()


@commands.command("query-replication")
async def query_replication(context: Holder, args: Arguments) -> pair.PairStatus:
    """How replication is, as seen from this end. An error if there is no replication filter."""
    inventory = context.inventory
    await context.look()
    filters = _some_filter(inventory, "status")
    colo = inventory.colo
    how = colo.how()
    return pair.PairStatus(
        pair=colo.name, role=how.role, state=how.state, health=how.health, reason=how.reason, link="", peer="",
        ack="both" if how.role == "primary" else "", checkpoint_every=0.0, checkpoint_bytes=0,
        checkpoint=pair.CheckpointStatus(epoch=colo.epoch, age=colo.age, pause=colo.pause) if colo.epoch else None,
        disks=[_disk_status(filter, colo.fault(filter)) for filter in filters], work=_work(inventory),
        exports=_uris(inventory, filters))


# --- QEMU's ---


@commands.command("xen-set-replication")
async def xen_set_replication(context: Holder, args: SetReplicationArguments) -> None:
    """Start or stop replication: see replication-start, replication-stop and replication-failover.

    Without a filter nothing happens.
    """
    colo = context.inventory.colo
    if args.enable:
        if args.failover is not None:
            raise CommandError("argument 'failover' is for stopping only")
        await colo.start("primary" if args.primary else "secondary")
    elif args.failover:
        await colo.fail_over()
    else:
        await colo.stop()


@commands.command("xen-colo-do-checkpoint")
async def xen_colo_do_checkpoint(context: Holder, args: Arguments) -> None:
    """A checkpoint: see replication-checkpoint. Without a filter nothing happens."""
    await context.inventory.colo.checkpoint()


@commands.command("query-xen-replication-status")
async def query_xen_replication_status(context: Holder, args: Arguments) -> XenStatus:
    """Whether all filters are well."""
    try:
        context.inventory.replication.get_error_all()
    except ReplicationError as error:
        return XenStatus(error=True, desc=str(error))
    return XenStatus(error=False)


@commands.command("x-colo-lost-heartbeat")
async def x_colo_lost_heartbeat(context: Holder, args: Arguments) -> None:
    """The other end is gone: a standby is promoted, a primary lives on alone."""
    await context.inventory.colo.lost_heartbeat()


@commands.command("query-colo-status")
async def query_colo_status(context: Holder, args: Arguments) -> ColoStatus:
    """What this process is in replication, and was."""
    colo = context.inventory.colo
    return ColoStatus(mode=colo.mode, last_mode=colo.last_mode, reason=colo.reason)


# --- how it is ---


def _some_filter(inventory: Inventory, step: str) -> list[Replication]:
    if not inventory.replication.filters:
        raise CommandError(f"{step}: there is no replication filter")
    return inventory.replication.filters


def _disk_status(filter: Replication, fault: str) -> pair.DiskStatus:
    state = filter.stage.value
    if filter.stage is Stage.DONE:
        state = "promoted" if filter.failed_over else "stopped"
    used = 0 if filter.buffer is None else filter.buffer.used
    disk = filter.file.node
    for _ in range(2 if filter.options.mode == "secondary" and filter.stage is not Stage.DONE else 0):
        disk = disk.children["backing"].node if "backing" in disk.children else disk
    format = disk.driver if disk.driver in ("qcow2", "overlay") else "raw"
    return pair.DiskStatus(name=filter.name, format=format, size=filter.length, state=state, behind=0,
                           buffer_used=used, buffer_limit=0, fault=fault,
                           reason="; ".join(text for text in (fault, str(filter.error or "")) if text))


def _work(inventory: Inventory) -> pair.WorkStatus | None:
    names = {f"failover-{filter.name}" for filter in inventory.replication.filters}
    jobs = [job for job in inventory.jobs.list() if job.id in names]
    if not jobs:
        return None
    current, total = sum(job.current for job in jobs), sum(job.total for job in jobs)
    speed = sum(job.rate or 0.0 for job in jobs)
    return pair.WorkStatus(kind="failover", current=current, total=total, speed=speed,
                           time_left=(total - current) / speed if speed else -1.0)


def _uris(inventory: Inventory, filters: list[Replication]) -> list[str]:
    """The NBD URIs of all exports that show a disk of these filters from above."""
    wanted: set[int] = {id(filter) for filter in filters}

    def shows(node: Driver) -> bool:
        return id(node) in wanted or any(id(below) in wanted for below in node.below())

    return [uri for export in inventory.exports if shows(export.node) for uri in inventory.exports.uris(export)]
