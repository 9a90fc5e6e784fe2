"""The primary's coordinator: the whole table of states and events, what is out of date, back-off, refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.replication.coordinator import (
    FIRST_DELAY,
    LONGEST_DELAY,
    Action,
    Attach,
    Attached,
    Committed,
    Coordinator,
    Due,
    Event,
    Failed,
    LetGo,
    NotCommitted,
    Refused,
    Report,
    State,
    Stop,
    Sync,
    Synced,
    TakeCheckpoint,
)

#: How each state is reached from the begin.
WAY: dict[State, tuple[type, ...]] = {
    State.OFFLINE: (),
    State.SYNCING: (Attached,),
    State.CHECKPOINTING: (Attached, Synced),
    State.REPLICATING: (Attached, Synced, Committed),
    State.FENCED: (Refused,),
    State.STOPPED: (Stop,),
}
EVENTS: tuple[type, ...] = (Attached, Synced, Due, Committed, NotCommitted, Failed, Refused, Stop)

#: What an event does: the next state, and the kinds of actions in their order. What is not here does nothing.
TABLE: dict[tuple[State, type], tuple[State, tuple[type, ...]]] = {
    (State.OFFLINE, Attached): (State.SYNCING, (Report, Sync)),
    (State.OFFLINE, Failed): (State.OFFLINE, (Report, Attach)),
    (State.OFFLINE, Refused): (State.FENCED, (LetGo, Report)),
    (State.OFFLINE, Stop): (State.STOPPED, (LetGo, Report)),
    (State.SYNCING, Synced): (State.CHECKPOINTING, (TakeCheckpoint,)),
    (State.SYNCING, Failed): (State.OFFLINE, (LetGo, Report, Attach)),
    (State.SYNCING, Refused): (State.FENCED, (LetGo, Report)),
    (State.SYNCING, Stop): (State.STOPPED, (LetGo, Report)),
    (State.CHECKPOINTING, Due): (State.CHECKPOINTING, ()),
    (State.CHECKPOINTING, Committed): (State.REPLICATING, (Report,)),
    (State.CHECKPOINTING, NotCommitted): (State.REPLICATING, (Report,)),
    (State.CHECKPOINTING, Failed): (State.OFFLINE, (LetGo, Report, Attach)),
    (State.CHECKPOINTING, Refused): (State.FENCED, (LetGo, Report)),
    (State.CHECKPOINTING, Stop): (State.STOPPED, (LetGo, Report)),
    (State.REPLICATING, Due): (State.CHECKPOINTING, (TakeCheckpoint,)),
    (State.REPLICATING, Failed): (State.OFFLINE, (LetGo, Report, Attach)),
    (State.REPLICATING, Refused): (State.FENCED, (LetGo, Report)),
    (State.REPLICATING, Stop): (State.STOPPED, (LetGo, Report)),
    (State.FENCED, Stop): (State.STOPPED, (LetGo, Report)),
}


class Driven:
    """A coordinator whose actions are noted."""

    def __init__(self, state: State = State.OFFLINE) -> None:
        self.coordinator = Coordinator()
        self.attempt = 0
        self.note(self.coordinator.begin())
        for event in WAY[state]:
            self.happens(event)
        assert self.coordinator.state is state

    def note(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, Attach | Sync | TakeCheckpoint):
                assert action.attempt > self.attempt, "each attempt has a number of its own"
                self.attempt = action.attempt
        return actions

    def happens(self, event: type, attempt: int | None = None, **fields: object) -> list[Action]:
        """An event of the present attempt (or another one)."""
        return self.note(self.coordinator.apply(make(event, self.attempt if attempt is None else attempt,
                                                     self.coordinator.epoch, **fields)))


def make(event: type, attempt: int, epoch: int, **fields: object) -> Event:
    given_fields: dict[str, object] = {
        Attached: {"attempt": attempt, "full": False}, Synced: {"attempt": attempt}, Due: {},
        Committed: {"attempt": attempt, "epoch": epoch + 1}, NotCommitted: {"attempt": attempt, "reason": "full"},
        Failed: {"reason": "broken", "attempt": attempt}, Refused: {"reason": "promoted"}, Stop: {},
    }[event]  # type: ignore[assignment]
    return event(**{**given_fields, **fields})  # type: ignore[no-any-return]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_the_table(state: State, event: type) -> None:
    driven = Driven(state)
    actions = driven.happens(event)
    expected_state, kinds = TABLE.get((state, event), (state, ()))
    assert driven.coordinator.state is expected_state
    assert tuple(type(action) for action in actions) == kinds
    for action in actions:
        if isinstance(action, Report):
            assert (action.state, action.reason) == (expected_state, driven.coordinator.reason)


@pytest.mark.parametrize("event", [Attached, Synced, Committed, NotCommitted, Failed], ids=lambda e: e.__name__)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_an_answer_to_an_attempt_that_was_given_up_is_ignored(state: State, event: type) -> None:
    driven = Driven(state)
    before = vars(driven.coordinator).copy()
    for attempt in range(driven.attempt):
        assert driven.happens(event, attempt) == []
    assert vars(driven.coordinator) == before


@pytest.mark.parametrize("state", [State.SYNCING, State.REPLICATING, State.CHECKPOINTING], ids=lambda s: s.value)
def test_a_link_that_fails_ends_the_attempt_that_goes_on(state: State) -> None:
    driven = Driven(state)
    given_up = driven.attempt
    actions = driven.note(driven.coordinator.apply(Failed("cut")))
    assert [type(action) for action in actions] == [LetGo, Report, Attach]
    for event in (Synced, Committed, Failed):
        assert driven.happens(event, given_up) == []
    assert driven.coordinator.state is State.OFFLINE


def test_the_echo_of_a_lost_link_is_not_a_failure_of_the_next_attempt() -> None:
    driven = Driven(State.REPLICATING)
    driven.coordinator.apply(Failed("cut"))
    assert driven.coordinator.apply(Failed("cut")) == []
    assert driven.coordinator.apply(Failed("and the other disk's link")) == []


def test_attempts_to_attach_back_off_and_begin_anew_after_a_checkpoint() -> None:
    driven = Driven()
    delays = []
    for _ in range(20):
        *_, attach = driven.happens(Failed)
        assert isinstance(attach, Attach)
        delays.append(attach.delay)
    assert delays[:5] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY, 8 * FIRST_DELAY, 16 * FIRST_DELAY]
    assert max(delays) == delays[-1] == LONGEST_DELAY
    for event in (Attached, Synced):
        driven.happens(event)
    *_, attach = driven.happens(Failed)
    assert attach == Attach(driven.attempt, LONGEST_DELAY), "a standby that never gets to a checkpoint is no news"
    for event in (Attached, Synced, Committed):
        driven.happens(event)
    *_, attach = driven.happens(Failed)
    assert attach == Attach(driven.attempt, FIRST_DELAY)


def test_the_first_attempt_is_made_at_once() -> None:
    assert Coordinator().begin() == [Attach(1, 0.0)]


def test_the_same_failure_again_is_no_news() -> None:
    driven = Driven()
    assert any(isinstance(action, Report) for action in driven.happens(Failed, reason="refused"))
    assert not any(isinstance(action, Report) for action in driven.happens(Failed, reason="refused"))
    assert any(isinstance(action, Report) for action in driven.happens(Failed, reason="no route"))


def test_a_pair_is_protected_from_the_first_checkpoint_to_the_loss() -> None:
    driven = Driven()
    seen = []
    for event in (Attached, Synced, Committed, Due, Committed, Failed):
        driven.happens(event)
        seen.append(driven.coordinator.protected)
    assert seen == [False, False, True, True, True, False]


@pytest.mark.parametrize("event", [Refused, Stop], ids=lambda event: event.__name__)
def test_a_pair_that_was_ended_is_not_protected(event: type) -> None:
    driven = Driven(State.REPLICATING)
    driven.happens(event)
    assert not driven.coordinator.protected


@pytest.mark.parametrize("state", [State.FENCED, State.STOPPED], ids=lambda state: state.value)
@given(events=st.lists(st.sampled_from([event for event in EVENTS if event is not Stop]), max_size=10))
def test_nothing_brings_an_ended_pair_back(state: State, events: list[type]) -> None:
    driven = Driven(state)
    for event in events:
        assert driven.happens(event) == []
    assert driven.coordinator.state is state


def test_requests_during_a_checkpoint_are_one_more_checkpoint() -> None:
    driven = Driven(State.REPLICATING)
    driven.happens(Due)
    for _ in range(3):
        assert driven.happens(Due) == []
    assert driven.happens(Committed) == [TakeCheckpoint(driven.attempt, 3)]
    assert driven.happens(Committed) == []
    assert driven.coordinator.state is State.REPLICATING


def test_a_request_during_a_checkpoint_that_is_refused_is_tried_once() -> None:
    driven = Driven(State.REPLICATING)
    driven.happens(Due)
    driven.happens(Due)
    actions = driven.happens(NotCommitted)
    assert [type(action) for action in actions] == [Report, TakeCheckpoint]
    assert [type(action) for action in driven.happens(NotCommitted)] == [Report]
    assert driven.coordinator.state is State.REPLICATING


def test_the_number_of_a_checkpoint_whose_answer_was_lost_is_not_given_to_another_one() -> None:
    """Of two standbys that have it one would be taken for the other."""
    driven = Driven(State.REPLICATING)
    epoch = driven.coordinator.epoch
    numbers = []
    for _ in range(2):
        actions = driven.happens(Due)
        numbers += [action.epoch for action in actions if isinstance(action, TakeCheckpoint)]
        driven.happens(Failed)
        driven.happens(Attached)
        actions = driven.happens(Synced)
        numbers += [action.epoch for action in actions if isinstance(action, TakeCheckpoint)]
        driven.happens(NotCommitted)
    assert numbers == [epoch + 1, epoch + 2, epoch + 2, epoch + 3]
    assert (driven.coordinator.epoch, driven.coordinator.asked) == (epoch, epoch + 2)


def test_a_refused_checkpoint_uses_up_no_number_and_its_reason_is_told_until_one_succeeds() -> None:
    driven = Driven(State.REPLICATING)
    assert driven.happens(Due) == [TakeCheckpoint(driven.attempt, 2)]
    driven.happens(NotCommitted)
    assert "full" in driven.coordinator.reason
    assert driven.coordinator.protected
    assert driven.happens(Due) == [TakeCheckpoint(driven.attempt, 2)]
    assert driven.happens(Committed) == [Report(State.REPLICATING, "")]
    assert driven.coordinator.epoch == 2


def test_a_request_that_waited_dies_with_the_link() -> None:
    driven = Driven(State.REPLICATING)
    driven.happens(Due)
    driven.happens(Due)
    driven.happens(Failed)
    for event in (Attached, Synced):
        driven.happens(event)
    assert not any(isinstance(action, TakeCheckpoint) for action in driven.happens(Committed))


@pytest.mark.parametrize("full", [True, False])
def test_what_is_copied_is_what_the_attach_said(full: bool) -> None:
    driven = Driven()
    assert driven.happens(Attached, full=full)[-1] == Sync(driven.attempt, full)


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3)), max_size=40))
def test_any_sequence(events: list[tuple[type, int]]) -> None:
    """At most one attempt goes on; epochs count up one by one; a standby that was attached is let go of once."""
    driven = Driven()
    attached = False
    for event, age in events:
        epoch = driven.coordinator.epoch
        actions = driven.happens(event, max(0, driven.attempt - age))
        for action in actions:
            if isinstance(action, Sync):
                assert not attached
                attached = True
            elif isinstance(action, LetGo):
                attached = False
            elif isinstance(action, Attach):
                assert not attached
            elif isinstance(action, TakeCheckpoint):
                assert attached
                assert action.epoch == driven.coordinator.epoch + 1
        state = driven.coordinator.state
        assert attached is (state in (State.SYNCING, State.REPLICATING, State.CHECKPOINTING))
        assert driven.coordinator.epoch - epoch in (0, 1)
        assert not driven.coordinator.protected or attached
