"""The time of day is shown, and compared with the times of files: a clock that is set moves no deadline."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.unit.test_layers import modules

#: Who asks for it, and what for.
ASK = {
    "cli.events": "the line with which the state begins is printed with it",
    "daemon.certificates": "whether certificates have expired, for the status",
    "daemon.good_end": "how old a checkpoint is after a restart, for the status",
    "daemon.pulse": "whether files were changed before the host was started, by their times",
    "images.snapshot": "the date of a snapshot in an image",
    "qmp.server": "the timestamps of events",
}
_ASKING = {"time.time", "time.time_ns", "time.CLOCK_REALTIME", "datetime.now", "datetime.today", "datetime.utcnow",
           "datetime.datetime.now", "datetime.datetime.today", "datetime.datetime.utcnow"}


def uses(tree: ast.AST) -> Iterator[str]:
    """What of a module asks for the time of day."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in _ASKING:
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (f"time.{name.name}" for name in node.names if f"time.{name.name}" in _ASKING)


def test_nobody_else_asks_for_the_time_of_day() -> None:
    found = {name for name, path in modules() if any(uses(ast.parse(path.read_text())))}
    assert found == set(ASK)


def test_each_way_to_ask_is_seen() -> None:
    assert list(uses(ast.parse("import time\ntime.time() + 5"))) == ["time.time"]
    assert list(uses(ast.parse("from time import time_ns as now, monotonic"))) == ["time.time_ns"]
    assert list(uses(ast.parse("from datetime import datetime\ndatetime.now()"))) == ["datetime.now"]
