"""``blockstep img`` beside qemu-img: the same command lines, the same words, JSON and exit codes.

Where ours differ on purpose is in docs/images.md; here such lines have a test of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockstep import cli
from tests.peers import need

pytestmark = pytest.mark.interop


class Both:
    """The two programs in the same directory."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd, self._monkeypatch = capfd, monkeypatch

    def ours(self, *arguments: str | Path) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        self._capfd.readouterr()
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["blockstep", "img", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        out, err = self._capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    @staticmethod
    def theirs(*arguments: str | Path) -> tuple[int, str, str]:
        result = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, timeout=30)
        return result.returncode, result.stdout.decode(), result.stderr.decode()

    def same(self, *arguments: str | Path) -> str:
        """Both print and return the same. Returns what they print."""
        ours, theirs = self.ours(*arguments), self.theirs(*arguments)
        assert ours == theirs
        return ours[1]

    def json(self, *arguments: str | Path) -> tuple[Any, Any]:
        """What both print, read."""
        ours, theirs = self.ours(*arguments, "--output=json"), self.theirs(*arguments, "--output=json")
        assert (ours[0], theirs[0]) == (0, 0), (ours, theirs)
        return json.loads(ours[1]), json.loads(theirs[1])


@pytest.fixture
def both(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)
    return Both(capfd, monkeypatch)


def written(path: str, length: int, *parts: tuple[int, bytes]) -> None:
    with open(path, "wb") as file:
        file.truncate(length)
        for offset, data in parts:
            file.seek(offset)
            file.write(data)


@pytest.mark.parametrize("arguments", [
    ("a", "1M"), ("-f", "raw", "a", "1048576"), ("-f", "raw", "-o", "preallocation=falloc", "a", "64k"),
    ("-f", "raw", "-o", "preallocation=full", "a", "1M"), ("-q", "a", "1G"),
])
def test_create(both: Both, arguments: tuple[str, ...]) -> None:
    found = []
    for program in (both.ours, both.theirs):
        result = program("create", *arguments)
        about = Path("a").stat()
        found.append((result, about.st_size, about.st_blocks * 512 >= about.st_size))
        Path("a").unlink()
    assert found[0] == found[1]


@pytest.mark.parametrize("size", [0, 512, 10 << 20, 1000 << 10, 3 << 30, 1047552, 123457024])
def test_info_of_raw_images(both: Both, size: int) -> None:
    written("a", size)
    both.same("info", "-f", "raw", "a")
    ours, theirs = both.json("info", "-f", "raw", "a")
    assert ours == theirs


def test_info_looks_at_the_content_and_nothing_else_does(both: Both) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", "a", "1M"], check=True)
    both.same("info", "a")
    for command in (["map", "a"], ["compare", "a", "a"], ["convert", "a", "b"], ["resize", "a", "2M"]):
        code, _, said = both.ours(*command)
        assert code == (2 if command[0] == "compare" else 1)
        assert said.startswith("blockstep: -f: None is not valid; it should be given")


def test_map(both: Both) -> None:
    written("a", 1 << 20, (0, b"x" * 4096), (300 << 10, b"y" * 65536), ((1 << 20) - 4096, b"z"))
    both.same("map", "-f", "raw", "a")
    both.same("map", "--output=json", "-f", "raw", "a")
    both.same("map", "--output=json", "-f", "raw", "--start-offset=128k", "--max-length=256k", "a")


