"""Tell when a node is written beyond a mark: the event ``BLOCK_WRITE_THRESHOLD``, once.

Management that gives a disk its storage in small steps sets the mark below the end of what it has given, and sets it
anew when it has given more. While no mark is set this costs nothing: the node is watched only then (`Node.watch`).
"""

from __future__ import annotations

import asyncio

from blockstep.block.driver import Driver


class WriteThreshold:
    """A mark on a node, in bytes. Made by `set_write_threshold`."""

    def __init__(self, node: Driver, mark: int) -> None:
        self.node, self.mark = node, mark
        self.met = False
        node.watch(self, discards=False)

    def wrote(self, offset: int, length: int) -> None:
        """A write or zeroes have ended."""
        if offset + length > self.mark and not self.met:
            self.met = True
            asyncio.get_running_loop().call_soon(self.remove)  # not now: the node goes through its watchers
            self.node.report("BLOCK_WRITE_THRESHOLD", {
                "node-name": self.node.name, "amount-exceeded": offset + length - self.mark,
                "write-threshold": self.mark})

    def remove(self) -> None:
        """Watch no more."""
        if self in self.node.watchers:
            self.node.unwatch(self)


def write_threshold(node: Driver) -> int:
    """The mark on a node that has not been met yet; 0: none."""
    return next((each.mark for each in node.watchers if isinstance(each, WriteThreshold) and not each.met), 0)


def set_write_threshold(node: Driver, mark: int) -> None:
    """Set the mark of a node, in place of another; 0: none."""
    for each in [each for each in node.watchers if isinstance(each, WriteThreshold)]:
        each.remove()
    if mark:
        WriteThreshold(node, mark)
