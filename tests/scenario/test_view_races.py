"""The same standbys on storage that suspends: requests race, and a scheduler picks which one goes on.

Every request of every node stops before its effect and after it, so that a reader of the view can be anywhere
between "the hidden disk holds nothing here" and "so I have read the secondary disk" while a primary's write saves
the old content and overwrites it. Whatever the order: a read returns bytes that were in the view at some time
between its start and its end, and never what the primary wrote since the checkpoint.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.block.driver import Extent
from blockstep.drivers.replication import Stage
from blockstep.errors import ReplicationError
from blockstep.testing.model import Content
from tests.scenario.standby import KINDS, LENGTH, Disk, Request, Rig, Shape

#: What follows runs over both kinds of disks; random traces draw the kind.
over_four_disks = pytest.mark.usefixtures("four_disks")

#: What a trace consists of: (what, disk, offset, length), or what and a number.
Step = tuple[str, int, int, int]

_near = st.integers(4000, 4200)
_offsets = st.one_of(_near, st.integers(0, LENGTH - 1))
_lengths = st.one_of(st.integers(1, 200), st.sampled_from((4096, 8192)), st.integers(1, 9000))
_requests = st.tuples(st.sampled_from(("read", "read", "primary write", "primary write", "primary write_zeroes",
                                       "primary discard", "view write", "view write_zeroes", "view discard",
                                       "primary flush", "view flush", "status")),
                      st.integers(0, 1), _offsets, _lengths)
_releases = st.tuples(st.just("release"), st.integers(0, 30), st.integers(1, 6), st.just(0))
_faults = st.tuples(st.sampled_from(("fail secondary read", "fail secondary write", "fail hidden write",
                                     "fail hidden read", "fail active write", "fail active make_empty",
                                     "fail hidden make_empty", "fail secondary write-done")),
                    st.integers(0, 1), st.just(0), st.just(0))
_checkpoints = st.tuples(st.sampled_from(("checkpoint", "checkpoint", "quiesce")), st.just(0), st.just(0), st.just(0))
_ends = st.tuples(st.sampled_from(("failover", "failover", "stop")), st.just(0), st.just(0), st.just(0))
_running = st.lists(st.one_of(_requests, _requests, _releases, _releases, _releases, _checkpoints), max_size=60)
_running_with_faults = st.lists(st.one_of(_requests, _requests, _releases, _releases, _faults, _checkpoints),
                                max_size=40)
_ended = st.lists(st.one_of(_requests, _releases, _releases), max_size=30)


class Races:
    """A rig, its model, and what is in flight."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.model = rig.model()
        self.requests: list[Request] = []
        self.number = 0
        self.faulty = False
        #: The operation of the registry that goes on.
        self.op = ""
        #: What was wrong. Collected, since they are met in the frames of those who resume a request.
        self.wrong: list[str] = []
        # What the model is told when the operation of the registry has ended: requests that came after its begin
        # were held back, and belong to the time after it.
        self._later: list[Callable[[], None]] | None = None

    async def run(self, steps: list[Step], *closed: str) -> None:
        await self.rig.registry.start_all("secondary")
        self._closed = closed
        self.rig.gates.close(*closed)
        for step in steps:
            await self.step(*step)
            await self.turn()
            assert not self.wrong
        await self.quiesce()
        await self.rig.close()

    async def turn(self) -> None:
        """Let jobs go on, which are tasks."""
        for _ in range(3):
            await asyncio.sleep(0)

    async def step(self, what: str, disk: int, offset: int, length: int) -> None:
        gates = self.rig.gates
        if what == "release":
            for _ in range(offset):
                if gates.waiting:
                    gates.release(disk)
        elif what == "quiesce":
            await self.quiesce()
            gates.close(*self._closed)
        elif what.startswith("fail "):
            _, node, event = what.split()
            self.faulty = True
            gates.fail(f"{self.disk(disk).name}-{node}", event)
        elif what in ("checkpoint", "failover", "stop"):
            if not self.op:
                self.operate(what)
        else:
            self.submit(what, self.disk(disk), offset, min(length, LENGTH - offset))

    def disk(self, number: int) -> Disk:
        return self.rig.disks[number % len(self.rig.disks)]

    # --- operations of the registry ---

    def operate(self, what: str) -> None:
        registry = self.rig.registry
        if self.rig.disks[0].filter.stage is not Stage.RUNNING:
            return
        self.op = what
        if what != "failover":  # which does not hold back the view
            self._later = []
        operation = registry.checkpoint_all() if what == "checkpoint" else registry.stop_all(what == "failover")
        # The last request that it waited for wakes it before it returns itself: let that one be heard first.
        loop = asyncio.get_running_loop()
        self.requests.append(Request(operation, lambda _, error: loop.call_soon(self.operated, error)))

    def operated(self, error: BaseException | None) -> None:
        what, self.op = self.op, ""
        if error is not None and not (what == "checkpoint" and self.faulty and isinstance(error, ReplicationError)):
            self.wrong.append(f"{what}: {error!r}")
        if what == "checkpoint" and error is None:
            self.model.checkpoint()
        elif what == "stop":
            self.model.stop()
        later, self._later = self._later or [], None
        for tell in later:
            tell()

    def tell(self, event: Callable[[], None], held: list[Callable[[], None]] | None) -> None:
        """Tell the model now; or after the operation that holds back the request, if it goes on."""
        if held is not None and held is self._later:
            held.append(event)
        else:
            event()

    # --- requests ---

    def submit(self, what: str, disk: Disk, offset: int, length: int) -> None:
        if what == "read":
            self.read(disk, offset, length)
        elif what == "status":
            self.status(disk, offset, length)
        elif what.endswith("flush"):
            user = disk.primary if what.startswith("primary") else disk.view
            self.requests.append(Request(user.flush(), lambda _, error: self.may_fail(error)))
        else:
            who, kind = what.split()
            self.number = self.number % 255 + 1
            data = bytes([self.number]) * length if kind == "write" else bytes(length)
            self.write(disk, who, kind, offset, data)

    def read(self, disk: Disk, offset: int, length: int) -> None:
        self.look(disk, offset, length, disk.view.pread(offset, length), lambda _, data: bytes(data))

    def status(self, disk: Disk, offset: int, length: int) -> None:
        """What is said to be zero must be."""

        def got(base: bytes, extents: list[Extent]) -> bytes:
            assert sum(extent.length for extent in extents) == length
            data, at = bytearray(base), 0
            for extent in extents:
                if extent.zero:
                    data[at:at + extent.length] = bytes(extent.length)
                at += extent.length
            return bytes(data)

        self.look(disk, offset, length, disk.view.block_status(offset, length), got)

    def look(self, disk: Disk, offset: int, length: int, request: Coroutine[Any, Any, Any],
             got: Callable[[bytes, Any], bytes]) -> None:
        begun: list[tuple[Content, Any]] = []
        held = self._later

        def begin() -> None:
            content = self.model.disks[disk.name].view
            begun.append((content, content.begin_read(offset, length)))

        def end(value: Any, error: BaseException | None) -> None:
            def tell() -> None:
                content, read = begun.pop()
                self.may_fail(error)
                if wrong := content.end_read(read, read.base if error else got(read.base, value)):
                    self.wrong.append(f"look at {length} bytes at {offset} of {disk.name}: {wrong}")

            self.tell(tell, held)

        self.tell(begin, held)
        self.requests.append(Request(request, end))

    def write(self, disk: Disk, who: str, kind: str, offset: int, data: bytes) -> None:
        begun: list[tuple[Content, Any]] = []
        held = self._later
        user = disk.primary if who == "primary" else disk.view

        def begin() -> None:
            modelled = self.model.disks[disk.name]
            content = modelled.secondary if who == "primary" else modelled.view
            begun.append((content, content.begin(offset, data)))

        def end(_: Any, error: BaseException | None) -> None:
            def tell() -> None:
                content, write = begun.pop()
                refused = isinstance(error, OSError) and error.errno == errno.ESHUTDOWN
                if not (refused and who == "primary" and disk.filter.failed_over):
                    self.may_fail(error)
                content.end(write, error is None and kind != "discard")

            self.tell(tell, held)

        self.tell(begin, held)
        request = {"write": lambda: user.pwrite(offset, data), "discard": lambda: user.discard(offset, len(data)),
                   "write_zeroes": lambda: user.write_zeroes(offset, len(data))}[kind]
        self.requests.append(Request(request(), end))

    def may_fail(self, error: BaseException | None) -> None:
        if error is not None and not (self.faulty and isinstance(error, OSError)):
            self.wrong.append(repr(error))

    # --- the whole ---

    async def quiesce(self) -> None:
        """Let all go on to its end, and look at everything."""
        rig = self.rig
        rig.gates.open()
        await rig.merged()
        await over(*self.requests)
        await self.turn()
        rig.gates.heal()
        self.faulty = False
        assert not self.wrong
        assert all(request.ended for request in self.requests)
        self.requests.clear()
        for disk in rig.disks:
            modelled = self.model.disks[disk.name]
            view = await disk.read_view()
            assert not (wrong := modelled.view.differs(view)), f"view of {disk.name}: {wrong}"
            modelled.view.adopt(view)
            if disk.filter.stage in (Stage.RUNNING, Stage.DONE):
                content = modelled.view if disk.filter.failed_over else modelled.secondary
                assert not (wrong := content.differs(disk.secondary.data)), f"secondary of {disk.name}: {wrong}"
                content.adopt(disk.secondary.data)


