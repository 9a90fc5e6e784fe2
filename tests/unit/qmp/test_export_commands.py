"""nbd-server-* and block-export-*: one success and the refusals of each, and what clients see of it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.bitmap import DirtyBitmap
from blockstep.drivers.blkdebug import Blkdebug
from blockstep.drivers.create import CreateQcow2
from blockstep.errors import BlockstepError, ConnectionLost, PeerRefused
from blockstep.inventory import inventory
from blockstep.inventory.exports import InetSocket
from blockstep.nbd import constants as c
from blockstep.nbd.client import Client
from blockstep.nbd.dial import ClientTls
from blockstep.nbd.tls import client_context
from blockstep.nbd.uri import InetAddress, UnixAddress
from tests import certificates
from tests.daemon import Daemon, daemon, refused
from tests.disks import Ram, faulty, ram
from tests.scenarios import scenario


async def start(d: Daemon, **options: Any) -> UnixAddress:
    path = str(d.path.with_suffix(".nbd"))
    await d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": path}}, **options)
    return UnixAddress(path)


async def add(d: Daemon, id: str, node: str, options: Mapping[str, Any] | None = None, **more: Any) -> None:
    await d.qmp("block-export-add", {"type": "nbd", "id": id, "node-name": node, **(options or {})}, **more)


async def exports(d: Daemon) -> list[str]:
    return [export["id"] for export in await d.qmp("query-block-exports")]


@scenario
async def test_an_export_is_served_from_its_addition_to_its_deletion(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        disk = await ram(d.inventory.graph, "node", b"content!" * 512)
        address = await start(d)
        await add(d, "e", "node", name="disk", description="a disk", writable=True)
        assert await d.qmp("query-block-exports") == [
            {"id": "e", "type": "nbd", "node-name": "node", "shutting-down": False}]
        client = await Client.connect(address, "disk")
        await client.pwrite(8, b"12345678")
        assert bytes(await client.pread(0, 16)) == b"content!12345678"
        await client.close()
        await d.qmp("block-export-del", id="e")
        await d.event("BLOCK_EXPORT_DELETED", id="e")
        assert await exports(d) == []
        with pytest.raises(PeerRefused):
            await Client.connect(address, "disk")
        assert disk.content[8:16] == b"12345678"


@scenario
async def test_the_server_starts_once_and_stops_with_all_exports(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "node")
        with refused(match="not running"):
            await d.qmp("nbd-server-stop")
        with refused(match="not running"):
            await add(d, "e", "node")
        address = await start(d)
        with refused(match="running already"):
            await d.qmp("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}})
        await add(d, "e", "node")
        client = await Client.connect(address, "node")
        await d.qmp("nbd-server-stop")
        await d.event("BLOCK_EXPORT_DELETED", id="e")
        with pytest.raises(ConnectionLost):
            await client.pread(0, 512)
        await client.close()
        assert not Path(address.path).exists()
        await start(d)


@scenario
async def test_a_server_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        unix = {"type": "unix", "data": {"path": str(tmp_path / "s")}}
        no_socket = os.open(os.devnull, os.O_RDONLY)
        before = sorted(os.listdir("/proc/self/fd"))
        for arguments, match in (
                ({"addr": {"type": "unix", "data": {"path": str(tmp_path / "none" / "s")}}}, "none/s"),
                ({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "nbd!"}}}, "addr.port"),
                ({"addr": {"type": "inet", "data": {"host": "192.0.2.1", "port": "0"}}}, "192.0.2.1"),
                ({"addr": {"type": "inet", "data": {"host": "nobody.invalid", "port": "1"}}}, "nobody.invalid"),
                ({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "\N{SUPERSCRIPT TWO}"}}}, "addr.port"),
                ({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "1" * 5000}}}, "addr.port"),
                ({"addr": {"type": "fd", "data": {"str": "x"}}}, "addr.str"),
                ({"addr": {"type": "fd", "data": {"str": "9" * 20}}}, "addr.str"),
                ({"addr": {"type": "fd", "data": {"str": str(no_socket)}}}, "addr.str"),
                ({"addr": {"type": "vsock", "data": {"cid": "1", "port": "2"}}}, "'addr.type' cannot be 'vsock'"),
                ({"addr": {"type": "unix", "path": "s"}}, "addr"),
                ({"addr": unix, "tls-creds": "nobody"}, "tls-creds"),
                ({"addr": unix, "tls-authz": "somebody"}, "tls-authz"),
                ({"addr": unix, "max-connections": -1}, "max-connections")):
            with refused(match=match):
                await d.qmp("nbd-server-start", arguments)
            assert not d.inventory.exports.running
            assert sorted(os.listdir("/proc/self/fd")) == before
        await d.qmp("nbd-server-start", addr=unix)
        os.close(no_socket)


@scenario
async def test_a_server_that_is_stopped_while_it_starts_does_not_listen(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "node")
        table = d.inventory.exports
        loop, found = asyncio.get_running_loop(), asyncio.Event()
        look_up = loop.getaddrinfo

        async def wait_and_look_up(*args: Any, **options: Any) -> Any:
            await found.wait()
            return await look_up(*args, **options)

        loop.getaddrinfo = wait_and_look_up  # type: ignore[method-assign]
        starting = asyncio.ensure_future(table.start_server([InetSocket(host="127.0.0.1", port="0")]))
        await asyncio.sleep(0)
        await add(d, "e", "node")
        stopping = asyncio.ensure_future(table.stop_server())
        await asyncio.sleep(0)
        found.set()
        await stopping
        with pytest.raises(BlockstepError, match="stopped while"):
            await starting
        assert (table.running, table.addresses, await exports(d)) == (False, [], [])
        await start(d)


@scenario
async def test_a_socket_that_was_handed_over_is_served(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        async with daemon(tmp_path) as d:
            await ram(d.inventory.graph, "node")
            await d.qmp("nbd-server-start", addr={"type": "fd", "data": {"str": str(sock.detach())}})
            await add(d, "e", "node")
            assert d.inventory.exports.uris(d.inventory.exports.find("e")) == [f"nbd://127.0.0.1:{port}/node"]
            await (await Client.connect(InetAddress("127.0.0.1", port), "node")).close()


@scenario
async def test_with_credentials_clients_must_speak_tls(tmp_path: Path) -> None:
    folder = certificates.make(tmp_path / "tls", "server")
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "node")
        await d.qmp("object-add", {"qom-type": "tls-creds-x509", "id": "tls", "dir": str(folder),
                                   "endpoint": "server", "verify-peer": False})
        address = await start(d, **{"tls-creds": "tls"})
        await add(d, "e", "node")
        with pytest.raises(PeerRefused):
            await Client.connect(address, "node")
        await (await Client.connect(address, "node", tls=ClientTls(client_context(folder), "localhost", True))).close()


@scenario
async def test_more_clients_than_allowed_are_turned_away(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "node")
        address = await start(d, **{"max-connections": 1})
        await add(d, "e", "node")
        client = await Client.connect(address, "node")
        with pytest.raises(ConnectionLost):
            await Client.connect(address, "node")
        await client.close()


@pytest.mark.parametrize(("options", "match"), [
    ({"id": "1st"}, "id"),
    ({"id": "e"}, "id"),
    ({"name": "taken"}, "name"),
    ({"name": "x" * 5000}, "name"),
    ({"description": "x" * 5000}, "description"),
    ({"node-name": "nobody"}, "node-name"),
    ({"node-name": "frozen", "writable": True}, "writable"),
    ({"bitmaps": ["nobody"]}, "bitmaps"),
    ({"bitmaps": ["bitmap"]}, "bitmaps"),
    ({"bitmaps": [{"node": "node", "name": "nobody"}]}, "bitmaps"),
    ({"bitmaps": ["bitmap", "bitmap"], "writable": True}, "bitmaps"),
    ({"type": "fuse"}, "'type' cannot be 'fuse'"),
    ({"iothread": "io1"}, "'iothread' is not known"),
])
def test_an_export_that_cannot_be_leaves_nothing(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    @scenario
    async def refuse() -> None:
        async with daemon(tmp_path) as d:
            node = await ram(d.inventory.graph, "node")
            bitmap = DirtyBitmap(node, "bitmap", node.length)
            frozen = await ram(d.inventory.graph, "frozen", **{"read-only": True})
            await start(d)
            await add(d, "e", "node", name="taken")
            with refused(match=match):
                await add(d, "new", "node", options)
            assert await exports(d) == ["e"]
            assert (len(node.parents), len(frozen.parents), bitmap.busy) == (1, 0, None)

    refuse()


@scenario
async def test_an_export_with_clients_goes_hard_or_not_at_all(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "node")
        address = await start(d)
        for command, name, id in (("block-export-del", "id", "e"), ("nbd-server-remove", "name", "e")):
            await add(d, id, "node", name="disk")
            client = await Client.connect(address, "disk")
            with refused(match="in use"):
                await d.qmp(command, {name: id})
            with refused(match="in use"):
                await d.qmp(command, {name: id, "mode": "safe"})
            await client.pread(0, 512)
            with refused(match="no export"):
                await d.qmp(command, {name: "disk"})
            with refused(match="'mode'"):
                await d.qmp(command, {name: id, "mode": "soft"})
            await d.qmp(command, {name: id, "mode": "hard"})
            with pytest.raises(ConnectionLost):
                await client.pread(0, 512)
            await client.close()
            assert await exports(d) == []


@scenario
async def test_an_export_is_gone_when_what_its_clients_started_has_ended(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        debug, _ = await faulty(d.inventory.graph, "node")
        address = await start(d)
        await add(d, "e", "node", writable=True)
        client = await Client.connect(address, "node")
        debug.suspend("write", "held")
        write = asyncio.ensure_future(client.pwrite(0, bytes(512)))
        await debug.suspended("held")
        await d.qmp("block-export-del", id="e", mode="hard")
        with pytest.raises(ConnectionLost):
            await write
        await client.close()
        assert [(each["id"], each["shutting-down"]) for each in await d.qmp("query-block-exports")] == [("e", True)]
        with refused(match="shutting down"):
            await d.qmp("block-export-del", id="e", mode="hard")
        with refused(match="'id'|id:"):
            await add(d, "e", "node", name="other")
        with pytest.raises(PeerRefused):
            await Client.connect(address, "node")
        assert not [event for event in d.events if event["event"] == "BLOCK_EXPORT_DELETED"]
        debug.resume("held")
        await d.event("BLOCK_EXPORT_DELETED", id="e")
        await add(d, "e", "node")


@scenario
async def test_the_older_commands_name_exports_by_their_device(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "node")
        await ram(d.inventory.graph, "frozen", **{"read-only": True})
        with refused(match="not running"):
            await d.qmp("nbd-server-add", device="node")
        address = await start(d)
        await d.qmp("nbd-server-add", device="node", writable=True)
        await d.qmp("nbd-server-add", device="frozen", writable=True, name="other", description="text")
        assert await exports(d) == ["other", "node"]
        client = await Client.connect(address, "other")
        assert client.info.flags & c.FLAG_READ_ONLY
        await client.close()
        for arguments in ({"device": "node"}, {"device": "nobody"}, {"device": "node", "name": "x", "bitmap": "none"}):
            with refused():
                await d.qmp("nbd-server-add", arguments)
        await d.qmp("nbd-server-remove", name="node")
        with refused(match="no export"):
            await d.qmp("nbd-server-remove", name="node")
        assert await exports(d) == ["other"]


@scenario
async def test_a_bitmap_is_shown_and_busy_as_long_as_it_is_exported(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        below = await ram(d.inventory.graph, "below")
        await d.inventory.graph.open({"driver": "raw", "node-name": "node", "file": "below"})
        bitmap = DirtyBitmap(below, "bitmap", below.length, 4096)
        address = await start(d)
        await add(d, "e", "below", {"bitmaps": [{"node": "below", "name": "bitmap"}], "allocation-depth": True},
                  writable=True)
        assert bitmap.busy == "export 'e'"
        with refused(match="bitmaps"):
            await add(d, "f", "below", name="f", bitmaps=["bitmap"], writable=True)
        context = c.QEMU_DIRTY_BITMAP + "bitmap"
        client = await Client.connect(address, "below", contexts=[context, c.QEMU_ALLOCATION_DEPTH])
        await client.pwrite(8192, bytes(512))
        assert await client.block_status(0, 16384, context) == [(8192, 0), (4096, 1), (4096, 0)]
        assert c.QEMU_ALLOCATION_DEPTH in client.info.contexts
        await client.close()
        await d.qmp("block-export-del", id="e")
        assert bitmap.busy is None
        await add(d, "f", "below")
        client = await Client.connect(address, "below", contexts=[c.QEMU_ALLOCATION_DEPTH])
        assert client.info.contexts == {} or c.QEMU_ALLOCATION_DEPTH not in client.info.contexts
        await client.close()
        bitmap.remove()


@scenario
async def test_what_lies_beyond_a_bitmap_of_a_shorter_backing_node_may_be_dirty(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "base", 1000)
        await d.qmp("blockdev-add", {"driver": "overlay", "node-name": "top", "size": 4096, "backing": "base"})
        await d.qmp("block-dirty-bitmap-add", {"node": "base", "name": "map", "granularity": 512})
        address = await start(d)
        await add(d, "e", "top", writable=True, bitmaps=["map"])
        context = c.QEMU_DIRTY_BITMAP + "map"
        client = await Client.connect(address, "top", contexts=(context,))
        assert await client.block_status(0, 4096, context) == [(1000, 0), (3096, c.STATE_DIRTY)]
        assert await client.block_status(2048, 512, context) == [(512, c.STATE_DIRTY)]
        d.inventory.graph.find("base").bitmaps["map"].wrote(600, 1)
        assert await client.block_status(100, 3000, context) == [(412, 0), (2588, c.STATE_DIRTY)]
        await client.close()


@scenario
async def test_writethrough_makes_every_write_durable(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        disk = await ram(d.inventory.graph, "node")
        flags: list[int] = []
        plain = disk.pwrite

        async def pwrite(offset: int, data: Any, how: int = 0) -> None:
            flags.append(how)
            await plain(offset, data, how)

        disk.pwrite = pwrite  # type: ignore[method-assign]
        address = await start(d)
        for through in (True, False):
            await add(d, "e", "node", writethrough=through, writable=True)
            client = await Client.connect(address, "node")
            await client.pwrite(0, bytes(512))
            await client.close()
            await d.qmp("block-export-del", id="e", mode="hard")
        assert flags == [1, 0]


@scenario
async def test_an_export_follows_its_node_when_another_takes_its_place(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        graph = d.inventory.graph
        old, new = await ram(graph, "old"), await ram(graph, "new", b"new!" * 16384)
        address = await start(d)
        await add(d, "e", "old", name="disk")
        client = await Client.connect(address, "disk")
        with pytest.raises(Exception, match="export 'e'"):
            await graph.close(old)
        async with graph.drained(old):
            with graph.change() as change:
                change.replace(old, new)
        assert bytes(await client.pread(0, 4)) == b"new!"
        assert [each["node-name"] for each in await d.qmp("query-block-exports")] == ["new"]
        await client.close()
        await graph.close(old)


@scenario
async def test_clients_are_cut_off_when_the_right_to_write_is_taken_away(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await ram(d.inventory.graph, "node")
        address = await start(d)
        await add(d, "e", "node", writable=True)
        client = await Client.connect(address, "node")
        d.inventory.exports.find("e").backend.revoke("it was promoted")
        with pytest.raises(ConnectionLost):
            await client.pwrite(0, bytes(512))
        await client.close()
        client = await Client.connect(address, "node")
        assert client.info.flags & c.FLAG_READ_ONLY
        await client.close()
        assert await exports(d) == ["e"]


@scenario
async def test_the_end_does_not_wait_for_a_server_that_does_not_answer(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "CLOSE_DEADLINE", 0.05)
    async with daemon(tmp_path, "far") as far:
        debug, _ = await faulty(far.inventory.graph, "disk")
        address = await start(far)
        await add(far, "e", "disk", writable=True)
        async with daemon(tmp_path, "near") as d:
            await d.inventory.graph.open({"driver": "nbd", "node-name": "near", "export": "disk",
                                          "server": {"type": "unix", "path": address.path}})
            here = await start(d)
            await add(d, "n", "near", writable=True)
            client = await Client.connect(here, "near")
            debug.suspend("write", "hangs")
            write = asyncio.ensure_future(client.pwrite(0, bytes(512)))
            await debug.suspended("hangs")
        with pytest.raises(OSError):
            await write
        await client.close()
        debug.resume("hangs")


@scenario
async def test_the_end_does_not_wait_for_a_server_either_that_a_command_waits_for_to_close_a_node(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "CLOSE_DEADLINE", 0.05)
    CreateQcow2(filename=str(tmp_path / "image"), size=1 << 20).create()
    os.truncate(tmp_path / "image", 4 << 20)  # an export does not grow
    async with daemon(tmp_path, "far") as far:
        debug = await far.inventory.graph.open({"driver": "blkdebug", "node-name": "disk", "file": {
            "driver": "file", "filename": str(tmp_path / "image")}})
        assert isinstance(debug, Blkdebug)
        address = await start(far)
        await add(far, "e", "disk", writable=True)
        async with daemon(tmp_path, "near") as d:
            await d.qmp("blockdev-add", {"driver": "qcow2", "node-name": "near", "file": {
                "driver": "nbd", "export": "disk", "server": {"type": "unix", "path": address.path}}})
            await d.qmp("block-dirty-bitmap-add", node="near", name="kept", persistent=True)
            debug.suspend("flush_to_disk", "hangs")
            deleting = asyncio.ensure_future(d.qmp("blockdev-del", {"node-name": "near"}))
            await debug.suspended("hangs")
        debug.resume("hangs")
        with pytest.raises(ConnectionLost):
            await deleting


async def goes_with_its_export(d: Daemon, name: str, error: str = "") -> Ram:
    """An export with the name of its node, which belongs to nobody else; ``error``: why it cannot be closed."""
    node = await d.inventory.graph.open({"driver": "test-ram", "node-name": name}, owned=False)
    assert isinstance(node, Ram)

    async def fail() -> None:
        raise OSError(errno.EIO, error)

    if error:
        node.close = fail  # type: ignore[method-assign]
    await add(d, name, name, writable=True)
    return node


async def fails_and_notes() -> None:
    """A closing in which two things fail."""
    error = OSError(errno.EIO, "broken")
    error.add_note("and then: its file")
    raise error


@scenario
async def test_a_node_that_nobody_else_has_is_flushed_when_it_goes_with_its_export(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await start(d)
        node = await goes_with_its_export(d, "target")
        await d.qmp("block-export-del", id="target")
        assert (node.requests, node.closed) == ([("flush", 0, 0)], True)


@scenario
async def test_a_node_that_cannot_be_closed_keeps_nothing_else_from_its_end(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await start(d)
        await goes_with_its_export(d, "a", "broken")
        await goes_with_its_export(d, "b")
        await goes_with_its_export(d, "c", "broken, too")
        with refused(match="node 'a': broken; and then: node 'c': broken, too"):
            await d.qmp("nbd-server-stop")
        assert await exports(d) == []
        await start(d)
        await goes_with_its_export(d, "a", "broken")
        b, rest = await goes_with_its_export(d, "b"), await ram(d.inventory.graph, "rest")
        rest.close = fails_and_notes  # type: ignore[method-assign]
        assert [error.strerror for error in await d.program.close()] == ["node 'a': broken",
                                                                         "node 'rest': broken; and then: its file"]
        assert (b.closed, rest.requests) == (True, [("flush", 0, 0)])


@pytest.mark.parametrize("command", ["nbd-server-stop", "block-export-del"])
@scenario
async def test_exports_that_a_command_takes_away_go_also_if_it_is_cancelled(command: str, tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await start(d)
        a, b = await goes_with_its_export(d, "a"), await goes_with_its_export(d, "b")
        begun, slow = asyncio.Event(), asyncio.Event()

        async def flush() -> None:
            begun.set()
            await slow.wait()

        a.flush = flush  # type: ignore[method-assign]
        asking = asyncio.ensure_future(d.qmp(command, {"id": "a"} if command == "block-export-del" else None))
        await begun.wait()
        await d.program.qmp.finish(grace=0.0)
        slow.set()
        async with asyncio.timeout(5):
            assert await d.program.close() == []
        assert (a.closed, b.closed) == (True, True)
        with pytest.raises(ConnectionLost):
            await asking
