"""A real pair on this machine: a standby and a primary, each a process of its own, over TCP.

    async with Pair(directory, disks=2, size=4 * MiB) as pair:
        await pair.start("--checkpoint-every", "0")
        await pair.primary.until(health="healthy")
        async with pair.writing() as writes:
            await pair.primary.execute("replication-checkpoint")
        pair.primary.kill()
        await pair.standby.execute("replication-failover")
        writes.prove(await pair.standby.read_disks())

A `Side` is one process with its control connection. Its sockets lie in the pair's directory, its output in a file
beside them. Whatever the processes do, `Pair` ends them with the block; and they end with the process that has started
them, also when that is killed. Nothing here sleeps and hopes: what is waited for has a deadline, and what did not come
is raised with the last status.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from blockstep.errors import BlockstepError
from blockstep.images.convert import Conversion, convert
from blockstep.images.opened import ImageName, opened
from blockstep.nbd.client import Client
from blockstep.nbd.uri import UnixAddress
from blockstep.qmp.client import Connection, connect, open_connection
from blockstep.testing.numbered import NotAState, NumberedWrites, make_image
from blockstep.testing.processes import blockstep as blockstep_command
from blockstep.testing.processes import free_ports
from blockstep.units import MiB

#: Seconds that a process may take to start, and anything that is waited for, unless told otherwise.
START_LIMIT: Final = 20.0
LIMIT: Final = 15.0
_POLL: Final = 0.01

#: prctl(PR_SET_PDEATHSIG, SIGKILL), which the standard library does not have.
_END_WITH_PARENT: Final = f"import ctypes; ctypes.CDLL(None).prctl(1, {signal.SIGKILL:d}); "

Status = dict[str, Any]


class NotInTime(BlockstepError):
    """What was waited for did not come."""


class Side:
    """One process of a pair. Made by `start`."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], directory: Path, names: Sequence[str],
                 connection: Connection) -> None:
        self.role, self.process, self.directory = role, process, directory
        self.names = list(names)
        self.connection = connection
        self.events: list[dict[str, Any]] = []  #: all that were received, in order
        self._listener = asyncio.get_running_loop().create_task(self._listen())

    @classmethod
    async def start(cls, role: str, directory: Path, disks: Mapping[str, str], *options: str,
                    **popen: Any) -> Side:
        """Start ``blockstep ROLE`` with ``options`` and wait for its control socket.

        ``disks``: name -> path and what follows it (``,size=...``). Raises BlockstepError with what it printed if
        it ends before that.
        """
        command = blockstep_command(role, "--socket", directory / f"{role}.nbd", "--qmp", directory / f"{role}.qmp",
                                    *options, before=_END_WITH_PARENT)
        command += ["--state", str(directory / ("standby.promoted" if role == "standby" else "primary.ended"))]
        for name, path in disks.items():
            command += ["--disk", f"{name}={path}"]
        log = directory / f"{role}.log"
        process = _spawn(command, log, popen)
        deadline = time.monotonic() + START_LIMIT
        try:
            while True:
                with contextlib.suppress(OSError):
                    connection = await open_connection(directory / f"{role}.qmp", timeout=LIMIT)
                    return cls(role, process, directory, list(disks), connection)
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BlockstepError(f"the {role} did not start (exit code {process.poll()}):\n{log.read_text()}")
                await asyncio.sleep(_POLL)
        except BaseException:
            process.kill()
            process.wait()
            raise

    # --- its control socket ---

    async def execute(self, command: str, timeout: float = LIMIT, **arguments: Any) -> Any:
        """A command; see `Connection.execute`."""
        return await self.connection.execute(command, arguments, timeout=timeout)

    def begin(self, command: str, timeout: float = LIMIT, **arguments: Any) -> asyncio.Task[Any]:
        """A command on a connection of its own, which `execute` does not wait behind."""

        async def run() -> Any:
            async with connect(self.directory / f"{self.role}.qmp", timeout=timeout) as connection:
                return await connection.execute(command, arguments)

        return asyncio.get_running_loop().create_task(run())

    async def status(self, timeout: float = LIMIT) -> Status:
        """The result of query-replication."""
        status: Status = await self.connection.execute("query-replication", timeout=timeout)
        return status

    async def until(self, condition: Callable[[Status], object] | None = None, limit: float = LIMIT,
                    **facts: Any) -> Status:
        """Wait until the status has all ``facts`` and meets the ``condition``. Raises NotInTime."""
        deadline = time.monotonic() + limit
        while True:
            try:
                status = await self.status()
            except OSError as error:
                raise BlockstepError(f"the {self.role} (exit code {self.process.poll()}): {error}\n"
                                     f"{self.printed}") from error
            if all(status[name] == fact for name, fact in facts.items()) and (condition is None or condition(status)):
                return status
            if time.monotonic() > deadline:
                raise NotInTime(f"{self.role}: not within {limit:g} s: {facts or 'the condition'}; it is {status}\n"
                                f"{self.printed}")
            await asyncio.sleep(_POLL)

    async def heard(self, name: str, limit: float = LIMIT, since: int = 0, **facts: Any) -> dict[str, Any]:
        """Wait for an event with these ``facts`` in its data; ``since``: skip so many. Raises NotInTime."""
        deadline = time.monotonic() + limit
        while True:
            for event in self.events[since:]:
                data: dict[str, Any] = event.get("data", {})
                if event["event"] == name and all(data.get(key) == value for key, value in facts.items()):
                    return data
            if time.monotonic() > deadline:
                raise NotInTime(f"{self.role}: no event {name} with {facts} within {limit:g} s; there were "
                                f"{self.events[since:]}")
            await asyncio.sleep(_POLL)

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, BlockstepError):
            async for event in self.connection.events():
                self.events.append(event)

    # --- its disks ---

    @property
    def nbd(self) -> Path:
        """The socket on which a guest finds its disks."""
        return self.directory / f"{self.role}.nbd"

    async def client(self, disk: str) -> Client:
        """A connection to a disk, as a guest's."""
        return await Client.connect(UnixAddress(str(self.nbd)), disk)

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[list[Client]]:
        """A connection to each disk."""
        clients = [await self.client(name) for name in self.names]
        try:
            yield clients
        finally:
            for client in clients:
                client.yank()

    async def read_disks(self) -> list[list[bytes]]:
        """The content of each disk, in chunks of 1 MiB, for `NumberedWrites.prove`."""
        async with self.clients() as clients:
            return [[bytes(await client.pread(offset, min(MiB, client.info.size - offset)))
                     for offset in range(0, client.info.size, MiB)] for client in clients]

    # --- its process ---

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return (self.directory / f"{self.role}.log").read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    @property
    def alive(self) -> bool:
        """Whether the process runs, or is stopped."""
        return self.process.poll() is None

    async def ended(self, limit: float = LIMIT) -> int:
        """Wait for the process to end by itself: its exit code. Raises NotInTime."""
        deadline = time.monotonic() + limit
        while (code := self.process.poll()) is None:
            if time.monotonic() > deadline:
                raise NotInTime(f"the {self.role} has not ended within {limit:g} s\n{self.printed}")
            await asyncio.sleep(_POLL)
        return code

    async def close(self) -> None:
        """Kill the process and drop the connection."""
        self.kill()
        self._listener.cancel()
        await self.connection.close()


