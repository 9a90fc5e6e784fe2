"""Internal snapshots of a qcow2 image: list, create, apply, delete."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from blockstep.aio.pool import in_thread
from blockstep.drivers.qcow2.snapshots import apply_snapshot, create_snapshot, delete_snapshot, list_snapshots
from blockstep.errors import OptionError
from blockstep.images.opened import ImageName
from blockstep.images.qcow2 import snapshot_fields
from blockstep.images.whole import whole_file, whole_qcow2
from blockstep.keyval import parse

Action = Literal["create", "apply", "delete"]


async def snapshots_of(image: ImageName) -> list[dict[str, Any]]:
    """The snapshots, with the fields of qemu-img's JSON. Raises OptionError, OSError and ImageError."""
    filename = await whole_qcow2(image)

    def work() -> list[dict[str, Any]]:
        with whole_file(filename, writable=False) as file:
            return [snapshot_fields(one) for one in list_snapshots(file.read, file.length)]

    return await in_thread(work)


async def snapshot_id(image: ImageName, wanted: str) -> str:
    """The id of the snapshot that ``wanted`` means: an id or a name, or ``snapshot.id=...,snapshot.name=...``.

    Raises as `snapshots_of` does, and OptionError if there is none.
    """
    found = await snapshots_of(image)
    if wanted.startswith(("snapshot.id=", "snapshot.name=")):
        given: dict[str, Any] = parse(wanted, "-l").get("snapshot", {})
        if not given.keys() <= {"id", "name"}:
            raise OptionError("-l", wanted, "snapshot.id=ID, snapshot.name=NAME, or both")
        matching = [one for one in found if all(one[key] == value for key, value in given.items())]
    else:
        matching = [one for key in ("id", "name") for one in found if one[key] == wanted]
    if not matching:
        raise OptionError("-l", wanted, "a snapshot of the image")
    return str(matching[0]["id"])


async def change_snapshots(image: ImageName, action: Action, name: str,
                           now: Callable[[], int] = time.time_ns) -> None:
    """Create the snapshot of that name, or apply or delete the one with that id or name. Durable at return.

    Nobody else may have the image open. Raises as `snapshots_of` does; then nothing was changed, unless it is said
    that a repair is needed.
    """
    filename = await whole_qcow2(image)
    seconds, nanoseconds = divmod(now(), 10 ** 9)

    def work() -> None:
        with whole_file(filename, writable=True) as file:
            access = file.read, file.length, file.write, file.sync
            if action == "create":
                create_snapshot(*access, name, seconds=seconds, nanoseconds=nanoseconds)
            elif action == "apply":
                apply_snapshot(*access, name)
            else:
                delete_snapshot(*access, name)

    await in_thread(work)
