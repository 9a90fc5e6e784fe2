"""Results for people (a table a row, and the summary) and for programs (JSON)."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measures import Bench, Measured, Race
from benchmarks.rows import Row
from blockstep.testing.processes import run
from blockstep.units import KiB, format_size

COLOURS = {"aim": "green", "held": "yellow", "MISS": "red", "error": "red", "-": "dim"}


def figures(row: Row, measured: Measured) -> list[str]:
    """The medians of a row, one a line, with the least and the greatest of the rounds."""
    width = max(map(len, measured.samples), default=0)
    return [f"{name:{width}}{_figure(row, measured.unit, statistics.median(values)):>12}"
            f"   ({_figure(row, measured.unit, min(values))} to {_figure(row, measured.unit, max(values))})"
            for name, values in measured.samples.items()]


def _figure(row: Row, unit: str, value: float) -> str:
    if unit != "IOPS":
        return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    if isinstance(row.measure, Race) and row.measure.work.block >= 64 * KiB:
        return f"{value * row.measure.work.block / 1e6:.0f} MB/s"
    return f"{value / 1e3:.1f}k/s"


def verdicts(row: Row, measured: Measured) -> list[tuple[str, str, str]]:
    """(target's name, score, verdict) for each target of a row."""
    found = []
    for name, target in row.targets.items():
        score = measured.scores.get(name)
        if measured.errors:
            found.append((name, "" if score is None else f"{score:.3g} {target.unit}", "error"))
        elif score is None:
            found.append((name, "", "-"))
        else:
            found.append((name, f"{score:.3g} {target.unit}", target.verdict(score)))
    return found


def summary(results: Sequence[tuple[Row, Measured]]) -> Table:
    """One line for each target."""
    table = Table(title="blockstep and its peers, medians", title_justify="left")
    for heading in ("row", "what", "score", "at least", "aim", ""):
        number = heading in ("score", "at least", "aim")
        table.add_column(heading, justify="right" if number else "left", no_wrap=heading != "what")
    for row, measured in results:
        for name, score, verdict in verdicts(row, measured):
            target = row.targets[name]
            bound = "≤ " if target.lower else ""
            title = row.title if name == "ratio" else f"{row.title}: {name}"
            table.add_row(row.name, title, score, f"{bound}{target.at_least:g} {target.unit}",
                          f"{bound}{target.aim:g} {target.unit}", f"[{COLOURS[verdict]}]{verdict}")
    return table


def show(console: Console, row: Row, measured: Measured) -> None:
    """One row as soon as it is measured."""
    console.print(f"[bold]{row.name}[/]  {row.title}", highlight=False)
    for line in figures(row, measured):
        console.print(f"    {line}", highlight=False, markup=False)
    for name, score, verdict in verdicts(row, measured):
        if score:
            console.print(f"    {name} {score}  [{COLOURS[verdict]}]{verdict}", highlight=False)
    for contestant, error in measured.errors.items():
        console.print(f"    {contestant}: {error}", style="red", highlight=False, markup=False)


def machine() -> str:
    """What this was measured on."""
    return f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def peers() -> dict[str, str]:
    """The versions of the peers that are installed."""
    return {name: run(name, "--version", check=False).stdout.splitlines()[0]
            for name in ("fio", "nbdkit", "qemu-nbd", "qemu-system-x86_64", "nbdcopy") if shutil.which(name)}


def as_json(bench: Bench, results: Sequence[tuple[Row, Measured]]) -> dict[str, Any]:
    """Everything, each round included. Unknown fields are to be ignored by who reads it."""
    return {
        "machine": machine(), "peers": peers(), "disk": format_size(bench.size), "rounds": bench.rounds,
        "seconds": bench.seconds,
        "rows": [{
            "name": row.name, "title": row.title, "unit": measured.unit, "samples": measured.samples,
            "errors": measured.errors,
            "targets": [{"name": name, "score": measured.scores.get(name), "verdict": verdict,
                         "at-least": row.targets[name].at_least, "aim": row.targets[name].aim,
                         "unit": row.targets[name].unit, "lower-is-better": row.targets[name].lower}
                        for name, _, verdict in verdicts(row, measured)],
        } for row, measured in results],
    }
