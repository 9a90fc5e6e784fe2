"""The rows of the bench: what is measured, against whom, and what should come out.

A target has two values: *at least*, below which the row is missed, and *aim*. Where less is better (times, memory)
both are upper bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import images, qmp
from benchmarks.measures import Bench, Measured, Race, checkpoint_pause, failover, first_sync, memory
from benchmarks.tools import Workload
from blockstep.units import KiB, MiB


@dataclass(frozen=True)
class Target:
    """What a score should be, in ``unit`` ("x" is a ratio). ``lower``: less is better."""

    at_least: float
    aim: float
    unit: str = "x"
    lower: bool = False

    def verdict(self, score: float) -> str:
        """``aim``, ``held`` or ``MISS``."""
        if self.lower:
            return "aim" if score <= self.aim else "held" if score <= self.at_least else "MISS"
        return "aim" if score >= self.aim else "held" if score >= self.at_least else "MISS"


@dataclass(frozen=True)
class Row:
    """One measure, its scores' targets by name, and the words for people."""

    name: str
    title: str
    measure: Callable[[Bench], Measured]
    targets: dict[str, Target]


READ_4K = Workload("randread", 4 * KiB, 16)
WRITE_4K = Workload("randwrite", 4 * KiB, 16)
WRITE_4K_ALONE = Workload("randwrite", 4 * KiB, 1)
WRITE_1M = Workload("write", MiB, 4)


def race(name: str, path: str, ours: str, rivals: tuple[str, ...], work: Workload, at_least: float, aim: float,
         prime: Workload | None = None, cold: bool = False, once: bool = False) -> Row:
    return Row(name, f"{path}: {work}", Race(ours, rivals, work, prime, cold, once), {"ratio": Target(at_least, aim)})


def plain(name: str, work: Workload, at_least: float, aim: float) -> Row:
    return race(name, "plain export", "blockstep export", ("nbdkit", "qemu-nbd"), work, at_least, aim)


def qcow2(name: str, work: Workload, at_least: float, aim: float) -> Row:
    return race(name, "export of a qcow2 image", "blockstep qcow2", ("qemu-nbd qcow2",), work, at_least, aim)


def new_qcow2(name: str, work: Workload, at_least: float, aim: float) -> Row:
    return Row(name, f"export of an empty qcow2 image: {work}",
               Race("blockstep qcow2, empty", ("qemu-nbd qcow2, empty",), work, once=True, fresh=True),
               {"ratio": Target(at_least, aim)})


def into_standby(name: str, work: Workload, at_least: float, aim: float) -> Row:
    return race(name, "into a standby", "blockstep standby", ("QEMU standby",), work, at_least, aim, once=True)


def through_pair(name: str, work: Workload, at_least: float, aim: float) -> Row:
    return race(name, "pair, both acknowledge", "blockstep pair", ("QEMU pair",), work, at_least, aim)


ROWS = [
    plain("plain-4k-read", READ_4K, 1.0, 1.3),
    plain("plain-4k-write", WRITE_4K, 1.0, 1.3),
    plain("plain-4k-read-depth1", Workload("randread", 4 * KiB, 1), 0.8, 1.0),
    plain("plain-4k-write-depth1", WRITE_4K_ALONE, 0.8, 1.0),
    plain("plain-1m-read", Workload("read", MiB, 4), 0.9, 1.1),
    plain("plain-1m-write", WRITE_1M, 0.9, 1.1),
    into_standby("standby-4k-write", WRITE_4K, 3, 6),
    into_standby("standby-64k-write", Workload("write", 64 * KiB, 8), 1.5, 3),
    into_standby("standby-1m-write", WRITE_1M, 1.5, 3),
    through_pair("pair-4k-write", WRITE_4K, 4, 6),
    through_pair("pair-1m-write", WRITE_1M, 1.2, 2),
    through_pair("pair-4k-write-depth1", WRITE_4K_ALONE, 1.2, 2),
    race("local-4k-write", "pair, acknowledged locally", "blockstep pair (local)", ("blockstep export",), WRITE_4K,
         0.5, 0.8),
    race("view-4k-read", "standby's view", "blockstep view", ("QEMU view",), READ_4K, 1.5, 2, prime=WRITE_4K),
    Row("checkpoint", "checkpoint, the whole disk dirty", checkpoint_pause,
        {"pause": Target(5, 1, "ms", lower=True), "growth": Target(1, 0.5, "ms", lower=True)}),
    Row("failover", "failover, the whole disk dirty", failover,
        {"first write": Target(50, 10, "ms", lower=True), "commit rate": Target(1, 2, "GB/s")}),
    Row("memory", "resident memory of the larger process", memory,
        {"resident": Target(80, 60, "MiB", lower=True), "per TiB": Target(64, 32, "MiB", lower=True)}),
    Row("first-sync", "first sync of a half-empty disk", first_sync, {"ratio": Target(0.8, 1.0)}),
    race("cold-4k-read", "export of a file that is not cached", "blockstep export", ("qemu-nbd",), READ_4K, 1.0, 1.0,
         cold=True),
    qcow2("qcow2-4k-read", READ_4K, 1.0, 2),
    qcow2("qcow2-4k-write", WRITE_4K, 1.0, 2),
    new_qcow2("qcow2-new-4k-write", WRITE_4K, 1.0, 2),
    new_qcow2("qcow2-new-1m-write", WRITE_1M, 0.8, 1.2),
    Row("img-convert", "img convert: half-empty raw disk to qcow2", images.convert, {"ratio": Target(0.7, 1.0)}),
    Row("img-check", "img check: 1 TiB with scattered data", images.check_scattered, {"ratio": Target(0.3, 1.0)}),
    Row("img-check-piece", "img check: 1 TiB with data in one piece", images.check_piece,
        {"ratio": Target(0.3, 1.0)}),
    Row("qcow2-empty", "make_empty of a full qcow2 image", images.make_empty,
        {"call": Target(5, 1, "ms", lower=True), "durable": Target(5, 1, "ms", lower=True)}),
    Row("qmp-round-trips", "query-block-jobs on one monitor, one after the other", qmp.round_trips,
        {"rate": Target(5, 8, "k/s")}),
    Row("qmp-read-delay", "4k reads, 99th percentile, while a monitor floods", qmp.read_delay,
        {"growth": Target(2, 1.5, "x", lower=True)}),
    Row("daemon-start", "from the start of the storage daemon to the first read", qmp.start,
        {"start": Target(300, 150, "ms", lower=True)}),
]