class Pair:
    """The two sides and their disks. ``names``: of the disks, which are called disk0, disk1, ... otherwise.

    ``image``: the disk of the primary, raw, to work on copies of; otherwise images of ``size`` bytes are made.
    ``format``: what the disks are made in, of both sides and of the standby's buffers (raw: these are in memory).
    """

    #: Of pairs that are not told one.
    format: str = "raw"

    def __init__(self, directory: Path, disks: int = 1, size: int = MiB, *, names: Sequence[str] = (),
                 image: Path | None = None, pair: str = "test", format: str | None = None) -> None:
        self.directory, self.pair = directory, pair
        self.format = format or self.format
        self.names = list(names) or [f"disk{number}" for number in range(disks)]
        self.size = image.stat().st_size if image else size
        self.originals = [directory / f"{name}.original" for name in self.names]
        for number, (name, original) in enumerate(zip(self.names, self.originals, strict=True)):
            if image:
                shutil.copyfile(image, original)
            else:
                make_image(original, size, number)
            if self.format == "raw":
                shutil.copyfile(original, directory / f"{name}.primary")
        self.writes = NumberedWrites(self.originals)
        self.sides: list[Side] = []
        self.standby: Side
        self.primary: Side
        self.link = ""  #: where the standby waits for its primary: HOST:PORT

    async def __aenter__(self) -> Self:
        if self.format != "raw":
            for number, original in enumerate(self.originals):
                await self.make_file(original, "primary", number)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        for side in self.sides:
            await side.close()

    def disks(self, role: str) -> dict[str, str]:
        """The disks of a side, as its command line has them."""
        more = f",size={self.size}" if role == "standby" else ""
        more += f",format={self.format}" if self.format != "raw" else ""
        return {name: f"{self.directory / f'{name}.{role}'}{more}" for name in self.names}

    async def make_file(self, source: Path, role: str, disk: int = 0) -> None:
        """Make the file of a side's disk anew, with the content of ``source``, which is raw."""
        target = ImageName(str(self.directory / f"{self.names[disk]}.{role}"), self.format, cache="unsafe")
        await convert(Conversion([ImageName(str(source), "raw")], target))

    async def file(self, role: str, disk: int = 0) -> bytes:
        """What the file of a side's disk reads as, past its program: of one that has ended, or that is asleep."""
        name = ImageName(str(self.directory / f"{self.names[disk]}.{role}"), self.format)
        async with opened(name) as image:
            return bytes(await image.pread(0, image.length))

    async def start(self, *primary: str, standby: Sequence[str] = ()) -> None:
        """Start both, with options for each. Unless told otherwise no checkpoint is taken but by command."""
        await self.start_standby(*standby)
        await self.start_primary(*primary)

    async def start_standby(self, *options: str, link: str = "", **popen: Any) -> Side:
        """Start the standby; sets `link`, at which it can be started again."""
        defaults = ["--pair", self.pair, "--link", link or f"127.0.0.1:{free_ports(2)}"]
        if self.format == "qcow2":
            defaults += ["--buffer-format", "qcow2"]
            if "--buffer-dir" not in options:
                defaults += ["--buffer-dir", str(self.directory)]
        self.standby = await Side.start("standby", self.directory, self.disks("standby"), *defaults, *options, **popen)
        self.sides.append(self.standby)
        self.link = (await self.standby.status())["link"]
        return self.standby

    async def start_primary(self, *options: str, to: str = "", **popen: Any) -> Side:
        """Start the primary. ``to``: where it looks for its standby, if not at `link` itself (a proxy)."""
        defaults = ["--pair", self.pair, "--standby", to or self.link]
        for option in ("--checkpoint-every", "--checkpoint-bytes"):
            if option not in options:
                defaults += [option, "0"]
        self.primary = await Side.start("primary", self.directory, self.disks("primary"), *defaults, *options, **popen)
        self.sides.append(self.primary)
        return self.primary

    async def checkpoint(self) -> tuple[int, int]:
        """Take a checkpoint on the primary: the writes it has at the least, and at the most."""
        low = self.writes.acknowledged
        await self.primary.execute("replication-checkpoint")
        return low, self.writes.sent

    async def checkpoint_shows(self) -> None:
        """Take a checkpoint, and find on the standby exactly what the disks were then. Raises NotAState."""
        low, high = await self.checkpoint()
        seen = await self.proven(self.standby)
        if not low <= seen <= high:
            raise NotAState(f"the standby has seen {seen} writes; it should be {low} to {high}")

    async def proven(self, side: Side) -> int:
        """After how many writes the disks of a side are what they are. Raises NotAState."""
        return self.writes.prove(await side.read_disks())

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[NumberedWrites]:
        """Write to the primary's disks as long as the block lasts."""
        stop = asyncio.Event()
        async with AsyncExitStack() as stack:
            clients = await stack.enter_async_context(self.primary.clients())
            writer = asyncio.get_running_loop().create_task(self.writes.write_until(stop, clients))
            try:
                yield self.writes
            finally:
                stop.set()
                if self.primary.process.poll() is not None:
                    for client in clients:
                        client.yank()
                await writer

    async def write(self, count: int) -> None:
        """Write so many blocks to the primary's disks, and no more."""
        async with self.primary.clients() as clients:
            for _ in range(count):
                await self.writes.write(clients)

    async def written(self, more: int, limit: float = LIMIT) -> None:
        """Wait until the writer has had so many more writes acknowledged. Raises NotInTime."""
        enough, deadline = self.writes.acknowledged + more, time.monotonic() + limit
        while self.writes.acknowledged < enough:
            if self.writes.error:
                raise self.writes.error
            if time.monotonic() > deadline:
                raise NotInTime(f"the writer is at {self.writes.acknowledged}, not at {enough}, after {limit:g} s")
            await asyncio.sleep(0.002)


def environment() -> dict[str, str]:
    """For a process that is to run the blockstep that runs here, whether that is installed or not."""
    found = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([found, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _spawn(command: Sequence[str | Path], log: Path, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    options = {"env": environment(), **options}
    with open(log, "ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)
