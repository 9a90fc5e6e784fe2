"""What a conversion leaves, at its end and when it does not come to one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from blockstep.errors import OptionError
from blockstep.images.convert import Conversion, convert
from blockstep.images.opened import ImageName
from blockstep.units import MiB
from tests.unit.images.support import raw

KiB = 1024


def name(path: Path, kind: str = "raw", option: str = "-f") -> ImageName:
    return ImageName(str(path), kind, option=option)


def disk(path: Path) -> Path:
    return raw(path, 8 * MiB + 300, {0: os.urandom(70 * KiB), 3 * MiB: b"x" * 4096 + bytes(128 * KiB) + b"y",
                                     8 * MiB + 290: b"end"})


@pytest.mark.parametrize("kind", ["raw", "overlay"])
@pytest.mark.parametrize("options", [{}, {"sparse": 0}, {"offload": True}, {"workers": 1}, {"sparse": 64 * KiB}])
def test_the_target_reads_as_the_source(tmp_path: Path, kind: str, options: dict[str, int]) -> None:
    source, target, back = disk(tmp_path / "source"), tmp_path / "target", tmp_path / "back"
    asyncio.run(convert(Conversion([name(source)], name(target, kind), **options)))  # type: ignore[arg-type]
    asyncio.run(convert(Conversion([name(target, kind)], name(back))))
    assert back.read_bytes() == source.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target", "back"}


def test_zeroes_become_holes_unless_they_shall_not(tmp_path: Path) -> None:
    source = raw(tmp_path / "source", 2 * MiB, {0: bytes(MiB), MiB: b"x" * 4096})
    sizes = []
    for sparse in (4 * KiB, 0):
        asyncio.run(convert(Conversion([name(source)], name(tmp_path / "target"), sparse=sparse)))
        sizes.append((tmp_path / "target").stat().st_blocks * 512)
    assert sizes[0] <= 64 * KiB
    assert sizes[1] >= 2 * MiB


def test_several_sources_are_put_behind_each_other(tmp_path: Path) -> None:
    sources = [raw(tmp_path / f"s{number}", length, {1000: b"%d" % number})
               for number, length in enumerate((MiB, 0, 70_000, 512))]
    asyncio.run(convert(Conversion([name(path) for path in sources[:3]], name(tmp_path / "target"))))
    assert (tmp_path / "target").read_bytes() == b"".join(path.read_bytes() for path in sources[:3])


@pytest.mark.parametrize("options", [{"offload": True}, {"workers": 1, "rate": 1 << 40}, {"sparse": 0}])
def test_several_sources_in_every_way_of_copying(tmp_path: Path, options: dict[str, int]) -> None:
    sources = [disk(tmp_path / "0"), raw(tmp_path / "1", 3 * MiB + 77, {MiB: os.urandom(70_000)}), disk(tmp_path / "2")]
    asyncio.run(convert(Conversion([name(path) for path in sources], name(tmp_path / "target"),
                                   **options)))  # type: ignore[arg-type]
    assert (tmp_path / "target").read_bytes() == b"".join(path.read_bytes() for path in sources)


def test_progress_comes_to_its_end_once(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    asyncio.run(convert(Conversion([name(disk(tmp_path / "source"))], name(tmp_path / "target")),
                        lambda done, total: told.append((done, total))))
    assert told == sorted(told)
    assert told[0] == (0, 8 * MiB + 300)
    assert told[-1] == (8 * MiB + 300, 8 * MiB + 300)


def test_an_interrupted_conversion_leaves_no_file_and_the_old_one_as_it_was(tmp_path: Path) -> None:
    source = raw(tmp_path / "source", 8 * MiB, {0: os.urandom(8 * MiB)})
    (tmp_path / "old").write_bytes(b"old")

    async def work(target: Path) -> None:
        task: asyncio.Task[None]

        def stop(done: int, total: int) -> None:
            if done:
                task.cancel()

        task = asyncio.ensure_future(convert(Conversion([name(source)], name(target)), stop))
        with pytest.raises(asyncio.CancelledError):
            await task

    for target in (tmp_path / "new", tmp_path / "old"):
        asyncio.run(work(target))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "old"}
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_target_that_exists_is_written_in_place(tmp_path: Path) -> None:
    source = raw(tmp_path / "source", MiB, {0: b"data"})
    target = raw(tmp_path / "target", 2 * MiB, {5000: b"gone", MiB: b"stays"})
    node = target.stat().st_ino
    asyncio.run(convert(Conversion([name(source)], name(target), create=False)))
    assert target.stat().st_ino == node
    assert target.read_bytes() == source.read_bytes() + b"stays".ljust(MiB, b"\0")


@pytest.mark.parametrize("create", [True, False])
def test_what_is_read_is_not_written_to(tmp_path: Path, create: bool) -> None:
    source = disk(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    before = source.read_bytes()
    with pytest.raises(OptionError) as caught:
        asyncio.run(convert(Conversion([name(source)], name(tmp_path / "link"), create=create)))
    assert caught.value.option == "TARGET"
    assert source.read_bytes() == before


@pytest.mark.parametrize("target", ['{{"driver": "file", "filename": "{}"}}', 'driver=raw,file.filename={}'])
def test_what_is_read_is_not_written_to_as_a_node_either(tmp_path: Path, target: str) -> None:
    source = disk(tmp_path / "source")
    before = source.read_bytes()
    into = ImageName(target.format(source), image_opts=True)
    with pytest.raises(OptionError, match="another file than those that are read"):
        asyncio.run(convert(Conversion([name(source)], into, create=False)))
    assert source.read_bytes() == before


def test_what_is_read_is_not_the_new_images_data_file(tmp_path: Path) -> None:
    source = disk(tmp_path / "source")
    before = source.read_bytes()
    with pytest.raises(OptionError, match="another file than those that are read"):
        asyncio.run(convert(Conversion([name(source)], name(tmp_path / "new", "qcow2"),
                                       options={"data_file": "source"})))
    assert source.read_bytes() == before


def test_a_rate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def counted(delay: float) -> None:
        slept.append(delay)
        await sleep(0)

    monkeypatch.setattr("blockstep.images.convert.asyncio.sleep", counted)
    source = raw(tmp_path / "source", 4 * MiB, {0: os.urandom(4 * MiB)})
    asyncio.run(convert(Conversion([name(source)], name(tmp_path / "target"), rate=MiB)))
    assert 2 < max(slept) <= 3


@pytest.mark.parametrize(("options", "names"), [
    ({"sparse": 511}, "-S"), ({"sparse": 32 * MiB}, "-S"), ({"zeroed": True}, "--target-is-zero"),
    ({"workers": 0}, "-m"), ({"workers": 17}, "-m"),
    ({"create": False, "options": {"size": "1M"}}, "-o"), ({"options": {"bla": "1"}}, "-o"),
])
def test_what_makes_no_sense_is_named(tmp_path: Path, options: dict[str, object], names: str) -> None:
    source = raw(tmp_path / "source", MiB)
    with pytest.raises(OptionError) as caught:
        asyncio.run(convert(Conversion([name(source)], name(tmp_path / "target"), **options)))  # type: ignore[arg-type]
    assert caught.value.option == names
    assert list(tmp_path.iterdir()) == [source]


def test_a_format_of_the_target_that_is_none_is_called_as_it_was_given(tmp_path: Path) -> None:
    source = raw(tmp_path / "source", MiB)
    with pytest.raises(OptionError) as caught:
        asyncio.run(convert(Conversion([name(source)], ImageName(str(tmp_path / "target"), "vmdk"))))
    assert (caught.value.option, caught.value.value) == ("-O", "vmdk")


def test_a_target_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, target = raw(tmp_path / "source", MiB, {0: b"new"}), raw(tmp_path / "target", 512, {0: b"old"})
    with pytest.raises(OptionError, match="at least"):
        asyncio.run(convert(Conversion([name(source)], name(target), create=False)))
    assert target.read_bytes()[:3] == b"old"
