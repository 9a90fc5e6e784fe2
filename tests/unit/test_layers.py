"""Imports point downward only. The table is the architecture; this test holds the code to it.

    cli ──► daemon ──► qmp ──► inventory ──► replication ──► jobs ──► drivers ──► nbd ──► block
               └─► images ──► inventory
    cli ──► shell ──► qmp         cli ──► picture ──► block         cli ──► testing ──► daemon
    everything ──► errors, units, places, streams, keyval, records, forms, aio
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "blockstep"

BASE = {"errors", "units", "places", "streams", "keyval", "records", "forms", "aio"}

#: Part of blockstep -> the parts that it may import, itself aside. Imports inside functions count as well.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "units": {"errors"},
    "places": set(),
    "streams": set(),
    "keyval": {"errors", "units"},
    "records": set(),
    "forms": set(),
    "aio": {"errors", "units", "records"},
    "block": BASE,
    "nbd": BASE | {"block"},
    "jobs": BASE | {"block", "drivers"},
    "drivers": BASE | {"block", "nbd"},
    "replication": BASE | {"block", "drivers", "jobs", "nbd"},
    "inventory": BASE | {"block", "drivers", "jobs", "nbd", "replication"},
    "images": BASE | {"block", "drivers", "jobs", "inventory"},
    "picture": BASE | {"block"},
    "shell": BASE | {"qmp"},
    "qmp": BASE | {"block", "drivers", "jobs", "nbd", "replication", "inventory"},
    "daemon": BASE | {"block", "drivers", "jobs", "nbd", "replication", "inventory", "images", "qmp"},
    "testing": BASE | {"block", "drivers", "jobs", "nbd", "replication", "inventory", "images", "qmp",
                "daemon"},
    "cli": BASE | {"block", "drivers", "jobs", "nbd", "replication", "inventory", "qmp", "daemon", "images", "picture",
            "shell", "testing"},
}

#: The package itself and `python -m blockstep` are the doors: they may show everything.
DOORS = {"__init__", "__main__"}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name below blockstep, file) of every module."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below blockstep) of everything of blockstep that a module imports."""
    package = ["blockstep", *name.split(".")]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{origin}.{alias.name}" for alias in node.names]
        for target in found:
            if target == "blockstep" or target.startswith("blockstep."):
                yield getattr(node, "lineno", 0), target.removeprefix("blockstep").lstrip(".")


@pytest.mark.parametrize(("name", "path"), [pytest.param(name, path, id=name) for name, path in modules()])
def test_imports_point_downward(name: str, path: Path) -> None:
    part = name.split(".")[0]
    if part in DOORS:
        return
    allowed = MAY_IMPORT[part] | {part, "__version__"}
    for line, target in imports(name, path):
        assert target.split(".")[0] in allowed, f"{path}:{line}: {part} must not import blockstep.{target}"


def test_the_table_has_every_part_and_no_other() -> None:
    assert {name.split(".")[0] for name, _ in modules()} - DOORS == MAY_IMPORT.keys()


def test_the_table_has_no_cycle() -> None:
    placed: set[str] = set()
    while lowest := {part for part, below in MAY_IMPORT.items() if part not in placed and below <= placed}:
        placed |= lowest
    assert placed == MAY_IMPORT.keys()


def test_only_the_registry_knows_what_keeps_a_checkpoint() -> None:
    """All others talk to a `DiskBuffer`, so that there can be another one."""
    knowing = {name for name, path in modules() for _, target in imports(name, path)
               if target.startswith("replication.hidden_disk")}
    assert knowing == {"replication.registry"}


def test_the_pure_protocol_files_see_no_socket() -> None:
    """Parsers take bytes and return values: they can be fed by a test, and by a fuzzer."""
    pure = {"constants", "wire", "handshake", "transmission", "replies", "contexts", "uri"}
    for name, path in modules():
        if name.startswith("nbd.") and name.split(".")[1] in pure:
            names = {alias.name for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in ast.walk(ast.parse(path.read_text()))
                      if isinstance(node, ast.ImportFrom)}
            assert not names & {"asyncio", "socket", "ssl", "select"}, path
