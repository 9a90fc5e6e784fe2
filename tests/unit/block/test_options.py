"""What options mean: words of a command line, what children take over, what QEMU has and we do not."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from blockstep import drivers  # noqa: F401  registers them
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.registry import parse_options
from blockstep.drivers.file import File
from blockstep.errors import OptionError
from tests.scenarios import scenario

MiB = 1 << 20


def understood(**options: Any) -> Any:
    return parse_options({name.replace("_", "-"): value for name, value in options.items()}, strict=False)[1]


def test_a_command_line_says_on_and_off_and_sizes_with_suffixes() -> None:
    options = understood(driver="raw", file="disk", read_only="on", offset="64k", cache={"direct": "off"})
    assert (options.read_only, options.offset, options.cache.direct) == (True, 65536, False)
    assert understood(driver="throttle", file="disk", limits={"bps-total": "1M"}).limits.bps_total == MiB
    assert understood(driver="nbd", server={"type": "inet", "host": "h", "port": "9", "ipv4": "yes"}).server.ipv4


def test_a_word_that_may_be_text_stays_as_it_is() -> None:
    assert understood(driver="file", filename="on").filename == "on"


def test_json_says_true_and_not_on() -> None:
    with pytest.raises(OptionError, match="read-only"):
        parse_options({"driver": "file", "filename": "x", "read-only": "on"})


def test_a_driver_that_only_qemu_has_is_refused_with_what_there_is_instead() -> None:
    with pytest.raises(OptionError, match="mirror job"):
        parse_options({"driver": "copy-on-read", "file": "disk"})


@pytest.mark.parametrize(("options", "child"), [
    ({"driver": "raw", "file": {}}, "file"), ({"driver": "throttle", "file": {}, "limits": {}}, "file"),
    ({"driver": "blklog", "file": "disk", "log": {}}, "log"), ({"driver": "overlay", "size": 512, "backing": {}},
                                                               "backing"),
    ({"driver": "quorum", "vote-threshold": 1, "children": [{}]}, "children.0")])
@scenario
async def test_a_child_without_options_is_no_child(options: dict[str, Any], child: str) -> None:
    graph = Graph()
    await graph.open({"driver": "null", "node-name": "disk"})
    with pytest.raises(OptionError, match=rf"^{child}\.driver should be given"):
        await graph.open(options)
    assert list(graph.nodes) == ["disk"]


@pytest.mark.parametrize("driver", [None, 1, [], {"driver": "file"}])
def test_a_driver_has_a_name(driver: Any) -> None:
    with pytest.raises(OptionError, match="the name of one: blkdebug"):
        parse_options({"driver": driver})


def test_an_overlay_finds_its_image_as_qemu_writes_it() -> None:
    options = understood(driver="overlay", file={"driver": "file", "filename": "/image"}, backing="disk")
    assert options.filename == "/image"


@pytest.mark.parametrize("file", [{"filename": "x", "locking": "off"}, {"driver": "memory", "filename": "x"}, {}])
def test_an_overlay_takes_nothing_else_for_its_image(file: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="image's place"):
        parse_options({"driver": "overlay", "file": file})


@pytest.mark.parametrize("server", [
    {"type": "inet", "host": "h", "port": "1", "mptcp": True},
    {"type": "inet", "host": "h", "port": "1", "ipv6": False},
    {"type": "unix", "path": "p", "abstract": True, "tight": False},
    {"type": "vsock", "cid": "1", "port": "1"},
])
@scenario
async def test_what_an_nbd_server_cannot_be_is_refused(server: dict[str, Any]) -> None:
    graph = Graph()
    with pytest.raises(OptionError, match=r"server"):
        await graph.open({"driver": "nbd", "server": server})
    assert not graph.nodes


# --- what children take over ---


@scenario
async def test_a_child_given_as_options_takes_over_what_its_parent_says(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MiB))
    graph = Graph()
    raw = await graph.open({"driver": "raw", "discard": "unmap", "cache": {"no-flush": True}, "auto-read-only": True,
                            "file": {"driver": "file", "filename": str(tmp_path / "disk")}})
    child = raw.children["file"].node.options
    assert (child.discard, child.cache.no_flush, child.auto_read_only) == ("unmap", True, True)
    await graph.close(raw)


@scenario
async def test_what_a_child_says_itself_holds(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MiB))
    graph = Graph()
    raw = await graph.open({"driver": "raw", "discard": "unmap", "cache": {"no-flush": True},
                            "file": {"driver": "file", "filename": str(tmp_path / "disk"), "discard": "ignore",
                                     "cache": {"direct": False}}})
    child = raw.children["file"].node.options
    assert (child.discard, child.cache.direct, child.cache.no_flush) == ("ignore", False, True)
    await graph.close(raw)


# --- read-only where nobody may write ---


class Unwritable(File):
    """A file that may only be read, whoever asks (root may do anything)."""

    async def open(self) -> None:
        if not self.read_only:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), self.options.filename)
        await super().open()


async def open_unwritable(graph: Graph, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Driver:
    path.write_bytes(bytes(MiB))
    monkeypatch.setitem(__import__("blockstep.block.registry", fromlist=["_drivers"])._drivers, "file", Unwritable)
    return await graph.open({"driver": "file", "node-name": "disk", "filename": str(path), **options})


@scenario
async def test_auto_read_only_opens_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    node = await open_unwritable(graph, tmp_path / "disk", monkeypatch, **{"auto-read-only": True})
    assert node.read_only
    await graph.close(node)


@scenario
async def test_without_it_that_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    with pytest.raises(OSError, match="Permission denied"):
        await open_unwritable(graph, tmp_path / "disk", monkeypatch)
    assert not graph.nodes


@scenario
async def test_force_share_is_for_readers() -> None:
    graph = Graph()
    with pytest.raises(OptionError, match="force-share"):
        await graph.open({"driver": "null", "force-share": True})
    node = await graph.open({"driver": "null", "force-share": True, "read-only": True})
    await graph.close(node)


# --- QEMU's names of our drivers ---


@scenario
async def test_null_by_qemus_names() -> None:
    graph = Graph()
    for name in ("null-co", "null-aio"):
        node = await graph.open({"driver": name, "size": 4096, "latency-ns": 1, "read-zeroes": True})
        assert node.driver == name
        assert bytes(await node.pread(0, 4096)) == bytes(4096)
        await node.pwrite(0, b"x")
        await node.flush()
        await graph.close(node)


@scenario
async def test_a_host_device_is_a_block_device(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MiB))
    graph = Graph()
    with pytest.raises(OptionError, match="block device"):
        await graph.open({"driver": "host_device", "filename": str(tmp_path / "disk")})
    assert not graph.nodes
