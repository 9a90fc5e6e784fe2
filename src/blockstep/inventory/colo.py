"""Replication as one thing: the operations over all filters of a process, and the account of them.

`blockstep.replication.registry` does the work and knows the filters as they are now. What it forgets is kept here,
because managers ask for it: what this process was last and why it is that no more (QEMU's ``query-colo-status``), how
many checkpoints there were, and whether a promotion has ended. Filters may be gone when they ask: the guide for COLO
removes the filter of a primary before it says that the standby is lost.

    mode        none ──start──► primary | secondary ──stop, fail_over, lost_heartbeat──► none
    last_mode   what it was before; COLO_EXIT tells
    reason      none: never ended; request: a command ended it; processing: a promotion is being merged;
                error: that failed

Events for managers: REPLICATION_STATE when `Colo.how` has changed by an operation or an error, REPLICATION_CHECKPOINT,
REPLICATION_FAILOVER (begun, done, failed), REPLICATION_IO_ERROR (a request failed of which no guest is told: the
standby is not complete any more), COLO_EXIT.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from blockstep.block.driver import Driver
from blockstep.drivers.replication import DiskBuffer, Mode, Replication, Stage
from blockstep.errors import BlockstepError
from blockstep.replication.registry import ReplicationRegistry

Role = Literal["none", "primary", "secondary"]
Reason = Literal["none", "request", "error", "processing"]
Health = Literal["healthy", "degraded", "at-risk"]
Report = Callable[[str, Mapping[str, Any]], None]


class How(NamedTuple):
    """How replication is here, in the words of a pair's status. ``reason``: why it is not healthy; else empty."""

    role: Literal["primary", "standby", "promoted"]
    state: str
    health: Health
    reason: str


