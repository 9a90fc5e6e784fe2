"""What an image is: its format, sizes, backing image and what is particular to the format.

The names of the fields are those of qemu-img's JSON.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from blockstep.block.node import Child
from blockstep.drivers.file import File
from blockstep.drivers.nbd import Nbd
from blockstep.drivers.overlay import Overlay
from blockstep.drivers.qcow2.backing import place_of
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.errors import BlockstepError, ImageError
from blockstep.images import AUTO
from blockstep.images.opened import ImageName, opened
from blockstep.images.qcow2 import qcow2_fields
from blockstep.units import KiB

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


async def described(image: ImageName, chain: bool = False) -> list[dict[str, Any]]:
    """The image, and with ``chain`` those below it, the nearest first.

    A qcow2 image is described from its header, so also one that cannot be used. Raises OptionError, OSError and
    ImageError, and BlockstepError for a chain that loops.
    """
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    below: ImageName | None = image
    while below is not None:
        place = os.path.realpath(below.name) if below.is_file else below.name
        if place in seen:
            raise BlockstepError(f"the backing chain of '{image.name}' loops: '{below.name}' is in it twice")
        seen.add(place)
        fields, below = await _describe(below)
        found.append(fields)
        if not chain:
            break
    return found


async def _describe(image: ImageName) -> tuple[dict[str, Any], ImageName | None]:
    """One image, and the one that it names as its backing image."""
    if not image.is_options and await image.format_known() == "qcow2":
        async with opened(msgspec.structs.replace(image, format="raw")) as file:
            try:
                return await _qcow2(image, image.name, file.edge)
            except ImageError as error:
                raise error.of(image.name) from error
    async with opened(image) as backend:
        node = backend.node
        if isinstance(node, Qcow2):
            return await _qcow2(image, place_of(node.file.node) or image.name, node.file)
        fields: dict[str, Any] = {"virtual-size": node.length, "filename": image.name}
        if isinstance(node, Overlay):
            fields["cluster-size"] = node.cluster_size
        fields["format"] = "raw" if isinstance(node, (File, Nbd)) else node.driver
        if (size := node.occupied()) is not None:
            fields["actual-size"] = size
        return {**fields, "dirty-flag": False}, None


async def _qcow2(image: ImageName, name: str, file: Child) -> tuple[dict[str, Any], ImageName | None]:
    fields, header = await qcow2_fields(file, name)
    if header.backing_file is None:
        return fields, None
    below = ImageName(fields["full-backing-filename"], header.backing_format or AUTO, cache=image.cache)
    return fields, below


def as_text(fields: Mapping[str, Any]) -> str:
    """The same for people, as qemu-img prints it."""
    lines = [
        f"image: {fields['filename']}",
        f"file format: {fields['format']}",
        f"virtual size: {short_size(fields['virtual-size'])} ({fields['virtual-size']} bytes)",
        f"disk size: {short_size(fields['actual-size']) if 'actual-size' in fields else 'unavailable'}",
    ]
    if fields.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in fields:
        lines.append(f"cluster_size: {fields['cluster-size']}")
    if fields.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if "backing-filename" in fields:
        name, full = fields["backing-filename"], fields.get("full-backing-filename")
        lines.append(f"backing file: {name}" + (f" (actual path: {full})" if full not in (None, name) else ""))
        if "backing-filename-format" in fields:
            lines.append(f"backing file format: {fields['backing-filename-format']}")
    if fields.get("snapshots"):
        lines += ["Snapshot list:", *snapshot_table(fields["snapshots"])]
    if "format-specific" in fields:
        lines += ["Format specific information:", *_tree(fields["format-specific"]["data"], 1)]
    return "\n".join(lines)


def snapshot_table(snapshots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Internal snapshots as a table, head first."""
    yield f"{'ID':<10}{'TAG':<18}{'VM SIZE':<7}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds, milliseconds = one["vm-clock-sec"], one["vm-clock-nsec"] // 1_000_000
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"
        yield (f"{one['id']:<9} {one['name']:<15} {short_size(one['vm-state-size']):>9}{date:>20}{clock:>13}"
               f"{one.get('icount', ''):>11}")


def short_size(size: int) -> str:
    """Bytes in three digits: ``0 B``, ``68 KiB``, ``0.977 MiB``."""
    value, power = float(size), 0
    while round(value, 1) >= 1000 and power < len(_UNITS) - 1:
        value, power = value / KiB, power + 1
    return f"{value:.3g} {_UNITS[power]}"


def _tree(value: Mapping[str, Any] | Sequence[Any], depth: int) -> Iterator[str]:
    """Nested fields, indented: names have spaces for dashes, lists are numbered."""
    indent = " " * 4 * depth
    items = (((name.replace("-", " "), one) for name, one in value.items()) if isinstance(value, Mapping)
             else ((f"[{number}]", one) for number, one in enumerate(value)))
    for name, one in items:
        if isinstance(one, (Mapping, list, tuple)):
            yield f"{indent}{name}:"
            yield from _tree(one, depth + 1)
        else:
            yield f"{indent}{name}: {str(one).lower() if isinstance(one, bool) else one}"
