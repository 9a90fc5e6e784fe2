"""The contestants: each is a context manager that starts one server, or a pair, and yields an `Endpoint`.

All keep their disks below ``directory``. Guests are served on unix sockets there. Our link is TCP, as between two
hosts; QEMU's is a unix socket, which is its best: over TCP on one machine its pair did 0.8k instead of 11k writes of
4k a second at depth 16 (delayed acknowledgements). `CONTESTANTS` has them by name.

The blockstep ones are started by its commands, as a user would; their options are in `blockstep_standby` and
`blockstep_primary`, the words of the control socket in `Control`, and nowhere else.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tools import make_disk, make_sparse, until
from blockstep.testing.processes import QMP, Address, blockstep, free_ports, nbd_uri, qemu_system, run, started

Process = subprocess.Popen[bytes]


@dataclass
class Endpoint:
    """A started contestant: where to send requests, and what can be done with it."""

    address: Address
    export: str = ""
    processes: dict[str, Process] = field(default_factory=dict)
    checkpoint: Callable[[], object] | None = None
    #: The exports of the standby, where there is one: (address, export) of the secondary disk and of the view.
    ingest: tuple[Address, str] | None = None
    view: tuple[Address, str] | None = None
    control: Any = None
    #: Whether the guest has to be stopped while a checkpoint is taken.
    stops_guest: bool = False

    @property
    def uri(self) -> str:
        return nbd_uri(self.address, self.export)


def needed(*programs: str) -> None:
    """Raises FileNotFoundError that names what has to be installed."""
    for program in programs:
        if shutil.which(program) is None:
            raise FileNotFoundError(f"{program} is not installed")


# One raw file, served.


@contextmanager
def nbdkit_file(directory: Path, size: int) -> Iterator[Endpoint]:
    needed("nbdkit")
    disk, path = make_disk(directory / "disk.raw", size), directory / "nbdkit.sock"
    with started(["nbdkit", "--foreground", f"--unix={path}", "file", f"file={disk}"], path) as process:
        yield Endpoint(path, processes={"nbdkit": process})


@contextmanager
def qemu_nbd(directory: Path, size: int) -> Iterator[Endpoint]:
    needed("qemu-nbd")
    disk, path = make_disk(directory / "disk.raw", size), directory / "qemu-nbd.sock"
    command: list[str | Path] = ["qemu-nbd", "--persistent", "--shared=0", "--format=raw", f"--socket={path}", disk]
    with started(command, path) as process:
        yield Endpoint(path, processes={"qemu-nbd": process})


@contextmanager
def blockstep_export(directory: Path, size: int) -> Iterator[Endpoint]:
    disk, path = make_disk(directory / "disk.raw", size), directory / "export.sock"
    with started(blockstep("export", disk, "--socket", path), path) as process:
        yield Endpoint(path, processes={"export": process})


# One qcow2 image, served: all its clusters allocated, or none (``empty``).


def _qcow2(directory: Path, size: int, empty: bool) -> Path:
    needed("qemu-img")
    image = directory / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    if not empty:
        disk = make_disk(directory / "disk.raw", size)
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", disk, image, timeout=300)
        disk.unlink()
    return image


@contextmanager
def qemu_nbd_qcow2(directory: Path, size: int, *, empty: bool = False) -> Iterator[Endpoint]:
    needed("qemu-nbd")
    image, path = _qcow2(directory, size, empty), directory / "qemu-nbd.sock"
    command: list[str | Path] = ["qemu-nbd", "--persistent", "--shared=0", "--format=qcow2", f"--socket={path}", image]
    with started(command, path) as process:
        yield Endpoint(path, processes={"qemu-nbd": process})


@contextmanager
def blockstep_qcow2(directory: Path, size: int, *, empty: bool = False) -> Iterator[Endpoint]:
    image, path = _qcow2(directory, size, empty), directory / "export.sock"
    with started(blockstep("export", image, "--format", "qcow2", "--socket", path), path) as process:
        yield Endpoint(path, processes={"export": process})


# QEMU's replication: a secondary, or a secondary and a primary that forwards into it.


class QemuStandby:
    """The secondary: raw secondary disk, qcow2 hidden and active disk above it, both doors exported.

    QEMU expects the guest to be stopped in a checkpoint. A write that arrived meanwhile has been seen to cost the
    hidden disk (the next checkpoint failed with "Hidden disk is ejected"): nothing may be in flight.
    """

    def __init__(self, stack: ExitStack, directory: Path, size: int) -> None:
        needed("qemu-system-x86_64", "qemu-img")
        secondary = make_disk(directory / "secondary.raw", size)
        hidden, active = directory / "hidden.qcow2", directory / "active.qcow2"
        for overlay in (hidden, active):
            run("qemu-img", "create", "-q", "-f", "qcow2", overlay, str(size))
        self.address = directory / "secondary.sock"
        self.qmp, self.process = stack.enter_context(qemu_system(
            directory,
            "-drive", f"id=secondary0,if=none,driver=raw,file.filename={secondary}",
            "-drive", "id=filter0,if=none,driver=replication,mode=secondary,top-id=view0,"
                      f"file.driver=qcow2,file.file.filename={active},"
                      f"file.backing.driver=qcow2,file.backing.file.filename={hidden},"
                      "file.backing.backing=secondary0",
            "-drive", "id=view0,if=none,driver=quorum,vote-threshold=1,read-pattern=fifo,children.0=filter0",
            name="standby"))
        self.qmp.execute("nbd-server-start", addr=_qemu_address(self.address), max_connections=0)
        self.qmp.execute("nbd-server-add", device="secondary0", writable=True)
        self.qmp.execute("nbd-server-add", device="view0", writable=True)
        self.qmp.execute("xen-set-replication", enable=True, primary=False)

    def checkpoint(self) -> None:
        self.qmp.execute("xen-colo-do-checkpoint")

    def failover(self) -> None:
        self.qmp.execute("xen-set-replication", enable=False, primary=False, failover=True)

    def failed_over(self) -> bool:
        """There is no job to be seen; but the status says "error" as long as the merge runs."""
        return not self.qmp.execute("query-xen-replication-status")["error"]

    def endpoint(self, export: str) -> Endpoint:
        return Endpoint(self.address, export, {"standby": self.process}, self.checkpoint,
                        (self.address, "secondary0"), (self.address, "view0"), self, stops_guest=True)


def _qemu_address(path: Path) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": str(path)}}


@contextmanager
def qemu_standby(directory: Path, size: int) -> Iterator[Endpoint]:
    with ExitStack() as stack:
        yield QemuStandby(stack, directory, size).endpoint("secondary0")


@contextmanager
def qemu_view(directory: Path, size: int) -> Iterator[Endpoint]:
    with ExitStack() as stack:
        yield QemuStandby(stack, directory, size).endpoint("view0")


@contextmanager
def qemu_pair(directory: Path, size: int) -> Iterator[Endpoint]:
    with ExitStack() as stack:
        standby = QemuStandby(stack, directory, size)
        disk, path = make_disk(directory / "primary.raw", size), directory / "primary.sock"
        qmp, process = stack.enter_context(qemu_system(
            directory,
            "-drive", "id=disk0,if=none,driver=quorum,vote-threshold=1,read-pattern=fifo,"
                      f"children.0.driver=raw,children.0.file.filename={disk}",
            name="primary"))
        # A node without a device can be added by the monitor for people only.
        qmp.execute("human-monitor-command", command_line=(
            "drive_add -n buddy driver=replication,mode=primary,node-name=forward0,"
            f"file.driver=nbd,file.path={standby.address},file.export=secondary0"))
        qmp.execute("x-blockdev-change", parent="disk0", node="forward0")
        qmp.execute("nbd-server-start", addr=_qemu_address(path), max_connections=0)
        qmp.execute("nbd-server-add", device="disk0", writable=True)
        qmp.execute("xen-set-replication", enable=True, primary=True)
        endpoint = standby.endpoint("secondary0")
        endpoint.address, endpoint.export = path, "disk0"
        endpoint.processes["primary"] = process
        yield endpoint


# blockstep's pair.


class Control:
    """The control socket of a standby or a primary: every word of it that the bench says."""

    def __init__(self, path: Path) -> None:
        self.qmp = QMP(path)

    def checkpoint(self) -> None:
        """Take a checkpoint over all disks; returns when it is committed."""
        self.qmp.execute("replication-checkpoint")

    def failover(self) -> None:
        """Take over from the last checkpoint; returns when the view is the disk, while the merge runs on."""
        self.qmp.execute("replication-failover", to="checkpoint")

    def status(self) -> dict[str, Any]:
        return dict(self.qmp.execute("query-replication"))

    def replicating(self) -> bool:
        """Whether the first sync is over, and with it the first checkpoint."""
        status = self.status()
        return status["state"] == "replicating" and bool(status.get("checkpoint"))

    def failed_over(self) -> bool:
        """Whether the merge into the secondary disk is over."""
        return bool(self.status()["state"] == "promoted")

    def close(self) -> None:
        self.qmp.close()


class StandIn:
    """What a standby takes for its primary: it attaches and commits, and leaves the writes to fio."""

    def __init__(self, address: Address, size: int) -> None:
        self.qmp = QMP(address)
        self.epoch = 0
        answer = self.qmp.execute("pair-attach", pair="default", instance="bench",
                                  disks=[{"name": "disk", "size": size}])
        #: The name of the disk's export on the link.
        self.export = answer["prefix"] + "disk"
        self.checkpoint()

    def checkpoint(self) -> None:
        self.epoch += 1
        self.qmp.execute("pair-checkpoint", epoch=self.epoch)

    def close(self) -> None:
        self.qmp.close()


@contextmanager
def blockstep_standby(directory: Path, size: int, sparse: bool = False) -> Iterator[Endpoint]:
    """A standby of one disk, "disk", that waits for its primary."""
    disk = (make_sparse if sparse else make_disk)(directory / "secondary.raw", size)
    host, port = "127.0.0.1", free_ports(2)
    view, qmp = directory / "view.sock", directory / "standby.qmp"
    command = blockstep("standby", "--disk", f"disk={disk}", "--link", f"{host}:{port}", "--socket", view,
                        "--qmp", qmp, "--state", directory / "promoted", "--buffer-memory", "4G")
    with started(command, (host, port + 1), view, qmp) as process:
        control = Control(qmp)
        try:
            yield Endpoint((host, port), processes={"standby": process}, view=(view, "disk"), control=control)
        finally:
            control.close()


@contextmanager
def blockstep_primary(directory: Path, disk: Path, standby: Endpoint, acknowledge: str) -> Iterator[Endpoint]:
    """A primary of one disk with its guest's export; it begins with the first sync.

    ``acknowledge`` is "local" or "both". Checkpoints are taken on command alone.
    """
    assert isinstance(standby.address, tuple)
    host, port = standby.address
    path, qmp = directory / "primary.sock", directory / "primary.qmp"
    command = blockstep("primary", "--disk", f"disk={disk}", "--standby", f"{host}:{port}", "--socket", path,
                        "--qmp", qmp, "--state", directory / "primary.ended", "--ack", acknowledge,
                        "--checkpoint-every", "0", "--checkpoint-bytes", "0")
    with started(command, path, qmp) as process:
        control = Control(qmp)
        try:
            yield Endpoint(path, "disk", {"primary": process, **standby.processes}, control.checkpoint,
                           view=standby.view, control=control)
        finally:
            control.close()


@contextmanager
def blockstep_pair(directory: Path, size: int, acknowledge: str = "both", sparse: bool = False) -> Iterator[Endpoint]:
    """A pair that replicates; ``control`` of what it yields is the primary's."""
    disk = (make_sparse if sparse else make_disk)(directory / "primary.raw", size)
    with blockstep_standby(directory, size, sparse) as standby, \
            blockstep_primary(directory, disk, standby, acknowledge) as primary:
        until(primary.control.replicating, 120, "the pair replicates", every=0.01)
        yield primary


