"""The model of a standby: what it allows, and what it does not."""

from __future__ import annotations

import pytest

from blockstep.testing.model import Content, Standby


def test_a_write_that_ended_well_leaves_one_content() -> None:
    content = Content(b"......")
    content.write(1, b"ab")
    assert content.differs(b".ab...") is None
    assert content.differs(b".a....") == "byte 2 is 0x2e, not 0x62"


def test_a_write_that_failed_leaves_old_or_new_byte_by_byte_and_only_there() -> None:
    content = Content(b"....")
    content.may_write(1, b"ab")
    for possible in (b"....", b".ab.", b".a..", b"..b."):
        assert content.differs(possible) is None
    for impossible in (b".b..", b"a...", b"...b"):
        assert content.differs(impossible)


def test_a_doubt_ends_when_it_is_looked_at_or_written_over() -> None:
    content = Content(b"....")
    content.may_write(0, b"abcd")
    content.write(1, b"xy")
    assert content.differs(b"axyd") is None
    assert content.differs(b"abyd")
    content.adopt(b".xyd")
    assert content.differs(b"axyd")


def test_of_two_writes_in_flight_together_either_wins() -> None:
    content = Content(b"....")
    one = content.begin(0, b"aaa")
    other = content.begin(1, b"bbb")
    content.end(one, True)
    content.end(other, True)
    assert content.differs(b"aaab") is None
    assert content.differs(b"abbb") is None
    assert content.differs(b"a..b"), "one of them is there"
    assert content.differs(b".bbb"), "where only one has written there is no doubt"


def test_of_three_writes_in_flight_together_any_wins() -> None:
    content = Content(b".")
    writes = [content.begin(0, data) for data in (b"a", b"b", b"c")]
    for write in writes:
        content.end(write, True)
    assert [content.differs(bytes([byte])) is None for byte in b"abc."] == [True, True, True, False]
    content.write(0, b"d")
    assert content.differs(b"a")


def test_a_read_may_return_what_was_there_at_any_time_while_it_ran() -> None:
    content = Content(b"..")
    early = content.begin_read(0, 2)
    content.write(0, b"a")
    write = content.begin(1, b"b")
    late = content.begin_read(0, 2)
    content.end(write, True)
    assert content.end_read(early, b"..") is None
    assert content.end_read(late, b".b"), "the first write had ended before"


def test_a_read_that_failed_or_ended_hears_no_more_of_writes() -> None:
    content = Content(b".")
    read = content.begin_read(0, 1)
    content.end_read(read, b".")
    content.write(0, b"a")
    assert content.differs(b".")


def test_a_checkpoint_takes_doubts_along_and_not_what_is_in_flight() -> None:
    content = Content(b"...")
    content.may_write(0, b"a")
    content.begin(1, b"b")
    assert content.copy().differs(b"a..") is None
    assert content.copy().differs(b".b.")
    assert content.copy(in_flight=True).differs(b"ab.") is None


@pytest.mark.parametrize(("end", "expected"), [("checkpoint", b"pp."), ("stop", b"pp."), ("fail_over", b"..v")])
def test_the_ways_to_go_on(end: str, expected: bytes) -> None:
    standby = Standby({"a": b"...", "b": b"..."})
    for disk in standby.disks.values():
        disk.secondary.write(0, b"pp")
        disk.view.write(2, b"v")
        assert disk.view.differs(b"..v") is None
    getattr(standby, end)()
    for disk in standby.disks.values():
        assert disk.view.differs(expected) is None
        shared = disk.view is disk.secondary
        assert shared is (end != "checkpoint")
