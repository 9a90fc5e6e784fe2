"""The lines that the documentation shows at the shell's prompt are commands of the daemon."""

from __future__ import annotations

from blockstep.daemon.storage import AREAS
from blockstep.qmp.schema import Registry
from blockstep.shell.catalogue import Catalogue
from blockstep.shell.words import parse
from tests.docs.story import blocks, pages

PROMPT = "disks> "


def test_every_line_at_the_prompt_is_a_command() -> None:
    catalogue = Catalogue([], Registry.of(*AREAS).commands)
    lines = [line.removeprefix(PROMPT) for page in pages() for block in blocks(page) for line in block.text
             if line.startswith(PROMPT)]
    assert lines
    assert {parse(line, catalogue).command for line in lines} <= set(catalogue.commands)
