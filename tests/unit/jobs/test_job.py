"""The life of a job: the table of states and verbs, walked; pause, speed, transactions, events."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from blockstep.errors import JobError, JobNotFound, OptionError
from blockstep.jobs.job import Job, JobCancelled
from blockstep.jobs.registry import JobRegistry
from blockstep.jobs.states import TRANSITIONS, VERBS, JobStatus, JobVerb, OnError
from blockstep.jobs.transaction import JobTransaction
from tests.unit.jobs.support import HandClock, Listener, reach, settle


class Work(Job):
    """A job whose work is what the test tells it."""

    kind = "test"

    def __init__(self, id: str = "work", *, todo: list[Any] | None = None, **options: Any) -> None:
        super().__init__(id, **options)
        self.todo = todo if todo is not None else []
        self.log: list[str] = []
        self.fail_in: dict[str, Exception] = {}
        self.may_go = asyncio.Event()

    async def setup(self) -> None:
        self._note("setup")

    async def run(self) -> None:
        self._note("run")
        for what in self.todo:
            if what == "ready":
                self.ready()
                while not self._should_complete:
                    await self.pause_point()
                    await self.sleep()
            elif what == "gate":
                self.enter_busy()
                await self.may_go.wait()
                self.leave_busy()
                await self.pause_point()
            else:
                await self.throttle(what)
                self.copied(what)
        await self.pause_point()

    async def prepare(self) -> None:
        self._note("prepare")

    async def commit(self) -> None:
        self._note("commit")

    async def abort(self) -> None:
        self._note("abort")

    async def clean(self) -> None:
        self._note("clean")

    def change_option(self, name: str, value: Any) -> None:
        self.log.append(f"{name}={value}")

    def _note(self, what: str) -> None:
        self.log.append(what)
        if what in self.fail_in:
            raise self.fail_in[what]


async def in_state(status: JobStatus, **options: Any) -> Work:
    """A job that stands still in ``status``."""
    options = {"auto_finalize": False, "auto_dismiss": False, **options}
    ready = status in (JobStatus.READY, JobStatus.STANDBY)
    job = Work(todo=["ready"] if ready else ["gate"] if status is JobStatus.RUNNING else [1], **options)
    if status is JobStatus.WAITING:
        Work("other", todo=["gate"], transaction=job.transaction, auto_finalize=False)
    for each in list(job.transaction.jobs):
        await each.create()
    if status is JobStatus.CREATED:
        return job
    if status is JobStatus.PAUSED:
        job.pause()
    for each in list(job.transaction.jobs):
        each.start()
    if status is JobStatus.STANDBY:
        await reach(job, "ready")
        job.pause()
    elif status is JobStatus.ABORTING:
        job.todo[:] = ["gate"]
        other = Work("other", todo=["gate"], transaction=job.transaction)
        await other.launch()
        await settle(3)
        job.cancel()
        job.may_go.set()
    elif status in (JobStatus.CONCLUDED, JobStatus.NULL):
        await reach(job, "pending")
        job.finalize()
        await job.wait()
        if status is JobStatus.NULL:
            job.dismiss()
    await reach(job, status)
    return job


def say(job: Job, verb: JobVerb) -> None:
    {
        JobVerb.CANCEL: job.cancel, JobVerb.PAUSE: job.pause, JobVerb.RESUME: job.resume,
        JobVerb.SET_SPEED: lambda: job.set_speed(1), JobVerb.COMPLETE: job.complete, JobVerb.FINALIZE: job.finalize,
        JobVerb.DISMISS: job.dismiss, JobVerb.CHANGE: lambda: job.change(x=1),
    }[verb]()


async def end(job: Job) -> None:
    """End it and its transaction, whatever state it is in."""
    for other in list(job.transaction.jobs):
        if isinstance(other, Work):
            other.may_go.set()
        if other.status in VERBS[JobVerb.CANCEL]:
            other.cancel(force=True)
    await settle()


@pytest.mark.parametrize("verb", JobVerb)
@pytest.mark.parametrize("status", JobStatus)
def test_each_verb_in_each_state_is_heard_or_refused_by_name(status: JobStatus, verb: JobVerb) -> None:
    async def main() -> None:
        job = await in_state(status)
        paused = status in (JobStatus.PAUSED, JobStatus.STANDBY)
        if status not in VERBS[verb]:
            with pytest.raises(JobError, match=f"job 'work': '{verb}' .* '{status}'"):
                say(job, verb)
        elif (verb is JobVerb.PAUSE and paused) or (verb is JobVerb.RESUME and not paused):
            with pytest.raises(JobError, match=r"is (not )?paused"):
                say(job, verb)
        else:
            say(job, verb)
        await end(job)

    asyncio.run(main())


def test_every_state_can_be_reached_and_left() -> None:
    reached = {JobStatus.CREATED}.union(*TRANSITIONS.values())
    assert reached == set(JobStatus)
    assert [status for status in JobStatus if not TRANSITIONS[status]] == [JobStatus.NULL]


@pytest.mark.parametrize("status", sorted(VERBS[JobVerb.CANCEL]))
@pytest.mark.parametrize("force", [False, True])
def test_a_cancel_in_any_state_aborts_and_cleans(status: JobStatus, force: bool) -> None:
    async def main() -> None:
        events = Listener()
        job = await in_state(status, on_event=events)
        job.cancel(force)
        await end(job)
        assert isinstance(error := await job.wait(), OSError)
        assert error.errno == errno.ECANCELED
        assert job.log[-2:] == ["abort", "clean"]
        assert "commit" not in job.log
        # A job that never ran is just gone, and nobody has to dismiss it.
        assert events.states[-2:] == (["aborting", "concluded"] if status is not JobStatus.CREATED else
                                      ["concluded", "null"])
        assert ("BLOCK_JOB_CANCELLED" in events.names) is (status is not JobStatus.CREATED)

    asyncio.run(main())


def test_a_job_left_alone_goes_through_all_its_states_by_itself() -> None:
    async def main() -> None:
        events = Listener()
        registry = JobRegistry(events)
        job = await registry.create(Work(todo=[10, 20]))
        assert registry.find("work") is job
        assert await job.wait() is None
        assert job.log == ["setup", "run", "prepare", "commit", "clean"]
        assert events.states == ["created", "running", "waiting", "pending", "concluded", "null"]
        assert events.names == ["BLOCK_JOB_COMPLETED"]
        assert events.last("BLOCK_JOB_COMPLETED") == {"type": "test", "device": "work", "len": 30, "offset": 30,
                                                      "speed": 0}
        assert registry.list() == []
        with pytest.raises(JobNotFound, match="no such job"):
            registry.find("work")

    asyncio.run(main())


def test_a_ready_job_says_so_and_waits_for_complete_finalize_and_dismiss() -> None:
    async def main() -> None:
        events = Listener()
        registry = JobRegistry(events)
        job = await registry.create(Work(todo=["ready"], auto_finalize=False, auto_dismiss=False))
        await reach(job, "ready")
        job.complete()
        await reach(job, "pending")
        assert events.last("BLOCK_JOB_PENDING") == {"type": "test", "id": "work"}
        assert "commit" not in job.log
        job.finalize()
        await job.wait()
        assert job.info() == {"id": "work", "type": "test", "status": "concluded", "current-progress": 0,
                              "total-progress": 0}
        assert registry.list() == [job]
        job.dismiss()
        assert registry.list() == []
        assert events.names == ["BLOCK_JOB_READY", "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED"]

    asyncio.run(main())


@pytest.mark.parametrize("where", ["run", "prepare"])
def test_a_job_that_fails_says_why(where: str) -> None:
    async def main() -> None:
        events = Listener()
        job = Work(on_event=events, auto_dismiss=False)
        job.fail_in[where] = OSError(errno.EIO, "no")
        await job.launch()
        assert await job.wait() is job.fail_in[where]
        assert job.log[-2:] == ["abort", "clean"]
        assert "no" in events.last("BLOCK_JOB_COMPLETED")["error"]
        assert "no" in job.info()["error"]

    asyncio.run(main())


def test_a_job_whose_setup_fails_has_never_been() -> None:
    async def main() -> None:
        events = Listener()
        registry = JobRegistry(events)
        job = Work()
        job.fail_in["setup"] = JobError("work", "no")
        with pytest.raises(JobError):
            await registry.create(job)
        assert registry.list() == []
        assert events.events == []
        await registry.create(Work())
        with pytest.raises(JobError, match="already"):
            await registry.create(Work())
        await registry.cancel_all()

    asyncio.run(main())


def test_paused_shows_only_when_nothing_moves_any_more() -> None:
    async def main() -> None:
        events = Listener()
        job = Work(todo=["gate", 5], on_event=events)
        await job.launch()
        await settle(3)
        job.pause()
        assert job.status == "running"
        job.may_go.set()
        await reach(job, "paused")
        await settle()
        assert job.current == 0
        job.resume()
        assert await job.wait() is None
        assert events.states[:4] == ["running", "paused", "running", "waiting"]

    asyncio.run(main())


def test_the_speed_limit_holds_and_can_be_changed_while_the_job_waits() -> None:
    async def main() -> None:
        clock = HandClock()
        job = Work(todo=[100] * 20, speed=100, clock=clock)
        await job.launch()
        await clock.advance(0)
        assert job.current == 100
        await clock.advance(4.0)
        assert job.current == 500
        assert job.rate == pytest.approx(100, rel=0.3)
        job.set_speed(1000)
        await clock.advance(0.5)
        assert 900 <= job.current <= 1100
        job.set_speed(0)
        await settle()
        assert job.current == 2000
        assert await job.wait() is None
        with pytest.raises(OptionError):
            Work(speed=-1)

    asyncio.run(main())


def test_a_job_that_waits_for_its_speed_is_paused_and_cancelled_at_once() -> None:
    async def main() -> None:
        job = Work(todo=[100, 100], speed=1, clock=HandClock(), auto_dismiss=False)
        await job.launch()
        await settle()
        job.pause()
        assert job.status == "paused"
        job.cancel()
        await job.wait()
        assert job.cancelled
        assert job.current == 100

    asyncio.run(main())


def test_a_cancel_between_a_pause_point_and_the_speed_limit_is_not_slept_over() -> None:
    async def main() -> None:
        job = await in_state(JobStatus.RUNNING, speed=1, clock=HandClock())
        await job.throttle(100)
        job.cancel()
        with pytest.raises(JobCancelled):
            await job.throttle(100)
        await end(job)

    asyncio.run(main())


def test_an_error_is_told_in_words() -> None:
    job = asyncio.run(in_state(JobStatus.CREATED))
    assert job.reason is None
    job.error = OSError(errno.EIO, "Input/output error")
    assert job.reason == "Input/output error"
    job.error = JobError("work", "no")
    assert job.reason == "job 'work': no"


@pytest.mark.parametrize(("step", "ends"), [("commit", "commit"), ("abort", "abort"), ("clean", "commit")])
def test_a_last_step_that_fails_against_its_promise_is_told_and_keeps_nobody_waiting(step: str, ends: str) -> None:
    async def main() -> None:
        one = Work("one", todo=[1])
        jobs = [one, Work("two", todo=[1], transaction=one.transaction), Work("three", transaction=one.transaction)]
        jobs[1].fail_in = {step: RuntimeError("a bug")}
        if ends == "abort":
            jobs[2].fail_in["prepare"] = OSError(errno.EIO, "broken")
        for job in jobs:
            await job.create()
        for job in jobs:
            job.start()
        errors = [str(await asyncio.wait_for(job.wait(), 10)) for job in jobs]
        assert errors[1] == "a bug"
        assert [job.log[-2:] for job in jobs] == [[ends, "clean"]] * 3
        assert errors[0] == ("None" if ends == "commit" else str(OSError(errno.ECANCELED, "Operation canceled")))

    asyncio.run(main())


@pytest.mark.parametrize("step", ["commit", "clean"])
def test_what_is_committed_is_not_cancelled_any_more(step: str) -> None:
    async def scenario() -> None:
        listener, begun, may_end = Listener(), asyncio.Event(), asyncio.Event()
        transaction = JobTransaction()
        jobs = [Work(id, transaction=transaction, on_event=listener) for id in ("one", "two")]

        async def slowly() -> None:
            begun.set()
            await may_end.wait()

        setattr(jobs[1], step, slowly)
        for job in jobs:
            await job.launch()
        await begun.wait()
        for job in jobs:
            with pytest.raises(JobError, match="its changes are made"):
                job.cancel()
            job.end(force=True)
        may_end.set()
        assert [await job.wait() for job in jobs] == [None, None]
        assert listener.names.count("BLOCK_JOB_COMPLETED") == 2

    asyncio.run(scenario())


def test_jobs_of_a_transaction_commit_together() -> None:
    async def main() -> None:
        together = JobTransaction()
        first, second = (Work(name, todo=["gate"], transaction=together) for name in ("first", "second"))
        await first.launch()
        await second.launch()
        first.may_go.set()
        await reach(first, "waiting")
        await settle()
        assert "prepare" not in first.log
        second.may_go.set()
        assert await first.wait() is None
        assert await second.wait() is None
        assert first.log[-3:] == second.log[-3:] == ["prepare", "commit", "clean"]

    asyncio.run(main())


async def _fail_run(job: Work) -> None:
    job.fail_in["run"] = OSError(errno.EIO, "no")


async def _fail_prepare(job: Work) -> None:
    job.fail_in["prepare"] = OSError(errno.EIO, "no")


async def _cancel(job: Work) -> None:
    job.todo[:] = ["gate"]
    asyncio.get_running_loop().call_later(0, job.end, True)
    asyncio.get_running_loop().call_later(0, job.may_go.set)


@pytest.mark.parametrize("spoil", [_fail_run, _fail_prepare, _cancel])
@pytest.mark.parametrize("position", [0, 1])
def test_if_one_job_of_a_transaction_fails_none_commits(spoil: Callable[[Work], Awaitable[None]],
                                                        position: int) -> None:
    async def main() -> None:
        together = JobTransaction()
        jobs = [Work(name, todo=[1], transaction=together) for name in ("first", "second")]
        await spoil(jobs[position])
        for job in jobs:
            await job.launch()
        errors = [await job.wait() for job in jobs]
        assert all(errors)
        for job in jobs:
            assert "commit" not in job.log
            assert job.log[-2:] == ["abort", "clean"]
        assert isinstance(errors[1 - position], OSError)
        assert jobs[1 - position].cancelled

    asyncio.run(main())


@pytest.mark.parametrize(("policy", "code", "action"), [
    ("report", errno.EIO, "report"), ("ignore", errno.EIO, "ignore"), ("stop", errno.EIO, "stop"),
    ("enospc", errno.ENOSPC, "stop"), ("enospc", errno.EIO, "report"),
])
def test_the_error_policy_decides_and_an_event_says_how(policy: str, code: int, action: str) -> None:
    async def main() -> None:
        events = Listener()
        clock = HandClock()
        job = Work(todo=["ready"], on_event=events, clock=clock)
        await job.launch()
        await reach(job, "ready")
        met = asyncio.create_task(job.met_error("write", OSError(code, "no"), OnError(policy)))
        await settle()
        assert events.last("BLOCK_JOB_ERROR") == {"device": "work", "operation": "write", "action": action}
        if action == "report":
            with pytest.raises(OSError):
                await met
        elif action == "ignore":
            assert not met.done()
            await clock.advance(1)
            await met
        else:
            assert (job.status, job.io_status) == ("standby", "nospace" if code == errno.ENOSPC else "failed")
            await met
            job.resume()
            assert job.io_status == "ok"
        await end(job)

    asyncio.run(main())


@pytest.mark.parametrize("status", [JobStatus.ABORTING, JobStatus.CONCLUDED, JobStatus.NULL])
def test_to_end_what_is_at_its_end_does_nothing(status: JobStatus) -> None:
    async def main() -> None:
        job = await in_state(status)
        job.end(force=True)
        assert job.status == status
        await end(job)

    asyncio.run(main())
