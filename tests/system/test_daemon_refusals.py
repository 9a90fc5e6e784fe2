"""What ``blockstep daemon`` refuses: one line names the option and says what would be right; nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstep.cli import daemon_line
from blockstep.testing.processes import run
from tests.peers import need

#: Seconds until a program has ended.
LIMIT = 20.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


#: The options; what the error names; what else it says.
WRONG: list[tuple[tuple[str, ...], str, str]] = [
    (("--nonsense",), "--nonsense", "--blockdev"),
    (("--qm",), "--qmp", "value"),
    (("nonsense",), "nonsense", "--help"),
    (("--blockdev",), "--blockdev", "value"),
    (("--blockdev", "nonsense,node-name=n"), "nonsense", "file"),
    (("--blockdev", "driver=null"), "node-name", "given"),
    (("--blockdev", "null,node-name=1n"), "node-name", "beginning with a letter"),
    (("--blockdev", "file,node-name=n"), "filename", ""),
    (("--blockdev", "driver=null,node-name="), "node-name", "beginning with a letter"),
    (("--blockdev", "raw,node-name=n,file.filename={image}"), " file.driver", "given: one of"),
    (("--blockdev", "quorum,node-name=n,vote-threshold=1,children.0.driver=raw,children.0.file.driver=file"),
     " children.0.file.filename", "given"),
    (("--blockdev", "null,node-name=b", "--blockdev", "overlay,node-name=n,backing.driver=overlay,backing.backing=b,"
      "backing.create=on,backing.filename={tmp}/image"), " backing.create", "read-only=off"),
    (("--blockdev", "file,node-name=n,filename={tmp}/missing"), "{tmp}/missing", "No such file"),
    (("--blockdev", "null,node-name=n,sise=1"), "sise", ""),
    (("--blockdev", "null,node-name=n,size=big"), "size", ""),
    (("--blockdev", "null,node-name=n,read-only=maybe"), "read-only", ""),
    (("--blockdev", "raw,node-name=n,file=m"), "'m'", ""),
    (("--blockdev", '{"driver": '), ": '{\"driver\": '", "JSON"),
    (("--blockdev", '{"driver": "null", "node-name": "n", "size": "1"}'), "size", "int"),
    (("--blockdev", "null,node-name=n,cache=1,cache.direct=on"), "cache", "one way"),
    (("--blockdev", "quorum,node-name=n,vote-threshold=1,children.0=a,children.2=b"), "children.1", "gap"),
    (("--blockdev", "null,node-name=n", "--blockdev", "null,node-name=n"), "node-name", "no other node"),
    (("--object", "secret,data=x"), "id", "given"),
    (("--object", "iothread,id=i"), "qom-type", "secret, throttle-group, tls-creds-x509"),
    (("--object", "secret,id=s"), "data", "given"),
    (("--object", "tls-creds-x509,id=t,dir={tmp}/none,endpoint=server"), "dir", "server-cert.pem"),
    (("--object", "throttle-group,id=t,x-iops-total=many"), "x-iops-total", "an integer"),
    (("--nbd-server", "addr.type=unix"), "addr.path", "given"),
    (("--nbd-server", "addr.type=inet,addr.host=localhost"), "addr.port", "given"),
    (("--nbd-server", "addr.type=tcp,addr.host=localhost"), "addr.type", "inet, unix, fd"),
    (("--nbd-server", "addr.type=unix,addr.path={tmp}/none/nbd"), "{tmp}/none/nbd", "No such file"),
    (("--nbd-server", "addr.type=unix,addr.path={tmp}/nbd,tls-creds=nobody"), "tls-creds", "tls-creds-x509"),
    (("--nbd-server", "addr.type=unix,addr.path={tmp}/nbd,tls-authz=nobody"), "tls-authz", "verify-peer"),
    (("--nbd-server", "max-connections=1"), "addr", "given"),
    (("--nbd-server", "addr.type=fd,addr.str=web"), "addr.str", "handed over"),
    (("--nbd-server", "addr.type=fd,addr.str=99999999999"), "addr.str", "handed over"),
    (("--nbd-server", "addr.type=inet,addr.host=localhost,addr.port=\N{SUPERSCRIPT TWO}"), "addr.port", "0 to 65535"),
    (("--nbd-server", "addr.type=unix,addr.path={tmp}/nbd", "--nbd-server", "addr.type=unix,addr.path={tmp}/nbd2"),
     "nbd2", "already"),
    (("--export", "nbd,id=e,node-name=n"), "n", ""),
    (("--export", "fuse,id=e,node-name=n,mountpoint={tmp}"), "type", "nbd"),
    (("--nbd-server", "addr.type=unix,addr.path={tmp}/nbd", "--blockdev", "null,node-name=n", "--export",
      "nbd,id=e,node-name=n,bitmap=b"), "bitmap", "bitmaps"),
    (("--nbd-server", "addr.type=unix,addr.path={tmp}/nbd", "--export", "nbd,id=e,node-name=n"), "node-name", "a node"),
    (("--chardev", "socket,path={tmp}/c,server=on,wait=off"), "id", "given"),
    (("--chardev", "pty,id=c"), "backend", "socket"),
    (("--chardev", "stdio,id=c,path=x"), "path", "signal"),
    (("--chardev", "socket,id=c,server=on,wait=off"), "path", "host"),
    (("--chardev", "socket,id=c,path={tmp}/c,host=h,port=1,server=on"), "path", "one of"),
    (("--chardev", "socket,id=c,host=localhost,server=on"), "port", "given"),
    (("--chardev", "socket,id=c,host=localhost,port=http,server=on"), "port", "0 to 65535"),
    (("--chardev", "socket,id=c,path={tmp}/c"), "connect", "No such file"),
    (("--chardev", "socket,id=c,path={image},server=off"), "connect", "refused"),
    (("--chardev", "socket,id=c,path={tmp}/c,wait=on"), "wait", "server=on"),
    (("--chardev", "socket,id=c,path={tmp}/c,server=off,tls-creds=t"), "tls-creds", "server=on"),
    (("--chardev", "socket,id=c,path={tmp}/c,server=on,wait=later"), "wait", "on or off"),
    (("--chardev", "socket,id=c,path={tmp}/c,server=on,wait=off,waitt=off"), "waitt", "'wait'"),
    (("--chardev", "socket,id=c,path={tmp}/c,server=on,wait=off,tls-creds=t"), "tls-creds", "TCP"),
    (("--chardev", "socket,id=c,host=127.0.0.1,port=0,server=on,wait=off,tls-creds=t"), "tls-creds", "tls-creds-x509"),
    (("--chardev", "socket,id=c,path={tmp}/none/c,server=on,wait=off"), "{tmp}/none/c", "No such file"),
    (("--chardev", "socket,id=c,path={image},server=on,wait=off"), "{image}", "in use"),
    (("--chardev", "socket,id=c,path={tmp}/c,server=on,wait=off",
      "--chardev", "socket,id=c,path={tmp}/d,server=on,wait=off"), "id", "no other"),
    (("--monitor", "c"), "chardev", "--chardev"),
    (("--chardev", "socket,id=c,path={tmp}/c,server=on,wait=off", "--monitor", "c,mode=readline"), "mode", "control"),
    (("--chardev", "socket,id=c,path={tmp}/c,server=on,wait=off", "--monitor", "c", "--monitor", "c"),
     "chardev", "no other monitor"),
    (("--chardev", f"socket,id=c,path={{tmp}}/{'c' * 108},server=on,wait=off"), "ccc", "too long"),
    (("--qmp", "{tmp}/qmp"), "{tmp}/qmp", "unix:PATH"),
    (("--qmp", "unix:{tmp}/qmp,server=off"), "connect", "No such file"),
    (("--qmp", "tcp:localhost"), "tcp:localhost", "tcp:HOST:PORT"),
    (("--pidfile", "{tmp}/none/pid"), "{tmp}/none/pid", "No such file"),
    (("--daemonize=yes",), "--daemonize", "no value"),
    (("--trace", "x"), "--trace", "--pidfile"),
]


@pytest.mark.parametrize(("arguments", "names", "says"), WRONG,
                         ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_wrong_option_gets_one_line_and_leaves_nothing_behind(
        tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str], names: str, says: str,
        arguments: tuple[str, ...]) -> None:
    def filled(text: str) -> str:
        return text.replace("{tmp}", str(tmp_path)).replace("{image}", str(image))

    words = ["--qmp", f"unix:{tmp_path}/first", "--pidfile", f"{tmp_path}/pid", *map(filled, arguments)]
    assert daemon_line.main(words) == 1
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith("blockstep: ")
    assert said.count("\n") == 1
    assert filled(names) in said
    assert filled(says) in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


#: What QEMU takes, or has not: other kinds of objects and devices, --qmp, a file in the place of a socket (it removes
#: the file), and what it looks at only when it is used.
QEMU_TAKES = ("--qm", "--qmp", "--trace", "--daemonize=yes", "iothread,id=i", "pty,id=c", "stdio,id=c,path=x",
              "socket,id=c,server=on,wait=off", "socket,id=c,path={image},server=on,wait=off",
              "socket,id=c,host=localhost,port=http,server=on", "socket,id=c,path={tmp}/c,wait=on",
              "addr.type=unix,addr.path={tmp}/nbd,tls-authz=nobody")


@pytest.mark.interop
@pytest.mark.parametrize("arguments", [row[0] for row in WRONG if not {*row[0]} & {*QEMU_TAKES}], ids=" ".join)
def test_what_is_refused_is_refused_by_qemus_daemon_too(tmp_path: Path, image: Path,
                                                       arguments: tuple[str, ...]) -> None:
    need("qemu-storage-daemon")
    words = [word.replace("{tmp}", str(tmp_path)).replace("{image}", str(image)).replace("null,", "null-co,")
             for word in arguments]
    assert run("qemu-storage-daemon", *words, timeout=LIMIT, check=False).returncode == 1
