"""The states of a job and what may be asked of it in each: QEMU's words, as data.

    created ──► running ──► ready ──► waiting ──► pending ──► concluded ──► null
                 │   ▲       │  ▲        ▲           │           ▲
                 ▼   │       ▼  │        │           ▼           │
                paused      standby    (running)   aborting ─────┘        any state up to pending may abort

created    it exists and has its nodes; nothing is copied yet
running    it works; *paused* is the same with the hands still
ready      (mirror, active commit) the target is in sync and kept so until `complete`; *standby* is its pause
waiting    done, and waits for the other jobs of its transaction
pending    all jobs of the transaction are done; the changes that show (a pivot) come with `finalize`
aborting   it failed or was cancelled, and cleans up
concluded  over; its result can be asked for until `dismiss`
null       forgotten

Source of the names: QEMU QMP reference, "JobStatus", "JobVerb".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, Literal

#: QEMU's "JobType", as far as there are such jobs here.
JobKind = Literal["backup", "commit", "create", "mirror"]
#: QEMU's "BlockDeviceIoStatus": what the last error was, of a job that waits because of it.
IoStatus = Literal["ok", "failed", "nospace"]


class JobStatus(enum.StrEnum):
    """See the module."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(enum.StrEnum):
    """What a user may ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


_S = JobStatus

#: State -> the states that may follow.
TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.CONCLUDED, _S.ABORTING}),
    _S.ABORTING: frozenset({_S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}

_AT_WORK: Final = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

#: Verb -> the states in which it is heard.
VERBS: Final[Mapping[JobVerb, frozenset[JobStatus]]] = {
    JobVerb.CANCEL: _AT_WORK | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _AT_WORK,
    JobVerb.RESUME: _AT_WORK,
    JobVerb.SET_SPEED: _AT_WORK,
    JobVerb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
    JobVerb.CHANGE: _AT_WORK,
}


class OnError(enum.StrEnum):
    """What a job does about an I/O error. Source: QEMU QMP reference, "BlockdevOnError"."""

    REPORT = "report"  #: the job fails
    IGNORE = "ignore"  #: try the same range again later
    STOP = "stop"  #: pause until `resume`, then try again
    ENOSPC = "enospc"  #: stop when the disk is full, else report
    AUTO = "auto"  #: the same

    def action(self, no_space: bool) -> OnError:
        """REPORT, IGNORE or STOP, for an error that is ENOSPC or is not."""
        if self in (OnError.ENOSPC, OnError.AUTO):
            return OnError.STOP if no_space else OnError.REPORT
        return self
