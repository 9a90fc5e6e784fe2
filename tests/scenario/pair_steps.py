"""The steps of a trace over a pair: see `tests.scenario.pair_trace` for what each of them does."""

from __future__ import annotations

import errno
from dataclasses import dataclass, fields
from typing import Literal

from tests.scenario.pair_model import Side


class Shown:
    """Shown as it is written: what is as always is left out."""

    def __repr__(self) -> str:
        first, *others = fields(self)  # type: ignore[arg-type]
        given = [f"{field.name}={value!r}" for field in others if (value := getattr(self, field.name)) != field.default]
        return f"{type(self).__name__}({', '.join([repr(getattr(self, first.name)), *given])})"


@dataclass(frozen=True, repr=False)
class Request(Shown):
    """One of the primary's guest, or of the view's. ``offset`` counts modulo the disk's length."""

    what: Literal["read", "write", "zeroes", "discard", "flush"]
    disk: int = 0
    offset: int = 0
    length: int = 1
    flags: int = 0
    side: Side = "guest"


@dataclass(frozen=True, repr=False)
class Fault(Shown):
    """The next ``event`` of a disk fails, or all of them."""

    side: Literal["disk", "secondary"]
    event: str
    disk: int = 0
    code: int = errno.EIO
    always: bool = False


@dataclass(frozen=True, repr=False)
class Do(Shown):
    """Anything else."""

    what: str
    disk: int = 0
    amount: float = 0
    begin: bool = False


Step = Request | Fault | Do
