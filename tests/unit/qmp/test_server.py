"""Real sockets: order, bounds, access, and the end."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import stat
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import PeerRefused
from blockstep.nbd.tls import client_context, server_context
from blockstep.qmp import monitor as monitors
from blockstep.qmp.client import open_connection
from blockstep.qmp.server import Server
from tests import certificates
from tests.unit.qmp.support import (
    REGISTRY,
    VERSION,
    Context,
    Peer,
    Progress,
    Tick,
    dial,
    hang_up,
    served,
    serving,
    until,
)


def test_the_first_words_are_those_of_qmp(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        assert (await peer.line())["QMP"]["version"]["package"] == "blockstep test"
        assert (await peer.ask({"execute": "echo"}))["error"]["class"] == "CommandNotFound"
        assert await peer.ask({"execute": "qmp_capabilities", "id": 1}) == {"return": {}, "id": 1}
        assert await peer.ask({"execute": "query-name", "id": "a"}) == {"return": {"name": "test"}, "id": "a"}
        assert (await peer.ask(b"nonsense\n"))["error"]["class"] == "GenericError"
        assert await peer.ask({"execute": "query-status"}) == {
            "return": {"running": True, "singlestep": False, "status": "running"}}
        assert (await peer.ask({"execute": "query-version"}))["return"]["qemu"]["major"] == 7
        names = [each["name"] for each in (await peer.ask({"execute": "query-commands"}))["return"]]
        assert names == sorted([*REGISTRY.commands, "qmp_capabilities"])
        peer.close()

    served(tmp_path, scenario)


def test_requests_are_answered_in_their_order_however_many_are_sent_ahead(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        for number in range(1000):
            peer.send({"execute": ("echo", "nonsense")[number % 7 == 0], "id": number,
                       "arguments": {"node-name": str(number)}})
        assert [(await peer.line())["id"] for _ in range(1000)] == list(range(1000))
        assert context.log == [str(number) for number in range(1000) if number % 7]
        peer.close()

    served(tmp_path, scenario)


def test_a_slow_command_delays_only_its_own_monitor(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        slow, quick = await dial(path), await dial(path)
        await slow.negotiate()
        await quick.negotiate()
        slow.send({"execute": "wait", "id": 1}, {"execute": "echo", "arguments": {"node-name": "after"}, "id": 2})
        await until(lambda: context.running)
        assert (await quick.ask({"execute": "query-name", "id": 9}))["id"] == 9
        assert context.log == []
        await quick.ask({"execute": "open"})
        assert [(await slow.line())["id"], (await slow.line())["id"]] == [1, 2]
        assert context.log == ["waited", "after"]
        slow.close()
        quick.close()

    served(tmp_path, scenario)


def test_out_of_band_overtakes_a_slow_command_of_its_own_monitor(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate("oob")
        peer.send({"execute": "wait", "id": 1}, {"execute": "query-name", "id": 2}, {"exec-oob": "open", "id": 3})
        answers = [(await peer.line())["id"] for _ in range(3)]
        assert sorted(answers) == [1, 2, 3]
        assert answers.index(1) < answers.index(2)
        peer.close()

    served(tmp_path, scenario)


def test_input_beyond_the_queue_stays_with_the_peer(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        peer.send({"execute": "wait"})
        request = json.dumps({"execute": "echo", "arguments": {"node-name": "a"}}).encode()
        count = (8 << 20) // len(request)
        peer.send(request * count)
        (connection,) = server.monitors
        await until(lambda: connection._reading_paused)
        assert len(connection._queue) <= monitors.QUEUE
        assert connection._session.buffered < 1 << 20
        context.gate.set()
        assert await peer.line() == {"return": {}}
        for _ in range(1000):
            assert "return" in await peer.line()
        peer.writer.transport.abort()
        peer.close()
        await until(lambda: not server.monitors)

    served(tmp_path, scenario)


def test_a_monitor_that_reads_no_answers_gets_no_further_ones(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        deaf, other = await dial(path), await dial(path)
        await deaf.negotiate()
        await other.negotiate()
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        size = 300_000
        deaf.send(*({"execute": "blob", "arguments": {"size": size}} for _ in range(100)))
        await until(lambda: any(not each._may_write.is_set() for each in server.monitors))
        for number in range(50):
            assert (await other.ask({"execute": "query-name", "id": number}))["id"] == number
        assert context.log.count(size) < 10
        assert all(each._transport.get_write_buffer_size() <= 2 * size for each in server.monitors)
        deaf.reader._transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(100):
            assert len((await deaf.line())["return"]) == size
        assert len(server.monitors) == 2
        deaf.close()
        other.close()

    served(tmp_path, scenario)


def test_a_monitor_that_reads_no_events_is_cut_off_and_others_get_all_of_them(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        deaf, other = await dial(path), await dial(path)
        await deaf.negotiate()
        await other.negotiate()
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        text = "x" * 10_000
        for count in range(1000):
            server.emit(Tick(count=count, text=text))
            assert (await other.line())["data"]["count"] == count
        assert server.cut_off == 1
        assert len(server.monitors) == 1
        deaf.close()
        other.close()

    served(tmp_path, scenario)


def test_events_come_in_order_between_the_answers_and_only_in_command_mode(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.line()
        server.emit(Tick(count=0))
        assert await peer.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        for count in range(1, 4):
            server.emit(Tick(count=count))
            event = await peer.line()
            assert (event["event"], event["data"]["count"]) == ("TICK", count)
            assert event["timestamp"] == {"seconds": 1, "microseconds": 500_000}
            assert "return" in await peer.ask({"execute": "query-name"})
        peer.close()

    async def run() -> None:
        server = Server(REGISTRY, Context(), version=VERSION, clock=lambda: 1_500_000_000)
        await server.start_unix(tmp_path / "qmp")
        await scenario(server, server.context, tmp_path / "qmp")
        await hang_up()
        await server.stop()

    asyncio.run(run())


def test_events_beyond_their_rate_come_later_and_only_the_newest(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        for offset in range(100):
            server.emit(Progress(device="a", offset=offset))
        server.emit(Progress(device="b", offset=0))
        found = [(await peer.line())["data"] for _ in range(3)]
        assert found == [{"device": "a", "offset": 0}, {"device": "b", "offset": 0}, {"device": "a", "offset": 99}]
        peer.close()

    served(tmp_path, scenario)


def test_a_thousand_connections_opened_and_dropped_leave_nothing(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        steady = await dial(path)
        await steady.negotiate()
        for number in range(1000):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            sock.send((b"", b'{"execute": "qmp_capabilities"}{"execute"', b"}", b"\xff" * 100)[number % 4])
            sock.close()
            if number % 50 == 0:
                assert "return" in await steady.ask({"execute": "query-name"})
        await until(lambda: len(server.monitors) == 1)
        assert "return" in await steady.ask({"execute": "query-name"})
        steady.close()
        await until(lambda: not server._tasks)

    served(tmp_path, scenario)


def test_one_monitor_too_many_is_told_so_and_a_place_that_is_free_again_is_given(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        first, second = await dial(path), await dial(path)
        await first.negotiate()
        await second.negotiate()
        third = await dial(path)
        assert (await third.line())["error"]["class"] == "GenericError"
        assert await third.at_end()
        third.close()
        with pytest.raises(PeerRefused, match=f"^{path}: this socket takes 2 monitors"):
            await open_connection(path)
        first.close()
        await until(lambda: len(server.monitors) == 1)
        fourth = await dial(path)
        await fourth.negotiate()
        for peer in (second, fourth):
            peer.close()

    served(tmp_path, scenario, max_monitors=2)


@pytest.mark.parametrize(("kind", "error_class"), [("node", "DeviceNotFound"), ("job", "DeviceNotActive"),
                                                   ("option", "GenericError"), ("os", "GenericError")])
def test_an_error_of_a_command_is_an_answer(tmp_path: Path, kind: str, error_class: str) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        answer = await peer.ask({"execute": "fail", "arguments": {"kind": kind}, "id": 1})
        assert (answer["error"]["class"], answer["id"]) == (error_class, 1)
        peer.close()

    served(tmp_path, scenario)


@pytest.mark.parametrize("kind", ["bug", "result"])
def test_a_bug_is_an_answer_and_is_reported(tmp_path: Path, kind: str) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, report: reports.append(report))
        peer = await dial(path)
        await peer.negotiate()
        answer = await peer.ask({"execute": "fail", "arguments": {"kind": kind}})
        assert answer["error"]["desc"].startswith("internal error")
        assert "'fail'" in reports[0]["message"]
        assert "return" in await peer.ask({"execute": "query-name"})
        peer.close()

    served(tmp_path, scenario)


def test_a_command_that_has_begun_ends_though_its_monitor_is_gone_and_what_is_queued_does_not_begin(
        tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        peer.send({"execute": "wait"}, {"execute": "echo", "arguments": {"node-name": "never"}})
        await until(lambda: context.running)
        peer.writer.transport.abort()
        peer.close()
        for _ in range(10):
            await asyncio.sleep(0)
        assert context.running == 1
        context.gate.set()
        await until(lambda: not server._tasks)
        assert context.log == ["waited"]

    served(tmp_path, scenario)


def test_a_peer_that_has_said_all_still_gets_its_answers(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        peer.send({"execute": "qmp_capabilities"}, {"execute": "wait"}, *({"execute": "query-name"},) * 20)
        peer.writer.write_eof()
        await until(lambda: context.running)
        context.gate.set()
        assert "QMP" in await peer.line()
        for _ in range(22):
            assert "return" in await peer.line()
        assert await peer.at_end()
        idle = await dial(path)
        idle.writer.write_eof()
        await idle.line()
        assert await idle.at_end()
        peer.close()
        idle.close()

    served(tmp_path, scenario)


def test_a_listener_offers_only_what_it_allows(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate("oob")
        assert (await peer.ask({"execute": "quit"}))["error"]["class"] == "CommandNotFound"
        assert (await peer.ask({"exec-oob": "open"}))["error"]["class"] == "CommandNotFound"
        assert "return" in await peer.ask({"execute": "query-name"})
        names = [each["name"] for each in (await peer.ask({"execute": "query-commands"}))["return"]]
        assert names == ["qmp_capabilities", "query-commands", "query-name"]
        assert context.quits == 0
        peer.close()

    served(tmp_path, scenario, allow=frozenset({"query-name", "query-commands"}))


def test_a_listener_for_people_lays_out_what_it_sends(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        assert (await peer.reader.readuntil(b"\r\n")).startswith(b'{\n    "QMP": {\n')
        peer.send(b'{"execute": "qmp_capabilities"}')
        assert json.loads(await peer.reader.readuntil(b"\r\n")) == {"return": {}}
        server.emit(Tick(count=1))
        assert b'"data": {\n        "count": 1,' in await peer.reader.readuntil(b"\r\n")
        peer.close()

    served(tmp_path, scenario, pretty=True)


def test_quit_is_answered_before_it_happens(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        assert await peer.ask({"execute": "quit", "id": 1}) == {"return": {}, "id": 1}
        assert context.quits == 1
        peer.close()

    served(tmp_path, scenario)


# -- events that the core reports


def test_what_the_core_reports_is_sent_as_the_event_that_is_declared(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        server.announce("TICK", {"count": 1})
        server.announce("PROGRESS", {"device": "d", "offset": 1})
        server.announce("PROGRESS", {"device": "d", "offset": 2})  # held back
        server.announce("TICK", {"count": 2, "text": "x"})
        seen = [await peer.line() for _ in range(3)]
        assert [(each["event"], each["data"]) for each in seen] == [
            ("TICK", {"count": 1, "text": ""}), ("PROGRESS", {"device": "d", "offset": 1}),
            ("TICK", {"count": 2, "text": "x"})]

    served(tmp_path, scenario)


@pytest.mark.parametrize(("name", "data"), [
    ("TOCK", {"count": 1}), ("TICK", {}), ("TICK", {"count": "1"}), ("TICK", {"count": 1, "more": 2})])
def test_an_event_that_is_not_as_declared_is_reported_as_a_bug_and_sent(
        tmp_path: Path, name: str, data: dict[str, Any]) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        bugs: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, report: bugs.append(report["message"]))
        peer = await dial(path)
        await peer.negotiate()
        server.announce(name, data)
        event = await peer.line()
        assert (event["event"], event.get("data", {})) == (name, data)
        assert len(bugs) == 1
        assert f"event '{name}'" in bugs[0]

    served(tmp_path, scenario)


# -- sockets


def test_a_unix_socket_is_for_its_owner_and_goes_with_the_server(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        await server.stop()
        assert not path.exists()

    served(tmp_path, scenario)


def test_a_socket_left_behind_is_replaced_one_in_use_and_a_file_are_not(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        dead = tmp_path / "dead"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(dead))
        await server.start_unix(dead)
        (await dial(dead)).close()
        (tmp_path / "file").write_text("precious")
        for taken in (path, tmp_path / "file"):
            with pytest.raises(OSError, match="in use"):
                await server.start_unix(taken)
        assert (tmp_path / "file").read_text() == "precious"
        (await dial(path)).close()

    served(tmp_path, scenario)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_takes_a_free_port_and_says_which(tmp_path: Path, host: str) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        listener = await server.start_tcp(host, 0, allow=frozenset({"query-name"}))
        assert isinstance(listener.address, tuple)
        assert listener.address[0] == host
        peer = await dial(listener.address)
        await peer.negotiate()
        assert server.monitors[0].peer.startswith(f"[{host}]:" if ":" in host else f"{host}:")
        peer.close()

    served(tmp_path, scenario)


def test_who_does_not_negotiate_takes_no_place_on_the_network_for_long(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "NEGOTIATION", 0.05)

    async def scenario(server: Server, context: Context, path: Path) -> None:
        listener = await server.start_tcp("127.0.0.1", 0, max_monitors=2)
        assert isinstance(listener.address, tuple)
        good = await dial(listener.address)
        await good.negotiate()
        silent = await dial(listener.address)
        assert "QMP" in await silent.line()
        assert await silent.at_end()
        another = await dial(listener.address)
        await another.negotiate()
        assert "return" in await good.ask({"execute": "query-name"})
        for peer in (good, silent, another):
            peer.close()

    served(tmp_path, scenario)


def test_who_is_gone_before_it_is_accepted_is_nobody(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, report: reports.append(report))
        listener = await server.start_tcp("127.0.0.1", 0)
        with socket.create_connection(listener.address) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        peer = await dial(listener.address)
        await peer.negotiate()
        assert len(server.monitors) == 1
        assert reports == []

    served(tmp_path, scenario)


def test_a_server_that_stops_does_not_wait_for_who_says_nothing_in_its_tls_handshake(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(REGISTRY, Context(), version=VERSION)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        listener = await server.start_tcp("127.0.0.1", 0, context)
        with socket.create_connection(listener.address) as sock:
            await until(lambda: server._tasks)
            begun = time.monotonic()
            await server.stop(grace=30)
            assert time.monotonic() - begun < 20
            assert sock.recv(1) == b""

    asyncio.run(main())


def test_a_stream_that_ends_under_tls_while_a_command_runs_is_no_line_on_standard_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pki = certificates.make(tmp_path / "pki", "server")

    async def scenario(server: Server, context: Context, path: Path) -> None:
        listener = await server.start_tcp("127.0.0.1", 0, server_context(pki))
        assert isinstance(listener.address, tuple)
        peer = Peer(*await asyncio.open_connection(*listener.address, ssl=client_context(pki),
                                                   server_hostname="localhost"))
        await peer.negotiate()
        peer.send({"execute": "wait"})
        await until(lambda: context.running)
        peer.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
        await until(lambda: not server.monitors)
        assert context.running
        peer.close()

    served(tmp_path, scenario)
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_an_unknown_command_in_the_allowed_ones_is_found_at_the_start(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        with pytest.raises(KeyError):
            await server.start_tcp("127.0.0.1", 0, allow=frozenset({"query-nme"}))

    served(tmp_path, scenario)


# -- the end


def test_stop_lets_commands_end_and_their_answers_go_out(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        peer = await dial(path)
        await peer.negotiate()
        peer.send({"execute": "wait", "id": 1}, {"execute": "query-name", "id": 2})
        await until(lambda: context.running)
        stopping = asyncio.ensure_future(server.stop(grace=30))
        await asyncio.sleep(0)
        context.gate.set()
        await stopping
        assert await peer.line() == {"return": {}, "id": 1}
        assert await peer.at_end()
        peer.close()

    served(tmp_path, scenario)


def test_stop_does_not_wait_for_ever(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        stuck, deaf = await dial(path), await dial(path)
        await stuck.negotiate()
        await deaf.negotiate()
        stuck.send({"execute": "wait"})
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        deaf.send(*({"execute": "blob", "arguments": {"size": 1_000_000}} for _ in range(3)))
        await until(lambda: context.running and len(context.log) > 0)
        await server.stop(grace=0.05)
        assert context.running == 0
        assert not server.monitors
        with pytest.raises(OSError):
            await dial(path)
        stuck.close()
        deaf.writer.transport.abort()
        deaf.close()

    served(tmp_path, scenario)


def test_a_server_that_is_stopped_twice_or_was_never_used_is_no_problem(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as (server, _, _):
            await server.stop()
        server.emit(Tick(count=1))
        await Server(REGISTRY, Context()).stop()

    asyncio.run(run())


def test_a_flood_of_malformed_input_does_not_hold_the_others(tmp_path: Path) -> None:
    async def scenario(server: Server, context: Context, path: Path) -> None:
        noisy, other = await dial(path), await dial(path)
        await noisy.negotiate()
        await other.negotiate()
        noisy.send(b"}" * (1 << 16))

        async def drain(peer: Peer) -> int:
            count = 0
            while count < 1 << 16:
                count += (await peer.reader.read(1 << 20)).count(b"\n")
            return count

        drained = asyncio.ensure_future(drain(noisy))
        asked = 0
        while not drained.done():
            assert "return" in await other.ask({"execute": "query-name"})
            asked += 1
        assert await drained == 1 << 16
        assert asked > 1000
        noisy.close()
        other.close()

    served(tmp_path, scenario)
