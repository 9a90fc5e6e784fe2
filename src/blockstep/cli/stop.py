"""``blockstep stop``: end replication, or the program."""

from __future__ import annotations

from typing import Annotated

from blockstep.cli.control import PairName, Qmp, execute, find_socket
from blockstep.cli.words import Option


def stop(
    pair: PairName = None,
    role: Annotated[str | None, Option(metavar="primary|standby", help="Which side, if both run here.")] = None,
    quit_: Annotated[bool, Option("--quit", help="End the program as well: exports are drained, disks "
                     "flushed.")] = False,
    qmp: Qmp = None,
) -> None:
    """End replication. The primary serves its disks on; a standby shows what its primary wrote last."""
    path = find_socket(pair, role, qmp)
    if quit_:
        execute(path, "quit")
        print("stopping")
    else:
        execute(path, "replication-stop", timeout=60.0)
        print("replication has ended")
