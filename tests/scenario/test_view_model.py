"""Random traces over real standbys, held against the model after each step: one request at a time, any may fail.

After each step every view and every secondary disk is read whole. A request that fails may leave old or new bytes in
its range of the disk that it was meant for, and nothing else: a write of the primary that fails, in any layer, never
shows in the view; a checkpoint that fails moves no view of any disk.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.block.driver import FUA, MAY_UNMAP
from blockstep.drivers.replication import Stage
from blockstep.errors import ReplicationError
from blockstep.testing.model import Content
from tests.scenario.standby import KINDS, LENGTH, Disk, Kind, Rig, Shape, error_of

REQUESTS = ("write", "write_zeroes", "discard", "flush")


@dataclass(frozen=True)
class Fault:
    """What fails in the step: the first ``event`` of the disk's node (``always``: all of them)."""

    node: str
    event: str
    always: bool = False


@dataclass(frozen=True)
class Step:
    """One step: ``who`` does ``what`` to a range of one disk; the registry's operations have neither."""

    what: str
    who: str = "registry"
    disk: int = 0
    offset: int = 0
    length: int = 1
    flags: int = 0
    fault: Fault | None = None


_edges = st.sampled_from((0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 16384, LENGTH - 778, LENGTH - 1))
_offsets = st.one_of(_edges, st.integers(0, LENGTH - 1))
_lengths = st.one_of(st.sampled_from((1, 2, 512, 4095, 4096, 4097, 8192, LENGTH)), st.integers(1, 6000))
_faults = st.one_of(st.none(), st.none(), st.builds(
    Fault, st.sampled_from(("secondary", "hidden", "active")),
    st.sampled_from(("read", "write", "write-done", "write_zeroes", "discard", "make_empty", "block_status")),
    st.booleans()))
_requests = st.builds(Step, st.sampled_from(REQUESTS), st.sampled_from(("primary", "primary", "view")),
                      st.integers(0, 2), _offsets, _lengths, st.sampled_from((0, 0, FUA, MAY_UNMAP)), _faults)
_checkpoints = st.builds(Step, st.just("checkpoint"), fault=_faults, disk=st.integers(0, 2))
_ends = st.builds(Step, st.sampled_from(("stop", "failover", "failover", "latest")), fault=_faults,
                  disk=st.integers(0, 2))
_traces = st.tuples(st.lists(st.one_of(_requests, _requests, _requests, _checkpoints), max_size=25), _ends,
                    st.lists(_requests, max_size=8)).map(lambda parts: [*parts[0], parts[1], *parts[2]])
_clusters = st.sampled_from((512, 4096, 65536))


class Trace:
    """A rig and its model, step by step."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.model = rig.model()
        self.number = 0

    async def run(self, steps: list[Step]) -> None:
        await self.rig.registry.start_all("secondary")
        await self.check()
        for step in steps:
            disk = self.rig.disks[step.disk % len(self.rig.disks)]
            if step.fault:
                self.rig.gates.fail(f"{disk.name}-{step.fault.node}", step.fault.event, always=step.fault.always)
            if step.who == "registry":
                await self.operate(step)
            else:
                await self.request(step, disk)
            self.rig.gates.heal()
            await self.check()
        await self.rig.close()

    async def operate(self, step: Step) -> None:
        """An operation over all disks."""
        registry = self.rig.registry
        if step.what in ("checkpoint", "latest"):
            error = await error_of(registry.checkpoint_all())
            assert error is None or (step.fault and isinstance(error, ReplicationError))
            if error is None:
                self.model.checkpoint()
        if step.what == "stop":
            await registry.stop_all(False)
            self.model.stop()
        elif step.what in ("failover", "latest"):
            await registry.stop_all(True)
            self.model_failed_over(await self.rig.merged())

    def model_failed_over(self, errors: list[Exception | None]) -> None:
        """Disks whose merge failed keep their view; their secondary disk holds a part of it."""
        disks = dict(self.model.disks)
        self.model.fail_over()
        for disk in self.rig.disks:
            if disk.filter.stage is Stage.FAILOVER_FAILED:
                assert any(errors)
                disks[disk.name].secondary = Content(disk.secondary.data)
            else:
                assert disk.filter.stage is Stage.DONE

    async def request(self, step: Step, disk: Disk) -> None:
        """One request of the primary, or of the standby's guest."""
        modelled, rig = self.model.disks[disk.name], self.rig
        length = min(step.length, LENGTH - step.offset)
        self.number = self.number % 255 + 1
        data = bytes([self.number]) * length if step.what == "write" else bytes(length)
        user, content = (disk.primary, modelled.secondary) if step.who == "primary" else (disk.view, modelled.view)
        operation = {"write": lambda: user.pwrite(step.offset, data, step.flags & FUA),
                     "write_zeroes": lambda: user.write_zeroes(step.offset, length, step.flags),
                     "discard": lambda: user.discard(step.offset, length), "flush": user.flush}[step.what]
        error = await error_of(operation())
        promoted = disk.filter.failed_over and step.who == "primary" and step.what != "flush"
        if promoted:
            assert isinstance(error, OSError)
            assert error.errno == errno.ESHUTDOWN
        elif step.what != "flush":
            assert error is None or step.fault
            certain = error is None and step.what != "discard"
            (content.write if certain else content.may_write)(step.offset, data)
            if disk.filter.stage is Stage.FAILOVER_FAILED:
                modelled.secondary = Content(rig.graph.find(f"{disk.name}-secondary").data)  # type: ignore[attr-defined]

    async def check(self) -> None:
        """All views, and all secondary disks, are what the model says."""
        for disk in self.rig.disks:
            modelled = self.model.disks[disk.name]
            view = await disk.read_view()
            assert not (wrong := modelled.view.differs(view)), f"view of {disk.name}: {wrong}"
            modelled.view.adopt(view)
            assert not (wrong := modelled.secondary.differs(disk.secondary.data)), f"secondary {disk.name}: {wrong}"
            modelled.secondary.adopt(disk.secondary.data)


def run(names: str, shape: Shape, steps: list[Step]) -> None:
    async def main() -> None:
        await Trace(await Rig.open(tuple(names), shape)).run(steps)

    asyncio.run(main())


def step(what: str, who: str = "registry", offset: int = 0, length: int = 1, disk: int = 0,
         fault: Fault | None = None) -> Step:
    """A step of the examples below."""
    return Step(what, who, disk, offset, length, 0, fault)


@given(steps=_traces, active=_clusters, hidden=_clusters, names=st.sampled_from(("a", "ab", "abc")),
       owned=st.booleans(), kind=st.sampled_from(KINDS))
def test_any_trace_over_buffers_in_memory(steps: list[Step], active: int, hidden: int, names: str,
                                          owned: bool, kind: Kind) -> None:
    run(names, Shape(active, hidden, owned=owned, kind=kind), steps)


@given(steps=_traces, active=_clusters, hidden=_clusters, names=st.sampled_from(("a", "ab")), owned=st.booleans(),
       kind=st.sampled_from(KINDS))
@settings(max_examples=max(20, settings.default.max_examples // 5))
def test_any_trace_over_buffers_in_files(steps: list[Step], active: int, hidden: int, names: str,
                                         owned: bool, kind: Kind) -> None:
    with TemporaryDirectory() as directory:
        run(names, Shape(active, hidden, Path(directory), owned, kind), steps)
