"""How each kind of row is measured. A measure takes the `Bench` and returns what it `Measured`.

A contestant that cannot start or breaks on the way is named in `Measured.errors` and takes no further part; the
others go on, so that the peers' figures are there in any case.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.servers import (
    CONTESTANTS,
    Endpoint,
    blockstep_pair,
    blockstep_primary,
    blockstep_standby,
    nbdkit_file,
    needed,
)
from benchmarks.tools import (
    Prober,
    Workload,
    WriteLog,
    fetch_memory,
    file_system,
    fio,
    forget,
    make_disk,
    make_sparse,
    resident,
    until,
)
from blockstep.testing.processes import nbd_uri, run
from blockstep.units import GiB, MiB, TiB

FILL = Workload("write", MiB, 4)
SCATTER = Workload("randwrite", 4096, 16)


@dataclass
class Bench:
    """What all measures share."""

    directory: Path  #: in memory
    cold_directory: Path  #: on a real file system
    size: int  #: of the disks, in bytes
    rounds: int
    seconds: float  #: of one run of fio
    peers_only: bool = False
    say: Callable[[str], None] = lambda _: None

    @contextmanager
    def room(self, below: Path | None = None) -> Iterator[Path]:
        """A fresh directory, gone with everything in it at the end."""
        with TemporaryDirectory(prefix="bench-", dir=below or self.directory) as path:
            yield Path(path)


@dataclass
class Measured:
    """Figures by name, one a round; errors by contestant; scores by the name of their target."""

    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        """The median of a figure; None where there is none."""
        return statistics.median(self.samples[name]) if self.samples.get(name) else None

    @contextmanager
    def part(self, contestant: str) -> Iterator[None]:
        """Errors inside the block are this contestant's, and end its part."""
        try:
            yield
        except Exception as error:
            self.errors[contestant] = str(error) or type(error).__name__


@dataclass(frozen=True)
class Race:
    """Requests per second of one workload: ours against the best of the rivals. The score is the ratio.

    Where a contestant can take checkpoints, it takes one before each round; ``prime`` is what the standby's primary
    writes after it, so that the view has something to look through. ``once``: no block is written twice in a round, so
    that with a fresh checkpoint before it a write finds what it overwrites not yet saved (on a disk of 1 GiB a second
    turn would be plain writes). ``fresh``: every round has servers and disks of its own, so that it meets an empty
    image again. ``cold``: the disks are on a real file system, and are dropped from the page cache
    before each round.
    """

    ours: str
    rivals: tuple[str, ...]
    work: Workload
    prime: Workload | None = None
    cold: bool = False
    once: bool = False
    fresh: bool = False

    def __call__(self, bench: Bench) -> Measured:
        measured = Measured("IOPS")
        for _ in range(bench.rounds if self.fresh else 1):
            self._race(bench, measured, 1 if self.fresh else bench.rounds)
        rivals = [best for rival in self.rivals if (best := measured.median(rival))]
        if (ours := measured.median(self.ours)) and len(rivals) == len(self.rivals):
            measured.scores["ratio"] = ours / max(rivals)
        return measured

    def _race(self, bench: Bench, measured: Measured, rounds: int) -> None:
        with ExitStack() as stack:
            room = stack.enter_context(bench.room(bench.cold_directory if self.cold else None))
            if self.cold:
                self._cold_disk(room, bench.size)
            racing: dict[str, tuple[Endpoint, Path]] = {}
            for name in (self.ours, *self.rivals):
                if bench.peers_only and name.startswith("blockstep"):
                    continue
                with measured.part(name):
                    directory = room / name.replace(" ", "-")
                    directory.mkdir()
                    if self.cold:
                        os.link(room / "cold.raw", directory / "disk.raw")
                    racing[name] = stack.enter_context(CONTESTANTS[name](directory, bench.size)), directory
            for number in range(rounds):
                for name, (endpoint, directory) in racing.items():
                    if name not in measured.errors:
                        bench.say(f"round {number + 1}: {name}")
                        with measured.part(name):
                            measured.add(name, self._round(bench, endpoint, directory))

    def _cold_disk(self, room: Path, size: int) -> None:
        if file_system(room) in ("tmpfs", "ramfs"):
            raise ValueError(f"{room} is in memory: choose a directory on a real file system with --cold-dir")
        forget(make_sparse(room / "cold.raw", size, [(0, size)]))

    def _round(self, bench: Bench, endpoint: Endpoint, directory: Path) -> float:
        if endpoint.checkpoint is not None:
            endpoint.checkpoint()
        if self.prime is not None and endpoint.ingest is not None:
            fio(nbd_uri(*endpoint.ingest), self.prime, bench.size, min(1.0, bench.seconds))
        if self.cold:
            forget(directory / "disk.raw")
        fetch_memory(bench.size)
        return fio(endpoint.uri, self.work, bench.size, bench.seconds, once=self.once)


