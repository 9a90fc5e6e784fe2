"""The primary's coordinator: what happens to it, and what it does about that. Pure: events in, actions out.

    offline ──Attached──► syncing ──Synced──► checkpointing ◄──Due── replicating
       ▲                     │                    │   └──Committed──────►│
       └───────Failed────────┴──────Failed────────┴────────Failed───────┘
    any ──Refused(promoted)──► fenced           any ──Stop──► stopped

* offline: there is no standby; the disks are written, and what it will lack is remembered. Tries to attach again.
* syncing: what the standby lacks is being copied; writes go to both.
* replicating: the standby has all that was acknowledged to it, its view is at the last checkpoint.
* checkpointing: one is being taken; writes are held back from the links.
* fenced: the standby has been promoted. This side must not write to it any more, and never does.
* stopped: replication was ended by command; the disks are served on.

The first checkpoint after a sync makes the standby's state a known one; only from then on is a pair *healthy*.

The one who owns a coordinator calls `apply` for each event and carries the actions out in their order. Only one
action at a time is awaited by the coordinator (attach, sync, checkpoint), and each is answered by an event that
carries its *attempt*: answers to an attempt that was given up are ignored.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

import msgspec


class State(enum.Enum):
    """Where the primary stands; see the module."""

    OFFLINE = "offline"
    SYNCING = "syncing"
    REPLICATING = "replicating"
    CHECKPOINTING = "checkpointing"
    FENCED = "fenced"
    STOPPED = "stopped"


# --- events ---


class Attached(msgspec.Struct, frozen=True):
    """The standby is there. ``full``: nothing is known of what it holds, so all of it is compared."""

    attempt: int
    full: bool


class Synced(msgspec.Struct, frozen=True):
    """The standby holds what the primary's disks hold, and the links are on."""

    attempt: int


class Due(msgspec.Struct, frozen=True):
    """A checkpoint is wanted: by time, by bytes written, or by command."""


class Committed(msgspec.Struct, frozen=True):
    """The standby has taken checkpoint ``epoch``."""

    attempt: int
    epoch: int


class NotCommitted(msgspec.Struct, frozen=True):
    """The standby could not take the checkpoint and says why. It is still at the old one, and the links are good."""

    attempt: int
    reason: str


class Failed(msgspec.Struct, frozen=True):
    """The standby, or the way to it, failed: an action of ``attempt`` did, or (None) a link or the connection."""

    reason: str
    attempt: int | None = None


class Refused(msgspec.Struct, frozen=True):
    """The standby does not take this primary any more: it was promoted."""

    reason: str


class Stop(msgspec.Struct, frozen=True):
    """End replication."""


Event = Attached | Synced | Due | Committed | NotCommitted | Failed | Refused | Stop


# --- actions ---


class Attach(msgspec.Struct, frozen=True):
    """Connect to the standby, after ``delay`` seconds; answer Attached, Failed or Refused."""

    attempt: int
    delay: float


class Sync(msgspec.Struct, frozen=True):
    """Copy all that differs (``full``) or what the standby lacks, switch the links on; answer Synced or Failed."""

    attempt: int
    full: bool


class TakeCheckpoint(msgspec.Struct, frozen=True):
    """Mark all links, settle, let the standby commit ``epoch``, release; answer Committed or Failed."""

    attempt: int
    epoch: int


class LetGo(msgspec.Struct, frozen=True):
    """Switch all links off, cut the connections."""

    reason: str


class Report(msgspec.Struct, frozen=True):
    """Tell the people and programs that listen: the state is a new one."""

    state: State
    reason: str


Action = Attach | Sync | TakeCheckpoint | LetGo | Report

#: Seconds between attempts to attach: the first at once, then doubling.
FIRST_DELAY: Final = 0.25
LONGEST_DELAY: Final = 5.0

#: The states in which a standby is attached, or being attached.
_WITH_STANDBY: Final = frozenset({State.SYNCING, State.REPLICATING, State.CHECKPOINTING})


