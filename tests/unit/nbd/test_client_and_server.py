"""Our client and our server, over real sockets: they agree on everything that both know."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.driver import Extent
from blockstep.drivers.nbd import Nbd, NbdOptions
from blockstep.errors import OptionError, PeerRefused
from blockstep.nbd import constants as c
from blockstep.nbd import dial
from blockstep.nbd.client import Client
from blockstep.nbd.dial import ClientTls, list_server
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server
from blockstep.nbd.tls import client_context, server_context
from blockstep.nbd.uri import InetAddress, UnixAddress
from tests import certificates
from tests.unit.nbd.storage import Storage

MiB = 1 << 20


def served(directory: Path, use: Callable[[UnixAddress, Storage], Awaitable[None]]) -> None:
    """Run ``use`` while the export "disk" is served at the address that it gets."""
    async def whole() -> None:
        storage = Storage(4 * MiB)
        server = Server()
        server.add(Export("disk", storage))
        path = directory / "socket"
        await server.start_unix(path)
        try:
            await use(UnixAddress(os.fspath(path)), storage)
        finally:
            await server.stop(1)
    asyncio.run(whole())


@pytest.mark.parametrize("form", [{}, {"extended": False}, {"extended": False, "structured": False}])
def test_all_forms_of_the_protocol_carry_all_requests(tmp_path: Path, form: dict[str, Any]) -> None:
    async def use(address: UnixAddress, storage: Storage) -> None:
        client = await Client.connect(address, "disk", **form)
        assert (client.info.extended, client.info.structured) == (form == {}, "structured" not in form)
        data = os.urandom(2 * MiB)
        await client.pwrite(MiB + 1, data, c.CMD_FLAG_FUA)
        assert bytes(storage.data[MiB + 1:3 * MiB + 1]) == data
        assert await client.pread(MiB + 1, 2 * MiB) == data
        parts = await asyncio.gather(*(_task(client.pread(MiB + 1 + i * 1000, 1000)) for i in range(100)))
        assert b"".join(parts) == data[:100_000]
        await client.write_zeroes(MiB + 1, MiB)
        assert await client.pread(MiB, MiB) == bytes(MiB)
        await client.flush()
        with pytest.raises(OSError):
            await client.pread(4 * MiB, 1)
        if client.info.contexts:
            assert sum(length for length, _ in await client.block_status(0, MiB)) <= MiB
        await client.close()
    served(tmp_path, use)


def test_the_list_of_exports(tmp_path: Path) -> None:
    async def use(address: UnixAddress, storage: Storage) -> None:
        (info,) = await list_server(address)
        assert (info.name, info.size) == ("disk", 4 * MiB)
        assert c.BASE_ALLOCATION in info.contexts
        with pytest.raises(PeerRefused, match="no such export"):
            await Client.connect(address, "other")
    served(tmp_path, use)


def test_the_driver_is_the_disk_behind_the_server(tmp_path: Path) -> None:
    async def use(address: UnixAddress, storage: Storage) -> None:
        node = Nbd("disk", NbdOptions(path=address.path, export="disk", connections=2))
        await node.open()
        assert node.length == 4 * MiB
        storage.extents = [Extent(MiB), Extent(3 * MiB, False, True)]
        await node.pwrite(10, b"abc")
        assert bytes(storage.data[9:14]) == b"\0abc\0"
        assert await node.pread(9, 5) == b"\0abc\0"
        assert [(e.length, e.data, e.zero) for e in await node.block_status(0, 4 * MiB)] == [
            (MiB, True, False), (3 * MiB, False, True)]
        await node.flush()
        await node.close()
    served(tmp_path, use)


@pytest.mark.parametrize("trusted", [True, False])
def test_mutual_tls_and_a_certificate_of_somebody_else(tmp_path: Path, trusted: bool) -> None:
    pki = certificates.make(tmp_path / "pki", "server", "client")
    other = certificates.make(tmp_path / "other", "server", "client")

    async def whole() -> None:
        server = Server(tls="required", tls_context=server_context(pki, verify_peer=True))
        server.add(Export("disk", Storage(MiB)))
        ((host, port),) = await server.start_tcp("127.0.0.1", 0)
        try:
            with pytest.raises(PeerRefused, match="requires TLS"):
                await Client.connect(InetAddress(host, port), "disk")
            tls = ClientTls(client_context(pki if trusted else other), "localhost")
            if not trusted:
                with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                    await Client.connect(InetAddress(host, port), "disk", tls=tls)
                return
            client = await Client.connect(InetAddress(host, port), "disk", tls=tls)
            assert client.info.tls
            data = os.urandom(700_000)
            await client.pwrite(1, data)
            assert await client.pread(1, len(data)) == data
            await client.close()
        finally:
            await server.stop(1)
    asyncio.run(whole())


def test_a_connection_that_comes_in_the_moment_of_a_cancel_is_closed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = dial._dial

    async def use(address: UnixAddress, storage: Storage) -> None:
        channels = []

        async def cancelled_at_its_end(*args: Any) -> Any:
            found = await dialled(*args)
            channels.append(found[0])
            asyncio.get_running_loop().call_soon(connecting.cancel)
            return found

        monkeypatch.setattr(dial, "_dial", cancelled_at_its_end)
        connecting = asyncio.ensure_future(Client.connect(address, "disk"))
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await asyncio.wait_for(channels[0].wait_closed(), 10)
    served(tmp_path, use)


@pytest.mark.parametrize("name", ["", ".localhost", "a..b", "a\0b", "x" * 64])
def test_what_can_be_no_name_in_a_certificate_is_refused_by_name(tmp_path: Path, name: str) -> None:
    pki = certificates.make(tmp_path / "pki", "server")

    async def whole() -> None:
        server = Server(tls="required", tls_context=server_context(pki))
        server.add(Export("disk", Storage(MiB)))
        try:
            with pytest.raises(OptionError, match=r"tls-hostname: .* should be a host name"):
                await Client.connect(InetAddress(*(await server.start_tcp("127.0.0.1", 0))[0]), "disk",
                                     tls=ClientTls(client_context(pki), name))
        finally:
            await server.stop(1)
    asyncio.run(whole())


async def _task(awaitable: Awaitable[Any]) -> bytes:
    return bytes(await awaitable)
