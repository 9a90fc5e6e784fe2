"""All replication filters of a process, and the four operations over all of them.

Several disks of one guest share a point in time only because these operations are all-or-nothing: if one filter
fails, the others are put back (`start_all`) or stay where they were (`checkpoint_all`), and the error names the filter.
Operations that are called at the same time take turns. What made one of them right may have changed while it waited:
a ``check`` is called when its turn has come, and what it raises ends the operation before it has begun.

The registry is the graph itself: every open node whose driver is ``replication`` takes part.

    operation    none            running                  failover   failed    done
    start        go on           refused                  ignored    refused   ignored
    checkpoint   refused         go on                    ignored    refused   ignored         (primary: ignored)
    get_error    refused         remembered error         nothing    reported  after failover: nothing; else refused
    stop         refused         go on                    ignored    refused   ignored after a failover, else refused
    finish       ignored         go on                    ignored    go on     ignored

(*finish* is no operation of QEMU's: it goes on with a stop of which a part failed.)
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping

from blockstep.block.driver import Prepared
from blockstep.block.graph import Graph
from blockstep.drivers.replication import DiskBuffer, Mode, Replication, Stage
from blockstep.errors import BlockstepError, ReplicationError, noting
from blockstep.jobs.registry import JobRegistry
from blockstep.replication.hidden_disk import HiddenDiskBuffer
from blockstep.replication.resize import disks_of, resize_together

Check = Callable[[], None]


def _always() -> None:
    """The check of an operation that is right at any time."""


class ReplicationRegistry:
    """The four operations, over all filters of ``graph``."""

    def __init__(self, graph: Graph, jobs: JobRegistry) -> None:
        self._graph = graph
        self._jobs = jobs
        # One operation at a time: a failover that came between the halves of a checkpoint would merge disks that
        # are emptied under it.
        self._turn = asyncio.Lock()

    @property
    def filters(self) -> list[Replication]:
        """All replication filters, in the order in which they were opened."""
        return [node for node in self._graph.nodes.values() if isinstance(node, Replication)]

    async def quiet(self) -> None:
        """Wait until what was asked for before has ended."""
        async with self._turn:
            pass

    async def start_all(self, mode: Mode, check: Check = _always) -> None:
        """Start every filter; promoted ones are left alone. A secondary's start is its first checkpoint.

        Raises ReplicationError; then none has started.
        """
        async with self._turn:
            check()
            await self._start_all(mode)

    async def _start_all(self, mode: Mode) -> None:
        filters = [filter for filter in self.filters if filter.stage not in (Stage.DONE, Stage.FAILOVER)]
        buffers: dict[Replication, HiddenDiskBuffer] = {}
        try:
            for filter in filters:
                if filter.stage is not Stage.NONE:
                    raise ReplicationError(filter.name, "start",
                                           f"it has been started already (stage {filter.stage.value})")
                if mode != filter.mode:
                    raise ReplicationError(filter.name, "start", f"its mode is {filter.mode}, not {mode}")
                if mode == "secondary":
                    buffers[filter] = await HiddenDiskBuffer.open(self._graph, self._jobs, filter)
            await self._move(buffers)
        except BaseException as error:
            for buffer in reversed(buffers.values()):
                with noting(error):
                    await buffer.undo()
            raise
        for filter in filters:
            filter.buffer, filter.error = buffers.get(filter), None
            filter.enter(Stage.RUNNING)

    async def give_up_all(self, check: Check = _always) -> None:
        """Give the checkpoint up, and what the standby itself wrote: all running secondaries are as before their start.

        The views refuse all requests until they are started again; what they have in flight is waited for. Nobody but
        them uses the disks now. Raises what the first buffer failed with that could not be emptied: the next start, at
        the latest, empties it; none of the secondaries runs then either.
        """
        async with self._turn:  # a start in the middle would have its buffers emptied under it
            check()
            await self._give_up_all()

    async def _give_up_all(self) -> None:
        failed: list[BlockstepError | OSError] = []
        for filter in self.filters:
            if filter.stage is Stage.RUNNING and filter.buffer is not None:
                buffer, filter.buffer = filter.buffer, None
                filter.enter(Stage.NONE)
                try:
                    await buffer.give_up()
                except (BlockstepError, OSError) as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    async def give_back_all(self) -> None:
        """Let buffers that are images give back the room of what they held before they were emptied."""
        async with self._turn:  # beside none of the operations that take requests to have ended
            for filter in self.filters:
                if filter.stage is Stage.RUNNING and filter.buffer is not None:
                    await filter.buffer.give_back()

    async def checkpoint_all(self, check: Check = _always) -> None:
        """Move the view of all secondaries to what the primary wrote, together.

        Waits until what is in flight has ended and holds back what comes meanwhile. Raises ReplicationError;
        then every view is still at the old checkpoint. Nothing is durable until the secondary disks are flushed.
        """
        async with self._turn:
            check()
            await self._checkpoint_all()

    async def _checkpoint_all(self) -> None:
        buffers: dict[Replication, DiskBuffer] = {}
        for filter in self.filters:
            if filter.mode == "secondary" and filter.stage in (Stage.NONE, Stage.FAILOVER_FAILED):
                raise ReplicationError(filter.name, "checkpoint", f"it is not running (stage {filter.stage.value})")
            if filter.stage is Stage.RUNNING and filter.buffer is not None:
                buffers[filter] = filter.buffer
        await self._move(buffers)

    async def _move(self, buffers: Mapping[Replication, DiskBuffer]) -> None:
        """All or none, and all at the same moment: nothing is in flight then above any of them."""
        disks = [node for filter, buffer in buffers.items() for node in (filter, buffer.secondary)]
        async with self._graph.drained(*disks):
            prepared: list[Prepared] = []
            try:
                for buffer in buffers.values():
                    ready = await buffer.prepare_checkpoint()
                    prepared.append(ready)
            except BaseException:
                for one in prepared:
                    one.abort()
                raise
            for one in prepared:
                one.commit()

    def get_error_all(self) -> None:
        """Returns if all is well; raises ReplicationError for the first filter that is not, and says why."""
        for filter in self.filters:
            if filter.stage is Stage.NONE or (filter.stage is Stage.DONE and not filter.failed_over):
                raise ReplicationError(filter.name, "get error", f"it is not running (stage {filter.stage.value})")
            if filter.error and filter.stage in (Stage.RUNNING, Stage.FAILOVER_FAILED):
                raise ReplicationError(filter.name, "I/O", str(filter.error)) from filter.error

    async def stop_all(self, failover: bool) -> None:
        """Stop every filter. With ``failover`` the views live on from the checkpoint, else from the primary's data.

        A failover returns when the views can be used and their merging has begun; from then on writers other than
        the view are refused. Raises ReplicationError: before anything was stopped if a filter is not running; or
        when all others are stopped, for the first that could not be: see `finish_all`.
        """
        async with self._turn:
            running: list[Replication] = []
            for filter in self.filters:
                if filter.stage is Stage.RUNNING:
                    running.append(filter)
                elif filter.stage is Stage.FAILOVER_FAILED or not filter.failed_over:
                    raise ReplicationError(filter.name, "stop", f"it is not running (stage {filter.stage.value})")
            await self._stop_each(running, failover)

    async def finish_all(self, failover: bool) -> None:
        """Go on with a `stop_all` of which a part failed: with the filters that run still, and with failed merges.

        Filters that are stopped, or whose merge runs, are left alone; so it may be repeated. Raises ReplicationError as
        `stop_all`.
        """
        async with self._turn:
            left = [filter for filter in self.filters if filter.stage in (Stage.RUNNING, Stage.FAILOVER_FAILED)]
            for filter in left:
                filter.error = None
            await self._stop_each(left, failover)

    async def _stop_each(self, filters: list[Replication], failover: bool) -> None:
        """One that fails is no reason to leave the next one as it is: the more of them are stopped the better."""
        failed: list[ReplicationError] = []
        for filter in filters:
            try:
                await self._stop(filter, failover)
            except (BlockstepError, OSError) as error:
                filter.fail(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))
                failed.append(error if isinstance(error, ReplicationError) else
                              ReplicationError(filter.name, "stop", str(error)))
        if failed:
            raise failed[0]

    async def resize(self, filter: Replication, length: int, check: Check = _always) -> None:
        """Give active, hidden and secondary disk of a filter another length, all or none; so its view has it at once.

        What is new reads as zeroes. Goes past the blockers on the top node, which are there so that nobody else
        does. Raises ReplicationError in a stage in which the disks are being merged or have been; OSError of a
        disk that cannot get the length; then nothing changed, except where the error says so (`unevenness`).
        """
        async with self._turn:
            check()
            if filter.mode != "secondary" or filter.stage not in (Stage.NONE, Stage.RUNNING):
                raise ReplicationError(filter.name, "resize", f"not in mode {filter.mode}, stage {filter.stage.value}")
            disks = disks_of(filter)
            async with self._graph.drained(filter, disks[-1]):
                await resize_together(disks if length > min(disk.length for disk in disks) else disks[::-1], length)

    # --- one filter ---

    async def _stop(self, filter: Replication, failover: bool) -> None:
        buffer = filter.buffer
        if buffer is None:  # primary mode
            filter.enter(Stage.DONE)
            filter.error = None
        elif failover or filter.stage is Stage.FAILOVER_FAILED:
            filter.failed_over = True
            await buffer.fail_over()
        else:
            await buffer.drop()
