"""Drivers are imported when they are needed; their names are known before."""

from __future__ import annotations

import subprocess
import sys

import blockstep.drivers
from blockstep.block.driver_modules import MODULES
from blockstep.block.registry import driver_names, find_driver


def test_each_name_is_that_of_a_driver_in_its_module() -> None:
    for name, module in MODULES.items():
        assert (find_driver(name).driver, find_driver(name).__module__) == (name, module)


def test_no_driver_is_left_out() -> None:
    blockstep.drivers.load()
    ours = [name for name in driver_names() if find_driver(name).__module__.startswith("blockstep.drivers.")]
    assert ours == sorted(MODULES)


def test_a_driver_is_imported_when_it_is_asked_for() -> None:
    program = ("import sys\n"
               "from blockstep import drivers\n"
               "from blockstep.block.registry import find_driver\n"
               "find_driver('file')\n"
               "print(*sys.modules)")
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "blockstep.drivers.file" in loaded
    assert "blockstep.drivers.nbd" not in loaded
