"""Rate limits: at once, then held back, then the newest."""

from __future__ import annotations

from blockstep.qmp.events import Throttle
from tests.unit.qmp.support import Progress, Tick


def test_an_event_without_a_limit_is_always_sent() -> None:
    throttle = Throttle()
    assert all(throttle.offer(Tick(count=1), 0.0) for _ in range(3))
    assert throttle.next_time() is None


def test_the_first_goes_at_once_and_the_newest_of_the_rest_when_the_period_is_over() -> None:
    throttle = Throttle()
    assert throttle.offer(Progress(device="a", offset=1), 10.0)
    assert not throttle.offer(Progress(device="a", offset=2), 10.1)
    assert not throttle.offer(Progress(device="a", offset=3), 10.9)
    assert throttle.next_time() == 11.0
    assert throttle.due(10.95) == []
    assert throttle.due(11.0) == [Progress(device="a", offset=3)]
    assert not throttle.offer(Progress(device="a", offset=4), 11.5)
    assert throttle.due(12.0) == [Progress(device="a", offset=4)]
    assert throttle.due(13.0) == []
    assert throttle.next_time() is None
    assert throttle.offer(Progress(device="a", offset=5), 13.0)


def test_each_device_has_its_own_limit() -> None:
    throttle = Throttle()
    assert throttle.offer(Progress(device="a", offset=1), 0.0)
    assert throttle.offer(Progress(device="b", offset=1), 0.5)
    assert not throttle.offer(Progress(device="a", offset=2), 0.6)
    assert throttle.due(1.2) == [Progress(device="a", offset=2)]
    assert throttle.next_time() == 1.5


def test_an_event_never_overtakes_one_that_is_held_back() -> None:
    throttle = Throttle()
    throttle.offer(Progress(device="a", offset=1), 0.0)
    throttle.offer(Progress(device="a", offset=2), 0.5)
    assert not throttle.offer(Progress(device="a", offset=3), 5.0)  # the timer is late
    assert throttle.due(5.0) == [Progress(device="a", offset=3)]
