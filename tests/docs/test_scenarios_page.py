"""The page that compares our tests with QEMU's names tests that there are."""

from __future__ import annotations

import re

from tests.docs.story import ROOT

PAGE = ROOT / "docs" / "drivers" / "qcow2-scenarios.md"


def test_every_test_that_the_page_names_is_there() -> None:
    text = PAGE.read_text()
    files = dict(re.findall(r"^\| ([A-Z]) \| (tests/\S+) \|$", text, re.MULTILINE))
    assert len(files) > 10
    named = re.findall(r"`([A-Z])::(test_\w+)`", text)
    assert len(named) > 50
    missing = [f"{letter}::{name}" for letter, name in named
               if f"def {name}(" not in (ROOT / files[letter]).read_text()]
    assert not missing
    assert set(files) == {letter for letter, _ in named}
