"""Driver ``throttle``: a filter that holds requests back so that they keep to limits.

Limits are on operations and on bytes per second; each of them for all requests, for reads, or for writes (zeroes
and discards count as writes; flush and block status pass). Every limit is a leaky bucket:

       request of n units                 level: what was asked for and has not leaked yet
             │ pours n                    capacity: how much may be asked for at once (a burst)
             ▼
        ┌─────────┐ capacity              While the level is above the capacity, the next request waits until
        │░░░░░░░░░│ level                 the surplus has leaked; then it goes, whatever its size. So one huge
        └────╥────┘                       request is not stuck, it only makes the next one wait longer.
             ▼ leaks ``rate`` units a second

Without a burst limit the capacity is a tenth of a second's worth. ``X-max`` allows ``X-max-length`` seconds (1) at
the rate of ``X-max``: that much fits into the bucket; with a length of more than 1, a second bucket holds requests
to ``X-max`` per second meanwhile.

Waiting requests (reads and writes apart, unless they share a limit) go in the order in which they came, over all
nodes of a *group*. A group is named by ``throttle-group`` and shared by all nodes of the graph that name it; its
limits are those of the object of that id, or of the node that names it first. Without a name a node is alone. A drain
lets everything pass at once, what waits and what comes, until it ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import msgspec

from blockstep.aio.clock import Clock, Timer
from blockstep.aio.inline import Completion
from blockstep.block.driver import Buffer, Filter, Prepared
from blockstep.block.node import Node, NodeOptions, NodeRef
from blockstep.block.permissions import Role
from blockstep.block.registry import register
from blockstep.errors import OptionError

READS: Final = 0
WRITES: Final = 1

#: Seconds' worth of a limit that pass at once when no burst is given.
_SLACK: Final = 0.1


class Limits(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Per second; 0: no limit. ``total`` excludes ``read`` and ``write`` of the same unit."""

    iops_total: int = 0
    iops_read: int = 0
    iops_write: int = 0
    bps_total: int = 0
    bps_read: int = 0
    bps_write: int = 0
    iops_total_max: int = 0
    iops_read_max: int = 0
    iops_write_max: int = 0
    bps_total_max: int = 0
    bps_read_max: int = 0
    bps_write_max: int = 0
    iops_total_max_length: int = 1
    iops_read_max_length: int = 1
    iops_write_max_length: int = 1
    bps_total_max_length: int = 1
    bps_read_max_length: int = 1
    bps_write_max_length: int = 1
    iops_size: int = 0  #: bytes from which on a request counts as several operations

    def check(self) -> None:
        """Raises OptionError for values that contradict each other."""
        if self.iops_size < 0:
            raise OptionError("limits.iops-size", self.iops_size, "0 or more")
        for unit in ("iops", "bps"):
            if getattr(self, f"{unit}_total") and (getattr(self, f"{unit}_read") or getattr(self, f"{unit}_write")):
                raise OptionError(f"limits.{unit}-total", getattr(self, f"{unit}_total"),
                                  f"0 when {unit}-read or {unit}-write is given")
            for what in ("total", "read", "write"):
                name = f"{unit}_{what}"
                rate, burst = getattr(self, name), getattr(self, f"{name}_max")
                option = f"limits.{name.replace('_', '-')}"
                for which, value in ((option, rate), (f"{option}-max", burst)):
                    if value < 0:
                        raise OptionError(which, value, "0 or more")
                if burst and burst < rate:
                    raise OptionError(f"{option}-max", burst, f"0, or at least {option}, {rate}")
                if burst and not rate:
                    raise OptionError(f"{option}-max", burst, f"0 without {option}")
                if getattr(self, f"{name}_max_length") < 1:
                    raise OptionError(f"{option}-max-length", getattr(self, f"{name}_max_length"), "1 or more seconds")


