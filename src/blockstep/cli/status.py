"""``blockstep status``: how a pair is, as seen from here."""

from __future__ import annotations

import json
import time

from blockstep.cli.control import Json, PairName, Qmp, execute, find_sockets
from blockstep.cli.words import Option
from blockstep.errors import BlockstepError, told
from blockstep.forms import Annotated
from blockstep.units import format_duration, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The exit codes of the command, by health.
EXIT_CODES = {"healthy": 0, "degraded": 1, "at-risk": 2}


def status(
    pair: PairName = None,
    json_: Json = False,
    watch: Annotated[bool, Option("--watch", "-w", help="Again and again, until interrupted.")] = False,
    qmp: Qmp = None,
) -> int:
    """Show how the pairs of this host are.

    Exit codes: 0 healthy, 1 degraded, 2 at risk, 3 error; the worst of several.
    """
    while True:
        worst = 0
        answers: list[Any] = []
        for path in find_sockets(pair, None, qmp):
            try:
                answers.append(execute(path, "query-replication"))
                worst = max(worst, EXIT_CODES[answers[-1]["health"]])
            except (OSError, BlockstepError) as error:
                answers.append({"error": told(error), "control": str(path)})
                worst = 3
        if json_:
            print(json.dumps(answers[0] if len(answers) == 1 else answers, indent=2))
        else:
            print("\n\n".join(describe(answer) for answer in answers))
        if not watch:
            return worst
        print(flush=True)
        time.sleep(1)


def describe(status: dict[str, Any]) -> str:
    """A status for people: one fact a word, silent about what is normal."""
    if "error" in status:
        control = f"{status['control']}: "
        return f"{control}{status['error'].removeprefix(control)}"
    role, peer = status["role"].upper(), status["peer"]
    lines = [f"pair {status['pair']}   {role} here · {peer or 'no other side'}   {status['state']}"]
    lines.append(f"  {status['health'].replace('-', ' ')}" + (f": {status['reason']}" if status["reason"] else ""))
    if checkpoint := status["checkpoint"]:
        pause = f", paused the link for {format_duration(checkpoint['pause'])}" if checkpoint["pause"] else ""
        lines.append(f"  checkpoint {checkpoint['epoch']} committed {format_duration(checkpoint['age'])} ago{pause}")
    if status["role"] == "primary":
        rules = []
        if status["checkpoint-every"]:
            rules.append(format_duration(status["checkpoint-every"]))
        if status["checkpoint-bytes"]:
            rules.append(format_size(status["checkpoint-bytes"]))
        lines.append(f"  checkpoint every {' or '.join(rules) or 'command'}, acknowledged {status['ack']}")
    if work := status["work"]:
        lines.append("  " + describe_work(work))
    lines.append("")
    lines.append(f"  {'disk':<12} {'size':>10} {'behind':>10} {'buffer':>22}   state")
    for disk in status["disks"]:
        buffer = format_size(disk["buffer-used"])
        if disk["buffer-limit"]:
            buffer += f" / {format_size(disk['buffer-limit'])}"
        kind = "" if disk["format"] == "raw" else f", {disk['format']}"
        lines.append(f"  {disk['name']:<12} {format_size(disk['size']):>10} {format_size(disk['behind']):>10} "
                     f"{buffer:>22}   {disk['state']}{kind}" + (f": {disk['reason']}" if disk["reason"] else ""))
    lines += [f"  {uri}" for uri in status["exports"]]
    return "\n".join(lines)


def describe_work(work: dict[str, Any]) -> str:
    """Progress, speed and time left."""
    done = 100.0 * work["current"] / work["total"] if work["total"] else 100.0
    left = f", {format_duration(work['time-left'])} left" if work["time-left"] >= 0 else ""
    return (f"{work['kind']} {done:.1f} %: {format_size(work['current'])} of {format_size(work['total'])} "
            f"at {format_size(work['speed'])}/s{left}")
