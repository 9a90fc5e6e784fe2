"""The external data file of an image: where it is, and whether it can be used.

The image then has only metadata: clusters with data lie in the other file, at the offset that they have on the disk.
That file's format is raw, always. If the image has the bit for *raw external data*, it can be read without the image.
"""

from __future__ import annotations

import os
from typing import Any

from blockstep.block.driver import Driver
from blockstep.block.node import Child
from blockstep.drivers.qcow2.backing import image_path, place_of
from blockstep.drivers.qcow2.format import EXTERNAL_DATA, RAW_EXTERNAL, Header
from blockstep.errors import ImageError, OptionError


def data_file_options(header: Header, file: Driver) -> dict[str, Any] | None:
    """The options of the data file's node that the header names; ``file`` is the node that the image lies in.

    None: the image has no external data file. Raises ImageError or OptionError.
    """
    if not header.incompatible & EXTERNAL_DATA:
        return None
    name = header.data_file
    if not name:
        raise ImageError("external data file name", name, "there, as the option 'data-file' is not given")
    if name.startswith("json:"):  # an image from elsewhere could name any node, on any host
        raise ImageError("external data file name", name, "the name of a file; other nodes are the option 'data-file'")
    path = image_path(name, file)
    if path == os.path.realpath(place_of(file) or ""):
        raise ImageError("external data file name", name, "another file than the image itself")
    return {"driver": "file", "filename": path}


def check_header(header: Header) -> None:
    """Raises ImageError for what cannot be together with an external data file."""
    if not header.incompatible & EXTERNAL_DATA:
        return
    if header.snapshot_count:
        raise ImageError("nb_snapshots", header.snapshot_count, "0 with an external data file")
    if header.autoclear & RAW_EXTERNAL and header.backing_file:
        raise ImageError("backing file name", header.backing_file, "absent with a raw external data file")


def check_data_file(header: Header, file: Child, child: Child | None, backing: Child | None) -> None:
    """Raises OptionError for a node that cannot be the image's data file (None: there is none), or a lack of it."""
    data = None if child is None else child.node
    if not header.incompatible & EXTERNAL_DATA:
        if data is not None:
            raise OptionError("data-file", data.name, "left out: the image has no external data file")
        return
    if data is None:
        raise OptionError("data-file", None, "a node: the image has an external data file")
    place = place_of(data)
    if data is file.node or (place is not None and os.path.realpath(place) == os.path.realpath(
            place_of(file.node) or "")):
        raise OptionError("data-file", data.name, "another file than the image itself")
    if data.length < header.size:
        raise OptionError("data-file", data.name, f"a file of {header.size} bytes or more, as the disk has; "
                                                  f"it has {data.length}")
    if backing is not None and header.autoclear & RAW_EXTERNAL:
        raise OptionError("backing", backing.node.name, "null: a raw external data file holds all of the disk")
