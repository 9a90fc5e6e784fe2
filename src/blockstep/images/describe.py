"""What an image is: its format, sizes, backing image and what is particular to the format.

The names of the fields are those of qemu-img's JSON.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blockstep.block.driver import Driver
from blockstep.block.status import backing_of
from blockstep.drivers.file import File
from blockstep.drivers.nbd import Nbd
from blockstep.drivers.overlay import Overlay
from blockstep.images.opened import ImageName, opened
from blockstep.inventory.filenames import actual_size, filename_of
from blockstep.units import KiB

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


async def described(image: ImageName, chain: bool = False) -> list[dict[str, Any]]:
    """The image, and with ``chain`` those below it, the nearest first. Raises OptionError and OSError."""
    format = None if image.is_options else await image.format_known()
    async with opened(image) as backend:
        node: Driver | None = backend.node
        found: list[dict[str, Any]] = []
        name = image.name if image.is_file else filename_of(backend.node)
        while node is not None:
            found.append(describe(node, name, format or format_of(node)))
            node, format = backing_of(node) if chain else None, None
            if node is not None:
                name = filename_of(node)
    return found


def format_of(node: Driver) -> str:
    """What an image format is called that a driver makes a node of."""
    return "raw" if isinstance(node, (File, Nbd)) else node.driver


def describe(node: Driver, filename: str, format: str) -> dict[str, Any]:
    """The fields of one image; sizes in bytes. What is not known is absent."""
    found: dict[str, Any] = {"virtual-size": node.length, "filename": filename, "format": format}
    size = actual_size(node)
    if size is not None:
        found["actual-size"] = size
    if isinstance(node, Overlay):
        found["cluster-size"] = node.cluster_size
    found["dirty-flag"] = False
    return found


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
    yield f"{'ID':<10}{'TAG':<15}{'VM SIZE':>10}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds, milliseconds = one["vm-clock-sec"], one["vm-clock-nsec"] // 1_000_000
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"
        yield (f"{one['id']:<9} {one['name']:<14} {short_size(one['vm-state-size']):>9}{date:>20}{clock:>13}"
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
