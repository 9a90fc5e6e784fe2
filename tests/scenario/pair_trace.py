"""A trace: what befalls a pair, step by step.

A `Request` is begun and not waited for, so that those that follow, and the steps that follow, find it in flight. A
`Fault` lets disks fail. All else is a `Do`:

    turn           the event loop turns ``amount`` times: requests get half of their way
    wait           all that has been begun ends
    sleep          ``amount`` seconds go by
    checkpoint, resize, failover, latest, stop     the command; with ``begin`` it is not waited for
    stuck          the next checkpoint finds a buffer of the disk that cannot be emptied
    cut, hang      the connections are reset; they live on and carry nothing any more
    down, slow, up the network: new connections are reset; it carries little; it is as in the beginning
    bounce-standby, bounce-primary     the program ends in good order and begins again
    crash-standby, crash-primary       the program dies, and begins again
    recover        everything is mended, and the pair has to be healthy in the end

After each step that is no request `Checks.check` says what must hold. A trace ends with a recovery, an end of both
programs in good order, and a pair with the roles exchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from blockstep.block.driver import Driver
from blockstep.errors import BlockstepError, OptionError, ReplicationError
from blockstep.nbd import constants as c
from blockstep.nbd.client import Client
from blockstep.replication.coordinator import State
from blockstep.testing.clock import run, until
from tests.scenario.pair_checks import NOTICES, Checks
from tests.scenario.pair_steps import Do, Fault, Request, Step
from tests.scenario.pair_world import MAX_STALL, Shape, World

#: Seconds in which a pair that has been mended is healthy again: some attempts, the last of them 5 s after the others.
RECOVERS: Final = 60.0
#: How much longer than `MAX_STALL` a guest may wait.
MARGIN: Final = 0.5 * MAX_STALL
RECOVER: Final = Do("recover")


class Player(Checks):
    """Plays a trace over a world."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.log: list[str] = []
        self.number = 0
        self.network_up = True
        #: Connections have swallowed something, and live on.
        self.hanging = False
        #: The standby had ended when the primary that runs had begun, or has since.
        self.was_ended = False
        #: On which sides disks may fail.
        self.failing: set[str] = set()
        self.stuck_node: Driver | None = None

    async def play(self, steps: Sequence[Step]) -> None:
        await self.recover()
        for step in steps:
            await self.step(step)
        await self.step(Do("wait"))
        await self.finish()

    async def step(self, step: Step) -> None:
        self.log.append(f"    {step!r},")
        if isinstance(step, Request):
            self.request(step)
            return
        if isinstance(step, Fault):
            self.fail(step)
            return
        doing: Coroutine[Any, Any, None] = getattr(self, step.what.replace("-", "_"))(step)
        if step.begin:
            self.begin(doing)
            await asyncio.sleep(0)
        else:
            await doing
        await self.check()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.bugs.append(f"{type(error).__name__}: {error}")

    # --- requests ---

    def request(self, step: Request) -> None:
        """Begin a request, if there is anybody to take it."""
        name = self.world.names[step.disk % len(self.world.names)]
        client = self.world.clients.get((step.side, name))
        if client is None:
            return
        content = self.model.disks[name].content(step.side)
        size = len((content or self.model.disks[name].primary).data)
        offset = step.offset % size
        self.begin(self.carry(step, name, client, offset, min(step.length, size - offset)))

    def carry(self, step: Request, name: str, client: Client, offset: int, length: int) -> Coroutine[Any, Any, None]:
        """The request itself: in flight in the model from now on."""
        self.number = self.number % 255 + 1
        data = bytes([self.number]) * length if step.what == "write" else bytes(length)
        send: Callable[[], Awaitable[Any]] = {
            "read": lambda: client.pread(offset, length),
            "write": lambda: client.pwrite(offset, data, step.flags & c.CMD_FLAG_FUA),
            "zeroes": lambda: client.write_zeroes(offset, length, step.flags),
            "discard": lambda: client.discard(offset, length), "flush": client.flush}[step.what]
        disk = self.model.disks[name]
        content = disk.content(step.side)
        write = disk.begin(step.side, offset, data) if step.what not in ("read", "flush") else None
        read = content.begin_read(offset, length) if content and step.what == "read" else None
        if write and step.side == "guest":
            self.world.written(offset, length)
        elif write:
            self.model.view_written()
            if self.turning:
                self.meanwhile.append((name, write))
        moves = self.model.moves if not self.turning else -1

        async def carried() -> None:
            loop = asyncio.get_running_loop()
            began, error = loop.time(), None
            try:
                got = await send()
            except OSError as failure:
                error = failure
            else:
                if content and read and (moves == self.model.moves or step.side == "guest"):
                    wrong = content.end_read(read, bytes(got))
                    assert not wrong, f"{step} of disk {name}: {wrong}"
            if write:
                done = error is None and step.what != "discard"
                fast = error is not None and error.errno == errno.ENOTSUP and step.flags & c.CMD_FLAG_FAST_ZERO
                disk.end(step.side, write, done, failed=error is not None and not fast)
            self.judge(step, name, error, loop.time() - began)

        return carried()

    def judge(self, step: Request, name: str, error: OSError | None, seconds: float) -> None:
        """Whether a request may end like this."""
        if step.side == "guest":
            assert seconds <= MAX_STALL + MARGIN, f"a guest has waited {seconds} s: {step}"
            excused = "disk" in self.failing
        else:
            excused = "secondary" in self.failing or not self.model.has_view or not self.shape.ample
            excused |= not self.world.standby_running
        if error is not None and error.errno == errno.ENOTSUP and step.flags & c.CMD_FLAG_FAST_ZERO:
            return
        assert error is None or excused, f"{step} of disk {name} failed: {error}"

    # --- faults, time and network ---

    def fail(self, step: Fault) -> None:
        name = f"{self.world.names[step.disk % len(self.world.names)]}-{step.side}"
        for node in self.world.faulty():
            if node.name == name:
                node.fail(step.event, step.code, once=not step.always)
                self.calm = False
                self.failing.add(step.side)

    async def stuck(self, step: Do) -> None:
        """The next checkpoint is not taken: one of the buffers cannot be emptied."""
        if not self.world.standby_running:
            return
        name = self.world.names[step.disk % len(self.world.names)]
        node = self.world.standby.graph.nodes.get(f"{name}-{'hidden' if step.amount else 'active'}")
        if node is None:
            return
        self.calm = False

        async def prepare_empty() -> Any:
            self.unstick()
            raise OSError(errno.ENOSPC, "stuck")

        self.unstick()
        self.stuck_node = node
        node.prepare_empty = prepare_empty  # type: ignore[method-assign]

    def unstick(self) -> None:
        if self.stuck_node:
            del self.stuck_node.prepare_empty
            self.stuck_node = None

    async def turn(self, step: Do) -> None:
        for _ in range(int(step.amount)):
            await asyncio.sleep(0)

    async def wait(self, step: Do) -> None:
        async with asyncio.timeout(RECOVERS):
            while self.running:
                await asyncio.wait(self.running)

    async def sleep(self, step: Do) -> None:
        await asyncio.sleep(step.amount)
        if step.amount > NOTICES and not self.network_up and not self.ended:
            self.check_alone()

    async def cut(self, step: Do) -> None:
        self.calm = False
        self.world.proxy.cut()

    async def hang(self, step: Do) -> None:
        self.calm = self.network_up = False
        self.hanging = True
        self.world.proxy.half_open()

    async def down(self, step: Do) -> None:
        self.calm = self.network_up = False
        self.world.proxy.closed = True
        self.world.proxy.cut()

    async def slow(self, step: Do) -> None:
        self.calm = False
        self.world.proxy.rate, self.world.proxy.delay = 1 << 20, 0.01

    async def up(self, step: Do) -> None:
        self.network_up = True
        self.world.proxy.heal()

    # --- commands ---

    async def checkpoint(self, step: Do) -> None:
        calm, world = self.calm, self.world
        if not world.primary_running:
            return
        try:
            await world.primary.checkpoint()
        except BlockstepError as error:
            forgive(error, not (calm and self.calm))

    async def resize(self, step: Do) -> None:
        world, calm = self.world, self.calm
        if not world.primary_running:
            return
        name = world.names[step.disk % len(world.names)]
        try:
            await world.primary.resize(name, world.primary.disks[name].link.length + int(step.amount))
        except BlockstepError as error:
            overtaken = isinstance(error, OptionError)  # by another one
            forgive(error, overtaken or not (calm and self.calm))
        self.learn_lengths()

    async def bounce_standby(self, step: Do) -> None:
        self.calm = False
        world = self.world
        await self.wait(step)
        if not world.standby_running:
            return
        kept = self.model.has_view and self.ended != "stop"
        try:
            await world.stop_standby()
        except (BlockstepError, OSError) as error:
            forgive(error, "secondary" in self.failing)
            kept = False
        if kept:
            await self.files_are_the_views()
        if self.ended in ("failover", "latest"):
            try:
                await world.start_standby()
            except OptionError as error:
                forgive(error, "was promoted" in str(error))
                return
            raise AssertionError("a standby that was promoted is one again")
        self.ended = ""
        self.model.standby_ended(kept, world.follows)
        await world.start_standby()
        assert world.standby.situation.running == kept, world.standby.status()

    async def crash_standby(self, step: Do) -> None:
        world = self.world
        if self.ended or not world.standby_running:
            return
        self.calm = False
        await world.crash_standby()
        if world.primary.standby.known_as != world.standby.following.instance:  # it was just being attached
            self.model.known = self.model.known and None
        self.model.standby_ended(False, world.follows)
        await world.start_standby()
        assert not world.standby.situation.running, world.standby.status()

    async def crash_primary(self, step: Do) -> None:
        world = self.world
        await self.wait(step)
        if not world.primary_running:
            return
        self.calm = False
        await world.crash_primary()
        if not world.keeps_books:
            self.model.known = False
        elif world.primary.standby.known_as != world.standby.situation.instance:  # it was just attaching
            self.model.known = self.model.known and None
        await world.start_primary()
        self.was_ended = bool(self.ended)

    async def bounce_primary(self, step: Do) -> None:
        self.calm = False
        await self.wait(step)
        if not self.world.primary_running:
            return
        stale = self.world.primary.coordinator.state in (State.FENCED, State.STOPPED)
        try:
            await self.world.stop_primary()
        except OSError as error:
            forgive(error, "disk" in self.failing)
            stale = True
        if stale:
            self.model.known = False
        elif self.world.primary.standby.known_as != self.world.standby.situation.instance:  # it was just attaching
            self.model.known = self.model.known and None
        await self.world.start_primary()
        self.was_ended = bool(self.ended)

    # --- ends ---

    async def failover(self, step: Do) -> None:
        await self.end("failover", lambda: self.world.standby.fail_over("checkpoint"))

    async def latest(self, step: Do) -> None:
        await self.end("latest", lambda: self.world.standby.fail_over("latest"))

    async def stop(self, step: Do) -> None:
        await self.end("stop", lambda: self.world.standby.stop_replication())

    async def end(self, how: str, command: Callable[[], Awaitable[Any]]) -> None:
        """The standby's life with its primary ends, or the command is refused and nothing has happened."""
        world = self.world
        situation = world.standby.situation
        if not world.standby_running or (self.ended and not situation.unfinished):
            return
        if self.ended:
            await self.go_on()
            return
        may = situation.running and (how == "failover" or not situation.mixed) and "secondary" not in self.failing
        whole = situation.primary is not None and (self.nothing_under_way() or self.all_acknowledged())
        now = {name: disk.primary.begin_read(0, len(disk.primary.data)) for name, disk in self.model.disks.items()}
        self.calm = False
        self.ended, before, self.was_ended = how, self.was_ended, True
        self.model.moves += 1
        self.turning = how != "failover"
        self.meanwhile = [(name, write) for name, disk in self.model.disks.items() if disk.view
                          for write in disk.view.in_flight]
        try:
            await command()
            if how != "failover":
                await self.views_are_latest(now if whole else {})
        except (ReplicationError, OSError) as error:
            forgive(error, not may)
            if not situation.declines():
                self.ended, self.was_ended = "", before
        finally:
            self.turning = False

    async def go_on(self) -> None:
        """The same command again, after which all disks are promoted, or stopped."""
        standby = self.world.standby
        try:
            if self.ended == "stop":
                await standby.stop_replication()
            else:
                await standby.fail_over("latest" if self.ended == "latest" else "checkpoint")
        except (ReplicationError, OSError) as error:
            forgive(error, "secondary" in self.failing)

    def nothing_under_way(self) -> bool:
        """The standby has all that the guest has written."""
        return (self.world.primary_running and not self.running
                and all(disk.link.on and not disk.link.queued for disk in self.world.primary.disks.values()))

    def all_acknowledged(self) -> bool:
        """The standby has all that the guest knows to be written."""
        return (self.world.primary_running and self.shape.ack == "both"
                and all(disk.link.on for disk in self.world.primary.disks.values()))

    # --- recovery, and the end of a trace ---

    async def recover(self, step: Do = RECOVER) -> None:
        """Mend everything. The pair has to be healthy, or the stale primary to know what it is."""
        world = self.world
        await self.up(Do("up"))
        if self.hanging:
            world.proxy.cut()  # what swallowed something is of no use any more
        self.hanging = False
        self.unstick()
        world.heal_disks()
        await asyncio.sleep(MAX_STALL)  # each side has heard by then of what had happened before
        if not world.primary_running or not world.standby_running:
            return
        primary, standby = world.primary, world.standby
        try:
            if self.ended:
                await until(lambda: primary.coordinator.state is State.FENCED, RECOVERS)
                await until(lambda: standby.situation.state != "failover", RECOVERS)
                self.failing.clear()
                await self.go_on()
                await until(lambda: standby.situation.state in ("promoted", "stopped"), RECOVERS)
                assert not standby.situation.unfinished, standby.status()
                return
            if self.was_ended and primary.coordinator.state is State.FENCED:
                await self.bounce_primary(Do("bounce-primary"))
                await self.recover()
                return
            await self.replicating()
            if primary.status().health != "healthy" or standby.status().health != "healthy":
                await primary.checkpoint()
            if troubled := [number for number, disk in enumerate(primary.disks.values()) if disk.link.trouble]:
                for number in troubled:  # what has failed is forgotten when the guest has written again
                    self.request(Request("write", number))
                await self.wait(step)
                await primary.checkpoint()
            await until(lambda: primary.coordinator.state is State.REPLICATING and primary.status().health
                        == standby.status().health == "healthy", RECOVERS)
        except TimeoutError:
            raise AssertionError(f"the pair does not recover:\n{primary.status()}\n{standby.status()}") from None
        await primary.checkpoints.settled()
        assert world.keeps_books is (self.shape.format == "raw" and not world.has_failed), "whether books are kept"
        assert world.follows or not self.shape.ample, "whom the standby follows is not written down"
        self.failing.clear()
        self.was_ended = False
        self.calm = self.shape.ample

    async def replicating(self) -> None:
        """Wait for it. Where a standby has begun anew, and has grown more than its primary, do as the primary says."""
        primary = self.world.primary
        while primary.coordinator.state is not State.REPLICATING:
            await until(lambda: primary.coordinator.state is State.REPLICATING
                        or "blockstep resize" in primary.coordinator.reason, RECOVERS)
            if advice := re.search(r"blockstep resize (\w+) (\d+)", primary.coordinator.reason):
                await primary.resize(advice[1], int(advice[2]))
                await asyncio.sleep(RECOVERS / 10)

    async def finish(self) -> None:
        """Whatever has happened: mended, the pair is what the model says; then both programs end in good order."""
        await self.recover()
        await self.check()
        if not self.ended and self.world.primary_running and self.world.standby_running:
            await self.checkpoint(Do("checkpoint"))
            await self.check()
        await self.world.stop_primary()
        if self.world.standby_running:
            await self.world.stop_standby()
            await self.files_are_the_views()
            await self.turn_round()

    async def turn_round(self) -> None:
        """The two exchange their roles: after an end in good order of both, nothing has to be copied."""
        self.model = self.world.model = self.model.turned_round(known=not self.was_ended)
        self.ended, self.was_ended = "", False
        await self.world.turn_round()
        await self.recover()
        for disk in range(len(self.world.names)):
            self.request(Request("write", disk, 5, 70_000))
        await self.checkpoint(Do("checkpoint"))
        await self.wait(Do("wait"))
        await self.check()


def forgive(error: Exception, excused: bool) -> None:
    """Raises AssertionError if there is no excuse for an error."""
    if not excused:
        raise AssertionError(f"without a reason: {error}") from error


def play(shape: Shape, steps: Sequence[Step]) -> None:
    """Play a trace. Raises what did not hold, with the steps up to there as they can be played again."""

    async def main(directory: Path) -> None:
        world = World(directory, shape)
        await world.open()
        player = Player(world)
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: player.bugs.append(f"{context['message']}: {context.get('exception')!r}"))
        try:
            await player.play(steps)
        except BaseException as error:
            error.add_note("\n".join([f"play({shape!r}, [", *player.log, "])"]))
            with contextlib.suppress(BlockstepError, OSError, AssertionError):
                await world.close()
            raise
        await world.close()
        assert not player.bugs, player.bugs

    in_memory = Path("/dev/shm")
    with TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as directory:
        run(main(Path(directory)))
