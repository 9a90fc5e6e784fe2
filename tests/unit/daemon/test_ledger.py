"""The books of a primary: what is left of them by a process that dies, and what is believed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from blockstep.block.graph import Graph
from blockstep.daemon import ledger
from blockstep.daemon.disks import DiskSpec
from blockstep.daemon.files import Files
from blockstep.daemon.ledger import Ledger
from blockstep.daemon.primary_setup import PrimaryConfig, PrimaryDisk, open_disk
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.replication.link import GRANULARITY
from blockstep.units import MiB
from tests.scenarios import scenario

SIZES = {"a": 40 * GRANULARITY + 512, "b": MiB}


@pytest.fixture
def directory() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def specs(directory: Path) -> list[DiskSpec]:
    specs = [DiskSpec(name, directory / name) for name in SIZES]
    for spec in specs:
        spec.path.write_bytes(bytes(SIZES[spec.name]))
    return specs


async def begun(path: Path, specs: list[DiskSpec], files: Files | None = None) -> tuple[Ledger, dict[str, PrimaryDisk]]:
    config = PrimaryConfig("web", tuple(specs), InetAddress("", 1), UnixAddress("x"), Path("x"), Path("x"))
    graph = Graph()
    disks = {spec.name: await open_disk(graph, config, spec) for spec in specs}
    disks["a"].link.closing.set(3 * GRANULARITY, 1)
    books = Ledger(path, "web", graph, disks, files or Files(lambda: None))
    books.note(instance="run", durable=7, asked=8)
    await books.begin()
    return books, disks


def clusters(path: Path, specs: list[DiskSpec]) -> dict[str, list[int]] | None:
    found = ledger.read(path, "web", specs)
    return found and {name: list(bitmap.bits.search(1)) for name, bitmap in found[1].items()}


@scenario
async def test_each_write_is_in_it_until_it_is_durable(directory: Path, specs: list[DiskSpec]) -> None:
    path = directory / "web.lacks"
    books, disks = await begun(path, specs)
    assert path.stat().st_mode & 0o077 == 0
    await disks["a"].backend.pwrite(40 * GRANULARITY, b"end")
    await disks["b"].backend.write_zeroes(0, GRANULARITY + 1)
    await disks["b"].backend.discard(5 * GRANULARITY, 512)
    assert clusters(path, specs) == {"a": [3, 40], "b": [0, 1, 5]}
    books.note(durable=1234567890, instance="another/run")
    disks["a"].link.settled()
    found = ledger.read(path, "web", specs[::-1])
    assert found
    assert (found[0].instance, found[0].durable, found[0].asked) == ("another/run", 1234567890, 8)
    assert clusters(path, specs) == {"a": [40], "b": [0, 1, 5]}
    await books.close()
    assert clusters(path, specs) is None
    await disks["a"].backend.pwrite(0, b"still written")


@pytest.mark.parametrize("change", [
    lambda path, disk: path.write_bytes(b"{}\n"), lambda path, disk: path.write_bytes(b""),
    lambda path, disk: path.write_bytes(path.read_bytes().replace(b'"web"', b'"wet"')),
    lambda path, disk: path.write_bytes(path.read_bytes()[:-4096]),  # bits that are cut off are not taken for none
    lambda path, disk: os.utime(path, (0, 0)), lambda path, disk: disk.unlink()])
@scenario
async def test_what_is_not_as_the_books_say_makes_them_worthless(
    directory: Path, specs: list[DiskSpec], change: Callable[[Path, Path], Any]
) -> None:
    path = directory / "web.lacks"
    books, _ = await begun(path, specs)
    change(path, specs[1].path)
    assert ledger.read(path, "web", specs) is None
    await books.close()


@scenario
async def test_one_that_never_began_leaves_those_of_another_process(directory: Path, specs: list[DiskSpec]) -> None:
    path = directory / "web.lacks"
    books, _ = await begun(path, specs)
    Ledger(path, "web", Graph(), {}, Files(lambda: None)).forget()
    assert clusters(path, specs)
    await books.close()


@pytest.mark.skipif(not os.path.isdir("/var/tmp") or os.statvfs("/var/tmp").f_fsid == os.statvfs("/dev/shm").f_fsid,
                    reason="needs a file system on a disk in /var/tmp")
@scenario
async def test_there_are_none_on_a_disk(specs: list[DiskSpec]) -> None:
    """There a page that does not find room when it is touched would end the process."""
    with TemporaryDirectory(dir="/var/tmp") as name:
        books, disks = await begun(Path(name) / "web.lacks", specs)
        assert os.listdir(name) == []
        assert disks["a"].link.ledger is None
        await books.close()


@scenario
async def test_without_room_there_are_none(directory: Path, specs: list[DiskSpec],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"web\.lacks\.new"):
        await begun(directory / "web.lacks", specs)
    assert sorted(os.listdir(directory)) == ["a", "b"]


@pytest.mark.parametrize("how", ["fault", "trouble"])
@scenario
async def test_there_are_none_of_a_disk_that_may_lack_what_it_was_told(
    directory: Path, specs: list[DiskSpec], how: str
) -> None:
    path, files = directory / "web.lacks", Files(lambda: None)
    books, disks = await begun(path, specs, files)
    if how == "trouble":
        books.give_up()
    else:
        books.forget()

        async def look() -> None:
            files.faults = {"a": "it was cut off"}

        files.look = look  # type: ignore[method-assign]
    await books.begin()
    assert not path.exists()
    assert disks["a"].link.ledger is None
    await books.close()
