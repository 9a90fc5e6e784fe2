"""``blockstep daemon`` as a process: every option, what is refused, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.registry import driver_names, find_driver
from blockstep.nbd.client import Client
from blockstep.nbd.dial import ClientTls
from blockstep.nbd.tls import client_context
from blockstep.nbd.uri import InetAddress, UnixAddress
from blockstep.qmp.client import connect
from blockstep.testing.pair import environment
from blockstep.testing.processes import QMP, Address, blockstep, free_ports, run, started
from blockstep.units import KiB, MiB
from tests import certificates
from tests.peers import need
from tests.scenarios import scenario

#: Seconds until what has to happen has happened.
LIMIT = 20.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(64 * KiB) + bytes(MiB - 64 * KiB))
    return path


@contextlib.contextmanager
def running(*arguments: str | Path, listens_on: tuple[Address, ...] = (),
            **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that lives as long as the block."""
    with started(blockstep("daemon", *arguments), *listens_on, env=environment(), **options) as process:
        yield process


def ended(process: subprocess.Popen[bytes]) -> int:
    return process.wait(LIMIT)


def failing(*arguments: str | Path) -> str:
    """What a daemon says that fails: one line, and exit code 1."""
    done = subprocess.run([*map(str, blockstep("daemon", *arguments))], capture_output=True, text=True, timeout=LIMIT,
                          env=environment(), stdin=subprocess.DEVNULL)
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("blockstep: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def file_node(image: Path, *more: str) -> tuple[str, str]:
    return "--blockdev", ",".join((f"driver=file,node-name=file,filename={image},discard=unmap", *more))


@scenario
async def test_nodes_are_exported_and_monitors_served_as_the_options_say(tmp_path: Path, image: Path) -> None:
    nbd, first, second = tmp_path / "nbd", tmp_path / "first.qmp", tmp_path / "second.qmp"
    with running(
            "--object", "throttle-group,id=slow,limits.iops-total=100000",
            "--object", json.dumps({"qom-type": "secret", "id": "word", "data": "x"}),
            *file_node(image),
            "--blockdev", json.dumps({"driver": "throttle", "node-name": "disk", "throttle-group": "slow",
                                      "file": {"driver": "raw", "file": "file"}}),
            "--blockdev=null,node-name=nothing,size=64k",
            "--nbd-server", f"addr.type=unix,addr.path={nbd},max-connections=2",
            "--export", "type=nbd,id=one,node-name=disk,name=web,,1,writable=on,description=The disk",
            "--export", json.dumps({"type": "nbd", "id": "two", "node-name": "nothing"}),
            "--chardev", f"socket,id=control,path={first},server=on,wait=off",
            "--monitor", "chardev=control,mode=control",
            "--qmp", f"unix:{second},pretty=on",
            "--name", "store", "--pidfile", tmp_path / "pid",
            listens_on=(nbd, first, second)) as process:
        with contextlib.closing(QMP(first)) as qmp:
            assert qmp.execute("query-name") == {"name": "store"}
            assert sorted(each["id"] for each in qmp.execute("query-block-exports")) == ["one", "two"]
        assert (first.stat().st_mode & 0o777, second.stat().st_mode & 0o777) == (0o600, 0o600)
        client = await Client.connect(UnixAddress(str(nbd)), "web,1")
        assert client.info.size == MiB
        assert bytes(await client.pread(0, 4096)) == image.read_bytes()[:4096]
        await client.pwrite(4096, b"written")
        await client.close()
        other = await Client.connect(UnixAddress(str(nbd)), "nothing")
        assert other.info.size == 64 * KiB
        await other.close()
        with socket.socket(socket.AF_UNIX) as pretty:
            pretty.connect(str(second))
            with pretty.makefile() as lines:
                assert lines.readline() == "{\n"
        assert int((tmp_path / "pid").read_text()) == process.pid
        process.terminate()
        assert ended(process) == 0
    assert image.read_bytes()[4096:].startswith(b"written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


def test_a_daemon_in_the_background_serves_when_its_parent_ends(tmp_path: Path, image: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    done = run(*blockstep("daemon", "--daemonize", *file_node(image), "--nbd-server", "addr.type=unix,addr.path=nbd",
                          "--export", "nbd,id=e,node-name=file", "--qmp", "unix:qmp", "--pidfile", "pid"))
    pid = int((tmp_path / "pid").read_text())
    life = os.pidfd_open(pid)
    try:
        assert (done.stdout, done.stderr) == ("", "")
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
        assert os.getsid(pid) != os.getsid(0)
        with contextlib.closing(QMP(tmp_path / "qmp")) as qmp:
            [export] = qmp.execute("query-block-exports")
            assert export["node-name"] == "file"
            qmp.execute("quit")
        assert select.select([life], [], [], LIMIT)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(life, signal.SIGKILL)
        os.close(life)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


def test_a_daemon_in_the_background_needs_no_standard_streams_to_begin_with(tmp_path: Path, image: Path) -> None:
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(started(
            [*closed, *blockstep("daemon", "--daemonize", *file_node(image), "--qmp", f"unix:{tmp_path}/qmp",
                                 "--pidfile", tmp_path / "pid")], env=environment()))
        assert ended(process) == 0
        qmp = stack.enter_context(contextlib.closing(QMP(tmp_path / "qmp")))
        open_files = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/fd")
        fds = {}
        for link in open_files.iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                fds[int(link.name)] = os.readlink(link)
        qmp.execute("quit")
        with pytest.raises((EOFError, OSError)):
            qmp.execute("query-status")
    assert {fds[fd] for fd in (0, 1, 2)} == {"/dev/null"}
    assert str(image) in fds.values()


def test_a_daemon_that_cannot_serve_says_so_before_its_parent_ends(tmp_path: Path) -> None:
    said = failing("--daemonize", "--qmp", f"unix:{tmp_path}/qmp", "--pidfile", tmp_path / "pid",
                   "--blockdev", f"file,node-name=f,filename={tmp_path}/missing")
    assert f"{tmp_path}/missing" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.interop
@pytest.mark.parametrize("program", [["qemu-storage-daemon"], blockstep("daemon")], ids=["qemu", "blockstep"])
@scenario
async def test_one_command_line_starts_either_daemon(tmp_path: Path, image: Path, program: list[str | Path]) -> None:
    need("qemu-storage-daemon")
    folder = certificates.make(tmp_path / "pki", "server", "client")
    nbd, qmp = tmp_path / "nbd", tmp_path / "qmp"
    command = [
        *program, "--chardev", f"socket,id=control,path={qmp},server=on,wait=off", "--monitor",
        "chardev=control,pretty=off", "--object", f"tls-creds-x509,id=tls,endpoint=server,dir={folder},verify-peer=off",
        "--object", '{"qom-type": "throttle-group", "id": "group", "limits": {"bps-total": 1000000000}}',
        "--object", "secret,id=word,data=eA==,format=base64",
        "--blockdev", f"driver=file,node-name=file,filename={image},cache.direct=off,discard=unmap,locking=off",
        "--blockdev", '{"driver": "raw", "node-name": "raw", "file": "file", "read-only": false}',
        "--blockdev", "throttle,node-name=top,throttle-group=group,file=raw",
        "--blockdev", "null-co,node-name=zeroes,size=65536,read-zeroes=on",
        "--nbd-server", f"addr.type=unix,addr.path={nbd},tls-creds=tls,max-connections=3",
        "--export", "nbd,id=one,node-name=top,name=disk,writable=on,description=A disk",
        "--export", "type=nbd,id=two,node-name=zeroes", "--pidfile", tmp_path / "pid"]
    with started(command, nbd, env=environment()) as process:  # the monitor listens before it does
        async with connect(qmp) as monitor:
            assert int((tmp_path / "pid").read_text()) == process.pid  # nobody is answered before it is there
            exports = {each["id"]: each for each in await monitor.execute("query-block-exports")}
            assert exports == {
                "one": {"id": "one", "type": "nbd", "node-name": "top", "shutting-down": False},
                "two": {"id": "two", "type": "nbd", "node-name": "zeroes", "shutting-down": False}}
            tls = ClientTls(client_context(folder), "localhost")
            client = await Client.connect(UnixAddress(str(nbd)), "disk", tls=tls)
            assert client.info.size == MiB
            assert bytes(await client.pread(0, 4096)) == image.read_bytes()[:4096]
            await client.pwrite(0, b"written")
            await client.close()
            zeroes = await Client.connect(UnixAddress(str(nbd)), "zeroes", tls=tls)
            assert bytes(await zeroes.pread(0, 512)) == bytes(512)
            await zeroes.close()
            await monitor.execute("quit")
        assert await asyncio.to_thread(ended, process) == 0
    assert image.read_bytes().startswith(b"written")
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@scenario
async def test_a_signal_finishes_what_clients_have_sent(tmp_path: Path, image: Path, number: signal.Signals) -> None:
    nbd, qmp = tmp_path / "nbd", tmp_path / "qmp"
    with running(*file_node(image), "--blockdev", "throttle,node-name=slow,file=file,limits.iops-write=5",
                 "--nbd-server", f"addr.type=unix,addr.path={nbd}",
                 "--export", "nbd,id=e,node-name=slow,name=d,writable=on", "--qmp", f"unix:{qmp}",
                 listens_on=(nbd, qmp)) as process:
        async with connect(qmp) as monitor:
            client = await Client.connect(UnixAddress(str(nbd)), "d")
            writes = [asyncio.ensure_future(client.pwrite(index * 4096, b"%04d" % index)) for index in range(4)]
            await writes[0]  # all were sent together; the limit holds the others back
            shutdown = monitor.events("SHUTDOWN")
            process.send_signal(number)
            await asyncio.gather(*writes)
            assert (await anext(shutdown))["data"] == {"guest": False, "reason": "host-signal"}
        assert await asyncio.to_thread(ended, process) == 0
        await client.close()
    for index in range(4):
        assert image.read_bytes()[index * 4096:][:4] == b"%04d" % index


def activated(listeners: list[socket.socket], names: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """A daemon that gets two sockets as systemd hands them over."""
    # LISTEN_PID is the pid of the process itself: a shell knows it before it becomes blockstep.
    script = 'exec 3<&"$1" 4<&"$2"; export LISTEN_FDS=2 LISTEN_FDNAMES="$3" LISTEN_PID=$$; shift 3; exec "$@"'
    fds = [listener.fileno() for listener in listeners]
    words = [*map(str, fds), names, *map(str, blockstep("daemon", *arguments))]
    return subprocess.Popen(["bash", "-c", script, "-", *words], env=environment(), pass_fds=fds)


@scenario
async def test_sockets_of_systemd_are_served_by_number_and_by_name(tmp_path: Path, image: Path) -> None:
    listeners = []
    for name in ("nbd", "qmp"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name))
        listener.listen()
        listeners.append(listener)
    process = activated(listeners, "disks:control", *file_node(image), "--nbd-server", "addr.type=fd,addr.str=disks",
                        "--export", "nbd,id=e,node-name=file,name=d",
                        "--chardev", "socket,id=c,fd=control,server=on,wait=on", "--monitor", "c")
    try:
        async with connect(tmp_path / "qmp") as monitor:  # it waits in the listener's queue
            assert [each["id"] for each in await monitor.execute("query-block-exports")] == ["e"]
            client = await Client.connect(UnixAddress(str(tmp_path / "nbd")), "d")
            assert client.info.size == MiB
            await client.close()
            await monitor.execute("quit")
        assert await asyncio.to_thread(ended, process) == 0
        assert (tmp_path / "nbd").exists()  # it is systemd's
    finally:
        process.kill()
        process.wait()
        for listener in listeners:
            listener.close()


@scenario
async def test_an_nbd_server_without_an_address_takes_the_sockets_that_are_left(tmp_path: Path, image: Path) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    process = activated(listeners, ":control", *file_node(image),
                        "--chardev", "socket,id=c,fd=control,server=on,wait=off", "--monitor", "c",
                        "--nbd-server", "max-connections=9", "--export", "nbd,id=e,node-name=file")
    try:
        client = await Client.connect(InetAddress(*listeners[0].getsockname()), "file")
        assert client.info.size == MiB
        await client.close()
        async with connect(listeners[1].getsockname()) as monitor:
            await monitor.execute("query-status")
        process.terminate()
        assert await asyncio.to_thread(ended, process) == 0
    finally:
        process.kill()
        process.wait()
        for listener in listeners:
            listener.close()


def test_systemd_is_told_when_everything_is_served_and_when_it_ends(tmp_path: Path, image: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(LIMIT)
        command = blockstep("daemon", *file_node(image), "--qmp", f"unix:{tmp_path}/qmp")
        with started(command, env={**environment(), "NOTIFY_SOCKET": str(tmp_path / "notify")}) as process:
            assert told.recv(100) == b"READY=1"
            with contextlib.closing(QMP(tmp_path / "qmp")) as qmp:
                qmp.execute("query-status")
            process.terminate()
            assert told.recv(100) == b"STOPPING=1"
            assert ended(process) == 0


@scenario
async def test_monitors_over_tcp_speak_tls(tmp_path: Path) -> None:
    folder = certificates.make(tmp_path / "pki", "server", "client")
    port = free_ports(2)
    with running("--object", f"tls-creds-x509,id=tls,dir={folder},endpoint=server",
                 "--chardev", f"socket,id=c,host=127.0.0.1,port={port},server=on,wait=off,tls-creds=tls",
                 "--monitor", "c", "--qmp", f"tcp:127.0.0.1:{port + 1},tls-creds=tls",
                 listens_on=(("127.0.0.1", port), ("127.0.0.1", port + 1))):
        for each in (port, port + 1):
            async with connect(("127.0.0.1", each), ssl=client_context(folder)) as monitor:
                assert await monitor.execute("query-status")
            reader, writer = await asyncio.open_connection("127.0.0.1", each)  # without TLS
            writer.write(b'{"execute": "qmp_capabilities"}\n')
            with contextlib.suppress(ConnectionResetError):
                assert b"QMP" not in await reader.read()
            writer.close()
            with pytest.raises(OSError):  # without a certificate
                (folder / "client-key.pem").rename(folder / "key")
                (folder / "client-cert.pem").rename(folder / "cert")
                try:
                    async with connect(("127.0.0.1", each), ssl=client_context(folder)) as monitor:
                        await monitor.execute("query-status")
                finally:
                    (folder / "key").rename(folder / "client-key.pem")
                    (folder / "cert").rename(folder / "client-cert.pem")


@scenario
async def test_disks_over_tls_from_end_to_end(tmp_path: Path, image: Path) -> None:
    folder = certificates.make(tmp_path / "pki", "server", "client")
    port, nbd = free_ports(), tmp_path / "nbd"
    with running("--object", f"tls-creds-x509,id=tls,dir={folder},endpoint=server", *file_node(image),
                 "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=tls",
                 "--export", "nbd,id=e,node-name=file,name=d", listens_on=(("127.0.0.1", port),)):
        with running("--object", f"tls-creds-x509,id=tls,dir={folder},endpoint=client",
                     "--blockdev", f"nbd,node-name=far,server.type=inet,server.host=127.0.0.1,server.port={port},"
                     "export=d,tls-creds=tls,read-only=on",
                     "--nbd-server", f"addr.type=unix,addr.path={nbd}", "--export", "nbd,id=e,node-name=far",
                     listens_on=(nbd,)):
            client = await Client.connect(UnixAddress(str(nbd)), "far")
            assert bytes(await client.pread(0, 64 * KiB)) == image.read_bytes()[:64 * KiB]
            await client.close()
        client = await Client.connect(InetAddress("127.0.0.1", port), "d", tls=ClientTls(client_context(folder)))
        await client.close()


@scenario
async def test_monitors_do_not_disturb_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.qmp" for number in range(3)]
    words = [word for path in paths for word in ("--qmp", f"unix:{path}")]
    with running(*words, listens_on=tuple(paths)) as process:
        async with connect(paths[0]) as one, connect(paths[1]) as two, connect(paths[1]) as three:
            await one.execute("blockdev-add", {"driver": "null", "node-name": "disk"})
            for monitor in (two, three):
                with pytest.raises(Exception, match="disk"):
                    await monitor.execute("blockdev-add", {"driver": "null", "node-name": "disk"})
            ends = [monitor.events("SHUTDOWN") for monitor in (one, two, three)]
            await three.execute("quit")
            for events in ends:
                assert (await anext(events))["event"] == "SHUTDOWN"
        assert await asyncio.to_thread(ended, process) == 0
    assert list(tmp_path.iterdir()) == []


def test_with_wait_the_options_that_follow_wait_for_somebody_to_connect(tmp_path: Path) -> None:
    qmp, nbd = tmp_path / "qmp", tmp_path / "nbd"
    with running("--chardev", f"socket,id=c,path={qmp},server", "--monitor", "c",
                 "--nbd-server", f"addr.type=unix,addr.path={nbd}") as process:
        with socket.socket(socket.AF_UNIX) as sock:
            while True:  # `listens_on` would connect, and hang up
                with contextlib.suppress(OSError):
                    sock.connect(str(qmp))
                    break
                assert process.poll() is None
            with contextlib.closing(QMP(qmp)) as monitor:
                assert "data" not in monitor.execute("query-status")
                monitor.execute("quit")
        assert ended(process) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["--chardev path", "--chardev host", "--chardev fd", "--qmp"])
def test_without_server_a_monitor_is_connected_to_who_listens(tmp_path: Path, where: str) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server(("127.0.0.1", 0)) if where == "--chardev host" else socket.socket(socket.AF_UNIX))
        fds: tuple[int, ...] = ()
        if where == "--chardev host":
            words = f"host=127.0.0.1,port={listener.getsockname()[1]}"
        elif where == "--chardev fd":
            ours, theirs = (stack.enter_context(one) for one in socket.socketpair())
            words, fds = f"fd={theirs.fileno()}", (theirs.fileno(),)
        else:
            listener.bind(str(tmp_path / "manager"))
            listener.listen()
            words = f"path={tmp_path}/manager"
        arguments = ["--chardev", f"socket,id=c,{words}", "--monitor", "c"]
        if where == "--qmp":
            arguments = ["--qmp", f"unix:{tmp_path}/manager,server=off"]
        process = stack.enter_context(running(*arguments, pass_fds=fds))
        if where != "--chardev fd":
            listener.settimeout(LIMIT)
            ours = stack.enter_context(listener.accept()[0])
        ours.settimeout(LIMIT)
        lines = stack.enter_context(ours.makefile("rwb"))
        assert "QMP" in json.loads(lines.readline())
        for command in ("qmp_capabilities", "query-status", "quit"):
            lines.write(json.dumps({"execute": command}).encode() + b"\n")
            lines.flush()
            assert "return" in json.loads(lines.readline())
        assert json.loads(lines.readline())["event"] == "SHUTDOWN"
        assert ended(process) == 0


@pytest.mark.parametrize("arguments", [("--chardev", "stdio,id=c", "--monitor", "c"), ("--qmp", "stdio")], ids=" ".join)
def test_a_monitor_may_be_on_standard_input_and_output(arguments: tuple[str, ...]) -> None:
    commands = [json.dumps({"execute": name}) for name in ("qmp_capabilities", "query-status", "quit")]
    with started(blockstep("daemon", *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                 env=environment()) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("".join(commands).encode())
        process.stdin.flush()
        said = [json.loads(line) for line in process.stdout.read().splitlines()]
        assert ended(process) == 0
        process.stdin.close()
        process.stdout.close()
    assert [next(iter(each.keys() - {"timestamp", "data"})) for each in said] == [
        "QMP", "return", "return", "return", "event"]


def test_a_daemon_whose_standard_input_has_ended_lives_on(tmp_path: Path) -> None:
    with running("--qmp", "stdio", "--qmp", f"unix:{tmp_path}/qmp", listens_on=(tmp_path / "qmp",)) as process:
        with contextlib.closing(QMP(tmp_path / "qmp")) as qmp:
            qmp.execute("query-status")
            qmp.execute("quit")
        assert ended(process) == 0


def test_in_the_background_there_is_no_standard_input() -> None:
    assert "--daemonize" in failing("--daemonize", "--qmp", "stdio")


def test_a_daemon_that_waits_for_somebody_ends_at_a_signal(tmp_path: Path) -> None:
    with running("--chardev", f"socket,id=c,path={tmp_path}/qmp,server=on", "--pidfile", tmp_path / "pid") as process:
        while not (tmp_path / "qmp").exists():
            assert process.poll() is None
        process.terminate()
        assert ended(process) == 0
    assert list(tmp_path.iterdir()) == []


def test_clients_are_served_beyond_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    qmp = tmp_path / "qmp"
    few = ["sh", "-c", 'ulimit -Sn 32; exec "$@"', "sh"]
    with started([*few, *blockstep("daemon", "--qmp", f"unix:{qmp}")], qmp, env=environment()), \
            contextlib.ExitStack() as stack:
        for _ in range(50):
            monitor = stack.enter_context(contextlib.closing(QMP(qmp)))
        assert monitor.execute("query-status")


def test_a_pidfile_belongs_to_one_that_lives(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("999999\n")  # of one that was killed
    qmp = tmp_path / "qmp"
    with running("--qmp", f"unix:{qmp}", "--pidfile", tmp_path / "pid", listens_on=(qmp,)) as process:
        with contextlib.closing(QMP(qmp)) as monitor:
            monitor.execute("query-status")
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
        said = failing("--pidfile", tmp_path / "pid", "--qmp", f"unix:{tmp_path}/other")
        assert f"{tmp_path}/pid" in said
        assert not (tmp_path / "other").exists()
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"


def test_help_and_version_are_printed_and_nothing_is_done(tmp_path: Path) -> None:
    def says(*arguments: str | Path) -> str:
        done = subprocess.run([*map(str, blockstep("daemon", *arguments))], capture_output=True, text=True,
                              timeout=LIMIT, env=environment(), check=True)
        assert done.stderr == ""
        return done.stdout

    whole = says("--qmp", f"unix:{tmp_path}/qmp", "--help")
    for name in driver_names():
        if find_driver(name).__module__.startswith("blockstep.drivers."):  # other tests have drivers of their own
            assert f"--blockdev {name}:" in whole
    assert "--object tls-creds-x509:" in whole
    assert says("-V").startswith("blockstep daemon ")
    assert "filename=TEXT" in says("--blockdev", "driver=file,help")
    assert "throttle " in says("--blockdev", "help")
    assert "verify-peer=on|off" in says("--object", "tls-creds-x509,help")
    assert says("--object", "help") == "secret\nthrottle-group\ntls-creds-x509\n"
    assert "max-connections=N" in says("--nbd-server", "help")
    assert "writable=on|off" in says("--export", "nbd,help")
    assert "pretty=on|off" in says("--monitor", "help")
    assert "tls-creds=TEXT" in says("--chardev", "socket,help")
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_imports_nothing_of_other_commands() -> None:
    """It is what makes its start quick: typer and rich alone cost more than the protocol."""
    script = ("import sys, blockstep.cli.daemon_line, blockstep.daemon.startup, blockstep.drivers; "
              "blockstep.drivers.load(); "
              "print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    loaded = set(run("env", f"PYTHONPATH={environment()['PYTHONPATH']}", sys.executable, "-c", script).stdout.split())
    assert not loaded & {"typer", "click", "rich", "qemu", "argparse", "unittest"}


def test_a_disk_whose_file_was_moved_away_is_told_of_everywhere_and_its_replication_is_at_risk(
        tmp_path: Path, image: Path) -> None:
    path, elsewhere, err = tmp_path / "qmp", tmp_path / "elsewhere", tmp_path / "stderr"
    said = f"{image} was moved away: put it back before this program ends"
    with err.open("wb") as stderr, running(
            *file_node(image), "--blockdev", f"null,node-name=remote,size={MiB}",
            "--blockdev", "replication,node-name=filter,mode=primary,file=remote",
            "--blockdev", "quorum,node-name=disk,vote-threshold=1,read-pattern=fifo,"
                          "children.0=file,children.1=filter",
            "--qmp", f"unix:{path}", listens_on=(path,), stderr=stderr) as process:
        with contextlib.closing(QMP(path)) as qmp:
            qmp.execute("replication-start", mode="primary")
            status = blockstep("status", "--qmp", path)
            assert run(*status, check=False).returncode == 0
            image.rename(elsewhere)
            shown = run(*status, check=False)
            assert (shown.returncode, f"  at risk: disk 'filter': {said}" in shown.stdout) == (2, True)
            [fault] = [each["fault"] for each in qmp.execute("query-named-block-nodes") if "fault" in each]
            assert fault == said
            elsewhere.rename(image)
            assert run(*status, check=False).returncode == 0
            qmp.execute("query-status")
            assert [event["data"] for event in qmp.events if event["event"] == "BLOCK_STORAGE_FAULT"] == [
                {"node-name": "file", "reason": said}, {"node-name": "file", "reason": ""}]
            assert err.read_text() == f"blockstep: node 'file': {said}\n"
            image.unlink()
            qmp.execute("quit")
            assert ended(process) == 0
    assert f"node 'file': {image} was deleted: its data end with this program" in err.read_text()
