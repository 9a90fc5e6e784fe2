"""A picture as a tree of text, users at the left, storage at the right.

    disk                   export nbd
    └─ vda                 quorum   64 MiB  rw--  r-u-  root
       ├─ left             raw      64 MiB  rw--  r-u-  children.0, data
       │  └─ #block045     file     64 MiB  rw--  r-u-  file, filtered    /srv/left.img
       └─ right            nbd      64 MiB  -w--  r-u-  children.1, data

What several use is shown where it comes first, and named with ``(above)`` where it comes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.text import Text

from blockstep.picture.captions import BROKEN, LEGEND, progress, relation, what
from blockstep.picture.model import Box, Edge, Picture, letters
from blockstep.units import format_size

_HEADER: Final = ("", "", "size", "takes", "shares", "as", "")
_GAP: Final = "  "
_RIGHT: Final = 2  # the column that is aligned to the right

_KIND_STYLES: Final = {"export": "bold green", "user": "bold green", "job": "bold yellow", "node": "bold"}
_TYPE_STYLES: Final = {"replication": "magenta", "quorum": "magenta", "overlay": "blue", "qcow2": "blue"}
_STATE_STYLES: Final = {**dict.fromkeys(("running", "replicating", "ready"), "green"),
                        **dict.fromkeys(BROKEN, "bold red")}

Row = list[Text]


def draw_text(picture: Picture) -> Text:
    """The tree; its ``plain`` is without colours."""
    if not picture.boxes:
        return Text("an empty graph")
    rows = [[Text(word, "dim") for word in _HEADER]]
    seen: set[int] = set()
    for box in picture.roots():
        rows.extend(_tree(picture, box, None, "", "", seen))
    widths = [max(row[column].cell_len for row in rows) for column in range(len(_HEADER))]
    lines = [_line(row, widths) for row in rows]
    if picture.headline:
        lines = [Text(picture.headline, "bold"), Text(), *lines]
    return Text("\n").join([*lines, Text(), Text(LEGEND, "dim")])


def _tree(picture: Picture, box: Box, edge: Edge | None, lead: str, below: str, seen: set[int]) -> Iterator[Row]:
    again = box.id in seen
    seen.add(box.id)
    name = Text(lead) + Text(box.name or "(no name)", _KIND_STYLES[box.kind])
    if again:
        name.append(" (above)", "dim")
    yield [name, *_facts(box, again)[:2], *_relation(edge), _facts(box, again)[2]]
    if again:
        return
    edges = picture.below(box)
    for edge in edges:
        last = edge is edges[-1]
        yield from _tree(picture, picture.by_id[edge.child], edge, below + ("└─ " if last else "├─ "),
                         below + ("   " if last else "│  "), seen)


def _facts(box: Box, again: bool) -> tuple[Text, Text, Text]:
    """Type, size, and everything else."""
    kind = Text(what(box), _TYPE_STYLES.get(box.type, "cyan"))
    if again:
        return kind, Text(), Text()
    words = [Text(text, style) for text, style in (
        (box.state, _STATE_STYLES.get(box.state, "yellow")), (progress(box), ""),
        ("read-only" if box.read_only else "", "yellow"), (box.file, "dim")) if text]
    return kind, Text("" if box.size is None else format_size(box.size)), Text(_GAP).join(words)


def _relation(edge: Edge | None) -> tuple[Text, Text, Text]:
    if edge is None:
        return Text(), Text(), Text()
    takes = Text().join(Text(letter, "yellow" if letter in "ws" else "") for letter in letters(edge.takes))
    return takes, Text(letters(edge.shares)), Text(relation(edge))


def _line(row: Row, widths: list[int]) -> Text:
    line = Text()
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        if not width:
            continue
        blank = " " * (width - cell.cell_len)
        line += Text(_GAP if line.cell_len else "")
        line += Text(blank) + cell if column == _RIGHT else cell + Text(blank)
    line.rstrip()
    return line