async def over(*requests: Request) -> None:
    """Let them end that wait for nothing but tasks: nodes that are not needed any more are closed in some."""
    for _ in range(200):
        if all(request.ended for request in requests):
            return
        await asyncio.sleep(0)


def run(steps: list[Step], *closed: str, names: str = "a", shape: Shape) -> None:
    async def main() -> None:
        await Races(await Rig.open(tuple(names), shape)).run(steps, *closed)

    asyncio.run(main())


_shapes = st.builds(Shape, st.sampled_from((512, 4096, 65536)), st.sampled_from((512, 4096, 65536)),
                    kind=st.sampled_from(KINDS))
_closed = st.sampled_from(((), ("a-secondary",), ("a-secondary", "b-secondary"), ("a-hidden", "a-secondary"),
                           ("a-active", "a-secondary")))


@given(steps=_running, closed=_closed, shape=_shapes, names=st.sampled_from(("a", "ab")))
def test_readers_of_a_running_view_never_see_newer_data(steps: list[Step], closed: tuple[str, ...], shape: Shape,
                                                         names: str) -> None:
    run(steps, *closed, names=names, shape=shape)


@given(steps=_running_with_faults, closed=_closed, shape=_shapes)
def test_faults_in_any_layer_never_show_newer_data(steps: list[Step], closed: tuple[str, ...],
                                                   shape: Shape) -> None:
    run(steps, *closed, shape=shape)


