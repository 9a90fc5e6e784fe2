"""SIGKILL for either side of a pair, at each step of a resize: the pair comes back, and the same resize ends it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import BlockstepError
from blockstep.testing.pair import Pair, Side, environment
from blockstep.units import MiB
from tests.scenarios import scenario

pytestmark = pytest.mark.usefixtures("four_disks")

#: Neither a whole cluster nor a whole sector.
ODD = 2 * MiB + 12345

#: Runs in each side: before and after a node gets another length, whoever the file ``kill`` says is killed.
HOOK = """
import os, pathlib, signal
from blockstep.block.node import Node

real, kill = Node.resize, pathlib.Path(__file__).with_name("kill")

def step(name):
    wanted, pid = kill.read_text().split(":") if kill.exists() else ("", 0)
    if name == wanted:
        os.kill(int(pid), signal.SIGKILL)

async def resize(node, length):
    step(f"before {node.name}")
    await real(node, length)
    step(f"after {node.name}")

Node.resize = resize
"""

ON_STANDBY = ["before disk0-active", "before disk0-hidden", "before disk0-secondary", "after disk0-secondary"]
ON_PRIMARY = ["before disk0-disk", "after disk0-disk"]


async def cut_short(pair: Pair, step: str, victim: str) -> Side:
    """A resize to ODD, at a step of which the ``victim`` is killed. Returns who is left."""
    hooks = {}
    for role in ("standby", "primary"):
        hooks[role] = pair.directory / f"{role}.hook"
        hooks[role].mkdir()
        (hooks[role] / "sitecustomize.py").write_text(HOOK)
    await pair.start_standby(**_with(hooks["standby"]))
    await pair.start_primary(**_with(hooks["primary"]))
    await pair.primary.until(health="healthy")
    await pair.write(20)
    await pair.checkpoint()
    killed, left = (pair.standby, pair.primary) if victim == "standby" else (pair.primary, pair.standby)
    hook = hooks["standby" if step in ON_STANDBY else "primary"]
    (hook / "kill").write_text(f"{step}:{killed.process.pid}")
    asked = pair.primary.begin("block_resize", device="disk0", size=ODD)
    with contextlib.suppress(BlockstepError, OSError):
        await asked  # it may have come about all the same
    assert killed.process.wait(20) == -signal.SIGKILL
    await killed.close()
    pair.sides.remove(killed)
    (hook / "kill").unlink()
    return left


def _with(hook: Path) -> dict[str, Any]:
    variables = environment()
    return {"env": {**variables, "PYTHONPATH": os.pathsep.join([str(hook), variables["PYTHONPATH"]])}}


async def holds(side: Side, pair: Pair, length: int) -> int:
    """The disk has that length, zeroes in what is new, and below it what so many writes have left: how many."""
    async with side.clients() as (client,):
        assert client.info.size == length
        data = bytes(await client.pread(0, length))
        assert not any(data[MiB:])
        return pair.writes.prove([[data[:MiB]]])


@pytest.mark.parametrize(("step", "victim"), [
    (step, victim) for step in ON_STANDBY + ON_PRIMARY for victim in ("standby", "primary")])
@scenario
async def test_after_a_kill_in_a_resize_the_pair_comes_back_and_the_same_resize_ends_it(
        tmp_path: Path, step: str, victim: str) -> None:
    async with Pair(tmp_path) as pair:
        await cut_short(pair, step, victim)
        if victim == "standby":
            await pair.start_standby(link=pair.link)
        else:
            await pair.start_primary()
        # A standby that starts with a longer disk is taken for another one, until the primary's is as long.
        back = await pair.primary.until(lambda status: status["health"] == "healthy"
                                        or (victim == "standby" and f"resize disk0 {ODD}" in status["reason"]))
        if back["health"] == "healthy":
            assert await holds(pair.primary, pair, back["disks"][0]["size"]) == 20
            assert await holds(pair.standby, pair, back["disks"][0]["size"]) == 20
        await pair.primary.execute("block_resize", device="disk0", size=ODD)
        await pair.primary.until(health="healthy")
        await pair.write(20)
        await pair.checkpoint()
        assert await holds(pair.primary, pair, ODD) == await holds(pair.standby, pair, ODD) == 40
        for side in (pair.primary, pair.standby):
            assert (await side.status())["disks"][0]["size"] == ODD


@pytest.mark.parametrize("step", ON_STANDBY)
@scenario
async def test_a_standby_whose_primary_is_killed_in_a_resize_has_the_checkpoint(tmp_path: Path, step: str) -> None:
    async with Pair(tmp_path) as pair:
        standby = await cut_short(pair, step, "primary")
        await standby.execute("replication-failover")
        await standby.until(state="promoted")
        assert await holds(standby, pair, (await standby.status())["disks"][0]["size"]) == 20
        await standby.execute("block_resize", device="disk0", size=ODD)
        assert await holds(standby, pair, ODD) == 20
        await standby.execute("quit")
        await standby.ended()
        data = await pair.file("standby")
        assert (len(data), pair.writes.prove([[data[:MiB]]]), any(data[MiB:])) == (ODD, 20, False)