@pytest.mark.parametrize("options", [(), ("-s",), ("-q",), ("-q", "-s"), ("-T", "none"), ("-U",)])
@pytest.mark.parametrize(("one", "two"), [
    ((1 << 20, (4096, b"x")), (1 << 20, (4096, b"x"))),
    ((1 << 20, (4096, b"x")), (1 << 20, (4700, b"y"))),
    ((1 << 20, (4096, bytes(4096))), (1 << 20,)),
    ((1 << 20, (4096, b"x")), (2 << 20, (4096, b"x"))),
    ((1 << 20, (4096, b"x")), (2 << 20, (4096, b"x"), (1500000, b"y"))),
    ((2 << 20, (4096, b"x")), (1 << 20, (4096, b"z"))),
])
def test_compare(both: Both, options: tuple[str, ...], one: Any, two: Any) -> None:
    written("one", *one)
    written("two", *two)
    ours, theirs = ([program("compare", *options, "-f", "raw", "-F", "raw", "one", "two")
                     for program in (both.ours, both.theirs)])
    if "block status" in theirs[1]:  # ours says where the status differs
        assert (ours[0], "block status" in ours[1]) == (theirs[0], True)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("code", "arguments"), [
    (2, ("compare", "-f", "raw", "-F", "raw", "a", "none")), (1, ("compare", "-f", "raw", "a")),
    (1, ("info", "none")), (1, ("map", "-f", "raw", "none")), (1, ("create", "b")), (1, ("create", "b", "10Q")),
    (1, ("create", "-b", "a", "-F", "raw", "b", "1M")), (1, ("create", "-o", "bla=1", "b", "1M")),
    (1, ("create", "-f", "bla", "b", "1M")), (1, ("resize", "-f", "raw", "a", "512")),
    (1, ("resize", "-f", "raw", "a", "-4M")), (1, ("resize", "-f", "raw", "a", "bla")),
    (1, ("resize", "-f", "raw", "--preallocation=metadata", "a", "+1M")), (1, ("commit", "-f", "raw", "a")),
    (1, ("convert", "-f", "raw", "a")), (1, ("convert", "-f", "raw", "none", "b")),
    (1, ("convert", "-f", "raw", "-O", "bla", "a", "b")), (1, ("convert", "-f", "raw", "-n", "a", "b")),
    (1, ("convert", "-f", "raw", "-S", "511", "a", "b")), (1, ("convert", "--target-is-zero", "-f", "raw", "a", "b")),
    (1, ("map", "--output=xml", "-f", "raw", "a")), (1, ("bla",)), (1, ("map", "--bla", "a")),
])
def test_what_fails_does_so_with_the_same_code_and_leaves_the_image(both: Both, code: int,
                                                                    arguments: tuple[str, ...]) -> None:
    written("a", 1 << 20, (0, b"data"))
    before = Path("a").read_bytes()
    ours, theirs = both.ours(*arguments), both.theirs(*arguments)
    assert (ours[0], theirs[0]) == (code, code)
    assert ours[2].startswith("blockstep: ")
    assert ours[2].count("\n") == 1
    Path("b").unlink(missing_ok=True)
    assert [path.name for path in Path().iterdir()] == ["a"]
    assert Path("a").read_bytes() == before


@pytest.mark.parametrize("options", [(), ("-S", "0"), ("-C",), ("-m", "1", "-W"), ("-t", "none"), ("-S", "64k"),
                                     ("-o", "preallocation=falloc")])
def test_convert_raw_to_raw(both: Both, options: tuple[str, ...]) -> None:
    written("a", 3 << 20, (0, b"x" * 4096 + bytes(8192) + b"y" * 4096), (2 << 20, bytes(1 << 20)))
    base = ["convert", "-f", "raw", "-O", "raw", *options, "a"]
    both.theirs(*base, "theirs")
    assert both.ours(*base, "ours") == (0, "", "")
    assert Path("ours").read_bytes() == Path("a").read_bytes()
    if "falloc" not in str(options) and "-C" not in options:
        maps = [json.loads(both.theirs("map", "-f", "raw", "--output=json", name)[1]) for name in ("ours", "theirs")]
        assert maps[0] == maps[1]


def test_progress_is_shown_as_by_qemu_img(both: Both) -> None:
    written("a", 8 << 20, (0, b"x" * (8 << 20)))
    _, shown, _ = both.ours("convert", "-p", "-f", "raw", "a", "b")
    steps = shown.removesuffix("\n").split("\r")
    assert steps[0] == "    (0.00/100%)"
    assert steps[-2:] == ["    (100.00/100%)", ""]
    assert both.theirs("convert", "-p", "-f", "raw", "a", "b")[1].split("\r")[0] == steps[0]


@pytest.mark.parametrize("arguments", [("2M",), ("+1M",), ("--shrink", "-512k"), ("--shrink", "64k"), ("-q", "3M"),
                                       ("--preallocation=falloc", "+64k"), ("--preallocation=full", "+64k")])
def test_resize(both: Both, arguments: tuple[str, ...]) -> None:
    found = []
    for program in (both.ours, both.theirs):
        written("a", 1 << 20, (0, b"data"))
        found.append((program("resize", "-f", "raw", *arguments[:-1], "a", arguments[-1]), Path("a").read_bytes(),
                      Path("a").stat().st_blocks))
    assert found[0] == found[1]
