"""QEMU and blockstep as two programs of one kind: disks on the command line, and a QMP socket.

    with BLOCKSTEP.started(tmp_path, "primary", ("colo-disk0", "driver=quorum,...")) as (qmp, process): ...

Each is the program that a script, a cluster agent or a reader of QEMU's manual starts. What is different is here, and
nowhere else: how a disk is given (``-drive`` with an id, ``--blockdev`` with a node name), and which image format can
be emptied at once: the one name that scripts need to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from blockstep.drivers.create import CreateOverlay
from blockstep.testing.processes import QMP, blockstep, monitored, run
from tests.peers import need


@dataclass(frozen=True)
class Program:
    """One of the two. ``overlay``: its format for active and hidden disks."""

    name: str
    overlay: str

    @contextmanager
    def started(self, directory: Path, name: str, *disks: tuple[str, str]) -> Iterator[tuple[QMP, Popen[bytes]]]:
        """A process with ``disks``, each (name, options as ``key=value,...``). Its socket is ``NAME.qmp``."""
        path = directory / f"{name}.qmp"
        with monitored(self._command(path, disks), path) as (qmp, process):
            yield qmp, process

    def _command(self, path: Path, disks: tuple[tuple[str, str], ...]) -> list[str | Path]:
        if self.name == "qemu":
            need("qemu-system-x86_64", "qemu-img")
            drives = [word for id, options in disks for word in ("-drive", f"if=none,id={id},{options}")]
            return ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S",
                    "-qmp", f"unix:{path},server=on,wait=off", *drives]
        nodes = [word for id, options in disks for word in ("--blockdev", f"node-name={id},{options}")]
        return blockstep("daemon", *nodes, "--qmp", f"unix:{path},server=on,wait=off")

    def make_overlay(self, path: Path, size: int) -> None:
        """A new image of the format ``overlay`` that holds nothing."""
        if self.overlay == "overlay":
            CreateOverlay(filename=str(path), size=size).create()
        else:
            run("qemu-img", "create", "-q", "-f", self.overlay, path, str(size))


QEMU = Program("qemu", "qcow2")
BLOCKSTEP = Program("blockstep", "qcow2")
#: With the format of ours that is made for this.
BLOCKSTEP_OVERLAY = Program("blockstep", "overlay")
