"""Random traces over a whole pair: guests on both sides, checkpoints, faults, cuts, restarts, resizes, promotions.

A number is a trace: `trace` throws the dice. One that fails is made as short as it will go (`shortest`), and printed so
that it can be played again. The short ones that have found something stay here, as tests of their own.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from blockstep.nbd import constants as c
from tests.scenario.pair_steps import Do, Fault, Request, Step
from tests.scenario.pair_trace import play
from tests.scenario.pair_world import Shape

MiB: Final = 1 << 20
#: Seconds for which a trace that fails is made shorter.
SHORTENING: Final = 60.0
#: Seconds for all of it, but in `make fuzz`.
LIMIT: Final = 0 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 240

SIZES: Final = ((MiB + 777, 200_001), (300_001,), (65_536, 3 * 65_536 + 1, 2 * MiB - 512))
#: What happens, and how often.
EVENTS: Final = {
    "checkpoint": 6, "resize": 2, "stuck": 1, "wait": 3, "sleep": 2, "turn": 3, "cut": 3, "hang": 1, "down": 1,
    "slow": 1, "up": 1, "recover": 3, "bounce-standby": 1, "bounce-primary": 1, "crash-standby": 1,
    "crash-primary": 1, "fault": 2}
AMOUNTS: Final[dict[str, Sequence[float]]] = {
    "turn": (1, 2, 3, 5, 8, 13, 21, 34), "sleep": (0.1, 1.0, 10.0), "resize": (1, 512, 65_536, 100_000),
    "stuck": (0, 1)}
FAULTS: Final = ("read", "write", "write", "write_zeroes", "discard", "flush", "block_status", "truncate")


def shape(dice: random.Random) -> Shape:
    """Any pair."""
    return Shape(
        sizes=dice.choice(SIZES), format=dice.choice(("raw", "raw", "qcow2")), faulty=dice.random() < 0.5,
        ack=dice.choice(("local", "both")), queue=dice.choice((MiB, 65_536)),
        buffer=dice.choice((16 * MiB, 16 * MiB, 400_000)), every=dice.choice((0.0, 5.0, 0.3)))


def request(dice: random.Random) -> Request:
    """Any request: in few places, so that they meet."""
    offset = 65_536 * dice.randrange(5) + dice.choice((0, 1, 4095, 4096, 20_000, 65_535))
    return Request(
        dice.choice(("write", "write", "write", "read", "zeroes", "discard", "flush")), dice.randrange(3), offset,
        dice.choice((1, 512, 4096, 4097, 70_000, 200_000)),
        dice.choice((0, 0, c.CMD_FLAG_FUA, c.CMD_FLAG_NO_HOLE, c.CMD_FLAG_FAST_ZERO)),
        dice.choice(("guest", "guest", "view")))


def event(dice: random.Random) -> Step:
    """Anything but a request."""
    [what] = dice.choices(list(EVENTS), list(EVENTS.values()))
    disk = dice.randrange(3)
    if what == "fault":
        return Fault(dice.choice(("secondary", "secondary", "disk")), dice.choice(FAULTS), disk,
                     dice.choice((errno.EIO, errno.ENOSPC)), dice.random() < 0.5)
    begin = what in ("checkpoint", "resize") and dice.random() < 0.5
    return Do(what, disk, dice.choice(AMOUNTS.get(what, (0,))), begin)


def trace(dice: random.Random) -> list[Step]:
    """Any trace: half of them end with an end, after which life goes on."""
    def some(count: int) -> list[Step]:
        return [request(dice) if dice.random() < 0.6 else event(dice) for _ in range(dice.randrange(count))]

    steps = some(50)
    if dice.random() < 0.5:
        end = dice.choice(("failover", "failover", "latest", "stop"))
        steps += [Do(end, begin=dice.random() < 0.5), *some(15)]
    return steps


def shortest(steps: Sequence[Step], fails: Callable[[Sequence[Step]], bool]) -> Sequence[Step]:
    """What is left when no piece of it, of whatever length, can be left out, or it would not fail any more."""
    size, end = len(steps) // 2, time.monotonic() + SHORTENING
    while size:
        at = 0
        while at < len(steps) and time.monotonic() < end:
            fewer = [*steps[:at], *steps[at + size:]]
            if fails(fewer):
                steps = fewer
            else:
                at += size
        size //= 2
    return steps


def failure(pair: Shape, steps: Sequence[Step]) -> Exception | None:
    """How a trace fails."""
    try:
        play(pair, steps)
    except Exception as error:
        return error
    return None


def kind(error: Exception | None) -> str:
    """Errors that say the same, but for the numbers in it, are of one kind."""
    return f"{type(error)} {re.sub('[0-9]+', '', str(error))[:60]}"


@pytest.mark.timeout(LIMIT)
@given(st.integers(0, 2**64))
@settings(max_examples=max(30, settings.default.max_examples // 5), phases=[Phase.explicit, Phase.generate])
def test_any_trace_over_a_pair(number: int) -> None:
    dice = random.Random(number)
    pair, steps = shape(dice), trace(dice)
    error = failure(pair, steps)
    if error:
        short = shortest(steps, lambda fewer: kind(failure(pair, fewer)) == kind(error))
        raise failure(pair, short) or error


#: What random traces have found.
FOUND: Final[dict[str, tuple[Shape, list[Step]]]] = {
    "a buffer that cannot be emptied when the checkpoint is given up": (
        Shape(buffer=400_000),
        [Do("down"), Request("write", length=800_000), Do("wait"), Do("stuck"), Do("up"), Do("sleep", amount=10.0)]),
    "the primary ends while it attaches": (
        Shape(format="qcow2", ack="both", queue=65_536, every=5.0),
        [Do("bounce-primary"), Do("cut"), Do("bounce-primary"), Do("wait")]),
    "the primary's disk fails": (Shape(), [Fault("disk", "write", always=True), Request("write"), Do("wait")]),
}


@pytest.mark.parametrize(("pair", "steps"), FOUND.values(), ids=FOUND)
def test_what_a_trace_has_found_is_mended(pair: Shape, steps: list[Step]) -> None:
    play(pair, steps)
