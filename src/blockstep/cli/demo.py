"""``blockstep demo``: the main job on this machine, with proof.

Two processes, primary and standby, talk over TCP. A writer goes on writing numbered blocks through the primary's
exports, one after the other over all disks, so that the state of all disks together is told by one number: how
many writes they have seen. After several checkpoints, and in the middle of its writing, the primary is killed.

The proof does not believe any of the two: from the original image and the list of writes it works out what the
disks must be after n writes, where n is what is found on the standby, and compares digests of every byte.
n must be at least what had been acknowledged when the last checkpoint was asked for, and at most what had been
sent when it was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from blockstep.errors import BlockstepError
from blockstep.nbd.client import Client
from blockstep.nbd.uri import UnixAddress
from blockstep.qmp.client import Connection, open_connection
from blockstep.units import MiB, format_duration, format_size, parse_size

_BLOCK = 4096
_MARK = struct.Struct(">8sQII")  # magic, number of the write, disk, filler
_MAGIC = b"blkstep!"


def demo(
    disk: Annotated[Path | None, typer.Option("--disk", metavar="IMAGE", help="A raw image to work on a copy of; "
                    "otherwise disks with random content are made.")] = None,
    disks: Annotated[int, typer.Option("--disks", min=1, max=16, help="How many disks.")] = 2,
    size: Annotated[str, typer.Option("--size", help="The size of a made disk.")] = "64M",
    checkpoints: Annotated[int, typer.Option("--checkpoints", min=1, max=100, help="How many.")] = 5,
) -> None:
    """Replicate, take checkpoints, kill the primary, fail over, and prove what is left.

    Runs a primary and a standby on this machine for some seconds. Exit code 0: proven.
    """
    directory = Path(tempfile.mkdtemp(prefix="blockstep-demo-"))
    try:
        asyncio.run(_Demo(directory, Console(), disk, disks, parse_size(size, "--size"), checkpoints).run())
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Demo:
    def __init__(
        self, directory: Path, console: Console, image: Path | None, disks: int, size: int, checkpoints: int
    ) -> None:
        self.directory, self.console = directory, console
        self.names = [f"disk{number}" for number in range(disks)]
        self.image = image
        self.size = image.stat().st_size if image else size
        if self.size < 64 * _BLOCK:
            raise BlockstepError(f"a disk for the demo must have at least {format_size(64 * _BLOCK)}")
        self.checkpoints = checkpoints
        self.processes: list[subprocess.Popen[bytes]] = []
        #: The writes in their order: (disk, offset). The n-th carries the number n + 1.
        self.writes: list[tuple[int, int]] = []
        self.acknowledged = 0
        self.random = random.Random(20)
        self.steps: list[tuple[str, str, str]] = []

    async def run(self) -> None:
        say = self.console.print
        try:
            self._make_images()
            standby = await self._start("standby", "--link", "127.0.0.1:0")
            link = (await standby.execute("query-replication"))["link"]
            primary = await self._start("primary", "--standby", link, "--checkpoint-every", "0",
                                        "--checkpoint-bytes", "0")
            await self._first_sync(primary)
            stop = asyncio.Event()
            writer = asyncio.create_task(self._write_until(stop))
            low, high = await self._take_checkpoints(primary)
            await self._kill_primary(stop, writer)
            await primary.close()
            await self._fail_over(standby, low, high)
            await standby.close()
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        table = Table("step", "what happened", "time", title="blockstep demo")
        for step in self.steps:
            table.add_row(*step)
        say(table)
        say("[bold green]proven:[/] the standby held exactly the last checkpoint, on all disks")

    # --- the steps ---

    def _make_images(self) -> None:
        with self._step("images") as note:
            for name in self.names:
                original = self.directory / f"{name}.original"
                if self.image:
                    shutil.copyfile(self.image, original)
                else:
                    with open(original, "wb") as file:
                        file.truncate(self.size)
                        for start in range(0, self.size, 4 * MiB):  # every fourth MiB has data
                            file.seek(start)
                            file.write(self.random.randbytes(min(MiB, self.size - start)))
                shutil.copyfile(original, self.directory / f"{name}.primary")
            note.append(f"{len(self.names)} x {format_size(self.size)}")

    async def _start(self, role: str, *options: str) -> Connection:
        with self._step(f"start {role}") as note:
            arguments = [sys.executable, "-m", "blockstep", role, "--pair", "demo", *options,
                         "--socket", str(self.directory / f"{role}.nbd"), "--qmp", str(self.directory / f"{role}.qmp")]
            for name in self.names:
                path = self.directory / f"{name}.{role}"
                arguments += ["--disk", f"{name}={path}" + (f",size={self.size}" if role == "standby" else "")]
            with open(self.directory / f"{role}.log", "wb") as log:
                process = subprocess.Popen(arguments, stdout=log, stderr=log)
            self.processes.append(process)
            note.append(f"process {process.pid}")
            while True:
                with contextlib.suppress(OSError):
                    return await open_connection(self.directory / f"{role}.qmp", timeout=10)
                if process.poll() is not None:
                    raise BlockstepError(f"the {role} did not start:\n{(self.directory / f'{role}.log').read_text()}")
                await asyncio.sleep(0.02)

    async def _first_sync(self, primary: Connection) -> None:
        with self._step("first sync") as note:
            work: dict[str, Any] = {}
            with self.console.status("first sync") as spinner:
                while True:
                    status = await primary.execute("query-replication")
                    if work := status["work"] or work:
                        spinner.update(f"first sync: {format_size(work['current'])} of {format_size(work['total'])}")
                    if status["health"] == "healthy":
                        break
                    await asyncio.sleep(0.02)
            note.append(format_size(len(self.names) * self.size))

    async def _take_checkpoints(self, primary: Connection) -> tuple[int, int]:
        low = high = 0
        with self.console.status("writing") as spinner:
            for number in range(1, self.checkpoints + 1):
                enough = self.acknowledged + 2000
                while self.acknowledged < enough:
                    await asyncio.sleep(0.02)
                    spinner.update(f"writing: {self.acknowledged} blocks, next is checkpoint {number}")
                with self._step(f"checkpoint {number}") as note:
                    low = self.acknowledged
                    answer = await primary.execute("replication-checkpoint")
                    high = len(self.writes)
                    note.append(f"link paused {format_duration(answer['pause'])}; writer at {self.acknowledged}")
        return low, high

    async def _kill_primary(self, stop: asyncio.Event, writer: asyncio.Task[None]) -> None:
        enough = self.acknowledged + 1000
        while self.acknowledged < enough:
            await asyncio.sleep(0.01)
        with self._step("kill primary") as note:
            self.processes[1].send_signal(signal.SIGKILL)
            self.processes[1].wait()
            stop.set()
            await writer
            note.append(f"SIGKILL in mid-write, after {self.acknowledged} acknowledged blocks")

    async def _fail_over(self, standby: Connection, low: int, high: int) -> None:
        with self._step("failover") as note:
            await standby.execute("replication-failover", {"to": "checkpoint"}, timeout=30)
            client = await Client.connect(UnixAddress(str(self.directory / "standby.nbd")), self.names[0])
            block = await client.pread(0, _BLOCK)
            await client.pwrite(0, block)
            note.append("command to first served write")
        with self._step("proof") as note:
            found = [self._digest_of(await self._read_disk(name)) for name in self.names]
            seen = max(number for _, number in found)
            if not low <= seen <= high:
                raise BlockstepError(f"the standby has seen {seen} writes; it should be {low} to {high}")
            for disk, name in enumerate(self.names):
                expected = self._expected(disk, seen)
                if expected != found[disk][0]:
                    raise BlockstepError(f"disk '{name}' is not what it was after {seen} writes: digest "
                                         f"{found[disk][0]}, expected {expected}")
            note.append(f"all bytes as after {seen} writes; {self.acknowledged - seen} later ones are gone")
        with self._step("merge") as note:
            while (status := await standby.execute("query-replication"))["state"] == "failover":
                await asyncio.sleep(0.01)
            note.append(f"buffers merged, state {status['state']}")
        with self._step("go on") as note:
            for number in range(1000):
                await client.pwrite(number % 64 * _BLOCK, self._block(0, number))
            await client.flush()
            if bytes(await client.pread(63 * _BLOCK, _BLOCK)) != self._block(0, 959):
                raise BlockstepError("a write on the promoted standby was not read back")
            note.append("1000 writes on the standby")
        await client.close()

    # --- writing and reading ---

    async def _write_until(self, stop: asyncio.Event) -> None:
        address = UnixAddress(str(self.directory / "primary.nbd"))
        clients = [await Client.connect(address, name) for name in self.names]
        try:
            while not stop.is_set():
                disk = self.random.randrange(len(self.names))
                offset = self.random.randrange(self.size // _BLOCK) * _BLOCK
                self.writes.append((disk, offset))
                await clients[disk].pwrite(offset, self._block(disk, len(self.writes)))
                self.acknowledged = len(self.writes)
        except OSError:
            pass  # the primary was killed
        for client in clients:
            client.yank()

    @staticmethod
    def _block(disk: int, number: int) -> bytes:
        return _MARK.pack(_MAGIC, number, disk, 0) * (_BLOCK // _MARK.size) + bytes(_BLOCK % _MARK.size)

    async def _read_disk(self, name: str) -> list[bytes]:
        client = await Client.connect(UnixAddress(str(self.directory / "standby.nbd")), name)
        chunks = [bytes(await client.pread(offset, min(MiB, self.size - offset)))
                  for offset in range(0, self.size, MiB)]
        await client.close()
        return chunks

    @staticmethod
    def _digest_of(chunks: list[bytes]) -> tuple[str, int]:
        """The digest of a disk, and the highest number of a write found on it."""
        digest, highest = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            for offset in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
                if chunk.startswith(_MAGIC, offset):
                    highest = max(highest, _MARK.unpack_from(chunk, offset)[1])
        return digest.hexdigest(), highest

    def _expected(self, disk: int, seen: int) -> str:
        """The digest of a disk after the first ``seen`` writes."""
        last = {offset: number for number, (where, offset) in enumerate(self.writes[:seen], 1) if where == disk}
        digest = hashlib.sha256()
        with open(self.directory / f"{self.names[disk]}.original", "rb") as file:
            for start in range(0, self.size, MiB):
                chunk = bytearray(file.read(MiB))
                for offset in range(start, start + len(chunk), _BLOCK):
                    if offset in last:
                        chunk[offset - start : offset - start + _BLOCK] = self._block(disk, last[offset])
                digest.update(chunk)
        return digest.hexdigest()

    # --- the table ---

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[list[str]]:
        note: list[str] = []
        started = time.perf_counter()
        yield note
        took = format_duration(time.perf_counter() - started)
        self.steps.append((name, ", ".join(note), took))
        self.console.print(f"[dim]{took:>9}[/]  {name}: {', '.join(note)}", highlight=False)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("demo")(demo)
