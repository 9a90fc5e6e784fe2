"""``blockstep img measure``, ``amend`` and ``dd`` beside qemu-img."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.interop import test_img
from tests.interop.test_img import Both, written
from tests.peers import run

pytestmark = pytest.mark.interop
both = test_img.both


# --- measure ---


@pytest.mark.parametrize("size", ["0", "512", "10000", "1M", "1G", "10G", "1T"])
@pytest.mark.parametrize("options", [
    "compat=1.1", "compat=0.10", "cluster_size=2M", "cluster_size=4k", "cluster_size=4k,refcount_bits=64",
    "refcount_bits=1", "extended_l2=on", "preallocation=metadata", "preallocation=full", "preallocation=falloc",
    "compression_type=zstd", "backing_file=none,backing_fmt=raw"])
def test_measure_of_a_size(both: Both, size: str, options: str) -> None:
    both.same("measure", "-O", "qcow2", "-o", options, "--size", size)
    ours, theirs = both.json("measure", "-O", "qcow2", "-o", options, "--size", size)
    assert ours == theirs


@pytest.mark.parametrize("size", ["0", "512", "10000", "1M"])
def test_measure_for_a_raw_file(both: Both, size: str) -> None:
    both.same("measure", "-O", "raw", "--size", size)
    both.same("measure", "--size", size)


def images() -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a", "20M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 100k 300k", "-c", "write -z 5M 1M", "-c", "write -P 3 9000k 1k",
        "-c", "write -P 7 20479k 1k", "a")
    run("qemu-img", "snapshot", "-c", "early", "a")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 12M 300k", "a")
    run("qemu-img", "bitmap", "--add", "-g", "512", "a", "fine")
    run("qemu-img", "bitmap", "--add", "a", "with a longer name")
    run("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "a", "packed")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-o", "compat=0.10", "a", "old")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a", "raw")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "over", "30M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 25M 300k", "-c", "write -z 100k 64k", "over")


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "cluster_size=2M", "cluster_size=512",
                                     "preallocation=metadata", "preallocation=full",
                                     "backing_file=a,backing_fmt=qcow2"])
def test_measure_of_images(both: Both, options: str) -> None:
    images()
    for name in ("a", "packed", "old", "over", "raw"):
        kind = "raw" if name == "raw" else "qcow2"
        both.same("measure", "-O", "qcow2", "-o", options, "-f", kind, name)
        ours, theirs = both.json("measure", "-O", "qcow2", "-o", options, "-f", kind, name)
        assert ours == theirs
        both.same("measure", "-O", "raw", "-f", kind, name)
    both.same("measure", "-O", "qcow2", "-o", options, "-f", "qcow2", "-l", "early", "a")


def test_what_is_measured_is_what_a_conversion_takes(both: Both) -> None:
    images()
    required = json.loads(both.ours("measure", "--output=json", "-O", "qcow2", "-f", "raw", "raw")[1])["required"]
    assert both.ours("convert", "-f", "raw", "-O", "qcow2", "raw", "b")[0] == 0
    assert 0 <= required - Path("b").stat().st_size <= 64 << 10  # all of an L2 table is reckoned with


@pytest.mark.parametrize("arguments", [
    (), ("-O", "qcow2"), ("-O", "qcow2", "--size", "1M", "raw"), ("-O", "bla", "--size", "1M"),
    ("-O", "qcow2", "-o", "bla=1", "--size", "1M"), ("-O", "qcow2", "-f", "raw", "none"), ("--size", "-1"),
])
def test_what_cannot_be_measured(both: Both, arguments: tuple[str, ...]) -> None:
    written("raw", 1 << 20)
    assert both.ours("measure", *arguments)[0] == both.theirs("measure", *arguments)[0] == 1


# --- options, names, sizes ---


@pytest.mark.parametrize("arguments", [
    ("check",), ("check", "-T", "none"), ("check", "-r", "all"), ("commit",), ("info",), ("map", "--output=json"),
    ("rebase", "-b", ""), ("rebase", "-T", "none", "-U", "-b", "below", "-F", "raw"), ("snapshot", "-l"),
    ("snapshot", "-c", "new"), ("amend", "-o", "lazy_refcounts=on"),
])
@pytest.mark.parametrize("options", ["driver=qcow2,file.filename=a", "driver=qcow2,file.driver=file,file.filename=a"])
def test_images_as_the_options_of_nodes(both: Both, arguments: tuple[str, ...], options: str) -> None:
    written("below", 6 << 20, (1 << 20, b"x" * 100_000))
    found = []
    for program in (both.ours, both.theirs):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "below", "-F", "raw", "a")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 1 100k 300k", "a")
        code, out, said = program(arguments[0], "--image-opts", *arguments[1:], options)
        run("qemu-img", "check", "-f", "qcow2", "a")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a", "plain")
        out = "" if arguments[0] == "info" else out
        about = json.loads(run("qemu-img", "info", "--output=json", "a").stdout)
        found.append((code, out, said, Path("plain").read_bytes(), about.get("backing-filename"), len(about.get(
            "snapshots", ())), about["format-specific"]))
    assert found[0] == found[1]


def test_bitmaps_and_conversions_by_the_options_of_nodes(both: Both) -> None:
    images()
    source = "driver=qcow2,file.filename=a"
    assert both.ours("bitmap", "--image-opts", "--remove", source, "fine") == (0, "", "")
    run("qemu-img", "create", "-q", "-f", "qcow2", "b", "20M")
    for arguments in (("-n", "--target-image-opts", "-c", "-f", "raw", "raw", "driver=qcow2,file.filename=b"),
                      ("--image-opts", "-O", "raw", source, "c")):
        assert both.ours("convert", *arguments) == (0, "", "")
    assert both.same("compare", "-f", "raw", "-F", "qcow2", "raw", "b") == "Images are identical.\n"
    assert both.ours("convert", "--image-opts", "-f", "qcow2", "-O", "raw", source, "d")[2].startswith("blockstep: -f")
    assert both.ours("info", "--image-opts", "a")[2].startswith("blockstep: --image-opts")


@pytest.mark.parametrize("length", [1, 1000, 70_001])
def test_qemu_sees_all_of_a_disk_that_is_no_multiple_of_a_sector(both: Both, length: int) -> None:
    written("a", length, (0, b"z" * length))
    for arguments in ((), ("-c",)):
        assert both.ours("convert", *arguments, "-f", "raw", "-O", "qcow2", "a", "b") == (0, "", "")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "b", "back")
        assert Path("back").read_bytes() == (b"z" * length).ljust(-(-length // 512) * 512, b"\0")
    assert both.ours("create", "-q", "-f", "qcow2", "c", str(length))[0] == 0
    both.theirs("create", "-q", "-f", "qcow2", "d", str(length))
    assert both.json("info", "c")[0]["virtual-size"] == both.json("info", "d")[1]["virtual-size"]
    for arguments in (("resize", "-f", "qcow2", "c", "80001"), ("amend", "-o", "size=80001", "c"),
                      ("amend", "-o", "lazy_refcounts=on,size=80001", "c"),
                      ("resize", "-f", "qcow2", "--shrink", "c", "0")):
        before = Path("c").read_bytes()
        ours = both.ours(*arguments)
        assert Path("c").read_bytes() == before
        assert (ours[0], both.theirs(*arguments)[0], ours[2][:16]) == (1, 1, "blockstep: size:")


def test_bitmaps_that_are_broken_are_skipped_if_asked(both: Both) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a", "4M")
    run("qemu-img", "bitmap", "--add", "a", "broken")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "abort", "a"],
                   capture_output=True, timeout=60, check=False)
    run("qemu-img", "bitmap", "--add", "a", "good")
    convert = ("convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", "a")
    for program, target in ((both.ours, "ours"), (both.theirs, "theirs")):
        assert program(*convert, target)[0] == 1
        code, _, said = program("convert", "--skip-broken-bitmaps", *convert[1:], target)
        assert (code, said.splitlines()[-1].split(": ", 1)[1]) == (0, "warning: Skipping inconsistent bitmap 'broken'")
        about = both.json("info", target)[1]["format-specific"]["data"]
        assert [each["name"] for each in about["bitmaps"]] == ["good"]
    assert both.ours("convert", "--skip-broken-bitmaps", "-f", "qcow2", "a", "b")[0] == 1
    assert both.ours(*convert[:-1], "-o", "compat=0.10", "a", "b")[2].startswith("blockstep: --bitmaps")


@pytest.mark.parametrize("command", [
    ("info", "-f", "qcow2"), ("check",), ("check", "-r", "all"), ("snapshot", "-l"), ("snapshot", "-c", "x"),
    ("bitmap", "--add"), ("amend", "-o", "compat=1.1"), ("rebase", "-u", "-b", ""), ("map", "-f", "qcow2"), ("commit",),
    ("resize", "-f", "qcow2"), ("measure", "-f", "qcow2", "-O", "qcow2"), ("convert", "-f", "qcow2")])
@pytest.mark.parametrize("version", [1, 3])
def test_errors_of_an_image_name_its_file(both: Both, command: tuple[str, ...], version: int) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a.img", "4M")
    data = bytearray(Path("a.img").read_bytes())
    data[7] = version
    data[48:56] = b"\x7f" * 8  # refcount_table_offset
    Path("a.img").write_bytes(data)
    more = {"bitmap": ["name"], "resize": ["8M"], "convert": ["target"]}.get(command[0], [])
    code, _, said = both.ours(*command, "a.img", *more)
    assert (code, said.count("\n")) == (1, 1)
    assert "a.img" in said
    assert "magic" in said or "refcount_table_offset" in said


def test_an_image_that_cannot_be_resized_is_named(both: Both) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "a", "4M")
    run("qemu-img", "snapshot", "-c", "x", "a")
    for arguments in (("resize", "-f", "qcow2", "a", "8M"), ("amend", "-o", "size=8M", "a")):
        assert both.theirs(*arguments)[0] == 1
        code, _, said = both.ours(*arguments)
        assert (code, said[:14]) == (1, "blockstep: a: ")


@pytest.mark.parametrize(("arguments", "named"), [
    (("-o", "cluster_size=3k"), "-o cluster_size:"), (("-o", "cluster_size=x"), "-o cluster_size:"),
    (("-o", "compat=2"), "-o compat:"), (("-o", "refcount_bits=3"), "-o refcount_bits:"),
    (("-o", "lazy_refcounts=maybe"), "-o lazy_refcounts:"), (("-o", "preallocation=x"), "-o preallocation:"),
    (("-F", "raw"), "-F:"), (("-o", "backing_fmt=raw"), "-o backing_fmt:"), (("-o", "data_file="), "-o data_file:"),
    (("-o", "nope=1"), "-o: 'nope'"), (("-o", "compat=0.10,extended_l2=on"), "-o extended_l2:"),
    (("-f", "nope"), "-f:")])
def test_wrong_options_of_a_new_image_are_named_as_they_were_given(both: Both, arguments: tuple[str, ...],
                                                                   named: str) -> None:
    code, _, said = both.ours("create", "-f", "qcow2", *arguments, "a", "1M")
    assert (code, said[:len("blockstep: " + named)]) == (1, "blockstep: " + named)
    assert both.theirs("create", "-f", "qcow2", *arguments, "a", "1M")[0] == 1


def test_small_clusters_have_room_for_bitmaps_and_backing_names(both: Both) -> None:
    written("base", 1 << 20)
    assert both.ours("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "a", "1M")[0] == 0
    assert both.ours("bitmap", "--add", "a", "since-monday") == (0, "", "")
    assert both.ours("rebase", "-u", "-b", "base", "-F", "raw", "a") == (0, "", "")
    both.same("check", "a")
    both.same("info", "a")
    assert both.json("info", "a")[1]["format-specific"]["data"]["bitmaps"][0]["name"] == "since-monday"


def test_a_bitmap_for_which_the_header_has_no_room_changes_nothing(both: Both) -> None:
    assert both.ours("create", "-q", "-f", "qcow2", "-u", "-b", "b" * 360, "-F", "raw", "-o", "cluster_size=512", "a",
                     "1M")[0] == 0
    before = Path("a").read_bytes()
    code, _, said = both.ours("bitmap", "--add", "a", "since-monday")
    assert (code, said.count("\n"), "fit in 512" in said) == (1, 1, True)
    assert Path("a").read_bytes() == before


# --- amend ---


@pytest.mark.parametrize(("made", "changes"), [
    ("compat=0.10", "compat=1.1"), ("compat=0.10", "compat=v3,lazy_refcounts=on"), ("compat=1.1", "lazy_refcounts=on"),
    ("compat=1.1,lazy_refcounts=on", "lazy_refcounts=off"), ("compat=1.1", "compat=1.1,refcount_bits=16"),
    ("compat=1.1", "size=8M"), ("compat=1.1", "size=200k"), ("compat=0.10", "compat=1.1,size=7M"),
    ("compat=1.1,data_file=one,data_file_raw=on", "data_file_raw=off"),
    ("compat=1.1", "refcount_bits=64"), ("compat=1.1,refcount_bits=64", "refcount_bits=2,lazy_refcounts=on"),
    ("compat=0.10", "compat=1.1,refcount_bits=8"), ("compat=1.1,lazy_refcounts=on", "compat=0.10"),
    ("compat=1.1,compression_type=zstd", "compat=0.10"), ("compat=1.1,refcount_bits=8", "compat=v2,refcount_bits=16"),
])
def test_amend(both: Both, made: str, changes: str) -> None:
    found = []
    for program in (both.ours, both.theirs):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", made, "a", "6M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 1 100k 300k", "a")
        if "data_file" not in made:
            run("qemu-img", "snapshot", "-c", "early", "a")
        result = program("amend", "-f", "qcow2", "-o", changes, "a")
        run("qemu-img", "check", "-f", "qcow2", "a")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a", "plain")
        info = json.loads(run("qemu-img", "info", "--output=json", "a").stdout)
        found.append((result, info["virtual-size"], info["format-specific"], Path("plain").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("made", "arguments"), [
    ("compat=1.1", ()), ("compat=1.1", ("-o", "cluster_size=4k")), ("compat=0.10", ("-o", "lazy_refcounts=on")),
    ("compat=1.1", ("-o", "backing_file=b,backing_fmt=raw")), ("compat=1.1", ("-o", "bla=1")),
    ("compat=1.1", ("-o", "compat=3")), ("compat=1.1,data_file=one", ("-o", "data_file_raw=on")),
    ("compat=1.1", ("-o", "refcount_bits=3")), ("compat=1.1", ("-o", "refcount_bits=128")),
    ("compat=0.10", ("-o", "refcount_bits=8")), ("compat=1.1,refcount_bits=8", ("-o", "compat=0.10")),
    ("compat=1.1,extended_l2=on", ("-o", "compat=0.10")), ("compat=1.1,data_file=one", ("-o", "compat=0.10")),
])
def test_what_cannot_be_amended(both: Both, made: str, arguments: tuple[str, ...]) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", made, "a", "6M")
    before = Path("a").read_bytes()
    assert both.ours("amend", "-f", "qcow2", *arguments, "a")[0] == 1
    assert Path("a").read_bytes() == before
    assert both.theirs("amend", "-f", "qcow2", *arguments, "a")[0] == 1


def test_a_data_file_that_was_moved_is_found_again(both: Both) -> None:
    for number, program in enumerate((both.ours, both.theirs)):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "a", "6M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 1 100k 300k", "a")
        Path("data").rename(f"moved{number}")
        if program == both.theirs:  # wants it under the old name as well
            os.link(f"moved{number}", "data")
        assert program("amend", "-o", f"data_file=moved{number}", "a") == (0, "", "")
        about = json.loads(run("qemu-img", "info", "--output=json", "a").stdout)["format-specific"]["data"]
        assert about["data-file"] == f"moved{number}"
        run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 1 100k 300k", "a")
        assert both.ours("amend", "-o", "data_file=", "a")[2].startswith("blockstep: -o data_file:")
    run("qemu-img", "create", "-q", "-f", "qcow2", "b", "6M")
    for program in (both.ours, both.theirs):
        assert program("amend", "-o", "data_file=moved0", "b")[0] == 1


@pytest.mark.parametrize("changes", ["compat=0.10", "size=0"])
def test_what_only_qemu_amends_is_refused(both: Both, changes: str) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a", "6M")
    run("qemu-img", "bitmap", "--add", "a", "since-monday")
    before = Path("a").read_bytes()
    code, _, said = both.ours("amend", "-f", "qcow2", "-o", changes, "a")
    assert (code, said.count("\n")) == (1, 1)
    assert Path("a").read_bytes() == before


def test_amend_shows_its_progress_and_its_options(both: Both) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a", "6M")
    both.same("amend", "-p", "-f", "qcow2", "-o", "lazy_refcounts=on", "a")
    assert "lazy_refcounts" in both.ours("amend", "-f", "qcow2", "-o", "help")[1]


# --- dd ---


@pytest.mark.parametrize("words", [
    (), ("bs=1k",), ("bs=1k", "count=10"), ("bs=64k", "skip=3"), ("bs=1000", "count=128", "skip=64"),
    ("bs=1M", "count=1"), ("count=3",), ("skip=1k",), ("bs=2M", "count=10", "skip=0"),
    ("skip=100000",), ("bs=1k", "count=3", "skip=5"), ("bs=1k", "count=0"), ("bs=1k", "count=5", "skip=5"),
])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_dd(both: Both, words: tuple[str, ...], kind: str) -> None:
    written("raw", 1 << 20, (0, os.urandom(100_000)), (500_000, os.urandom(70_000)))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "qcow2")
    ours = both.ours("dd", "-f", kind, "-O", "raw", *words, f"if={kind}", "of=b")
    theirs = both.theirs("dd", "-f", kind, "-O", "raw", *words, f"if={kind}", "of=c")
    assert ours == (theirs[0], theirs[1], theirs[2].replace("qemu-img", "blockstep"))
    assert Path("b").read_bytes() == Path("c").read_bytes()
    if Path("b").stat().st_size:
        assert both.ours("dd", "-f", kind, "-O", "qcow2", *words, f"if={kind}", "of=d")[0] == 0
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "b", "d")


@pytest.mark.parametrize("words", [("if=raw",), ("of=b",), ("bs=0", "if=raw", "of=b"), ("seek=1", "if=raw", "of=b"),
                                   ("bs=x", "if=raw", "of=b"), ("if=none", "of=b"), ("raw", "b"),
                                   ("bs=2147483648", "if=raw", "of=b")])
def test_what_dd_does_not_take(both: Both, words: tuple[str, ...]) -> None:
    written("raw", 1 << 20)
    assert both.ours("dd", "-f", "raw", *words)[0] == both.theirs("dd", "-f", "raw", *words)[0] == 1
    assert not Path("b").exists()


@pytest.mark.parametrize("skip", ["0", "5000"])
def test_dd_does_not_take_the_place_of_what_it_reads(both: Both, skip: str) -> None:
    written("raw", 1 << 20, (0, b"content"))
    before = Path("raw").read_bytes()
    code, _, error = both.ours("dd", "-f", "raw", f"skip={skip}", "if=raw", "of=raw")
    assert (code, Path("raw").read_bytes()) == (1, before)
    assert error.startswith("blockstep: of:")


def test_no_snapshot_is_applied_under_a_bitmap_that_follows_the_disk_and_is_inconsistent(both: Both) -> None:
    image = Path("disk.qcow2")
    assert both.ours("create", "-f", "qcow2", image, "4M")[0] == 0
    assert both.ours("snapshot", "-c", "one", image)[0] == 0
    assert both.ours("bitmap", "--add", image, "b0")[0] == 0
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "abort", str(image)],
                   capture_output=True, timeout=60, check=False)
    before = image.read_bytes()
    assert b"in-use" in subprocess.run(["qemu-img", "info", str(image)], capture_output=True, check=True).stdout
    assert both.ours("snapshot", "-a", "one", image)[0] == both.theirs("snapshot", "-a", "one", image)[0] == 1
    assert image.read_bytes() == before
    assert both.ours("bitmap", "--remove", image, "b0")[0] == 0
    assert both.ours("snapshot", "-a", "one", image)[0] == 0
