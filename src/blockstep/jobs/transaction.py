"""Jobs that succeed or fail together. Every job is in a transaction, if only in one of its own.

A job whose work is done waits for the others. When all are done they become pending; then, at once or when
somebody says `finalize`, each prepares its last step, and only if all could, all commit. If one of them fails or is
cancelled at any point before, the others are cancelled, and all of them abort.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from blockstep.errors import JobError
from blockstep.jobs.states import JobStatus

if TYPE_CHECKING:
    from blockstep.jobs.job import Job


class JobTransaction:
    """A group of jobs. Pass the same one to each of them, launch all, and wait for any."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        #: Whether all are being committed, or have been: too late to cancel one.
        self.is_committed = False
        self._finishing: asyncio.Task[None] | None = None

    def add(self, job: Job) -> None:
        """Take a job in. Raises JobError when the others are at their end already."""
        if self._finishing is not None:
            raise JobError(job.id, "cannot join a transaction that is ending")
        self.jobs.append(job)

    def ended(self, job: Job) -> None:
        """The work of ``job`` is over (called by the job)."""
        if job.status is JobStatus.PENDING and self._finishing is not None:
            return  # preparing: it finds out by itself
        if any(other.failed for other in self.jobs):
            self._abort()
            return
        job.enter_status(JobStatus.WAITING)
        if all(other.status is JobStatus.WAITING for other in self.jobs):
            for other in self.jobs:
                other.enter_status(JobStatus.PENDING)
                if not other.auto_finalize:
                    other.emit("BLOCK_JOB_PENDING", {"type": other.kind, "id": other.id})
            if all(other.auto_finalize for other in self.jobs):
                self.finalize()

    def finalize(self) -> None:
        """Prepare and commit all. Does nothing when that is under way."""
        if self._finishing is None:
            self._finishing = asyncio.get_running_loop().create_task(self._finish())

    async def finished(self, limit: float) -> None:
        """Wait until all jobs that `finalize` has set going have concluded, but not longer than ``limit`` seconds."""
        if self._finishing is not None:
            await asyncio.wait([self._finishing], timeout=limit)

    def _abort(self) -> None:
        for job in self.jobs:
            if not job.failed:
                if job.is_over:
                    job.cancelled = True
                else:
                    job.end(force=True)
        for job in self.jobs:
            if job.is_over and job.status is not JobStatus.ABORTING:
                job.enter_status(JobStatus.ABORTING)
        if self._finishing is None and all(job.is_over for job in self.jobs):
            self._finishing = asyncio.get_running_loop().create_task(self._unwind())

    async def _finish(self) -> None:
        from blockstep.jobs.job import JobCancelled
        for job in self.jobs:
            try:
                await job.prepare()
            except JobCancelled:
                job.cancelled = True
            except Exception as error:
                job.error = error
            if any(other.failed for other in self.jobs):
                await self._unwind()
                return
        self.is_committed = True
        for job in self.jobs:
            await _step(job, job.commit)
        await self._conclude()

    async def _unwind(self) -> None:
        for job in self.jobs:
            job.cancelled |= job.error is None
            if job.status is not JobStatus.ABORTING:
                job.enter_status(JobStatus.ABORTING)
        for job in reversed(self.jobs):
            await _step(job, job.abort)
        await self._conclude()

    async def _conclude(self) -> None:
        for job in self.jobs:
            await _step(job, job.clean)
        for job in self.jobs:
            job.conclude()


async def _step(job: Job, step: Callable[[], Awaitable[None]]) -> None:
    """A step that cannot be taken back. One that fails, against what it promises, is told, and keeps nobody waiting."""
    try:
        await step()
    except Exception as error:
        job.error = job.error or error
