"""What a pair answers: its status, checkpoints, failover, stop; and what a primary asks of its standby.

Two areas. `commands` is for operators, on the QMP socket of either end. `peer_commands` is for the primary, on the
control port of a standby, which offers nothing else.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from blockstep.errors import OptionError
from blockstep.qmp.schema import Arguments, Event, Monitor, Registry, Result

commands = Registry()
peer_commands = Registry()

Health = Literal["healthy", "degraded", "at-risk"]


class DiskStatus(Result):
    """One disk of a pair. All sizes in bytes."""

    name: str
    #: Of its file: raw, qcow2 or overlay.
    format: str
    size: int
    #: On a standby its own: none (no checkpoint), running, failover, failover-failed, promoted, stopped.
    state: str
    #: What the standby lacks (on the primary): in the queue, or to be copied by a resync, or compared by a sync that
    #: runs.
    behind: int
    #: What the standby's disk buffer holds, and can hold: in memory, and in what is free in its directory (0: no limit
    #: is known). 0 on the primary.
    buffer_used: int
    buffer_limit: int
    #: What is wrong with it; empty if nothing is.
    reason: str
    #: Of that, what others have done to its file; empty if nothing.
    fault: str


class WorkStatus(Result):
    """A long work: the first sync, a resync, the merge after a failover."""

    kind: Literal["sync", "resync", "failover"]
    current: int
    total: int
    #: Bytes a second, so far.
    speed: float
    #: Seconds that it will take at this speed; negative if it cannot be told yet.
    time_left: float


class CheckpointStatus(Result):
    """The last checkpoint."""

    epoch: int
    #: Seconds since it was committed.
    age: float
    #: Seconds for which writes were held back from the link.
    pause: float


class PairStatus(Result):
    """Result of query-replication. Consumers ignore members that they do not know."""

    pair: str
    role: Literal["primary", "standby", "promoted"]
    state: str
    health: Health
    #: Why it is not healthy; empty if it is. Faults of the other end's files are told here as well, as far as known.
    reason: str
    #: Where a primary finds this standby; empty on a primary.
    link: str
    #: The other end, as far as it is known.
    peer: str
    #: Who has a write when the guest is told: ``local`` or ``both``.
    ack: str
    #: Seconds and bytes after which a checkpoint is due (0: never).
    checkpoint_every: float
    checkpoint_bytes: int
    #: None before the first one.
    checkpoint: CheckpointStatus | None
    disks: list[DiskStatus]
    work: WorkStatus | None
    #: Where a guest finds the disks: NBD URIs.
    exports: list[str]


class Committed(Result):
    """Result of replication-checkpoint."""

    epoch: int
    pause: float


class FailoverArguments(Arguments):
    """Arguments of replication-failover."""

    to: Annotated[
        Literal["checkpoint", "latest"],
        Meta(description="Live on from the last checkpoint, or from the latest data that the primary sent."),
    ] = "checkpoint"


class Promoted(Result):
    """Result of replication-failover. ``seconds``: until the disks could be used.

    ``faults``: what has become of the files of the disks, one text a disk, as far as that is known already; the status
    looks anew.
    """

    epoch: int
    seconds: float
    exports: list[str]
    faults: list[str]


Size = Annotated[int, Meta(ge=0, description="Bytes.")]


class ResizeArguments(Arguments):
    """Arguments of block_resize: ``node-name`` or ``device``, either of them the name of a disk."""

    size: Size
    node_name: str | None = None
    device: str | None = None


class Pair(Protocol):
    """What these commands need of their context."""

    async def look(self) -> None: ...
    def status(self) -> PairStatus: ...
    async def checkpoint(self) -> Committed: ...
    async def fail_over(self, to: Literal["checkpoint", "latest"]) -> Promoted: ...
    async def stop_replication(self) -> None: ...
    async def resize(self, disk: str, size: int) -> None: ...


@commands.event("REPLICATION_STATE")
class ReplicationState(Event):
    """The pair, as seen from this end, has another state, health or reason."""

    pair: str
    role: str
    state: str
    health: str
    reason: str
    epoch: int


@commands.event("REPLICATION_CHECKPOINT", rate_limit=0.1, per=("pair",))
class ReplicationCheckpoint(Event):
    """The standby has committed a checkpoint."""

    pair: str
    epoch: int
    pause: float


@commands.event("REPLICATION_FAILOVER")
class ReplicationFailover(Event):
    """The standby was promoted (``stage`` begun), all disks are promoted and merged (done), or not all (failed).

    After a failure ``reason`` says which are not, and what to do; the next attempt is announced like the first.
    """

    pair: str
    stage: Literal["begun", "done", "failed"]
    to: str
    epoch: int
    reason: str


@commands.event("REPLICATION_ENDED")
class ReplicationEnded(Event):
    """The program is about to end: its exports have ended and its disks are closed.

    With an empty ``reason`` all is in order. On a primary: the standby has everything, at checkpoint ``epoch``. On a
    standby: its disks are at that checkpoint, or what a promotion, or a stop, made them. Else ``reason`` says what is
    missing.
    """

    pair: str
    role: str
    epoch: int
    reason: str


@commands.event("REPLICATION_IO_ERROR", rate_limit=1.0, per=("pair", "disk"))
class ReplicationIoError(Event):
    """A request failed: of the primary's, on a standby; on a primary, the guest's, when it is the first to fail so."""

    pair: str
    disk: str
    reason: str


@commands.command("query-replication")
async def query_replication(context: Pair, args: Arguments) -> PairStatus:
    """How the pair is, as seen from this end. Never waits for the other end."""
    await context.look()
    return context.status()


@commands.command("replication-checkpoint")
async def replication_checkpoint(context: Pair, args: Arguments) -> Committed:
    """Take a checkpoint over all disks of the pair, on the primary. Answers when the standby has committed it."""
    return await context.checkpoint()


@commands.command("replication-failover")
async def replication_failover(context: Pair, args: FailoverArguments) -> Promoted:
    """Promote this standby. From then on its old primary's writes are refused.

    Answers when the disks can be used; merging the buffers goes on in the background, as a job. May be repeated: it
    goes on with the disks that could not be promoted, or merged, and leaves the others alone.
    """
    return await context.fail_over(args.to)


@commands.command("replication-stop")
async def replication_stop(context: Pair, args: Arguments) -> None:
    """End replication. The primary serves its disks on; a standby shows what the primary wrote last."""
    await context.stop_replication()


@commands.command("block_resize")
async def block_resize(context: Pair, args: ResizeArguments) -> None:
    """Let a disk grow while it is in use, on the primary; its standby grows first, or when it comes back.

    When it answers, writes to the new part are served; a client that asks for the size sees the new one when it
    connects again. On a standby it is refused, until that has been promoted and its buffers are merged.
    """
    disk = args.node_name if args.device is None else args.device
    if disk is None or (args.node_name is not None and args.device is not None):
        raise OptionError("node-name", args.node_name, "given, or device, and not both")
    await context.resize(disk, args.size)


# --- between the two ends ---


class AttachDisk(Arguments):
    """A disk of the primary."""

    name: str
    size: Size


class AttachArguments(Arguments):
    """Arguments of pair-attach. ``instance`` names the run of the primary: its bitmaps last as long as it does.

    A run that goes on where one has ended in good order is called NEW/OLD: see `blockstep.daemon.good_end`.
    ``silence``: after so many seconds without a command the primary is gone, whatever its connection says; 0: never.
    """

    pair: str
    instance: str
    disks: list[AttachDisk]
    silence: Annotated[float, Meta(ge=0)] = 0.0


class Attached(Result):
    """Result of pair-attach.

    ``accepted`` False: the standby was promoted, ``reason`` says so. ``instance`` and ``epoch`` name the last
    checkpoint that it committed and whose, also if it has given it up since; ``running``: it has one. ``port``: where
    its disks are exported; ``prefix`` and its name is what a disk is called there, for this connection: who redials
    after another has been attached finds nothing under the old names. ``buffer_limit``: bytes that the buffer of a
    disk takes between two checkpoints; 0: no limit.
    """

    accepted: bool
    reason: str
    instance: str
    epoch: int
    running: bool
    port: int
    prefix: str
    buffer_limit: int


class CommitArguments(Arguments):
    """Arguments of pair-checkpoint."""

    epoch: Annotated[int, Meta(ge=1)]


class DurableArguments(Arguments):
    """Arguments of pair-durable. ``prefix``: of the attach to which the connection belongs."""

    epoch: Annotated[int, Meta(ge=1)]
    prefix: str


class DigestsArguments(Arguments):
    """Arguments of pair-digests. ``prefix``: of the attach. ``offset`` and ``length``: bytes, whole clusters of 64 KiB.

    ``key``: of the digests.
    """

    prefix: str
    disk: str
    offset: Size
    length: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
    key: Annotated[bytes, Meta(min_length=16, max_length=64)]


class Digests(Result):
    """Result of pair-digests: of a part of what was asked for, from its beginning on.

    ``zeroes``: so many bytes are known to be zero. ``digests``: of the clusters after them, one after the other: keyed
    BLAKE2b of 16 bytes; all zero for a cluster of zeroes.
    """

    zeroes: Annotated[int, Meta(ge=0)]
    digests: bytes


class PairResizeArguments(Arguments):
    """Arguments of pair-resize. ``size`` and ``now``, what the primary's disk has now: in bytes."""

    disk: str
    size: Size
    now: Size


