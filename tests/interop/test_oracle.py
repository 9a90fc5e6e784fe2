"""QEMU as the oracle: the same traces give the same views, except where we differ on purpose (D1 to D10).

QEMU runs as a process of its own and is reached over NBD with our client; ours is a graph in this process. Each case
of a difference shows QEMU's outcome too, so that a release of QEMU that mends it is noticed here.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.drivers import nbd as _nbd  # registers the driver
from blockstep.drivers.replication import Stage
from blockstep.errors import ReplicationError
from blockstep.replication.link import Link
from blockstep.testing.pair import Pair as Processes
from blockstep.testing.qemu_oracle import Qemu, qemu_primary, qemu_standby, wait_until
from tests.peers import nbdkit, need
from tests.scenario.gates import Gates, gated_disk
from tests.scenario.standby import Kind, Rig, Shape, error_of

pytestmark = pytest.mark.interop
need("qemu-system-x86_64", "qemu-img")
assert _nbd

SECTOR = 512
SIZE = 1 << 20
#: Random traces run on small disks, of which a few clusters of 64 KiB (QEMU's) and of 4 KiB (ours) are touched.
SMALL = 200 * 1024


class Clients:
    """NBD clients of QEMU's exports."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._opened: list[Backend] = []

    async def open(self, socket: Path, export: str) -> Backend:
        node = await self.graph.open({"driver": "nbd", "export": export,
                                      "server": {"type": "unix", "path": str(socket)}}, owned=False)
        backend = self.graph.attach_backend(node, export, READ | WRITE)
        self._opened.append(backend)
        return backend

    async def close(self) -> None:
        while self._opened:
            await self.graph.detach_backend(self._opened.pop())


def run(scenario: Callable[[Clients], Awaitable[None]]) -> None:
    async def main() -> None:
        clients = Clients()
        try:
            await scenario(clients)
        finally:
            await clients.close()

    asyncio.run(main())


async def filled(user: Backend, offset: int, length: int = SECTOR) -> int:
    """The byte that fills a range; -1 if there are several."""
    data = bytes(await user.pread(offset, length))
    return data[0] if data.count(data[0]) == length else -1


# --- what both must do alike ---

