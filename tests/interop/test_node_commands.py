"""Commands about nodes, to us and to QEMU: the same keys, types, classes of errors, and words of the human monitor."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockstep.qmp.errors import CommandRefused
from tests import peers
from tests.daemon import Daemon, daemon
from tests.scenarios import scenario

pytestmark = pytest.mark.interop

MiB = 1 << 20

NO_LIMITS: dict[str, Any] = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)

#: Ask a command: (class of its error or "", result or description).
Ask = Callable[[str, dict[str, Any]], tuple[str, Any]]


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Ask]:
    with peers.qemu_system(tmp_path) as qmp:
        def ask(command: str, arguments: dict[str, Any]) -> tuple[str, Any]:
            try:
                return "", qmp.ask(command, arguments)
            except RuntimeError as error:
                _, error_class, description = str(error).split(": ", 2)
                return error_class, description

        yield ask


async def ours(d: Daemon, command: str, arguments: dict[str, Any]) -> tuple[str, Any]:
    try:
        return "", await d.qmp(command, arguments)
    except CommandRefused as error:
        return error.error_class, error.description


async def both(d: Daemon, qemu: Ask, command: str, arguments: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The results of both, which must be results."""
    theirs, answer = await asyncio.to_thread(qemu, command, arguments or {}), await ours(d, command, arguments or {})
    assert (theirs[0], answer[0]) == ("", ""), (theirs, answer)
    return theirs[1], answer[1]


