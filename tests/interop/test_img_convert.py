"""``blockstep img convert`` beside qemu-img: compressed, over a backing image, from a snapshot, from a broken disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.interop import test_img
from tests.interop.test_img import Both, written
from tests.peers import run

pytestmark = pytest.mark.interop
both = test_img.both

KIB = 1024


def disk(path: str, length: int = (5 << 20) + 300 * KIB) -> bytes:
    """Text, noise, zeroes and holes."""
    rnd = random.Random(length)
    text = b"".join(b"%d sheep, " % number for number in range(40_000))
    written(path, length, (10_000, text), (1 << 20, rnd.randbytes(200_000)), (2 << 20, bytes(300_000)),
            (3 << 20, b"x" * 512), (length - 1000, b"the end"))
    return Path(path).read_bytes()


def figures(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "check", "-f", "qcow2", "--output=json", path).stdout)
    return found


@pytest.mark.parametrize("options", [
    "compat=1.1", "compat=0.10", "compression_type=zstd", "cluster_size=2M", "cluster_size=512",
    "cluster_size=4k,compression_type=zstd", "refcount_bits=1"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_compressed(both: Both, options: str, kind: str) -> None:
    data = disk("a")
    if kind == "qcow2":
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "a", "a.qcow2")
    source = ["-f", kind, "a" if kind == "raw" else "a.qcow2"]
    for program, target in ((both.ours, "ours"), (both.theirs, "theirs")):
        assert program("convert", "-c", "-O", "qcow2", "-o", options, *source, target) == (0, "", "")
    ours, theirs = figures("ours"), figures("theirs")
    assert ours.get("compressed-clusters", 0) == theirs["compressed-clusters"] > 0
    assert ours["allocated-clusters"] == theirs["allocated-clusters"]
    assert Path("ours").stat().st_size <= 1.05 * Path("theirs").stat().st_size + 2 * (2 << 20 if "2M" in options
                                                                                    else 64 * KIB)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "ours", "back")
    assert Path("back").read_bytes() == data.ljust(-(-len(data) // 512) * 512, b"\0")


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=2M", "cluster_size=512"])
@pytest.mark.parametrize("length", [64 * KIB, (1 << 20) - 4608, 512])
def test_several_images_are_compressed_also_where_they_meet_in_a_cluster(both: Both, options: str, length: int) -> None:
    disk("a")
    written("b", length, (0, b"behind the first, " * (length // 18)))
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "a", "a.qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "b", "b.qcow2")
    for sources in (("-f", "raw", "a", "b", "b", "a"), ("-f", "qcow2", "b.qcow2", "a.qcow2", "b.qcow2")):
        for program, target in ((both.ours, "ours"), (both.theirs, "theirs")):
            assert program("convert", "-c", "-O", "qcow2", "-o", options, *sources, target) == (0, "", "")
        assert both.same("compare", "-f", "qcow2", "-F", "qcow2", "ours", "theirs") == "Images are identical.\n"
        ours, theirs = figures("ours"), figures("theirs")
        assert ours["allocated-clusters"] == theirs["allocated-clusters"]
        assert ours["compressed-clusters"] == theirs["compressed-clusters"]


def test_a_compressed_image_is_copied_and_compressed_again(both: Both) -> None:
    data = disk("a")
    assert both.ours("convert", "-c", "-f", "raw", "-O", "qcow2", "a", "one")[0] == 0
    assert both.ours("convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", "compression_type=zstd", "one", "two")[0] == 0
    assert both.ours("convert", "-f", "qcow2", "-O", "qcow2", "two", "three")[0] == 0
    assert both.ours("convert", "-f", "qcow2", "-O", "raw", "two", "back")[0] == 0
    assert Path("back").read_bytes() == data
    assert figures("two")["compressed-clusters"] == figures("one")["compressed-clusters"]
    assert figures("three").get("compressed-clusters", 0) == 0
    for image in ("one", "two", "three"):
        both.same("check", "-f", "qcow2", image)
        assert both.same("compare", "-f", "raw", "-F", "qcow2", "a", image) == "Images are identical.\n"


def test_qemu_writes_into_what_was_compressed_here(both: Both) -> None:
    disk("a")
    assert both.ours("convert", "-c", "-f", "raw", "-O", "qcow2", "a", "b")[0] == 0
    for path, kind in (("a", "raw"), ("b", "qcow2")):
        run("qemu-io", "-f", kind, "-c", "write -P 7 20k 100k", "-c", "write -z 256k 128k", path)
    both.same("check", "-f", "qcow2", "b")
    assert both.same("compare", "-f", "raw", "-F", "qcow2", "a", "b") == "Images are identical.\n"


def test_compressed_into_an_image_that_exists(both: Both) -> None:
    data = disk("a")
    assert both.theirs("create", "-q", "-f", "qcow2", "b", "8M")[0] == 0
    assert both.ours("convert", "-n", "-c", "-f", "raw", "-O", "qcow2", "a", "b") == (0, "", "")
    both.same("check", "-f", "qcow2", "b")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "b", "back")
    assert Path("back").read_bytes() == data.ljust(8 << 20, b"\0")


def chain() -> None:
    """``top`` over ``base``, and ``other``: another file with the content of ``base``."""
    disk("base", 6 << 20)
    run("cp", "base", "other")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "7M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 100k 70k", "-c", "write -z 3M 64k",
        "-c", "write -P 6 6500k 10k", "top")


@pytest.mark.parametrize("options", [("-B", "other", "-F", "raw"), ("-o", "backing_file=other,backing_fmt=raw"),
                                     ("-c", "-B", "other", "-F", "raw")])
def test_over_a_backing_image_only_what_the_source_holds_is_written(both: Both, options: tuple[str, ...]) -> None:
    chain()
    for program, target in ((both.ours, "ours"), (both.theirs, "theirs")):
        assert program("convert", "-f", "qcow2", "-O", "qcow2", *options, "top", target) == (0, "", "")
        run("qemu-img", "check", "-f", "qcow2", target)
        assert both.same("compare", "-f", "qcow2", "-F", "qcow2", "top", target) == "Images are identical.\n"
    assert figures("ours")["allocated-clusters"] <= figures("theirs")["allocated-clusters"]
    ours, theirs = both.json("info", "ours")[0], both.json("info", "theirs")[0]
    for field in ("backing-filename", "backing-filename-format", "virtual-size"):
        assert ours[field] == theirs[field]


@pytest.mark.parametrize("named", ["first", "2", "snapshot.name=first", "snapshot.id=2",
                                   "snapshot.id=1,snapshot.name=first"])
@pytest.mark.parametrize("compat", ["compat=1.1", "compat=0.10"])
def test_a_snapshot_is_copied(both: Both, named: str, compat: str) -> None:
    disk("a", 6 << 20)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", compat, "a", "b")
    for value, name in enumerate(("first", "second")):
        run("qemu-img", "snapshot", "-c", name, "b")
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {value + 1} {value}M 100k", "b")
    if compat == "compat=1.1":
        run("qemu-img", "resize", "-q", "-f", "qcow2", "b", "8M")
    before = Path("b").read_bytes()
    for program, target in ((both.ours, "ours"), (both.theirs, "theirs")):
        assert program("convert", "-l", named, "-f", "qcow2", "-O", "raw", "b", target) == (0, "", "")
    assert Path("ours").stat().st_size == 6 << 20  # theirs has the length that the disk has now
    assert Path("ours").read_bytes() == Path("theirs").read_bytes()[:6 << 20]
    assert Path("b").read_bytes() == before
    for wrong in ("third", "snapshot.id=7", "snapshot.id=2,snapshot.name=first", "snapshot.bla=1"):
        for program in (both.ours, both.theirs):
            assert program("convert", "-l", wrong, "-f", "qcow2", "-O", "raw", "b", "no")[0] == 1


def test_what_cannot_be_read_is_salvaged(both: Both) -> None:
    data = disk("a", 1 << 20)
    options = "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=a"
    broken = "".join(f",file.inject-error.{number}.event=read_aio,file.inject-error.{number}.sector={sector}"
                     for number, sector in enumerate((40, 41, 2000)))
    assert both.ours("convert", "--image-opts", "-O", "raw", options + broken, "b")[0] == 1
    ours = both.ours("convert", "--salvage", "--image-opts", "-O", "raw", options + broken, "b")
    theirs = both.theirs("convert", "--salvage", "--image-opts", "-O", "raw", options + broken, "c")
    assert (ours[0], theirs[0]) == (0, 0)
    said = [line.replace("blockstep", "qemu-img").partition(": injected")[0] for line in ours[2].splitlines()]
    assert sorted(said) == sorted(theirs[2].splitlines())
    assert Path("b").read_bytes() == Path("c").read_bytes() != data
    assert both.ours("convert", "-q", "--salvage", "--image-opts", options + broken, "b") == (0, "", "")


@pytest.mark.parametrize("arguments", [
    ("-c", "-O", "raw", "a", "b"), ("-c", "-C", "-O", "qcow2", "a", "b"),
    ("-c", "-O", "qcow2", "-o", "preallocation=metadata", "a", "b"), ("-B", "a", "-F", "raw", "-O", "raw", "a", "b"),
    ("-B", "a", "-F", "raw", "-O", "qcow2", "a", "a", "b"), ("-B", "none", "-F", "raw", "-O", "qcow2", "a", "b"),
    ("-O", "qcow2", "-o", "compat=0.10,compression_type=zstd", "a", "b"), ("--salvage", "-C", "a", "b"),
    ("-O", "qcow2", "-o", "compression_type=lzma", "a", "b"),
])
def test_what_makes_no_sense_is_refused(both: Both, arguments: tuple[str, ...]) -> None:
    disk("a")
    assert both.ours("convert", "-f", "raw", *arguments)[0] == both.theirs("convert", "-f", "raw", *arguments)[0] == 1
    assert not Path("b").exists() or Path("b").unlink() is None


@pytest.mark.parametrize("options", ["compression_type=zstd", "compression_type=zlib"])
def test_created_with_a_compression_type(both: Both, options: str) -> None:
    said = both.ours("create", "-f", "qcow2", "-o", options, "a", "64M")
    ours = both.json("info", "a")[1]["format-specific"]
    both.same("check", "a")
    assert said == both.theirs("create", "-f", "qcow2", "-o", options, "a", "64M")
    assert ours == both.json("info", "a")[0]["format-specific"]
