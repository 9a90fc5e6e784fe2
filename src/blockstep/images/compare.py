"""Whether two images read the same.

Where both are known to read as zeroes nothing is read; where one of them is, only the other. An image may be shorter
than the other if what is missing reads as zeroes; *strict* asks for the same length and the same block status, too.

Differences are told by the first 512 bytes that have one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal

import msgspec

from blockstep.block.driver import ZEROES, Buffer, Extent
from blockstep.block.io import Backend
from blockstep.units import GiB, MiB

#: ``progress(done, total)`` in bytes.
Progress = Callable[[int, int], None]

_SECTOR: Final = 512
_CHUNK: Final = MiB
_AT_ONCE: Final = 4
_WINDOW: Final = GiB


def no_progress(done: int, total: int) -> None:
    """Nobody looks."""


class Comparison(msgspec.Struct, frozen=True):
    """How two images differ. ``offset``: in bytes, where that says anything. ``longer``: their lengths differ."""

    difference: Literal["none", "content", "status", "length"] = "none"
    offset: int = 0
    longer: bool = False

    @property
    def identical(self) -> bool:
        """Whether they read the same, and were as strictly equal as asked."""
        return self.difference == "none"

    def lines(self) -> list[str]:
        """The same in qemu-img's words."""
        words = {
            "none": "Images are identical.",
            "content": f"Content mismatch at offset {self.offset}!",
            "status": f"Strict mode: Offset {self.offset} block status mismatch!",
            "length": "Strict mode: Image size mismatch!",
        }
        warning = ["Warning: Image size mismatch!"] if self.longer and self.difference != "length" else []
        return [*warning, words[self.difference]]


async def compare(one: Backend, two: Backend, strict: bool = False, progress: Progress = no_progress) -> Comparison:
    """Compare two images. Raises OSError for what cannot be read."""
    longer = one.length != two.length
    if strict and longer:
        return Comparison("length", longer=True)
    total, common = max(one.length, two.length), min(one.length, two.length)
    progress(0, total)
    waiting: deque[tuple[int, int, asyncio.Task[int | None]]] = deque()
    try:
        async for offset, length, pair in _pieces(one, two, common, total):
            if strict and pair[0] is not None and pair[1] is not None and _shown(pair[0]) != _shown(pair[1]):
                if (found := await _first(waiting, progress, total)) is not None:
                    return Comparison("content", found)
                return Comparison("status", offset)
            task = asyncio.ensure_future(_compare_piece(one, two, offset, length, pair))
            waiting.append((offset, length, task))
            if len(waiting) >= _AT_ONCE and (found := await _next(waiting, progress, total)) is not None:
                return Comparison("content", found, longer and found >= common)
        found = await _first(waiting, progress, total)
        if found is not None:
            return Comparison("content", found, longer and found >= common)
        progress(total, total)
        return Comparison(longer=longer)
    finally:
        for _, _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in waiting), return_exceptions=True)


Pair = tuple[Extent | None, Extent | None]


async def _pieces(one: Backend, two: Backend, common: int, total: int) -> AsyncIterator[tuple[int, int, Pair]]:
    """(offset, length, what each holds there; None beyond its end), in order."""
    offset = 0
    while offset < total:
        window = min(_WINDOW, (common if offset < common else total) - offset)
        lists = [deque(await backend.block_status(offset, window)) if offset < backend.length
                 else deque([None]) for backend in (one, two)]
        left: list[int] = [extents[0].length if extents[0] is not None else window for extents in lists]
        end = offset + window
        while offset < end:
            pair = lists[0][0], lists[1][0]
            run = min(*left, end - offset)
            piece = run if _is_zero(pair[0]) and _is_zero(pair[1]) else min(run, _CHUNK)
            yield offset, piece, pair
            offset += piece
            for number in (0, 1):
                left[number] -= piece
                if not left[number] and offset < end:
                    lists[number].popleft()
                    following = lists[number][0]
                    left[number] = following.length if following is not None else end - offset


def _is_zero(extent: Extent | None) -> bool:
    return extent is None or extent.zero


def _shown(extent: Extent) -> tuple[bool, bool, bool]:
    return extent.data, extent.zero, extent.allocated


async def _compare_piece(one: Backend, two: Backend, offset: int, length: int, pair: Pair) -> int | None:
    zero = _is_zero(pair[0]), _is_zero(pair[1])
    if all(zero):
        return None
    if any(zero):
        data: Buffer = await (two if zero[0] else one).pread(offset, length)
        at = _first_difference(data, ZEROES[:length])
    else:
        at = _first_difference(*await asyncio.gather(one.pread(offset, length), two.pread(offset, length)))
    return None if at is None else offset + at


def _first_difference(one: Buffer, two: Buffer) -> int | None:
    """The offset of the first 512 bytes that differ."""
    one, two = bytes(one), bytes(two)
    if one == two:
        return None
    low, high = 0, -(-len(one) // _SECTOR)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low * _SECTOR:middle * _SECTOR] != two[low * _SECTOR:middle * _SECTOR]:
            high = middle
        else:
            low = middle
    return low * _SECTOR


async def _next(waiting: deque[tuple[int, int, asyncio.Task[int | None]]], progress: Progress,
                total: int) -> int | None:
    offset, length, task = waiting[0]
    found = await task
    waiting.popleft()
    if found is None:
        progress(offset + length, total)
    return found


async def _first(waiting: deque[tuple[int, int, asyncio.Task[int | None]]], progress: Progress,
                 total: int) -> int | None:
    while waiting:
        if (found := await _next(waiting, progress, total)) is not None:
            return found
    return None
