"""What users of a terminal are told of events that no program may be there to hear: one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def tell(event: str, data: Mapping[str, Any]) -> None:
    """For `Graph.listeners`. Of an image that was repaired when it was opened; of other events nothing."""
    if event == "BLOCK_IMAGE_REPAIRED":
        name = data.get("filename", f"node '{data['node-name']}'")
        print(f"blockstep: {name} was not closed in order, and has been repaired: {data['corruptions-fixed']} "
              f"corruptions, {data['leaks-fixed']} leaked clusters", file=sys.stderr, flush=True)