@given(before=_running, end=_ends, after=_ended, closed=_closed, shape=_shapes, names=st.sampled_from(("a", "ab")))
def test_requests_race_with_the_end(before: list[Step], end: Step, after: list[Step], closed: tuple[str, ...],
                                    shape: Shape, names: str) -> None:
    # The disks stop one after the other: with more than one, what comes meanwhile belongs to either side of it.
    run([*before, end, *after], *closed, names="a" if end[0] == "stop" else names, shape=shape)


@given(before=_running, fault=_faults, after=st.lists(st.one_of(_requests, _releases, _releases), max_size=40),
       closed=_closed, shape=_shapes)
def test_requests_race_with_a_failover_that_fails(before: list[Step], fault: Step, after: list[Step],
                                                  closed: tuple[str, ...], shape: Shape) -> None:
    run([*before, fault, ("failover", 0, 0, 0), *after, ("quiesce", 0, 0, 0), *after], *closed, shape=shape)


_spot = st.tuples(st.sampled_from(("read", "read", "primary write", "primary write", "view write",
                                   "primary write_zeroes")),
                  st.just(0), st.sampled_from((4000, 4090, 4096, 5000)), st.sampled_from((1, 10, 200, 4096)))
_one_release = st.tuples(st.just("release"), st.integers(0, 5), st.just(1), st.just(0))


@given(steps=st.lists(st.one_of(_spot, _one_release, _one_release), min_size=6, max_size=40),
       closed=st.sampled_from((("a-secondary",), ("a-hidden", "a-secondary"), ("a-active", "a-secondary"))),
       shape=_shapes)
def test_readers_race_with_copy_before_write_of_one_cluster(steps: list[Step], closed: tuple[str, ...],
                                                            shape: Shape) -> None:
    run(steps, *closed, shape=shape)


# --- the races that have bitten others, one by one ---


