"""Images whose tables lead into metadata: the writes of a disk's user never reach it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstep.block.graph import Graph
from blockstep.drivers.qcow2.format import COMPRESSED, COPIED, CORRUPT, OFFSET, compressed_place
from blockstep.errors import OptionError
from blockstep.units import KiB, MiB
from tests.interop.test_qcow2_driver import disk, image_options, made
from tests.peers import need, run
from tests.unit.drivers.qcow2.images import Damage

pytestmark = pytest.mark.interop
need("qemu-img", "qemu-io")

CLUSTER = 64 * KiB
#: Two L2 tables.
SIZE = 1024 * MiB
OTHER = 512 * MiB

#: What metadata is -> where it is.
METADATA: dict[str, Callable[[Damage], int]] = {
    "header": lambda image: 0,
    "refcount table": lambda image: image.header.refcount_table_offset,
    "refcount block": lambda image: image.block,
    "L1 table": lambda image: image.l1,
    "L2 table": lambda image: image.l2,
    "other L2 table": lambda image: image.u64(image.l1 + 8) & OFFSET,
    "snapshot table": lambda image: image.snapshot,
    "L1 table of a snapshot": lambda image: image.u64(image.snapshot),
    "L2 table of a snapshot": lambda image: image.u64(image.u64(image.snapshot)) & OFFSET,
}


@cache
def _image(options: str) -> bytes:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "disk.qcow2"
        made(path, options, SIZE)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "-c", f"write -P 1 {OTHER} 64k", str(path))
        run("qemu-img", "snapshot", "-c", "kept", str(path))
        run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", "-c", f"write -P 2 {OTHER} 64k", str(path))
        return path.read_bytes()


def image_with_all(path: Path, options: str = "compat=1.1") -> Damage:
    """An image with two L2 tables and a snapshot; it is on the disk after `Damage.save`."""
    return Damage(path, _image(options))


def metadata(image: Damage) -> dict[str, bytes]:
    """What is in the clusters of metadata, but for the bit that tells of damage."""
    data = bytearray(image.path.read_bytes())
    data[79] &= ~CORRUPT
    return {name: bytes(data[place(image):place(image) + CLUSTER]) for name, place in METADATA.items()}


def is_corrupt(path: Path) -> bool:
    return bool(Damage(path).header.incompatible & CORRUPT)


@pytest.mark.parametrize("options", ["compat=1.1", "extended_l2=on"])
@pytest.mark.parametrize("what", METADATA)
@pytest.mark.parametrize("kind", ["exclusive", "shared", "compressed"])
def test_an_entry_that_leads_into_metadata_is_refused(kind: str, what: str, options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = image_with_all(path, options)
    place = METADATA[what](image)
    if not place and kind == "shared":
        return  # an entry of 0 is none
    step = 16 if image.header.extended_l2 else 8
    image.put(image.l2 + 5 * step, place | {"exclusive": COPIED, "shared": 0, "compressed": COMPRESSED}[kind])
    if step == 16 and kind != "compressed":
        image.put(image.l2 + 5 * step + 8, 0xFFFFFFFF)
    if not place and kind == "exclusive":  # nothing: an entry with a mark and no place
        image.put(image.l2 + 5 * step, COPIED | 512)
    image.save()
    before = metadata(image)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            with pytest.raises(OSError, match="another user"):
                await user.pwrite(5 * CLUSTER, b"\xFF" * CLUSTER)
            with pytest.raises(OSError, match="another user"):
                await user.discard(5 * CLUSTER, CLUSTER)
            await user.pwrite(OTHER + 100, b"what is in order can be used")
            await user.flush()

    asyncio.run(go())
    assert metadata(image) == before
    assert is_corrupt(path)

    async def again() -> None:
        with pytest.raises(OptionError, match="corrupt"):
            await Graph().open(image_options(path))
        async with disk(image_options(path, **{"read-only": True})) as user:
            assert bytes(await user.pread(OTHER + 100, 4)) == b"what"

    asyncio.run(again())


@pytest.mark.parametrize("what", METADATA)
def test_an_image_whose_metadata_overlaps_is_not_opened_for_writing(what: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = image_with_all(path)
    if what == "other L2 table":
        image.put(image.l1, METADATA[what](image) | COPIED)  # two entries, one table
    elif what == "header":
        image.put(image.header.refcount_table_offset, CLUSTER)  # the first refcount block in the refcount table
    else:
        image.put(image.l1 + 8, METADATA[what](image) | COPIED)
    image.save()
    before = path.read_bytes()

    async def go() -> None:
        with pytest.raises(OptionError, match="overlaps"):
            await Graph().open(image_options(path))
        async with disk(image_options(path, **{"auto-read-only": True})) as user:
            assert user.node.read_only

    asyncio.run(go())
    assert path.read_bytes() == before


def test_a_cluster_that_is_about_to_become_free_gets_no_new_owner(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1", SIZE)
    run("qemu-io", "-f", "qcow2", "-c", "write -c -P 1 0 64k", "-c", f"write -P 1 {OTHER} 64k", str(path))
    image = Damage(path)
    packed = compressed_place(image.u64(image.l2), 16)[0] & -CLUSTER
    image.put((image.u64(image.l1 + 8) & OFFSET) + 8, packed | COPIED)
    image.save()

    async def go() -> None:
        async with disk(image_options(path)) as user:
            await user.pwrite(0, b"x" * CLUSTER)
            with pytest.raises(OSError, match="nothing else refers"):
                await user.pwrite(OTHER + CLUSTER, b"y" * CLUSTER)

    asyncio.run(go())


def test_a_cluster_that_counts_as_free_and_is_in_use_is_not_given_out(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = image_with_all(path)
    free = next(number for number in range(1, 100) if not image.u64(image.block + 2 * number) >> 48)
    image.put(image.l2 + 8, free * CLUSTER | COPIED)
    image.save()

    async def go() -> None:
        async with disk(image_options(path)) as user:
            assert bytes(await user.pread(CLUSTER, 512)) == bytes(512)  # claims it
            with pytest.raises(OSError, match="count as free"):
                await user.pwrite(OTHER - CLUSTER, b"x")
            await user.pwrite(CLUSTER, b"its own")

    asyncio.run(go())
    assert is_corrupt(path)


def test_a_table_that_lacks_its_mark_becomes_free_when_it_has_been_copied(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, "compat=1.1", SIZE)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", str(path))
    image = Damage(path)
    image.put(image.l1, image.u64(image.l1) & ~COPIED)
    image.save()

    async def go() -> None:
        async with disk(image_options(path)) as user:
            for offset in range(MiB, 2 * MiB, CLUSTER):  # the first makes a copy; the old place is used again
                await user.pwrite(offset, b"\x02" * CLUSTER)
                await user.flush()

    asyncio.run(go())
    assert not is_corrupt(path)
    run("qemu-img", "check", str(path))


def test_tables_whose_refcounts_say_free_are_not_given_out(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = image_with_all(path)
    for place in METADATA.values():
        image.refcount(place(image) // CLUSTER, 0)
    image.save()
    before = metadata(image)

    async def go() -> None:
        async with disk(image_options(path)) as user:
            with pytest.raises(OSError, match="count as free"):
                await user.pwrite(MiB, b"x")
            await user.pwrite(5, b"in place")

    asyncio.run(go())
    after = metadata(image)
    assert after == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_no_requests_to_a_malicious_image_reach_what_snapshots_have(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any entries of L1, L2 and refcounts changed to lead to metadata: snapshot table and L1 stay as they are."""
    path, rnd = tmp_path_factory.mktemp("image") / "disk.qcow2", random.Random(seed)
    image = image_with_all(path, rnd.choice(("compat=1.1", "compat=0.10")))
    places = [place(image) for place in METADATA.values()]
    second = image.u64(image.l1 + 8) & OFFSET
    for _ in range(rnd.randrange(1, 5)):
        place = rnd.choice(places) | rnd.choice((COPIED, COPIED, 0))
        rnd.choice((
            lambda place=place: image.put(rnd.choice((image.l2, second)) + 8 * rnd.randrange(6), place),
            lambda: image.refcount(rnd.randrange(12), rnd.randrange(3)),
            lambda place=place: image.put(image.l1 + 8 * rnd.randrange(2), place)))()
    image.save()
    kept = ["header", "snapshot table", "L1 table of a snapshot", "L2 table of a snapshot"]
    before = metadata(image)

    async def go() -> None:
        try:
            async with disk(image_options(path)) as user:
                for _ in range(25):
                    start = rnd.choice((0, OTHER))
                    try:
                        await user.pread(start, 6 * CLUSTER)
                        await user.pwrite(start + rnd.randrange(6) * CLUSTER, rnd.randbytes(rnd.choice((512, CLUSTER))))
                        await user.discard(start, 6 * CLUSTER)
                        await user.flush()
                    except OSError:
                        continue
        except (OSError, OptionError):
            return

    asyncio.run(go())
    after = metadata(image)
    for name in kept:
        if name == "header":
            assert after[name][:36] == before[name][:36]
        else:
            assert after[name] == before[name], name
