"""Images as files on their own: what ``blockstep img`` does, without a terminal.

    ImageName ──opened──► Backend ──► describe │ mapping │ compare │ convert │ resize │ ...
    (file, format)        a graph of its own, for one command

Every command opens its images as nodes, so what has a driver is an image format here as well: the table is
`blockstep.images.opened.FORMATS`. The format is what the user says it is. An image's content decides only where it
was asked for (``auto``): whoever can write to a raw disk, its guest for one, could otherwise make it look like an
image of another format, with a backing file of its choice.

A file that is made comes under its name when it is complete (`blockstep.images.files`).
"""

from __future__ import annotations

from blockstep.forms import Literal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: How images are cached, as people who come from QEMU say it. A command makes all durable at its end, so that
#: writethrough differs from writeback by nothing that could be seen.
CacheMode = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]
#: The formats that an image can have, and ``auto``: look at its content.
FORMATS: Final = ("raw", "qcow2", "overlay")
AUTO: Final = "auto"

_URI: Final = ("nbd:", "nbds:", "nbd+unix:", "nbds+unix:")


def is_options(name: str) -> bool:
    """Whether the name of an image is the options of a node, as JSON."""
    return name.startswith(("{", "json:"))


def is_address(name: str) -> bool:
    """Whether it is the address of an export."""
    return name.startswith(_URI)
