"""Our server, used by the clients that people have: libnbd, QEMU, fio."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.driver import Extent
from blockstep.nbd.export import Export
from blockstep.nbd.handshake import TlsMode
from blockstep.nbd.server import Server
from blockstep.nbd.tls import server_context
from tests import certificates, peers
from tests.peers import need, unix_uri
from tests.unit.nbd.storage import Storage

pytestmark = pytest.mark.interop

MIB = 1 << 20


class Bitmap:
    length = 1 << 40

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        end, runs = offset + length, []
        while offset < end:  # every other 64 KiB
            stop = min(end, (offset // 65536 + 1) * 65536)
            runs.append((stop - offset, offset // 65536 % 2 == 0))
            offset = stop
        return runs


def disk(length: int = 16 * MIB) -> Storage:
    """Data in the first and the last MiB, a hole between them."""
    storage = Storage(length)
    storage.data[:MIB] = bytes(range(256)) * 4096
    storage.data[-MIB:] = b"z" * MIB
    storage.extents = [Extent(MIB), Extent(length - 2 * MIB, False, True, False, 0), Extent(MIB, depth=2)]
    return storage


def with_server(path: Path, client: Callable[[], Any], *exports: Export, pki: Path | None = None,
                tls: TlsMode = "off", tcp: list[int] | None = None) -> Any:
    """Serve ``exports`` while ``client`` runs in a thread; its result."""
    async def main() -> Any:
        server = Server(tls=tls, tls_context=server_context(pki, verify_peer=True) if pki else None)
        for export in exports:
            server.add(export)
        if tcp is not None:
            ((_, port),) = await server.start_tcp("127.0.0.1", 0)
            tcp.append(port)
        else:
            await server.start_unix(path)
        try:
            return await asyncio.to_thread(client)
        finally:
            await server.stop(1)

    return asyncio.run(main())


def test_nbdinfo_shows_what_we_offer(tmp_path: Path) -> None:
    need("nbdinfo")
    path = tmp_path / "s"
    export = Export("disk a", disk(), description="the first disk", bitmaps={"b0": Bitmap()})

    def client() -> dict[str, Any]:
        shown = json.loads(peers.run("nbdinfo", "--json", unix_uri(path, "disk a")).stdout)
        return dict(shown["exports"][0])

    shown = with_server(path, client, export)
    assert shown["export-size"] == 16 * MIB
    assert shown["description"] == "the first disk"
    assert shown["contexts"] == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
    assert (shown["block_size_minimum"], shown["block_size_preferred"], shown["block_size_maximum"]) == (
        1, 4096, 32 * MIB)
    shown.pop("can_block_status_payload", None)  # only where nbdinfo knows of extended headers
    assert [name for name, value in shown.items() if value is True] == [
        "can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"]


def test_nbdinfo_lists_all_exports(tmp_path: Path) -> None:
    need("nbdinfo")
    path = tmp_path / "s"
    listed = with_server(path, lambda: json.loads(peers.run("nbdinfo", "--list", "--json", unix_uri(path)).stdout),
                         Export("a", disk()), Export("b", disk(), read_only=True))
    assert [(export["export-name"], export["is_read_only"]) for export in listed["exports"]] == [
        ("a", False), ("b", True)]


@pytest.mark.parametrize(("context", "rows"), [
    ("base:allocation", [(0, MIB, 0), (MIB, 14 * MIB, 3), (15 * MIB, MIB, 0)]),
    ("qemu:allocation-depth", [(0, MIB, 1), (MIB, 14 * MIB, 0), (15 * MIB, MIB, 2)]),
    ("qemu:dirty-bitmap:b0", [(n * 65536, 65536, 1 - n % 2) for n in range(256)]),
])
def test_nbdinfo_maps_every_context(tmp_path: Path, context: str, rows: list[tuple[int, int, int]]) -> None:
    need("nbdinfo")
    path = tmp_path / "s"
    output = with_server(
        path, lambda: peers.run("nbdinfo", "--json", f"--map={context}", unix_uri(path)).stdout,
        Export("", disk(), bitmaps={"b0": Bitmap()}))
    assert [(row["offset"], row["length"], row["type"]) for row in json.loads(output)] == rows


def test_libnbd_uses_every_command_and_flag(tmp_path: Path) -> None:
    path = tmp_path / "s"
    storage = disk()
    script = f"""
h.add_meta_context("base:allocation")
h.connect_uri({unix_uri(path)!r})
assert h.get_structured_replies_negotiated()
h.pwrite(b"hello", 4095, nbd.CMD_FLAG_FUA)
assert h.pread(7, 4094)[1:6] == b"hello"
h.pwrite(b"Q" * (5 << 20), 8 << 20)
assert h.pread(5 << 20, 8 << 20) == b"Q" * (5 << 20)
got = []
h.pread_structured(2 << 20, 1, lambda data, offset, status, error: got.append((offset, len(data))),
                  nbd.CMD_FLAG_DF)
