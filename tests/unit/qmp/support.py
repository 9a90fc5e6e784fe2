"""A small program with a QMP socket, for the tests of this directory: its commands, its events, its context."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from blockstep.errors import JobNotFound, NodeNotFound, OptionError
from blockstep.qmp.commands import core
from blockstep.qmp.commands.core import Triple, Version
from blockstep.qmp.schema import Arguments, Event, Registry, Result
from blockstep.qmp.server import Server

VERSION = Version(qemu=Triple(major=7, minor=2, micro=0), package="blockstep test")

registry = Registry()


class Context:
    """What the commands below and those of `core` act on."""

    version = VERSION
    name: str | None = "test"
    run_state = "running"

    def __init__(self) -> None:
        self.quits = 0
        self.gate = asyncio.Event()
        self.log: list[Any] = []
        self.running = 0

    def request_quit(self) -> None:
        self.quits += 1


class Echo(Arguments):
    """Arguments of echo."""

    node_name: Annotated[str, Meta(description="What to say.")]
    times: Annotated[int, Meta(ge=1, le=3)] = 1


class Echoed(Result):
    """Result of echo."""

    node_name: str


class Failure(Arguments):
    """Arguments of fail."""

    kind: str


class Size(Arguments):
    """Arguments of blob."""

    size: int


@registry.event("TICK")
class Tick(Event):
    """For the tests of order."""

    count: int
    text: str = ""


@registry.event("PROGRESS", rate_limit=1.0, per=("device",))
class Progress(Event):
    """For the tests of rate limits."""

    device: str
    offset: int


@registry.command("echo")
async def echo(context: Context, args: Echo) -> Echoed:
    """Say it again."""
    context.log.append(args.node_name)
    return Echoed(node_name=args.node_name * args.times)


@registry.command("wait")
async def wait(context: Context, args: Arguments) -> None:
    """Until the gate opens."""
    context.running += 1
    try:
        await context.gate.wait()
        context.log.append("waited")
    finally:
        context.running -= 1


@registry.command("open", oob=True)
async def open_gate(context: Context, args: Arguments) -> None:
    """Open the gate."""
    context.gate.set()


@registry.command("blob")
async def blob(context: Context, args: Size) -> str:
    """A long answer."""
    context.log.append(args.size)
    return "x" * args.size


@registry.command("fail")
async def fail(context: Context, args: Failure) -> object:
    """In one of several ways."""
    errors: dict[str, Exception] = {
        "node": NodeNotFound("n0"), "job": JobNotFound("j0"), "option": OptionError("o", 1, "2"),
        "os": OSError(5, "broken"), "bug": ZeroDivisionError("oops")}
    if args.kind == "result":
        return object()
    raise errors[args.kind]


REGISTRY = Registry.of(core.commands, registry)


class Peer:
    """A client that sends what it is told and shows what it gets: lines as dicts."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def line(self) -> dict[str, Any]:
        """The next line; fails at the end of the stream."""
        text = await self.reader.readline()
        assert text.endswith(b"\r\n"), f"the connection ended with {text!r}"
        assert text.isascii()
        message: dict[str, Any] = json.loads(text)
        return message

    def send(self, *requests: bytes | dict[str, Any]) -> None:
        for request in requests:
            self.writer.write(request if isinstance(request, bytes) else json.dumps(request).encode())

    async def ask(self, request: bytes | dict[str, Any]) -> dict[str, Any]:
        self.send(request)
        return await self.line()

    async def negotiate(self, *enable: str) -> None:
        assert "QMP" in await self.line()
        answer = await self.ask({"execute": "qmp_capabilities", "arguments": {"enable": list(enable)}})
        assert answer == {"return": {}}

    async def at_end(self) -> bool:
        return await self.reader.read(1) == b""

    def close(self) -> None:
        self.writer.close()


async def dial(path: Path | tuple[str, int]) -> Peer:
    """A connection whose greeting has not been read. `serving` closes it at the latest."""
    if isinstance(path, tuple):
        peer = Peer(*await asyncio.open_connection(*path, limit=1 << 24))
    else:
        peer = Peer(*await asyncio.open_unix_connection(path, limit=1 << 24))
    _dialled.append(peer)
    return peer


_dialled: list[Peer] = []


async def hang_up() -> None:
    """Close what was dialled, and wait until it is closed."""
    while _dialled:
        peer = _dialled.pop()
        peer.writer.transport.abort()
        with contextlib.suppress(OSError):
            await peer.writer.wait_closed()
        peer.close()


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[tuple[Server, Context, Path]]:
    """A server on a unix socket in ``directory``."""
    context = Context()
    server = Server(REGISTRY, context, version=VERSION)
    path = directory / "qmp.sock"
    await server.start_unix(path, **options)
    try:
        yield server, context, path
    finally:
        context.gate.set()
        await hang_up()
        await server.stop()


def served(directory: Path, scenario: Callable[[Server, Context, Path], Awaitable[None]], **options: Any) -> None:
    """Run ``scenario`` against a server, in an event loop of its own."""

    async def run() -> None:
        async with serving(directory, **options) as parts:
            await scenario(*parts)

    asyncio.run(run())


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until something has come true; the test's time-out is the limit."""
    while not condition():  # noqa: ASYNC110 - the condition is about objects that have no event
        await asyncio.sleep(0)
