"""``blockstep checkpoint``: take one now."""

from __future__ import annotations

import json

from blockstep.cli.control import Json, PairName, Qmp, execute, find_socket
from blockstep.units import format_duration


def checkpoint(pair: PairName = None, json_: Json = False, qmp: Qmp = None) -> None:
    """Take a checkpoint over all disks of a pair, now. Run it on the primary's host."""
    answer = execute(find_socket(pair, "primary", qmp), "replication-checkpoint", timeout=60.0)
    if json_:
        print(json.dumps(answer))
    else:
        print(f"checkpoint {answer['epoch']} committed, paused the link for {format_duration(answer['pause'])}")
