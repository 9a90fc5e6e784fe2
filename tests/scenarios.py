"""For tests that are coroutines, and of what runs out.

    @scenario
    async def test_something(tmp_path): ...
"""

from __future__ import annotations

import asyncio
import functools
import resource
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import pytest

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


@contextmanager
def small_file_system(directory: Path, size: int) -> Iterator[Path]:
    """A file system in memory that is soon full; skips where none can be mounted."""
    place = directory / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def make_room(place: Path) -> None:
    """Make such a file system large."""
    subprocess.run(["mount", "-o", "remount,size=256m", str(place)], check=True)
