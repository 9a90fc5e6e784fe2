"""The procedure of QEMU's guide for COLO, the part about disks, with either program on either side.

Steps, names and options are the guide's: start of the secondary and of the primary, failover on either, and how
replication is resumed on either, with a drive-mirror to the NBD export of the other. Three things are not:

* the disks themselves are raw, or in a second run qcow2; active and hidden disk are qcow2, as there;
* there is no guest and no migration, so replication is started by ``xen-set-replication`` where the guide migrates.
  For the same reason QEMU does not know ``x-colo-lost-heartbeat`` here (COLO does not run), and is told to stop
  replication with a failover, which is what that command does with the disks;
* what a guest would see is exported as well.

The same trace of writes goes to all combinations, and all views are compared with one model, byte by byte.

Source: "Test procedure" and what follows in QEMU's COLO-FT.txt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from subprocess import Popen
from typing import Any

import pytest

from blockstep.nbd.client import Client
from blockstep.nbd.uri import InetAddress
from blockstep.testing.processes import QMP, free_ports
from tests.peers import need, run
from tests.programs import BLOCKSTEP, QEMU, Program
from tests.scenarios import scenario

pytestmark = pytest.mark.interop

SIZE = 1 << 20
SECTOR = 512
LIMIT = 20.0


class Host:
    """A host of the guide: an address, a directory of images, and the program that runs there, if it runs."""

    #: Of the primary and the secondary disk.
    format = "raw"

    def __init__(self, program: Program, directory: Path, address: str) -> None:
        self.program, self.directory, self.address = program, directory, address
        directory.mkdir()
        self.port = free_ports(host=address)
        self._stack = ExitStack()
        self._clients: list[Client] = []
        self.qmp: QMP
        self._process: Popen[bytes]

    def __call__(self, command: str, **arguments: Any) -> Any:
        return self.qmp.execute(command, **arguments)

    def human(self, line: str) -> None:
        """A command of the human monitor; what it prints is its error."""
        answer = self("human-monitor-command", command_line=line)
        assert answer.strip() in ("", "OK"), answer

    async def guest(self) -> Client:
        """A client of the disk as a guest sees it."""
        client = await Client.connect(InetAddress(self.address, self.port), "colo-disk0")
        self._clients.append(client)
        return client

    async def end(self, kill: bool = False) -> None:
        """End the program; with ``kill`` as a host ends that loses its power."""
        if kill:
            self._process.kill()
            self._process.wait()
        while self._clients:
            await self._clients.pop().close()
        self._stack.close()

    def _start(self, name: str, *disks: tuple[str, str]) -> None:
        self.qmp, self._process = self._stack.enter_context(self.program.started(self.directory, name, *disks))

    def _make(self, name: str, content: bytes) -> None:
        """A disk of that content."""
        raw = self.directory / f"{name}.raw"
        raw.write_bytes(content)
        run("qemu-img", "convert", "-f", "raw", "-O", self.format, raw, self.directory / name)

    # --- "Startup qemu" ---

    def start_primary(self, image: bytes) -> None:
        """Step 1; and an export for the guest."""
        self._make("primary.img", image)
        self._start("primary", ("colo-disk0", "driver=quorum,read-pattern=fifo,vote-threshold=1,"
                                f"children.0.driver={self.format},"
                                f"children.0.file.driver=file,children.0.file.filename={self.directory}/primary.img"))
        self.serve()

    def start_secondary(self, image: bytes) -> None:
        """Steps 2 and 3; and an export for the guest."""
        folder, overlay = self.directory, self.program.overlay
        self._make("parent.img", image)
        for name in ("active", "hidden"):
            self.program.make_overlay(folder / f"secondary-{name}.img", SIZE)
        self._start(
            "secondary",
            ("parent0", f"driver={self.format},file.driver=file,file.filename={folder}/parent.img"),
            ("childs0", f"driver=replication,mode=secondary,file.driver={overlay},top-id=colo-disk0,"
                        f"file.file.driver=file,file.file.filename={folder}/secondary-active.img,"
                        f"file.backing.driver={overlay},file.backing.file.driver=file,"
                        f"file.backing.file.filename={folder}/secondary-hidden.img,file.backing.backing=parent0"),
            ("colo-disk0", "driver=quorum,read-pattern=fifo,vote-threshold=1,children.0=childs0"))
        self.serve()
        self("nbd-server-add", device="parent0", writable=True)

    def serve(self) -> None:
        """An NBD server, and the guest's disk on it."""
        self("nbd-server-start", addr={"type": "inet", "data": {"host": self.address, "port": str(self.port)}})
        self("nbd-server-add", device="colo-disk0", writable=True)

    def attach(self, secondary: Host) -> None:
        """Step 4, with a start in place of the migration."""
        self.human(f"drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host={secondary.address},"
                   f"file.port={secondary.port},file.export=parent0,node-name=replication0")
        self("x-blockdev-change", parent="colo-disk0", node="replication0")
        secondary("xen-set-replication", enable=True, primary=False)
        self("xen-set-replication", enable=True, primary=True)

    # --- "Failover" ---

    def lost_heartbeat(self, primary: bool) -> None:
        """The other one is gone."""
        if self.program is BLOCKSTEP:
            self("x-colo-lost-heartbeat")
        else:
            self("xen-set-replication", enable=False, primary=primary, failover=True)

    def primary_failover(self) -> None:
        """The secondary died."""
        self("x-blockdev-change", parent="colo-disk0", child="children.1")
        self.human("drive_del replication0")
        self.lost_heartbeat(primary=True)

    def secondary_failover(self) -> None:
        """The primary died."""
        self("nbd-server-stop")
        self.lost_heartbeat(primary=False)
        # QEMU reports an error until it has merged the disks, and we that the failover is being processed.
        self.wait(lambda: not self("query-xen-replication-status")["error"]
                  and self("query-colo-status")["reason"] != "processing")
        self.serve()

    # --- "Resume replication" ---

    def start_resync(self, secondary: Host) -> None:
        """Copy everything to the new secondary, until it is synced."""
        self("drive-mirror", device="colo-disk0", job_id="resync", mode="existing", format="raw", sync="full",
             target=f"nbd://{secondary.address}:{secondary.port}/parent0")
        self.wait(lambda: self("query-block-jobs")[0]["ready"])

    def end_resync(self, secondary: Host) -> None:
        """Put replication in the place of the mirror."""
        self("stop")
        self("block-job-cancel", device="resync")
        self.wait(lambda: not self("query-block-jobs"))
        self.attach(secondary)
        self("cont")

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.005)


