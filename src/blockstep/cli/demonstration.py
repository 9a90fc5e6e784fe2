"""What ``blockstep demo`` shows: the main job on this machine, with proof.

Two processes, primary and standby, talk over TCP. A writer goes on writing numbered blocks through the primary's
exports, one after the other over all disks, so that the state of all disks together is told by one number: how
many writes they have seen. After several checkpoints, and in the middle of its writing, the primary is killed.

The proof does not believe any of the two (`blockstep.testing.numbered`): it works out what the disks must be after
n writes, where n is what is found on the standby, and compares digests of every byte. n must be at least what had
been acknowledged when the last checkpoint was asked for, and at most what had been sent when it was answered.

However it ends, the two processes end with it; and what it made on disk is gone, but after a SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from blockstep.cli.signals import run_unless_told
from blockstep.errors import BlockstepError
from blockstep.images.convert import Conversion, convert
from blockstep.images.opened import ImageName
from blockstep.testing.numbered import BLOCK, NumberedWrites
from blockstep.testing.pair import Pair
from blockstep.units import format_duration, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def show(image: Path | None, format: str, disks: int, size: int, checkpoints: int) -> None:
    """All of it. ``size``: of each disk in bytes, if there is no image. Raises BlockstepError if it is not proven."""
    run_unless_told(_show(image, format, disks, size, checkpoints))


async def _show(image: Path | None, format: str, disks: int, size: int, checkpoints: int) -> None:
    directory = Path(tempfile.mkdtemp(prefix="blockstep-demo-"))
    try:
        await _Demo(directory, _Console(), image, format, disks, size, checkpoints).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads: that is an error as it is of other commands; rich would end the program with 1."""
        raise


class _Demo:
    def __init__(
        self, directory: Path, console: Console, image: Path | None, format: str, disks: int, size: int,
        checkpoints: int
    ) -> None:
        self.directory, self.console = directory, console
        self.image, self.format, self.disks = image, format, disks
        self.size = size
        self.checkpoints = checkpoints
        self.steps: list[tuple[str, str, str]] = []

    async def run(self) -> None:
        with self._step("images") as note:
            if self.image and self.format != "raw":
                image, self.image = ImageName(str(self.image), self.format), self.directory / "image"
                await convert(Conversion([image], ImageName(str(self.image), "raw", cache="unsafe")))
            self.size = self.image.stat().st_size if self.image else self.size
            if self.size < 64 * BLOCK:
                raise BlockstepError(f"a disk for the demo must have at least {format_size(64 * BLOCK)}")
            self.pair = Pair(self.directory, self.disks, self.size, image=self.image, pair="demo", format=self.format)
            note.append(f"{self.disks} x {format_size(self.size)}")
        async with self.pair:
            await self._start()
            await self._first_sync()
            async with self.pair.writing() as writes:
                low, high = await self._take_checkpoints(writes)
                await self._kill_primary(writes)
            await self._fail_over(writes, low, high)
        table = Table("step", "what happened", "time", title="blockstep demo")
        for step in self.steps:
            table.add_row(*step)
        self.console.print(table)
        self.console.print("[bold green]proven:[/] the standby held exactly the last checkpoint, on all disks")

    async def _start(self) -> None:
        with self._step("start standby") as note:
            note.append(f"process {(await self.pair.start_standby()).process.pid}")
        with self._step("start primary") as note:
            note.append(f"process {(await self.pair.start_primary()).process.pid}")

    async def _first_sync(self) -> None:
        with self._step("first sync") as note:
            work: dict[str, Any] = {}
            with self.console.status("first sync") as spinner:
                while True:
                    status = await self.pair.primary.status()
                    if work := status["work"] or work:
                        spinner.update(f"first sync: {format_size(work['current'])} of {format_size(work['total'])}")
                    if status["health"] == "healthy":
                        break
                    await asyncio.sleep(0.02)
            note.append(format_size(self.disks * self.size))

    async def _take_checkpoints(self, writes: NumberedWrites) -> tuple[int, int]:
        low = high = 0
        with self.console.status("writing") as spinner:
            for number in range(1, self.checkpoints + 1):
                spinner.update(f"writing: {writes.acknowledged} blocks, next is checkpoint {number}")
                await self.pair.written(2000)
                with self._step(f"checkpoint {number}") as note:
                    low = writes.acknowledged
                    answer = await self.pair.primary.execute("replication-checkpoint")
                    high = writes.sent
                    note.append(f"link paused {format_duration(answer['pause'])}; writer at {writes.acknowledged}")
        return low, high

    async def _kill_primary(self, writes: NumberedWrites) -> None:
        await self.pair.written(1000)
        with self._step("kill primary") as note:
            self.pair.primary.kill()
            note.append(f"SIGKILL in mid-write, after {writes.acknowledged} acknowledged blocks")

    async def _fail_over(self, writes: NumberedWrites, low: int, high: int) -> None:
        standby = self.pair.standby
        with self._step("failover") as note:
            await standby.execute("replication-failover", to="checkpoint")
            client = await standby.client(self.pair.names[0])
            block = await client.pread(0, BLOCK)
            await client.pwrite(0, block)
            note.append("command to first served write")
        with self._step("proof") as note:
            seen = await self.pair.proven(standby)
            if not low <= seen <= high:
                raise BlockstepError(f"the standby has seen {seen} writes; it should be {low} to {high}")
            note.append(f"all bytes as after {seen} writes; {writes.acknowledged - seen} later ones are gone")
        with self._step("merge") as note:
            status = await standby.until(lambda status: status["state"] != "failover")
            note.append(f"buffers merged, state {status['state']}")
        with self._step("go on") as note:
            for number in range(1000):
                await client.pwrite(number % 64 * BLOCK, writes.block(0, number))
            await client.flush()
            if bytes(await client.pread(63 * BLOCK, BLOCK)) != writes.block(0, 959):
                raise BlockstepError("a write on the promoted standby was not read back")
            note.append("1000 writes on the standby")
        await client.close()

    # --- the table ---

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[list[str]]:
        note: list[str] = []
        started = time.perf_counter()
        yield note
        took = format_duration(time.perf_counter() - started)
        self.steps.append((name, ", ".join(note), took))
        self.console.print(f"[dim]{took:>9}[/]  {name}: {', '.join(note)}", highlight=False)
