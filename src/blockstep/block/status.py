"""Block status through layers: who holds what, and what is known to be zero."""

from __future__ import annotations

from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import Driver, Extent


async def status_through(node: Driver, offset: int, length: int, base: Driver | None = None) -> list[Extent]:
    """The range as `node` reads, resolved through its backing nodes down to, but not including, ``base``.

    Covers the whole range. In each extent ``depth`` counts the layers down to the node that holds it, and is 0,
    with ``allocated`` False, where no node above ``base`` does; such a range reads as zeroes if there is no base.
    Filters are no layers: above a filter of ``base`` is above ``base``. What a filter keeps still for its readers
    (`Driver.read_lock`) is kept still meanwhile: what moves from one layer to another is found in one of them.
    """
    result: list[Extent] = []
    await _resolve(node, offset, offset + length, 1, base and base.unfiltered(), result)
    return result


async def _resolve(
    node: Driver, offset: int, end: int, depth: int, base: Driver | None, result: list[Extent]
) -> None:
    lock = _lock_of(node)
    if lock is None:
        await _resolve_still(node, offset, end, depth, base, result)
        return
    token = lock.try_take(offset, end, True) or await lock.take(offset, end, True)
    try:
        await _resolve_still(node, offset, end, depth, base, result)
    finally:
        lock.give_back(token)


async def _resolve_still(
    node: Driver, offset: int, end: int, depth: int, base: Driver | None, result: list[Extent]
) -> None:
    while offset < end:
        if offset >= node.length:  # a backing node may be shorter than what lies over it
            _append(result, Extent(end - offset, False, True, False, 0))
            return
        for extent in await node.block_status(offset, min(end, node.length) - offset):
            if extent.allocated:
                _append(result, extent._replace(depth=depth))
            else:
                backing = backing_of(node)
                if backing is None or backing.unfiltered() is base:
                    zero = backing is None and base is None
                    _append(result, Extent(extent.length, False, zero, False, 0))
                else:
                    await _resolve(backing, offset, offset + extent.length, depth + 1, base, result)
            offset += extent.length


def _lock_of(node: Driver) -> RangeLock | None:
    """That of the node, or of the first filter below it that has one."""
    for each in node.chain():
        if each.read_lock is not None or not each.is_filter:
            return each.read_lock
    return None


def backing_of(node: Driver) -> Driver | None:
    """The backing node of the first node down from this one that is no filter; None if that has none."""
    backing = node.unfiltered().children.get("backing")
    return backing.node if backing is not None else None


def _append(result: list[Extent], extent: Extent) -> None:
    if result and result[-1][1:] == extent[1:]:
        result[-1] = extent._replace(length=result[-1].length + extent.length)
    else:
        result.append(extent)


async def allocated_above(node: Driver, base: Driver, offset: int, length: int) -> list[tuple[int, bool]]:
    """The range as runs of (length, whether `node` or a layer between it and ``base`` holds it)."""
    return [(extent.length, extent.allocated) for extent in await status_through(node, offset, length, base)]
