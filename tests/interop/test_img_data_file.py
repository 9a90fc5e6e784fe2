"""``blockstep img`` on images with external data files, beside qemu-img."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.interop.test_img import Both, both  # noqa: F401  a fixture
from tests.peers import run

pytestmark = pytest.mark.interop


@pytest.fixture
def image(both: Both) -> Path:  # noqa: F811
    """An image in the working directory, with a raw data file."""
    assert both.ours("create", "-f", "qcow2", "-o", "data_file=disk.data,data_file_raw=on", "disk.qcow2", "1M")[0] == 0
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 300k", "disk.qcow2")
    return Path("disk.qcow2")


@pytest.mark.parametrize("options", [
    "data_file=disk.data", "data_file=disk.data,data_file_raw=on", "extended_l2=on",
    "extended_l2=on,data_file=disk.data,data_file_raw=on,preallocation=metadata,cluster_size=16k"])
def test_create_and_info(options: str, both: Both) -> None:  # noqa: F811
    assert both.same("create", "-f", "qcow2", "-o", options, "disk.qcow2", "1M").startswith("Formatting")
    lines = both.same("info", "disk.qcow2").splitlines()
    assert "    data file raw: true" in lines or "raw=on" not in options
    assert both.json("info", "disk.qcow2")[0] == both.json("info", "disk.qcow2")[1]


@pytest.mark.parametrize("arguments", [
    ("check", "disk.qcow2"), ("bitmap", "--add", "disk.qcow2", "b0"), ("snapshot", "-l", "disk.qcow2"),
    ("resize", "disk.qcow2", "2M"), ("resize", "--shrink", "disk.qcow2", "512k"), ("info", "disk.qcow2")])
def test_what_is_done_is_as_in_qemu_img(arguments: tuple[str, ...], image: Path, both: Both) -> None:  # noqa: F811
    if arguments[0] == "resize":
        assert both.ours("resize", "-f", "qcow2", *arguments[1:])[0] == 0
        assert Path("disk.data").stat().st_size == (2 << 20 if arguments[-1] == "2M" else 512 << 10)
    elif arguments[0] == "bitmap":
        assert both.ours(*arguments)[0] == 0
    else:
        both.same(*arguments)
    run("qemu-img", "check", str(image))
    info = both.json("info", "disk.qcow2")[1]["format-specific"]["data"]
    assert info["data-file-raw"] is True


@pytest.mark.parametrize("arguments", [
    ("snapshot", "-c", "now", "disk.qcow2"), ("rebase", "-b", "disk.data", "-F", "raw", "disk.qcow2"),
    ("rebase", "-u", "-b", "disk.data", "-F", "raw", "disk.qcow2")])
def test_what_qemu_img_refuses_is_refused(arguments: tuple[str, ...], image: Path, both: Both) -> None:  # noqa: F811
    before = image.read_bytes()
    assert both.theirs(*arguments)[0] == both.ours(*arguments)[0] == 1
    assert image.read_bytes() == before


def test_convert_from_and_to(image: Path, both: Both) -> None:  # noqa: F811
    assert both.ours("convert", "-f", "qcow2", "-O", "raw", image, "plain")[0] == 0
    assert Path("plain").read_bytes() == Path("disk.data").read_bytes()
    options = "data_file=other.data,data_file_raw=on,extended_l2=on"
    assert both.ours("convert", "-f", "raw", "-O", "qcow2", "-o", options, "plain", "other.qcow2")[0] == 0
    assert Path("other.data").read_bytes() == Path("plain").read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "plain", "other.qcow2")
    run("qemu-img", "check", "other.qcow2")


def test_through_a_link_the_data_file_is_made_where_it_is_looked_for(both: Both) -> None:  # noqa: F811
    Path("elsewhere").mkdir()
    Path("link").symlink_to("elsewhere/disk.qcow2")
    assert both.ours("create", "-f", "qcow2", "-o", "data_file=disk.data", "link", "1M")[0] == 0
    assert Path("disk.data").stat().st_size == 1 << 20
    assert both.ours("map", "-f", "qcow2", "link")[0] == 0


@pytest.mark.parametrize("word", ["data_file=other.data", "data-file=other.data", "data_file=old.data"])
def test_compressed_data_cannot_lie_in_a_data_file_and_nothing_is_made(
        word: str, image: Path, both: Both) -> None:  # noqa: F811
    Path("old.data").write_bytes(b"old")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    code, _, error = both.ours("convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", word, image, "packed.qcow2")
    assert (code, error.count("\n"), "-o data_file" in error) == (1, 1, True)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_copy_that_fails_leaves_no_new_data_file(image: Path, both: Both) -> None:  # noqa: F811
    Path("old.data").write_bytes(b"old")
    options = json.dumps({"driver": "blkdebug", "image": {"driver": "qcow2", "file": {
        "driver": "file", "filename": str(image)}}, "inject-error": [{"event": "none", "iotype": "read", "errno": 5}]})
    before = sorted(Path().iterdir())
    for name in ("other.data", "old.data"):
        assert both.ours("convert", "-O", "qcow2", "-o", f"data_file={name}", f"json:{options}", "copy.qcow2")[0] == 1
    words = "data_file=other.data,preallocation=falloc"
    assert both.ours("create", "-f", "qcow2", "-o", words, "x.qcow2", "4E")[0] == 1
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(("name", "text"), [
    ('json:{"driver": "null"}     ', "the name of a file"),
    ("./" * 12 + "pipe", "neither a regular file nor a block device"),
    ("//dev/" + "./" * 9 + "zero", "neither a regular file nor a block device"),
])
def test_an_image_from_elsewhere_names_no_other_nodes_and_no_pipe(
        name: str, text: str, both: Both) -> None:  # noqa: F811
    placeholder = b"a-name-of-twenty-eight-bytes"
    assert both.ours("create", "-f", "qcow2", "-o", f"data_file={placeholder.decode()}", "disk.qcow2", "1M")[0] == 0
    content = Path("disk.qcow2").read_bytes()
    assert (content.count(placeholder), len(name)) == (1, len(placeholder))
    Path("disk.qcow2").write_bytes(content.replace(placeholder, name.encode()))
    os.mkfifo("pipe")
    code, _, error = both.ours("map", "-f", "qcow2", "disk.qcow2")
    assert code == 1
    assert text in error
    assert both.ours("info", "disk.qcow2")[0] == 0  # which looks at no other file