class _Bucket:
    """See the module. What is poured in is added to ``level`` by the group."""

    __slots__ = ("capacity", "level", "rate")

    def __init__(self, rate: float, capacity: float) -> None:
        self.rate, self.capacity, self.level = rate, capacity, 0.0

    def leak(self, seconds: float) -> None:
        self.level = max(0.0, self.level - self.rate * seconds)

    def delay(self) -> float:
        """Seconds until the next request may go."""
        return max(0.0, (self.level - self.capacity) / self.rate)


class _Lane:
    """A queue of requests that wait for the same buckets."""

    __slots__ = ("timer", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, int, Completion[None]]] = deque()  # (direction, length, its turn)
        self.timer: Timer | None = None


class ThrottleGroup:
    """Limits that one or several nodes keep together."""

    def __init__(self, name: str, limits: Limits, clock: Clock | None = None) -> None:
        self.name = name
        #: Who needs it: nodes, and the object if there is one.
        self.members = 0
        self._clock: Clock = clock or asyncio.get_running_loop()
        self._leaked_at = self._clock.time()
        self._lanes: tuple[_Lane, _Lane] = (_Lane(), _Lane())
        self._passing = 0
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Keep to other limits from now on; what waits is measured against them. Raises OptionError."""
        limits.check()
        self.limits = limits
        total = [*_buckets(limits, "iops", "total"), *_buckets(limits, "bps", "total")]
        each = [[*_buckets(limits, "iops", what), *_buckets(limits, "bps", what)] for what in ("read", "write")]
        #: (counts operations?, bucket) by direction
        self._buckets = ([*total, *each[READS]], [*total, *each[WRITES]])
        self._all = [bucket for _, bucket in (*total, *each[READS], *each[WRITES])]
        waiting = [entry for lane in self._distinct_lanes() for entry in lane.waiting]
        for lane in self._distinct_lanes():
            lane.waiting.clear()
            if lane.timer is not None:
                lane.timer.cancel()
        # With a limit on both together there is one queue, or the one kind could starve the other.
        reads = _Lane()
        self._lanes = (reads, reads if total else _Lane())
        for entry in waiting:
            self._lanes[entry[0]].waiting.append(entry)
        for lane in self._distinct_lanes():
            self._serve(lane)

    async def pass_through(self, direction: int, length: int) -> None:
        """Wait until a request of ``length`` bytes may go, and count it."""
        if self._passing or not self._buckets[direction]:
            return
        lane = self._lanes[direction]
        if not lane.waiting and not self._delay(direction):
            self._count(direction, length)
            return
        turn: Completion[None] = Completion()
        lane.waiting.append((direction, length, turn))
        self._arm(lane)
        await turn

    def waiting(self, direction: int) -> int:
        """How many requests wait."""
        return sum(entry[0] == direction for entry in self._lanes[direction].waiting)

    def expedite(self, on: bool) -> None:
        """Between True and False: everything passes. Calls nest."""
        self._passing += 1 if on else -1
        if on:
            for lane in self._lanes:
                while lane.waiting:
                    lane.waiting.popleft()[2].set_result(None)

    def _distinct_lanes(self) -> tuple[_Lane, ...]:
        return self._lanes if self._lanes[0] is not self._lanes[1] else self._lanes[:1]

    def _delay(self, direction: int) -> float:
        now = self._clock.time()
        for bucket in self._all:
            bucket.leak(now - self._leaked_at)
        self._leaked_at = now
        delay = max((bucket.delay() for _, bucket in self._buckets[direction]), default=0.0)
        return delay if delay > 1e-9 else 0.0  # less is rounding, and a timer of it would spin

    def _count(self, direction: int, length: int) -> None:
        size = self.limits.iops_size
        operations = max(1.0, length / size) if size else 1.0
        for counts_operations, bucket in self._buckets[direction]:
            bucket.level += operations if counts_operations else length

    def _serve(self, lane: _Lane) -> None:
        """Let go of those whose turn has come, and come back for the next."""
        lane.timer = None
        while lane.waiting and not self._delay(lane.waiting[0][0]):
            direction, length, turn = lane.waiting.popleft()
            self._count(direction, length)
            turn.set_result(None)
        self._arm(lane)

    def _arm(self, lane: _Lane) -> None:
        if lane.waiting and lane.timer is None:
            lane.timer = self._clock.call_later(self._delay(lane.waiting[0][0]), self._serve, lane)


class ThrottleOptions(NodeOptions, tag="throttle"):
    """``file``: the child. ``limits``, or ``throttle-group`` of a group that exists, or both to make a group."""

    file: NodeRef
    throttle_group: str | None = None
    limits: Limits | None = None


@register
class Throttle(Filter):
    """See the module."""

    driver: ClassVar[str] = "throttle"
    Options = ThrottleOptions
    options: ThrottleOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}

    group: ThrottleGroup

    async def open(self) -> None:
        self._expedited = 0
        self.group = join_group(self.options.throttle_group, self.options.limits, self)

    async def close(self) -> None:
        leave_group(self.group, self)

    async def prepare_reopen(self, options: Mapping[str, Any]) -> Prepared:
        rest = dict(options)
        name = rest.pop("throttle-group", self.options.throttle_group)
        limits = rest.pop("limits", self.options.limits)
        await super().prepare_reopen(rest)
        if name == self.options.throttle_group and limits == self.options.limits:
            return Prepared()
        group = join_group(name, limits, self)

        def commit() -> None:
            for _ in range(self._expedited):
                self.group.expedite(False)
                group.expedite(True)
            leave_group(self.group, self)
            self.group = group

        return Prepared(commit, lambda: leave_group(group, self))

    async def pread(self, offset: int, length: int) -> Buffer:
        await self.group.pass_through(READS, length)
        return await self.file.pread(offset, length)

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self.group.pass_through(WRITES, len(data))
        await self.file.pwrite(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.group.pass_through(WRITES, length)
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.group.pass_through(WRITES, length)
        await self.file.discard(offset, length)

    def expedite(self, on: bool) -> None:
        self._expedited += 1 if on else -1
        self.group.expedite(on)


def join_group(name: str | None, limits: Limits | None, node: Node) -> ThrottleGroup:
    """The group of that name, made with ``limits`` if there is none; without a name a group for ``node`` alone.

    Raises OptionError: no limits for a new group, or limits for one that has others.
    """
    if name is None:
        if limits is None:
            raise OptionError("limits", None, "given, when there is no throttle-group")
        group = ThrottleGroup(f"#{node.name}", limits)
    elif isinstance(found := node.objects.get(name), ThrottleGroup):
        group = found
        if limits is not None and limits != group.limits:
            raise OptionError("limits", limits, f"left out: throttle group '{name}' exists and has other limits")
    elif found is not None:
        raise OptionError("throttle-group", name, "the id of a throttle group")
    elif limits is None:
        raise OptionError("throttle-group", name, "a group that exists; or limits must be given, to make it")
    else:
        group = node.objects[name] = ThrottleGroup(name, limits)
    group.members += 1
    return group


def leave_group(group: ThrottleGroup, node: Node) -> None:
    """The opposite of `join_group`; a group that nobody needs any more is forgotten."""
    group.members -= 1
    if not group.members and node.objects.get(group.name) is group:
        del node.objects[group.name]


def _buckets(limits: Limits, unit: str, what: str) -> list[tuple[bool, _Bucket]]:
    """The buckets of one limit: none, one, or two for a burst of more than a second."""
    name = f"{unit}_{what}"
    rate, burst, seconds = getattr(limits, name), getattr(limits, f"{name}_max"), getattr(limits, f"{name}_max_length")
    if not rate:
        return []
    operations = unit == "iops"
    if not burst:
        return [(operations, _Bucket(rate, rate * _SLACK))]
    sustained = operations, _Bucket(rate, burst * seconds)
    return [sustained] if seconds == 1 else [sustained, (operations, _Bucket(burst, burst * _SLACK))]
