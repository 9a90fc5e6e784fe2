"""Lines become commands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.shell.catalogue import Catalogue
from blockstep.shell.complete import complete
from blockstep.shell.words import Request, WordError, parse
from tests.unit.shell.support import CATALOGUE


@pytest.mark.parametrize(("line", "command", "arguments"), [
    ("query-status", "query-status", {}),
    ("  query_status  ", "query-status", {}),
    ("block-resize node_name=a size=512", "block_resize", {"node-name": "a", "size": 512}),
    ("blockdev-add driver=file filename=/x=y", "blockdev-add", {"driver": "file", "filename": "/x=y"}),
    ("blockdev-add driver=quorum vote_threshold=2 children.0=a children.1.driver=null children.1.node_name=b",
     "blockdev-add", {"driver": "quorum", "vote-threshold": 2,
                      "children": ["a", {"driver": "null", "node-name": "b"}]}),
    ('tune label="a b" ratio=0.5', "tune", {"label": "a b", "ratio": 0.5}),
    ("tune label='{\"' ratio=1", "tune", {"label": '{"', "ratio": 1}),
    ('x addr={"type": "unix", "data": {}} more=[1, 2]', "x", {"addr": {"type": "unix", "data": {}}, "more": [1, 2]}),
    ("x empty=", "x", {"empty": ""}),
])
def test_a_line_of_words_is_a_command(line: str, command: str, arguments: dict[str, Any]) -> None:
    assert parse(line, CATALOGUE) == Request(command, arguments)


@pytest.mark.parametrize(("word", "value"), [
    ("label=5", "5"), ("label=true", "true"), ("label=null", "null"), ("label=on", "on"),
    ("unknown=NaN", "NaN"), ("unknown=1e999", "1e999"),
    ("ratio=5", 5), ("ratio=5e1", 50.0), ("on=true", True), ("on=off", False), ("on=5", "5"),
    ("unknown=5", 5), ("unknown=null", None), ("unknown=word", "word"), ("unknown=on", "on")])
def test_a_bare_value_is_what_its_argument_takes(word: str, value: Any) -> None:
    (found,) = parse(f"tune {word}", CATALOGUE).arguments.values()
    assert found == value
    assert type(found) is type(value)


def test_without_a_schema_a_value_is_what_it_looks_like() -> None:
    assert parse("x a=5 b_c=d", Catalogue([], ["x"])).arguments == {"a": 5, "b_c": "d"}


@pytest.mark.parametrize(("line", "oob"), [
    ('{"execute": "block_resize", "arguments": {"size": 1}}', False),
    ('{"exec-oob": "block_resize", "arguments": {"size": 1}, "id": 1}', True)])
def test_a_whole_request_is_sent_as_it_is(line: str, oob: bool) -> None:
    assert parse(line, CATALOGUE) == Request("block_resize", {"size": 1}, oob)


@pytest.mark.parametrize(("line", "says"), [
    ("x word", "column 3: KEY=VALUE is needed, not 'word'"), ("x =5", "KEY=VALUE"),
    ("x a={", "column 5: this is no JSON"),
    ("x a='b", "has no end"), ('x a="b"c', "column 8: a blank"), ("x a=1 a=2", "a is given twice"),
    ("x a=1 a.b=2", "'a' has a value already"), ("x a.=2", "empty"), ("{", "no JSON"),
    ("x a=" + "[" * 100_000, "column 5: this is no JSON"), ("x " + "a." * 100 + "b=1", "64 parts"),
    ("x a=\udcff", "column 5: this is no text"), ("x a=[NaN]", "no JSON"), ('{"execute": 5}', "a request is"),
    ('{"execute": "a", "arguments": 5}', "a request is")])
def test_what_is_no_command_is_refused_and_says_where(line: str, says: str) -> None:
    with pytest.raises(WordError, match=says.replace("(", "\\(")):
        parse(line, CATALOGUE)


@given(st.text(alphabet="blockdev-ruqm=.{}[]\"' 01,:", max_size=40))
def test_no_line_breaks_the_parser_or_the_completion(line: str) -> None:
    if line.strip():
        try:
            parse("blockdev-add " + line, CATALOGUE)
        except WordError:
            pass
    assert 0 <= complete("blockdev-add " + line, CATALOGUE).start <= len(line) + 13
