"""From QMP's answers to boxes and edges."""

from __future__ import annotations

from typing import Any

from blockstep import drivers as _drivers  # noqa: F401  registers them
from blockstep.picture.assemble import GRAPH, assemble, role_of
from blockstep.picture.model import Box
from tests.unit.picture.support import ANSWERS, READING, edge, node


def test_a_box_says_what_the_other_answers_know_of_it() -> None:
    assert assemble(ANSWERS).boxes == (
        Box(id=1, kind="export", name="disk", type="nbd"),
        Box(id=2, kind="node", name="vda", type="quorum", size=64 << 20),
        Box(id=3, kind="node", name="left", type="file", size=64 << 20, file="/srv/left.img"),
        Box(id=4, kind="node", name="right", type="file", size=64 << 20, file="/srv/right.img", read_only=True),
        Box(id=5, kind="job", name="copy", type="mirror", state="running", current=16 << 20, total=64 << 20),
    )


def test_a_file_is_shown_where_it_is_opened_and_no_options_in_its_place() -> None:
    files = {"raw": "/srv/a", "file": "/srv/a", "overlay": "/srv/b", "null": "json:{}"}
    graph = {"nodes": [{"id": id, "type": "block-driver", "name": name} for id, name in enumerate(files)],
             "edges": [edge(0, 1, "file", READING, READING), edge(2, 0, "backing", READING, READING)]}
    boxes = assemble({GRAPH: graph, "query-named-block-nodes": [
        node(name, name, file=file) for name, file in files.items()]}).boxes
    assert [box.file for box in boxes] == ["", "/srv/a", "/srv/b", ""]


def test_the_graph_alone_is_enough() -> None:
    picture = assemble({GRAPH: ANSWERS[GRAPH]})
    assert [box.name for box in picture.roots()] == ["", "copy"]
    assert picture.by_id[1] == Box(id=1, kind="user", name="")
    assert picture.headline == ""


def test_roles_of_our_drivers_are_known_and_those_of_others_are_left_out() -> None:
    assert role_of("quorum", "children.12") == "data"
    assert role_of("overlay", "backing") == "backing"
    assert role_of("vmdk", "backing") == "backing"
    assert role_of("vmdk", "file") == ""


def test_each_of_two_exports_of_a_node_gets_its_own_box() -> None:
    graph = {"nodes": [{"id": 1, "type": "block-backend", "name": ""}, {"id": 2, "type": "block-backend", "name": ""},
                       {"id": 3, "type": "block-backend", "name": "ide0-hd0"},
                       {"id": 4, "type": "block-driver", "name": "n"}],
             "edges": [edge(id, 4, "root", READING, READING) for id in (1, 2, 3)]}
    exports = [{"id": id, "type": "nbd", "node-name": "n", "shutting-down": id == "b"} for id in "ab"]
    boxes = assemble({GRAPH: graph, "query-block-exports": exports}).boxes
    assert [(box.kind, box.name, box.state) for box in boxes[:3]] == [
        ("export", "a", ""), ("export", "b", "shutting down"), ("user", "ide0-hd0", "")]


def test_our_exports_are_found_by_their_ids() -> None:
    graph = {"nodes": [{"id": 1, "type": "block-driver", "name": "n"},
                       {"id": 2, "type": "block-backend", "name": "export 'b'"},
                       {"id": 3, "type": "block-backend", "name": "view of web"}],
             "edges": [edge(id, 1, "root", READING, READING) for id in (2, 3)]}
    exports = [{"id": id, "type": "nbd", "node-name": "n", "shutting-down": False} for id in "ab"]
    boxes = assemble({GRAPH: graph, "query-block-exports": exports}).boxes
    assert [(box.kind, box.name) for box in boxes[1:]] == [("export", "b"), ("user", "view of web")]


def test_a_pair_gives_a_headline_and_the_states_of_its_disks() -> None:
    pair: dict[str, Any] = {
        "pair": "web", "role": "standby", "state": "lost", "health": "at-risk",
        "checkpoint": {"epoch": 7, "age": 2.0, "pause": 0.001}, "disks": [{"name": "left", "state": "running"}]}
    picture = assemble({**ANSWERS, "query-replication": pair})
    assert picture.headline == "pair web · standby · lost · at risk · checkpoint 7, 2.0 s old"
    assert picture.by_id[3].state == "running"
