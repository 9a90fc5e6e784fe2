"""What a child of a quorum has missed: the ranges in which it holds older data than the others.

A child that failed a write stays in the quorum; until a later write makes a range good, it must not be read from
there. The ranges never overlap. There are few of them as long as a child fails now and then; a child that fails
everything is described by one range, since there are never more than a limit: beyond it their hull is taken, which
says too much and never too little.
"""

from __future__ import annotations


class Missed:
    """The ranges in which a child holds older data than the others; beyond ``limit`` of them, their hull."""

    __slots__ = ("limit", "ranges")

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        #: (start, end), in no order, without overlaps
        self.ranges: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        """Note that the child missed a write."""
        touching = [piece for piece in self.ranges if piece[0] <= end and start <= piece[1]]
        self.ranges = [piece for piece in self.ranges if piece not in touching]
        self.ranges.append((min(start, *(low for low, _ in touching)), max(end, *(high for _, high in touching)))
                           if touching else (start, end))
        if len(self.ranges) > self.limit:
            self.ranges = [(min(low for low, _ in self.ranges), max(high for _, high in self.ranges))]

    def made_good(self, start: int, end: int) -> None:
        """Note that the child has new data there."""
        left = []
        for low, high in self.ranges:
            if low < start:
                left.append((low, min(high, start)))
            if high > end:
                left.append((max(low, end), high))
        self.ranges = left

    def touches(self, start: int, end: int) -> bool:
        """Whether any byte of the range is old."""
        return any(low < end and start < high for low, high in self.ranges)
