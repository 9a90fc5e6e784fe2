"""human-monitor-command: what it does and the text that people and scripts get."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockstep.block.permissions import READ, WRITE
from blockstep.nbd.uri import InetAddress
from blockstep.qmp.commands.qemu_io import qemu_io
from tests.daemon import Daemon, daemon, refused
from tests.disks import faulty
from tests.scenarios import scenario

MiB = 1 << 20


async def hmp(d: Daemon, line: str) -> str:
    text: str = await d.qmp("human-monitor-command", {"command-line": line})
    assert text.count("\n") == text.count("\r\n")
    return text.replace("\r\n", "\n")


def try_help(command: str) -> str:
    return f'Try "help {command}" for more information\n'


async def memory(d: Daemon, name: str) -> None:
    await d.qmp("blockdev-add", {"driver": "memory", "node-name": name, "size": MiB})


# --- drive_add, drive_del ---


@scenario
async def test_the_primarys_step_of_the_guide(tmp_path: Path) -> None:
    async with daemon(tmp_path, "standby") as standby, daemon(tmp_path, "primary") as d:
        await memory(standby, "parent0")
        await standby.qmp("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}})
        await standby.qmp("nbd-server-add", {"device": "parent0", "writable": True})
        address = standby.inventory.exports.addresses[0]
        assert isinstance(address, InetAddress)
        await d.qmp("blockdev-add", {"driver": "quorum", "node-name": "colo-disk0", "vote-threshold": 1,
                                     "read-pattern": "fifo", "children": [{"driver": "memory", "size": MiB}]})
        assert await hmp(d, "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,"
                            f"file.host=127.0.0.1,file.port={address.port},file.export=parent0,"
                            "node-name=replication0") == ""
        await d.qmp("x-blockdev-change", {"parent": "colo-disk0", "node": "replication0"})
        assert "in use" in await hmp(d, "drive_del replication0")
        await d.qmp("x-blockdev-change", {"parent": "colo-disk0", "child": "children.1"})
        assert await hmp(d, "drive_del replication0") == ""
        assert "replication0" not in d.inventory.graph.nodes


@scenario
async def test_the_standbys_disks_of_the_guide_with_overlays_for_qcow2(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        for name in ("active", "hidden"):
            await d.qmp("blockdev-create", {"job-id": name, "options": {
                "driver": "overlay", "filename": str(tmp_path / name), "size": MiB}})
            await d.event("JOB_STATUS_CHANGE", id=name, status="concluded")
        (tmp_path / "parent").write_bytes(bytes(MiB))
        assert await hmp(d, f"drive_add 0 if=none,id=parent0,file.filename={tmp_path}/parent,driver=raw") == "OK\n"
        assert await hmp(d, "drive_add 0 if=none,id=childs0,driver=replication,mode=secondary,top-id=colo-disk0,"
                            f"file.driver=overlay,file.file.filename={tmp_path}/active,file.backing.driver=overlay,"
                            f"file.backing.file.filename={tmp_path}/hidden,file.backing.backing=parent0") == "OK\n"
        assert await hmp(d, "drive_add 0 if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,"
                            "children.0=childs0") == "OK\n"
        assert next(d.inventory.graph.nodes["colo-disk0"].below()).name == "childs0"
        assert len(d.inventory.graph.nodes) == 6


@scenario
async def test_a_drive_without_an_id_gets_one(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        for _ in range(2):
            assert await hmp(d, "drive_add 0 if=none,driver=null-co") == "OK\n"
        assert [*d.inventory.graph.nodes] == ["none0", "none1"]
        assert "ide" in await hmp(d, "drive_add 0 id=x,driver=null-co")
        assert "x" not in d.inventory.graph.nodes


@pytest.mark.parametrize(("line", "answer"), [
    ("drive_add", f"drive_add: string expected\n{try_help('drive_add')}"),
    ("drive_add buddy", f"drive_add: string expected\n{try_help('drive_add')}"),
    ("drive_add -x buddy a=b", f"drive_add: unsupported option -x\n{try_help('drive_add')}"),
    ("drive_add -n buddy driver=null-co", "'node-name' needs to be specified\n"),
    ("drive_add 0 if=none,id.x=there,driver=null-co", "Parameter 'id' expects an identifier\n"),
    ("drive_add 0 if=none,id=there,driver=null-co", "Duplicate ID 'there' for drive\n"),
    ("drive_del", f"drive_del: block device name expected\n{try_help('drive_del')}"),
    ("drive_del a b", f"drive_del: extraneous characters at the end of line\n{try_help('drive_del')}"),
    ("drive_del nobody", "Device 'nobody' not found\n"),
    ("info block-jobs", "No active jobs\n"),
    ("info bogus", "unknown command: 'info bogus'\n"),
    ("bogus a b", "unknown command: 'bogus'\n"),
    ("info block -x", f"block: unsupported option -x\n{try_help('info block')}"),
    ("info block nobody", ""),
    ("info block a b", f"block: extraneous characters at the end of line\n{try_help('info block')}"),
    ("", ""),
])
@scenario
async def test_answers_that_are_qemus_letter_by_letter(tmp_path: Path, line: str, answer: str) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "there")
        assert await hmp(d, line) == answer
        assert [*d.inventory.graph.nodes] == ["there"]


@pytest.mark.parametrize(("options", "says"), [
    ("driver=null-co,node-name=there", "there"),
    ("driver=bogus,node-name=new", "bogus"),
    ("driver=null-co,node-name=new,bogus=1", "bogus"),
    ("driver=null-co,node-name=new,size=hello", "size"),
    ("driver=raw,node-name=new,file.filename=/nonexistent/file", "No such file"),
    ("driver=qcow2,node-name=new,file.filename=/x", "No such file"),
    ("driver=null-co,node-name", "KEY=VALUE"),
])
@scenario
async def test_a_drive_that_cannot_be_added(tmp_path: Path, options: str, says: str) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "there")
        assert says in await hmp(d, f"drive_add -n buddy {options}")
        assert [*d.inventory.graph.nodes] == ["there"]


@scenario
async def test_no_command_line_is_an_error(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        with refused(match="command-line"):
            await d.qmp("human-monitor-command")


@scenario
async def test_help_names_what_there_is(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        text = await hmp(d, "help")
        assert [line.split(" --")[0].split(" [")[0] for line in text.splitlines()][-2:] == [
            "info block-jobs", 'qemu-io node "command"']
        assert (await hmp(d, "help drive_del")).startswith("drive_del node -- ")
        assert await hmp(d, "help bogus") == ""
        assert (await hmp(d, "info")).startswith("info block [-n]")


# --- info ---


@scenario
async def test_info_block(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        path = tmp_path / "disk"
        path.write_bytes(bytes(MiB))
        await d.qmp("blockdev-add", {"driver": "raw", "node-name": "disk", "read-only": True,
                                     "file": {"driver": "file", "node-name": "storage", "filename": str(path)}})
        head = f"disk (disk): {path} (raw, read-only)\n    Removable device: not locked, tray closed\n"
        assert await hmp(d, "info block") == f"{head}    Cache mode:       writeback\n"
        assert "virtual size: 1 MiB (1048576 bytes)\n" in await hmp(d, "info block -v disk")
        assert await hmp(d, "info block storage") == (
            f"storage: {path} (file, read-only)\n    Cache mode:       writeback\n")
        both = await hmp(d, "info block -n")
        assert both.count("Cache mode") == 2


# --- qemu-io ---


@scenario
async def test_qemu_io_writes_and_reads(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        written = await hmp(d, 'qemu-io disk "write -P 0x41 4k 8k"')
        assert written.startswith("wrote 8192/8192 bytes at offset 4096\n8 KiB, 1 ops; 00.00 sec (")
        assert written.endswith(" ops/sec)\n")
        node = d.inventory.graph.nodes["disk"]
        assert bytes(await node.pread(4096, 8192)) == b"A" * 8192
        assert "read 8192/8192 bytes at offset 4096\n" in await hmp(d, 'qemu-io disk "read -P 0x41 4k 8k"')
        assert await hmp(d, 'qemu-io disk "read -q -P 0x42 4k 8k"') == (
            "Pattern verification failed at offset 4096, 8192 bytes\n")
        assert await hmp(d, 'qemu-io disk "read -q -P 0 -l 4k 0 8k"') == ""
        assert "wrote 4096/4096" in await hmp(d, 'qemu-io disk "write -z -u 4k 4k"')
        assert bytes(await node.pread(4096, 4097)) == bytes(4096) + b"A"
        assert "discard 4096/4096 bytes at offset 8192\n" in await hmp(d, 'qemu-io disk "discard 8k 4k"')
        assert await hmp(d, "qemu-io disk flush") == ""
        assert await hmp(d, "qemu-io disk length") == "1 MiB\n"
        assert await hmp(d, 'qemu-io disk "truncate 2M"') == ""
        assert node.length == 2 * MiB
        assert not node.parents


@pytest.mark.parametrize(("command", "answer"), [
    ("bogus", 'command "bogus" not found\n'),
    ("write", "bad argument count 0 to write, expected at least 2 arguments\n"),
    ("write 0", "bad argument count 1 to write, expected at least 2 arguments\n"),
    ("write x 1k", "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- x\n"),
    ("write -P 300 0 1k", "300 is not a valid pattern byte\n"),
    ("write -P foo 0 1k", "foo is not a valid pattern byte\n"),
    ("write -z -P 1 0 1k", "Only one of -z, -P, and -s can be specified at the same time\n"),
    ("write -n 0 1k", "-n requires -z to be specified\n"),
    ("write -u 0 1k", "-u requires -z to be specified\n"),
    ("write -c 0 1k", "write failed: Operation not supported\n"),
    ("write -P 1 0 3G", "length cannot exceed 2147483136 without -n, given 3G\n"),
    ("readv 0 512 512G", "Argument '512G' exceeds maximum size 2147483136\n"),
    ("writev 0 1G 1G", "The total number of bytes exceed the maximum size 2147483136\n"),
    ("write 1M 1k", "write failed: Input/output error\n"),
    ("read 2M 1k", "read failed: Input/output error\n"),
    ("discard 2M 4k", "discard failed: Input/output error\n"),
    ("read -v -q 0 16", ""),
    ("", ""),
])
@scenario
async def test_qemu_ios_complaints(tmp_path: Path, command: str, answer: str) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "disk")
        assert await hmp(d, f'qemu-io disk "{command}"') == answer
        node = d.inventory.graph.nodes["disk"]
        assert bytes(await node.pread(0, MiB)) == bytes(MiB)
        assert not node.parents


@scenario
async def test_qemu_io_says_what_the_disk_says(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await memory(d, "storage")
        await d.qmp("blockdev-add", {"driver": "blkdebug", "node-name": "disk", "image": "storage",
                                     "inject-error": [{"event": "write_aio", "errno": 28}]})
        assert await hmp(d, 'qemu-io disk "write 0 1k"') == "write failed: No space left on device\n"
        await d.qmp("blockdev-add", {"driver": "null", "node-name": "ro", "read-only": True})
        assert "read-only" in await hmp(d, 'qemu-io ro "write 0 1k"')
        assert await hmp(d, 'qemu-io nobody "write 0 1k"') == "Device 'nobody' not found\n"


@scenario
async def test_qemu_io_changes_the_length_as_block_resize_does(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        debug, disk = await faulty(graph, "disk", MiB)
        guest = graph.attach_backend(debug, "guest", READ | WRITE)
        debug.suspend("write", "slow")
        writing = asyncio.ensure_future(guest.pwrite(MiB - 512, bytes(512)))
        await debug.suspended("slow")
        changing = asyncio.ensure_future(qemu_io(graph, debug, "truncate 4k"))
        await asyncio.sleep(0)
        debug.resume("slow")
        assert [await writing, await changing] == [None, ""]
        assert (len(disk.content), [what for what, *_ in disk.requests]) == (4096, ["write", "truncate"])
        lift = debug.block_operations("job 'x' uses it")
        assert await hmp(d, 'qemu-io disk "truncate 8k"') == (
            "'resize' on node 'disk' is not possible now: job 'x' uses it\n")
        lift()
        await graph.detach_backend(guest)
        assert [edge.parent.description for edge in debug.parents] == []


@scenario
async def test_qemu_io_shows_bytes_and_what_is_allocated(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-add", {"driver": "overlay", "node-name": "top",
                                     "backing": {"driver": "null", "size": MiB}})
        await hmp(d, 'qemu-io top "write -P 0x41 4k 4k"')
        assert (await hmp(d, 'qemu-io top "read -v 4090 20"')).startswith(
            "00000ffa:  00 00 00 00 00 00 41 41 41 41 41 41 41 41 41 41  ......AAAAAAAAAA\n"
            "0000100a:  41 41 41 41  AAAA\nread 20/20 bytes at offset 4090\n")
        assert await hmp(d, 'qemu-io top "alloc 0 8k"') == "4096/8192 bytes allocated at offset 0 bytes\n"
        assert await hmp(d, "qemu-io top map") == (
            "4 KiB (0x1000) bytes not allocated at offset 0 bytes (0x0)\n"
            "4 KiB (0x1000) bytes     allocated at offset 4 KiB (0x1000)\n"
            "1016 KiB (0xfe000) bytes not allocated at offset 8 KiB (0x2000)\n")
