"""Commit: merge what lies above a base into it, and let the base take the place of the top.

    guest ─► top ─► mid ─► base          guest ─► base
              copied: what top and mid hold       top and mid go, if nobody holds them by name

While it runs, what is written into the base is hidden by the layers above it: the guest sees no change, so the job
asks only for write-unchanged. Whoever uses the base past those layers does see changes: such a user must share
write, or the job does not start.

An *active* commit (the top is in use by a guest) follows the guest's writes as a mirror does and becomes ready; at
`complete`, or by itself with ``auto_complete``, it pivots. An intermediate one (the top is only a backing node) has
nothing to follow and pivots when it is done.

Cancelled or failed: the guest goes on with the top, as before; the base holds a part of the merge. A crash in the
middle leaves the same: base, mid and top together are whole, the base alone is torn. Durable: at the pivot
everything merged has been flushed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import ClassVar, Unpack

from blockstep.block.driver import Driver
from blockstep.block.graph import Change, Graph
from blockstep.block.io import Backend
from blockstep.block.node import Child
from blockstep.block.permissions import READ, WRITE, WRITE_UNCHANGED, Role
from blockstep.errors import OptionError, PermissionConflict
from blockstep.jobs.block_copy import BlockCopy
from blockstep.jobs.job import JobOptions
from blockstep.jobs.states import JobKind, OnError
from blockstep.jobs.sync import CopyMode, SyncJob
from blockstep.units import KiB


class CommitJob(SyncJob):
    """See the module."""

    kind: ClassVar[JobKind] = "commit"
    target_permissions = (READ | WRITE_UNCHANGED, READ | WRITE_UNCHANGED)

    def __init__(
        self, id: str, graph: Graph, top: Driver, base: Driver, *, active: bool | None = None,
        auto_complete: bool = False, pivot: bool | Callable[[Change], None] = True, replace_in: Child | None = None,
        internal: bool = False, copy_mode: CopyMode = "background", granularity: int = 64 * KiB,
        on_source_error: OnError | str = OnError.REPORT, on_target_error: OnError | str = OnError.REPORT,
        filter_node_name: str | None = None, workers: int = 4, **options: Unpack[JobOptions],
    ) -> None:
        """``active``: None: unless the top is the backing node of something. ``pivot``: False: leave the graph as it
        is; a function: makes further changes in the same step, with no request in flight. ``replace_in``: the only
        edge that moves to the base (None: all edges to the top). ``internal``: blockers on the nodes do not apply.

        Raises OptionError.
        """
        super().__init__(id, graph, top, base, copy_mode=copy_mode, granularity=granularity,
                         auto_complete=auto_complete, internal=internal, on_source_error=on_source_error,
                         on_target_error=on_target_error, workers=workers, pivot=pivot, replace_in=replace_in,
                         filter_node_name=filter_node_name, **options)
        if active is None:
            active = not any(edge.role is Role.BACKING for edge in top.parents)
        self.has_ready = active
        self._chain = chain(top, base)
        #: Where block status stops: the base, or the first of the filters over it.
        self._below = [node for node in self._chain if not node.is_filter][-1].children["backing"].node

    @property
    def top(self) -> Driver:
        """Where what is merged comes from."""
        return self.source

    @property
    def base(self) -> Driver:
        """What it is merged into."""
        return self.target

    def check(self) -> None:
        for edge in self.base.parents:
            if edge.parent not in self._chain and not edge.shared & WRITE:
                raise PermissionConflict(self.base.name, f"job '{self.id}'", edge.parent.description, str(WRITE))

    def uses(self) -> list[Driver]:
        return [*self._chain, self.base]

    async def take_more(self, undo: AsyncExitStack) -> None:
        locked = [node for node in self.base.stored_in() if node.read_only]
        if locked:
            await self.graph.reopen([(node, {"read-only": False}) for node in locked])
            undo.push_async_callback(self._lock_again, locked)

    async def _lock_again(self, nodes: list[Driver]) -> None:
        if self.failed or not self.has_ready or not self.pivot or self._soft_cancelled or not self._is_set_up:
            await self.graph.reopen([(node, {"read-only": True}) for node in nodes if node in self._still_open()])

    def _still_open(self) -> list[Driver]:
        return list(self.graph.nodes.values())

    def make_engine(self, source: Backend, target: Backend) -> BlockCopy:
        return BlockCopy(source.edge, target.edge, (source, target), self._control, granularity=self.granularity,
                         workers=self._workers, base=self._below, allocated_only=True, lock=self._lock)

    async def fill(self) -> None:
        if self.base.length < self.top.length:
            # Zeroes come where the layers above read zeroes already: as little a change as the writes that follow.
            async with self.graph.drained(self.base):
                await self._backends[1].edge.resize(self.top.length)
        await self.fill_allocated(self._below)


def chain(top: Driver, base: Driver) -> list[Driver]:
    """The nodes from ``top`` down to, but not including, ``base``. Raises OptionError if base is not a backing node."""
    nodes: list[Driver] = []
    for node in top.chain():
        if node is base:
            break
        nodes.append(node)
    else:
        raise OptionError("base", base.name, f"a backing node of '{top.name}'")
    if all(node.is_filter for node in nodes):
        raise OptionError("base", base.name, f"another node than the top '{top.name}'")
    return nodes
