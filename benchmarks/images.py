"""What is measured of images without a server: `blockstep img` beside qemu-img, and emptying in this process.

Every program is timed from its start to its end, since that is what a user waits for: of a short check the start is the
larger part.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from benchmarks.measures import Bench, Measured
from benchmarks.servers import needed
from benchmarks.tools import make_sparse
from blockstep import drivers as _drivers  # noqa: F401  makes them known
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.drivers.create import CreateQcow2
from blockstep.testing.processes import blockstep, run
from blockstep.units import KiB, MiB, TiB

_STRETCH = 16 * MiB
_CLUSTER = 64 * KiB


def convert(bench: Bench) -> Measured:
    """Bytes per second of a copy of a half-empty raw disk into a new qcow2 image, made durable by both."""
    measured = Measured("MB/s")
    size = 4 * bench.size
    with bench.room() as room:
        target = room / "disk.qcow2"
        disk = make_sparse(room / "disk.raw", size, [(at, _STRETCH) for at in range(0, size, 2 * _STRETCH)])
        words: list[str | Path] = ["convert", "-t", "writeback", "-f", "raw", "-O", "qcow2"]
        for number in range(bench.rounds):
            for name, program in _programs(bench):
                bench.say(f"round {number + 1}: {name}")
                with measured.part(name):
                    measured.add(name, size / _timed(*program, *words, disk, target) / 1e6)
                target.unlink(missing_ok=True)
    return _rated(measured)


def check_scattered(bench: Bench) -> Measured:
    """Images per second of a check of 1 TiB whose data lies all over the disk: the work is in the tables."""
    chosen = random.Random(0).sample(range(TiB // _CLUSTER), bench.size // _CLUSTER)
    return _check(bench, "".join(f"write -q -P 1 {at * _CLUSTER} {_CLUSTER}\n" for at in chosen))


def check_piece(bench: Bench) -> Measured:
    """The same with all data in one piece: there is next to no work, and the start of the programs is compared."""
    return _check(bench, f"write -q -P 1 {TiB // 2} {bench.size}\n")


def _check(bench: Bench, commands: str) -> Measured:
    measured = Measured("/s")
    needed("qemu-img", "qemu-io")
    with bench.room() as room:
        image = room / "disk.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, str(TiB))
        run("qemu-io", "-f", "qcow2", "-t", "unsafe", image, stdin=commands, timeout=300)
        for number in range(bench.rounds):
            for name, program in _programs(bench):
                bench.say(f"round {number + 1}: {name}")
                with measured.part(name):
                    measured.add(name, 1 / _timed(*program, "check", "-f", "qcow2", image))
    return _rated(measured)


def make_empty(bench: Bench) -> Measured:
    """Milliseconds in which an image full of data is empty: until the call returns, and until that is durable."""
    measured = Measured("ms")
    if not bench.peers_only:
        for _ in range(bench.rounds):
            with measured.part("blockstep"), bench.room() as room:
                asyncio.run(_empty(measured, room / "disk.qcow2", bench.size))
        for score in ("call", "durable"):
            if (median := measured.median(score)) is not None:
                measured.scores[score] = median
    return measured


async def _empty(measured: Measured, image: Path, size: int) -> None:
    CreateQcow2(filename=str(image), size=size).create()
    graph = Graph()
    node = await graph.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}})
    user = graph.attach_backend(node, "bench", READ | WRITE)
    data = random.Random(0).randbytes(MiB)
    for offset in range(0, size, MiB):
        await user.pwrite(offset, data)
    await user.flush()
    begin = time.perf_counter()
    await node.make_empty()
    returned = time.perf_counter()
    await user.flush()
    measured.add("call", (returned - begin) * 1e3)
    measured.add("durable", (time.perf_counter() - begin) * 1e3)
    await graph.detach_backend(user)
    await graph.close(node)


def _programs(bench: Bench) -> list[tuple[str, list[str | Path]]]:
    needed("qemu-img")
    return [("qemu-img", ["qemu-img"]), *([] if bench.peers_only else [("blockstep img", blockstep("img"))])]


def _timed(*command: str | Path) -> float:
    begin = time.perf_counter()
    run(*command, timeout=300)
    return time.perf_counter() - begin


def _rated(measured: Measured) -> Measured:
    ours, theirs = measured.median("blockstep img"), measured.median("qemu-img")
    if ours and theirs:
        measured.scores["ratio"] = ours / theirs
    return measured
