"""``blockstep shell``: QMP for hands and for scripts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import AsyncIterator, Iterator

from blockstep.cli.control import PairName
from blockstep.cli.monitors import MonitorTls, Socket, find_monitor
from blockstep.cli.signals import run, run_unless_told
from blockstep.cli.words import Option
from blockstep.forms import Annotated

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

    from blockstep.qmp.client import Address


def shell(
    pair: PairName = None,
    socket: Socket = None,
    command: Annotated[list[str] | None, Option("--command", "-c", metavar="LINE", help="Execute this and end; "
                       "may be given several times.")] = None,
    tls: MonitorTls = None,
) -> None:
    """Send commands to a QMP server, of blockstep or of QEMU: COMMAND KEY=VALUE ...

    At a terminal Tab completes commands, arguments and names, and events are shown as they come. Otherwise the lines
    of standard input are executed up to the first that fails; each answer is a line of JSON.
    """
    address, context = find_monitor(pair, socket, tls)
    if command is None and sys.stdin.isatty():
        run_unless_told(_at_terminal(address, context))  # the terminal is put back as it was
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is an error of that line
    run(_script(address, context, iter(command) if command is not None else sys.stdin))


async def _at_terminal(address: Address, context: ssl.SSLContext | None) -> None:
    from blockstep.qmp.client import connect
    from blockstep.shell.server import Server
    from blockstep.shell.session import interact

    name = str(address).rpartition("/")[2].removesuffix(".qmp") if not isinstance(address, tuple) else address[0]
    async with connect(address, ssl=context) as qmp:
        await interact(await Server.of(qmp), f"{name}> ")


async def _each(lines: Iterator[str]) -> AsyncIterator[str]:
    """Lines as somebody gives them, perhaps much later: events are taken meanwhile, or the server would cut us off."""
    import asyncio

    while (line := await asyncio.to_thread(next, lines, None)) is not None:
        yield line


async def _script(address: Address, context: ssl.SSLContext | None, lines: Iterator[str]) -> None:
    from blockstep.qmp.client import connect
    from blockstep.shell.server import Server

    async with connect(address, ssl=context) as qmp:
        server = await Server.of(qmp)
        async for line in _each(lines):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if words[0] == "exit":
                return
            if words[0] == "help":
                print(server.help(line), flush=True)
            else:
                answer = await server.execute(line)
                print(json.dumps(answer, indent=2 if sys.stdout.isatty() else None), flush=True)