async def graph(d: Daemon, qemu: Ask, tmp_path: Path) -> None:
    """The same nodes in both: a drive, a file under raw, a quorum, a throttled disk."""
    for name in ("drive", "disk", "child"):
        for side in ("a", "b"):
            (tmp_path / f"{name}-{side}").write_bytes(b"x" * 4096 + bytes(MiB))
    for side, ask in (("a", qemu), ("b", None)):
        for command, arguments in (
                ("human-monitor-command", {"command-line": f"drive_add 0 if=none,id=drive,file={tmp_path}/drive-{side},"
                                                           "format=raw"}),
                ("object-add", {"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 100}}),
                ("blockdev-add", {"driver": "file", "node-name": "storage", "discard": "unmap",
                                  "filename": f"{tmp_path}/disk-{side}"}),
                ("blockdev-add", {"driver": "raw", "node-name": "disk", "cache": {"direct": False, "no-flush": True},
                                  "file": "storage"}),
                ("blockdev-add", {"driver": "quorum", "node-name": "q", "vote-threshold": 1, "read-pattern": "fifo",
                                  "children": [{"driver": "raw", "file": {
                                      "driver": "file", "filename": f"{tmp_path}/child-{side}"}}]}),
                ("blockdev-add", {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "disk"}),
                ("block-dirty-bitmap-add", {"node": "disk", "name": "bitmap"}),
                ("block-set-write-threshold", {"node-name": "storage", "write-threshold": 65536})):
            if ask is None and command == "block-dirty-bitmap-add" and command not in d.program.qmp.registry.commands:
                continue
            error, why = await asyncio.to_thread(ask, command, arguments) if ask else await ours(d, command, arguments)
            assert not error, why


def shape(value: Any, leave_out: frozenset[str] = frozenset()) -> Any:
    """Keys and types of a result."""
    if isinstance(value, dict):
        return {key: shape(item, leave_out) for key, item in sorted(value.items()) if key not in leave_out}
    if isinstance(value, list):
        shapes: list[Any] = []
        for item in value:
            if (found := shape(item, leave_out)) not in shapes:
                shapes.append(found)
        return shapes
    return type(value).__name__


#: Optional members that QEMU has and we leave out, or that only one of both knows of this disk.
LEFT_OUT = frozenset({"dirty-flag", "actual-size", "driver-specific", "dirty-bitmaps"})


@scenario
async def test_nodes_have_the_same_members(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        for arguments in ({}, {"flat": True}):
            theirs, answer = await both(d, qemu, "query-named-block-nodes", arguments)
            theirs, answer = ({node["node-name"]: node for node in nodes} for nodes in (theirs, answer))
            for name in ("disk", "storage", "q", "t"):
                assert shape(answer[name], LEFT_OUT) == shape(theirs[name], LEFT_OUT)
                for member in ("ro", "drv", "detect_zeroes", "encrypted", "backing_file_depth", "cache",
                               "write_threshold"):
                    assert answer[name][member] == theirs[name][member], (name, member)
            disk, its = answer["disk"], theirs["disk"]
            assert disk["image"]["virtual-size"] == its["image"]["virtual-size"]
            assert Path(disk["file"]).name == Path(its["file"]).name.replace("-a", "-b")
            if "dirty-bitmaps" in disk:
                assert shape(disk["dirty-bitmaps"]) == shape(its["dirty-bitmaps"])


@scenario
async def test_disks_have_the_same_members(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        theirs, answer = ({entry["device"]: entry for entry in entries}
                          for entries in await both(d, qemu, "query-block"))
        assert shape(answer["drive"], LEFT_OUT) == shape(theirs["drive"], LEFT_OUT)
        for member in ("type", "locked", "removable"):
            assert answer["drive"][member] == theirs["drive"][member]


@scenario
async def test_limits_are_shown_alike(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        for limits in ({"iops": 100, "iops_max": 500, "iops_max_length": 2, "group": "h"}, {"bps_wr": 1 << 20},
                       {"bps_rd": 100, "bps_rd_max": 200, "iops": 7, "iops_size": 4096}, {}):
            word = "device"  # QEMU's ids are those of guest devices
            await both(d, qemu, "block_set_io_throttle", {word: "drive", **NO_LIMITS, **limits})
            shown = []
            for entries in await both(d, qemu, "query-block"):
                entry = next(each for each in entries if each["device"] == "drive")
                shown.append({name: value for name, value in entry["inserted"].items()
                              if name.startswith(("bps", "iops", "group"))})
            assert shown[0] == shown[1], limits


@scenario
async def test_counters_have_the_same_members_and_count_alike(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        for line in ('qemu-io drive "write -P 1 0 8k"', 'qemu-io drive "read 0 4k"', "qemu-io drive flush",
                     'qemu-io drive "discard 0 64k"'):
            await both(d, qemu, "human-monitor-command", {"command-line": line})
        theirs, answer = ({entry["device"]: entry for entry in entries}
                          for entries in await both(d, qemu, "query-blockstats"))
        drive, its = answer["drive"], theirs["drive"]
        assert shape(drive, LEFT_OUT) == shape(its, LEFT_OUT | {"idle_time_ns"})
        for member in ("rd_bytes", "rd_operations", "wr_bytes", "wr_operations", "flush_operations", "rd_merged"):
            assert drive["stats"][member] == its["stats"][member], member
        theirs, answer = ({entry["node-name"]: entry for entry in entries}
                          for entries in await both(d, qemu, "query-blockstats", {"query-nodes": True}))
        for name in ("disk", "storage", "q", "t"):
            assert shape(answer[name], LEFT_OUT) == shape(theirs[name], LEFT_OUT)


@scenario
async def test_the_graph_has_the_same_members(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        theirs, answer = await both(d, qemu, "x-debug-query-block-graph")
        assert shape(answer["nodes"]) == shape(theirs["nodes"])
        assert all(shape(edge).keys() == shape(theirs["edges"][0]).keys() for edge in answer["edges"])
        edges = []
        for info in (theirs, answer):
            names = {node["id"]: node["name"] for node in info["nodes"]}
            edges.append({(names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in info["edges"]
                          if not any(names[edge[end]].startswith("#") or names[edge[end]] == "drive"
                                     for end in ("parent", "child"))})
        assert edges[0] == edges[1]


#: Commands that both refuse, with the same class.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("blockdev-add", {"driver": "null-co"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "disk"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "9"}),
    ("blockdev-add", {"driver": "bogus", "node-name": "new"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "new", "bogus": 1}),
    ("blockdev-add", {"driver": "raw", "node-name": "new", "file": "nobody"}),
    ("blockdev-add", {"driver": "file", "node-name": "new", "filename": "/nonexistent/file"}),
    ("blockdev-add", {"driver": "quorum", "node-name": "new", "vote-threshold": 2, "children": ["disk"]}),
    ("blockdev-add", {"driver": "replication", "node-name": "new", "mode": "secondary", "file": "disk"}),
    ("blockdev-add", {"driver": "replication", "node-name": "new", "mode": "primary", "top-id": "x", "file": "disk"}),
    ("blockdev-add", {"driver": "throttle", "node-name": "new", "throttle-group": "nobody", "file": "disk"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "new", "force-share": True}),
    ("blockdev-del", {"node-name": "nobody"}),
    ("blockdev-del", {"node-name": "disk"}),
    ("blockdev-del", {"node-name": "storage"}),
    ("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "nobody", "file": "storage"}]}),
    ("blockdev-reopen", {"options": [{"driver": "raw", "file": "storage"}]}),
    ("blockdev-reopen", {"options": [{"driver": "null-co", "node-name": "disk"}]}),
    ("blockdev-create", {"job-id": "job", "options": {"driver": "file", "filename": "/tmp/x"}}),
    ("blockdev-create", {"job-id": "9", "options": {"driver": "file", "filename": "/nonexistent/x", "size": 1}}),
    ("x-blockdev-change", {"parent": "q"}),
    ("x-blockdev-change", {"parent": "q", "child": "children.0", "node": "disk"}),
    ("x-blockdev-change", {"parent": "q", "child": "children.7"}),
    ("x-blockdev-change", {"parent": "q", "child": "children.0"}),
    ("x-blockdev-change", {"parent": "q", "node": "nobody"}),
    ("x-blockdev-change", {"parent": "q", "node": "disk"}),
    ("x-blockdev-change", {"parent": "disk", "node": "t"}),
    ("x-blockdev-change", {"parent": "nobody", "node": "t"}),
    ("x-blockdev-set-iothread", {"node-name": "disk", "iothread": "nobody"}),
    ("x-blockdev-set-iothread", {"node-name": "nobody", "iothread": None}),
    ("block_resize", {"size": 1}),
    ("block_resize", {"node-name": "nobody", "size": 1}),
    ("block_resize", {"device": "nobody", "size": 1}),
    ("block_resize", {"node-name": "disk", "size": -1}),
    ("block_set_io_throttle", {"id": "nobody"}),
    ("block_set_io_throttle", {"device": "nobody", **NO_LIMITS}),
    ("block_set_io_throttle", {"device": "drive", **NO_LIMITS, "iops": 5, "iops_rd": 5}),
    ("block_set_io_throttle", {"device": "drive", **NO_LIMITS, "iops": 5, "iops_max": 4}),
    ("block-set-write-threshold", {"node-name": "nobody", "write-threshold": 1}),
    ("human-monitor-command", {}),
]


@scenario
async def test_what_both_refuse_has_the_same_class_and_changes_nothing(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        nodes = [*d.inventory.graph.nodes]
        for command, arguments in REFUSED:
            theirs = await asyncio.to_thread(qemu, command, arguments)
            answer = await ours(d, command, arguments)
            assert theirs[0] == answer[0] != "", (command, arguments, theirs, answer)
        assert [*d.inventory.graph.nodes] == nodes


# --- reopen ---

#: Sets of options for the nodes of `graph`; FILE stands for the name of the disk's file.
REOPENED: list[list[dict[str, Any]]] = [
    [{"driver": "raw", "node-name": "disk", "file": "storage", "read-only": True}],
    [{"driver": "raw", "node-name": "disk", "file": "storage"}],
    [{"driver": "raw", "node-name": "disk", "file": "storage", "read-only": True},
     {"driver": "file", "node-name": "storage", "filename": "FILE", "read-only": True}],
    [{"driver": "file", "node-name": "storage", "filename": "FILE", "discard": "ignore"},
     {"driver": "raw", "node-name": "disk", "file": "storage", "detect-zeroes": "off", "auto-read-only": True}],
    [{"driver": "file", "node-name": "storage", "filename": "FILE", "cache": {"no-flush": True}}],
    [{"driver": "file", "node-name": "storage", "filename": "ELSEWHERE"}],
    [{"driver": "raw", "node-name": "disk", "file": "storage", "read-only": True},
     {"driver": "file", "node-name": "storage", "filename": "ELSEWHERE"}],
    [{"driver": "raw", "node-name": "disk", "file": "storage", "force-share": True}],
    [{"driver": "raw", "node-name": "disk"}],
    [{"driver": "raw", "node-name": "disk", "file": "nobody"}],
    [{"driver": "raw", "node-name": "disk", "file": "t"}],
]


@scenario
async def test_reopen_takes_and_refuses_the_same(tmp_path: Path, qemu: Ask) -> None:
    def named(sets: list[dict[str, Any]], file: str) -> dict[str, Any]:
        where = {"FILE": file, "ELSEWHERE": f"{file}-elsewhere"}
        return {"options": [{**options, **({"filename": where[options["filename"]]} if "filename" in options else {})}
                            for options in sets]}

    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        for sets in REOPENED:
            theirs = await asyncio.to_thread(qemu, "blockdev-reopen", named(sets, f"{tmp_path}/disk-a"))
            answer = await ours(d, "blockdev-reopen", named(sets, f"{tmp_path}/disk-b"))
            assert answer[0] == theirs[0], (sets, theirs, answer)
            shown = [{node["node-name"]: (node["ro"], node["cache"]) for node in nodes}
                     for nodes in await both(d, qemu, "query-named-block-nodes", {"flat": True})]
            for name in ("disk", "storage", "t"):
                assert shown[1][name] == shown[0][name], (name, sets)


# --- the human monitor ---

LINES = [
    "drive_add", "drive_add buddy", "drive_add -x buddy a=b", "drive_add -n buddy driver=null-co",
    "drive_add -n buddy driver=null-co,size=1M,node-name=n1", "drive_add 0 if=none,id=drive,driver=null-co",
    "drive_add 0 if=none,id=d2,driver=null-co", "drive_del", "drive_del a b", "drive_del nobody", "drive_del n1",
    "drive_del d2", "drive_del d2", "info block-jobs", "info bogus", "bogus a b", "info block -x", "info block nobody",
    "info block a b", "", "qemu-io", "qemu-io drive",
]


@scenario
async def test_the_human_monitor_says_the_same(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        for line in LINES:
            theirs, answer = await both(d, qemu, "human-monitor-command", {"command-line": line})
            assert answer == theirs, line


@scenario
async def test_info_block_says_the_same_of_a_drive(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        await graph(d, qemu, tmp_path)
        for line in ("info block drive", "info block -v drive"):
            theirs, answer = await both(d, qemu, "human-monitor-command", {"command-line": line})
            named = re.sub(r"\(#block\d+\)", "(drive)", theirs).replace("-a", "-b")
            assert answer == named


@scenario
async def test_info_block_jobs_says_the_same_of_a_job(tmp_path: Path, qemu: Ask) -> None:
    async with daemon(tmp_path) as d:
        for name in ("from", "to"):
            await both(d, qemu, "blockdev-add", {"driver": "null-co", "node-name": name, "size": MiB})
        await both(d, qemu, "blockdev-mirror", {"job-id": "job", "device": "from", "target": "to", "sync": "full",
                                                "speed": 1000})
        theirs, answer = await both(d, qemu, "human-monitor-command", {"command-line": "info block-jobs"})
        figures = re.compile(r"Completed \d+ of \d+")
        assert figures.sub("", answer) == figures.sub("", theirs)


IO = [
    "write -P 1 0 8k", "write -z 0 64k", "write -z -u 0 64k", "write 0 100", "write 1 512", "read 0 4k",
    "read -P 0xcd 1 511", "read -P 1 0 4k", "read -v 0 32", "read -P 0 4M 1k", "write 4M 1k", "writev 0 512 512",
    "readv 0 512 512", "flush", "discard 0 64k", "discard 4M 4k", "write", "write 0", "write -P 300 0 1k",
    "write -P foo 0 1k", "write x 1k", "write 0 y", "bogus", "length", "read -q 0 1k", "write -f 0 1k", "write -q 0 1k",
    "read -P 1 -s 512 -l 512 0 1k", "truncate 2M", "length", "write -P 1 0 3G", "w -P 2 0 1k", "r 0 1k", "f", "d 0 1k",
    "write -z -P 1 0 1k", "write -n 0 1k", "write -u 0 1k", "write -c 0 1k", "read -b 0 1k", "read 0 0",
    "write -P 0x41 4k 1", "read -v 4090 20", "write 0 1.5k", "alloc 0 64k",
    "readv 0 512 3G", "writev 0 512G", "readv 0 512 1G 1G", "writev 0 1G 1G",
]


@scenario
async def test_qemu_io_says_the_same_but_for_the_time_it_took(tmp_path: Path) -> None:
    peers.need("qemu-io")
    for name in ("theirs", "ours"):
        (tmp_path / name).write_bytes(b"\x01" * MiB)

    def timeless(text: str) -> str:
        return re.sub(r"\d\d\.\d\d sec \(.*? ops/sec\)", "(time)", text.replace("\r\n", "\n"))

    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "disk", "discard": "unmap", "file": {
            "driver": "file", "filename": str(tmp_path / "ours")}})
        for command in IO:
            theirs = await asyncio.to_thread(peers.run, "qemu-io", "-f", "raw", "-d", "unmap", "-c", command,
                                             tmp_path / "theirs", check=False)
            answer = await d.qmp("human-monitor-command", {"command-line": f'qemu-io disk "{command}"'})
            assert timeless(answer) == timeless(theirs.stdout + theirs.stderr), command
        await d.inventory.graph.nodes["disk"].flush()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