class Scene:
    """One disk whose gates are closed where the scene needs it."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.gates, self.disk = rig, rig.gates, rig.disks[0]
        self.before = bytes(rig.disks[0].secondary.data)

    def wait_at(self, node: str, event: str) -> None:
        """Let all go on until one waits there."""
        while not any((stop.node, stop.event) == (node, event) for stop in self.gates.waiting):
            self.gates.release(0)


def scene(play: Callable[[Scene], None], active: int = 4096, hidden: int = 4096) -> None:
    async def main() -> None:
        rig = await Rig.open(shape=Shape(active, hidden))
        await rig.registry.start_all("secondary")
        play(Scene(rig))
        await rig.close()

    asyncio.run(main())


@over_four_disks
def test_an_overwrite_waits_for_a_reader_that_found_nothing_in_the_hidden_disk() -> None:
    """The reader is about to read the secondary disk when the primary overwrites the same cluster."""

    def play(s: Scene) -> None:
        s.gates.close("a-secondary")
        reader = Request(s.disk.view.pread(4096, 4096))
        assert [stop.event for stop in s.gates.waiting] == ["read"]
        writer = Request(s.disk.primary.pwrite(4096, b"N" * 4096))
        assert len(s.gates.waiting) == 1, "the writer must not even save the cluster"
        s.gates.open()
        assert reader.value == s.before[4096:8192]
        assert writer.ended

    scene(play)


@over_four_disks
def test_a_reader_waits_for_a_cluster_that_is_being_saved() -> None:
    def play(s: Scene) -> None:
        s.gates.close("a-hidden", "a-secondary")
        writer = Request(s.disk.primary.pwrite(4096, b"N" * 4096))
        s.wait_at("a-secondary", "write-done")  # overwritten, and not acknowledged
        reader = Request(s.disk.view.pread(4000, 200))
        assert not reader.ended
        s.gates.open()
        assert reader.value == s.before[4000:4200]
        assert writer.ended

    scene(play)


@over_four_disks
def test_block_status_of_a_view_does_not_take_newer_zeroes_for_the_checkpoints() -> None:
    """Neither active nor hidden disk hold the range when they are asked; the primary's zeroes come before the third."""

    def play(s: Scene) -> None:
        s.gates.close("a-secondary")
        asker = Request(s.disk.view.block_status(4096, 4096))
        assert [stop.event for stop in s.gates.waiting] == ["block_status"]
        writer = Request(s.disk.primary.write_zeroes(4096, 4096))
        assert len(s.gates.waiting) == 1, "the writer must not even save the cluster"
        s.gates.open()
        assert [extent.zero for extent in asker.value] == [False]
        assert writer.ended

    scene(play)


@over_four_disks
def test_a_second_overwrite_waits_until_the_first_has_saved_the_cluster() -> None:
    def play(s: Scene) -> None:
        s.gates.close("a-hidden")
        first = Request(s.disk.primary.pwrite(4096, b"1" * 100))
        second = Request(s.disk.primary.pwrite(5000, b"2" * 100))
        assert s.disk.secondary.data == s.before, "nothing is overwritten before it is saved"
        s.gates.open()
        assert first.ended
        assert second.ended
        reader = Request(s.disk.view.pread(0, 8192))
        assert reader.value == s.before[:8192]

    scene(play)


@over_four_disks
@pytest.mark.parametrize(("active", "primary_at"), [(4096, 4900), (65536, 12288)])
def test_a_part_of_a_cluster_is_completed_from_the_checkpoint(active: int, primary_at: int) -> None:
    """The guest writes a part of a cluster; the rest is about to be read from below when the primary overwrites it."""

    def play(s: Scene) -> None:
        s.gates.close("a-secondary")
        guest = Request(s.disk.view.pwrite(4096 + 200, b"G" * 100))
        while s.gates.waiting[0].event != "read" or s.gates.waiting[0].offset < 4096 + 300:
            s.gates.release(0)  # the head of the cluster has been read, the tail not yet
        primary = Request(s.disk.primary.pwrite(primary_at, b"N" * 1000))
        assert len(s.gates.waiting) == 1, "the primary must not even save the cluster"
        s.gates.open()
        assert guest.ended
        assert primary.ended
        reader = Request(s.disk.view.pread(0, LENGTH))
        expected = bytearray(s.before)
        expected[4296:4396] = b"G" * 100
        assert reader.value == expected

    scene(play, active=active)


@over_four_disks
def test_a_checkpoint_waits_for_what_is_in_flight_and_holds_back_what_comes() -> None:
    def play(s: Scene) -> None:
        s.gates.close("a-secondary")
        before = Request(s.disk.primary.pwrite(0, b"1" * 4096))
        checkpoint = Request(s.rig.registry.checkpoint_all())
        after = Request(s.disk.primary.pwrite(0, b"2" * 4096))
        reader = Request(s.disk.view.pread(0, 4096))
        assert not any(request.ended for request in (before, checkpoint, after, reader))
        s.gates.open()
        assert before.ended
        assert checkpoint.ended
        assert after.ended
        assert reader.value == b"1" * 4096
        assert s.disk.secondary.data[:4096] == b"2" * 4096

    scene(play)


