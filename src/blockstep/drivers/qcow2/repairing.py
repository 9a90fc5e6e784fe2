"""Repair of an image that is dirty when it is opened for writing: its last writer postponed refcounts, and was killed.

QEMU does so where an image has lazy refcounts; its dirty bit says that refcounts may be too low, so that a cluster in
use could be given out again. They are counted anew, by `repair`, in a thread that has the event loop read and write
for it. Killed in the middle, the image is still dirty: the next one who opens it goes on.

Repairs take turns, because of the memory that each may take, and in a thread of their own: those of the pool are what
their requests wait for.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from blockstep.aio.endings import wait_out
from blockstep.block.node import Child
from blockstep.drivers.qcow2.check_tables import CheckResult
from blockstep.drivers.qcow2.repair import repair

T = TypeVar("T")

_repairs: Final = ThreadPoolExecutor(1, "blockstep-repair")


async def repair_file(file: Child) -> CheckResult:
    """Make the image in ``file`` consistent, as ``img check --repair all`` does. Durable at return.

    Memory is bounded as that of a check is. Raises ImageError and OSError as `repair.repair` does; then, and when it is
    cancelled, the image is still dirty.
    """
    loop = asyncio.get_running_loop()
    given_up = False

    def ask(request: Coroutine[Any, Any, T]) -> T:
        if given_up:
            request.close()
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        return asyncio.run_coroutine_threadsafe(request, loop).result()

    async def pread(offset: int, length: int) -> bytes:
        return bytes(await file.pread(offset, length))

    async def pwrite(offset: int, data: bytes) -> None:
        if offset + len(data) > file.node.length:
            await file.resize(offset + len(data))
        await file.pwrite(offset, data)

    async def flush() -> None:
        await file.flush()

    turn = _repairs.submit(
        repair, lambda offset, length: ask(pread(offset, length)), file.node.length,
        lambda offset, data: ask(pwrite(offset, data)), lambda: ask(flush()), "all")
    work = asyncio.wrap_future(turn)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        given_up = True
        if not turn.cancel():  # it is at work
            await wait_out(work)
            work.exception()
        raise