class DiskFault(Arguments):
    """What others have done to the file of a disk of the primary."""

    name: str
    fault: str


class PairQueryArguments(Arguments):
    """Arguments of pair-query. ``faults``: all that the primary has now.

    They are for a standby whose own answer has the member ``fault``: one of an older version does not know them.
    """

    faults: list[DiskFault] = msgspec.field(default_factory=list)


class Peer(Protocol):
    """What the primary's commands need of their context."""

    async def attach(self, args: AttachArguments, monitor: Monitor) -> Attached: ...
    async def commit(self, epoch: int, monitor: Monitor) -> None: ...
    async def durable(self, args: DurableArguments) -> None: ...
    async def digests(self, args: DigestsArguments) -> Digests: ...
    async def resize_for_primary(self, args: PairResizeArguments, monitor: Monitor) -> None: ...
    def heard(self, args: PairQueryArguments, monitor: Monitor) -> PairStatus: ...


@peer_commands.command("pair-attach")
async def pair_attach(context: Peer, args: AttachArguments, monitor: Monitor) -> Attached:
    """A primary presents itself. Whoever was attached before is cut off."""
    return await context.attach(args, monitor)


@peer_commands.command("pair-checkpoint")
async def pair_checkpoint(context: Peer, args: CommitArguments, monitor: Monitor) -> None:
    """Commit a checkpoint: everything that belongs to it has been acknowledged. All disks, or none.

    The first one starts the replication: from then on the views stay at their checkpoint.
    """
    await context.commit(args.epoch, monitor)


