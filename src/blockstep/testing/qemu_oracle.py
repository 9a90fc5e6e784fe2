"""QEMU's block replication as a black box to compare with: no guest, no migration, only its block layer.

    QemuStandby     secondary disks and their views, all exported over NBD
    QemuPrimary     quorum over a local disk and a replication node in mode=primary, exported over NBD

Both are processes (``qemu-system-x86_64 -machine none``) that are told what to do over QMP. Requests go through the
NBD exports, with whatever client the caller has: ``parent-DISK`` is what a primary writes to, ``view-DISK`` what a
guest of the standby sees, ``guest`` what a guest of the primary sees.

All requests must be aligned to 512 bytes: QEMU's replication node asserts on others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import msgspec

from blockstep.testing.processes import QMP, qemu_system, run

#: Seconds until something that QEMU does in the background must have happened.
LIMIT = 20.0

class Qemu(msgspec.Struct):
    """A running QEMU, and the verbs of its replication."""

    qmp: QMP
    process: Popen[bytes]
    #: Where its exports are.
    socket: Path

    def execute(self, command: str, **arguments: Any) -> Any:
        """A QMP command's return value. Raises RuntimeError with QEMU's class and description of the error."""
        return self.qmp.execute(command, **arguments)

    def export(self, device: str, name: str) -> None:
        """Export a device over NBD under a name."""
        self.execute("nbd-server-add", device=device, name=name, writable=True)

    @property
    def events(self) -> list[str]:
        """The names of the events that came before the last answer."""
        return [event["event"] for event in self.qmp.events]

    # --- replication ---

    def start(self, primary: bool) -> None:
        """Start replication in all filters. Raises RuntimeError."""
        self.execute("xen-set-replication", enable=True, primary=primary)

    def checkpoint(self) -> None:
        """A checkpoint over all disks. Raises RuntimeError."""
        self.execute("xen-colo-do-checkpoint")

    def stop(self, failover: bool) -> None:
        """Stop replication. A failover goes on in the background: see `wait_failed_over`. Raises RuntimeError."""
        self.execute("xen-set-replication", enable=False, primary=False, failover=failover)

    @property
    def status(self) -> dict[str, Any]:
        """``error`` (bool) and, with an error, ``desc``."""
        answer: dict[str, Any] = self.execute("query-xen-replication-status")
        return answer

    def wait_failed_over(self) -> None:
        """Until the failover commit has ended: status says "I/O error" while it runs."""
        wait_until(lambda: not self.status["error"])

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class QemuStandby(Qemu):
    """A QEMU that is the standby of some disks."""


class QemuPrimary(Qemu):
    """A QEMU that is the primary of one disk."""


def wait_until(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    """Ask again and again. Raises TimeoutError."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("QEMU did not get there in time")
        time.sleep(0.005)


@contextmanager
def qemu_standby(directory: Path, disks: Sequence[str] = ("a",), size: int = 1 << 20,
                 full: Sequence[str] = (), start: bool = True) -> Iterator[QemuStandby]:
    """A standby, started, with qcow2 disks full of zeroes. The hidden disks in ``full`` fail writes with ENOSPC."""
    words: list[str] = []
    for disk in disks:
        for part in ("secondary", "active", "hidden"):
            run("qemu-img", "create", "-q", "-f", "qcow2", directory / f"{disk}-{part}.qcow2", str(size))
        hidden = f"file.backing.file.filename={directory}/{disk}-hidden.qcow2"
        if disk in full:
            hidden = ("file.backing.file.driver=blkdebug,file.backing.file.image.driver=file,"
                      f"file.backing.file.image.filename={directory}/{disk}-hidden.qcow2,"
                      "file.backing.file.inject-error.0.event=write_aio,file.backing.file.inject-error.0.errno=28")
        words += ["-drive", f"if=none,id=parent-{disk},driver=qcow2,"
                            f"file.filename={directory}/{disk}-secondary.qcow2",
                  "-drive", f"if=none,id=childs-{disk},driver=replication,mode=secondary,top-id=colo-{disk},"
                            f"file.driver=qcow2,file.file.filename={directory}/{disk}-active.qcow2,"
                            f"file.backing.driver=qcow2,{hidden},file.backing.backing=parent-{disk}",
                  "-drive", f"if=none,id=colo-{disk},driver=quorum,read-pattern=fifo,vote-threshold=1,"
                            f"children.0=childs-{disk}"]
    with qemu_system(directory, *words, name="standby") as (qmp, process):
        standby = QemuStandby(qmp, process, _serve(qmp, directory / "standby.nbd"))
        for disk in disks:
            standby.export(f"parent-{disk}", f"parent-{disk}")
            standby.export(f"colo-{disk}", f"view-{disk}")
        if start:
            standby.start(primary=False)
        yield standby


@contextmanager
def qemu_primary(directory: Path, socket: Path, export: str, size: int = 1 << 20,
                 start: bool = True) -> Iterator[QemuPrimary]:
    """A primary that forwards to an NBD export, with a disk full of zeroes."""
    image = directory / "primary.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    words = ["-drive", "if=none,id=colo-disk,driver=quorum,read-pattern=fifo,vote-threshold=1,"
                       f"children.0.driver=qcow2,children.0.file.filename={image}"]
    with qemu_system(directory, *words, name="primary") as (qmp, process):
        primary = QemuPrimary(qmp, process, _serve(qmp, directory / "primary.nbd"))
        primary.export("colo-disk", "guest")
        primary.execute("human-monitor-command", command_line=(
            f"drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.server.type=unix,"
            f"file.server.path={socket},file.export={export},node-name=replication0"))
        primary.execute("x-blockdev-change", parent="colo-disk", node="replication0")
        if start:
            primary.start(primary=True)
        yield primary


def _serve(qmp: QMP, path: Path) -> Path:
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    return path
