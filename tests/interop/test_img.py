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
        assert said.startswith("blockstep: -f should be given")


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


# --- qcow2 ---


@pytest.mark.parametrize("arguments", [
    ("a", "10M"), ("-o", "cluster_size=4k,refcount_bits=1", "a", "1G"), ("-o", "compat=0.10", "a", "3M"),
    ("-o", "lazy_refcounts=on,preallocation=metadata", "a", "2M"), ("-o", "preallocation=full", "a", "1M"),
    ("-b", "base", "-F", "qcow2", "a"), ("-b", "base", "-F", "qcow2", "a", "20M"),
    ("-u", "-b", "none", "-F", "raw", "a", "20M"), ("-q", "a", "0"),
])
def test_create_qcow2(both: Both, arguments: tuple[str, ...]) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "base", "5M"], check=True)
    found = []
    for program in (both.ours, both.theirs):
        result = program("create", "-f", "qcow2", *arguments)
        about = json.loads(both.theirs("info", "-U", "--output=json", "a")[1])
        del about["actual-size"]
        found.append((result, about, both.theirs("check", "a")[0]))
        Path("a").unlink()
    assert found[0] == found[1]


@pytest.fixture
def chain(both: Both) -> Both:
    """base <- sub/mid <- top, with data, zeroes and compressed clusters; and flat, which reads as top."""
    Path("sub").mkdir()
    for command in (
            ["qemu-img", "create", "-q", "-f", "qcow2", "base", "8M"],
            ["qemu-io", "-c", "write -P 1 0 1M", "-c", "write -z 2M 128k", "-c", "write -P 3 5M 64k", "base"],
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "../base", "-F", "qcow2", "sub/mid", "12M"],
            ["qemu-io", "-c", "write -P 2 512k 64k", "-c", "write -z 5M 64k", "-c", "write -P 5 9M 200k", "sub/mid"],
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "sub/mid", "-F", "qcow2", "top"],
            ["qemu-io", "-c", "write -P 7 0 64k", "-c", "write -P 8 11M 100", "top"],
            ["qemu-img", "convert", "-O", "raw", "top", "flat"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return both


def test_map_and_info_of_a_chain(chain: Both) -> None:
    for image in ("base", "sub/mid", "top"):
        chain.same("map", "-f", "qcow2", image)
        chain.same("map", "-f", "qcow2", "--output=json", image)
        chain.same("map", "-f", "qcow2", "--output=json", "--start-offset=100k", "--max-length=9M", image)
        chain.same("info", "-f", "qcow2", image)
        chain.same("info", image)
        chain.same("info", "--backing-chain", image)
        for more in ((), ("--backing-chain",)):
            ours, theirs = chain.json("info", *more, image)
            assert ours == theirs


def test_map_of_a_chain_with_a_short_image_between(both: Both) -> None:
    written("base", 3 << 20, (2 << 20, b"x" * 4096))
    both.theirs("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid", "1M")
    both.theirs("create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", "4M")
    both.theirs("create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "above", "5M")
    for image in ("top", "above"):
        assert both.json("map", "-f", "qcow2", image)[0] == both.json("map", "-f", "qcow2", image)[1]


def test_info_of_all_that_a_header_can_say(both: Both) -> None:
    for options in ("compat=0.10", "extended_l2=on,cluster_size=128k", "data_file=ext,data_file_raw=on",
                    "compression_type=zstd", "lazy_refcounts=on,refcount_bits=64"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "a", "5M"], check=True)
        if "0.10" not in options and "ext," not in options:
            subprocess.run(["qemu-img", "bitmap", "--add", "-g", "32k", "a", "b0"], check=True)
            subprocess.run(["qemu-img", "bitmap", "--add", "--disable", "a", "b1"], check=True)
        if "ext," not in options:
            subprocess.run(["qemu-img", "snapshot", "-c", "a snapshot", "a"], check=True)
        both.same("info", "a")
        ours, theirs = both.json("info", "a")
        assert ours == theirs
        for name in ("a", "ext"):
            Path(name).unlink(missing_ok=True)


def test_compare_over_formats(chain: Both) -> None:
    chain.same("compare", "-f", "qcow2", "-F", "raw", "top", "flat")
    chain.same("compare", "-f", "qcow2", "-F", "qcow2", "top", "sub/mid")
    chain.same("compare", "-f", "qcow2", "-F", "qcow2", "top", "base")
    chain.same("compare", "-s", "-f", "qcow2", "-F", "qcow2", "top", "top")


@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=4k"), ("-o", "compat=0.10"), ("-S", "0"), ("-m", "1")])
def test_convert_from_and_to_qcow2(chain: Both, options: tuple[str, ...]) -> None:
    assert chain.ours("convert", "-f", "qcow2", "-O", "qcow2", *options, "top", "new") == (0, "", "")
    assert chain.theirs("check", "new")[0] == 0
    assert chain.theirs("compare", "new", "flat")[0] == 0
    assert chain.ours("convert", "-f", "qcow2", "-O", "raw", "new", "back")[0] == 0
    assert Path("back").read_bytes() == Path("flat").read_bytes()
    chain.theirs("convert", "-O", "qcow2", *options, "top", "theirs")
    sizes = [json.loads(chain.theirs("check", "--output=json", name)[1]).get("allocated-clusters")
             for name in ("new", "theirs")]
    assert sizes[0] == sizes[1]


def test_commit(chain: Both) -> None:
    assert chain.same("commit", "-f", "qcow2", "top") == "Image committed.\n"
    assert chain.theirs("compare", "sub/mid", "flat")[0] == 0
    assert chain.ours("commit", "-q", "-f", "qcow2", "-d", "sub/mid") == (0, "", "")
    assert chain.theirs("compare", "base", "flat")[0] == 0
    for image in ("base", "sub/mid", "top"):
        assert chain.theirs("check", image)[0] == 0


def test_commit_empties_the_image_unless_it_shall_not_or_more_than_one_is_merged(chain: Both) -> None:
    def held(image: str) -> bool:
        return "allocated-clusters" in json.loads(chain.theirs("check", "--output=json", image)[1])

    assert chain.ours("commit", "-q", "-b", "base", "top")[0] == 0
    assert chain.theirs("compare", "base", "flat")[0] == 0
    assert held("top")
    assert chain.ours("commit", "-q", "-d", "top")[0] == 0
    assert held("top")
    assert chain.ours("commit", "-q", "top")[0] == 0
    assert not held("top")


@pytest.mark.parametrize("arguments", [("-b", "base", "-F", "qcow2"), ("-b", ""), ("-b", "other", "-F", "raw")])
def test_rebase_keeps_what_the_image_shows(chain: Both, arguments: tuple[str, ...]) -> None:
    written("other", 6 << 20, (0, b"\1" * (2 << 20)), (5 << 20, b"x"))
    assert chain.ours("rebase", "-f", "qcow2", *arguments, "top") == (0, "", "")
    assert chain.theirs("check", "top")[0] == 0
    assert chain.theirs("compare", "top", "flat")[0] == 0
    about = json.loads(chain.theirs("info", "--output=json", "top")[1])
    assert about.get("backing-filename", "") == arguments[1]
    assert about.get("backing-filename-format") == (arguments[3] if arguments[1] else None)


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=512"])
@pytest.mark.parametrize("below", [(), ("-b", "short", "-F", "raw")])
def test_rebase_hides_what_the_new_image_has_where_there_was_nothing(both: Both, options: str,
                                                                     below: tuple[str, ...]) -> None:
    written("new", (7 << 20) + 1024, (0, b"\7" * (7 << 20)), (7 << 20, b"\7" * 1024))
    written("short", (2 << 20) + 5 * 512, (0, b"\1" * (1 << 20)), (2 << 20, b"\2" * 2560))
    both.theirs("create", "-q", "-f", "qcow2", "-o", options, *below, "top", "8M")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 3100k 70k", "-c", "write -P 4 5M 512", "top"],
                   check=True, stdout=subprocess.DEVNULL)
    both.theirs("convert", "-f", "qcow2", "-O", "raw", "top", "flat")
    assert both.ours("rebase", "-b", "new", "-F", "raw", "top") == (0, "", "")
    for program in (both.ours, both.theirs):
        assert program("check", "-f", "qcow2", "top")[0] == 0
        assert program("compare", "-f", "qcow2", "-F", "raw", "top", "flat")[0] == 0


