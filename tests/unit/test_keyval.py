"""Options as people write them: what they mean, and what is said about those that mean nothing."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.errors import OptionError
from blockstep.keyval import fit, parse, read


class Inet(msgspec.Struct, tag_field="type", tag="inet", forbid_unknown_fields=True):
    host: str
    port: int | str


class Unix(msgspec.Struct, tag_field="type", tag="unix", forbid_unknown_fields=True):
    path: str


class Options(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    name: str = ""
    addr: Inet | Unix | None = None
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    delay: float = 0.0
    read_only: bool = False
    mode: Literal["ignore", "unmap"] = "ignore"
    tags: list[str] = []
    child: str | dict[str, Any] | None = None
    sizes: list[int] = []


class Required(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    node_name: str


@pytest.mark.parametrize(("text", "expected"), [
    ("", {}),
    ("a=1", {"a": "1"}),
    ("a=1,b=2", {"a": "1", "b": "2"}),
    ("a=1,a=2", {"a": "2"}),
    ("a=1,", {"a": "1"}),
    ("a=", {"a": ""}),
    ("a==b=c", {"a": "=b=c"}),
    ("path=/a,,b,x=1", {"path": "/a,b", "x": "1"}),
    ("path=,,,x=1", {"path": ",", "x": "1"}),
    ("path=a,,", {"path": "a,"}),
    ("file,x=1", {"driver": "file", "x": "1"}),
    ("a.b=1,a.c.d=2", {"a": {"b": "1", "c": {"d": "2"}}}),
    ("l.1=b,l.0=a", {"l": ["a", "b"]}),
    ("l.0.driver=x,l.0.size=1,l.1=n", {"l": [{"driver": "x", "size": "1"}, "n"]}),
    ("a.0.0=x", {"a": [["x"]]}),
    ("a_b=1,x-y=2", {"a_b": "1", "x-y": "2"}),
    ('{"a": 1, "b": {"c": [true]}}', {"a": 1, "b": {"c": [True]}}),
    ('json:{"a": 1}', {"a": 1}),
])
def test_what_words_say(text: str, expected: dict[str, Any]) -> None:
    assert parse(text, "--blockdev", "driver") == expected


@pytest.mark.parametrize(("text", "names"), [
    ("a=1,b", "--x: 'b' is not valid"),
    (",", "--x: ''"),
    ("=1", "--x: ''"),
    (".a=1", "--x: '.a'"),
    ("a.=1", "--x: 'a.'"),
    ("a..b=1", "--x: 'a..b'"),
    ("1=1", "--x: '1'"),
    ("a b=1", "--x: 'a b'"),
    ("a=1,a.b=2", "--x: a: '1' is not valid; it should be given in one way: it is in 'a.b' too"),
    ("a.b=2,a=1", "--x: a: '1' is not valid; it should be given in one way: there is 'a.b' too"),
    ("a.b=1,a.b.c.d=2", "--x: a.b:"),
    ("l.0=a,l.2=b", "--x: l.1 "),
    ("l.1=a", "--x: l.0 "),
    ("l.0=a,l.x=b", "--x: l.x: 'b'"),
    ("l.00=a,l.0=b", "--x: l.1 "),
    ('{"a":', "--x: "),
    ("{}x", "--x: "),
    ("json:[]", "--x: "),
    ('{"a": 1}, {}', "--x: "),
    ("{" * 100_000, "--x: "),
])
def test_what_says_nothing_is_shown(text: str, names: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text, "--x")
    assert str(caught.value).startswith(names)


def test_switches_may_stand_alone() -> None:
    assert parse("socket,path=p,server,nowait", "--chardev", "backend", ("server", "wait")) == {
        "backend": "socket", "path": "p", "server": "on", "wait": "off"}
    with pytest.raises(OptionError, match="'nonsense'"):
        parse("socket,nonsense", "--chardev", "backend", ("server", "wait"))


_KEYS = st.text("abcz", min_size=1, max_size=3)
_TREES: st.SearchStrategy[Any] = st.recursive(
    st.text(), lambda inner: st.dictionaries(_KEYS, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1,
                                                                                             max_size=3), max_leaves=8)


def _written(value: Any, path: str = "") -> list[str]:
    if isinstance(value, str):
        return [f"{path}={value.replace(',', ',,')}"]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [word for key, item in items for word in _written(item, f"{path}.{key}".lstrip("."))]


@given(st.dictionaries(_KEYS, _TREES, min_size=1))
def test_every_tree_of_words_can_be_written(tree: dict[str, Any]) -> None:
    assert parse(",".join(_written(tree)), "--x") == tree


@given(st.text())
def test_any_text_is_understood_or_refused_in_good_order(text: str) -> None:
    with contextlib.suppress(OptionError):
        read(text, Options, "--x", "name")


@pytest.mark.parametrize(("text", "expected"), [
    ("disk", Options(name="disk")),
    ("name=1", Options(name="1")),
    ("addr.type=inet,addr.host=h,addr.port=10", Options(addr=Inet("h", "10"))),
    ("addr.type=unix,addr.path=/p", Options(addr=Unix("/p"))),
    ("size=010", Options(size=10)),
    ("size=0x10", Options(size=16)),
    ("size=64k", Options(size=65536)),
    ("delay=1.5", Options(delay=1.5)),
    ("delay=1", Options(delay=1.0)),
    ("read-only=on", Options(read_only=True)),
    ("read-only=true,read-only=off", Options()),
    ("mode=unmap", Options(mode="unmap")),
    ("tags.0=1,tags.1=on", Options(tags=["1", "on"])),
    ("sizes.0=1,sizes.1=1k", Options(sizes=[1, 1024])),
    ("child=node", Options(child="node")),
    ("child.driver=file,child.size=1", Options(child={"driver": "file", "size": "1"})),
    ('{"size": 1, "read-only": true, "addr": {"type": "inet", "host": "h", "port": 1}}',
     Options(size=1, read_only=True, addr=Inet("h", 1))),
    ('{"delay": 2}', Options(delay=2.0)),
])
def test_words_get_the_types_that_are_wanted(text: str, expected: Options) -> None:
    assert read(text, Options, "--x", "name") == expected


@pytest.mark.parametrize(("text", "said"), [
    ("read-only=maybe", "--x: read-only: 'maybe' is not valid; it should be on or off"),
    ("read-only=1", "on or off"),
    ("size=much", "--x: size: 'much' is not valid; it should be an integer"),
    ("size=-1", "--x: size: '-1' is not valid; it should be an integer >= 0"),
    ("size=1.5", "an integer"),
    ("delay=soon", "a number"),
    ("mode=map", "--x: mode: 'map' is not valid; it should be ignore or unmap"),
    ("addr.type=tcp", "--x: addr.type: 'tcp' is not valid; it should be one of inet, unix"),
    ("addr.path=/p", "--x: addr.type: None is not valid; it should be one of inet, unix"),
    ("addr.type=inet,addr.port=1", "--x: addr.host should be given: a string"),
    ("addr.type=unix,addr.path=p,addr.host=h", "--x: addr.host: 'h' is not valid; it should be left out; there is"),
    ("addr=/p", "--x: addr: '/p' is not valid; it should be given as .type, .host, .port"),
    ("readonly=on", "--x: readonly: 'on' is not valid; it should be left out; there is 'read-only'"),
    ("q=on", "there is addr, child, delay, mode, name, read-only, size, sizes, tags"),
    ("tags=a", "--x: tags: 'a' is not valid; it should be a list (.0, .1, ...)"),
    ("name.x=a", "--x: name: {'x': 'a'} is not valid; it should be a string"),
    ("sizes.0=1,sizes.1=b", "--x: sizes.1: 'b' is not valid; it should be an integer"),
    ('{"name": "a\\u0000"}', "--x: name: 'a\\x00' is not valid; it should be without NUL"),
    ("size=9223372036854775808", "--x: size: 9223372036854775808 is not valid; it should be from -9223372036854775808"),
    ('{"sizes": [-9223372036854775809]}', "--x: sizes.0: -9223372036854775809 is not valid; it should be from -92233"),
    ('{"size": "1"}', "--x: size: '1' is not valid; it should be an integer"),
    ('{"size": true}', "--x: size: True is not valid; it should be an integer"),
    ('{"read-only": "on"}', "--x: read-only: 'on' is not valid; it should be true or false"),
    ('{"name": 1}', "--x: name: 1 is not valid; it should be a string"),
    ('{"tags": [1]}', "--x: tags.0: 1 is not valid; it should be a string"),
    ('{"addr": []}', "--x: addr: [] is not valid"),
])
def test_a_wrong_value_is_named_with_what_would_be_right(text: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(text, Options, "--x", "name")
    assert said in str(caught.value)


def test_what_is_required_is_named() -> None:
    with pytest.raises(OptionError, match="--x: node-name should be given: a string"):
        read("", Required, "--x")


def test_a_union_of_structs_is_told_apart_by_its_tag() -> None:
    kind: Any = Inet | Unix
    assert fit({"type": "unix", "path": "p"}, kind, "--x", words=True) == Unix("p")
    with pytest.raises(OptionError, match="--x: type: None"):
        fit({"path": "p"}, kind, "--x", words=True)
