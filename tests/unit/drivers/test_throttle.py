"""Throttle: how long a request waits, in which order, and who shares a limit. The clock is the test's."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from blockstep.aio.inline import start
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.throttle import READS, WRITES, Limits, Throttle, ThrottleGroup, ThrottleOptions, join_group
from blockstep.errors import OptionError
from tests.disks import ram


class FakeClock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, FakeTimer]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., object], /, *arguments: Any) -> FakeTimer:
        timer = FakeTimer(lambda: callback(*arguments))
        heapq.heappush(self._timers, (self.now + delay, next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end + 1e-9:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self.now = end


class FakeTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Rig:
    """A group and the requests that went through it: (time since the start, number)."""

    def __init__(self, **limits: int) -> None:
        self.clock = FakeClock()
        self.group = ThrottleGroup("g", Limits(**limits), self.clock)
        self.passed: list[tuple[float, int]] = []

    def ask(self, number: int, length: int = 4096, direction: int = WRITES) -> None:
        def done(value: object, error: BaseException | None) -> None:
            assert error is None
            self.passed.append((round(self.clock.now - 100, 6), number))

        start(self.group.pass_through(direction, length), done)

    def times(self) -> list[float]:
        return [time for time, _ in self.passed]


def test_without_a_limit_nothing_waits() -> None:
    rig = Rig()
    for number in range(1000):
        rig.ask(number)
    assert len(rig.passed) == 1000


def test_a_tenth_of_a_second_passes_at_once_and_then_one_by_one() -> None:
    rig = Rig(iops_total=100)
    for number in range(30):
        rig.ask(number)
    assert len(rig.passed) == 11  # the bucket's ten, and the one that overflows it
    rig.clock.advance(10)
    assert [number for _, number in rig.passed] == list(range(30))
    assert rig.times()[11:14] == [0.01, 0.02, 0.03]
    assert rig.times()[-1] == pytest.approx(0.19)


@pytest.mark.parametrize(("limits", "direction", "length", "rate"), [
    ({"iops_read": 50}, READS, 4096, 50),
    ({"iops_write": 200}, WRITES, 4096, 200),
    ({"bps_total": 1 << 20}, READS, 4096, 256),
    ({"bps_write": 1 << 20}, WRITES, 65536, 16),
    ({"iops_total": 100, "iops_size": 4096}, WRITES, 16384, 25),
    ({"iops_total": 1000, "bps_total": 40960}, WRITES, 4096, 10),
])
def test_the_rate_over_a_long_time_is_the_limit(
    limits: dict[str, int], direction: int, length: int, rate: float
) -> None:
    rig = Rig(**limits)
    for number in range(int(rate * 30)):
        rig.ask(number, length, direction)
    before = len(rig.passed)
    rig.clock.advance(20)
    assert len(rig.passed) - before == pytest.approx(rate * 20, abs=1)


def test_a_limit_of_reads_does_not_hold_writes() -> None:
    rig = Rig(iops_read=10)
    for number in range(10):
        rig.ask(number, direction=READS)
        rig.ask(100 + number, direction=WRITES)
    assert sum(number >= 100 for _, number in rig.passed) == 10
    assert rig.group.waiting(READS) > 0


def test_with_a_common_limit_reads_and_writes_take_turns() -> None:
    rig = Rig(iops_total=10)
    for number in range(40):
        rig.ask(number, direction=number % 2)
    rig.clock.advance(10)
    assert [number for _, number in rig.passed] == list(range(40))


def test_a_burst_passes_at_its_rate_and_then_the_limit_holds() -> None:
    rig = Rig(iops_total=10, iops_total_max=100)
    for number in range(200):
        rig.ask(number)
    assert len(rig.passed) == 101
    rig.clock.advance(5)
    assert len(rig.passed) == 151


def test_a_burst_of_several_seconds_is_held_to_its_own_rate() -> None:
    rig = Rig(iops_total=10, iops_total_max=100, iops_total_max_length=3)
    for number in range(1000):
        rig.ask(number)
    assert len(rig.passed) == 11
    rig.clock.advance(1)
    assert len(rig.passed) == 111
    rig.clock.advance(3)
    assert len(rig.passed) == pytest.approx(300 + 10 * 4, abs=2)
    rig.clock.advance(10)
    assert len(rig.passed) == pytest.approx(300 + 10 * 14, abs=2)


def test_idle_time_is_not_saved_up_beyond_the_bucket() -> None:
    rig = Rig(iops_total=100)
    rig.clock.advance(1000)
    for number in range(100):
        rig.ask(number)
    assert len(rig.passed) == 11


def test_a_request_larger_than_the_bucket_passes_and_makes_the_next_wait() -> None:
    rig = Rig(bps_total=1000)
    rig.ask(0, 5000)
    rig.ask(1, 1)
    assert rig.times() == [0]
    rig.clock.advance(10)
    assert rig.times() == [0, 4.9]


def test_new_limits_hold_for_what_waits() -> None:
    rig = Rig(iops_total=1)
    for number in range(5):
        rig.ask(number, direction=number % 2)
    rig.group.set_limits(Limits())
    assert sorted(number for _, number in rig.passed) == [0, 1, 2, 3, 4]
    assert rig.times() == [0] * 5


@pytest.mark.parametrize(("limits", "option"), [
    ({"iops_size": -1}, "limits.iops-size"), ({"bps_read": -1}, "limits.bps-read"),
    ({"bps_read": 5, "bps_read_max": -3}, "limits.bps-read-max"),
    ({"bps_read": 5, "bps_read_max_length": 0}, "limits.bps-read-max-length")])
def test_the_limit_that_is_wrong_is_named(limits: dict[str, int], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        Limits(**limits).check()
    assert (caught.value.option, caught.value.value) == (option, min(limits.values()))


def test_expedite_lets_all_pass_until_its_end() -> None:
    rig = Rig(iops_total=1)
    for number in range(5):
        rig.ask(number)
    assert len(rig.passed) == 1
    rig.group.expedite(True)
    rig.ask(5)
    assert len(rig.passed) == 6
    rig.group.expedite(False)
    rig.ask(6)
    rig.ask(7)
    rig.ask(8)
    assert rig.group.waiting(WRITES) > 0


@pytest.mark.parametrize("drained", ["disk", "throttle", "top"])
def test_a_drain_is_not_held_up_by_the_limit_whatever_is_drained(drained: str) -> None:
    async def main() -> None:
        graph = Graph()
        disk = await ram(graph, "disk")
        await graph.open({"driver": "throttle", "node-name": "throttle", "file": "disk", "limits": {"iops-total": 1}})
        top = await graph.open({"driver": "raw", "node-name": "top", "file": "throttle"})
        user = graph.attach_backend(top, "guest", READ | WRITE)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        writes = [asyncio.create_task(user.pwrite(0, b"x")) for _ in range(50)]
        await asyncio.sleep(0)
        assert len(disk.requests) < 50
        async with graph.drained(graph.find(drained)):
            assert len(disk.requests) == 50
        await asyncio.gather(*writes)
        assert loop.time() - begin < 5
        assert not graph.find("throttle").group._passing  # type: ignore[attr-defined]

    asyncio.run(main())


def test_reads_writes_zeroes_and_discards_count_and_flushes_pass() -> None:
    async def main() -> None:
        graph = Graph()
        await ram(graph, "disk")
        node = await graph.open({"driver": "throttle", "file": "disk", "limits": {"bps-total": 10}})
        assert isinstance(node, Throttle)
        await node.pwrite(0, bytes(512))
        held = [asyncio.create_task(request) for request in (
            node.pread(0, 1), node.pwrite(0, b"x"), node.write_zeroes(0, 1), node.discard(0, 1))]
        await asyncio.sleep(0)
        await node.flush()
        await node.block_status(0, 1)
        assert node.group.waiting(READS) == 1
        assert node.group.waiting(WRITES) == 3
        node.expedite(True)
        await asyncio.gather(*held)

    asyncio.run(main())


def test_nodes_of_a_group_share_its_limit_and_the_group_goes_with_the_last() -> None:
    async def main() -> None:
        graph = Graph()
        nodes = []
        for name in ("a", "b"):
            await ram(graph, name)
            node = await graph.open({"driver": "throttle", "node-name": f"t{name}", "file": name, "throttle-group": "g",
                                     **({"limits": {"iops-total": 10}} if name == "a" else {})})
            assert isinstance(node, Throttle)
            nodes.append(node)
        assert nodes[0].group is nodes[1].group is graph.objects["g"]
        with pytest.raises(OptionError, match="other limits"):
            await graph.open({"driver": "throttle", "file": "a", "throttle-group": "g", "limits": {"iops-total": 5}})
        for node in nodes:
            await graph.close(node)
        assert "g" not in graph.objects

    asyncio.run(main())


@pytest.mark.parametrize(("limits", "option"), [
    ({"iops_total": 1, "iops_read": 1}, "limits.iops-total"),
    ({"bps_total": 1, "bps_write": 1}, "limits.bps-total"),
    ({"bps_read": -1}, "limits.bps-read"),
    ({"iops_write": 10, "iops_write_max": 5}, "limits.iops-write-max"),
    ({"iops_write_max": 5}, "limits.iops-write-max"),
    ({"iops_total": 5, "iops_total_max_length": 0}, "limits.iops-total-max-length"),
])
def test_contradicting_limits_are_named(limits: dict[str, int], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        Limits(**limits).check()
    assert caught.value.option == option


def test_a_node_needs_limits_or_a_group_that_exists() -> None:
    async def main() -> None:
        node = Throttle("n", ThrottleOptions(file="f"))
        with pytest.raises(OptionError, match="limits"):
            join_group(None, None, node)
        with pytest.raises(OptionError, match="throttle-group"):
            join_group("unknown", None, node)
        node.objects["password"] = "secret"
        with pytest.raises(OptionError, match="id of a throttle group"):
            join_group("password", None, node)

    asyncio.run(main())
