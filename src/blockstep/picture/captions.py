"""What boxes and edges say for themselves, in every kind of drawing."""

from __future__ import annotations

from typing import Final

from blockstep.picture.model import LETTERS, Box, Edge
from blockstep.units import format_size

LEGEND: Final = "takes, shares: " + ", ".join(f"{letter} {name}" for name, letter in LETTERS.items())

_FILLS: Final = {"export": "#d9f0d3", "user": "#d9f0d3", "job": "#fff2cc", "node": "#eef3f8"}
_STAGED, _BROKEN = "#e6dcf5", "#f8d0cc"
#: States of which people should know. Whatever has another state is at work.
BROKEN: Final = {"failed", "failover-failed", "aborting", "shutting down"}


def fill(box: Box) -> str:
    """The colour of a box: by its kind; nodes that have a stage of replication, and what is broken, stand out."""
    if box.state in BROKEN:
        return _BROKEN
    return _STAGED if box.kind == "node" and box.state else _FILLS[box.kind]


def captions(box: Box) -> list[str]:
    """The lines in a box; the first is its name."""
    size = "" if box.size is None else format_size(box.size)
    state = (box.state, progress(box), "read-only" if box.read_only else "")
    lines = (box.name or "(no name)", _spaced(what(box), size), box.file, _spaced(*state))
    return [line for line in lines if line]


def what(box: Box) -> str:
    """``export nbd``, ``job mirror``; of a node its driver."""
    return " ".join(word for word in ("" if box.kind == "node" else box.kind, box.type) if word)


def progress(box: Box) -> str:
    """How far a job is."""
    if box.current is None or not box.total:
        return ""
    return f"{format_size(box.current)} of {format_size(box.total)}"


def relation(edge: Edge) -> str:
    """An edge's name, and its role where that says more."""
    return edge.name if edge.role in ("", edge.name) else f"{edge.name}, {edge.role}"


def _spaced(*words: str) -> str:
    return "  ".join(word for word in words if word)
