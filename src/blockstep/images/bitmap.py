"""Persistent bitmaps of a qcow2 image: several changes of one bitmap, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from msgspec.structs import replace

from blockstep.aio.pool import in_thread
from blockstep.block.bitmap import Bitmap
from blockstep.drivers.qcow2.bitmaps import StoredBitmap, load, store
from blockstep.drivers.qcow2.check import Checker
from blockstep.errors import BlockstepError, OptionError
from blockstep.images.opened import ImageName
from blockstep.images.whole import WholeFile, whole_file, whole_qcow2
from blockstep.units import KiB

Kind = Literal["add", "remove", "clear", "enable", "disable", "merge"]


class BitmapAction(NamedTuple):
    """One change. ``source``: the bitmap that is merged."""

    kind: Kind
    source: str = ""


async def change_bitmap(image: ImageName, name: str, actions: Sequence[BitmapAction], granularity: int | None = None,
                        source_image: ImageName | None = None) -> None:
    """Make ``actions`` in their order. ``granularity``: bytes, of ``add``. ``source_image``: has what is merged.

    Durable at return. Nobody else may have the image open. Raises OptionError, OSError, ImageError, and BlockstepError
    that names the action; then nothing was changed.
    """
    if granularity is not None and (granularity & (granularity - 1) or not 512 <= granularity <= 1 << 31):
        raise OptionError("-g", granularity, "a power of two from 512 to 2 GiB")
    filename = await whole_qcow2(image)
    source = await whole_qcow2(source_image) if source_image is not None else None

    def work() -> None:
        with whole_file(filename, writable=True) as file:
            wanted = [name, *(action.source for action in actions if source is None)]
            bitmaps = {one.name: one for one in load(file.read, file.length, wanted)}
            others = bitmaps
            if source is not None:
                with whole_file(source, writable=False) as other:
                    others = {one.name: one for one in load(other.read, other.length, [
                        action.source for action in actions])}
            for action in actions:
                _apply(file, bitmaps, name, action, granularity, others)
            store(file.read, file.length, file.write, file.sync, list(bitmaps.values()))

    await in_thread(work)


def usable_bitmaps(source: str, skip: Callable[[str], None] | None = None) -> list[StoredBitmap]:
    """The bitmaps of the image in the file ``source``, with their bits, to be added to another image.

    ``skip`` is told the names of those that are inconsistent, which are left out; None: raises BlockstepError for one.
    """
    with whole_file(source, writable=False) as file:
        bitmaps = load(file.read, file.length)
    for one in bitmaps:
        if not one.usable:
            if skip is None:
                raise BlockstepError(f"Cannot copy inconsistent bitmap '{one.name}'; --skip-broken-bitmaps leaves it "
                                     "out")
            skip(one.name)
    return [replace(one, entry=None) for one in bitmaps if one.usable]


def add_bitmaps(target: str, bitmaps: Sequence[StoredBitmap]) -> None:
    """Give the image in a file bitmaps beside those that it has. Raises BlockstepError for a name that is there."""
    with whole_file(target, writable=True) as file:
        present = load(file.read, file.length, ())
        for one in bitmaps:
            if any(other.name == one.name for other in present):
                raise BlockstepError(f"Failed to create bitmap {one.name}: Bitmap already exists: {one.name}")
        store(file.read, file.length, file.write, file.sync, [*present, *bitmaps])


def _apply(file: WholeFile, bitmaps: dict[str, StoredBitmap], name: str, action: BitmapAction,
           granularity: int | None, others: dict[str, StoredBitmap]) -> None:
    def failed(reason: str) -> BlockstepError:
        return BlockstepError(f"Operation {action.kind} on bitmap {name} failed: {reason}")

    if action.kind == "add":
        if name in bitmaps:
            raise failed(f"Bitmap already exists: {name}")
        header = Checker(file.read, file.length, lambda text: None).header
        unit = granularity or min(64 * KiB, max(4 * KiB, header.cluster_size))
        bitmaps[name] = StoredBitmap(name, unit, True, bitmap=Bitmap(header.size, unit))
        return
    stored = bitmaps.get(name)
    if stored is None:
        raise failed(f"Dirty bitmap '{name}' not found")
    if action.kind == "remove":
        del bitmaps[name]
        return
    if stored.bitmap is None:
        raise failed(f"Bitmap '{name}' is inconsistent and cannot be used; it can only be removed")
    if action.kind == "clear":
        stored.bitmap.clear()
    elif action.kind == "merge":
        other = others.get(action.source)
        if other is None:
            raise failed(f"Dirty bitmap '{action.source}' not found")
        if other.bitmap is None:
            raise failed(f"Bitmap '{action.source}' is inconsistent and cannot be used")
        if other.bitmap.length != stored.bitmap.length:
            raise failed(f"Bitmap '{action.source}' is of another size")
        stored.bitmap.merge(other.bitmap)
    else:
        bitmaps[name] = replace(stored, auto=action.kind == "enable")
