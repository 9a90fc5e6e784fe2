"""The link: what reaches the standby, in which order, and who waits for it, while its requests take their time."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.aio.inline import start
from blockstep.aio.rangelock import BusyRanges
from blockstep.block.bitmap import Bitmap
from blockstep.block.driver import FAST, FUA
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.errors import ConnectionLost
from blockstep.replication.link import GRANULARITY, LOOKS, SMALL, WINDOW, Link
from blockstep.testing.model import Content, Write
from tests.scenario.gates import GatedDisk, Gates, gated_disk

LENGTH = 4 * GRANULARITY + 1234


class Request:
    """A request of the guest, started as a strand."""

    def __init__(self, coroutine: Any) -> None:
        self.ended = False
        self.error: BaseException | None = None
        self.value: Any = None
        start(coroutine, self._done)

    def _done(self, value: Any, error: BaseException | None) -> None:
        self.ended, self.value, self.error = True, value, error


class Pair:
    """A link between two disks, a guest above it. Both disks' requests stop at gates."""

    def __init__(self, ack: str = "local", queue: int = 1 << 20, length: int = LENGTH) -> None:
        self.graph = Graph()
        self.gates = Gates()
        content = bytes(index * 7 & 0xFF for index in range(length))
        self.local = gated_disk(self.graph, self.gates, "local", content)
        self.remote = gated_disk(self.graph, self.gates, "remote", content)
        opened = Request(self.graph.open({"driver": "link", "node-name": "link", "file": "local", "ack": ack,
                                          "queue": queue}))
        assert isinstance(opened.value, Link)
        self.link: Link = opened.value
        self.link.ledger = Bitmap(length, GRANULARITY)
        self.guest: Backend = self.graph.attach_backend(self.link, "guest", READ | WRITE)
        self.connect(self.remote)
        self.failures: list[OSError] = []
        self.link.on_fail = self.failures.append

    def connect(self, remote: GatedDisk) -> None:
        """Attach a standby that holds what the primary holds, and switch the link on."""
        with self.graph.change() as change:
            if "target" in self.link.children:
                change.detach(self.link.children["target"])
            change.attach(self.link, "target", Role.TARGET, remote)
        self.remote = remote
        self.link.switch_on()

    def write(self, offset: int, data: bytes, flags: int = 0) -> Request:
        return Request(self.guest.pwrite(offset, data, flags))

    def lacks(self) -> Bitmap:
        """The clusters that the standby may lack."""
        union = Bitmap(LENGTH, GRANULARITY)
        union.merge(self.link.since)
        union.merge(self.link.closing)
        return union

    def check_bitmaps_cover(self) -> None:
        """Every byte in which the two disks differ lies in a cluster that would be copied, also after a crash."""
        union = self.lacks()
        assert self.link.ledger
        assert self.link.ledger.bits & union.bits == union.bits
        for begin in range(0, LENGTH, GRANULARITY):
            end = begin + GRANULARITY
            if self.local.data[begin:end] != self.remote.data[begin:end]:
                assert union.any(begin, min(end, LENGTH) - begin), f"cluster at {begin} differs, and its bit is 0"


# --- one thing at a time ---


def test_a_local_acknowledgement_does_not_wait_for_the_standby() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    request = pair.write(5, b"abc")
    assert request.ended
    assert request.error is None
    assert pair.link.queued == 3
    pair.gates.open()
    assert pair.remote.data == pair.local.data
    assert pair.link.queued == 0


@pytest.mark.parametrize("first", ["local", "remote"])
def test_an_acknowledgement_of_both_waits_for_both(first: str) -> None:
    pair = Pair("both")
    pair.gates.close()
    request = pair.write(5, b"abc")
    for _ in range(2):  # before and after the effect
        pair.gates.release(next(i for i, stop in enumerate(pair.gates.waiting) if stop.node == first))
    assert not request.ended
    pair.gates.open()
    assert request.ended
    assert request.error is None


