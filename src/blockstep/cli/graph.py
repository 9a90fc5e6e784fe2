"""``blockstep graph``: the block graph of a running program as a picture."""

from __future__ import annotations

import contextlib
import sys

from blockstep.cli.control import PairName
from blockstep.cli.monitors import MonitorTls, Socket, find_monitor
from blockstep.cli.signals import run
from blockstep.cli.words import Option
from blockstep.errors import BlockstepError
from blockstep.forms import Annotated, Literal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any

    from blockstep.qmp.client import Address


class NoGraph(BlockstepError):
    """The server does not tell its block graph: no other command of it would help."""


def graph(
    pair: PairName = None,
    socket: Socket = None,
    format_: Annotated[Literal["text", "dot", "svg"], Option("--format", "-f", help="A tree for the terminal, "
                       "graphviz's language, or a drawing.")] = "text",
    json_: Annotated[bool, Option("--json", help="Boxes and edges as JSON, for programs.")] = False,
    tls: MonitorTls = None,
) -> None:
    """Show the block graph: who uses which nodes, with which permissions, down to the files; jobs, exports, stages.

    Works with every QMP server that has QEMU's x-debug-query-block-graph, QEMU among them.
    """
    import blockstep.drivers  # noqa: F401  registers them: they know the roles of their children
    from blockstep.picture.assemble import assemble

    picture = assemble(run(_ask(*find_monitor(pair, socket, tls))))
    if json_:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(picture, order="sorted").decode(), indent=2))
    elif format_ == "dot":
        from blockstep.picture.dot import draw_dot

        print(draw_dot(picture))
    elif format_ == "svg":
        from blockstep.picture.svg import draw_svg

        print(draw_svg(picture))
    else:
        from rich.console import Console

        from blockstep.picture.text import draw_text

        drawing = draw_text(picture)
        if sys.stdout.isatty():  # wider than the terminal: let it scroll or wrap there, not fold words here
            Console(highlight=False).print(drawing, soft_wrap=True)
        else:
            print(drawing.plain)


async def _ask(address: Address, context: ssl.SSLContext | None) -> dict[str, Any]:
    """The answers of a server to `QUESTIONS`, as far as it knows the commands. Raises NoGraph."""
    from blockstep.picture.assemble import GRAPH, QUESTIONS
    from blockstep.qmp.client import connect
    from blockstep.qmp.errors import CommandRefused

    answers: dict[str, Any] = {}
    async with connect(address, ssl=context) as qmp:
        for command, arguments in QUESTIONS.items():
            with contextlib.suppress(CommandRefused):
                answers[command] = await qmp.execute(command, arguments)
    if GRAPH not in answers:
        raise NoGraph(f"{address} does not tell its block graph: it has no command {GRAPH}")
    return answers
