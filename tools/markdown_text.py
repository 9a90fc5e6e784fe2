"""Text of declarations as Markdown."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence

GENERATED = "<!-- Written by tools/reference; change the declarations instead. -->\n"


def paragraphs(doc: str) -> str:
    """A docstring, wrapped anew, with lists as they are and without pictures."""
    parts = [part for part in inspect.cleandoc(doc).replace("``", "`").split("\n\n") if not part.startswith(" ")]
    return "\n\n".join(part if part.startswith("- ") else textwrap.fill(part, 118, break_on_hyphens=False)
                       for part in parts) + "\n"


def cell(text: str) -> str:
    """What may stand in a table: one line; a single sentence has no full stop."""
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return text.removesuffix(".") if text.count(". ") == 0 else text


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table, without a last column that says nothing."""
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