@over_four_disks
def test_a_write_of_the_old_primary_that_is_in_flight_ends_before_the_failover_and_the_next_is_refused() -> None:
    async def main() -> None:
        rig = await Rig.open()
        await rig.registry.start_all("secondary")
        disk, before = rig.disks[0], bytes(rig.disks[0].secondary.data)
        rig.gates.close("a-secondary")
        in_flight = Request(disk.primary.pwrite(0, b"1" * 4096))
        failover = Request(rig.registry.stop_all(True))
        late = Request(disk.primary.pwrite(4096, b"2" * 4096))
        assert not failover.ended
        rig.gates.open()
        await over(failover)
        await rig.merged()
        assert in_flight.error is None
        assert isinstance(late.error, OSError)
        assert late.error.errno == errno.ESHUTDOWN
        assert bytes(disk.secondary.data) == before == await disk.read_view()
        await rig.close()

    asyncio.run(main())


@over_four_disks
@pytest.mark.parametrize("second", ["checkpoint", "failover", "stop"])
@pytest.mark.parametrize("first", ["checkpoint", "failover", "stop"])
def test_operations_of_the_registry_take_turns(first: str, second: str) -> None:
    """A failover that comes while a checkpoint is half prepared must not merge disks that are then emptied."""

    async def main() -> None:
        rig = await Rig.open(("a", "b"))
        await rig.enter("running")
        expected = rig.model()
        for disk in rig.disks:
            expected.disks[disk.name].view.adopt(await disk.read_view())
        rig.gates.close()
        operations = {"checkpoint": rig.registry.checkpoint_all, "failover": lambda: rig.registry.stop_all(True),
                      "stop": lambda: rig.registry.stop_all(False)}
        told = {"checkpoint": expected.checkpoint, "failover": expected.fail_over, "stop": expected.stop}
        requests = [Request(operations[name]()) for name in (first, second)]
        for _ in range(20):  # the second one gets as far as it can before the first one's storage moves
            await asyncio.sleep(0)
        rig.gates.open()
        await rig.merged()
        for _ in range(50):
            await asyncio.sleep(0)
        await rig.merged()
        assert all(request.ended for request in requests)
        for name, request in zip((first, second), requests, strict=True):
            assert request.error is None or isinstance(request.error, ReplicationError)
            if request.error is None and (name == first or first == "checkpoint"):
                told[name]()
        for disk in rig.disks:
            assert not (wrong := expected.disks[disk.name].view.differs(await disk.read_view())), wrong
        await rig.close()

    asyncio.run(main())


@over_four_disks
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_checkpoint_is_not_given_up_under_a_request_of_the_view(what: str) -> None:
    """It may be in a thread with a file that emptying closes, and whose number the next file gets."""

    async def main() -> None:
        rig = await Rig.open()
        await rig.registry.start_all("secondary")
        disk = rig.disks[0]
        before = bytes(disk.secondary.data)
        await disk.primary.pwrite(0, b"n" * 4096)
        rig.gates.close("a-hidden", "a-active")
        request = Request(disk.view.pread(0, 4096) if what == "read" else disk.view.pwrite(0, b"v" * 4096))
        giving_up = asyncio.create_task(rig.registry.give_up_all())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not any(stop.event == "make_empty" for stop in rig.gates.waiting)
        assert not request.ended
        assert not giving_up.done()
        rig.gates.open()
        await giving_up
        assert request.ended
        assert request.error is None
        if what == "read":
            assert request.value == before[:4096]
        await rig.close()

    asyncio.run(main())


@over_four_disks
def test_a_checkpoint_and_giving_it_up_take_turns() -> None:
    """The checkpoint has prepared one disk of two ► the buffer is to be given up ► the checkpoint goes on."""

    async def main() -> None:
        rig = await Rig.open(("a", "b"))
        await rig.enter("running")
        rig.gates.close("b-active")
        checkpoint = Request(rig.registry.checkpoint_all())
        giving_up = Request(rig.registry.give_up_all())
        assert [stop.event for stop in rig.gates.waiting] == ["make_empty"]
        assert {disk.filter.stage for disk in rig.disks} == {Stage.RUNNING}
        rig.gates.open()
        await _all_ended(checkpoint, giving_up)
        assert (checkpoint.error, giving_up.error) == (None, None)
        assert {disk.filter.stage for disk in rig.disks} == {Stage.NONE}
        await rig.close()

    asyncio.run(main())


