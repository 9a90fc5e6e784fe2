"""Of the whole suite: the profiles of hypothesis, and a line for each package that tests were skipped for."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from blockstep.testing.pair import Pair
from tests import peers

# The same examples in every run (but for the constants that hypothesis finds in the modules imported until then), and
# no deadline per example: this suite runs on shared machines.
settings.register_profile("default", derandomize=True, deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
# `make fuzz`: other examples in every run, and as many as one likes to wait for.
settings.register_profile("fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20000")),
                          suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True, scope="session")
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs under test remember goes nowhere near what this machine's own remember."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATE_DIRECTORY", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """After a command line that was carried out in this process Ctrl-C is pytest's again, and garbage is looked for."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    gc.unfreeze()
    gc.enable()


@pytest.fixture(params=["raw", "qcow2"])
def four_disks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the disks of a pair of processes are: raw with buffers in memory, or all four of them qcow2 images."""
    monkeypatch.setattr(Pair, "format", request.param)
    kind: str = request.param
    return kind


def pytest_report_header() -> str:
    absent = sorted({package for program, package in peers.PACKAGES.items() if shutil.which(program) is None})
    found = "all here" if not absent else f"not here, so their tests are skipped: {' '.join(absent)}"
    return f"peers: {found} (python {sys.version.split()[0]}, {os.cpu_count()} CPUs)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not peers.missed:
        return
    terminalreporter.section("peers that are not installed")
    for package, count in sorted(peers.missed.items()):
        terminalreporter.line(f"{package}: {count} test{'s' if count > 1 else ''} or modules skipped")
    terminalreporter.line(f"to run them, as root: apt-get install {' '.join(sorted(peers.missed))}")
