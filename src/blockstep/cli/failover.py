"""``blockstep failover``: promote a standby."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockstep.cli.control import Json, PairName, Qmp, ask, find_socket
from blockstep.cli.words import Option
from blockstep.errors import BlockstepError
from blockstep.forms import Annotated, Literal
from blockstep.streams import complain
from blockstep.units import format_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from blockstep.qmp.client import Connection


def failover(
    pair: PairName = None,
    to: Annotated[Literal["checkpoint", "latest"], Option(help="Live on from the last checkpoint, or from the "
                  "latest data that the primary sent.")] = "checkpoint",
    wait: Annotated[bool, Option(help="Wait until the buffers are merged into the disks. The disks can be used "
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
            print(f"promoted {point} after {format_duration(answer['seconds'])}; the disks can be used:",
                  *answer["exports"], sep="\n", flush=True)
        for fault in answer["faults"]:
            complain(f"blockstep: {fault}")
        if wait and to == "checkpoint":
            answer["merged"] = await _follow(qmp, show=not json_)
        return answer

    answer = ask(path, talk)
    if json_:
        print(json.dumps(answer))


async def _follow(qmp: Connection, show: bool) -> bool:
    """Show the merge until it has ended. Raises what it failed with."""
    import asyncio

    with _shown(show) as progress:
        while True:
            status = await qmp.execute("query-replication")
            if work := status["work"]:
                progress(work["current"], work["total"])
            if status["state"] != "failover":
                break
            await asyncio.sleep(0.05)
    if status["state"] == "failover-failed":
        raise BlockstepError(status["reason"])
    return True


@contextmanager
def _shown(wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A function that shows (done, total) in bytes, at a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    # Not at the top: whoever types this command waits for the promotion, which is done by now.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with Progress(TextColumn("merging"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                  TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        bar = bars.add_task("merging", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