class Coordinator:
    """The state machine. `state`, `epoch` and `reason` may be read at any time; only `apply` changes them."""

    def __init__(self) -> None:
        self.state = State.OFFLINE
        #: The number of the last checkpoint that the standby has committed.
        self.epoch = 0
        #: The last number that a checkpoint was given; no other one gets it. From `epoch` up to it: those of which the
        #: standby may have committed one whose answer was lost.
        self.asked = 0
        #: Why the state is what it is, for people.
        self.reason = "not attached yet"
        #: Whether the standby has committed a checkpoint since it was attached.
        self.protected = False
        self._attempt = 0
        self._failures = 0
        self._wanted_again = False

    def begin(self) -> list[Action]:
        """The first actions."""
        return [self._attach(0.0)]

    def apply(self, event: Event) -> list[Action]:
        """Take note of ``event``. Returns what to do, in order; nothing for an event that is out of date."""
        attempt = getattr(event, "attempt", None)
        if attempt is not None and attempt != self._attempt:
            return []
        handler = _TABLE.get((self.state, type(event)))
        return handler(self, event) if handler else []

    # --- what the table names ---

    def _attached(self, event: Attached) -> list[Action]:
        self._attempt += 1
        reason = "copying all that differs" if event.full else "copying what the standby lacks"
        return [*self._enter(State.SYNCING, reason), Sync(self._attempt, event.full)]

    def _synced(self, _: Synced) -> list[Action]:
        return self._checkpoint()

    def _due(self, _: Due) -> list[Action]:
        return self._checkpoint()

    def _due_again(self, _: Due) -> list[Action]:
        self._wanted_again = True  # several requests meanwhile are one
        return []

    def _committed(self, event: Committed) -> list[Action]:
        self.epoch = event.epoch
        self._failures = 0
        is_news = not self.protected or bool(self.reason)
        self.protected = True
        self.state, self.reason = State.REPLICATING, ""
        actions = self._enter(State.REPLICATING, "") if is_news else []
        return [*actions, *self._wanted()]

    def _not_committed(self, event: NotCommitted) -> list[Action]:
        self.asked -= 1
        return [*self._enter(State.REPLICATING, f"the last checkpoint failed: {event.reason}"), *self._wanted()]

    def _failed(self, event: Failed) -> list[Action]:
        if self.state is State.OFFLINE and event.attempt is None:
            return []  # an echo of what has been let go
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2**self._failures) if self._failures < 16 else LONGEST_DELAY
        self._failures += 1
        self.protected = False
        self._wanted_again = False
        actions: list[Action] = [LetGo(event.reason)] if self.state in _WITH_STANDBY else []
        if self.state is not State.OFFLINE or self.reason != event.reason:
            actions += self._enter(State.OFFLINE, event.reason)
        return [*actions, self._attach(delay)]

    def _refused(self, event: Refused) -> list[Action]:
        self.protected = False
        self._attempt += 1
        return [LetGo(event.reason), *self._enter(State.FENCED, event.reason)]

    def _stop(self, _: Stop) -> list[Action]:
        self.protected = False
        self._attempt += 1
        return [LetGo("stopped"), *self._enter(State.STOPPED, "stopped by command")]

    # --- helpers ---

    def _enter(self, state: State, reason: str) -> list[Action]:
        self.state, self.reason = state, reason
        return [Report(state, reason)]

    def _attach(self, delay: float) -> Attach:
        self._attempt += 1
        return Attach(self._attempt, delay)

    def _wanted(self) -> list[Action]:
        wanted, self._wanted_again = self._wanted_again, False
        return self._checkpoint() if wanted else []

    def _checkpoint(self) -> list[Action]:
        self.state = State.CHECKPOINTING
        self._attempt += 1
        self.asked = max(self.asked, self.epoch) + 1
        return [TakeCheckpoint(self._attempt, self.asked)]


_LIVE: Final = (State.OFFLINE, State.SYNCING, State.REPLICATING, State.CHECKPOINTING)

#: Everything that can happen; what is not in the table changes nothing. Walked by the tests.
_TABLE: Final[dict[tuple[State, type], Callable[..., list[Action]]]] = {
    (State.OFFLINE, Attached): Coordinator._attached,
    (State.SYNCING, Synced): Coordinator._synced,
    (State.REPLICATING, Due): Coordinator._due,
    (State.CHECKPOINTING, Due): Coordinator._due_again,
    (State.CHECKPOINTING, Committed): Coordinator._committed,
    (State.CHECKPOINTING, NotCommitted): Coordinator._not_committed,
    **{(state, Failed): Coordinator._failed for state in _LIVE},
    **{(state, Refused): Coordinator._refused for state in _LIVE},
    **{(state, Stop): Coordinator._stop for state in (*_LIVE, State.FENCED)},
}