@pytest.mark.parametrize("arguments", [("-b", "top"), ("-b", "above"), ("-b", "./top")])
def test_an_image_is_not_its_own_backing_image(both: Both, arguments: tuple[str, ...]) -> None:
    both.theirs("create", "-q", "-f", "qcow2", "top", "1M")
    both.theirs("create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "above")
    before = Path("top").read_bytes()
    code, _, said = both.ours("rebase", "-F", "qcow2", *arguments, "top")
    assert (code, said[:13]) == (1, "blockstep: -b")
    assert Path("top").read_bytes() == before


def test_the_options_of_a_node_are_a_backing_image_wherever_the_new_one_is(chain: Both) -> None:
    base = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(Path("base").resolve())}})
    assert chain.ours("create", "-f", "qcow2", "-b", f"json:{base}", "-F", "qcow2", "sub/new")[0] == 0
    chain.same("compare", "-f", "qcow2", "-F", "qcow2", "base", "sub/new")


@pytest.mark.parametrize("arguments", [
    ("-b", "base", "-F", "qcow2", "base"), ("-u", "-b", "base", "-F", "qcow2", "base", "1M"),
    ("-b", "top", "-F", "qcow2", "base"),
    ("-b", "base", "-F", "qcow2", "-o", "data_file=base", "new.qcow2"),
    ("-b", "top", "-F", "qcow2", "-o", "data_file=base", "new.qcow2")])
