"""The range lock: no two holders that exclude each other, no one who waits for ever, order among overlapping."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.aio.inline import start
from blockstep.aio.rangelock import BusyRanges, RangeLock


@dataclass
class Holder:
    """Somebody who wants a range, as a strand."""

    start: int
    end: int
    shared: bool
    number: int
    tokens: list[int] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.tokens)

    def excludes(self, other: Holder) -> bool:
        return self.start < other.end and other.start < self.end and not (self.shared and other.shared)


def wants(lock: RangeLock, holder: Holder) -> Holder:
    def taken(token: object, error: BaseException | None) -> None:
        assert error is None
        assert isinstance(token, int)
        holder.tokens.append(token)

    start(lock.take(holder.start, holder.end, holder.shared), taken)
    return holder


def test_a_free_range_is_taken_at_once() -> None:
    lock = RangeLock()
    assert lock.idle
    token = lock.try_take(0, 10)
    assert token
    assert not lock.idle
    lock.give_back(token)
    assert lock.idle


@pytest.mark.parametrize(("other", "free"), [
    ((10, 20), True), ((0, 10), False), ((9, 10), False), ((5, 15), False), ((20, 30), True),
])
def test_ranges_are_half_open(other: tuple[int, int], free: bool) -> None:
    lock = RangeLock()
    lock.try_take(0, 10)
    assert bool(lock.try_take(*other)) is free


@pytest.mark.parametrize(("first", "second", "together"), [
    (True, True, True), (True, False, False), (False, True, False), (False, False, False),
])
def test_readers_pass_each_other_and_nobody_else(first: bool, second: bool, together: bool) -> None:
    lock = RangeLock()
    assert lock.try_take(0, 10, first)
    assert bool(lock.try_take(5, 15, second)) is together


def test_a_waiter_goes_on_when_the_range_is_given_back() -> None:
    lock = RangeLock()
    token = lock.try_take(0, 10)
    waiter = wants(lock, Holder(5, 15, False, 1))
    assert not waiter.holds
    lock.give_back(token)
    assert waiter.holds
    lock.give_back(waiter.tokens.pop())
    assert lock.idle


def test_a_stream_of_readers_does_not_starve_a_writer() -> None:
    lock = RangeLock()
    reader = lock.try_take(0, 10, shared=True)
    writer = wants(lock, Holder(0, 10, False, 1))
    late = wants(lock, Holder(0, 10, True, 2))
    assert not writer.holds
    assert not late.holds, "a reader that came later must not pass the waiting writer"
    assert not lock.try_take(5, 6, shared=True)
    lock.give_back(reader)
    assert writer.holds
    assert not late.holds
    lock.give_back(writer.tokens.pop())
    assert late.holds


def test_a_waiter_elsewhere_holds_nobody_back() -> None:
    lock = RangeLock()
    lock.try_take(0, 10)
    wants(lock, Holder(0, 10, False, 1))
    assert lock.try_take(10, 20)


def test_a_waiter_may_take_and_give_back_in_the_frame_of_the_one_who_gave_back() -> None:
    lock = RangeLock()
    order: list[int] = []

    async def turn(number: int) -> None:
        token = lock.try_take(0, 10) or await lock.take(0, 10)
        order.append(number)
        lock.give_back(token)

    first = lock.try_take(0, 10)
    for number in range(50):
        start(turn(number), lambda value, error: None)
    lock.give_back(first)
    assert order == list(range(50))
    assert lock.idle


def test_however_many_wait_for_one_range_each_gets_it_in_its_order() -> None:
    """Each of them gives it back in the frame in which it goes on."""
    lock, ended = RangeLock(), list[int]()

    async def use(number: int) -> int:
        token = await lock.take(0, 10)
        lock.give_back(token)
        return number

    def done(number: int, error: BaseException | None) -> None:
        assert error is None
        ended.append(number)

    token = lock.try_take(0, 10)
    for number in range(2000):
        start(use(number), done)
    lock.give_back(token)
    assert ended == list(range(2000))
    assert lock.idle


def test_a_task_that_is_cancelled_while_it_waits_leaves_no_trace() -> None:
    async def main() -> None:
        lock = RangeLock()
        token = lock.try_take(0, 10)
        task = asyncio.create_task(lock.take(0, 10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        lock.give_back(token)
        assert lock.idle

    asyncio.run(main())


def test_a_task_that_is_cancelled_between_the_grant_and_its_turn_gives_the_range_back() -> None:
    async def main() -> None:
        lock = RangeLock()
        token = lock.try_take(0, 10)
        task = asyncio.create_task(lock.take(0, 10))
        await asyncio.sleep(0)
        behind = wants(lock, Holder(0, 10, False, 2))
        lock.give_back(token)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert behind.holds
        lock.give_back(behind.tokens.pop())
        assert lock.idle

    asyncio.run(main())


def test_who_waited_behind_a_cancelled_task_goes_on() -> None:
    async def main() -> None:
        lock = RangeLock()
        reader = lock.try_take(0, 10, shared=True)
        writer = asyncio.create_task(lock.take(0, 10))
        await asyncio.sleep(0)
        behind = wants(lock, Holder(0, 10, True, 2))
        assert not behind.holds
        writer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writer
        assert behind.holds
        lock.give_back(reader)

    asyncio.run(main())


requests = st.builds(lambda at, length, shared: (at, at + length, shared),
                     st.integers(0, 30), st.integers(1, 12), st.booleans())


@given(st.lists(requests, min_size=1, max_size=25), st.integers(0, 2 ** 32))
def test_no_two_holders_exclude_each_other_and_everybody_gets_a_turn(
        wanted: list[tuple[int, int, bool]], seed: int) -> None:
    lock = RangeLock()
    choose = random.Random(seed)
    holders: list[Holder] = []
    pending = [Holder(*request, number) for number, request in enumerate(wanted)]
    served = 0

    def check() -> None:
        holding = [holder for holder in holders if holder.holds]
        for holder in holding:
            assert not any(holder.excludes(other) for other in holding if other is not holder)
        for holder in holders:
            if not holder.holds:
                in_the_way = [other for other in holders if holder.excludes(other) and
                              (other.holds or other.number < holder.number) and other is not holder]
                assert in_the_way, "waits although nobody holds it back"
        for holder in holding:
            earlier = [other for other in holders if not other.holds and other.number < holder.number]
            assert not any(holder.excludes(other) for other in earlier), "passed one who came earlier"

    while pending or holders:
        holding = [holder for holder in holders if holder.holds]
        if pending and (not holding or choose.random() < 0.6):
            holders.append(wants(lock, pending.pop(0)))
        else:
            assert holding, "everybody waits: nobody would ever go on"
            leaves = choose.choice(holding)
            holders.remove(leaves)
            lock.give_back(leaves.tokens.pop())
            served += 1
        check()
    assert served == len(wanted)
    assert lock.idle


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 300_000), st.booleans()), max_size=60))
def test_busy_ranges_never_let_an_overlap_out_and_refuse_nothing_that_shares_no_page(
    steps: list[tuple[int, int, bool]],
) -> None:
    busy, out = BusyRanges(), list[tuple[int, int]]()
    for begin, length, give_back in steps:
        end = begin + length
        overlaps = any(begin < taken_end and taken_start < end for taken_start, taken_end in out)
        shares_a_page = any(begin >> 12 <= (taken_end - 1) >> 12 and taken_start >> 12 <= (end - 1) >> 12
                            for taken_start, taken_end in out)
        taken = busy.try_take(begin, end)
        assert not (taken and overlaps)
        assert taken or shares_a_page
        if taken:
            out.append((begin, end))
        if give_back and out:
            busy.give_back(*out.pop(0))
    for taken_range in out:
        busy.give_back(*taken_range)
    assert busy.try_take(0, 1 << 40)


def test_a_wide_range_goes_out_alone() -> None:
    busy = BusyRanges()
    assert busy.try_take(0, 4096)
    assert not busy.try_take(1 << 20, 1 << 30)
    busy.give_back(0, 4096)
    assert busy.try_take(1 << 20, 1 << 30)
    assert not busy.try_take(0, 4096)
    assert not busy.try_take(0, 65536)
    busy.give_back(1 << 20, 1 << 30)
    assert busy.try_take(0, 4096)
