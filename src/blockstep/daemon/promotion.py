"""The memory of a promotion: a file that says that a standby's disks are live.

A promoted standby refuses its old primary for as long as it runs. If it were started again as a standby, after a
reboot, say, that primary would find it, and copy its stale disks over the live ones. So the promotion is written
down, durably, before anything else of it happens, and a standby that finds the note does not start.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from blockstep.errors import OptionError


def check(note: Path, pair: str) -> None:
    """Raises OptionError if the standby was promoted, and says what to do."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        said = json.loads(note.read_text())
        raise OptionError("--state", str(note), (
            f"absent: the standby of pair '{pair}' was promoted on {said['when']}, and its disks are live. Serve them "
            "with 'blockstep primary' or 'blockstep export'; to let a primary overwrite them, remove that file first"))


def write(note: Path, pair: str, epoch: int, to: str) -> None:
    """Write the note; it is durable when this returns. Raises OSError; then there is none."""
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    said = {"pair": pair, "checkpoint": epoch, "to": to, "when": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    new = note.with_name(note.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps(said) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, note)
    directory = os.open(note.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def take_back(note: Path) -> None:
    """The promotion did not happen."""
    note.unlink(missing_ok=True)
