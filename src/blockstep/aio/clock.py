"""Time as something that is passed in, so that tests own it. An event loop is a `Clock`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Timer(Protocol):
    """A call that has not come yet."""

    def cancel(self) -> None:
        """Never call. Has no effect after the call."""


class Clock(Protocol):
    """Monotonic time in seconds, and calls at a later time."""

    def time(self) -> float:
        """Now."""

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any) -> Timer:
        """Call ``callback(*args)`` once, ``delay`` seconds from now, from the event loop."""
