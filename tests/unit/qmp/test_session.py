"""One connection without a socket: every state and every wrong request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.qmp.session import Call, Reply, Session, State
from tests.unit.qmp.support import REGISTRY, VERSION


def fresh() -> Session:
    return Session(REGISTRY.commands, VERSION)


def ready(*enable: str) -> Session:
    session = fresh()
    one(session, {"execute": "qmp_capabilities", "arguments": {"enable": list(enable)}})
    assert session.state is State.COMMANDS
    return session


def one(session: Session, request: bytes | dict[str, Any]) -> Call | dict[str, Any]:
    """What comes of one request: a call, or the reply."""
    session.feed((request if isinstance(request, bytes) else json.dumps(request).encode()) + b"\n")
    item = session.next()
    assert item is not None
    assert session.next() is None
    if isinstance(item, Call):
        return item
    answer: dict[str, Any] = json.loads(item.data)
    return answer


def refused(answer: Call | dict[str, Any]) -> str:
    assert isinstance(answer, dict)
    assert set(answer["error"]) == {"class", "desc"}
    return str(answer["error"]["class"])


def test_the_greeting_has_version_and_capabilities() -> None:
    greeting = json.loads(fresh().greeting)
    assert greeting == {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0},
                                            "package": "blockstep test"}, "capabilities": ["oob"]}}


@pytest.mark.parametrize("name", ["query-name", "nonsense", "quit"])
def test_before_the_negotiation_there_is_no_other_command(name: str) -> None:
    answer = one(fresh(), {"execute": name, "id": 1})
    assert refused(answer) == "CommandNotFound"
    assert "qmp_capabilities" in str(answer)


def test_the_negotiation_opens_the_way_for_events() -> None:
    session = fresh()
    session.feed(b'{"execute": "qmp_capabilities", "id": "x"}')
    item = session.next()
    assert isinstance(item, Reply)
    assert item.opens
    assert json.loads(item.data) == {"return": {}, "id": "x"}


@pytest.mark.parametrize("arguments", [{"enable": ["xx"]}, {"enable": "oob"}, {"more": 1}, []])
def test_a_wrong_negotiation_changes_nothing(arguments: object) -> None:
    session = fresh()
    assert refused(one(session, {"execute": "qmp_capabilities", "arguments": arguments})) == "GenericError"
    assert session.state is State.NEGOTIATING


def test_the_negotiation_happens_once() -> None:
    assert refused(one(ready(), {"execute": "qmp_capabilities", "id": 3})) == "CommandNotFound"


@pytest.mark.parametrize(("request_", "error_class"), [
    (b"{}", "GenericError"), (b"5", "GenericError"), (b"[]", "GenericError"), (b'"abc"', "GenericError"),
    (b"}", "GenericError"), (b"{]", "GenericError"), (b'{"execute" 5}', "GenericError"),
    (b'{"execute": "query-name",}', "GenericError"), (b"nope", "GenericError"),
    (b'{"execute": "query-name", "id": "\xc3("}', "GenericError"),
    (b'{"execute": "query-name", "id": "\\ud800"}', "GenericError"),
    (b'{"execute": 5, "id": 1}', "GenericError"),
    (b'{"id": 1}', "GenericError"),
    (b'{"execute": "query-name", "arguments": 5, "id": 1}', "GenericError"),
    (b'{"execute": "query-name", "arguments": null, "id": 1}', "GenericError"),
    (b'{"execute": "query-name", "arguments": {"x": 1}, "id": 1}', "GenericError"),
    (b'{"execute": "query-name", "control": {}, "id": 1}', "GenericError"),
    (b'{"execute": "query-name", "exec-oob": "open", "id": 1}', "GenericError"),
    (b'{"exec-oob": "open", "id": 1}', "GenericError"),
    (b'{"execute": "nonsense", "id": 1}', "CommandNotFound"),
    (b'{"execute": "echo", "id": 1}', "GenericError"),
])
def test_a_wrong_request_gets_one_error_with_its_id(request_: bytes, error_class: str) -> None:
    answer = one(ready(), request_)
    assert refused(answer) == error_class
    assert isinstance(answer, dict)
    assert answer.get("id") == (1 if b'"id": 1' in request_ else None)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(st.characters(codec="utf-8")),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner)))
def test_any_id_is_echoed(identity: Any) -> None:
    call = one(ready(), {"execute": "query-name", "id": identity})
    assert isinstance(call, Call)
    assert json.loads(call.succeeded(None)) == {"return": {}, "id": identity}
    assert json.loads(call.failed(OSError(5, "x")))["id"] == identity


def test_without_an_id_there_is_none_in_the_answer() -> None:
    call = one(ready(), {"execute": "query-name"})
    assert isinstance(call, Call)
    assert call.succeeded(None) == b'{"return":{}}\r\n'


def test_single_quotes_are_taken_as_qemu_takes_them() -> None:
    call = one(ready(), b"{'execute': 'echo', 'arguments': {'node-name': 'it\\'s'}}")
    assert isinstance(call, Call)
    assert call.args.node_name == "it's"


def test_out_of_band_needs_the_capability_and_a_command_that_can() -> None:
    session = ready("oob")
    call = one(session, {"exec-oob": "open", "id": 1})
    assert isinstance(call, Call)
    assert call.oob
    assert refused(one(session, {"exec-oob": "echo", "id": 1})) == "GenericError"
    assert refused(one(session, {"exec-oob": "nonsense", "id": 1})) == "CommandNotFound"
    ordinary = one(session, {"execute": "open"})
    assert isinstance(ordinary, Call)
    assert not ordinary.oob


@given(st.binary(max_size=300) | st.text().map(str.encode))
def test_whatever_comes_the_session_answers_and_goes_on(garbage: bytes) -> None:
    session = ready()
    session.feed(garbage)
    while (item := session.next()) is not None:
        if isinstance(item, Reply):
            assert set(json.loads(item.data)) <= {"error", "id"}
    session.feed(b'\n\xff{"execute": "query-name"}')
    last = None
    while (item := session.next()) is not None:
        last = item
    assert isinstance(last, Call)
