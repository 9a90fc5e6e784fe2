"""A side that is there and does nothing (SIGSTOP): D8, one number bounds what that costs."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from blockstep.testing.pair import Pair
from blockstep.testing.proxy import Proxy
from blockstep.units import KiB, MiB
from tests.scenarios import scenario

MAX_STALL = 0.6
#: What a busy machine may add to any time.
MARGIN = 1.0


def proxy_to(pair: Pair) -> Proxy:
    host, _, port = pair.link.rpartition(":")
    return Proxy(host, int(port))


@pytest.mark.parametrize("ack", ["local", "both"])
@scenario
async def test_a_stopped_standby_holds_the_guest_up_for_max_stall_at_most(tmp_path: Path, ack: str) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start("--max-stall", f"{MAX_STALL}s", "--ack", ack, "--queue", "64k")
        await pair.primary.until(health="healthy")
        async with pair.writing() as writes:
            await pair.written(50)
            low, _ = await pair.checkpoint()
            pair.standby.send(signal.SIGSTOP)
            stopped = time.monotonic()
            while True:  # the control socket answers all the while
                status = await pair.primary.status(timeout=1.0)
                if status["state"] == "offline":
                    break
                assert time.monotonic() - stopped < MAX_STALL + MARGIN
                await asyncio.sleep(0.01)
            assert status["health"] == "at-risk"
            await pair.primary.heard("REPLICATION_STATE", state="offline", health="at-risk")
            await pair.written(100)
            assert writes.slowest < MAX_STALL + MARGIN
            pair.standby.send(signal.SIGCONT)
            seen = await pair.proven(pair.standby)
            await pair.primary.until(health="healthy")
            assert seen >= low
            assert writes.error is None
        await pair.checkpoint()
        assert await pair.proven(pair.standby) == writes.acknowledged


@scenario
async def test_a_standby_that_stops_during_the_first_sync(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start_standby()
        async with proxy_to(pair) as proxy:
            proxy.rate = MiB
            await pair.start_primary("--max-stall", f"{MAX_STALL}s", to=proxy.address)
            await pair.primary.until(lambda status: status["work"] and proxy.up > 64 * KiB)
            async with pair.writing() as writes:
                await pair.written(5)
                pair.standby.send(signal.SIGSTOP)
                await pair.primary.until(state="offline", limit=MAX_STALL + MARGIN)
                await pair.written(50)
                assert writes.slowest < MAX_STALL + MARGIN
                proxy.heal()
                pair.standby.send(signal.SIGCONT)
                await pair.primary.until(health="healthy")
                assert writes.error is None
            await pair.checkpoint()
            assert await pair.proven(pair.standby) == writes.acknowledged


@scenario
async def test_a_standby_that_stops_during_a_checkpoint(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start("--max-stall", f"{MAX_STALL}s")
        await pair.primary.until(health="healthy")
        async with pair.writing() as writes:
            await pair.written(20)
            pair.standby.send(signal.SIGSTOP)
            started = time.monotonic()
            with pytest.raises(Exception, match="no checkpoint was taken"):
                await pair.primary.execute("replication-checkpoint")
            assert time.monotonic() - started < max(MAX_STALL, 1.0) + MARGIN
            await pair.primary.until(state="offline")
            await pair.written(20)
            assert writes.slowest < MAX_STALL + MARGIN
            pair.standby.send(signal.SIGCONT)
            await pair.primary.until(health="healthy")
        await pair.checkpoint()
        assert await pair.proven(pair.standby) == writes.acknowledged


@scenario
async def test_a_stopped_primary_can_be_failed_over_from_and_is_fenced_when_it_goes_on(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start("--max-stall", f"{MAX_STALL}s")
        await pair.primary.until(health="healthy")
        async with pair.writing() as writes:
            await pair.written(50)
            low, high = await pair.checkpoint()
            await pair.written(20)
            pair.primary.send(signal.SIGSTOP)
            await pair.standby.execute("replication-failover")
            assert low <= await pair.proven(pair.standby) <= high
            pair.primary.send(signal.SIGCONT)
            await pair.primary.until(state="fenced")
            await pair.written(20)
            assert writes.error is None
        assert low <= await pair.proven(pair.standby) <= high


@scenario
async def test_a_primary_that_stopped_for_a_while_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start("--max-stall", f"{MAX_STALL}s")
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(50)
            pair.primary.send(signal.SIGSTOP)
            assert (await pair.standby.status(timeout=1.0))["state"] == "replicating"
            await asyncio.sleep(2 * MAX_STALL)  # how long it is stopped; nothing is waited for
            pair.primary.send(signal.SIGCONT)
            await pair.written(50)
            await pair.primary.until(health="healthy")
            await pair.checkpoint_shows()