class Colo:
    """See the module. ``name``, which events carry, is that of the process; ``faults`` are those of nodes' files."""

    def __init__(self, registry: ReplicationRegistry, report: Report, faults: Callable[[], Mapping[str, str]],
                 name: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry
        self.name = name
        self.mode: Role = "none"
        self.last_mode: Role = "none"
        #: Checkpoints since the start, the one that a start takes included; the age and the length of the last.
        self.epoch = 0
        self.pause = 0.0
        self._committed_at = 0.0
        self._report = report
        self._faults = faults
        self._clock = clock
        self._reason: Reason = "none"
        self._merging: asyncio.Task[None] | None = None
        self._told: How | None = None

    @property
    def reason(self) -> Reason:
        """Why replication has ended, see the module."""
        return "processing" if self._merging is not None else self._reason

    @property
    def age(self) -> float:
        """Seconds since the last checkpoint."""
        return self._clock() - self._committed_at

    async def start(self, mode: Mode) -> None:
        """Start all filters, or none: see `ReplicationRegistry.start_all`. A secondary's start is a checkpoint."""
        began = self._clock()
        await self.registry.start_all(mode)
        running = [filter for filter in self.registry.filters if filter.stage is Stage.RUNNING]
        for filter in running:
            filter.on_error = lambda error, disk=filter.name: self._failed(disk, error)  # type: ignore[misc]
        if running:
            self.mode, self.epoch = mode, 0
            if mode == "secondary":
                self._committed(began)
            self.tell_state()

    async def checkpoint(self) -> None:
        """A checkpoint of all filters, or of none: see `ReplicationRegistry.checkpoint_all`."""
        began = self._clock()
        await self.registry.checkpoint_all()
        if self.mode != "none":
            self._committed(began)

    async def stop(self) -> None:
        """End replication: a standby's views are what the primary wrote. See `ReplicationRegistry.stop_all`."""
        await self.registry.stop_all(failover=False)
        self._exit()

    async def fail_over(self) -> None:
        """End replication: a standby's views live on from the checkpoint. Their merging goes on in the background.

        May be repeated after a failure: it goes on with what is left.
        """
        left = [filter for filter in self.registry.filters
                if filter.mode == "secondary" and filter.stage in (Stage.RUNNING, Stage.FAILOVER_FAILED)]
        merging = [(filter, filter.buffer) for filter in left]
        if left:
            self._tell_failover("begun")
        try:
            if any(filter.stage is Stage.FAILOVER_FAILED for filter in left):
                await self.registry.finish_all(failover=True)
            else:
                await self.registry.stop_all(failover=True)
        except BlockstepError as error:
            if left:
                self._tell_failover("failed", str(error))
            raise
        if left:
            self._merging = asyncio.get_running_loop().create_task(self._wait_merged(merging))
        self._exit()

    async def lost_heartbeat(self) -> None:
        """The other end is gone: live on alone. Raises BlockstepError if this process does not replicate."""
        if self.mode == "none":
            raise BlockstepError("replication is not running here: there is no other end to be lost")
        if any(filter.stage is not Stage.DONE for filter in self.registry.filters):
            await self.fail_over()
        else:
            self._exit()

    async def close(self) -> None:
        """Forget the promotion that is being merged; the end of the process."""
        if self._merging is not None:
            self._merging.cancel()
            await asyncio.wait([self._merging])
            self._merging = None

    def fault(self, filter: Replication) -> str:
        """What others have done to the files of a filter's disk, the local one of a primary included; else empty."""
        tops = [edge.parent for edge in filter.parents if isinstance(edge.parent, Driver)] or [filter]
        names = {node.name for top in tops for node in top.below()}
        return "; ".join(fault for name, fault in self._faults().items() if name in names)

    def faults(self) -> list[str]:
        """Those of all filters' disks, one text a disk that has any."""
        return [f"disk '{filter.name}': {fault}" for filter in self.registry.filters if (fault := self.fault(filter))]

    def how(self) -> How:
        """See `How`. There is at least one filter. A promoted standby that has a standby of its own is a primary."""
        how, faults = self._how(), self.faults()
        return how._replace(health="at-risk", reason="; ".join(filter(None, [*faults, how.reason]))) if faults else how

    def _how(self) -> How:
        filters = self.registry.filters
        primary = [filter for filter in filters if filter.mode == "primary"]
        stages = {filter.stage for filter in primary or filters}
        failed = [f"'{filter.name}': {filter.error}" for filter in primary or filters if filter.error]
        if primary:
            if Stage.NONE in stages:
                return How("primary", "waiting", "at-risk", "replication has not been started")
            if stages != {Stage.RUNNING}:
                return How("primary", "stopped", "at-risk", "replication was stopped")
            return How("primary", *(("offline", "at-risk", failed[0]) if failed else ("replicating", "healthy", "")))
        if Stage.FAILOVER_FAILED in stages:
            return How("promoted", "failover-failed", "at-risk", failed[0] if failed else "a merge has failed")
        if Stage.FAILOVER in stages:
            return How("promoted", "failover", "degraded", "it has no standby of its own")
        if stages == {Stage.DONE}:
            promoted = any(filter.failed_over for filter in filters)
            return How("promoted" if promoted else "standby", "promoted" if promoted else "stopped", "degraded",
                       "it has no standby of its own")
        if stages == {Stage.RUNNING}:
            return How("standby", "replicating", "degraded" if failed else "healthy", failed[0] if failed else "")
        return How("standby", "waiting", "at-risk", "there is no checkpoint yet")

    def tell_state(self) -> None:
        """Announce how it is, if that is news."""
        if not self.registry.filters:
            return
        how = self.how()
        if how != self._told:
            self._told = how
            self._report("REPLICATION_STATE", {"pair": self.name, **how._asdict(), "epoch": self.epoch})

    def _failed(self, disk: str, error: OSError) -> None:
        self._report("REPLICATION_IO_ERROR", {"pair": self.name, "disk": disk, "reason": str(error)})
        self.tell_state()

    def _exit(self) -> None:
        self.tell_state()
        if self.mode != "none":
            self.last_mode, self.mode, self._reason = self.mode, "none", "request"
            self._report("COLO_EXIT", {"mode": self.last_mode, "reason": "request"})

    def _committed(self, began: float) -> None:
        self._committed_at = self._clock()
        self.epoch += 1
        self.pause = self._committed_at - began
        self._report("REPLICATION_CHECKPOINT", {"pair": self.name, "epoch": self.epoch, "pause": self.pause})

    async def _wait_merged(self, merging: list[tuple[Replication, DiskBuffer | None]]) -> None:
        for _, buffer in merging:
            if buffer is not None:
                await buffer.merged()
        self._merging = None
        self.tell_state()
        failed = [filter for filter, _ in merging if filter.stage is Stage.FAILOVER_FAILED]
        if failed:
            self._reason = "error"
            self._tell_failover("failed", "; ".join(f"'{filter.name}': {filter.error}" for filter in failed))
        else:
            self._reason = "request"
            self._tell_failover("done")

    def _tell_failover(self, stage: Literal["begun", "done", "failed"], reason: str = "") -> None:
        self._report("REPLICATION_FAILOVER", {"pair": self.name, "stage": stage, "to": "checkpoint",
                                              "epoch": self.epoch, "reason": reason})

