"""Growing the disks of a running pair.

The standby grows first, then the primary's disk: at no moment can a write arrive that the standby has no place for.
On the standby the disks grow from the top of the view down (active, hidden, secondary disk), so that none of them
takes what is new below it for something that shows through; what is new reads as zeroes in all of them. The view
grows with its active disk, at once; up to the next checkpoint its new part reads as zeroes.

Shrinking is not offered: guest, filesystem and standby may use the end of the disk at that moment, and what is cut
off cannot be put back when the other side fails. Only a growth that failed halfway is taken back. Where that fails as
well the disks of a view have several lengths: the least of them is the one that all of it has, so replication goes on,
and the next resize gives all of them the same again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from blockstep.block.driver import Driver
from blockstep.drivers.copy_before_write import CopyBeforeWrite
from blockstep.drivers.replication import Replication
from blockstep.errors import OptionError, explained, told


def check_growth(length: int, size: int) -> None:
    """Raises OptionError if a disk of ``length`` bytes would have to shrink to have ``size``."""
    if size < length:
        raise OptionError("size", size, f"at least {length} bytes, as the disk has now: it can only grow, because "
                          "what is cut off might be in use, and could not be put back if the other side failed")


async def resize_together(nodes: Sequence[Driver], length: int) -> None:
    """Give all ``nodes`` the same length, one after the other, or none of them.

    Nothing may be in flight in them. Raises OSError that names the first that could not; all are put back then, and
    if one could not be, that is said as well.
    """
    begun: list[tuple[Driver, int]] = []
    try:
        for node in nodes:
            begun.append((node, node.length))
            if node.length != length:
                await node.resize(length)
    except BaseException as error:
        wrong = [await _put_back(node, before) for node, before in reversed(begun)]
        if not isinstance(error, OSError):
            raise
        code = error.errno or errno.EIO
        why = told(error).removeprefix(os.strerror(code)).removeprefix(": ")
        what = f"'{_name(begun[-1][0])}' cannot have {length} bytes{why and f' ({why})'}"
        raise OSError(code, explained(code, "; ".join([what, *filter(None, wrong)]))) from error


async def _put_back(node: Driver, length: int) -> str:
    try:
        if node.length != length:
            await node.resize(length)
    except OSError as error:
        return f"and '{_name(node)}' has {node.length} bytes now, and could not have {length} again: {told(error)}"
    return ""


def _name(node: Driver) -> str:
    """A name that the user can know: not that of a filter which replication has put over a disk."""
    return node.children["file"].node.name if isinstance(node, CopyBeforeWrite) else node.name


def disks_of(filter: Replication) -> list[Driver]:
    """The disks that make a standby's view, from the top down: active, hidden, and what the primary writes to."""
    active = filter.file.node
    hidden = active.children["backing"].node
    secondary = hidden.children["backing"].node
    base = secondary if filter.buffer is None else filter.buffer.entrance
    return [active, hidden, base]


def unevenness(filter: Replication) -> str:
    """How a view is whose disks have several lengths, after a resize that could not be taken back; else empty."""
    disks = disks_of(filter)
    if len({disk.length for disk in disks}) == 1:
        return ""
    lengths = ", ".join(f"'{_name(disk)}' has {disk.length} bytes" for disk in disks)
    return f"a resize failed and could not be taken back: {lengths}; the next resize puts that right"
