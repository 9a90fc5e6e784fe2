"""TLS: the files, their errors, and connections that use it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import OptionError
from blockstep.nbd import constants as c
from blockstep.nbd.export import Export
from blockstep.nbd.server import ClientEvent, Server
from blockstep.nbd.tls import client_context, server_context
from tests import certificates
from tests.unit.nbd.storage import Storage, info, option_bytes


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.make(tmp_path_factory.mktemp("tls") / "pki", "server", "client")


def shown(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    """The serial number of the certificate that the server shows in a handshake. Raises ssl.SSLError of either side."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up, server_hostname="localhost")]
    for _ in range(6):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        ends[0].read(1)  # the last word on the client's certificate
    found = ends[1].getpeercert()
    assert found
    return str(found["serialNumber"])


def copy(source: Path, target: Path, *names: str) -> None:
    for name in names:
        (target / "new").write_bytes((source / name).read_bytes())
        (target / "new").replace(target / name)


def test_a_server_takes_renewed_files_with_the_next_handshake_once_they_fit_together(tmp_path: Path) -> None:
    old, new = (certificates.make(tmp_path / name, "server", "client") for name in ("old", "new"))
    files = tmp_path / "files"
    files.mkdir()
    copy(old, files, "ca-cert.pem", "server-cert.pem", "server-key.pem")
    server, before, after = server_context(files, verify_peer=True), client_context(old), client_context(new)
    first = shown(server, before)
    copy(new, files, "server-cert.pem")
    assert shown(server, before) == first
    (files / "server-key.pem").unlink()
    assert shown(server, before) == first
    copy(new, files, "server-key.pem", "ca-cert.pem")
    assert shown(server, after) != first
    with pytest.raises(ssl.SSLError):
        shown(server, before)


def test_a_client_of_an_authority_that_was_replaced_is_refused(tmp_path: Path) -> None:
    old, new = (certificates.make(tmp_path / name, "server", "client") for name in ("old", "new"))
    server, stranger = server_context(old, verify_peer=True), client_context(old)
    shown(server, stranger)
    stranger.load_verify_locations(new / "ca-cert.pem")  # it trusts the server, and not the other way round
    copy(new, old, "ca-cert.pem", "server-cert.pem", "server-key.pem")
    with pytest.raises(ssl.SSLError):
        shown(server, stranger)


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_a_missing_file_is_named(pki: Path, tmp_path: Path, name: str) -> None:
    for file in pki.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OptionError, match=name):
        server_context(tmp_path, verify_peer=True)


def test_a_broken_file_is_named(pki: Path, tmp_path: Path) -> None:
    for file in pki.iterdir():
        (tmp_path / file.name).write_bytes(b"junk")
    with pytest.raises(OptionError, match=r"ca-cert\.pem"):
        client_context(tmp_path)
    with pytest.raises(OptionError, match=r"server-cert\.pem"):
        server_context(tmp_path)


def test_tls_needs_certificates() -> None:
    async def main() -> None:
        with pytest.raises(OptionError, match="certificates"):
            Server(tls="required")

    asyncio.run(main())


async def exchange(sock: socket.socket, context: ssl.SSLContext) -> bytes:
    """STARTTLS, GO, write 3 MiB, read them back, disconnect; by a blocking client in a thread."""
    def blocking() -> bytes:
        sock.settimeout(10)
        assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
        sock.sendall(struct.pack(">I", 3) + option_bytes(c.OPT_STARTTLS))
        assert sock.recv(20, socket.MSG_WAITALL)[12:16] == b"\0\0\0\1"
        with context.wrap_socket(sock, server_hostname="localhost") as tls, tls.makefile("rwb") as file:
            file.write(option_bytes(c.OPT_GO, info("")))
            file.flush()
            assert len(file.read(20 + 12 + 20)) == 52
            data = bytes(range(256)) * (3 << 12)
            for request in (struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, 1, 1, 5, len(data)) + data,
                            struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, 0, 2, 5, len(data))):
                file.write(request)
                file.flush()
                assert file.read(16) is not None
            back = file.read(len(data))
            file.write(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, 2, 3, 0, 0))
            file.flush()
            assert file.read(1) == b""
            assert back == data
            return bytes(back)

    return await asyncio.to_thread(blocking)


def serve(pki: Path, client: ssl.SSLContext, verify_peer: bool) -> tuple[bytes | BaseException, list[ClientEvent]]:
    events: list[ClientEvent] = []

    async def main() -> Any:
        server = Server(tls="required", tls_context=server_context(pki, verify_peer), on_client=events.append)
        server.add(Export("", Storage(8 << 20)))
        ours, theirs = socket.socketpair()
        server.serve(theirs)
        with ours:
            try:
                return await exchange(ours, client)
            except (OSError, AssertionError) as error:
                return error
            finally:
                await server.stop(1)

    return asyncio.run(main()), events


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_megabytes_pass_over_mutual_tls_and_it_ends_in_good_order(pki: Path, version: ssl.TLSVersion) -> None:
    context = client_context(pki)
    context.maximum_version = version
    result, events = serve(pki, context, verify_peer=True)
    assert isinstance(result, bytes)
    assert [event.what for event in events] == ["connected", "ready", "gone"]
    assert events[-1].error is None


def test_a_client_without_a_certificate_is_refused(pki: Path, tmp_path: Path) -> None:
    (tmp_path / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    result, events = serve(pki, client_context(tmp_path), verify_peer=True)
    assert not isinstance(result, bytes)
    assert isinstance(events[-1].error, ssl.SSLError)


def test_a_certificate_of_another_ca_is_refused(pki: Path, tmp_path: Path) -> None:
    other = certificates.make(tmp_path / "other", "client")
    (other / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    result, events = serve(pki, client_context(other), verify_peer=True)
    assert not isinstance(result, bytes)
    assert isinstance(events[-1].error, ssl.SSLError)
