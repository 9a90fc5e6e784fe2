"""The storage daemons and their monitors: round trips, what a flood of requests costs the disks, and the start.

Both daemons are started with the same words.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.measures import Bench, Measured
from benchmarks.servers import Endpoint, needed
from benchmarks.tools import Prober, make_disk
from blockstep.testing.processes import QMP, blockstep, connect, started
from blockstep.units import KiB, MiB

BLOCKSTEP, QEMU = "blockstep daemon", "qemu-storage-daemon"
#: Requests of the flood that are on their way at a time.
FLOOD = 100


@contextmanager
def storage_daemon(name: str, directory: Path, size: int, **options: Any) -> Iterator[Endpoint]:
    """A daemon of that name with one exported disk; ``options`` are Popen's.

    ``control`` is the path of its monitor, and the seconds from its start to the first read.
    """
    disk, nbd, qmp = make_disk(directory / "disk.raw", size), directory / "nbd.sock", directory / "qmp.sock"
    words: list[str | Path] = [
        "--blockdev", f"driver=file,node-name=disk,filename={disk}",
        "--nbd-server", f"addr.type=unix,addr.path={nbd}",
        "--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on",
        "--chardev", f"socket,id=monitor,path={qmp},server=on,wait=off", "--monitor", "chardev=monitor"]
    if name == QEMU:
        needed(QEMU)
        command: list[str | Path] = [QEMU, *words]
    else:
        command = blockstep("daemon", *words)
    begin = time.perf_counter()
    with started(command, nbd, **options) as process:
        reader = Reader(nbd, "disk")
        reader.read(0)
        yield Endpoint(nbd, "disk", {"first read": process}, control=(qmp, time.perf_counter() - begin))
        reader.close()


class Reader(Prober):
    """Reads blocks of 4k, one after the other."""

    def read(self, offset: int) -> None:
        """Read one block and wait for it."""
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 0, offset, 4 * KiB))
        self._take(16 + 4 * KiB)

    def delays(self, size: int, seconds: float) -> list[float]:
        """The seconds that reads all over the disk took, sorted."""
        found = []
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            self.read(random.randrange(size // (4 * KiB)) * 4 * KiB)
            found.append(time.perf_counter() - begin)
        return sorted(found)


def _each(bench: Bench, measured: Measured, run: Callable[[str, Endpoint], None]) -> None:
    """``run`` once a round for each daemon, in turn."""
    with ExitStack() as stack:
        endpoints = {}
        for name in (QEMU, *(() if bench.peers_only else (BLOCKSTEP,))):
            with measured.part(name):
                room = stack.enter_context(bench.room())
                endpoints[name] = stack.enter_context(storage_daemon(name, room, min(bench.size, 64 * MiB)))
        for number in range(bench.rounds):
            for name, endpoint in endpoints.items():
                bench.say(f"round {number + 1}: {name}")
                with measured.part(name):
                    run(name, endpoint)


def round_trips(bench: Bench) -> Measured:
    """How many query-block-jobs a second one monitor gets answered, one after the other. Score: ``rate``, ours."""
    measured = Measured("k/s")

    def run(name: str, endpoint: Endpoint) -> None:
        qmp = QMP(endpoint.control[0])
        try:
            count, begin = 0, time.perf_counter()
            while (now := time.perf_counter()) < begin + bench.seconds:
                qmp.execute("query-block-jobs")
                count += 1
            measured.add(name, count / (now - begin) / 1e3)
        finally:
            qmp.close()

    _each(bench, measured, run)
    if (rate := measured.median(BLOCKSTEP)) is not None:
        measured.scores["rate"] = rate
    return measured


def read_delay(bench: Bench) -> Measured:
    """The 99th percentile of 4k reads, one after the other, with idle monitors and with one that floods.

    Score: ``growth``, ours: how many times longer they take under the flood.
    """
    measured = Measured("us")

    def run(name: str, endpoint: Endpoint) -> None:
        reader = Reader(endpoint.address, endpoint.export)
        try:
            reader.delays(reader.size, 0.2)
            measured.add(f"{name}: idle", _percentile(reader.delays(reader.size, bench.seconds), 0.99) * 1e6)
            with _flood(endpoint.control[0]):
                measured.add(f"{name}: flood", _percentile(reader.delays(reader.size, bench.seconds), 0.99) * 1e6)
        finally:
            reader.close()

    _each(bench, measured, run)
    idle, flood = measured.median(f"{BLOCKSTEP}: idle"), measured.median(f"{BLOCKSTEP}: flood")
    if idle and flood:
        measured.scores["growth"] = flood / idle
    return measured


def start(bench: Bench) -> Measured:
    """From the start of the program to the first read that it served. Score: ``start``, ours, in ms.

    Python's modules are compiled before, as those of an installed package are.
    """
    measured = Measured("ms")
    with bench.room() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(cache), "PYTHONDONTWRITEBYTECODE": ""}
        for number in range(bench.rounds * 3 + 1):
            for name in (QEMU, *(() if bench.peers_only else (BLOCKSTEP,))):
                bench.say(f"round {number}: {name}")
                with measured.part(name), bench.room() as room, \
                        storage_daemon(name, room, MiB, env=environment) as endpoint:
                    if number:
                        measured.add(name, endpoint.control[1] * 1e3)
    if (took := measured.median(BLOCKSTEP)) is not None:
        measured.scores["start"] = took
    return measured


def _percentile(values: list[float], part: float) -> float:
    """Of sorted values."""
    return values[int(len(values) * part)]


@contextmanager
def _flood(path: Path) -> Iterator[None]:
    """Another process that keeps `FLOOD` requests on their way on one monitor."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_keep_asking, args=(path, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(20):
            raise TimeoutError("the flood does not begin")
        yield
        if not process.is_alive():
            raise OSError("the flood ended early")
    finally:
        process.kill()
        process.join()


def _keep_asking(path: Path, ready: Event) -> None:
    sock: socket.socket = connect(path)
    sock.recv(64 * KiB)
    sock.sendall(b'{"execute": "qmp_capabilities"}')
    sock.recv(64 * KiB)
    request = b'{"execute": "query-block-jobs"}\n'
    sock.sendall(request * FLOOD)
    ready.set()
    while answers := sock.recv(MiB).count(b"\n"):
        sock.sendall(request * answers)
    sys.exit("the monitor was closed")
