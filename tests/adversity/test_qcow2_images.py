"""qcow2 images whose programs are killed, take turns, or find no room: real processes, a model of bytes, and qemu-img.

An image is used in rounds, each by a program of its own. After SIGKILL the disk may hold, byte by byte, what was
flushed, or anything that was written since; after SIGTERM it holds what was written last.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import pytest

from blockstep.aio.pool import in_thread
from blockstep.block.driver import FUA
from blockstep.drivers.qcow2.check import CheckResult, check
from blockstep.nbd.client import Client
from blockstep.nbd.constants import CMD_FLAG_NO_HOLE
from blockstep.nbd.uri import UnixAddress
from blockstep.testing.model import Content
from blockstep.testing.pair import Pair, environment
from blockstep.units import KiB, MiB
from tests.peers import blockstep, need, run, started
from tests.scenarios import scenario, small_file_system

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-nbd")

SIZE: Final = 2 * MiB
Program = Literal["export", "daemon", "qemu-nbd"]


def command(program: Program, image: Path, socket: Path) -> list[str | Path]:
    if program == "qemu-nbd":
        return ["qemu-nbd", "--persistent", "--shared=0", f"--socket={socket}", "--format=qcow2", "--discard=unmap",
                image]
    if program == "export":
        return blockstep("export", "--format", "qcow2", "--socket", socket, image)
    node = {"driver": "qcow2", "node-name": "disk", "discard": "unmap",
            "file": {"driver": "file", "filename": str(image)}}
    return blockstep("daemon", "--blockdev", json.dumps(node), "--nbd-server", f"addr.type=unix,addr.path={socket}",
                     "--export", "type=nbd,id=e,node-name=disk,name=,writable=on")


class Disk:
    """An image, and what it must read as. ``sure``: with doubts, after a crash; ``latest``: while all is well."""

    def __init__(self, path: Path, options: str, rnd: random.Random) -> None:
        self.path, self.rnd = path, rnd
        base = path.with_name("base")
        base.write_bytes(rnd.randbytes(SIZE // 2 + 777))
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", path, str(SIZE))
        self.latest = bytearray(base.read_bytes().ljust(SIZE, b"\0"))
        self.sure = Content(self.latest)
        self.done = 0

    @contextmanager
    def served(self, program: Program) -> Iterator[subprocess.Popen[bytes]]:
        socket = self.path.with_name(f"{program}.sock")
        socket.unlink(missing_ok=True)
        with started(command(program, self.path, socket), socket, env=environment()) as process:
            self.address = UnixAddress(str(socket))
            yield process

    async def use(self, turns: int, process: subprocess.Popen[bytes], kill_after: int | None = None) -> None:
        """Requests of a guest, some at a time; ``kill_after`` so many, which is in the middle of some."""
        client = await Client.connect(self.address, "")
        left = kill_after

        async def request(offset: int, length: int) -> None:
            nonlocal left
            zero = self.rnd.random() < 0.2
            data = bytes(length) if zero else self.rnd.randbytes(length)
            flags = self.rnd.choice((0, 0, 0, FUA))
            self.sure.may_write(offset, data)
            if zero:
                await client.write_zeroes(offset, length, self.rnd.choice((0, CMD_FLAG_NO_HOLE)))
            else:
                await client.pwrite(offset, data, flags)
            self.latest[offset:offset + length] = data
            self.done += 1
            if left is not None:
                left -= 1
                if not left:
                    process.kill()

        try:
            for _ in range(turns):
                parts = self.rnd.sample(range(0, SIZE, 128 * KiB), self.rnd.choice((1, 3, 8)))
                ended = await asyncio.gather(*(request(*self._range(part)) for part in parts), return_exceptions=True)
                if any(isinstance(one, Exception) for one in ended):
                    assert left is not None, ended
                    assert left <= 0, ended
                    break
                if self.rnd.random() < 0.4:
                    await self._flush(client)
                if self.rnd.random() < 0.2:
                    await self._discard(client)
        except OSError:
            if left is None or left > 0:
                raise
        finally:
            client.yank()

    def _range(self, part: int) -> tuple[int, int]:
        offset = part + self.rnd.choice((0, self.rnd.randrange(60 * KiB), self.rnd.randrange(15) * 4096))
        return offset, self.rnd.choice((1, 512, 4096, 4096, 16384, 64 * KiB))

    async def _flush(self, client: Client) -> None:
        latest = bytes(self.latest)
        await client.flush()
        self.sure = Content(latest)

    async def _discard(self, client: Client) -> None:
        offset = self.rnd.randrange(SIZE - 200_000)
        self.sure.may_write(offset, bytes(200_000))
        await client.discard(offset, 200_000)
        self.latest[offset:offset + 200_000] = await client.pread(offset, 200_000)

    def read(self) -> bytes:
        """What the image reads as, by qemu-img."""
        plain = self.path.with_suffix(".plain")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path, plain)
        return plain.read_bytes()

    def crashed(self) -> None:
        """Leaks at worst, and the bytes are possible; they are what there is from now on."""
        found, ours = qemu_check(self.path), our_check(self.path)
        assert (ours.corruptions, ours.leaks) == (found.get("corruptions", 0), found.get("leaks", 0))
        assert not ours.corruptions
        got = self.read()
        assert not (wrong := self.sure.differs(got)), wrong
        self.latest, self.sure = bytearray(got), Content(got)

    def closed(self) -> None:
        """Nothing is wrong, and the bytes are what was written."""
        clean(self.path)
        assert self.read() == self.latest
        self.sure = Content(self.latest)


def qemu_check(path: Path) -> dict[str, int]:
    done = run("qemu-img", "check", "--output=json", "-f", "qcow2", path, check=False)
    found: dict[str, int] = json.loads(done.stdout)
    assert not found["check-errors"]
    return found


def clean(path: Path) -> None:
    """qemu-img finds neither leaks nor anything worse."""
    found = qemu_check(path)
    assert (found.get("corruptions", 0), found.get("leaks", 0)) == (0, 0)


def our_check(path: Path) -> CheckResult:
    with open(path, "rb") as file:
        fd = file.fileno()
        return check(lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size)


OPTIONS: Final = ("compat=1.1", "compat=1.1,cluster_size=512,refcount_bits=64", "compat=0.10,cluster_size=4k")


@pytest.mark.parametrize("options", OPTIONS)
def test_a_program_that_is_killed_leaves_leaks_at_worst_and_the_next_one_goes_on(options: str, tmp_path: Path) -> None:
    rnd = random.Random(options)
    disk = Disk(tmp_path / "disk.qcow2", options, rnd)
    programs: tuple[Program, ...] = ("export", "daemon", "export", "qemu-nbd", "export")
    for program in programs:
        with disk.served(program) as process:
            asyncio.run(disk.use(1000, process, kill_after=rnd.randrange(1, 120)))
            assert process.wait(10) == -signal.SIGKILL
        disk.crashed()
    run(*blockstep("img", "check", "--repair", "leaks", disk.path), check=False)
    assert qemu_check(disk.path).get("leaks", 0) == 0
    with disk.served("export") as process:
        asyncio.run(disk.use(10, process))
        process.terminate()
        assert process.wait(10) == 0
    disk.closed()


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_qemu_and_blockstep_use_an_image_in_turns_and_close_it_clean(options: str, tmp_path: Path) -> None:
    rnd = random.Random(options)
    disk = Disk(tmp_path / "disk.qcow2", options, rnd)
    programs: tuple[Program, ...] = ("export", "qemu-nbd", "daemon", "qemu-nbd", "export", "daemon", "qemu-nbd",
                                     "export")
    for program in programs:
        with disk.served(program) as process:
            asyncio.run(disk.use(8, process))
            process.terminate()
            assert process.wait(10) == 0
        disk.closed()


@pytest.mark.parametrize("flushes", [False, True])
@scenario
async def test_a_primary_that_is_killed_leaves_leaks_at_worst_and_what_its_guest_had_flushed(
        tmp_path: Path, flushes: bool) -> None:
    async with Pair(tmp_path, disks=2, size=2 * MiB, format="qcow2") as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.write(150)
        if flushes:
            async with pair.primary.clients() as clients:
                for client in clients:
                    await client.flush()
            flushed = [b"".join(chunks) for chunks in await pair.primary.read_disks()]
            pair.primary.kill()
            assert [await pair.file("primary", number) for number in range(2)] == flushed
        else:
            async with pair.writing():
                await pair.written(rnd_count := 77)
                pair.primary.kill()
            assert pair.writes.acknowledged >= 150 + rnd_count
        for number in range(2):
            found = qemu_check(tmp_path / f"disk{number}.primary")
            assert not found.get("corruptions")


@scenario
async def test_after_a_failover_the_standbys_images_are_exactly_the_checkpoint_and_clean(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2, size=2 * MiB, format="qcow2") as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(100)
            low, high = await pair.checkpoint()
            await pair.written(100)
            pair.primary.kill()
        await pair.standby.execute("replication-failover")
        await pair.standby.until(state="promoted")
        pair.standby.send(signal.SIGTERM)
        assert await pair.standby.ended() == 0
        assert low <= pair.writes.prove([[await pair.file("standby", number)] for number in range(2)]) <= high
        for number in range(2):
            clean(tmp_path / f"disk{number}.standby")


@scenario
async def test_a_promoted_standby_that_is_killed_keeps_checkpoint_and_what_was_flushed_since(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=2 * MiB, format="qcow2") as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(100)
            await pair.checkpoint()
            await pair.written(50)
            pair.primary.kill()
        await pair.standby.execute("replication-failover")
        await pair.standby.until(state="promoted")
        async with pair.standby.clients() as (guest,):
            await guest.pwrite(4096, b"flushed" * 1000)
            await guest.flush()
            [chunks] = await pair.standby.read_disks()
            await guest.pwrite(MiB, b"not flushed")
            pair.standby.kill()
        found = qemu_check(tmp_path / "disk0.standby")
        assert not found.get("corruptions")
        got = await pair.file("standby")
        assert got[:MiB] == b"".join(chunks)[:MiB]


async def no_room(request: Awaitable[None]) -> bool:
    """Whether a request found none. It can have no other error."""
    try:
        await request
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
    return False


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_a_full_file_system_is_an_error_of_the_guest_and_harms_nothing(options: str, tmp_path: Path) -> None:
    rnd = random.Random(options)
    with small_file_system(tmp_path, MiB) as place:
        path = place / "disk.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(4 * MiB))
        content = Content(bytes(4 * MiB))

        async def fill(client: Client) -> int:
            refused = 0
            for number in range(100):
                offset, length = rnd.randrange(4 * MiB - 70_000), rnd.choice((512, 4096, 65536))
                data = rnd.randbytes(length)
                if await no_room(client.pwrite(offset, data)):
                    content.may_write(offset, data)
                    refused += 1
                else:
                    content.write(offset, data)
                if number % 10 == 9:
                    await no_room(client.flush())
            got = bytes(await client.pread(0, 4 * MiB))
            assert not (wrong := content.differs(got)), wrong
            content.adopt(got)
            return refused

        async def go() -> None:
            client = await Client.connect(UnixAddress(str(socket)), "")
            assert await fill(client)
            await in_thread(run, "mount", "-o", "remount,size=32M", place)
            assert not await fill(client)
            await client.flush()
            client.yank()

        socket = tmp_path / "export.sock"
        with started(command("export", path, socket), socket, env=environment()) as process:
            asyncio.run(go())
            process.terminate()
            assert process.wait(10) == 0
        clean(path)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "plain")
        assert not content.differs((tmp_path / "plain").read_bytes())
