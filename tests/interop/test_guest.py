"""A real guest lives through the death of its host: a journalled file system, on the standby as on the primary."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from blockstep.testing.pair import Pair
from blockstep.testing.processes import Address, free_ports, stop
from blockstep.units import MiB
from tests.guest import Guest, make_disk, need_guest
from tests.interop.test_replication_script import SCRIPT, Script
from tests.peers import run
from tests.programs import BLOCKSTEP, QEMU, Program
from tests.scenarios import scenario

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(240)]

SIZE = 64 * MiB


@scenario
async def test_a_guest_boots_again_from_the_standby_with_the_data_of_the_last_checkpoint(tmp_path: Path) -> None:
    need_guest()
    async with Pair(tmp_path, image=make_disk(tmp_path / "fresh", SIZE)) as pair:
        await pair.start()
        guest = await Guest.boot(tmp_path, pair.primary.nbd, "disk0", task="write")
        try:
            await guest.until("WROTE 3")
            await pair.primary.until(health="healthy")
            await pair.primary.execute("replication-checkpoint")
            low = await _more(guest, 5)
            await pair.primary.execute("replication-checkpoint")
            high = guest.written + 2  # one that it has not told of yet, and one whose line is on its way
            await guest.until(f"WROTE {high + 5}")
            pair.primary.kill()
        finally:
            await guest.kill()

        await pair.standby.execute("replication-failover")
        assert low <= await _found(tmp_path, pair.standby.nbd, "disk0") <= high
        await pair.standby.until(state="promoted")
        await pair.standby.execute("quit")
        assert await pair.standby.ended() == 0
        run("e2fsck", "-f", "-n", tmp_path / "disk0.standby")


@pytest.mark.parametrize(("image_format", "ack"), [("raw", "local"), ("qcow2", "both")])
@scenario
async def test_two_disks_of_a_guest_are_at_the_same_moment_after_a_failover(
        tmp_path: Path, image_format: str, ack: str) -> None:
    """What the guest writes to the second disk, when the first has flushed it, is nowhere without that."""
    need_guest()
    async with Pair(tmp_path, disks=2, image=make_disk(tmp_path / "fresh", SIZE), format=image_format) as pair:
        await pair.start("--checkpoint-every", "200ms", "--ack", ack)
        guest = await Guest.boot(tmp_path, pair.primary.nbd, *pair.names, task="write")
        try:
            await guest.until("WROTE 3")
            await pair.primary.until(health="healthy")
            await pair.primary.execute("replication-checkpoint")
            await _more(guest, 5)
            pair.primary.kill()
        finally:
            await guest.kill()

        await pair.standby.execute("replication-failover")
        assert 3 <= await _found(tmp_path, pair.standby.nbd, *pair.names) <= guest.written + 2
        await pair.standby.until(state="promoted")
        await pair.standby.execute("quit")
        assert await pair.standby.ended() == 0
        for number, name in enumerate(pair.names):
            (tmp_path / name).write_bytes(await pair.file("standby", number))
            run("e2fsck", "-f", "-n", tmp_path / name)


@pytest.mark.parametrize(("primary", "secondary"), [(BLOCKSTEP, BLOCKSTEP), (QEMU, BLOCKSTEP), (BLOCKSTEP, QEMU)],
                         ids=lambda program: program.name)
@scenario
async def test_and_so_it_does_when_a_script_drives_the_daemons(
        tmp_path: Path, primary: Program, secondary: Program) -> None:
    """The guest runs on while ours takes a checkpoint. For QEMU's it stands still, as COLO's does: see docs/colo.md."""
    need_guest()
    make_disk(tmp_path / "primary.img", SIZE)
    shutil.copyfile(tmp_path / "primary.img", tmp_path / "secondary.img")
    for name in ("active", "hidden"):
        secondary.make_overlay(tmp_path / f"{name}.img", SIZE)
    port = free_ports()
    with primary.started(tmp_path, "primary") as (one, host), secondary.started(tmp_path, "secondary") as (two, _):
        one.close()
        two.close()  # QEMU's socket takes one client at a time
        with _driven(tmp_path, port, secondary.overlay) as script:
            script("setup")
            script("start")
            guest = await Guest.boot(tmp_path, tmp_path / "primary.nbd", "guest", task="write")
            still = guest.paused if secondary is QEMU else nullcontext
            try:
                await guest.until("WROTE 3")
                with still():
                    script("checkpoint")
                low = await _more(guest, 5)
                with still():
                    script("checkpoint")
                high = await _more(guest, 1) + 1  # until then it has told of all that it had written before
                await guest.until(f"WROTE {high + 5}")
                host.kill()
            finally:
                await guest.kill()

            script("failover")
            assert low <= await _found(tmp_path, ("127.0.0.1", port), "view") <= high
    run("e2fsck", "-f", "-n", tmp_path / "secondary.img")


@contextmanager
def _driven(directory: Path, port: int, overlay: str) -> Iterator[Script]:
    """The script between the two programs of the directory."""
    words: list[str | Path] = [directory, directory / "primary.qmp", directory / "secondary.qmp", str(port), overlay]
    with subprocess.Popen([sys.executable, SCRIPT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        try:
            yield Script(process)
        finally:
            stop(process)


async def _more(guest: Guest, count: int) -> int:
    """Wait until the guest has written so many files more, and return the number of the last one."""
    await guest.until(f"WROTE {guest.written + count}")
    return guest.written


async def _found(directory: Path, server: Address, *exports: str) -> int:
    """Boot a guest from the standby: how many files it finds, after its file system has recovered without a fault."""
    guest = await Guest.boot(directory, server, *exports, task="check")
    try:
        found = int((await guest.until(r"FOUND (\d+)"))[1])
        await guest.until("RECOVERED")
        await guest.until("ENDED")
        assert await guest.ended() == 0
        return found
    finally:
        await guest.kill()
