"""For tests that are coroutines.

    @scenario
    async def test_something(tmp_path): ...
"""

from __future__ import annotations

import asyncio
import functools
import resource
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from blockstep.testing.pair import Side

P = ParamSpec("P")


def scenario(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A plain test function that runs ``test`` in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def limit_files(side: Side, size: int) -> None:
    """From now on no file of the process can be written beyond ``size`` bytes (EFBIG): a disk that fails there."""
    resource.prlimit(side.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
