"""The comparison of two schemas finds what it should: otherwise the test of parity would prove nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.schemas import Difference, Row, Schema, differences, documented

BUILTINS = [{"name": name, "meta-type": "builtin", "json-type": json} for name, json in
            (("str", "string"), ("int", "int"), ("number", "number"), ("bool", "boolean"), ("null", "null"))]


def obj(name: str, *members: str, **more: Any) -> dict[str, Any]:
    """An object; a member is ``NAME:TYPE``, with ``?`` behind it if it is optional."""
    found = []
    for member in members:
        word, _, kind = member.partition(":")
        found.append({"name": word, "type": kind.rstrip("?"), **({"default": None} if kind.endswith("?") else {})})
    return {"name": name, "meta-type": "object", "members": found, **more}


def enum(name: str, *values: str) -> dict[str, Any]:
    return {"name": name, "meta-type": "enum", "values": list(values)}


def schema(arguments: dict[str, Any], result: dict[str, Any], *more: dict[str, Any], **command: Any) -> Schema:
    entry = {"name": "c", "meta-type": "command", "arg-type": arguments["name"], "ret-type": result["name"], **command}
    return Schema([*BUILTINS, entry, arguments, result, *more])


EMPTY = obj("E")
STR = obj("A", "a:str")


@pytest.mark.parametrize(("ours", "theirs", "found"), [
    (schema(STR, EMPTY), schema(STR, EMPTY), []),
    (Schema(BUILTINS), schema(STR, EMPTY), [("c", "no such command")]),
    (schema(STR, EMPTY), schema(STR, EMPTY, features=["unstable"]), [("c", "no feature unstable")]),
    (schema(STR, EMPTY), schema(STR, EMPTY, **{"allow-oob": True}), [("c", "not out of band")]),
    (schema(obj("A", "b:str?"), EMPTY), schema(STR, EMPTY), [("c.a", "is missing"), ("c.b", "is an addition")]),
    (schema(obj("A", "a:str", "b:int"), EMPTY), schema(STR, EMPTY), [("c.b", "is an addition, and is required")]),
    (schema(obj("A", "a:str?"), EMPTY), schema(STR, EMPTY), [("c.a", "is optional")]),
    (schema(STR, EMPTY), schema(obj("A", "a:str?"), EMPTY), [("c.a", "is required")]),
    (schema(obj("A", "a:int"), EMPTY), schema(STR, EMPTY), [("c.a", "int for string")]),
    (schema(obj("A", "a:number"), EMPTY), schema(obj("A", "a:int"), EMPTY), []),
    (schema(EMPTY, obj("R", "a:number")), schema(EMPTY, obj("R", "a:int")), [("c().a", "number for int")]),
    (schema(EMPTY, obj("R", "a:str?")), schema(EMPTY, obj("R", "a:str", "b:str?")), [("c().a", "may be absent")]),
    (schema(EMPTY, obj("R", "x:str")), schema(EMPTY, obj("R", "a:str")), [("c().a", "is missing")]),
    (schema(obj("A", "a:N"), EMPTY, enum("N", "x", "y")), schema(obj("A", "a:N"), EMPTY, enum("N", "x", "z")),
     [("c.a", "also value y"), ("c.a", "no value z")]),
    (schema(EMPTY, obj("R", "a:N"), enum("N", "x")), schema(EMPTY, obj("R", "a:N"), enum("N", "x", "z")), []),
    (schema(STR, EMPTY), schema(obj("A", "a:N"), EMPTY, enum("N", "x")), [("c.a", "string for enum")]),
    (schema(STR, EMPTY), schema(obj("A", "a:T"), EMPTY, {
        "name": "T", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "null"}]}),
     [("c.a", "cannot be null")]),
])
def test_a_difference_is_found_where_it_is(ours: Schema, theirs: Schema, found: list[tuple[str, str]]) -> None:
    assert sorted(differences(ours, theirs)) == [Difference(*each) for each in found]


def cases(*members: str, common: str = "") -> Schema:
    base = obj("A", "t:T", *filter(None, [common]), tag="t", variants=[{"case": "x", "type": "X"}])
    return schema(base, EMPTY, enum("T", "x"), obj("X", *members))


def test_members_of_cases_are_compared_whether_all_cases_have_them_or_one() -> None:
    assert differences(cases("a:str"), cases(common="a:str")) == set()
    assert differences(cases(common="a:str"), cases("a:str")) == set()
    assert differences(cases("a:str"), cases("b:str?")) == {
        Difference("c[x].a", "is an addition, and is required"), Difference("c[x].b", "is missing")}


def test_rows_of_the_page_may_have_wildcards(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| where | what | why |\n| --- | --- | --- |\n| `c[x].*` | no value * | because |\n")
    assert documented(page) == [Row("c[x].*", "no value *", "because")]
    [row] = documented(page)
    assert row.covers(Difference("c[x].a", "no value z"))
    assert not row.covers(Difference("cx.a", "no value z"))
    assert not row.covers(Difference("c[x].a", "is missing"))
