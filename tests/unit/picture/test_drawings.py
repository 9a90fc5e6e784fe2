"""DOT and SVG, and the layout that the latter stands on."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from blockstep.picture.assemble import GRAPH, assemble
from blockstep.picture.captions import fill
from blockstep.picture.dot import draw_dot
from blockstep.picture.layout import GAP_X, GAP_Y, lay_out
from blockstep.picture.model import Box, Picture
from blockstep.picture.svg import draw_svg
from tests.unit.picture.support import ANSWERS

SVG = "{http://www.w3.org/2000/svg}"
STRANGE = 'a"<b>&\\n'


def test_dot_has_a_line_for_each_box_and_edge() -> None:
    lines = draw_dot(assemble(ANSWERS)).splitlines()
    assert '  n1 [label="disk\\nexport nbd", fillcolor="#d9f0d3"];' in lines
    assert any(line.startswith('  n2 -> n4 [label="children.1') and "rw--/r---" in line for line in lines)
    assert sum("->" in line for line in lines) == 4


def test_dot_quotes_what_a_file_may_be_called() -> None:
    picture = Picture(boxes=(Box(id=1, kind="node", name=STRANGE),), edges=())
    assert '[label="a\\"<b>&\\\\n"' in draw_dot(picture)


def test_svg_shows_each_box_with_its_text_and_each_edge() -> None:
    root = ElementTree.fromstring(draw_svg(assemble(ANSWERS)))
    texts = {element.text for element in root.iter(f"{SVG}text")}
    assert {"disk", "export nbd", "/srv/right.img", "running  16 MiB of 64 MiB", "source", "----/rwus"} <= texts
    paths = [element.get("class") for element in root.iter(f"{SVG}path")]
    assert paths.count("edge") == 3
    assert paths.count("edge reading") == 1


def test_svg_escapes_and_shortens_what_a_file_may_be_called() -> None:
    name = STRANGE + "/very" * 20
    root = ElementTree.fromstring(draw_svg(Picture(boxes=(Box(id=1, kind="node", name="n", file=name),), edges=())))
    assert name in (root.find(f".//{SVG}title").text or "")  # type: ignore[union-attr]
    shown = [element.text for element in root.iter(f"{SVG}text")]
    assert "…" + name[-31:] in shown


def test_stages_and_what_is_broken_stand_out() -> None:
    states = ("", "running", "failover-failed")
    assert len({fill(Box(id=1, kind="node", name="n", state=state)) for state in states}) == 3
    assert fill(Box(id=1, kind="job", name="j", state="running")) == fill(Box(id=1, kind="job", name="j"))


def test_an_empty_graph_is_a_drawing_too() -> None:
    ElementTree.fromstring(draw_svg(assemble({GRAPH: {"nodes": [], "edges": []}})))


def test_a_box_lies_below_all_that_use_it_and_a_user_right_above_what_it_uses() -> None:
    layout = lay_out(dict.fromkeys(range(5), (50.0, 20.0)), [(0, 1), (1, 2), (0, 2), (2, 3), (4, 3)])
    rows = {id: round(place.y / (20 + GAP_Y)) for id, place in layout.places.items()}
    assert rows == {0: 0, 1: 1, 2: 2, 3: 3, 4: 2}


def test_an_edge_over_a_layer_is_led_around_the_boxes_there() -> None:
    layout = lay_out(dict.fromkeys(range(3), (50.0, 20.0)), [(0, 1), (1, 2), (0, 2)])
    box, route = layout.places[1], layout.routes[2]
    assert all(not box.x <= x <= box.x + box.width for x, y in route[1:-1])


@given(st.integers(1, 12).flatmap(lambda count: st.tuples(
    st.lists(st.tuples(st.integers(10, 200), st.integers(10, 60)), min_size=count, max_size=count),
    st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=20))))
def test_no_two_boxes_overlap_and_all_is_inside(graph: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    sizes, links = graph
    edges = [(min(link), max(link)) for link in links if link[0] != link[1]]
    layout = lay_out({id: (float(w), float(h)) for id, (w, h) in enumerate(sizes)}, edges)
    rows: dict[float, list[int]] = {}
    for id, place in layout.places.items():
        assert place.x >= -0.01
        assert place.x + place.width <= layout.width + 0.01
        assert place.y + place.height <= layout.height + 0.01
        rows.setdefault(place.y, []).append(id)
    for row in rows.values():
        places = sorted((layout.places[id] for id in row), key=lambda place: place.x)
        assert all(a.x + a.width + GAP_X <= b.x + 0.01 for a, b in pairwise(places))
    for (parent, child), route in zip(edges, layout.routes, strict=True):
        assert layout.places[parent].y < layout.places[child].y
        assert [y for _, y in route] == sorted(y for _, y in route)