assert got == [(1, 2 << 20)], got
h.zero(100, 4000)
h.zero(100, 4000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(100, 4000) == bytes(100)
h.trim(65536, 65536, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
extents = []
h.block_status(16 << 20, 0, lambda context, offset, entries, error: extents.extend(entries))
assert extents == [1 << 20, 0, 14 << 20, 3, 1 << 20, 0], extents
h.block_status(8 << 20, 5, lambda context, offset, entries, error: extents.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert extents[-2:] == [(1 << 20) - 5, 0], extents
h.set_strict_mode(0)
end = (16 << 20) - 5
for call in (lambda: h.pread(10, end), lambda: h.pwrite(b"x" * 10, end), lambda: h.trim(1, 1, 64)):
    try:
        call()
    except nbd.Error as error:
        print(error.errno)
h.shutdown()
"""
    assert with_server(path, lambda: peers.nbdsh(script), Export("", storage)).split() == [
        "EINVAL", "ENOSPC", "EINVAL"]


@pytest.mark.parametrize("setting", ["h.set_request_structured_replies(False)", "h.set_handshake_flags(0)",
                                     "h.set_opt_mode(True)"])
def test_libnbd_without_the_newer_parts_of_the_protocol(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "s"
    script = f"""
{setting}
h.connect_uri({unix_uri(path)!r})
if "opt_mode" in {setting!r}:
    names = []
    h.opt_list(lambda name, description: names.append(name))
    assert names == [""], names
    h.opt_info()
    h.opt_go()
h.pwrite(b"hello" * 1000, 77)
print(h.pread(5000, 77) == b"hello" * 1000, h.get_size())
h.shutdown()
"""
    assert with_server(path, lambda: peers.nbdsh(script), Export("", disk())) == f"True {16 * MIB}\n"


def test_qemu_io_writes_and_reads(tmp_path: Path) -> None:
    need("qemu-io")
    path = tmp_path / "s"
    storage = disk()

    def client() -> str:
        commands = ["write -P 7 1000 3M", "read -P 7 1000 3M", "write -z 4M 1M", "read -P 0 4M 1M", "discard 8M 1M",
                    "write -f -P 9 9M 64k", "flush", "aio_write -P 1 0 64k", "aio_flush", "read -P 1 0 64k"]
        arguments = [part for command in commands for part in ("-c", command)]
        return peers.run("qemu-io", "-f", "raw", unix_uri(path), *arguments).stdout

    output = with_server(path, client, Export("", storage))
    assert "failed" not in output
    assert storage.data[1000:1000 + 100] == b"\1" * 100
    assert storage.data[100_000:100_100] == b"\7" * 100


def test_qemu_img_converts_from_and_to_us_and_sees_the_holes(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "s"
    source, target = disk(), Storage(16 * MIB)

    def client() -> list[dict[str, Any]]:
        peers.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", unix_uri(path, "a"), unix_uri(path, "b"))
        peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", unix_uri(path, "a"), unix_uri(path, "b"))
        mapped: list[dict[str, Any]] = json.loads(
            peers.run("qemu-img", "map", "--output=json", "-f", "raw", unix_uri(path, "a")).stdout)
        return mapped

    mapped = with_server(path, client, Export("a", source), Export("b", target))
    assert source.data == target.data
    assert [(row["length"], row["zero"]) for row in mapped] == [(MIB, False), (14 * MIB, True), (MIB, False)]


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_copies_over_several_connections(tmp_path: Path, connections: int) -> None:
    need("nbdcopy")
    path = tmp_path / "s"
    source, target = disk(), Storage(16 * MIB)
    with_server(path, lambda: peers.run("nbdcopy", f"--connections={connections}", "--flush", unix_uri(path, "a"),
                                        unix_uri(path, "b")), Export("a", source), Export("b", target))
    assert source.data == target.data
    assert sum(call[2] for call in source.calls if call[0] == "pread") < 3 * MIB  # the hole was not read


def test_fio_verifies_what_it_wrote(tmp_path: Path) -> None:
    need("fio")
    path = tmp_path / "s"

    def client() -> None:
        peers.run("fio", "--name=verify", "--ioengine=nbd", f"--uri={unix_uri(path)}", "--rw=randwrite",
                  "--bsrange=512-128k", "--blockalign=512", "--size=8M", "--iodepth=16", "--verify=crc32c",
                  "--verify_fatal=1", "--randseed=1", f"--aux-path={tmp_path}")

    with_server(path, client, Export("", disk()))


def test_qemu_io_and_nbdinfo_use_mutual_tls(tmp_path: Path) -> None:
    need("qemu-io", "nbdinfo")
    pki = certificates.make(tmp_path / "pki", "server", "client")
    port: list[int] = []

    def client() -> str:
        options = ["--object", f"tls-creds-x509,id=t,dir={pki},endpoint=client", "--image-opts",
                   f"driver=nbd,host=localhost,port={port[0]},export=disk,tls-creds=t"]
        written = peers.run("qemu-io", *options, "-c", "write -P 5 0 2M", "-c", "read -P 5 0 2M").stdout
        uri = f"nbds://localhost:{port[0]}/disk?tls-certificates={pki}"
        return written + peers.run("nbdinfo", uri).stdout

    output = with_server(tmp_path, client, Export("disk", disk()), pki=pki, tls="required", tcp=port)
    assert "failed" not in output
    assert "with TLS" in output


def test_without_tls_a_server_that_requires_it_says_so(tmp_path: Path) -> None:
    need("nbdinfo")
    pki = certificates.make(tmp_path / "pki", "server")
    path = tmp_path / "s"
    result = with_server(path, lambda: peers.run("nbdinfo", unix_uri(path), check=False), Export("", disk()),
                         pki=pki, tls="required")
    assert result.returncode != 0
    assert "nbd_opt_go" in result.stderr
    assert "Operation not supported" in result.stderr
