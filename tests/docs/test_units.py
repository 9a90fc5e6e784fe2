"""systemd understands the units in packaging/systemd, and they call what exists."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.story import ROOT

UNITS = sorted((ROOT / "packaging" / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_understands_a_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here (package systemd)")
    program = tmp_path / "blockstep"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copies = [tmp_path / one.name.replace("@", "@web") for one in UNITS]  # they name each other
    for one, copy in zip(UNITS, copies, strict=True):
        copy.write_text(one.read_text().replace("/usr/local/bin/blockstep", str(program)))
    result = subprocess.run(["systemd-analyze", "verify", tmp_path / unit.name.replace("@", "@web")],
                            capture_output=True, text=True, timeout=30)
    ours = [line for line in result.stderr.splitlines() if "blockstep" in line]
    assert not ours


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_its_role_for_what_its_name_says(unit: Path) -> None:
    role = unit.name.removeprefix("blockstep-").removesuffix("@.service")
    text = unit.read_text()
    name = "--name" if role == "daemon" else "--pair"
    assert f"ExecStart=/usr/local/bin/blockstep {role} {name} %i $OPTIONS" in text
    assert f"EnvironmentFile=/etc/blockstep/%i.{role}" in text
    assert "Type=notify" in text


def test_the_merge_of_a_standby_that_is_stopped_is_never_cut_short() -> None:
    text = (ROOT / "packaging" / "systemd" / "blockstep-standby@.service").read_text()
    assert "TimeoutStopSec=infinity" in text
