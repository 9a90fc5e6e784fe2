"""How fast a job may go, and how fast it goes.

`SpeedLimit` is a leaky bucket without a burst: what was copied keeps the bucket closed for as long as it takes at
the chosen speed. `Meter` looks back a few seconds over what was copied and says how long the rest will take.

Both are told the time.
"""

from __future__ import annotations

from collections import deque
from typing import Final

#: Seconds that the meter looks back, and the least between two of its marks.
_WINDOW: Final = 10.0
_SPACING: Final = 0.25


class SpeedLimit:
    """A leaky bucket. ``speed`` is in bytes a second, 0 for no limit."""

    __slots__ = ("_free_at", "speed")

    def __init__(self, speed: int = 0) -> None:
        self.speed = speed
        self._free_at = 0.0

    def wait(self, now: float) -> float:
        """Seconds until more may be charged; 0 if it may be now."""
        return max(0.0, self._free_at - now) if self.speed else 0.0

    def charge(self, now: float, count: int) -> None:
        """``count`` bytes go now."""
        if self.speed:
            self._free_at = max(self._free_at, now) + count / self.speed

    def change(self, speed: int, now: float) -> None:
        """Another speed, from now on: what was charged at the old one is forgiven."""
        self.speed = speed
        self._free_at = now


class Meter:
    """The speed of the last few seconds."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def mark(self, now: float, current: int) -> None:
        """At ``now``, ``current`` bytes were done."""
        marks = self._marks
        if not marks or now - marks[-1][0] >= _SPACING:
            marks.append((now, current))
            while len(marks) > 2 and now - marks[0][0] > _WINDOW:
                marks.popleft()

    def rate(self, now: float, current: int) -> float | None:
        """Bytes a second; None before anything can be said."""
        if not self._marks:
            return None
        since, before = self._marks[0]
        return (current - before) / (now - since) if now > since and current > before else None
