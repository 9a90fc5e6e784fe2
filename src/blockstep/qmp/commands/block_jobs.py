"""Block jobs at work: ``block-job-*``, ``query-block-jobs`` and their events. How they start: see `copying`.

Block jobs are those that copy; the others are seen by ``job-*`` only. An id that no block job has is answered with
DeviceNotActive.

Source: QEMU's QMP reference, "Block core", the commands ``block-job-*`` and the events ``BLOCK_JOB_*``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from blockstep.errors import JobNotFound
from blockstep.jobs.job import Job
from blockstep.jobs.states import IoStatus, JobKind, JobStatus
from blockstep.qmp.commands import jobs
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.errors import CommandError
from blockstep.qmp.schema import Arguments, Event, Registry, Result

commands = Registry()


class DeviceArguments(Arguments):
    """The job that a command is for."""

    device: Annotated[str, Meta(description="Id of the job.")]


class SpeedArguments(DeviceArguments):
    """Arguments of block-job-set-speed."""

    speed: Annotated[int, Meta(ge=0, description="Bytes a second; 0: no limit.")]


class CancelArguments(DeviceArguments):
    """Arguments of block-job-cancel."""

    force: Annotated[bool, Meta(description=(
        "End it also if it is ready, or paused, and make requests that hang fail, where the driver can."))] = False


class BlockJobInfo(Result):
    """One job, in the result of query-block-jobs. ``offset`` of ``len`` bytes are done.

    ``device`` is the job's id. ``ready``: it can be completed. ``busy``: a request of it is in flight.
    """

    type: str
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: IoStatus
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | UnsetType = UNSET


class Progress(Event):
    """What the events of a job's end, and of its readiness, have in common. ``offset`` of ``len`` bytes are done."""

    type: JobKind
    device: str
    len: int
    offset: int
    speed: int


@commands.event("BLOCK_JOB_COMPLETED")
class BlockJobCompleted(Progress):
    """A job has ended. ``error``: why it failed; absent if it succeeded."""

    error: str | UnsetType = UNSET


@commands.event("BLOCK_JOB_CANCELLED")
class BlockJobCancelled(Progress):
    """A job has ended because it was cancelled, or another one of its transaction did not succeed."""


@commands.event("BLOCK_JOB_READY")
class BlockJobReady(Progress):
    """The target is in sync, and is kept so until the job is completed or cancelled."""


@commands.event("BLOCK_JOB_ERROR")
class BlockJobError(Event):
    """A request of a job failed. ``action``: what the job does about it, as its policy for errors says."""

    device: str
    operation: Literal["read", "write"]
    action: Literal["ignore", "report", "stop"]


@commands.event("BLOCK_JOB_PENDING")
class BlockJobPending(Event):
    """A job waits for block-job-finalize."""

    type: JobKind
    id: str


@commands.command("query-block-jobs")
async def query_block_jobs(context: Holder, args: Arguments) -> list[BlockJobInfo]:
    """All block jobs, those included that have ended and are not dismissed yet."""
    return [BlockJobInfo(type=job.kind, device=job.id, len=job.total, offset=job.current, busy=job.busy,
                         paused=job.paused, speed=job.speed, io_status=job.io_status, ready=job.is_ready,
                         status=job.status, auto_finalize=job.auto_finalize, auto_dismiss=job.auto_dismiss,
                         error=job.reason or UNSET) for job in context.inventory.jobs.list() if job.is_block_job]


@commands.command("block-job-set-speed")
async def block_job_set_speed(context: Holder, args: SpeedArguments) -> None:
    """Limit the speed of a job, from now on.

    Errors: DeviceNotActive if there is no such block job.
    """
    _job(context, args.device).set_speed(args.speed)


@commands.command("block-job-cancel")
async def block_job_cancel(context: Holder, args: CancelArguments) -> None:
    """End a job. Events say when it has ended.

    One that is ready ends with success, without a pivot: the target is the source of this moment. With ``force`` it
    is cancelled. A paused job is cancelled with ``force`` only.

    Errors: DeviceNotActive if there is no such block job.
    """
    job = _job(context, args.device)
    if job.paused and not args.force:
        raise CommandError(f"job '{job.id}' is paused: resume it, or cancel it with force")
    job.cancel(args.force)


@commands.command("block-job-pause")
async def block_job_pause(context: Holder, args: DeviceArguments) -> None:
    """Stop after what is in flight; an event says when it rests.

    Errors: DeviceNotActive if there is no such block job.
    """
    _job(context, args.device).pause()


@commands.command("block-job-resume")
async def block_job_resume(context: Holder, args: DeviceArguments) -> None:
    """Go on after a pause, or after an error under the policy stop.

    Errors: DeviceNotActive if there is no such block job.
    """
    _job(context, args.device).resume()


@commands.command("block-job-complete")
async def block_job_complete(context: Holder, args: DeviceArguments) -> None:
    """Let a job that is ready end: the target takes the place of the source. One in standby, when it is resumed.

    Errors: DeviceNotActive if there is no such block job.
    """
    _job(context, args.device).complete()


@commands.command("block-job-finalize")
async def block_job_finalize(context: Holder, args: jobs.JobArguments) -> None:
    """Let a pending job, and all of its transaction, make its changes.

    At return it has concluded, unless that takes longer than a second; events say so in any case.

    Errors: DeviceNotActive if there is no such block job.
    """
    await jobs.finalize(_job(context, args.id))


@commands.command("block-job-dismiss")
async def block_job_dismiss(context: Holder, args: jobs.JobArguments) -> None:
    """Forget a job that has concluded.

    Errors: DeviceNotActive if there is no such block job.
    """
    _job(context, args.id).dismiss()


def _job(context: Holder, id: str) -> Job:
    job = context.inventory.jobs.find(id)
    if not job.is_block_job:
        raise JobNotFound(id)
    return job