def test_a_new_image_does_not_take_the_place_of_its_backing_image(chain: Both, arguments: tuple[str, ...]) -> None:
    before = Path("base").read_bytes()
    code, _, error = chain.ours("create", "-f", "qcow2", *arguments)
    assert (code, Path("base").read_bytes()) == (1, before)
    assert "another file" in error
    assert not Path("new.qcow2").exists()


def test_unsafe_rebase_changes_the_name_alone(chain: Both) -> None:
    before = chain.theirs("map", "--output=json", "sub/mid")[1]
    assert chain.ours("rebase", "-u", "-b", "/nowhere/base", "-F", "raw", "sub/mid") == (0, "", "")
    assert chain.json("info", "sub/mid")[0]["backing-filename"] == "/nowhere/base"
    assert chain.ours("rebase", "-u", "-b", "../base", "-F", "qcow2", "sub/mid")[0] == 0
    assert chain.theirs("map", "--output=json", "sub/mid")[1] == before


def damaged(name: str, corrupt: bool, leak: bool) -> None:
    """An image of 10 MiB with a leak, or a cluster that is in use and not counted."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", name, "10M"], check=True)
    subprocess.run(["qemu-io", "-c", "write 0 1M", name], check=True, stdout=subprocess.DEVNULL)
    with open(name, "r+b") as file:
        if leak:
            file.truncate(Path(name).stat().st_size + 65536)
        clusters = Path(name).stat().st_size // 65536
        file.seek(48)
        file.seek(int.from_bytes(file.read(8), "big"))
        block = int.from_bytes(file.read(8), "big")
        for cluster, count, wanted in ((6, 0, corrupt), (clusters - 1, 1, leak)):
            if wanted:
                file.seek(block + 2 * cluster)
                file.write(count.to_bytes(2, "big"))


@pytest.mark.parametrize(("corrupt", "leak", "code"), [(False, False, 0), (False, True, 3), (True, False, 2),
                                                      (True, True, 2)])
def test_check_and_repair(both: Both, corrupt: bool, leak: bool, code: int) -> None:
    damaged("a", corrupt, leak)
    ours, theirs = both.ours("check", "a"), both.theirs("check", "a")
    assert ours[:2] == theirs[:2]
    assert ours[0] == code
    ours, theirs = both.ours("check", "--output=json", "a"), both.theirs("check", "--output=json", "a")
    assert json.loads(ours[1]) == json.loads(theirs[1])
    assert both.ours("check", "-q", "a")[:2] == (code, "")
    assert both.ours("check", "--repair", "all", "a")[0] == 0
    assert both.theirs("check", "a")[0] == 0


def test_repair_of_leaks_leaves_corruptions_and_says_so(both: Both) -> None:
    damaged("a", True, True)
    code, out, _ = both.ours("check", "-r", "leaks", "--output=json", "a")
    result = json.loads(out)
    assert code == 2
    assert result["leaks-fixed"] == 1
    assert "leaks" not in result
    damaged("b", False, True)
    subprocess.run(["cp", "b", "c"], check=True)
    assert both.ours("check", "-r", "leaks", "b")[:2] == both.theirs("check", "-r", "leaks", "c")[:2]


def test_what_has_no_checks_says_so(both: Both) -> None:
    written("a", 4096)
    assert both.ours("check", "-f", "raw", "a")[0] == both.theirs("check", "-f", "raw", "a")[0] == 63
    assert both.ours("check", "a")[0] == 1


@pytest.mark.parametrize("arguments", [("+3M",), ("--shrink", "1M"), ("--preallocation=full", "+1M"),
                                       ("--preallocation=falloc", "+1M"), ("--preallocation=metadata", "+1M")])
def test_resize_qcow2(chain: Both, arguments: tuple[str, ...]) -> None:
    assert chain.ours("resize", "-q", "-f", "qcow2", *arguments[:-1], "base", arguments[-1]) == (0, "", "")
    assert chain.theirs("check", "base")[0] == 0


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10,cluster_size=512", "extended_l2=on", "data_file=DATA",
                                     "data_file=DATA,data_file_raw=on", "cluster_size=2M"])
@pytest.mark.parametrize("backed", [False, True])
def test_what_is_added_has_its_places(both: Both, mode: str, options: str, backed: bool) -> None:
    if backed and ("raw=on" in options or "0.10" in options):
        pytest.skip("a raw data file has no backing image, and version 2 does not grow over one in qemu-img")
    written("base", 7 << 20, *((offset, b"below") for offset in range(0, 7 << 20, 100_000)))
    found, options = [], options.replace("DATA", str(Path("data").absolute()))
    for program in (both.ours, both.theirs):
        for name in ("a", "data"):
            Path(name).unlink(missing_ok=True)
        words = ("-b", "base", "-F", "raw") if backed else ()
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, "a", "1000k"], check=True)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 990k 10k", "a"], check=True, capture_output=True)
        place = Path("data" if "data_file" in options else "a")
        before = place.stat().st_blocks * 512
        assert program("resize", "-q", "-f", "qcow2", f"--preallocation={mode}", "a", "5M") == (0, "", "")
        assert both.theirs("check", "-f", "qcow2", "a")[0] == 0
        check = json.loads(both.theirs("check", "--output=json", "-f", "qcow2", "a")[1])
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a", "plain"], check=True)
        assert (place.stat().st_blocks * 512 - before > 2 << 20) == (mode != "metadata")
        found.append((Path("plain").read_bytes(), check["allocated-clusters"]))
    assert found[0] == found[1]
    assert found[0][0][1000 << 10:] == bytes((5 << 20) - (1000 << 10))


def test_what_cannot_be_preallocated(both: Both) -> None:
    written("a", 4096)
    assert both.ours("resize", "-f", "raw", "--preallocation=metadata", "a", "8k")[0] == both.theirs(
        "resize", "-f", "raw", "--preallocation=metadata", "a", "8k")[0] == 1
    assert Path("a").stat().st_size == 4096
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "b", "1M"], check=True)
    for words in (("b", "1M"), ("--shrink", "b", "512k")):
        for program in (both.ours, both.theirs):
            assert program("resize", "-f", "qcow2", "--preallocation=falloc", *words)[0] == 1


def test_a_chain_that_loops_is_an_error_at_once(both: Both) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a", "1M"], check=True)
    assert both.ours("rebase", "-u", "-b", "a", "-F", "qcow2", "a")[0] == 0
    assert both.ours("info", "a")[0] == 0
    for command in (("info", "--backing-chain", "a"), ("map", "-f", "qcow2", "a"), ("commit", "a"),
                    ("convert", "-f", "qcow2", "a", "b")):
        code, _, said = both.ours(*command)
        assert code == 1
        assert "loop" in said
    assert [path.name for path in Path().iterdir()] == ["a"]


# --- what is inside ---


def reads(image: str, pattern: int) -> bool:
    """Whether its first MiB is of that byte, as QEMU reads it."""
    result = subprocess.run(["qemu-io", "-r", "-c", f"read -P {pattern} 0 1M", image], capture_output=True, text=True)
    return result.returncode == 0 and "failed" not in result.stdout


def test_snapshots(both: Both) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a", "10M"], check=True)
    for number, program in enumerate((both.ours, both.theirs, both.ours), 1):
        subprocess.run(["qemu-io", "-c", f"write -P {number} 0 1M", "a"], check=True, stdout=subprocess.DEVNULL)
        assert program("snapshot", "-c", f"s{number}", "a") == (0, "", "")
    ours, theirs = both.ours("snapshot", "-l", "a"), both.theirs("snapshot", "-l", "a")
    assert [line.rstrip(" 0") for line in ours[1].split("\n")] == [line.rstrip(" 0") for line in theirs[1].split("\n")]
    assert both.ours("snapshot", "a") == ours
    for number, program in ((1, both.ours), (2, both.theirs), (3, both.ours), (2, both.ours)):
        assert program("snapshot", "-a", f"s{number}", "a") == (0, "", "")
        assert reads("a", number)
        assert both.theirs("check", "a")[0] == 0
    for number, program in ((2, both.ours), (1, both.theirs), (3, both.ours)):
        assert program("snapshot", "-d", f"s{number}", "a") == (0, "", "")
        assert reads("a", 2)
        assert both.theirs("check", "a")[0] == 0
    assert both.ours("snapshot", "-l", "a") == both.theirs("snapshot", "-l", "a") == (0, "", "")
    for arguments in (("-a", "none"), ("-d", "none"), ("-l", "-c", "x")):
        assert both.ours("snapshot", *arguments, "a")[0] == both.theirs("snapshot", *arguments, "a")[0] == 1


def test_bitmaps(both: Both) -> None:
    found = []
    for name, program in (("a", both.ours), ("b", both.theirs)):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", name, "10M"], check=True)
        steps = [program("bitmap", *arguments) for arguments in (
            ("--add", name, "b0"), ("--add", "-g", "32k", "--disable", name, "b1"), ("--add", name, "gone"),
            ("--add", name, "b0"), ("--remove", name, "gone"), ("--remove", name, "gone"),
            ("--merge", "b1", "--disable", name, "b0"), ("--enable", "--clear", name, "b1"),
            ("--merge", "none", name, "b0"), (name, "b0"), ("-g", "100", "--add", name, "x"))]
        assert both.theirs("check", name)[0] == 0
        about = json.loads(both.theirs("info", "--output=json", name)[1])
        found.append(([(code, out) for code, out, _ in steps], about["format-specific"]))
    assert found[0] == found[1]


def test_what_is_dirty_is_merged_and_copied(both: Both) -> None:
    def dirty(image: str, bitmap: str) -> list[tuple[int, int]]:
        from blockstep.drivers.qcow2.bitmaps import load

        data = Path(image).read_bytes()
        found = next(one for one in load(lambda offset, length: data[offset:offset + length], len(data))
                     if one.name == bitmap)
        assert found.bitmap is not None
        return list(found.bitmap.dirty())

    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a", "10M"], check=True)
    both.theirs("bitmap", "--add", "a", "b0")
    subprocess.run(["qemu-io", "-c", "write 1M 64k", "-c", "write 5M 1k", "a"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "b", "10M"], check=True)
    assert both.ours("bitmap", "--add", "-g", "4k", "--merge", "b0", "-b", "a", "-F", "qcow2", "b", "b1")[0] == 0
    expected = [(1 << 20, 65536), (5 << 20, 65536)]
    assert dirty("a", "b0") == dirty("b", "b1") == expected
    assert both.ours("convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", "a", "c") == (0, "", "")
    assert dirty("c", "b0") == expected
    assert both.theirs("check", "c")[0] == 0
    assert both.ours("bitmap", "--clear", "c", "b0")[0] == 0
    assert dirty("c", "b0") == []


def test_bitmaps_are_copied_beside_those_that_the_target_has(both: Both) -> None:
    found = []
    for name, program in (("a", both.ours), ("b", both.theirs)):
        for image, bitmap in (("source", "one"), (name, "two")):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
            subprocess.run(["qemu-img", "bitmap", "--add", image, bitmap], check=True)
        for _ in range(2):  # the second time there is one of that name
            code, _, error = program("convert", "-n", "--bitmaps", "-f", "qcow2", "-O", "qcow2", "source", name)
            names = {one["name"] for one in json.loads(both.theirs("info", "--output=json", name)[1])
                     ["format-specific"]["data"]["bitmaps"]}
            found.append((code, names, "already exists: one" in error))
    assert found[:2] == found[2:] == [(0, {"one", "two"}, False), (1, {"one", "two"}, True)]
