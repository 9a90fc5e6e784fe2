"""New options for open nodes: all sets or none, defaults for what is left out, children by name."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from blockstep import drivers  # noqa: F401  registers them
from blockstep.block.driver import Driver
from blockstep.block.graph import Graph
from blockstep.block.permissions import READ, WRITE
from blockstep.block.reopen import reopen
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.create import CreateQcow2
from blockstep.errors import GraphError, NodeNotFound, OperationBlocked, OptionError
from tests.scenarios import scenario

MiB = 1 << 20


def file(path: Path, name: str = "disk", /, **options: Any) -> dict[str, Any]:
    return {"driver": "file", "node-name": name, "filename": str(path), **options}


async def open_file(graph: Graph, path: Path, name: str = "disk", /, **options: Any) -> Any:
    path.write_bytes(bytes(MiB))
    return await graph.open(file(path, name, **options))


async def close_all(graph: Graph) -> None:
    for node in graph.nodes.values():
        node.owned = False
    for node in list(graph.nodes.values()):
        await graph.close_unused(node)
    assert not graph.nodes


@scenario
async def test_a_node_becomes_read_only_and_writable_again(tmp_path: Path) -> None:
    graph = Graph()
    node = await open_file(graph, tmp_path / "disk")
    await reopen(graph, [file(tmp_path / "disk", **{"read-only": True})])
    assert node.read_only
    assert node.options.read_only
    await reopen(graph, [file(tmp_path / "disk")])
    assert not node.read_only
    await node.pwrite(0, b"x")
    await close_all(graph)


@scenario
async def test_what_was_written_is_durable_when_a_node_has_become_read_only(tmp_path: Path) -> None:
    graph = Graph()
    node = await open_file(graph, tmp_path / "disk")
    await node.pwrite(0, b"x")
    flushes = []

    async def flush() -> None:
        flushes.append(node.read_only)
        if len(flushes) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    node.flush = flush
    with pytest.raises(OSError, match="Input/output error"):
        await reopen(graph, [file(tmp_path / "disk", **{"read-only": True})])
    assert not node.read_only
    await reopen(graph, [file(tmp_path / "disk", **{"read-only": True})])
    await reopen(graph, [file(tmp_path / "disk")])
    assert flushes == [False, False]
    await close_all(graph)


@scenario
async def test_what_is_left_out_gets_its_default_back(tmp_path: Path) -> None:
    graph = Graph()
    node = await open_file(graph, tmp_path / "disk", discard="unmap", cache={"no-flush": True})
    await reopen(graph, [file(tmp_path / "disk")])
    assert node.options.discard == "ignore"
    assert not node.options.cache.no_flush
    await close_all(graph)


@scenario
async def test_what_cannot_change_is_refused_by_name(tmp_path: Path) -> None:
    graph = Graph()
    node = await open_file(graph, tmp_path / "disk")
    with pytest.raises(OptionError, match="filename"):
        await reopen(graph, [file(tmp_path / "other", discard="unmap")])
    assert node.options.discard == "ignore"
    await close_all(graph)


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"driver": "null", "node-name": "disk"}, OptionError, "driver"),
    ({"driver": "file", "filename": "x"}, OptionError, "node-name"),
    ({"driver": "file", "node-name": "nobody", "filename": "x"}, NodeNotFound, "nobody"),
    ({"driver": "file", "node-name": "disk", "filename": "x", "bogus": 1}, OptionError, "bogus"),
])
@scenario
async def test_a_set_that_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    graph = Graph()
    await open_file(graph, tmp_path / "disk")
    with pytest.raises(error, match=match):
        await reopen(graph, [options])
    await close_all(graph)


@scenario
async def test_one_set_that_is_refused_refuses_all(tmp_path: Path) -> None:
    graph = Graph()
    one = await open_file(graph, tmp_path / "one", "one")
    other = await open_file(graph, tmp_path / "other", "other")
    user = graph.attach_backend(other, "user", READ | WRITE)
    with pytest.raises(GraphError, match="read-only"):
        await reopen(graph, [file(tmp_path / "one", "one", **{"read-only": True}),
                             file(tmp_path / "other", "other", **{"read-only": True})])
    assert not one.read_only
    assert not other.read_only
    assert not one.options.read_only
    await user.pwrite(0, b"x")
    await graph.detach_backend(user)
    await close_all(graph)


@scenario
async def test_no_node_twice(tmp_path: Path) -> None:
    graph = Graph()
    await open_file(graph, tmp_path / "disk")
    with pytest.raises(OptionError, match="one set"):
        await reopen(graph, [file(tmp_path / "disk"), file(tmp_path / "disk")])
    await close_all(graph)


@scenario
async def test_who_blocks_it_says_why(tmp_path: Path) -> None:
    graph = Graph()
    node = await open_file(graph, tmp_path / "disk")
    lift = node.block_operations("it is copied", "reopen")
    with pytest.raises(OperationBlocked, match="it is copied"):
        await reopen(graph, [file(tmp_path / "disk", **{"read-only": True})])
    lift()
    assert not node.read_only
    await close_all(graph)


# --- children ---


async def overlay_over(graph: Graph, backing: str | None) -> Driver:
    for name, byte in (("red", b"r"), ("blue", b"b")):
        node = await graph.open({"driver": "memory", "node-name": name, "size": MiB})
        await node.pwrite(0, byte)
    return await graph.open({"driver": "overlay", "node-name": "top", "size": MiB,
                             **({"backing": backing} if backing else {})})


def overlay(**options: Any) -> dict[str, Any]:
    return {"driver": "overlay", "node-name": "top", "size": MiB, **options}


@scenario
async def test_another_backing_node_shows_through(tmp_path: Path) -> None:
    graph = Graph()
    top = await overlay_over(graph, "red")
    user = graph.attach_backend(top, "user", READ)
    assert bytes(await user.pread(0, 1)) == b"r"
    await reopen(graph, [overlay(backing="blue")])
    assert bytes(await user.pread(0, 1)) == b"b"
    await reopen(graph, [overlay(backing=None)])
    assert bytes(await user.pread(0, 1)) == b"\0"
    await reopen(graph, [overlay(backing="red")])
    assert bytes(await user.pread(0, 1)) == b"r"
    await graph.detach_backend(user)
    await close_all(graph)


@scenario
async def test_a_backing_node_is_not_lost_by_leaving_it_out() -> None:
    graph = Graph()
    top = await overlay_over(graph, "red")
    with pytest.raises(OptionError, match="backing"):
        await reopen(graph, [overlay()])
    assert top.children["backing"].node.name == "red"
    await close_all(graph)


@scenario
async def test_no_cycles() -> None:
    graph = Graph()
    top = await overlay_over(graph, "red")
    with pytest.raises(GraphError, match="below"):
        await reopen(graph, [overlay(backing="top")])
    assert top.children["backing"].node.name == "red"
    await close_all(graph)


@scenario
async def test_the_length_stays() -> None:
    graph = Graph()
    await graph.open({"driver": "null", "node-name": "small", "size": 512})
    await graph.open({"driver": "null", "node-name": "large", "size": 1024})
    await graph.open({"driver": "blkdebug", "node-name": "filter", "file": "small"})
    with pytest.raises(OptionError, match="512 bytes"):
        await reopen(graph, [{"driver": "blkdebug", "node-name": "filter", "file": "large"}])
    await close_all(graph)


@scenario
async def test_a_child_that_came_with_its_parent_gets_options_with_it(tmp_path: Path) -> None:
    graph = Graph()
    (tmp_path / "disk").write_bytes(bytes(MiB))
    storage = {"driver": "file", "filename": str(tmp_path / "disk")}
    raw: Any = await graph.open({"driver": "raw", "node-name": "disk", "file": storage})
    child = raw.children["file"].node
    await reopen(graph, [{"driver": "raw", "node-name": "disk", "read-only": True, "file": storage}])
    assert raw.read_only
    assert child.read_only
    await close_all(graph)


@scenario
async def test_a_child_follows_its_parent_in_what_it_took_over(tmp_path: Path) -> None:
    graph = Graph()
    (tmp_path / "disk").write_bytes(bytes(MiB))
    await graph.open({"driver": "raw", "node-name": "disk", "read-only": True, "file": {
        "driver": "raw", "file": {"driver": "file", "node-name": "storage", "filename": str(tmp_path / "disk"),
                                  "discard": "unmap"}}})
    storage: Any = graph.nodes["storage"]
    middle = storage.parents[0].parent.description
    assert storage.read_only
    await reopen(graph, [{"driver": "raw", "node-name": "disk", "file": middle, "cache": {"no-flush": True}}])
    assert not storage.read_only
    assert storage.options.cache.no_flush
    assert storage.options.discard == "unmap"
    await storage.pwrite(0, b"x")
    await close_all(graph)


@scenario
async def test_a_child_does_not_follow_in_what_it_was_given(tmp_path: Path) -> None:
    graph = Graph()
    (tmp_path / "disk").write_bytes(bytes(MiB))
    raw: Any = await graph.open({"driver": "raw", "node-name": "disk", "file": {
        "driver": "file", "node-name": "storage", "filename": str(tmp_path / "disk"), "read-only": False}})
    storage: Any = graph.nodes["storage"]
    options = {"driver": "raw", "node-name": "disk", "read-only": True, "file": "storage"}
    await reopen(graph, [options])
    assert raw.read_only
    assert not storage.read_only
    await reopen(graph, [options, file(tmp_path / "disk", "storage")])  # now it is given nothing
    assert not storage.read_only
    await reopen(graph, [{**options, "read-only": False}])
    await reopen(graph, [options])
    assert storage.read_only
    await close_all(graph)


@scenario
async def test_a_quorum_keeps_its_children() -> None:
    graph = Graph()
    for name in ("a", "b"):
        await graph.open({"driver": "memory", "node-name": name, "size": MiB})
    quorum = {"driver": "quorum", "node-name": "q", "vote-threshold": 1, "children": ["a"]}
    await graph.open(quorum)
    await reopen(graph, [{**quorum, "read-only": True}])
    assert graph.nodes["q"].read_only
    with pytest.raises(OptionError, match="x-blockdev-change"):
        await reopen(graph, [{**quorum, "children": ["a", "b"]}])
    await close_all(graph)


@scenario
async def test_a_throttle_node_moves_to_another_group() -> None:
    graph = Graph()
    await graph.open({"driver": "null", "node-name": "disk"})
    node: Any = await graph.open({"driver": "throttle", "node-name": "t", "file": "disk", "throttle-group": "slow",
                                  "limits": {"iops-total": 10}})
    await graph.open({"driver": "throttle", "node-name": "t2", "file": "disk", "throttle-group": "fast",
                      "limits": {"iops-total": 1000}})
    options = {"driver": "throttle", "node-name": "t", "file": "disk"}
    await reopen(graph, [{**options, "throttle-group": "fast"}])
    assert node.group.name == "fast"
    assert "slow" not in graph.objects
    with pytest.raises(OptionError, match="throttle-group"):
        await reopen(graph, [{**options, "throttle-group": "unknown"}])
    assert node.group.members == 2
    await close_all(graph)
    assert not graph.objects


@pytest.mark.parametrize(("one", "two"), [(None, None), (None, "b"), ("b", "c")])
@scenario
async def test_of_two_at_a_time_the_second_sees_that_others_have_changed_the_child(
        tmp_path: Path, one: str | None, two: str | None) -> None:
    CreateQcow2(filename=str(tmp_path / "disk"), size=MiB).create()
    graph = Graph()
    for name in ("a", "b", "c"):
        await graph.open({"driver": "memory", "node-name": name, "size": MiB})
    options = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(tmp_path / "disk")}}
    node = await graph.open({**options, "backing": {"driver": "blkdebug", "node-name": "slow", "file": "a"}})
    slow: Any = graph.find("slow")
    user = graph.attach_backend(node, "user")
    slow.suspend("read", "request")
    reading = asyncio.ensure_future(user.pread(0, 512))
    await slow.suspended("request")
    changes = [asyncio.ensure_future(reopen(graph, [{**options, "backing": backing}])) for backing in (one, two)]
    await asyncio.sleep(0)  # both wait for the request
    slow.resume("request")
    await reading
    await changes[0]
    with pytest.raises(GraphError, match="changed by others"):
        await changes[1]
    assert [edge.node.name for name, edge in node.children.items() if name == "backing"] == ([one] if one else [])
    assert "slow" not in graph.nodes
    await graph.detach_backend(user)
    await close_all(graph)


@scenario
async def test_a_node_that_is_given_up_and_cannot_be_closed_keeps_no_other_from_going() -> None:
    graph = Graph()
    for name in ("a", "b"):
        await graph.open({"driver": "memory", "node-name": f"new-{name}", "size": MiB})
        await graph.open({"driver": "throttle", "node-name": name, "limits": {}, "file": {
            "driver": "memory", "node-name": f"old-{name}", "size": MiB}})

    async def fail() -> None:
        raise OSError(errno.EIO, "it cannot be closed")

    graph.find("old-a").close = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="it cannot be closed"):
        await reopen(graph, [{"driver": "throttle", "node-name": name, "limits": {}, "file": f"new-{name}"}
                             for name in ("a", "b")])
    assert sorted(graph.nodes) == ["a", "b", "new-a", "new-b"]
    assert not graph.unfinished
    await close_all(graph)


@scenario
async def test_a_node_is_not_closed_while_it_is_reopened(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MiB))
    graph = Graph()
    node = await open_file(graph, tmp_path / "disk")
    over = await graph.open({"driver": "blkdebug", "node-name": "over", "file": "disk"})
    assert isinstance(over, Blkdebug)
    over.suspend("flush", "reopening")
    changes = [(node, {"read-only": True}), (over, {"read-only": True})]
    reopening = asyncio.ensure_future(graph.reopen(changes))
    await over.suspended("reopening")  # the file is prepared: it has a second descriptor
    with pytest.raises(GraphError, match="in use by 'reopen'"):
        await graph.close(over)
    over.resume("reopening")
    await reopening
    assert node.read_only
    await graph.close(over)
    await graph.close(node)
