"""What users of a terminal are told of events that no program may be there to hear: one line on standard error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockstep.streams import complain


def tell(event: str, data: Mapping[str, Any]) -> None:
    """For `Graph.listeners`. Of images that were repaired, or are broken, and of files that others have harmed."""
    if event == "BLOCK_IMAGE_REPAIRED":
        name = data.get("filename", f"node '{data['node-name']}'")
        text = (f"{name} was not closed in order, and has been repaired: {data['corruptions-fixed']} corruptions, "
                f"{data['leaks-fixed']} leaked clusters")
    elif event == "BLOCK_IMAGE_CORRUPTED":
        text = f"the image of node '{data['node-name']}' is {'marked as corrupt' if data['fatal'] else 'broken'}: " \
               f"{data['msg']}"
    elif event == "BLOCK_STORAGE_FAULT" and data["reason"]:
        text = f"node '{data['node-name']}': {data['reason']}"
    else:
        return
    complain(f"blockstep: {text}")


def tell_changes(event: str, data: Mapping[str, Any]) -> None:
    """As `tell`, for commands that tell of their errors themselves: only of what was done to an image."""
    if data.get("fatal", True):
        tell(event, data)