@contextmanager
def blockstep_pair_local(directory: Path, size: int) -> Iterator[Endpoint]:
    with blockstep_pair(directory, size, "local") as endpoint:
        yield endpoint


@contextmanager
def blockstep_ingest(directory: Path, size: int) -> Iterator[Endpoint]:
    """A standby that replicates, with the bench in its primary's place."""
    with blockstep_standby(directory, size) as standby:
        assert isinstance(standby.address, tuple)
        host, port = standby.address
        primary = StandIn((host, port + 1), size)
        try:
            standby.checkpoint, standby.export = primary.checkpoint, primary.export
            standby.ingest = standby.address, primary.export
            yield standby
        finally:
            primary.close()


@contextmanager
def blockstep_view(directory: Path, size: int) -> Iterator[Endpoint]:
    with blockstep_ingest(directory, size) as standby:
        assert standby.view is not None
        standby.address, standby.export = standby.view
        yield standby


CONTESTANTS: dict[str, Callable[[Path, int], AbstractContextManager[Endpoint]]] = {
    "nbdkit": nbdkit_file,
    "qemu-nbd": qemu_nbd,
    "blockstep export": blockstep_export,
    "qemu-nbd qcow2": qemu_nbd_qcow2,
    "blockstep qcow2": blockstep_qcow2,
    "qemu-nbd qcow2, empty": partial(qemu_nbd_qcow2, empty=True),
    "blockstep qcow2, empty": partial(blockstep_qcow2, empty=True),
    "QEMU standby": qemu_standby,
    "QEMU view": qemu_view,
    "QEMU pair": qemu_pair,
    "blockstep standby": blockstep_ingest,
    "blockstep view": blockstep_view,
    "blockstep pair": blockstep_pair,
    "blockstep pair (local)": blockstep_pair_local,
}
