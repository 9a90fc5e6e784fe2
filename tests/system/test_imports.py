"""A server imports what it may need before it serves: an import in the middle of a request would hold up all others.

The interpreter itself tells of every import, on standard error.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path

import pytest

from blockstep.block.driver_modules import MODULES
from blockstep.testing.pair import LIMIT, Pair, Side, environment
from blockstep.testing.processes import QMP, blockstep, started
from blockstep.units import MiB
from tests.scenarios import scenario

TELLING = {"PYTHONVERBOSE": "1"}
IMPORT = re.compile(r"^import '([^']+)' # ", re.MULTILINE)
#: The names of hosts are looked up in a thread, errors are explained with a module for that: nobody waits for these.
LATE = {"unicodedata", "stringprep", "encodings.idna", "difflib"}


def imports(printed: str) -> set[str]:
    return set(IMPORT.findall(printed)) - LATE


async def serving(side: Side) -> set[str]:
    """What a side has imported until it says that it serves."""
    async with asyncio.timeout(LIMIT):
        while True:
            if f"{side.role} of pair" in side.printed:
                return imports(side.printed)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("format", ["raw", "qcow2", "overlay"])
@scenario
async def test_a_pair_imports_nothing_once_it_serves(tmp_path: Path, format: str) -> None:
    telling = {**environment(), **TELLING}
    async with Pair(tmp_path, size=4 * MiB, format=format) as pair:
        await pair.start_standby(env=telling)
        before_standby = await serving(pair.standby)
        await pair.start_primary(env=telling)
        before_primary = await serving(pair.primary)
        assert "blockstep.daemon.primary" in before_primary

        await pair.primary.until(health="healthy")
        await pair.write(20)
        async with pair.primary.clients() as (guest,):
            await guest.write_zeroes(MiB, MiB)
            await guest.discard(2 * MiB, MiB)
            await guest.flush()
        await pair.checkpoint()
        for side in (pair.standby, pair.primary):
            for command in ("query-named-block-nodes", "x-debug-query-block-graph", "query-block-jobs",
                            "query-qmp-schema"):
                await side.execute(command)
        assert imports(pair.primary.printed) == before_primary
        pair.primary.kill()
        async with pair.standby.clients() as (guest,):
            await guest.pwrite(0, bytes(4096))
        await pair.standby.execute("replication-failover")
        await pair.standby.until(lambda status: status["state"] != "failover")
        async with pair.standby.clients() as (guest,):
            await guest.pread(0, 4096)
            await guest.pwrite(0, bytes(4096))
        await pair.standby.execute("quit")
        assert await pair.standby.ended() == 0
        assert imports(pair.standby.printed) == before_standby


def test_a_daemon_imports_no_driver_once_it_serves(tmp_path: Path) -> None:
    qmp, log = tmp_path / "qmp", tmp_path / "log"
    with open(log, "w") as output, started(blockstep("daemon", "--qmp", f"unix:{qmp}"), qmp, stdout=subprocess.DEVNULL,
                                           stderr=output, env={**environment(), **TELLING}):
        monitor = QMP(qmp)
        before = imports(log.read_text())
        assert "blockstep.daemon.startup" in before
        for driver in MODULES:
            with pytest.raises(RuntimeError):
                monitor.execute("blockdev-add", driver=driver, node_name="disk", file="none")
        monitor.close()
        assert imports(log.read_text()) == before