_steps = st.tuples(st.sampled_from(("primary write", "primary write", "primary zeroes", "view write", "view zeroes",
                                    "primary flush", "view flush", "checkpoint")),
                   st.integers(0, 1), st.integers(0, SMALL // SECTOR - 1), st.sampled_from((1, 3, 8, 127, 128, 130)))


@pytest.mark.slow
@given(steps=st.lists(_steps, min_size=3, max_size=20), after=st.lists(_steps, max_size=6),
       names=st.sampled_from(("a", "ab")), clusters=st.sampled_from((4096, 65536)),
       kind=st.sampled_from(("overlay", "qcow2")))
@settings(max_examples=max(25, settings.default.max_examples // 40))
def test_the_same_trace_gives_the_same_views(steps: list[tuple[str, int, int, int]],
                                             after: list[tuple[str, int, int, int]], names: str,
                                             clusters: int, kind: Kind) -> None:
    async def scenario(clients: Clients) -> None:
        with TemporaryDirectory() as directory, qemu_standby(Path(directory), names, SMALL) as qemu:
            theirs = [(await clients.open(qemu.socket, f"parent-{name}"),
                       await clients.open(qemu.socket, f"view-{name}")) for name in names]
            rig = Rig()
            rig.kind = kind
            for name in names:
                await rig.add(name, bytes(SMALL), Shape(clusters, clusters))
            await rig.registry.start_all("secondary")
            ours = [(disk.primary, disk.view) for disk in rig.disks]
            number = 0
            promoted = False
            for what, which, sector, count in [*steps, ("failover", 0, 0, 0), *after]:
                number = number % 255 + 1
                if what == "checkpoint":
                    qemu.checkpoint()
                    await rig.registry.checkpoint_all()
                elif what == "failover":
                    qemu.stop(failover=True)
                    await rig.registry.stop_all(failover=True)
                    qemu.wait_failed_over()
                    await rig.merged()
                    promoted = True
                elif not (promoted and what.startswith("primary")):  # D6
                    for users in (theirs, ours):
                        await request(users[which % len(names)], what, sector * SECTOR, count * SECTOR, number)
                for their, our in zip(theirs, ours, strict=True):
                    assert await their[1].pread(0, SMALL) == await our[1].pread(0, SMALL), what
            await clients.close()
            await rig.close()

    run(scenario)


async def request(users: tuple[Backend, Backend], what: str, offset: int, length: int, number: int) -> None:
    who, kind = what.split()
    user = users[who == "view"]
    length = min(length, SMALL - offset)
    if kind == "write":
        await user.pwrite(offset, bytes([number]) * length)
    elif kind == "zeroes":
        await user.write_zeroes(offset, length)
    else:
        await user.flush()


def test_operations_after_a_failover_are_ignored_by_both(tmp_path: Path) -> None:
    async def scenario(_: Clients) -> None:
        with qemu_standby(tmp_path) as qemu:
            qemu.stop(failover=True)
            qemu.wait_failed_over()
            qemu.start(primary=True)
            qemu.checkpoint()
            qemu.stop(failover=True)
            assert qemu.status == {"error": False}
        rig = await Rig.open()
        await rig.enter("failed-over")
        await rig.registry.start_all("primary")
        await rig.registry.checkpoint_all()
        await rig.registry.stop_all(failover=True)
        rig.registry.get_error_all()
        assert rig.disks[0].filter.stage is Stage.DONE
        await rig.close()

    run(scenario)


# --- where we differ ---


def test_d1_a_stop_without_failover_leaves_what_the_primary_wrote(tmp_path: Path) -> None:
    async def two_points_in_time(primary: Backend, checkpoint: Callable[[], Any]) -> None:
        await primary.pwrite(0, b"\x11" * SECTOR)
        await primary.pwrite(SIZE // 2, b"\x11" * SECTOR)
        await maybe(checkpoint())
        await primary.pwrite(0, b"\x33" * SECTOR)

    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, size=SIZE) as qemu:
            primary, view = await clients.open(qemu.socket, "parent-a"), await clients.open(qemu.socket, "view-a")
            await two_points_in_time(primary, qemu.checkpoint)
            with pytest.raises(RuntimeError):
                qemu.stop(failover=False)
            await primary.pwrite(SIZE // 2, b"\x33" * SECTOR)
            assert (await filled(view, 0), await filled(view, SIZE // 2)) == (0x11, 0x33), "a mixture"
            await clients.close()
        rig = Rig()
        disk = await rig.add("a", bytes(SIZE))
        await rig.registry.start_all("secondary")
        await two_points_in_time(disk.primary, rig.registry.checkpoint_all)
        await rig.registry.stop_all(failover=False)
        await disk.primary.pwrite(SIZE // 2, b"\x33" * SECTOR)
        assert (await filled(disk.view, 0), await filled(disk.view, SIZE // 2)) == (0x33, 0x33)
        await rig.close()

    run(scenario)


async def maybe(result: Any) -> None:
    if result is not None:
        await result


def test_d4_a_checkpoint_over_two_disks_is_all_or_nothing(tmp_path: Path) -> None:
    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, "xy", SIZE, full="x") as qemu:
            primaries = [await clients.open(qemu.socket, f"parent-{disk}") for disk in "xy"]
            views = [await clients.open(qemu.socket, f"view-{disk}") for disk in "xy"]
            for primary in primaries:
                await primary.pwrite(0, b"\x11" * SECTOR)
            qemu.checkpoint()
            assert await error_of(primaries[0].pwrite(0, b"\x33" * SECTOR)) is not None  # its hidden disk is full
            for primary in primaries:
                await primary.pwrite(SIZE // 2, b"\x22" * SECTOR)
            with pytest.raises(RuntimeError, match="Failed to empty"):
                qemu.checkpoint()
            assert [await filled(view, SIZE // 2) for view in views] == [0, 0x22], "two points in time"
            assert qemu.status == {"error": False}
            await clients.close()
        rig = Rig()
        for name in "xy":
            await rig.add(name, bytes(SIZE))
        await rig.registry.start_all("secondary")
        for disk in rig.disks:
            await disk.primary.pwrite(0, b"\x11" * SECTOR)
        rig.gates.fail("y-hidden", "make_empty", errno.ENOSPC)
        with pytest.raises(ReplicationError, match="'y-filter'"):
            await rig.registry.checkpoint_all()
        assert [await filled(disk.view, 0) for disk in rig.disks] == [0, 0]
        await rig.registry.checkpoint_all()
        assert [await filled(disk.view, 0) for disk in rig.disks] == [0x11, 0x11]
        await rig.close()

    run(scenario)


def test_d5_a_failover_is_a_visible_job_and_status_is_true(tmp_path: Path) -> None:
    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, size=64 << 20) as qemu:
            primary = await clients.open(qemu.socket, "parent-a")
            for mib in range(64):
                await primary.pwrite(mib << 20, b"\x11" * (1 << 20))
            qemu.stop(failover=True)
            assert (qemu.status, qemu.execute("query-jobs")) == ({"error": True, "desc": "I/O error occurred"}, [])
            qemu.wait_failed_over()
            assert qemu.events == []
            await clients.close()
        rig = await Rig.open()
        await rig.enter("failover")
        rig.registry.get_error_all()
        (job,) = [job.info() for job in rig.jobs.list()]
        assert (job["id"], job["type"], job["status"]) == ("failover-a-filter", "commit", "running")
        rig.gates.open()
        await rig.merged()
        rig.registry.get_error_all()
        completed = [data for name, data in rig.events if name == "BLOCK_JOB_COMPLETED"]
        assert [event["offset"] == event["len"] > 0 for event in completed] == [True]
        await rig.close()

    run(scenario)


def test_d6_an_old_primary_cannot_write_into_its_successor(tmp_path: Path) -> None:
    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, size=SIZE) as qemu:
            primary, view = await clients.open(qemu.socket, "parent-a"), await clients.open(qemu.socket, "view-a")
            qemu.stop(failover=True)
            qemu.wait_failed_over()
            await primary.pwrite(0, b"\x77" * SECTOR)
            assert await filled(view, 0) == 0x77
            await clients.close()
        rig = Rig()
        disk = await rig.add("a", bytes(SIZE))
        await rig.registry.start_all("secondary")
        revoked: list[str] = []
        disk.primary.on_revoke = revoked.append
        await rig.registry.stop_all(failover=True)
        for write in (disk.primary.pwrite(0, b"\x77" * SECTOR), disk.primary.write_zeroes(0, SECTOR),
                      disk.primary.discard(0, SECTOR)):
            error = await error_of(write)
            assert isinstance(error, OSError)
            assert error.errno == errno.ESHUTDOWN
        assert len(revoked) == 1
        assert await filled(disk.view, 0) == 0
        await rig.merged()
        await rig.close()

    run(scenario)


class Pair:
    """Our link over a local disk and a standby behind gates."""

    @classmethod
    async def open(cls, ack: str = "local", on: bool = True) -> Pair:
        pair = cls()
        pair.graph, pair.gates = Graph(), Gates()
        pair.local = gated_disk(pair.graph, pair.gates, "local", bytes(SIZE))
        pair.remote = gated_disk(pair.graph, pair.gates, "remote", bytes(SIZE))
        link = await pair.graph.open({"driver": "link", "node-name": "link", "file": "local", "ack": ack})
        assert isinstance(link, Link)
        pair.link = link
        pair.guest = pair.graph.attach_backend(link, "guest", READ | WRITE)
        with pair.graph.change() as change:
            change.attach(link, "target", Role.TARGET, pair.remote)
        if on:
            link.switch_on()
        return pair

    graph: Graph
    gates: Gates
    local: Any
    remote: Any
    link: Link
    guest: Backend


def primary_of(tmp_path: Path, qemu: Qemu, **options: Any) -> Any:
    return qemu_primary(tmp_path, qemu.socket, "parent-a", SIZE, **options)


def test_d8_a_stopped_standby_blocks_neither_the_guest_nor_the_control_socket(tmp_path: Path) -> None:
    """Stopped, not dead: its sockets stand. QEMU's way out, to take the standby's node away, hangs as well."""
    waits, max_stall, margin = 1.0, 0.3, 1.0

    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, size=SIZE) as standby, primary_of(tmp_path, standby) as qemu:
            guest = await clients.open(qemu.socket, "guest")
            standby.process.send_signal(signal.SIGSTOP)
            try:
                write = asyncio.create_task(guest.pwrite(0, b"\x21" * SECTOR))
                assert not (await asyncio.wait([write], timeout=waits))[0]
                removal = asyncio.create_task(asyncio.to_thread(
                    qemu.execute, "x-blockdev-change", parent="colo-disk", child="children.1"))
                assert not (await asyncio.wait([removal], timeout=waits))[0]
            finally:
                standby.process.send_signal(signal.SIGCONT)
            await asyncio.gather(write, removal)
            await clients.close()
        async with Processes(tmp_path) as pair:
            await pair.start("--ack", "both", "--max-stall", f"{max_stall}s")
            await pair.primary.until(health="healthy")
            async with pair.primary.clients() as (ours,):
                pair.standby.send(signal.SIGSTOP)
                before = time.monotonic()
                await ours.pwrite(0, b"\x21" * SECTOR)
                assert time.monotonic() - before < max_stall + margin
                await pair.primary.execute("replication-stop", timeout=margin)
                assert (await pair.primary.status(timeout=margin))["state"] == "stopped"

    run(scenario)


def test_d9_a_slow_link_is_not_in_the_guests_writes_unless_asked_for(tmp_path: Path) -> None:
    delay = 300  # ms

    async def scenario(clients: Clients) -> None:
        with nbdkit(tmp_path, "--filter=delay", "memory", str(SIZE), f"wdelay={delay}ms") as uri:
            socket = Path(uri.partition("socket=")[2])
            with qemu_primary(tmp_path, socket, "", SIZE) as qemu:
                guest = await clients.open(qemu.socket, "guest")
                before = time.monotonic()
                await guest.pwrite(0, b"\x22" * SECTOR)
                assert time.monotonic() - before >= delay / 1000
                await clients.close()
        pair = await Pair.open("local")
        pair.gates.close("remote")
        await pair.guest.pwrite(0, b"\x22" * SECTOR)  # ends, though nobody answers
        assert pair.link.queued == SECTOR
        pair.gates.open()
        assert pair.remote.data == pair.local.data

    run(scenario)


def test_d10_a_discard_is_forwarded(tmp_path: Path) -> None:
    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, size=SIZE) as standby, primary_of(tmp_path, standby) as qemu:
            guest, secondary = await clients.open(qemu.socket, "guest"), await clients.open(standby.socket, "parent-a")
            await guest.pwrite(0, b"\x12" * 65536)
            await guest.discard(0, 65536)
            await guest.flush()
            assert await filled(secondary, 0, 65536) == 0x12
            await clients.close()
        pair = await Pair.open()
        await pair.guest.pwrite(0, b"\x12" * 65536)
        await pair.guest.discard(0, 65536)
        assert ("remote", "discard") in pair.gates.seen
        assert pair.remote.data == pair.local.data

    run(scenario)


def test_d10_writes_before_the_start_are_known_to_be_lacking(tmp_path: Path) -> None:
    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, size=SIZE) as standby, primary_of(tmp_path, standby, start=False) as qemu:
            guest, secondary = await clients.open(qemu.socket, "guest"), await clients.open(standby.socket, "parent-a")
            await guest.pwrite(0, b"\x12" * SECTOR)
            qemu.start(primary=True)
            assert await filled(secondary, 0) == 0, "it never gets there"
            assert qemu.status == {"error": False}
            await clients.close()
        pair = await Pair.open(on=False)
        await pair.guest.pwrite(100_000, b"\x12" * SECTOR)
        assert list(pair.link.since.dirty()) == [(65536, 65536)]
        assert pair.link.behind == 65536

    run(scenario)


def test_d10_a_dead_standby_raises_an_event(tmp_path: Path) -> None:
    async def scenario(clients: Clients) -> None:
        with qemu_standby(tmp_path, size=SIZE) as standby, primary_of(tmp_path, standby) as qemu:
            guest = await clients.open(qemu.socket, "guest")
            standby.kill()
            await guest.pwrite(0, b"\x21" * SECTOR)
            assert qemu.status["error"] is True
            assert qemu.events == []
            await clients.close()
        pair = await Pair.open()
        heard: list[OSError] = []
        pair.link.on_fail = heard.append
        pair.gates.fail("remote", "write", errno.ENOTCONN)
        await pair.guest.pwrite(0, b"\x21" * SECTOR)
        assert [error.errno for error in heard] == [errno.ENOTCONN]
        assert pair.link.since.any(0, SECTOR)

    run(scenario)


def test_waiting_for_qemu_has_an_end() -> None:
    with pytest.raises(TimeoutError):
        wait_until(lambda: False, limit=0.0)
