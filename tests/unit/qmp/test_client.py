"""The client: typed errors, a deadline on everything, events that end."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import socket
import ssl
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from qemu.qmp import Runstate

from blockstep.errors import ConnectionLost, ProtocolError
from blockstep.qmp import client as client_module
from blockstep.qmp.client import EventsLost, connect, open_connection
from blockstep.qmp.errors import CommandRefused
from blockstep.qmp.server import Server
from tests.unit.qmp.support import Context, Tick, served, until

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
GREETING = b'{"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": []}}\r\n'


def test_a_command_gives_its_result(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            assert qmp.connected
            assert qmp.greeting["version"]["package"] == "blockstep test"
            assert await qmp.execute("echo", {"node-name": "ab", "times": 2}) == {"node-name": "abab"}
            assert await qmp.execute("open", out_of_band=True) == {}
        assert not qmp.connected
        await until(lambda: not server.monitors)

    served(tmp_path, scenario)


def test_a_refusal_has_class_and_description_and_the_connection_goes_on(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            with pytest.raises(CommandRefused, match="no node named 'n0'") as caught:
                await qmp.execute("fail", {"kind": "node"})
            assert (caught.value.command, caught.value.error_class) == ("fail", "DeviceNotFound")
            with pytest.raises(CommandRefused) as caught:
                await qmp.execute("nonsense")
            assert caught.value.error_class == "CommandNotFound"
            assert await qmp.execute("query-name") == {"name": "test"}

    served(tmp_path, scenario)


def test_calls_overlap_and_find_their_answers(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            names = [str(number) for number in range(200)]
            answers = await asyncio.gather(*(qmp.execute("echo", {"node-name": name}) for name in names))
            assert [answer["node-name"] for answer in answers] == names

    served(tmp_path, scenario)


def test_a_missed_deadline_leaves_the_connection_usable(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            with pytest.raises(TimeoutError, match="no answer to 'wait'"):
                await qmp.execute("wait", timeout=0.05)
            context.gate.set()
            assert await qmp.execute("query-name") == {"name": "test"}

    served(tmp_path, scenario)


def test_a_lost_connection_ends_calls_events_and_later_calls(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            events = qmp.events()
            waiting = asyncio.ensure_future(qmp.execute("wait"))
            await until(lambda: context.running)
            server.emit(Tick(count=1))
            await asyncio.sleep(0)
            for monitor in server.monitors:
                monitor.close()
            with pytest.raises(ConnectionLost):
                await waiting
            assert (await anext(events))["data"]["count"] == 1
            for _ in range(2):
                with pytest.raises(ConnectionLost, match="the peer is gone"):
                    await anext(events)
            with pytest.raises(ConnectionLost):
                await qmp.execute("query-name")
            with pytest.raises(ConnectionLost):
                await anext(qmp.events())

    served(tmp_path, scenario)


def test_events_reach_each_subscriber_by_name_and_in_order(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            everything, none, ticks = qmp.events(), qmp.events("OTHER"), qmp.events("TICK", "TOCK")
            for count in range(100):
                server.emit(Tick(count=count))
            for events in (everything, ticks):
                assert [(await anext(events))["data"]["count"] for _ in range(100)] == list(range(100))
            assert set(qmp._subscriptions) == {everything, none, ticks}
            ticks.close()
            assert [event async for event in ticks] == []
            assert set(qmp._subscriptions) == {everything, none}
        assert [event async for event in everything] == []

    served(tmp_path, scenario)


def test_a_subscriber_that_does_not_keep_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "EVENT_QUEUE", 10)

    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            slow, quick = qmp.events(), qmp.events()
            for count in range(20):
                server.emit(Tick(count=count))
                assert (await anext(quick))["data"]["count"] == count
            counts = []
            with pytest.raises(EventsLost):
                while True:
                    counts.append((await anext(slow))["data"]["count"])
            assert counts == list(range(10))

    served(tmp_path, scenario)


def test_events_that_nobody_asked_for_take_no_memory(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        async with connect(path) as qmp:
            events = qmp.events()
            tracemalloc.start()
            for count in range(500):
                server.emit(Tick(count=count, text="x" * 20_000))
                await anext(events)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 2_000_000
            tracemalloc.stop()
            assert qmp._client.events.history == ()

    served(tmp_path, scenario)


def against(tmp_path: Path, handler: Handler, scenario: Callable[[Path], Awaitable[None]]) -> None:
    """Run ``scenario`` against a server that does what ``handler`` does."""

    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await handler(reader, writer)

    async def run() -> None:
        path = tmp_path / "fake"
        server = await asyncio.start_unix_server(handle, path)
        await scenario(path)
        server.close()
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    asyncio.run(run())


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


def test_a_server_that_never_greets_is_a_time_out(tmp_path: Path) -> None:
    async def scenario(path: Path) -> None:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="no connection within"):
            async with connect(path, timeout=0.05):
                pass
        assert time.monotonic() - started < 5

    against(tmp_path, silent, scenario)


def test_a_server_that_stops_in_the_middle_cannot_hold_calls_nor_close(tmp_path: Path) -> None:
    async def stopping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readuntil(b"}")
        writer.write(b'{"return": {}}\r\n')
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await writer.wait_closed()

    async def scenario(path: Path) -> None:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            async with connect(path, timeout=0.1) as qmp:
                await qmp.execute("x", {"much": "x" * 4_000_000})
        assert time.monotonic() - started < 5

    against(tmp_path, stopping, scenario)


@pytest.mark.parametrize(("said", "error"), [
    (b"SSH-2.0-OpenSSH_9.2\r\n", ProtocolError), (b'{"error": {}}\r\n', ProtocolError), (b"", ConnectionLost),
    (GREETING + b'{"error": {"class": "GenericError", "desc": "no"}}\r\n', ProtocolError)])
def test_a_peer_that_is_no_qmp_server_is_told_apart(tmp_path: Path, said: bytes, error: type[Exception]) -> None:
    async def saying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()
        await writer.wait_closed()

    async def scenario(path: Path) -> None:
        with pytest.raises(error):
            async with connect(path):
                pass

    against(tmp_path, saying, scenario)


def test_a_peer_that_hangs_up_as_soon_as_it_has_greeted_is_gone(tmp_path: Path) -> None:
    """Its end is there before its first answer has been looked at."""

    async def leaving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING + b'{"return": {}}\r\n')
        writer.write_eof()

    async def scenario(path: Path) -> None:
        with pytest.raises(ConnectionLost, match="the peer hung up after it had greeted"):
            async with connect(path):
                pass

    against(tmp_path, leaving, scenario)


def test_nobody_there_is_a_lost_connection_that_names_the_address(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ConnectionLost, match="nobody"):
            async with connect(tmp_path / "nobody"):
                pass

    asyncio.run(scenario())


def test_a_host_name_that_nobody_knows_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def scenario() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
        with pytest.raises(ConnectionLost, match=r"nohost:1: Name or service not known$"):
            async with connect(("nohost", 1)):
                pass

    asyncio.run(scenario())


def test_what_can_be_no_host_name_is_called_that() -> None:
    async def scenario() -> None:
        with pytest.raises(ConnectionLost, match=r"a\.\.b:1: it is no host name$"):
            async with connect(("a..b", 1)):
                pass

    asyncio.run(scenario())


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and its key, both in ``directory``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(key, hashes.SHA256()))
    (directory / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return directory / "cert.pem", directory / "key.pem"


def test_tls_over_tcp(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(cert, key)

    async def scenario(server: Server, context: Context, path: Path) -> None:
        listener = await server.start_tcp("localhost", 0, ours)
        assert isinstance(listener.address, tuple)
        address = ("localhost", listener.address[1])
        async with connect(address, ssl=ssl.create_default_context(cafile=str(cert))) as qmp:
            assert await qmp.execute("query-name") == {"name": "test"}
        with pytest.raises(ConnectionLost, match=f"localhost:{address[1]}: .*CERTIFICATE_VERIFY_FAILED.*self-signed"):
            async with connect(address, ssl=ssl.create_default_context()):
                pass
        plain = await server.start_tcp("localhost", 0)
        assert isinstance(plain.address, tuple)
        with pytest.raises(ConnectionLost, match="WRONG_VERSION_NUMBER"):
            async with connect(("localhost", plain.address[1]), ssl=ssl.create_default_context()):
                pass
        with pytest.raises(TimeoutError):  # each waits for the other's first word
            async with connect(address, timeout=0.2):
                pass
        await until(lambda: not server.monitors)

    served(tmp_path, scenario)


def test_a_peer_that_hangs_up_in_the_tls_handshake_is_said_to() -> None:
    async def scenario() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(1)  # the rest is left unread only as long as it is on its way
            await reader.read(65536)
            writer.close()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ConnectionLost, match=f":{port}: the peer hung up before it had greeted$"):
                async with connect(("127.0.0.1", port), ssl=ssl.create_default_context()):
                    pass

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("who", ["nobody", "aborts", "closes"])
def test_closing_over_tls_is_quiet_however_far_the_other_side_has_come_with_its_end(
    tmp_path: Path, who: str, turns: int
) -> None:
    """What the library does before it closes made asyncio's TLS transport log a traceback."""
    cert, key = certificate(tmp_path)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(cert, key)
    reported: list[object] = []

    async def scenario(server: Server, context: Context, path: Path) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: reported.append(what))
        listener = await server.start_tcp("localhost", 0, ours)
        assert isinstance(listener.address, tuple)
        async with connect(("localhost", listener.address[1]),
                           ssl=ssl.create_default_context(cafile=str(cert))) as qmp:
            asking = asyncio.create_task(qmp.execute("query-name"))
            for monitor in server.monitors:
                if who == "aborts":
                    monitor.abort()
                elif who == "closes":
                    monitor.close()
            for _ in range(turns):
                await asyncio.sleep(0)
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not server.monitors)

    served(tmp_path, scenario)
    assert reported == []


@pytest.mark.parametrize("turns", range(1, 8))
def test_a_close_that_is_cancelled_closes_all_the_same_and_is_quiet(tmp_path: Path, turns: int) -> None:
    reported: list[object] = []

    async def scenario(server: Server, context: Context, path: Path) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: reported.append(what))
        qmp = await open_connection(path)
        for monitor in server.monitors:
            monitor.abort()
        await qmp.ended(60)
        closing = asyncio.create_task(qmp.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert qmp._client.runstate is Runstate.IDLE
        gc.collect()

    served(tmp_path, scenario)
    assert reported == []
