"""All jobs of a process, by id."""

from __future__ import annotations

from typing import TypeVar

from blockstep.aio.clock import Clock
from blockstep.errors import JobError, JobNotFound
from blockstep.jobs.job import Job, OnEvent

J = TypeVar("J", bound=Job)


class JobRegistry:
    """Holds jobs from their creation until they are null, and hands their events on."""

    def __init__(self, on_event: OnEvent | None = None, clock: Clock | None = None) -> None:
        self.on_event = on_event
        self._clock = clock
        self._jobs: dict[str, Job] = {}

    async def create(self, job: J, start: bool = True) -> J:
        """Take in a job that was just made, set it up and start it.

        Raises JobError if its id is in use, and what its setup raises (GraphError, OptionError, OSError); then
        nothing is left of it, and nobody was told of it. ``start=False`` leaves it in state created, for `Job.start`.
        """
        if job.id in self._jobs:
            job.transaction.jobs.remove(job)
            raise JobError(job.id, "there is a job with this id already")
        self._jobs[job.id] = job
        job.on_gone = self._gone
        job.on_event = job.on_event or self.on_event
        job._clock = job._clock or self._clock
        try:
            await job.create()
        except BaseException:
            del self._jobs[job.id]
            raise
        job.emit("JOB_STATUS_CHANGE", {"id": job.id, "status": str(job.status)})
        if start:
            job.start()
        return job

    def find(self, id: str) -> Job:
        """The job of that id. Raises JobNotFound."""
        try:
            return self._jobs[id]
        except KeyError:
            raise JobNotFound(id) from None

    def list(self) -> list[Job]:
        """All jobs, in the order of their creation."""
        return [*self._jobs.values()]

    async def cancel_all(self) -> None:
        """Cancel all jobs, and wait for their end (a shutdown)."""
        jobs = self.list()
        for job in jobs:
            if not job.failed and job.status not in ("aborting", "concluded", "null"):
                job.end(force=True)
        for job in jobs:
            await job.wait()

    def _gone(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
