"""A short run of the fuzzer, and that it finds what it is there to find. A longer one: ``make fuzz``."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.testing.pair import environment
from tests.fuzz import __main__ as fuzzer
from tests.fuzz.mutate import mutated, sound
from tests.fuzz.use import Finding, use
from tests.peers import need

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io")


def test_broken_images_give_values_or_errors() -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--seed", "3", "--cases", "40"], cwd=root, timeout=55,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases 0 to 39" in done.stdout


def test_a_case_is_the_same_each_time() -> None:
    assert [mutated(random.Random(f"5-{number}")) for number in range(3)] == [
        mutated(random.Random(f"5-{number}")) for number in range(3)]


@pytest.mark.parametrize("fault", [ZeroDivisionError, MemoryError, RecursionError])
def test_an_exception_that_is_no_error_of_ours_is_a_finding(
        fault: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: Qcow2, offset: int, length: int) -> bytes:
        raise fault

    path = tmp_path / "image"
    path.write_bytes(sound("default").data)
    monkeypatch.setattr(Qcow2, "_read", fail)
    monkeypatch.setattr(Qcow2, "pread", fail)
    with pytest.raises(fault) as found:
        use(path, random.Random(1))
    assert found.value.__notes__ == ["in the step 'read'"]


def test_a_write_that_is_lost_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lose(self: Qcow2, offset: int, data: bytes, flags: int = 0) -> None:
        pass

    path = tmp_path / "image"
    path.write_bytes(sound("default without bitmaps").data)
    monkeypatch.setattr(Qcow2, "pwrite", lose)
    with pytest.raises(Finding, match="other bytes"):
        use(path, random.Random(1))


def test_a_case_that_takes_too_long_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path, rnd: random.Random) -> int:
        while True:
            pass

    monkeypatch.setattr(fuzzer, "PROCESSOR", 0.05)
    monkeypatch.setattr(fuzzer, "use", busy)
    _, _, finding = fuzzer.one(1, 1, tmp_path)
    assert isinstance(finding, fuzzer.TooLong)
    assert asyncio.run(asyncio.sleep(0, True)), "and the next one can begin"