@over_four_disks
@pytest.mark.parametrize("failing", ["a-active", "a-hidden", "b-active", "b-hidden"])
def test_a_checkpoint_that_is_given_up_is_given_up_on_all_disks_also_if_one_cannot_be_emptied(failing: str) -> None:
    """Else the others run on, and can be neither moved forward nor started anew."""

    async def main() -> None:
        rig = await Rig.open(("a", "b"))
        await rig.enter("running")
        rig.gates.fail(failing, "make_empty")
        with pytest.raises(OSError, match=f"injected into make_empty of '{failing}'"):
            await rig.registry.give_up_all()
        assert {disk.filter.stage for disk in rig.disks} == {Stage.NONE}
        await rig.registry.start_all("secondary")
        assert [await disk.read_view() for disk in rig.disks] == [disk.secondary.data for disk in rig.disks]
        await rig.close()

    asyncio.run(main())


@over_four_disks
def test_a_start_waits_until_the_old_checkpoint_is_given_up() -> None:
    """The first disk's buffer is being emptied ► a new start ► what it saves must not be emptied under it."""

    async def main() -> None:
        rig = await Rig.open(("a", "b"))
        await rig.enter("running")
        rig.gates.close("a-active")
        giving_up = Request(rig.registry.give_up_all())
        await _turns()
        starting = Request(rig.registry.start_all("secondary"))
        assert rig.disks[0].filter.stage is Stage.NONE
        assert len(rig.gates.waiting) == 1
        rig.gates.open()
        await _all_ended(giving_up, starting)
        assert (giving_up.error, starting.error) == (None, None)
        expected = [await disk.read_view() for disk in rig.disks]
        for disk in rig.disks:
            await disk.primary.pwrite(0, b"X" * 8192)
        assert [await disk.read_view() for disk in rig.disks] == expected
        await rig.close()

    asyncio.run(main())


@over_four_disks
@pytest.mark.parametrize("operation", ["checkpoint", "failover"])
def test_an_operation_that_comes_while_a_checkpoint_is_given_up_finds_none(operation: str) -> None:
    """Not one disk with a checkpoint and one without."""

    async def main() -> None:
        rig = await Rig.open(("a", "b"))
        await rig.enter("running")
        rig.gates.close("b-active")
        giving_up = Request(rig.registry.give_up_all())
        await _turns()
        registry = rig.registry
        late = Request(registry.checkpoint_all() if operation == "checkpoint" else registry.stop_all(True))
        assert not late.ended
        rig.gates.open()
        await _all_ended(giving_up, late)
        assert isinstance(late.error, ReplicationError)
        assert "not running" in str(late.error)
        assert {disk.filter.stage for disk in rig.disks} == {Stage.NONE}
        await rig.close()

    asyncio.run(main())


@over_four_disks
def test_writes_of_the_view_after_a_failed_merge_do_not_get_lost_in_each_others_copy_up() -> None:
    """A write into the active disk copies the rest of its cluster up, while another writes there, past it."""

    async def main() -> None:
        rig = await Rig.open(shape=Shape(active_cluster=8192))
        await rig.registry.start_all("secondary")
        disk = rig.disks[0]
        await disk.primary.pwrite(4096, b"P" * 4096)  # its old content is in the hidden disk
        rig.gates.fail(disk.secondary.name, "write", always=True)
        await rig.registry.stop_all(True)
        await rig.merged()
        rig.gates.heal()
        assert disk.filter.stage is Stage.FAILOVER_FAILED
        view = bytearray(await disk.read_view())
        rig.gates.close(disk.secondary.name)
        above = Request(disk.view.pwrite(5000, b"above"))
        assert rig.gates.release().event == "read"  # it has the old bytes of the cluster's first half
        past = Request(disk.view.pwrite(100, b"past"))
        rig.gates.open()
        await _all_ended(above, past)
        view[5000:5005], view[100:104] = b"above", b"past"
        assert await disk.read_view() == view
        await rig.close()

    asyncio.run(main())


async def _turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def _all_ended(*requests: Request) -> None:
    await _turns()
    assert all(request.ended for request in requests)
