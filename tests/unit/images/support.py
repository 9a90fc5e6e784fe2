"""Images of a test: raw files with what is said, as users of a graph."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

from blockstep.block.io import Backend
from blockstep.images.opened import ImageName, opened

T = TypeVar("T")


def raw(path: Path, length: int, content: dict[int, bytes] | None = None) -> Path:
    """A sparse file with ``content`` (offset -> bytes)."""
    with path.open("wb") as file:
        file.truncate(length)
        for offset, data in (content or {}).items():
            file.seek(offset)
            file.write(data)
    return path


def with_images(work: Callable[..., Awaitable[T]], *paths: Path, kind: str = "raw") -> T:
    """``await work(backend, ...)`` with the files opened."""
    async def main() -> T:
        async with AsyncExitStack() as stack:
            backends: list[Backend] = [await stack.enter_async_context(opened(ImageName(str(path), kind)))
                                       for path in paths]
            return await work(*backends)

    return asyncio.run(main())
