"""What QEMU's own schema says of its commands and events, and what ours says of ours: the differences are on a page.

The page is docs/qmp-differences.md. A difference that it does not list fails, and so does a row without a difference.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.daemon import daemon
from tests.docs.story import ROOT
from tests.schemas import Difference, Schema, differences, documented

pytestmark = pytest.mark.interop

PAGE = ROOT / "docs" / "qmp-differences.md"
#: The version of QEMU that the page is about; others have more or fewer arguments.
VERSION = (7, 2)
#: Commands and events of the emulator, beyond those of the storage daemon, that are about disks.
OF_DISKS = re.compile(r"(?<!ram)block|nbd|drive|job|xen-|colo|yank|snapshot|eject|query-(name|status)|^(stop|cont)$")
EVENTS_OF_DISKS = re.compile(r"BLOCK|JOB|QUORUM|COLO|STOP|RESUME|SHUTDOWN")


def of_qemu(directory: Path) -> tuple[Schema, Schema]:
    """The schemas of the storage daemon and of the emulator."""
    peers.need("qemu-storage-daemon", "qemu-system-x86_64")
    path = directory / "qsd.qmp"
    with peers.started(["qemu-storage-daemon", "--chardev", f"socket,id=c,path={path},server=on,wait=off",
                        "--monitor", "chardev=c"], path):
        qmp = peers.QMP(path)
        version = qmp.greeting["version"]["qemu"]
        storage = qmp.execute("query-qmp-schema")
        qmp.close()
    if (version["major"], version["minor"]) != VERSION:
        pytest.skip(f"the page is about QEMU {VERSION[0]}.{VERSION[1]}")
    with peers.qemu_system(directory) as emulator:
        return Schema(storage), Schema(emulator.execute("query-qmp-schema"))


def of_blockstep(directory: Path) -> Schema:
    async def ask() -> Any:
        async with daemon(directory) as d:
            return await d.qmp("query-qmp-schema")

    return Schema(asyncio.run(ask()))


def in_scope(difference: Difference, storage: Schema) -> bool:
    wanted = {"no such command": OF_DISKS, "no such event": EVENTS_OF_DISKS}.get(difference.what)
    return wanted is None or difference.where in storage.entries or bool(wanted.search(difference.where))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> set[Difference]:
    directory = tmp_path_factory.mktemp("parity")
    storage, emulator = of_qemu(directory)
    ours = of_blockstep(directory)
    return {each for theirs in (storage, emulator) for each in differences(ours, theirs) if in_scope(each, storage)}


def test_every_difference_from_qemu_has_its_reason_on_the_page(found: set[Difference]) -> None:
    rows = documented(PAGE)
    unlisted = [f"{each.where}: {each.what}" for each in sorted(found) if not any(row.covers(each) for row in rows)]
    assert not unlisted, "\n".join(unlisted)


def test_the_page_lists_nothing_that_is_as_in_qemu(found: set[Difference]) -> None:
    idle = [f"{row.where}: {row.what}" for row in documented(PAGE) if not any(row.covers(each) for each in found)]
    assert not idle, "\n".join(idle)
