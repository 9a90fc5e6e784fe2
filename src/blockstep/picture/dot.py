"""A picture in DOT, graphviz's language."""

from __future__ import annotations

from blockstep.picture.captions import captions, fill, relation
from blockstep.picture.model import Picture, letters


def draw_dot(picture: Picture) -> str:
    """The source of a directed graph, users at the top."""
    lines = ["digraph blockstep {", "  node [shape=box, style=\"rounded,filled\", fontname=monospace, fontsize=10];",
             "  edge [fontname=monospace, fontsize=9];"]
    if picture.headline:
        lines.append(f"  label={_quoted(picture.headline)};")
    for box in picture.boxes:
        label = _quoted("\n".join(captions(box)))
        lines.append(f"  n{box.id} [label={label}, fillcolor=\"{fill(box)}\"];")
    for edge in picture.edges:
        label = _quoted(f"{relation(edge)}\n{letters(edge.takes)}/{letters(edge.shares)}")
        lines.append(f"  n{edge.parent} -> n{edge.child} [label={label}];")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
