"""The tree of text, to the letter: it is made to be looked at."""

from __future__ import annotations

from blockstep import drivers as _drivers  # noqa: F401  registers them
from blockstep.picture.assemble import GRAPH, assemble
from blockstep.picture.model import Box, Picture, letters
from blockstep.picture.text import draw_text
from tests.unit.picture.support import ANSWERS, READING, edge

TREE = """\
                                size  takes  shares  as
disk              export nbd
└─ vda            quorum      64 MiB  rw--   rwus    root
   ├─ left        file        64 MiB  rw--   r---    children.0, data  /srv/left.img
   └─ right       file        64 MiB  rw--   r---    children.1, data  read-only  /srv/right.img
copy              job mirror                                           running  16 MiB of 64 MiB
└─ right (above)  file                ----   rwus    source

takes, shares: r consistent-read, w write, u write-unchanged, s resize"""


def test_users_stand_left_of_what_they_use_and_what_is_shared_is_shown_once() -> None:
    assert draw_text(assemble(ANSWERS)).plain == TREE


def test_the_headline_comes_first() -> None:
    picture = Picture(boxes=(Box(id=1, kind="node", name="n", type="null"),), edges=(), headline="pair web")
    assert draw_text(picture).plain.splitlines()[:2] == ["pair web", ""]


def test_a_program_without_nodes_has_an_empty_graph() -> None:
    assert draw_text(assemble({GRAPH: {"nodes": [], "edges": []}})).plain == "an empty graph"


def test_a_backing_file_comes_after_the_others_and_ten_after_nine() -> None:
    boxes = tuple(Box(id=number, kind="node", name=f"n{number}") for number in range(5))
    names = ["", "backing", "children.10", "file", "children.9"]
    picture = assemble({GRAPH: {
        "nodes": [{"id": box.id, "type": "block-driver", "name": box.name} for box in boxes],
        "edges": [edge(0, number, names[number], READING, READING) for number in range(1, 5)]}})
    assert [one.name for one in picture.below(picture.by_id[0])] == ["children.9", "children.10", "file", "backing"]


def test_permissions_keep_their_columns() -> None:
    assert letters(frozenset({"resize", "consistent-read"})) == "r--s"
    assert letters(frozenset()) == "----"


def test_kinds_and_states_are_told_apart_by_colour() -> None:
    drawing = draw_text(assemble(ANSWERS))
    styles = {drawing.plain[span.start:span.end].strip(): str(span.style) for span in drawing.spans}
    assert styles["disk"] == "bold green"
    assert styles["copy"] == "bold yellow"
    assert styles["running"] == "green"