class Model:
    """What the guests of both sides must see: the disk of the primary's, and the view of the standby's."""

    def __init__(self) -> None:
        self._random = Random(3)
        self.disk = bytearray(self._random.randbytes(SIZE))
        self.view = bytearray(self.disk)

    async def write(self, client: Client, content: bytearray, count: int = 12) -> None:
        """Writes of one guest, at once, that do not overlap; each is some sectors long."""
        places = self._random.sample(range(SIZE // 65536), count)
        writes = [(place * 65536 + self._random.randrange(96) * SECTOR,
                   self._random.randbytes(self._random.randint(1, 32) * SECTOR)) for place in places]
        await asyncio.gather(*(client.pwrite(offset, data) for offset, data in writes))
        for offset, data in writes:
            content[offset:offset + len(data)] = data

    def checkpoint(self) -> None:
        self.view[:] = self.disk


@asynccontextmanager
async def hosts(*made: Host) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for host in made:
            await host.end()


async def content(client: Client) -> bytes:
    return bytes(await client.pread(0, SIZE))


async def replicate(primary: Host, secondary: Host, model: Model) -> tuple[Client, Client]:
    """The trace of a running replication: writes of both guests, and checkpoints. Returns the guests' clients."""
    guest, view = await primary.guest(), await secondary.guest()
    model.checkpoint()
    for _ in range(2):
        await model.write(guest, model.disk)
        await model.write(view, model.view)
        assert await content(guest) == model.disk
        assert await content(view) == model.view
        for host in (primary, secondary):
            host("xen-colo-do-checkpoint")
            assert host("query-xen-replication-status") == {"error": False}
        model.checkpoint()
        assert await content(view) == model.view
    await model.write(guest, model.disk)
    await model.write(view, model.view)
    assert await content(view) == model.view
    return guest, view


def start(primary: Host, secondary: Host, model: Model) -> bytes:
    """Both sides with equal disks, the link attached: the content of the disks."""
    image = bytes(model.disk)
    secondary.start_secondary(image)
    primary.start_primary(image)
    primary.attach(secondary)
    return image


#: primary, secondary
COMBINATIONS = [(one, other) for one in (QEMU, BLOCKSTEP) for other in (QEMU, BLOCKSTEP)]
combinations = pytest.mark.parametrize(
    ("primary", "secondary"), COMBINATIONS, ids=[f"{one.name}-to-{other.name}" for one, other in COMBINATIONS])


@pytest.fixture(autouse=True, params=["raw", "qcow2"])
def four_disks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What primary and secondary disk are, beside an active and a hidden disk that always are qcow2."""
    need("qemu-img")
    monkeypatch.setattr(Host, "format", request.param)


@combinations
def test_the_secondary_dies_and_the_primary_gets_another(tmp_path: Path, primary: Program, secondary: Program) -> None:
    @scenario
    async def go() -> None:
        first = Host(primary, tmp_path / "first", "127.0.0.1")
        second = Host(secondary, tmp_path / "second", "127.0.0.2")
        third = Host(secondary, tmp_path / "third", "127.0.0.2")
        async with hosts(first, second, third):
            model = Model()
            image = start(first, second, model)
            guest, _ = await replicate(first, second, model)

            await second.end(kill=True)
            await model.write(guest, model.disk)
            first.primary_failover()
            await model.write(guest, model.disk)
            assert await content(guest) == model.disk
            assert first("query-xen-replication-status") == {"error": False}

            third.start_secondary(image)
            first.start_resync(third)
            await model.write(guest, model.disk)
            first.end_resync(third)
            guest, _ = await replicate(first, third, model)
            await third.end(kill=True)
            await model.write(guest, model.disk)
            assert await content(guest) == model.disk

    go()


@combinations
def test_the_primary_dies_and_the_secondary_becomes_one(tmp_path: Path, primary: Program, secondary: Program) -> None:
    @scenario
    async def go() -> None:
        first = Host(primary, tmp_path / "first", "127.0.0.1")
        second = Host(secondary, tmp_path / "second", "127.0.0.2")
        third = Host(primary, tmp_path / "third", "127.0.0.1")
        async with hosts(first, second, third):
            model = Model()
            image = start(first, second, model)
            await replicate(first, second, model)

            await first.end(kill=True)
            second.secondary_failover()
            model.disk[:] = model.view
            guest = await second.guest()
            assert await content(guest) == model.disk
            await model.write(guest, model.disk)

            third.start_secondary(image)
            second.start_resync(third)
            await model.write(guest, model.disk)
            second.end_resync(third)
            await replicate(second, third, model)

            await second.end(kill=True)
            third.secondary_failover()
            assert await content(await third.guest()) == model.view

    go()
