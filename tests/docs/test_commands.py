"""What the documentation tells a reader to type works, and prints what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.story import ROOT, Block, Story, blocks, pages

RUN = ("console", "sh")
#: Blocks that need no reason for not being run.
OTHERS = ("", "text", "json", "python", "ini", "xml", "toml")


@pytest.fixture
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(tmp_path_factory.mktemp("d"))  # a short name: a socket's path has a hundred bytes
    yield story
    story.close()


def _is_story(page: Path) -> bool:
    return any(block.language in RUN and not block.not_run for block in blocks(page))


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in pages() if _is_story(page)], ids=_name)
def test_a_pages_commands(page: Path, story: Story) -> None:
    for block in blocks(page):
        story.run(block)


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_a_block_has_a_known_language(page: Path) -> None:
    strange = [f"{block.where}: {block.language}" for block in blocks(page) if block.language not in (*RUN, *OTHERS)]
    assert not strange


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_json_is_json(page: Path) -> None:
    for block in _of(page, "json"):
        json.loads("\n".join(block.text))


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    import re

    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{_name(page)}: {target}"


def _of(page: Path, language: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == language and not block.not_run]
