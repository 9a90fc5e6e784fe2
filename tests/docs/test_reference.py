"""The pages that are made from declarations are up to date, and tables of options agree with the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

import blockstep.replication.link  # noqa: F401  registers its driver
from blockstep import drivers  # noqa: F401  registers them
from blockstep.block.registry import driver_names, find_driver, parse_options
from tests.docs.story import ROOT, blocks

DRIVERS = ROOT / "docs" / "drivers"
#: Options that every driver has: docs/drivers/README.md.
COMMON = {"driver", "node-name", "read-only", "auto-read-only", "force-share", "discard", "detect-zeroes", "cache"}
#: Drivers that jobs and programs put into the graph by themselves, and nobody can ask for.
INTERNAL = {"mirror-top"}
#: Names that QEMU has for drivers of ours -> whose page they are on.
ALIASES = {"host_device": "file", "null-aio": "null", "null-co": "null"}
#: Those that come with the package, whatever other tests of this run have registered, and that have a page.
DOCUMENTED = sorted(name for name in driver_names()
                    if find_driver(name).__module__.startswith("blockstep.") and name not in {*INTERNAL, *ALIASES})


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=30,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment})


def test_generated_pages_are_up_to_date() -> None:
    result = _run(ROOT / "tools" / "reference", "--check")
    assert result.returncode == 0, result.stderr


def test_every_option_that_help_shows_is_in_the_page_of_commands() -> None:
    sections = re.split(r"^## blockstep (\w+)$", (ROOT / "docs" / "cli.md").read_text(), flags=re.M)
    pages: Mapping[str, str] = dict(zip(sections[1::2], sections[2::2], strict=True))
    shown = _run("-m", "blockstep", "--help").stdout.partition("Commands:")[2]
    assert set(re.findall(r"^  (\w+) ", shown, re.M)) == set(pages)
    for command, page in pages.items():
        options = set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", _run("-m", "blockstep", command, "--help").stdout, re.M))
        assert options - {"--help"} <= set(re.findall(r"--[\w-]+", page)), command


def test_every_command_on_images_is_in_the_page_of_commands() -> None:
    sections = re.split(r"^##+ blockstep img (\w+)$", (ROOT / "docs" / "cli.md").read_text(), flags=re.M)
    pages: Mapping[str, str] = dict(zip(sections[1::2], sections[2::2], strict=True))
    shown = _run("-m", "blockstep", "img", "--help").stdout.partition("Commands:")[2]
    assert set(re.findall(r"^  (\w+) ", shown, re.M)) == set(pages)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_driver_has_a_page_with_all_of_its_options(name: str) -> None:
    page = DRIVERS / f"{name}.md"
    assert page.exists()
    text = page.read_text()
    assert text.startswith(f"# {name}\n")
    own = {field.encode_name for field in msgspec.structs.fields(find_driver(name).Options)} - COMMON
    documented = set(re.findall(r"`([\w.-]+)`", " ".join(re.findall(r"^\| (.*?) \|", text, re.M))))
    assert own <= documented


@pytest.mark.parametrize(("name", "page"), ALIASES.items())
def test_another_name_of_a_driver_is_on_its_page_with_its_options(name: str, page: str) -> None:
    text = (DRIVERS / f"{page}.md").read_text()
    assert f"`{name}`" in text
    for field in msgspec.structs.fields(find_driver(name).Options):
        assert field.encode_name in COMMON or f"`{field.encode_name}`" in text


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_page_of_a_driver_has_the_common_shape(name: str) -> None:
    text = (DRIVERS / f"{name}.md").read_text()
    assert "```json" in text
    assert "| option | default | meaning |" in text
    assert re.search(r"^\*\*Durability\.\*\*|^## Durability", text, re.M)
    assert f"]({name}.md)" in (DRIVERS / "README.md").read_text()


def test_the_examples_of_the_driver_pages_are_options() -> None:
    found = 0
    for page in DRIVERS.glob("*.md"):
        for block in blocks(page):
            if block.language == "json":
                parse_options(json.loads("\n".join(block.text)))
                found += 1
    assert found >= len(DOCUMENTED)