@pytest.mark.parametrize("ack", ["local", "both"])
def test_data_given_to_a_write_may_change_after_its_end(ack: str) -> None:
    pair = Pair(ack)
    pair.gates.close("remote")
    data = bytearray(b"abc")
    request = pair.write(5, data)
    if ack == "local":
        assert request.ended
        data[:] = b"xyz"
    pair.gates.open()
    assert pair.remote.data[5:8] == b"abc"


@pytest.mark.parametrize("fills", ["write", "write_zeroes", "discard"])
def test_a_full_queue_holds_the_guest_until_there_is_room(fills: str) -> None:
    """A discard fills it with all that it covers: the standby may need as much room for what was there."""
    queue = 2 * SMALL
    pair = Pair("local", queue=queue)
    pair.gates.close("remote")
    full = pair.write(0, bytes(queue + 1)) if fills == "write" else Request(getattr(pair.guest, fills)(0, queue + 1))
    assert full.ended
    waiting = [pair.write(100 + 10 * number, bytes(10)) for number in range(3)]
    assert not any(request.ended for request in waiting)
    pair.gates.open()
    assert all(request.ended and request.error is None for request in waiting)
    assert pair.remote.data == pair.local.data


@pytest.mark.parametrize("ack", ["local", "both"])
@pytest.mark.parametrize("operation", ["write", "write_zeroes", "discard"])
def test_an_error_of_the_standby_lets_go_of_it_and_not_of_the_guest(ack: str, operation: str) -> None:
    pair = Pair(ack)
    pair.gates.fail("remote", operation, errno.ENOSPC)
    calls = {"write": lambda: pair.guest.pwrite(7, b"abc"), "write_zeroes": lambda: pair.guest.write_zeroes(7, 3),
             "discard": lambda: pair.guest.discard(7, 3)}
    request = Request(calls[operation]())
    assert request.ended
    assert request.error is None
    assert not pair.link.on
    assert [error.errno for error in pair.failures] == [errno.ENOSPC]
    pair.check_bitmaps_cover()


@pytest.mark.parametrize(("ack", "gives_up"), [("local", False), ("both", True)])
def test_a_guest_waits_no_longer_than_the_deadline_for_a_standby_without_room(ack: str, gives_up: bool) -> None:
    """Its checkpoint waits for a flush, say, that takes its time: nothing is sent, so no request has a deadline."""
    pair = Pair(ack)
    pair.link.stall()
    write = pair.write(0, b"1")
    for _ in range(LOOKS):
        assert write.ended is not gives_up
        pair.link.look(1.0, float(LOOKS))
    assert not pair.failures
    pair.link.look(1.0, float(LOOKS))
    assert write.ended
    assert write.error is None
    assert [error.errno for error in pair.failures] == [errno.ETIMEDOUT] * gives_up
    pair.check_bitmaps_cover()


