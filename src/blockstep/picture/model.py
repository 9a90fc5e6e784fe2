"""What there is to draw."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Final, Literal

from msgspec import Struct

Kind = Literal["export", "user", "job", "node"]

#: Users stand above nodes, in this order.
KINDS: Final[tuple[Kind, ...]] = ("export", "user", "job", "node")

#: A right on a node, and the letter for it where there is little room.
LETTERS: Final = {"consistent-read": "r", "write": "w", "write-unchanged": "u", "resize": "s"}


class Box(Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """A node of the graph, or a user of one.

    ``type``: a node's driver, an export's protocol, what a job does. ``size``: of a node, in bytes.
    ``file``: what a node opens itself, rather than by a child. ``state``: a job's status, the stage of a replication
    filter. ``current`` of ``total``: a job's progress, in bytes.
    """

    id: int
    kind: Kind
    name: str
    type: str = ""
    size: int | None = None
    file: str = ""
    read_only: bool = False
    state: str = ""
    current: int | None = None
    total: int | None = None


class Edge(Struct, frozen=True, kw_only=True, rename="kebab"):
    """``parent`` uses ``child`` under ``name`` and in ``role`` (empty if not known).

    ``takes`` and ``shares`` are names of permissions: those of `LETTERS`.
    """

    parent: int
    child: int
    name: str
    role: str
    takes: frozenset[str]
    shares: frozenset[str]


class Picture(Struct, frozen=True, kw_only=True, rename="kebab", dict=True):
    """A whole graph. ``headline``: how the pair is, if the program is an end of one."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    headline: str = ""

    @cached_property
    def by_id(self) -> dict[int, Box]:
        """The boxes by id."""
        return {box.id: box for box in self.boxes}

    def below(self, box: Box) -> list[Edge]:
        """The edges down from a box; a backing file comes last."""
        return sorted((edge for edge in self.edges if edge.parent == box.id),
                      key=lambda edge: (edge.name == "backing", natural(edge.name)))

    def roots(self) -> Iterator[Box]:
        """The boxes that nobody uses: exports, then other users, jobs, and nodes that are held by name alone."""
        used = {edge.child for edge in self.edges}
        free = [box for box in self.boxes if box.id not in used]
        yield from sorted(free, key=lambda box: (KINDS.index(box.kind), natural(box.name)))


def letters(permissions: frozenset[str]) -> str:
    """Permissions in four columns: ``rw-s``."""
    return "".join(letter if name in permissions else "-" for name, letter in LETTERS.items())


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts ``children.10`` behind ``children.9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
