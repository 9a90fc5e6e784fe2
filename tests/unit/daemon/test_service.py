"""What the programs share, as far as it is no program yet."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from blockstep.testing.pair import environment

#: A program that is told to stop, and told again while it does.
PROGRAM = """
import asyncio, os, signal, sys
from blockstep.daemon.service import Service

async def main():
    service = Service("pair")
    os.kill(os.getpid(), signal.SIGTERM)
    await service.wait()
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    await asyncio.sleep(0)
    print("closed in good order")

asyncio.run(main())
"""


@pytest.mark.parametrize("again", ["SIGTERM", "SIGHUP"])
def test_a_second_signal_does_not_break_a_clean_stop_off(again: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, again], capture_output=True, text=True, timeout=20,
                          env=environment())
    assert (done.returncode, done.stdout) == (0, "closed in good order\n"), done


def test_a_second_interrupt_from_the_keyboard_ends_it_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, "SIGINT"], capture_output=True, text=True, timeout=20,
                          env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
