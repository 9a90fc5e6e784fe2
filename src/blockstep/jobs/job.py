"""A job: long work on the graph that can be watched, paused, limited, completed and cancelled.

The life cycle is QEMU's (see `blockstep.jobs.states`). A kind of job says what it does in six hooks, and the rest
is here::

    setup()      takes its nodes: users, filters, blockers. Fails: nothing is left, and there is no job
    run()        the work, in a task of the job's own. Ends: done; raises: failed
    prepare()    the last step that can fail, when all jobs of the transaction are done (a pivot, not yet final)
    commit()     makes it final        } one of them
    abort()      takes it back         }
    clean()      gives everything up that setup() took, in both ends

Cancelling never tears a request: the work asks at its *pause points* whether to go on, and what is in flight
ends by itself. So when a job is concluded, nothing of it is in flight, and the graph is what it was before, or what
the job was meant to make of it. A node that hangs can be told with ``cancel_in_flight()``, if its driver has that,
by a cancel with ``force``.

Verbs take effect at once or leave a wish that the work meets at its next pause point; none waits. Do not wait for
a job inside a drained section over its nodes: it cannot move there.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict

from blockstep.aio.clock import Clock
from blockstep.errors import JobError, OptionError
from blockstep.jobs.pace import Meter, SpeedLimit
from blockstep.jobs.states import TRANSITIONS, VERBS, IoStatus, JobKind, JobStatus, JobVerb, OnError
from blockstep.jobs.transaction import JobTransaction

#: Called with QEMU's name of an event and its data.
OnEvent = Callable[[str, Mapping[str, Any]], None]

#: Seconds before a range is tried again under the policy "ignore".
RETRY_AFTER = 0.1


class JobCancelled(Exception):
    """Raised at a pause point of a job that shall end."""


class JobOptions(TypedDict, total=False):
    """What all jobs take, by keyword."""

    speed: int  #: bytes a second, 0 (default): no limit
    auto_finalize: bool  #: default True; False: wait in "pending" for `Job.finalize`
    auto_dismiss: bool  #: default True; False: wait in "concluded" for `Job.dismiss`
    transaction: JobTransaction  #: succeed or fail together with others
    on_event: OnEvent
    clock: Clock  #: default: the running event loop


class Job:
    """The common part of all jobs. Made, launched and finished inside a running event loop."""

    kind: ClassVar[JobKind]
    #: Whether it is one of those that ``query-block-jobs`` shows and that have BLOCK_JOB events.
    is_block_job: ClassVar[bool] = True

    def __init__(self, id: str, *, speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True,
                 transaction: JobTransaction | None = None, on_event: OnEvent | None = None,
                 clock: Clock | None = None) -> None:
        if speed < 0:
            raise OptionError("speed", speed, "0 or more bytes a second")
        self.id = id
        self.status = JobStatus.CREATED
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.on_event = on_event
        #: Called when the job becomes null (by the registry that holds it).
        self.on_gone: Callable[[Job], None] | None = None
        #: Why it failed. None while nothing went wrong. ECANCELED when it was cancelled.
        self.error: Exception | None = None
        #: Whether it was cancelled (a soft cancel of a ready mirror is a completion, and is not).
        self.cancelled = False
        #: Bytes done.
        self.current = 0
        #: Reset by `resume`.
        self.io_status: IoStatus = "ok"
        self.is_over = False  # run() has ended, or never began
        self._is_set_up = False
        self._should_complete = False
        self._paused = False
        self._busy = 0
        self._limit = SpeedLimit(speed)
        self._meter = Meter()
        self._clock = clock
        self._sleepers: set[asyncio.Future[None]] = set()
        self._concluded = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.transaction = transaction if transaction is not None else JobTransaction()
        self.transaction.add(self)

    # --- what a kind of job says ---

    async def setup(self) -> None:
        """Take the nodes. What raises has left nothing behind."""

    async def run(self) -> None:
        """Do the work."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """The last step that can fail."""

    async def commit(self) -> None:
        """Make final what was prepared. Cannot fail."""

    async def abort(self) -> None:
        """Take back what was prepared, if anything was. Cannot fail."""

    async def clean(self) -> None:
        """Give up what `setup` took."""

    def accepts_cancel(self) -> bool:
        """Whether a cancel without ``force`` really cancels; a ready mirror makes a completion of it."""
        return True

    def cancel_in_flight(self) -> None:
        """Make requests that hang fail, as far as the drivers can: a cancel with ``force`` was asked for."""

    @property
    def total(self) -> int:
        """Bytes to be done, as far as known. Grows while a guest writes."""
        return self.current

    # --- life ---

    async def create(self) -> None:
        """Take the nodes; `start` comes next. Raises what `setup` raises; there is no job then."""
        try:
            await self.setup()
        except BaseException:
            self.transaction.jobs.remove(self)
            self.is_over = True
            self.status = JobStatus.NULL
            self._concluded.set()
            raise
        self._is_set_up = True

    async def launch(self) -> None:
        """`create` and `start`."""
        await self.create()
        self.start()

    def start(self) -> None:
        """Begin to work."""
        if self.status is not JobStatus.CREATED or not self._is_set_up or self.is_over:
            raise JobError(self.id, f"cannot be started in state '{self.status}'")
        self.enter_status(JobStatus.RUNNING)
        self._settle()
        loop = asyncio.get_running_loop()
        if self._clock is None:
            self._clock = loop  # asked for with every range: up to Python 3.11 finding the loop is a system call
        self._task = loop.create_task(self._work(), name=f"job {self.id}")

    async def _work(self) -> None:
        try:
            await self.pause_point()
            await self.run()
            if self.cancelled:
                raise JobCancelled
        except JobCancelled:
            self.cancelled = True
        except Exception as error:
            self.error = error
        except asyncio.CancelledError:
            self.cancelled = True
        self._paused = False
        self._settle()
        self.is_over = True
        self.transaction.ended(self)

    async def wait(self) -> Exception | None:
        """Wait until it is concluded. Returns its error, or None if it succeeded; ECANCELED if it was cancelled."""
        await self._concluded.wait()
        return self.error

    @property
    def failed(self) -> bool:
        """Whether it cannot succeed any more."""
        return self.cancelled or self.error is not None

    @property
    def reason(self) -> str | None:
        """Why it failed, in words; None while nothing went wrong."""
        if isinstance(self.error, OSError) and self.error.strerror:
            return self.error.strerror
        return None if self.error is None else str(self.error)

    def conclude(self) -> None:
        """The end, called by the transaction after commit or abort, and clean. Nobody has to dismiss what never ran."""
        if self.cancelled and self.error is None:
            self.error = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        if self._task is not None:
            if self.cancelled:
                self.emit("BLOCK_JOB_CANCELLED", self._event())
            else:
                self.emit("BLOCK_JOB_COMPLETED", {**self._event(), **self._error()})
        self.enter_status(JobStatus.CONCLUDED)
        self._concluded.set()
        if self.auto_dismiss or self._task is None:
            self.dismiss()

    # --- verbs ---

    def _heard(self, verb: JobVerb) -> None:
        if self.status not in VERBS[verb]:
            raise JobError(self.id, f"'{verb}' is not possible in state '{self.status}'")

    def cancel(self, force: bool = False) -> None:
        """End it. The target is left as it is, unless a ready mirror or commit is asked without ``force``: that
        completes, without the pivot. ``force`` also makes requests that hang fail, where the driver can."""
        self._heard(JobVerb.CANCEL)
        if self.transaction.is_committed:
            raise JobError(self.id, "cannot be cancelled any more: its changes are made")
        if not force and not self.accepts_cancel():
            self._should_complete = True
            self._paused = False
            self._settle()
            self.kick()
            return
        self.end(force)

    def end(self, force: bool) -> None:
        """A cancel that no hook can turn into anything else; nothing to do if the end has come or is coming."""
        if self.status not in VERBS[JobVerb.CANCEL] or self.transaction.is_committed:
            return
        self.cancelled = True
        self._paused = False
        self._settle()
        if force:
            self.cancel_in_flight()
        self.kick()
        if self.is_over or (self._task is None and self._is_set_up):
            self.is_over = True
            self.transaction.ended(self)

    def pause(self) -> None:
        """Stop after what is in flight; then the state is paused or standby."""
        self._heard(JobVerb.PAUSE)
        if self._paused:
            raise JobError(self.id, "is paused already")
        self._paused = True
        self._settle()
        self.kick()

    def resume(self) -> None:
        """Go on after `pause`, or after an error under the policy "stop"."""
        self._heard(JobVerb.RESUME)
        if not self._paused:
            raise JobError(self.id, "is not paused")
        self._paused = False
        self.io_status = "ok"
        self._settle()
        self.kick()

    def set_speed(self, speed: int) -> None:
        """Limit it to ``speed`` bytes a second, from now on; 0: no limit."""
        self._heard(JobVerb.SET_SPEED)
        if speed < 0:
            raise OptionError("speed", speed, "0 or more bytes a second")
        self._limit.change(speed, self.clock.time())
        self.kick()

    def complete(self) -> None:
        """End a ready job with success; one in standby when it is resumed."""
        self._heard(JobVerb.COMPLETE)
        self._should_complete = True
        self.kick()

    def finalize(self) -> None:
        """Let all jobs of the transaction make their changes."""
        self._heard(JobVerb.FINALIZE)
        self.transaction.finalize()

    def dismiss(self) -> None:
        """Forget it."""
        self._heard(JobVerb.DISMISS)
        self.enter_status(JobStatus.NULL)
        if self.on_gone is not None:
            self.on_gone(self)

    def change(self, **options: Any) -> None:
        """Change options of a job at work. Raises OptionError for one that this kind cannot change."""
        self._heard(JobVerb.CHANGE)
        for name, value in options.items():
            self.change_option(name, value)

    def change_option(self, name: str, value: Any) -> None:
        """One option of `change`."""
        raise OptionError(name, value, f"left alone: a {self.kind} job cannot change it")

    # --- for the work ---

    @property
    def clock(self) -> Clock:
        """Where time comes from."""
        return self._clock if self._clock is not None else asyncio.get_running_loop()

    @property
    def paused(self) -> bool:
        """Whether somebody has paused it; it may still be on its way to rest."""
        return self._paused

    @property
    def busy(self) -> bool:
        """Whether something of it is in flight."""
        return self._busy > 0

    @property
    def is_ready(self) -> bool:
        """Whether the target is in sync: ready, or standby."""
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    def ready(self) -> None:
        """The target is in sync: `complete` is possible from now on."""
        self.enter_status(JobStatus.READY)
        self.emit("BLOCK_JOB_READY", self._event())
        self._settle()

    async def pause_point(self) -> None:
        """Rest here while the job is paused. Raises JobCancelled if it shall end."""
        while self._paused and not self.cancelled:
            await self.sleep()
        if self.cancelled:
            raise JobCancelled(self.id)

    def enter_busy(self) -> None:
        """Something begins that must be over before the state may say "paused"."""
        self._busy += 1

    def leave_busy(self) -> None:
        """The end of what `enter_busy` began."""
        self._busy -= 1
        self._settle()

    async def throttle(self, count: int) -> None:
        """Wait until ``count`` more bytes may be copied. Raises JobCancelled. No limit while the job is finalized."""
        if self.status not in VERBS[JobVerb.SET_SPEED]:
            return
        while (delay := self._limit.wait(self.clock.time())) > 0:
            if self.cancelled:  # since the last pause point: nobody would wake this sleeper
                raise JobCancelled(self.id)
            await self.sleep(delay)
            await self.pause_point()
        self._limit.charge(self.clock.time(), count)

    async def sleep(self, seconds: float | None = None) -> None:
        """Until the time is over, or something happens to the job (see `kick`)."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.clock.call_later(seconds, _finish, waiter) if seconds is not None else None
        self._sleepers.add(waiter)
        try:
            await waiter
        finally:
            self._sleepers.discard(waiter)
            if timer is not None:
                timer.cancel()

    def kick(self) -> None:
        """Wake all sleepers: there is news."""
        for waiter in self._sleepers:
            _finish(waiter)

    def copied(self, count: int) -> None:
        """``count`` more bytes are done."""
        self._meter.mark(self.clock.time(), self.current)
        self.current += count

    async def met_error(self, operation: str, error: OSError, policy: OnError) -> None:
        """An I/O error in ``operation`` (read or write). Returns when the range may be tried again, or raises it."""
        no_space = error.errno == errno.ENOSPC
        action = policy.action(no_space)
        if self.status not in VERBS[JobVerb.PAUSE]:  # a guest may be waiting: no second try
            action = OnError.REPORT
        self.emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": operation, "action": str(action)})
        if action is OnError.REPORT:
            raise error
        self.io_status = "nospace" if no_space else "failed"
        if action is OnError.IGNORE:
            await self.sleep(RETRY_AFTER)
        elif not self._paused and not self.cancelled:
            self.pause()

    # --- what others see ---

    @property
    def speed(self) -> int:
        """The limit, in bytes a second; 0: none."""
        return self._limit.speed

    @property
    def rate(self) -> float | None:
        """Bytes a second over the last few seconds; None before anything can be said."""
        return self._meter.rate(self.clock.time(), self.current)

    @property
    def time_left(self) -> float | None:
        """Seconds until all is copied, at the present rate; None if unknown."""
        rate, left = self.rate, self.total - self.current
        if left <= 0:
            return 0.0
        return left / rate if rate else None

    def info(self) -> dict[str, Any]:
        """QEMU's "JobInfo" (query-jobs)."""
        return {"id": self.id, "type": self.kind, "status": str(self.status),
                "current-progress": self.current, "total-progress": self.total, **self._error()}

    def block_info(self) -> dict[str, Any]:
        """QEMU's "BlockJobInfo" (query-block-jobs), and ``rate`` and ``time-left`` when they are known."""
        measured = {"rate": self.rate, "time-left": self.time_left}
        return {**self._event(), "busy": self.busy, "paused": self._paused, "io-status": self.io_status,
                "ready": self.is_ready, "status": str(self.status),
                "auto-finalize": self.auto_finalize, "auto-dismiss": self.auto_dismiss, **self._error(),
                **{name: value for name, value in measured.items() if value is not None}}

    def _error(self) -> dict[str, Any]:
        return {} if self.error is None else {"error": self.reason}

    def _event(self) -> dict[str, Any]:
        return {"type": self.kind, "device": self.id, "len": self.total, "offset": self.current, "speed": self.speed}

    def emit(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell whoever listens."""
        if self.on_event is not None:
            self.on_event(name, data)

    def enter_status(self, status: JobStatus) -> None:
        """Go to another state, and say so. The table holds."""
        assert status in TRANSITIONS[self.status], f"job {self.id}: {self.status} to {status}"
        self.status = status
        self.emit("JOB_STATUS_CHANGE", {"id": self.id, "status": str(status)})

    def _settle(self) -> None:
        """Show the pause in the state, once nothing moves; and its end at once."""
        rest = {JobStatus.RUNNING: JobStatus.PAUSED, JobStatus.READY: JobStatus.STANDBY}
        if self._paused and not self._busy and self.status in rest:
            self.enter_status(rest[self.status])
        elif not self._paused:
            for awake, asleep in rest.items():
                if self.status is asleep:
                    self.enter_status(awake)


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
