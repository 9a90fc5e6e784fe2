"""What Tab offers."""

from __future__ import annotations

import pytest

from blockstep.shell.complete import complete, explain
from tests.unit.shell.support import CATALOGUE


def offers(line: str) -> list[str]:
    """The whole lines that may come of it, without what was there before the word."""
    start, candidates, _ = complete(line, CATALOGUE)
    return [candidate.text for candidate in candidates] if start <= len(line) else []


@pytest.mark.parametrize(("line", "expected"), [
    ("", ["block-export-del", "block_resize", "blockdev-add", "job-cancel", "query-status", "tune", "help", "exit"]),
    ("block-", ["block-export-del", "block_resize"]),
    ("block_", ["block-export-del", "block_resize"]),
    ("help q", ["query-status"]),
    ("block_resize ", ["size=", "node-name="]),
    ("block-resize n", ["node-name="]),
    ("block-resize node_", ["node-name="]),
    ("block_resize size=1 ", ["node-name="]),
    ("blockdev-add driver=", ["file", "quorum", "null"]),
    ("blockdev-add driver=q", ["quorum"]),
    ("blockdev-add read-only=", ["true", "false"]),
    ("blockdev-add driver=file ", ["filename=", "node-name=", "read-only="]),
    ("blockdev-add driver=quorum ch", ["children."]),
    ("blockdev-add driver=quorum children.0.", ["driver=", "node-name=", "read-only="]),
    ("blockdev-add driver=quorum children.0.driver=file children.0.f", ["filename="]),
    ("blockdev-add driver=quorum children.0.driver=n", ["null"]),
    ('blockdev-add x={"a": ', []),
    ("tune label='a ", []),
    ("tune nonsense ", []),
    ("unknown ", []),
    ("unknown a=", []),
])
def test_words_that_may_come_next(line: str, expected: list[str]) -> None:
    assert offers(line) == expected


@pytest.mark.parametrize(("line", "things"), [
    ("block_resize node-name=", "nodes"), ("job-cancel id=a", "jobs"), ("block-export-del id=", "exports"),
    ("blockdev-add node-name=", None), ("blockdev-add driver=quorum children.0=", "nodes"), ("tune label=", None),
    ("block_resize size=", None)])
def test_names_are_those_of_the_things_that_an_argument_takes(line: str, things: str | None) -> None:
    assert complete(line, CATALOGUE).things == things


def test_only_the_part_behind_the_last_dot_or_the_equals_sign_is_replaced() -> None:
    line = "blockdev-add driver=quorum children.0.dr"
    assert complete(line, CATALOGUE).start == len(line) - 2
    assert complete(line + "iver=fi", CATALOGUE).start == len(line) + 5


def test_an_argument_is_described_by_its_type_and_in_brackets_if_optional() -> None:
    about = {one.text: one.about for one in complete("blockdev-add driver=quorum ", CATALOGUE).candidates}
    assert about == {"children.": "list of str or object", "vote-threshold=": "int", "node-name=": "[str]",
                     "read-only=": "[bool]"}
    assert explain("blockdev-add", CATALOGUE).splitlines() == [
        "  driver     file|quorum|null", "  node-name  [str]", "  read-only  [bool]"]
