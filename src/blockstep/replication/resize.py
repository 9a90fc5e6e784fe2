"""Growing the disks of a running pair.

The standby grows first, then the primary's disk: at no moment can a write arrive that the standby has no place for.
On the standby the disks grow from the top of the view down (active, hidden, secondary disk), so that none of them
takes what is new below it for something that shows through; what is new reads as zeroes in all of them. The view
grows with its active disk, at once; up to the next checkpoint its new part reads as zeroes.

Shrinking is not offered: guest, filesystem and standby may use the end of the disk at that moment, and what is cut
off cannot be put back when the other side fails. Only a growth that failed halfway is taken back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from blockstep.block.driver import Driver
from blockstep.errors import OptionError


def check_growth(length: int, size: int) -> None:
    """Raises OptionError if a disk of ``length`` bytes would have to shrink to have ``size``."""
    if size < length:
        raise OptionError("size", size, f"at least {length} bytes, as the disk has now: it can only grow, because "
                          "what is cut off might be in use, and could not be put back if the other side failed")


async def resize_together(nodes: Sequence[Driver], length: int) -> None:
    """Give all ``nodes`` the same length, one after the other, or none of them.

    Nothing may be in flight in them. Raises the OSError of the first that could not; those before it are put back.
    """
    done: list[tuple[Driver, int]] = []
    try:
        for node in nodes:
            before = node.length
            await node.truncate(length)
            done.append((node, before))
    except BaseException:
        for node, before in reversed(done):
            with contextlib.suppress(OSError):  # the first error says what is wrong
                await node.truncate(before)
        raise
