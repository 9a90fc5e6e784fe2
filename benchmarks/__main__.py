"""``python -m benchmarks``: run the rows, print them, and end with 0 when every *at least* was held.

Exit codes: 0 held, 1 a target was missed, 2 a row could not be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.measures import Bench, Measured
from benchmarks.rows import ROWS, Row
from blockstep.units import parse_size


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description="blockstep beside QEMU, qemu-nbd and nbdkit")
    parser.add_argument("--only", metavar="ROW", action="append", default=[],
                        help="rows whose name begins so or matches the pattern; may be given several times")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--quick", action="store_true", help="one round of one second, 256 MiB disks: for a look")
    parser.add_argument("--rounds", type=int, default=5, help="of each contestant, in turn (5)")
    parser.add_argument("--seconds", type=float, default=2, help="of one run (2)")
    parser.add_argument("--size", default="1G", help="of the disks (1G)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="for the disks, in memory (/dev/shm)")
    parser.add_argument("--cold-dir", type=Path, default=Path("/var/tmp"),
                        help="for the disk that is not cached, on a real file system (/var/tmp)")
    parser.add_argument("--peers-only", action="store_true", help="the peers' figures alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    return parser.parse_args()


def chosen(patterns: list[str]) -> list[Row]:
    """The rows that any of the patterns means; all of them without a pattern."""
    rows = [row for row in ROWS
            if not patterns or any(row.name.startswith(one) or fnmatch(row.name, one) for one in patterns)]
    if not rows:
        raise SystemExit(f"no row is called so; there are: {', '.join(row.name for row in ROWS)}")
    return rows


def measure(row: Row, bench: Bench) -> Measured:
    """Whatever goes wrong with a row is its result, and the next one has its turn."""
    try:
        return row.measure(bench)
    except Exception as error:
        return Measured("", errors={row.name: str(error) or type(error).__name__})


def _end(number: int, _frame: object) -> None:
    """An exception, so that all servers are ended and all directories removed on the way out."""
    raise SystemExit(128 + number)


def main() -> int:
    options = arguments()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _end)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its byte code
    rows = chosen(options.only)
    console = Console(width=None if sys.stdout.isatty() else 132)
    if options.list:
        for row in rows:
            console.print(f"{row.name:24}{row.title}", highlight=False)
        return 0
    size, rounds, seconds = parse_size(options.size, "--size"), options.rounds, options.seconds
    if options.quick:
        size, rounds, seconds = min(size, 256 << 20), 1, 1
    bench = Bench(options.dir, options.cold_dir, size, rounds, seconds, options.peers_only)
    console.print(f"{report.machine()}; {'; '.join(report.peers().values())}", highlight=False)
    results = []
    for row in rows:
        with console.status(row.name) as status:
            bench.say = lambda what, status=status, name=row.name: status.update(f"{name}: {what}")  # type: ignore[misc]
            measured = measure(row, bench)
        results.append((row, measured))
        report.show(console, row, measured)
    console.print(report.summary(results))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(bench, results), indent=1) + "\n")
    found = {verdict for row, measured in results for _, _, verdict in report.verdicts(row, measured)}
    return 2 if "error" in found else 1 if "MISS" in found else 0


if __name__ == "__main__":
    sys.exit(main())
