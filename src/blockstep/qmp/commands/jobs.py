"""Jobs, as the newer of QEMU's two families of commands has them: ``job-*``, and ``query-jobs``.

They do what ``block-job-*`` does, but for: an id that no job has is a GenericError, and a cancel is always one with
force.

Source: QEMU's QMP reference, "Background jobs".
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from blockstep.errors import JobNotFound
from blockstep.jobs.job import Job
from blockstep.jobs.states import JobKind, JobStatus
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.errors import CommandError
from blockstep.qmp.schema import Arguments, Event, Registry, Result

commands = Registry()

#: Seconds for which a command waits for what it has set going, so that the next one finds it done.
PATIENCE = 1.0


class JobArguments(Arguments):
    """The job that a command is for."""

    id: Annotated[str, Meta(description="The job.")]


class JobInfo(Result):
    """One job, in the result of query-jobs. Progress is in bytes; ``error`` says why it failed."""

    id: str
    type: JobKind
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | UnsetType = UNSET


@commands.event("JOB_STATUS_CHANGE")
class JobStatusChange(Event):
    """A job has entered another state."""

    id: str
    status: JobStatus


async def finalize(job: Job) -> None:
    """Let the jobs of its transaction end; at return they have, unless that takes longer than `PATIENCE`."""
    job.finalize()
    await job.transaction.finished(PATIENCE)


@commands.command("query-jobs")
async def query_jobs(context: Holder, args: Arguments) -> list[JobInfo]:
    """All jobs, those included that have ended and are not dismissed yet."""
    return [JobInfo(id=job.id, type=job.kind, status=job.status, current_progress=job.current,
                    total_progress=job.total, error=job.reason or UNSET) for job in context.inventory.jobs.list()]


@commands.command("job-pause")
async def job_pause(context: Holder, args: JobArguments) -> None:
    """Stop after what is in flight; an event says when it rests."""
    _job(context, args).pause()


@commands.command("job-resume")
async def job_resume(context: Holder, args: JobArguments) -> None:
    """Go on after a pause, or after an error under the policy stop."""
    _job(context, args).resume()


@commands.command("job-cancel")
async def job_cancel(context: Holder, args: JobArguments) -> None:
    """End a job now. A mirror that is ready does not complete. Events say when it has ended."""
    _job(context, args).cancel(force=True)


@commands.command("job-complete")
async def job_complete(context: Holder, args: JobArguments) -> None:
    """Let a job that is ready end: the target takes the place of the source."""
    _job(context, args).complete()


@commands.command("job-finalize")
async def job_finalize(context: Holder, args: JobArguments) -> None:
    """Let a pending job, and all of its transaction, make its changes.

    At return it has concluded, unless that takes longer than a second; events say so in any case.
    """
    await finalize(_job(context, args))


@commands.command("job-dismiss")
async def job_dismiss(context: Holder, args: JobArguments) -> None:
    """Forget a job that has concluded."""
    _job(context, args).dismiss()


def _job(context: Holder, args: JobArguments) -> Job:
    try:
        return context.inventory.jobs.find(args.id)
    except JobNotFound as error:
        raise CommandError(str(error)) from None
