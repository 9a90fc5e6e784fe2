"""What a user can give wrong gets one line that names it, and changes nothing; never a traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockstep import cli
from blockstep.cli.control import find_socket, find_sockets
from blockstep.errors import BlockstepError, OptionError
from blockstep.testing.pair import environment

LONG = "9" * 5000
STANDBY = ("standby", "--disk", "d={image}", "--qmp", "{tmp}/qmp", "--socket", "{tmp}/view")
PRIMARY = ("primary", "--disk", "d={image}", "--qmp", "{tmp}/qmp", "--socket", "{tmp}/guest", "--standby")
EXPORT = ("export", "{image}")


@pytest.mark.parametrize(("arguments", "names", "says"), [
    ((*EXPORT, "--listen", f"127.0.0.1:{LONG}"), "--listen", "HOST:PORT"),
    ((*EXPORT, "--listen", ""), "--listen", "HOST:PORT"),
    (("primary", "--disk", "d={tmp}/none", "--standby", "localhost"), "{tmp}/none", "No such file"),
    (("primary", "--disk", "d={tmp}/none", "--standby", "localhost"), "made if its size is given", "=SIZE"),
    ((*EXPORT, "--listen", "a" * 70 + ":80"), "aaaa", "no host name"),
    ((*EXPORT, "--listen", "a..b:80"), "a..b", "no host name"),
    ((*EXPORT, "--socket", "{image}"), "{image}", "in use"),
    ((*EXPORT, "--socket", "{tmp}/" + "x" * 200), "xxxx", "107 bytes at most"),
    ((*EXPORT, "--tls", "required"), "--tls-certificates", "given with --tls required"),
    ((*EXPORT, "--tls", "required", "--tls-certificates", "{tmp}/none"), "'{tmp}/none'", "server-cert"),
    ((*EXPORT, "--format", "qcow2"), "'{image}'", "a qcow2 image that can be used"),
    ((*EXPORT, "--name", "\udcff"), "name", "UTF-8"),
    ((*EXPORT, "--name", "n" * 5000), "name", "4096 bytes"),
    ((*STANDBY, "--link", "127.0.0.1:65535"), "--link", "below 65535"),
    ((*STANDBY, "--pair", "../else/where"), "--pair", "letters"),
    ((*STANDBY, "--pair", ""), "--pair", "letters"),
    ((*STANDBY, "--pair", "*"), "--pair", "letters"),
    ((*STANDBY, "--disk", f"e={{tmp}}/new,size={LONG}"), "--disk size", "a size"),
    ((*STANDBY, "--disk", f"e={{tmp}}/new,size={'9' * 400}.5"), "--disk size", "a size"),
    ((*STANDBY, "--disk", "e={tmp}/new,size=1M,format=qed"), "--disk format", "raw, qcow2, overlay"),
    ((*STANDBY, "--disk", "e={tmp}/new,format=raw,format=qcow2"), "--disk", "at most once"),
    ((*STANDBY, "--disk", "e=,format=qcow2"), "--disk", "NAME=PATH"),
    ((*STANDBY, "--disk", "a/b={image}"), "--disk: 'a/b' is not valid", "letters"),
    ((*STANDBY, "--disk", "e={tmp}/new,fromat=qcow2,size=1M"), "without 'fromat'", "new,fromat=qcow2'"),
    ((*STANDBY, "--buffer-format", "qcow2"), "--buffer-format", "--buffer-dir"),
    ((*STANDBY, "--buffer-format", "qcow2", "--buffer-dir", "{tmp}/none"), "{tmp}/none", "a directory"),
    ((*STANDBY, "--buffer-memory", "0"), "--buffer-memory", "more than 0"),
    ((*PRIMARY, "127.0.0.1:65535"), "--standby", "below 65535"),
    ((*PRIMARY, "127.0.0.1", "--max-stall", "9ms"), "--max-stall", "10ms or more"),
    ((*PRIMARY, "127.0.0.1", "--max-stall", LONG), "--max-stall", "a time"),
    ((*PRIMARY, "127.0.0.1", "--queue", "0"), "--queue", "more than 0"),
    ((*PRIMARY, "127.0.0.1", "--tls", "{tmp}/none"), "--tls: '{tmp}/none'", "ca-cert.pem"),
    ((*PRIMARY, "127.0.0.1", "--export-tls", "{tmp}/none"), "--export-tls: '{tmp}/none'", "server-cert.pem"),
    ((*STANDBY, "--tls", "{tmp}/none"), "--tls: '{tmp}/none'", "server-cert.pem"),
    ((*STANDBY, "--export-tls", "{tmp}/none"), "--export-tls: '{tmp}/none'", "server-cert.pem"),
    (("graph", "--socket", "nowhere"), "nowhere", "the path of a socket that is there"),
    (("graph", "--socket", "{tmp}/none"), "{tmp}/none", "No such file"),
    (("graph", "--socket", "{image}"), "{image}", "refused"),
    (("graph", "--socket", f"127.0.0.1:{LONG}"), "--socket", "HOST:PORT"),
    (("graph", "--socket", "localhost:1", "--tls", "{tmp}/none"), "--tls: '{tmp}/none'", "ca-cert.pem"),
    (("shell", "--socket", "{tmp}/" + "x" * 200, "-c", "query-status"), "xxxx", "too long"),
])
def test_a_bad_value_is_one_line_that_names_it_and_changes_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...], names: str, says: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"data" * 128)

    def filled(text: str) -> str:
        return text.replace("{image}", str(image)).replace("{tmp}", str(tmp_path))

    monkeypatch.setattr("os.umask", lambda mask: 0)
    monkeypatch.setattr(sys, "argv", ["blockstep", *map(filled, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == cli.ERROR
    assert said.startswith("blockstep: ")
    assert said.count("\n") == 1
    assert len(said) < 700
    assert filled(names) in said
    assert says in said
    assert sorted(tmp_path.iterdir()) == [image]
    assert image.read_bytes() == b"data" * 128


def test_the_socket_of_a_program_that_was_killed_is_looked_at_only_if_there_is_no_other(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    dead, alive = tmp_path / "web.primary.qmp", tmp_path / "web.standby.qmp"
    with pytest.raises(BlockstepError, match=r"^no program of a pair 'web' has its control socket in"):
        find_socket("web", None, None)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(dead))
    assert find_socket("web", None, None) == dead
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(alive))
        listening.listen()
        assert find_sockets("web", None, None) == [alive]
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "db.primary.qmp"))
            other.listen()
            with pytest.raises(OptionError, match=r"PAIR.*db\.primary, web\.standby"):
                find_socket(None, None, None)


def test_both_sides_of_a_pair_in_one_place_are_told_apart_by_their_sockets(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        for number, sock in enumerate((one, two)):
            sock.bind(str(tmp_path / f"web.{('primary', 'standby')[number]}.qmp"))
            sock.listen()
        with pytest.raises(OptionError, match="--qmp"):
            find_socket("web", None, None)
        assert find_socket("web", "standby", None).name == "web.standby.qmp"


@pytest.mark.parametrize("pair", ["db", "*", "**", "web*", "", "/run/blockstep/web.1.standby.qmp", "web.1.standby"])
def test_a_pair_is_not_taken_for_another_one_whose_name_is_like_it(
        pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    with ExitStack() as stack:
        for name in ("db.1.primary", "web.1.standby", "db.qmp"):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(tmp_path / f"{name}.qmp"))
            sock.listen()
        with pytest.raises(BlockstepError, match=r"^no program of a pair"):
            find_sockets(pair, None, None)
        assert [path.name for path in find_sockets("db.1", None, None)] == ["db.1.primary.qmp"]
        assert [path.name for path in find_sockets(None, "standby", None)] == ["web.1.standby.qmp"]
        assert len(find_sockets(None, None, None)) == 2


def ended(redirection: str, *words: str) -> tuple[int, str]:
    """Exit code and standard error of a command whose standard output goes elsewhere."""
    done = subprocess.run(["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "blockstep", *words],
                          stderr=subprocess.PIPE, text=True, timeout=30, env=environment())
    return done.returncode, done.stderr


def test_help_that_was_not_asked_for_is_help_and_nothing_else() -> None:
    for words in ((), ("img",)):
        code, said = ended("", *words)
        assert code in (1, cli.ERROR)
        assert said.startswith("Usage: ")
        assert "(see --help)" not in said


def test_a_word_that_is_none_of_those_possible_is_named() -> None:
    assert ended("", "failover", "--to", "lates") == (
        cli.ERROR, "blockstep: Invalid value for '--to': 'lates' is not one of 'checkpoint', 'latest'. (see --help)\n")


def test_what_cannot_be_printed_is_one_line_and_an_exit_code() -> None:
    code, said = ended(">/dev/full", "--version")
    assert code == cli.ERROR
    assert said == "blockstep: No space left on device\n"


@pytest.mark.parametrize(("encoding", "printed"), [("utf-8:strict", "image \u2014 ".encode()), ("ascii", b"image ? ")])
def test_a_name_that_is_no_text_is_printed_as_the_bytes_that_it_is(
        encoding: str, printed: bytes, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + "/image \u2014 ".encode() + b"\xff"
    Path(os.fsdecode(name)).write_bytes(bytes(512))
    done = subprocess.run([sys.executable, "-m", "blockstep", "img", "info", "-f", "raw", name], capture_output=True,
                          timeout=30, env={**environment(), "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert printed + b"\xff\n" in done.stdout


@pytest.mark.parametrize("words", ["--version", "--help", "img map -f raw image", "img info -f raw image",
                                   "img convert -p -f raw -O raw image copy"])
def test_a_reader_that_has_gone_is_no_news(words: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run([sys.executable, "-m", "blockstep", *words.split()], stdout=pipe, stderr=subprocess.PIPE,
                              text=True, timeout=30, env=environment(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch,
                                                  capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "the server has gone")

    monkeypatch.setattr(sys, "argv", ["blockstep", "status"])
    monkeypatch.setattr(cli, "_carry_out", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.ERROR
    assert "the server has gone" in capfd.readouterr().err


def test_nobody_needs_standard_input_output_and_error(tmp_path: Path) -> None:
    assert ended(">&-", "--version") == (0, "")
    code, said = ended("<&- >&-", "shell", "--socket", str(tmp_path / "missing"))
    assert code == cli.ERROR
    assert said.startswith("blockstep: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_an_error_that_nobody_can_be_told_is_still_that_error(redirection: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert ended(redirection, "stop", "--qmp", missing) == (cli.ERROR, "")
    assert ended(redirection, "img", "info", missing) == (1, "")
    assert ended(redirection, "daemon", "--blockdev", f"file,node-name=n,filename={missing}") == (1, "")
    assert ended(redirection, "daemon", "--nonsense") == (1, "")
    assert ended(redirection, "status", "--nonsense") == (cli.ERROR, "")


#: Ctrl-C when the command line imports the module of that name.
INTERRUPTED = """
import os, signal, sys
from blockstep import cli
module = sys.argv.pop(1)
class Interrupt:
    def find_spec(name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
cli.main()
"""


@pytest.mark.parametrize("module", ["blockstep.streams", "blockstep.cli.export", "msgspec", "blockstep.daemon.export"])
def test_an_interrupt_while_modules_are_imported_ends_the_program_at_once(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, module, "export", "missing"], capture_output=True,
                          text=True, timeout=20, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
