"""``blockstep stop``: end replication, or the program."""

from __future__ import annotations

import sys

from blockstep.cli.control import PairName, Qmp, ask, execute, find_socket
from blockstep.cli.words import Option
from blockstep.errors import BlockstepError, ConnectionLost
from blockstep.forms import Annotated
from blockstep.streams import complain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from blockstep.qmp.client import Connection


def stop(
    pair: PairName = None,
    role: Annotated[str | None, Option(metavar="primary|standby", help="Which side, if both run here.")] = None,
    quit_: Annotated[bool, Option("--quit", help="End the program as well, and wait for that: exports are drained, "
                     "a primary takes a last checkpoint, a standby merges to its last, disks are flushed.")] = False,
    qmp: Qmp = None,
) -> None:
    """End replication. The primary serves its disks on; a standby shows what its primary wrote last.

    With --quit the exit code is 1 if the program has ended, but its standby does not have everything, or its own disks
    are not at a checkpoint.
    """
    path = find_socket(pair, role, qmp)
    if quit_:
        facts = ask(path, _quit)
        if facts["reason"]:
            complain(f"blockstep: it has ended, but {facts['reason']}")
            sys.exit(1)
        print(_WELL[facts["role"]].format(**facts))
    else:
        execute(path, "replication-stop", timeout=60.0)
        print("replication has ended")


#: What is so when a program has ended in order.
_WELL = {
    "primary": "it has ended; the standby has everything, at checkpoint {epoch}",
    "standby": "it has ended; its disks are at checkpoint {epoch}",
    "promoted": "it has ended; its disks are whole",
}


async def _quit(qmp: Connection) -> dict[str, Any]:
    """Tell the program to end, and wait until it has: its disks are free then. Returns what it says of them."""
    facts: dict[str, Any] | None = None
    events = qmp.events("REPLICATION_ENDED")
    await qmp.execute("quit")
    print("stopping", flush=True)
    try:
        async for event in events:
            facts = event["data"]
    except ConnectionLost:
        pass  # which is its end
    if facts is None:
        raise BlockstepError("the program has ended, and not in order; its own output says why")
    return facts
