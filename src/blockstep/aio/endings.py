"""Waiting for an end that has to come, though the task that waits is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from blockstep.errors import noting

T = TypeVar("T")


async def wait_out(future: asyncio.Future[Any]) -> None:
    """Until the future is done, however often the task is cancelled meanwhile: for one that has been cancelled."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            pass


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, which must not be left half done: a task that is cancelled here is so once the work has ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError as error:
        await wait_out(task)
        with noting(error):
            task.result()
        raise