@peer_commands.command("pair-durable")
async def pair_durable(context: Peer, args: DurableArguments, monitor: Monitor) -> None:
    """The checkpoint, the last one, is durable on all disks: the standby writes down that they follow it.

    After the answer the primary forgets what it wrote before it: a standby that comes back after a crash lacks what
    was written since, and no more. An error says that this standby would get everything.
    """
    await context.durable(args)


@peer_commands.command("pair-digests")
async def pair_digests(context: Peer, args: DigestsArguments, monitor: Monitor) -> Digests:
    """What a disk holds, so that a primary that does not know what the standby lacks copies only what differs.

    An error, for example that the disk cannot be read there, means that everything is to be copied.
    """
    return await context.digests(args)


@peer_commands.command("pair-resize")
async def pair_resize(context: Peer, args: PairResizeArguments, monitor: Monitor) -> None:
    """Give a disk, its buffers and its view another length, all or none, before the primary's disk gets it.

    Not less than the primary's disk has: so a growth that it could not follow can be taken back, and no more. The
    view has the new length at once; up to the next checkpoint its new part reads as zeroes.
    """
    await context.resize_for_primary(args, monitor)


@peer_commands.command("pair-query")
async def pair_query(context: Peer, args: PairQueryArguments, monitor: Monitor) -> PairStatus:
    """As query-replication, without another look at the files; a sign of life; and how the primary's files are."""
    return context.heard(args, monitor)
