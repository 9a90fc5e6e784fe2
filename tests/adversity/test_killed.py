"""SIGKILL for either side, in every phase."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import BlockstepError
from blockstep.testing.pair import Pair, Side
from blockstep.testing.proxy import Proxy
from blockstep.units import KiB, MiB
from tests.scenarios import scenario

of_any_kind = pytest.mark.usefixtures("four_disks")


def proxy_to(pair: Pair) -> Proxy:
    host, _, port = pair.link.rpartition(":")
    return Proxy(host, int(port))


async def attaching(pair: Pair, proxy: Proxy) -> None:
    """The primary is on its way to its standby, which is far away."""
    proxy.delay = 0.15
    await pair.start_primary(to=proxy.address)
    await pair.primary.until(lambda status: proxy.connections)


async def first_sync(pair: Pair, proxy: Proxy) -> None:
    proxy.rate = 512 * KiB
    await pair.start_primary(to=proxy.address)
    await pair.primary.until(lambda status: status["work"] and proxy.up > 64 * KiB)


async def replicating(pair: Pair, proxy: Proxy) -> None:
    await pair.start_primary(to=proxy.address)
    await pair.primary.until(health="healthy")
    await pair.checkpoint()


async def checkpointing(pair: Pair, proxy: Proxy) -> None:
    await replicating(pair, proxy)
    proxy.delay = 0.15
    asking = pair.primary.begin("replication-checkpoint")
    asking.add_done_callback(lambda asked: asked.exception())
    await pair.primary.until(state="checkpointing")


Phase = Callable[[Pair, Proxy], Coroutine[Any, Any, None]]
PHASES = [attaching, first_sync, replicating, checkpointing]


@of_any_kind
@pytest.mark.parametrize("phase", PHASES)
@scenario
async def test_the_standby_is_killed_and_the_guest_does_not_notice(tmp_path: Path, phase: Phase) -> None:
    async with Pair(tmp_path, disks=2, size=2 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await phase(pair, proxy)
            async with pair.writing() as writes:
                await pair.written(50)
                pair.standby.kill()
                status = await pair.primary.until(state="offline")
                assert status["health"] == "at-risk"
                assert status["reason"]
                proxy.heal()
                await pair.start_standby(link=pair.link)
                await pair.written(50)
                await pair.primary.until(health="healthy")
                await pair.checkpoint_shows()
                assert writes.error is None
                assert writes.slowest < 2.0 + 0.5


@of_any_kind
@pytest.mark.parametrize("phase", PHASES)
@scenario
async def test_the_primary_is_killed_and_the_standby_knows_what_it_has(tmp_path: Path, phase: Phase) -> None:
    async with Pair(tmp_path, disks=2, size=2 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            await phase(pair, proxy)
            async with pair.writing():
                await pair.written(20)
                pair.primary.kill()
            await pair.standby.until(lambda status: not status["peer"])
            status = await pair.standby.status()
            assert status["health"] == "at-risk"
            if phase in (attaching, first_sync):
                assert status["state"] == "waiting"
                with pytest.raises(BlockstepError, match="no checkpoint"):
                    await pair.standby.execute("replication-failover")
                proxy.heal()
                await pair.start_primary(to=proxy.address)
                await pair.primary.until(health="healthy")
                # An image that was killed holds what was flushed, and it may hold some of what was not.
                assert await pair.standby.read_disks() == await pair.primary.read_disks()
                if pair.format == "raw":
                    await pair.proven(pair.primary)
            else:
                assert status["state"] == "lost"
                await pair.standby.heard("REPLICATION_STATE", state="lost", health="at-risk")
                at = await pair.proven(pair.standby)
                await pair.standby.execute("replication-failover")
                await pair.standby.until(state="promoted")
                assert await pair.proven(pair.standby) == at


@scenario
async def test_that_the_standby_was_killed_is_told_at_once_though_nothing_is_written(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start("--max-stall", "10m")
        await pair.primary.until(health="healthy")
        pair.standby.kill()
        await pair.primary.until(state="offline", health="at-risk")


async def merging(pair: Pair) -> Side:
    """The standby is promoted, and merges."""
    await pair.start(standby=["--buffer-memory", "64M"])
    await pair.primary.until(health="healthy")
    async with pair.primary.clients() as (guest,):
        await guest.pwrite(0, bytes(pair.size))
        await pair.primary.until(lambda status: not status["disks"][0]["behind"])
    return pair.standby


@scenario
async def test_the_old_primary_is_killed_during_the_merge(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=16 * MiB) as pair:
        standby = await merging(pair)
        await standby.execute("replication-failover")
        pair.primary.kill()
        await standby.until(state="promoted")
        assert await pair.proven(standby) == 0


@of_any_kind
@scenario
async def test_a_standby_that_is_killed_during_the_merge_starts_again_and_can_be_a_standby(tmp_path: Path) -> None:
    """What its disk holds is not promised (that takes a durable buffer); that it can be synced again is."""
    async with Pair(tmp_path, size=16 * MiB) as pair:
        standby = await merging(pair)
        await standby.execute("replication-failover")
        standby.kill()
        link = pair.link
        await pair.primary.until(lambda status: status["state"] in ("offline", "fenced"))
        pair.primary.kill()
        with pytest.raises(BlockstepError, match="was promoted"):
            await pair.start_standby(link=link)
        (tmp_path / "standby.promoted").unlink()  # an operator who says that the disk may be overwritten
        await pair.start_standby(link=link)
        assert (await pair.standby.status())["state"] == "waiting"
        await pair.start_primary()
        await pair.primary.until(health="healthy")
        assert await pair.standby.read_disks() == await pair.primary.read_disks()
