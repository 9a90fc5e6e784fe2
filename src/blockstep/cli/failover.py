"""``blockstep failover``: promote a standby."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from blockstep.cli.control import Json, PairName, Qmp, ask, find_socket
from blockstep.errors import BlockstepError
from blockstep.qmp.client import Connection
from blockstep.units import format_duration


def failover(
    pair: PairName = None,
    to: Annotated[Literal["checkpoint", "latest"], typer.Option(help="Live on from the last checkpoint, or from the "
                  "latest data that the primary sent.")] = "checkpoint",
    wait: Annotated[bool, typer.Option(help="Wait until the buffers are merged into the disks. The disks can be used "
                    "before.")] = True,
    json_: Json = False,
    qmp: Qmp = None,
) -> None:
    """Promote this host's standby: it lives on, and its old primary's writes are refused from now on.

    Run it on the standby's host, when the primary is dead or may be treated as such. If a disk could not be promoted,
    or merged, run it again: it goes on with that disk, and leaves the others alone.
    """
    path = find_socket(pair, "standby", qmp)

    async def talk(qmp: Connection) -> dict[str, Any]:
        answer: dict[str, Any] = await qmp.execute("replication-failover", {"to": to}, timeout=60.0)
        if not json_:
            point = f"at checkpoint {answer['epoch']}" if to == "checkpoint" else "with the latest data of the primary"
            typer.echo(f"promoted {point} after {format_duration(answer['seconds'])}; the disks can be used:")
            for uri in answer["exports"]:
                typer.echo(uri)
        if wait and to == "checkpoint":
            answer["merged"] = await _follow(qmp, show=not json_)
        return answer

    answer = ask(path, talk)
    if json_:
        typer.echo(json.dumps(answer))


async def _follow(qmp: Connection, show: bool) -> bool:
    """Show the merge until it has ended. Raises what it failed with."""
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
               TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not show or not console.is_terminal) as progress:
        task = progress.add_task("merging", total=None)
        while True:
            status = await qmp.execute("query-replication")
            if work := status["work"]:
                progress.update(task, completed=work["current"], total=work["total"])
            if status["state"] != "failover":
                break
            await asyncio.sleep(0.05)
    if status["state"] == "failover-failed":
        raise BlockstepError(status["reason"])
    return True


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("failover")(failover)
