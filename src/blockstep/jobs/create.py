"""A job that makes an image file: ``blockdev-create``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from blockstep.aio.clock import Clock
from blockstep.aio.pool import in_thread
from blockstep.jobs.job import Job
from blockstep.jobs.states import JobKind


class CreateJob(Job):
    """Calls ``create`` in a thread. It is no block job, cannot be stopped once it runs, and has to be dismissed."""

    kind: ClassVar[JobKind] = "create"
    is_block_job: ClassVar[bool] = False

    def __init__(self, id: str, create: Callable[[], None], clock: Clock | None = None) -> None:
        super().__init__(id, auto_dismiss=False, clock=clock)
        self._create = create

    @property
    def total(self) -> int:
        return 1

    async def run(self) -> None:
        await in_thread(self._create)
        self.current = 1

    def emit(self, name: str, data: Any) -> None:
        if not name.startswith("BLOCK_JOB_"):
            super().emit(name, data)
