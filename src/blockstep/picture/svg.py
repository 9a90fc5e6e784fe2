"""A picture as an SVG drawing that stands alone: no scripts, no fonts from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Final

from blockstep.picture.captions import LEGEND, captions, fill, relation
from blockstep.picture.layout import Point, Rect, lay_out
from blockstep.picture.model import Box, Edge, Picture, letters

_LETTER: Final = 7.3  # pixels that a character of the font is wide
_LINE: Final = 16.0
_LABEL: Final = 84.0
_MARGIN: Final = 16.0
#: Longer file names keep their end; the whole is in the box's tooltip.
_LONGEST: Final = 32

_HEAD: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" \
width="{width:.0f}" height="{height:.0f}">
<style>
text {{ font: 12px monospace; text-anchor: middle; fill: #222 }}
.name {{ font-weight: bold }}
.edge {{ fill: none; stroke: #667; stroke-width: 1.2; marker-end: url(#tip) }}
.reading {{ stroke-dasharray: 5 3 }}
.label {{ font-size: 10px; fill: #445; paint-order: stroke; stroke: #fff; stroke-width: 3px }}
.side {{ text-anchor: start }}
rect {{ stroke: #889 }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">\
<path d="M0 0 8 4 0 8z" fill="#667"/></marker></defs>
<rect width="100%" height="100%" fill="#fff" stroke="none"/>"""


def draw_svg(picture: Picture) -> str:
    """The drawing, users at the top. An edge that does not take write is dashed."""
    lines = {box.id: [_short(line) for line in captions(box)] for box in picture.boxes}
    pairs = [(edge.parent, edge.child) for edge in picture.edges]
    layout = lay_out({id: _size(id, text, pairs) for id, text in lines.items()}, pairs)
    top = _MARGIN + (_LINE * 2 if picture.headline else 0.0)
    width = max(layout.width, len(picture.headline) * _LETTER, len(LEGEND) * _LETTER) + 2 * _MARGIN
    height = top + layout.height + _LINE * 2 + _MARGIN
    parts = [_HEAD.format(width=width, height=height)]
    if picture.headline:
        parts.append(_text(_MARGIN, _MARGIN + 12, picture.headline, "side name"))
    parts.append(f'<g transform="translate({(width - layout.width) / 2:.1f} {top:.1f})">')
    for edge, route in zip(picture.edges, layout.routes, strict=True):
        parts.extend(_edge(edge, route))
    for box in picture.boxes:
        parts.extend(_box(box, layout.places[box.id], lines[box.id]))
    parts += ["</g>", _text(_MARGIN, height - _MARGIN, LEGEND, "side label"), "</svg>"]
    return "\n".join(parts)


def _size(id: int, lines: list[str], edges: list[tuple[int, int]]) -> tuple[float, float]:
    """Wide enough for the text, and for the labels of all edges side by side."""
    abreast = max(sum(parent == id for parent, _ in edges), sum(child == id for _, child in edges))
    return max(max(map(len, lines)) * _LETTER + 20, abreast * _LABEL), len(lines) * _LINE + 12


def _box(box: Box, place: Rect, lines: list[str]) -> Iterator[str]:
    yield f"<g><title>{escape(chr(10).join(captions(box)))}</title>"
    yield (f'<rect x="{place.x:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" height="{place.height:.1f}" rx="5" '
           f'fill="{fill(box)}"/>')
    for number, line in enumerate(lines):
        yield _text(place.x + place.width / 2, place.y + 18 + number * _LINE, line, "" if number else "name")
    yield "</g>"


def _edge(edge: Edge, route: list[Point]) -> Iterator[str]:
    (x, y), *rest = route
    path = f"M{x:.1f} {y:.1f}"
    for to_x, to_y in rest:
        middle = (y + to_y) / 2
        path += f" C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    yield f'<path class="edge{"" if "write" in edge.takes else " reading"}" d="{path}"/>'
    (from_x, from_y), (to_x, to_y) = route[0], route[1]
    x, y = (from_x + to_x) / 2, (from_y + to_y) / 2
    yield _text(x, y - 2, relation(edge), "label")
    yield _text(x, y + 10, f"{letters(edge.takes)}/{letters(edge.shares)}", "label")


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"' + (f' class="{kind}"' if kind else "") + f">{escape(text)}</text>"


def _short(line: str) -> str:
    return line if len(line) <= _LONGEST else "…" + line[1 - _LONGEST:]
