"""Exports, yank, run state and replication: the same commands get the same answers from QEMU and from us.

Each line is sent to both, in the same state. Compared are the class of the error, or the whole result; events by
name and data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockstep.testing.processes import QMP
from tests.programs import BLOCKSTEP, QEMU, Program

pytestmark = pytest.mark.interop

UNIX = {"type": "unix", "data": {"path": "$D/nbd"}}


def export(id: str, node: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "block-export-add", {"type": "nbd", "id": id, "node-name": node, **more}


def null(name: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "blockdev-add", {"driver": "null-co", "node-name": name, "size": 1 << 20, **more}


Line = tuple[str, dict[str, Any]]
EVENTS = ("BLOCK_EXPORT_DELETED", "STOP", "RESUME")

SERVER: list[Line] = [
    ("nbd-server-stop", {}),
    ("nbd-server-add", {"device": "a"}),
    export("e", "a"),
    ("query-block-exports", {}),
    ("nbd-server-remove", {"name": "a"}),
    ("block-export-del", {"id": "a"}),
    ("nbd-server-start", {}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/nonexistent/x"}}}),
    ("nbd-server-start", {"addr": {"type": "unix", "path": "x"}}),
    ("nbd-server-start", {"addr": {"type": "none", "data": {}}}),
    ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "nbd!"}}}),
    ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1"}}}),
    ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "192.0.2.1", "port": "0"}}}),
    ("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "nobody"}}}),
    ("nbd-server-start", {"addr": UNIX, "tls-creds": "nobody"}),
    ("nbd-server-start", {"addr": UNIX, "max-connections": -1}),
    ("nbd-server-start", {"addr": UNIX, "what": 1}),
    null("a"),
    export("e", "a"),
    ("nbd-server-start", {"addr": UNIX}),
    ("nbd-server-start", {"addr": UNIX}),
    ("query-block-exports", {}),
]

EXPORTS: list[Line] = [
    ("nbd-server-start", {"addr": UNIX, "max-connections": 5}),
    null("a"), null("frozen", **{"read-only": True}),
    export("e", "nobody"),
    export("e", "a"),
    export("e", "a", name="another"),
    export("f", "a"),
    export("f", "a", name="f", writable=True, writethrough=True, description="text"),
    export("g", "a", name="x" * 5000),
    export("g", "a", name="g", description="x" * 5000),
    export("1g", "a", name="g"),
    export("", "a", name="g"),
    export("g", "frozen", writable=True),
    export("g", "frozen"),
    export("h", "a", name="h", bitmaps=["nobody"]),
    export("h", "a", name="h", bitmaps=[{"node": "a", "name": "nobody"}]),
    export("h", "a", name="h", bitmaps="a"),
    export("h", "a", name="h", what=1),
    export("h", "a", name="h", **{"allocation-depth": True}),
    ("block-export-add", {"type": "nbd", "node-name": "a"}),
    ("block-export-add", {"id": "i", "node-name": "a"}),
    ("block-export-add", {"type": "none", "id": "i", "node-name": "a"}),
    ("query-block-exports", {}),
    ("blockdev-del", {"node-name": "a"}),
    ("nbd-server-add", {"device": "a"}),
    ("nbd-server-add", {"device": "nobody"}),
    ("nbd-server-add", {"device": "a", "name": "older", "bitmap": "nobody"}),
    ("nbd-server-add", {"device": "frozen", "name": "older", "writable": True, "description": "text"}),
    ("nbd-server-add", {"device": "a", "name": "not/an/id"}),
    ("nbd-server-add", {"device": "a", "name": "older"}),
    ("query-block-exports", {}),
    ("block-export-del", {"id": "nobody"}),
    ("block-export-del", {"id": "e", "mode": "soft"}),
    ("block-export-del", {"id": "e"}),
    ("block-export-del", {"id": "e"}),
    ("nbd-server-remove", {"name": "nobody"}),
    ("nbd-server-remove", {"name": "older", "mode": "hard"}),
    ("nbd-server-remove", {"name": "f", "mode": "safe"}),
    ("query-block-exports", {}),
    ("nbd-server-stop", {}),
    ("query-block-exports", {}),
    ("blockdev-del", {"node-name": "a"}),
]

YANK: list[Line] = [
    null("a"),
    ("yank", {"instances": []}),
    ("yank", {}),
    ("yank", {"instances": [{"type": "block-node", "node-name": "a"}]}),
    ("yank", {"instances": [{"type": "block-node", "node-name": "nobody"}]}),
    ("yank", {"instances": [{"type": "block-node"}]}),
    ("yank", {"instances": [{"type": "chardev", "id": "nobody"}]}),
    ("yank", {"instances": [{"type": "migration"}]}),
    ("yank", {"instances": [{"type": "none"}]}),
    ("query-yank", {"what": 1}),
]

RUN_STATE: list[Line] = [
    ("query-status", {}),
    ("cont", {}),
    ("stop", {}),
    ("query-status", {}),
    ("stop", {}),
    ("stop", {"what": 1}),
    ("cont", {"what": 1}),
    ("cont", {}),
    ("query-status", {}),
]

REPLICATION: list[Line] = [
    ("query-colo-status", {}),
    ("query-xen-replication-status", {}),
    ("x-colo-lost-heartbeat", {}),
    ("xen-colo-do-checkpoint", {}),
    ("xen-set-replication", {"enable": True, "primary": True}),
    ("xen-set-replication", {"enable": True}),
    ("xen-set-replication", {"primary": True}),
    ("xen-set-replication", {"enable": True, "primary": True, "failover": True}),
    ("xen-set-replication", {"enable": False, "primary": True}),
    ("xen-set-replication", {"enable": False, "primary": True, "failover": True}),
    null("n"),
    ("blockdev-add", {"driver": "replication", "mode": "primary", "node-name": "r", "file": "n"}),
    ("xen-colo-do-checkpoint", {}),
    ("xen-set-replication", {"enable": True, "primary": False}),
    ("xen-set-replication", {"enable": False, "primary": True}),
    ("xen-set-replication", {"enable": True, "primary": True}),
    ("query-xen-replication-status", {}),
    ("xen-colo-do-checkpoint", {}),
    ("xen-set-replication", {"enable": True, "primary": True}),
    ("xen-set-replication", {"enable": False, "primary": True}),
    ("xen-colo-do-checkpoint", {}),
    ("xen-set-replication", {"enable": True, "primary": True}),
    ("blockdev-del", {"node-name": "r"}),
    ("query-xen-replication-status", {}),
]


def answers(program: Program, directory: Path, lines: list[Line]) -> tuple[list[Any], list[Any]]:
    """Each command with its result or the class of its error; and the events of all of them, in their order."""
    directory.mkdir()
    with program.started(directory, "program") as (qmp, _):
        qmp.execute("cont")  # QEMU begins before its launch
        qmp.execute("query-version")
        qmp.events.clear()
        results = [(command, arguments, _answer(qmp, command, _here(arguments, directory)))
                   for command, arguments in lines]
        qmp.execute("query-version")  # what has been sent by now has come when this is answered
        return results, [(event["event"], event.get("data")) for event in qmp.events if event["event"] in EVENTS]


def _answer(qmp: QMP, command: str, arguments: dict[str, Any]) -> Any:
    try:
        return qmp.execute(command, **arguments)
    except RuntimeError as error:
        return str(error).split(": ")[1]


def _here(value: Any, directory: Path) -> Any:
    if isinstance(value, dict):
        return {name: _here(each, directory) for name, each in value.items()}
    return value.replace("$D", str(directory)) if isinstance(value, str) else value


@pytest.mark.parametrize("lines", [SERVER, EXPORTS, YANK, RUN_STATE, REPLICATION],
                         ids=["server", "exports", "yank", "run-state", "replication"])
def test_the_answers_are_qemus(tmp_path: Path, lines: list[Line]) -> None:
    ours, qemus = (answers(program, tmp_path / program.name, lines) for program in (BLOCKSTEP, QEMU))
    assert ours == qemus
