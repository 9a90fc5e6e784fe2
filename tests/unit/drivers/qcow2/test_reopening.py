"""Made writable, an image must be the one that was opened: who reads keeps no writer out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockstep.block.graph import Graph
from blockstep.drivers.create import CreateQcow2
from blockstep.errors import OptionError
from blockstep.images.opened import ImageName
from blockstep.images.rebase import rebase
from blockstep.units import MiB
from tests.scenarios import scenario


def image(path: Path, **options: Any) -> None:
    CreateQcow2(filename=str(path), size=MiB, **options).create()


async def opened(graph: Graph, path: Path, **options: Any) -> None:
    file = {"driver": "file", "node-name": "file", "filename": str(path)}
    await graph.open({"driver": "qcow2", "node-name": "disk", "read-only": True, "file": file, **options})


async def made_writable(graph: Graph) -> None:
    await graph.reopen([(graph.find(name), {"read-only": False}) for name in ("file", "disk")])


@scenario
async def test_one_that_has_got_another_backing_image_meanwhile_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name[:1].encode() * MiB)
    image(tmp_path / "disk", backing_file="one", backing_fmt="raw")
    graph = Graph()
    await opened(graph, tmp_path / "disk")
    await rebase(ImageName(str(tmp_path / "disk"), "qcow2"), "two", "raw", unsafe=True)
    with pytest.raises(OptionError, match="changed by others"):
        await made_writable(graph)
    await graph.close(graph.find("disk"))
    await graph.open({"driver": "file", "node-name": "below", "filename": str(tmp_path / "one")})
    await opened(graph, tmp_path / "disk", backing="below")  # then the header's name is of no account
    await rebase(ImageName(str(tmp_path / "disk"), "qcow2"), "one", "raw", unsafe=True)
    await made_writable(graph)
    await graph.close(graph.find("disk"))


@scenario
async def test_one_that_has_got_an_external_data_file_meanwhile_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "disk")
    image(tmp_path / "other", data_file="data")
    graph = Graph()
    await opened(graph, tmp_path / "disk")
    (tmp_path / "disk").write_bytes((tmp_path / "other").read_bytes())  # made anew in its place
    with pytest.raises(OptionError, match="data-file"):
        await made_writable(graph)
    await graph.close(graph.find("disk"))
