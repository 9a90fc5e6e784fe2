"""Write what an image holds into its backing image, and empty it."""

from __future__ import annotations

import os
from typing import Any

from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.status import backing_of
from blockstep.errors import BlockstepError, OptionError
from blockstep.images.compare import Progress, no_progress
from blockstep.images.opened import ImageName, opened
from blockstep.inventory.filenames import filename_of
from blockstep.jobs.commit import CommitJob


class _Commit(CommitJob):
    """Tells how far it is."""

    progress: Progress = staticmethod(no_progress)

    def copied(self, count: int) -> None:
        super().copied(count)
        self.progress(self.current, self.total)


async def commit(image: ImageName, base: str | None = None, keep: bool = False, rate: int = 0,
                 progress: Progress = no_progress) -> None:
    """Merge ``image``, and what is between, into its backing image or the one called ``base``.

    Afterwards the image is emptied, unless ``keep`` or a ``base`` was given. Everything merged is durable before it is.
    Interrupted: the image with its chain still reads as before. Raises OptionError and OSError.
    """
    graph = Graph()
    async with opened(image, graph=graph, writable=True) as top:
        below = _find(top.node, base)
        job = _Commit("commit", graph, top.node, below, active=True, auto_complete=True, pivot=False, speed=rate)
        job.progress = progress
        await job.launch()
        try:
            error = await job.wait()
        except BaseException:
            job.end(force=True)
            await job.wait()
            raise
        if error is not None:
            raise error
        progress(1, 1)
        if not keep and base is None and top.node.can_be_emptied:
            await top.node.make_empty()


def _find(top: Driver, name: str | None) -> Driver:
    """The backing image of that file name; None: the first one."""
    node = backing_of(top)
    if node is None:
        raise BlockstepError("Image does not have a backing file")
    found: list[Any] = []
    while node is not None:
        found.append(filename_of(node))
        if name is None or _same(found[-1], name):
            return node
        node = backing_of(node)
    raise OptionError("-b", name, "a backing image: " + ", ".join(found))


def _same(one: str, two: str) -> bool:
    return one == two or os.path.realpath(one) == os.path.realpath(two)