def checkpoint_pause(bench: Bench) -> Measured:
    """The longest time without a write of the primary's guest while a checkpoint is taken, little and much dirty.

    Scores: ``pause`` with the whole disk dirty, and ``growth`` from a sixteenth of it dirty to all of it; in ms.
    """
    measured = Measured("ms")
    for name in ("QEMU pair", "blockstep pair (local)"):
        if bench.peers_only and name.startswith("blockstep"):
            continue
        little, much = f"{name}, {bench.size // 16 // MiB} MiB dirty", f"{name}, {bench.size // MiB} MiB dirty"
        with measured.part(name), bench.room() as room, CONTESTANTS[name](room, bench.size) as pair:
            assert pair.checkpoint is not None
            for number, (label, dirty) in itertools.product(
                    range(bench.rounds), ((little, bench.size // 16), (much, bench.size))):
                bench.say(f"round {number + 1}: {label}")
                pair.checkpoint()
                fio(pair.uri, FILL, dirty, 0, "--end_fsync=1")
                with WriteLog(pair.address, pair.export, dirty) as log:
                    with log.held(pair.stops_guest):
                        begin = time.perf_counter()
                        pair.checkpoint()
                        end = time.perf_counter()
                    log.some_more()
                measured.add(f"{label}: the guest's pause", log.longest(begin) * 1e3)
                measured.add(f"{label}: the command", (end - begin) * 1e3)
                measured.add(f"{label}: a usual write", log.usual() * 1e3)
        pause = measured.median(f"{much}: the guest's pause")
        small = measured.median(f"{little}: the guest's pause")
        if name.startswith("blockstep") and pause is not None and small is not None:
            measured.scores = {"pause": pause, "growth": pause - small}
    return measured


def failover(bench: Bench) -> Measured:
    """From the command to the first write that the view serves, and to the end of the merge, the disk all dirty.

    Scores: ``first write`` in ms, ``commit rate`` in GB/s.
    """
    measured = Measured("ms")
    for number in range(bench.rounds):
        bench.say(f"round {number + 1}: QEMU")
        with measured.part("QEMU"), bench.room() as room, CONTESTANTS["QEMU pair"](room, bench.size) as pair:
            fio(pair.uri, FILL, bench.size)
            pair.processes["primary"].kill()
            _fail_over(measured, "QEMU", pair, pair.control.failover, pair.control.failed_over)
        if bench.peers_only:
            continue
        bench.say(f"round {number + 1}: blockstep")
        with measured.part("blockstep"), bench.room() as room, \
                blockstep_standby(room, bench.size) as standby, \
                blockstep_primary(room, make_disk(room / "primary.raw", bench.size), standby, "both") as primary:
            until(primary.control.replicating, 60, "the pair replicates", every=0.01)
            primary.control.checkpoint()
            fio(primary.uri, FILL, bench.size)
            primary.processes["primary"].kill()
            _fail_over(measured, "blockstep", standby, standby.control.failover, standby.control.failed_over)
    first, merged = measured.median("blockstep: first write"), measured.median("blockstep: merged")
    if first is not None and merged is not None:
        measured.scores = {"first write": first, "commit rate": bench.size / merged / 1e6}
    return measured


def _fail_over(measured: Measured, name: str, standby: Endpoint, command: Callable[[], object],
               merged: Callable[[], bool]) -> None:
    assert standby.view is not None
    address, export = standby.view
    begin = time.perf_counter()
    command()

    def served() -> bool:
        try:
            prober = Prober(address, export)
        except OSError:
            return False
        try:
            prober.write(4096, bytes(4096))
        except OSError:
            return False
        finally:
            prober.close()
        return True

    until(served, 60, "the first write is served")
    measured.add(f"{name}: first write", (time.perf_counter() - begin) * 1e3)
    until(merged, 120, "the merge ends")
    measured.add(f"{name}: merged", (time.perf_counter() - begin) * 1e3)


def memory(bench: Bench) -> Measured:
    """Resident memory of each process of a pair after scattered writes and a checkpoint, small disk and 1 TiB.

    Scores in MiB: ``resident`` of the larger process with the small disk, ``per TiB`` what it has more with 1 TiB.
    """
    measured = Measured("MiB")
    with measured.part("QEMU"), bench.room() as room, CONTESTANTS["QEMU pair"](room, bench.size) as pair:
        _weigh(measured, "QEMU", pair, bench.size)
    if not bench.peers_only:
        for size, label in ((bench.size, f"blockstep, {bench.size / GiB:g} GiB"), (TiB, "blockstep, 1 TiB")):
            bench.say(label)
            with measured.part(label), bench.room() as room, blockstep_pair(room, size, sparse=size == TiB) as pair:
                _weigh(measured, label, pair, size)
        heaviest = {label: max(values[0] for name, values in measured.samples.items() if name.startswith(label))
                    for label in (f"blockstep, {bench.size / GiB:g} GiB", "blockstep, 1 TiB")
                    if any(name.startswith(label) for name in measured.samples)}
        if len(heaviest) == 2:
            small, large = heaviest.values()
            measured.scores = {"resident": small, "per TiB": large - small}
    return measured


def _weigh(measured: Measured, label: str, pair: Endpoint, size: int) -> None:
    assert pair.checkpoint is not None
    for _ in range(2):
        fio(pair.uri, SCATTER, size, 0, "--number_ios=20000", "--norandommap=1")
        pair.checkpoint()
    for name, process in pair.processes.items():
        measured.add(f"{label}: {name}", resident(process) / MiB)


def first_sync(bench: Bench) -> Measured:
    """Bytes per second of the first sync of a half-empty disk, start to end, beside nbdcopy into nbdkit.

    Both begin with the start of their program and end when everything is over there. The disk has data in every
    other stretch of 16 MiB.
    """
    measured = Measured("MB/s")
    size, stretch = 4 * bench.size, 16 * MiB
    data = [(offset, stretch) for offset in range(0, size, 2 * stretch)]
    with bench.room() as source:
        disk = make_sparse(source / "source.raw", size, data)
        for number in range(bench.rounds):
            bench.say(f"round {number + 1}: nbdcopy")
            with measured.part("nbdcopy"), bench.room() as room:
                needed("nbdcopy")
                make_sparse(room / "disk.raw", size)
                with nbdkit_file(room, size) as target:
                    fetch_memory(size // 2)
                    begin = time.perf_counter()
                    run("nbdcopy", "--flush", disk, target.uri, timeout=300)
                    measured.add("nbdcopy", size / (time.perf_counter() - begin) / 1e6)
            if bench.peers_only:
                continue
            bench.say(f"round {number + 1}: blockstep")
            with measured.part("blockstep"), bench.room() as room, \
                    blockstep_standby(room, size, sparse=True) as standby:
                fetch_memory(size // 2)
                begin = time.perf_counter()
                with blockstep_primary(room, disk, standby, "local") as primary:
                    until(primary.control.replicating, 300, "the first sync ends", every=0.01)
                    measured.add("blockstep", size / (time.perf_counter() - begin) / 1e6)
    ours, theirs = measured.median("blockstep"), measured.median("nbdcopy")
    if ours and theirs:
        measured.scores["ratio"] = ours / theirs
    return measured
