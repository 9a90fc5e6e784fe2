"""Our NBD client against the servers of others."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockstep.errors import ConnectionLost, PeerRefused
from blockstep.nbd import constants as c
from blockstep.nbd.client import Client
from blockstep.nbd.dial import ClientTls, list_server
from blockstep.nbd.tls import client_context
from blockstep.nbd.uri import parse_uri
from tests import certificates
from tests.peers import nbdkit, qemu_nbd

pytestmark = pytest.mark.interop

MiB = 1 << 20


def connected(uri: str, use: Callable[[Client], Awaitable[None]], **options: object) -> None:
    """Run ``use`` with a client of ``uri``."""
    async def whole() -> None:
        where = parse_uri(uri)
        client = await Client.connect(where.address, where.export, **options)  # type: ignore[arg-type]
        try:
            await use(client)
        finally:
            await client.close()
    asyncio.run(whole())


async def everything(client: Client) -> None:
    """Write and read with all sizes and alignments, in parallel and not, and compare with a model."""
    model = bytearray(await client.pread(0, 4 * MiB))
    for offset, length in ((0, 1), (511, 2), (4095, 8194), (MiB - 7, MiB + 14), (3 * MiB, 4096)):
        data = os.urandom(length)
        await client.pwrite(offset, data)
        model[offset:offset + length] = data
    await client.write_zeroes(5000, 70_000)
    model[5000:75_000] = bytes(70_000)
    await client.flush()
    assert await client.pread(0, 4 * MiB) == model

    async def read(offset: int, length: int) -> bytes:
        return bytes(await client.pread(offset, length))
    ranges = [(i * 37_003 % (3 * MiB), 1 + i * 4999 % 200_000) for i in range(50)]
    for (offset, length), data in zip(ranges, await asyncio.gather(*(read(*r) for r in ranges)), strict=True):
        assert data == model[offset:offset + length]


@pytest.mark.parametrize("options", [{}, {"structured": False, "extended": False}])
def test_nbdkit_in_memory(tmp_path: Path, options: dict[str, object]) -> None:
    with nbdkit(tmp_path, "memory", "8M") as uri:
        connected(uri, everything, **options)


@pytest.mark.parametrize("mask", ["--mask-handshake=0", "--mask-handshake=1", "--no-sr", "--oldstyle"])
def test_nbdkit_with_an_old_handshake(tmp_path: Path, mask: str) -> None:
    with nbdkit(tmp_path, mask, "memory", "8M") as uri:
        if mask == "--oldstyle":
            with pytest.raises(PeerRefused, match="oldstyle"):
                connected(uri, everything)
        else:
            connected(uri, everything)


def test_nbdkit_that_takes_only_aligned_requests(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=512",
                "blocksize-maximum=64k", "blocksize-error-policy=error") as uri:
        connected(uri, everything)


def test_nbdkit_that_is_slow_answers_in_parallel(tmp_path: Path) -> None:
    async def use(client: Client) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()

        async def read(offset: int) -> None:
            await client.pread(offset, 512)
        await asyncio.gather(*(read(i * 512) for i in range(10)))
        assert loop.time() - begin < 1.0, "ten reads of 200 ms each, one after the other"
    with nbdkit(tmp_path, "--filter=delay", "memory", "8M", "rdelay=200ms") as uri:
        connected(uri, use)


def test_nbdkit_that_does_not_answer_in_time_is_cut_off(tmp_path: Path) -> None:
    async def use(client: Client) -> None:
        with pytest.raises(ConnectionLost) as caught:
            await client.pread(0, 512)
        assert caught.value.errno == errno.ETIMEDOUT
    with nbdkit(tmp_path, "--filter=delay", "memory", "8M", "rdelay=30") as uri:
        connected(uri, use, timeout=0.3)


def test_nbdkit_errors_arrive_with_their_number(tmp_path: Path) -> None:
    async def use(client: Client) -> None:
        await client.pread(0, 512)
        with pytest.raises(OSError) as caught:
            await client.pwrite(0, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
        await client.pread(0, 512)
    with nbdkit(tmp_path, "--filter=error", "memory", "8M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%") as uri:
        connected(uri, use)


def test_nbdkit_sees_the_flags_of_our_requests(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def use(client: Client) -> None:
        await client.pwrite(0, b"x", c.CMD_FLAG_FUA)
        await client.write_zeroes(0, 4096, c.CMD_FLAG_NO_HOLE)
        await client.discard(4096, 4096)
    with nbdkit(tmp_path, "--filter=log", "memory", "8M", f"logfile={log}") as uri:
        connected(uri, use)
    text = log.read_text()
    assert "Write id=1 offset=0x0 count=0x1 fua=1" in text
    assert "Zero id=2 offset=0x0 count=0x1000 trim=0" in text
    assert "Trim id=3 offset=0x1000 count=0x1000" in text


def test_nbdkit_lists_its_exports(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "8M") as uri:
        (info,) = asyncio.run(list_server(parse_uri(uri).address))
    assert (info.size, list(info.contexts)) == (8 * MiB, ["base:allocation"])


def test_qemu_nbd_serves_a_sparse_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 8 * MiB)

    async def use(client: Client) -> None:
        await client.pwrite(MiB, b"x" * MiB)
        extents = await client.block_status(0, 8 * MiB)
        assert sum(length for length, _ in extents) <= 8 * MiB
        assert extents[0] == (MiB, c.STATE_HOLE | c.STATE_ZERO)
        assert extents[1] == (MiB, 0)
        await everything(client)
    with qemu_nbd(tmp_path, disk, export="a disk") as uri:
        connected(uri, use)
        with pytest.raises(PeerRefused, match="no such export"):
            connected(uri.replace("/a%20disk", "/other").replace("/a disk", "/other"), use)


def test_qemu_nbd_refuses_writes_to_a_read_only_export(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))

    async def use(client: Client) -> None:
        assert client.info.flags & c.FLAG_READ_ONLY
        with pytest.raises(OSError) as caught:
            await client.pwrite(0, b"x")
        assert (caught.value.errno, "read-only" in str(caught.value)) == (errno.EINVAL, True)  # QEMU's choice
        assert await client.pread(0, 10) == bytes(10)
    with qemu_nbd(tmp_path, disk, "--read-only") as uri:
        connected(uri, use)


def test_nbdkit_with_mutual_tls(tmp_path: Path) -> None:
    pki = certificates.make(tmp_path / "pki", "server", "client")
    tls = ClientTls(client_context(pki), "localhost")
    with nbdkit(tmp_path, "--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer", "memory", "8M") as uri:
        connected(uri, everything, tls=tls)
        with pytest.raises(PeerRefused, match="requires TLS"):
            connected(uri, everything)
    with nbdkit(tmp_path, "--tls=off", "memory", "8M", name="plain") as uri:
        with pytest.raises(PeerRefused, match="refuses TLS"):
            connected(uri, everything, tls=tls)
        connected(uri, everything, tls=ClientTls(tls.context, "localhost", required=False))
