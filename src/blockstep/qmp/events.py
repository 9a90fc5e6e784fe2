"""Rate limits of events: what is sent now, what is held back, and when that is due.

An event that is declared with a ``rate_limit`` of s seconds is sent at once if none of its kind was sent in the
last s seconds. Otherwise it is held back; a newer one takes its place; what is held when the s seconds are over
is sent then. So the peers always get the latest state, at most s seconds late. Kinds with ``per`` are counted
apart for each combination of values of those fields. Memory: one entry for each combination that was seen within
the last period.

Time is passed in, in seconds of any steady clock.

Source: QMP specification, "Asynchronous events"; "Rate-limiting" in QEMU's reference of events.
"""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from blockstep.qmp.schema import Event

_Key = tuple[Hashable, ...]


class _Held(msgspec.Struct):
    until: float
    event: Event | None = None


class Throttle:
    """The rate limits of all events of one server."""

    def __init__(self) -> None:
        self._kinds: dict[_Key, _Held] = {}

    def offer(self, event: Event, now: float) -> bool:
        """Whether to send ``event`` now. If not, it is held back, in place of an older one."""
        kind = event.kind
        if kind.rate_limit <= 0:
            return True
        key = (kind.name, *(getattr(event, name) for name in kind.per))
        held = self._kinds.get(key)
        if held is not None and (now < held.until or held.event is not None):
            held.event = event
            return False
        self._kinds[key] = _Held(now + kind.rate_limit)
        return True

    def due(self, now: float) -> list[Event]:
        """The events whose time has come. They count as sent now."""
        ready: list[Event] = []
        for key, held in list(self._kinds.items()):
            if now < held.until:
                continue
            if held.event is None:
                del self._kinds[key]
                continue
            ready.append(held.event)
            held.until, held.event = now + held.event.kind.rate_limit, None
        return ready

    def next_time(self) -> float | None:
        """When `due` will have something to do, or None."""
        return min((held.until for held in self._kinds.values()), default=None)