WAITS = {
    "for room in the queue": ("local", lambda guest: guest.pwrite(8192, b"3")),
    "for one before it in the same page": ("both", lambda guest: guest.pwrite(8, b"3")),
    "for one before it that holds its range": ("both", lambda guest: guest.pwrite(0, b"3")),
    "after zeroes": ("both", lambda guest: guest.write_zeroes(0, 8)),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_standby_that_answers_each_request_in_time_is_too_slow_for_one_that_waits_for_several(what: str) -> None:
    """The deadline counts from when the guest's request came: not anew whenever there is one less before it."""
    ack, third = WAITS[what]
    pair = Pair(ack, queue=4096 if ack == "local" else 1 << 20)
    pair.gates.close("remote")
    first, second = Request(pair.guest.write_zeroes(0, 4097)), pair.write(4, bytes(4097))
    waiting = Request(third(pair.guest))

    def look(times: int) -> None:
        for _ in range(times):
            pair.link.look(1.0, float(LOOKS))

    def answer() -> None:
        pair.gates.release()
        pair.gates.release()

    look(LOOKS // 2)
    answer()
    assert first.ended
    look(LOOKS // 2)
    assert not waiting.ended
    assert pair.link.on
    look(1)
    assert second.ended
    assert waiting.ended
    assert waiting.error is None
    assert [error.errno for error in pair.failures] == [errno.ETIMEDOUT]
    pair.check_bitmaps_cover()


@pytest.mark.parametrize("ack", ["local", "both"])
def test_a_standby_that_is_busy_all_the_time_is_not_let_go_while_nobody_waits_for_long(ack: str) -> None:
    pair = Pair(ack)
    pair.gates.close("remote")
    requests = [pair.write(0, b"0")]
    for number in range(1, 5 * LOOKS):
        requests.append(pair.write(0, b"%d" % number))
        pair.gates.release()
        pair.gates.release()
        pair.link.look(1.0, float(LOOKS))
    pair.gates.open()
    assert all(request.ended for request in requests)
    assert pair.link.on
    assert pair.remote.data == pair.local.data


@pytest.mark.parametrize(("ack", "gives_up"), [("local", False), ("both", True)])
def test_a_guest_waits_no_longer_than_the_deadline_for_a_checkpoint(ack: str, gives_up: bool) -> None:
    pair = Pair(ack)
    pair.link.mark()
    write = pair.write(0, b"1")
    for _ in range(LOOKS + 1):
        pair.link.look(1.0, float(LOOKS))
    assert write.ended
    assert pair.link.on is not gives_up
    pair.check_bitmaps_cover()


def test_a_drained_section_waits_no_longer_than_the_deadline_for_the_standby() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    pair.write(0, b"1")
    drained = Request(pair.link.drain_begin())
    for _ in range(LOOKS):
        pair.link.look(1.0, float(LOOKS))
    assert not drained.ended
    pair.link.look(1.0, float(LOOKS))
    assert drained.ended
    assert drained.error is None
    assert len(pair.failures) == 1


def test_those_who_wait_go_on_when_the_link_lets_go() -> None:
    pair = Pair("both", queue=10)
    pair.gates.close("remote")
    requests = [pair.write(0, bytes(20)), pair.write(10, b"overlaps"), pair.write(50, b"waits for room"),
                Request(pair.guest.flush()), Request(pair.guest.discard(1000, 7))]
    assert not any(request.ended for request in requests)
    pair.link.fail(ConnectionLost("cut"))
    assert all(request.ended and request.error is None for request in requests)
    assert len(pair.failures) == 1
    pair.check_bitmaps_cover()


def test_what_a_lost_standby_answers_late_changes_nothing() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    pair.write(0, b"one")
    pair.link.fail(ConnectionLost("cut"))
    pair.connect(gated_disk(pair.graph, pair.gates, "remote2", bytes(pair.local.data)))
    pair.write(0, b"two")
    pair.gates.open()  # the answer of the old standby comes now
    assert pair.link.queued == 0
    assert pair.link.on
    assert pair.remote.data == pair.local.data


def test_a_flush_reaches_the_standby_when_both_acknowledge() -> None:
    pair = Pair("both")
    pair.gates.close("remote")
    request = Request(pair.guest.flush())
    assert [stop.event for stop in pair.gates.waiting] == ["flush"]
    assert not request.ended
    pair.gates.open()
    assert request.ended


def test_a_failed_flush_of_the_standby_lets_go_of_it() -> None:
    pair = Pair("both")
    pair.gates.fail("remote", "flush")
    request = Request(pair.guest.flush())
    assert request.ended
    assert request.error is None
    assert not pair.link.on


def test_a_flush_stays_here_when_acknowledged_locally() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    assert Request(pair.guest.flush()).ended
    assert not pair.gates.waiting


@pytest.mark.parametrize(("ack", "forwarded"), [("local", 0), ("both", FUA)])
def test_durability_is_asked_of_the_standby_only_when_it_acknowledges(ack: str, forwarded: int) -> None:
    pair = Pair(ack)
    assert pair.write(0, b"abc", FUA).ended
    assert Request(pair.guest.write_zeroes(0, 3, FUA)).ended
    assert pair.remote.flags == [forwarded, forwarded]
    assert pair.local.flags == [FUA, FUA]


@pytest.mark.parametrize("ack", ["local", "both"])
def test_fast_zeroes_that_the_standby_cannot_do_fast_are_no_reason_to_let_go(ack: str) -> None:
    pair = Pair(ack)
    assert Request(pair.guest.write_zeroes(0, 3, FAST)).error is None
    assert (pair.local.flags, pair.remote.flags) == ([FAST], [0])


def test_fast_zeroes_that_this_disk_cannot_do_fast_do_not_reach_the_standby() -> None:
    pair = Pair("local")
    pair.gates.fail("local", "write_zeroes", errno.ENOTSUP)
    request = Request(pair.guest.write_zeroes(7, 3, FAST))
    assert isinstance(request.error, OSError)
    assert request.error.errno == errno.ENOTSUP
    assert pair.remote.data == pair.local.data


@pytest.mark.parametrize("ack", ["local", "both"])
@pytest.mark.parametrize("operation", ["discard", "write_zeroes"])
def test_a_long_request_without_data_reaches_the_standby_piece_by_piece(
    ack: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a deadline, in which the standby has to save what the piece overwrites."""
    monkeypatch.setattr("blockstep.replication.link.AT_ONCE", GRANULARITY)
    monkeypatch.setattr(BusyRanges, "WIDE", 4096)
    pair = Pair(ack)
    pair.gates.close("remote")
    request = Request(getattr(pair.guest, operation)(1, LENGTH - 1))
    pieces = []
    while pair.gates.waiting:
        [stop] = pair.gates.waiting
        assert request.ended is (ack == "local")
        pieces.append(stop.length)
        for _ in range(LOOKS - 1):
            pair.link.look(1.0, float(LOOKS))
        pair.gates.release()
        pair.gates.release()
    assert request.ended
    assert request.error is None
    assert max(pieces) == GRANULARITY
    assert sum(pieces) == LENGTH - 1
    assert pair.remote.data == pair.local.data
    assert pair.link.queued == 0


def test_at_most_a_window_of_requests_is_on_the_way() -> None:
    pair = Pair("local", length=(WINDOW + 10) * 4096)
    pair.gates.close("remote")
    for number in range(WINDOW + 10):
        assert pair.write(number * 4096, b"x").ended
    assert len(pair.gates.waiting) == WINDOW
    pair.gates.open()
    assert pair.remote.data == pair.local.data


def test_overlapping_writes_reach_the_standby_one_after_the_other() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    pair.write(0, b"first...")
    pair.write(4, b"second")
    pair.write(100, b"behind them")
    assert [(stop.event, stop.offset) for stop in pair.gates.waiting] == [("write", 0)]
    pair.gates.open()
    assert pair.remote.data == pair.local.data


# --- checkpoints ---


def test_what_comes_after_the_mark_is_held_back_from_the_link_and_not_from_the_guest() -> None:
    pair = Pair("local")
    pair.write(0, b"before")
    pair.link.mark()
    assert pair.write(0, b"after!").ended
    assert pair.remote.data[:6] == b"before"
    assert Request(pair.link.settle()).ended
    pair.link.settled()
    pair.check_bitmaps_cover()
    pair.link.release()
    assert pair.remote.data[:6] == b"after!"


def test_settling_waits_for_what_came_before_the_mark() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    pair.write(0, b"before")
    pair.link.mark()
    pair.write(0, b"after!")
    settled = Request(pair.link.settle())
    assert not settled.ended
    pair.gates.open()
    assert settled.ended
    assert settled.error is None
    assert pair.remote.data[:6] == b"before"


def test_settling_ends_when_the_standby_is_lost() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    pair.write(0, b"before")
    pair.link.mark()
    settled = Request(pair.link.settle())
    pair.link.fail(ConnectionLost("cut"))
    assert isinstance(settled.error, ConnectionLost)
    assert isinstance(Request(pair.link.settle()).error, ConnectionLost)


def test_a_checkpoint_that_fails_after_the_mark_forgets_nothing() -> None:
    pair = Pair("local")
    pair.gates.close("remote")
    pair.write(0, b"one")
    pair.link.mark()
    pair.write(GRANULARITY, b"two")
    pair.link.release()  # without settled(): the standby could not take it
    pair.link.mark()
    pair.write(2 * GRANULARITY, b"three")
    pair.link.fail(ConnectionLost("cut"))
    pair.check_bitmaps_cover()
    assert [offset for offset, _ in pair.lacks().dirty()] == [0]
    assert pair.link.behind == 3 * GRANULARITY


def test_a_write_that_this_disk_fails_counts_as_what_the_standby_may_lack_until_a_resync() -> None:
    pair = Pair("local")
    pair.gates.fail("local", "write")
    assert pair.write(0, b"abc").error is not None
    pair.check_bitmaps_cover()
    pair.link.mark()
    assert Request(pair.link.settle()).ended
    pair.link.settled()
    pair.link.release()
    pair.check_bitmaps_cover()


@pytest.mark.parametrize("ack", ["local", "both"])
@pytest.mark.parametrize("what", ["write", "write_zeroes", "discard", "flush"])
def test_what_this_disk_fails_is_told_once_and_until_a_checkpoint_of_which_all_was_done(what: str, ack: str) -> None:
    pair = Pair(ack)
    told: list[int | None] = []
    pair.link.on_trouble = lambda: told.append(pair.link.trouble and pair.link.trouble.errno)
    requests = {"write": lambda: pair.guest.pwrite(0, bytes(9)), "discard": lambda: pair.guest.discard(0, 9),
                "write_zeroes": lambda: pair.guest.write_zeroes(0, 9), "flush": pair.guest.flush}
    for code in (errno.ENOSPC, errno.ENOSPC, errno.EIO):
        pair.gates.fail("local", what, code)
        assert Request(requests[what]()).error is not None
    assert told == [errno.ENOSPC, errno.EIO]
    pair.link.mark()  # a checkpoint of which some have failed
    pair.link.release()
    pair.link.mark()  # and one before which nothing was written, so that nothing is known
    pair.link.release()
    assert told == [errno.ENOSPC, errno.EIO]
    assert pair.write(0, b"well").error is None
    pair.link.mark()
    assert told == [errno.ENOSPC, errno.EIO, None]


@pytest.mark.parametrize("operation", ["pwrite", "write_zeroes", "discard"])
def test_the_alarm_rings_when_enough_was_written_since_the_mark(operation: str) -> None:
    pair = Pair("local")
    rings: list[int] = []
    pair.link.on_written = lambda: rings.append(pair.link.written)
    pair.link.alarm = 10
    Request(getattr(pair.guest, operation)(0, bytes(10) if operation == "pwrite" else 10))
    assert not rings
    Request(getattr(pair.guest, operation)(0, b"x" if operation == "pwrite" else 1))
    assert rings == [11]
    pair.link.mark()
    assert pair.link.written == 0


# --- everything at random ---

Step = tuple[str, int, int]

_ranges = st.tuples(st.integers(0, LENGTH - 1), st.one_of(st.integers(1, 600), st.integers(1, 2 * GRANULARITY)))
_near = st.tuples(st.integers(0, 40), st.integers(1, 30))
_steps = st.lists(st.one_of(
    st.tuples(st.sampled_from(("write", "write", "write_zeroes", "discard")), _near | _ranges),
    st.tuples(st.sampled_from(("release", "release", "release", "release_local")),
              st.tuples(st.integers(0, 20), st.just(0))),
    st.tuples(st.sampled_from(("mark", "settled", "fail", "flush", "reconnect")), st.just((0, 0))),
), max_size=60)


@given(steps=_steps, ack=st.sampled_from(("local", "both")), queue=st.sampled_from((100, 1 << 17, 1 << 24)),
       slow=st.sampled_from((("remote",), ("remote", "local"))))
def test_any_trace(steps: list[tuple[str, tuple[int, int]]], ack: str, queue: int, slow: tuple[str, ...]) -> None:
    trace = Trace(ack, queue, slow)
    for step, (first, second) in steps:
        trace.step(step, first, second)
        trace.check()
    trace.finish()


class Trace:
    """A pair under a random guest, and what must hold at each moment."""

    def __init__(self, ack: str, queue: int, slow: tuple[str, ...]) -> None:
        self.pair = Pair(ack, queue)
        self.ack, self.queue, self.slow = ack, queue, slow
        self.pair.gates.close("remote", *slow)
        self.guest = Content(bytes(self.pair.local.data))
        self.requests: list[Request] = []
        self.largest = SMALL
        self.number = 0
        self.marked: Content | None = None
        self.settling: Request | None = None
        self.remotes = 1

    def step(self, step: str, first: int, second: int) -> None:
        pair, link = self.pair, self.pair.link
        if step in ("write", "write_zeroes", "discard"):
            self.change(step, first, min(second, LENGTH - first))
        elif step in ("release", "release_local"):
            node = "local" if step == "release_local" else pair.remote.name
            indices = [index for index, stop in enumerate(pair.gates.waiting) if stop.node == node]
            if indices:
                pair.gates.release(indices[first % len(indices)])
        elif step == "mark" and link.on and self.marked is None:
            self.marked = self.guest.copy(in_flight=True)
            link.mark()
            self.settling = Request(self.settle(self.marked))
        elif step == "settled" and self.settling and self.settling.ended and link.on:
            assert self.settling.error is None
            link.settled()
            link.release()
            self.marked = self.settling = None
        elif step == "fail":
            link.fail(ConnectionLost("cut"))
            self.marked = self.settling = None
        elif step == "flush":
            self.requests.append(Request(pair.guest.flush()))
        elif step == "reconnect" and not link.on:
            self.reconnect()

    async def settle(self, marked: Content) -> None:
        await self.pair.link.settle()
        assert marked.differs(self.pair.remote.data) is None  # the standby takes its checkpoint here

    def change(self, kind: str, offset: int, length: int) -> None:
        self.number = self.number % 250 + 1
        data = bytes([self.number]) * length if kind == "write" else bytes(length)
        self.largest = max(self.largest, length)
        write = self.guest.begin(offset, data)
        self.requests.append(Request(self.request(kind, write)))

    async def request(self, kind: str, write: Write) -> None:
        guest, length = self.pair.guest, len(write.data)
        if kind == "write":
            await guest.pwrite(write.offset, write.data)
        elif kind == "write_zeroes":
            await guest.write_zeroes(write.offset, length)
        else:
            await guest.discard(write.offset, length)
        self.guest.end(write, True)

    def reconnect(self) -> None:
        """A resync: copies what the bitmaps say, with nothing in flight."""
        pair = self.pair
        pair.gates.open()
        for offset, length in pair.lacks().dirty():
            pair.remote.data[offset:offset + length] = pair.local.data[offset:offset + length]
        assert pair.remote.data == pair.local.data
        self.remotes += 1
        new = gated_disk(pair.graph, pair.gates, f"remote{self.remotes}", bytes(pair.remote.data))
        pair.gates.close(new.name, *self.slow[1:])
        pair.connect(new)

    def check(self) -> None:
        assert all(request.error is None for request in self.requests if request.ended)
        self.pair.check_bitmaps_cover()
        writers = sum(not request.ended for request in self.requests)
        assert self.pair.link.queued <= self.queue + self.largest * (1 + writers)
        if self.ack == "local" and self.slow == ("remote",) and self.pair.link.queued <= self.queue:
            assert all(request.ended for request in self.requests)
        if self.ack == "both" and self.pair.link.on and self.slow == ("remote",) and not writers:
            assert self.pair.remote.data == self.pair.local.data

    def finish(self) -> None:
        """Everything goes on: all requests end, and the standby holds what the primary holds."""
        pair = self.pair
        pair.gates.open()
        if self.settling:
            assert self.settling.ended
            pair.link.release()
            pair.gates.open()
        assert all(request.ended and request.error is None for request in self.requests)
        assert self.guest.differs(pair.local.data) is None
        if pair.link.on:
            assert pair.remote.data == pair.local.data
            assert pair.link.queued == 0


def test_what_the_standby_has_and_this_disk_has_not_yet_is_remembered() -> None:
    """A slow disk of the primary: the checkpoint that has the write is over before the write is."""
    pair = Pair("local")
    pair.gates.close("local")
    request = pair.write(0, b"x")
    pair.link.mark()
    assert Request(pair.link.settle()).ended
    pair.link.settled()
    pair.link.release()
    assert not request.ended
    assert pair.local.data != pair.remote.data
    pair.check_bitmaps_cover()
    pair.gates.open()
    assert request.ended
    assert pair.local.data == pair.remote.data


# --- resize ---


def grow(pair: Pair, length: int) -> None:
    """Both sides, the standby first."""
    Request(pair.remote.truncate(length))
    resized = Request(pair.link.truncate(length))
    assert (resized.ended, resized.error) == (True, None)


@pytest.mark.parametrize("length", [LENGTH + 1, 5 * GRANULARITY, 9 * GRANULARITY + 77])
def test_writes_around_the_old_end_reach_both_sides_after_a_growth(length: int) -> None:
    pair = Pair("both")
    grow(pair, length)
    assert pair.guest.length == length
    for offset in (LENGTH - 100, length - 1):
        assert pair.write(offset, b"x" * min(200, length - offset)).ended
    assert pair.local.data == pair.remote.data
    assert len(pair.local.data) == length
    assert not pair.failures


@pytest.mark.parametrize("length", [LENGTH + 1, 5 * GRANULARITY, 9 * GRANULARITY + 77])
def test_what_was_to_be_copied_is_remembered_through_a_growth_and_what_is_new_with_it(length: int) -> None:
    pair = Pair()
    pair.link.switch_off()
    pair.write(GRANULARITY + 5, b"x")
    pair.write(LENGTH - 1, b"x")
    resized = Request(pair.link.truncate(length))
    assert resized.error is None
    dirty = list(pair.link.since.dirty())
    assert dirty == [(GRANULARITY, GRANULARITY), (4 * GRANULARITY, length - 4 * GRANULARITY)]
    assert pair.link.behind == length - 3 * GRANULARITY


def test_a_growth_while_the_link_is_on_leaves_nothing_to_copy() -> None:
    pair = Pair()
    grow(pair, 8 * GRANULARITY)
    pair.link.switch_off()
    assert pair.link.behind == 0


def test_a_disk_that_cannot_grow_leaves_the_link_as_it_was() -> None:
    pair = Pair()
    pair.gates.fail("local", "truncate", errno.ENOSPC)
    resized = Request(pair.link.truncate(8 * GRANULARITY))
    assert isinstance(resized.error, OSError)
    assert pair.link.length == pair.link.since.length == LENGTH


def test_a_length_for_which_there_is_no_memory_leaves_the_link_and_its_disk_as_they_were() -> None:
    pair = Pair()
    resized = Request(pair.link.truncate(1 << 62))
    assert isinstance(resized.error, OSError)
    assert resized.error.errno == errno.ENOMEM
    assert "a bitmap over 4611686018427387904 bytes takes 8796093022208 bytes of memory" in str(resized.error)
    assert pair.link.length == pair.link.since.length == len(pair.local.data) == LENGTH
