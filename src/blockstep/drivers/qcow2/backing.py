"""What the name of a backing file in a header means: the options of a node.

    name                               is
    /srv/base.img, base.img, file:...  a file; a relative name begins at the directory of the image that has it
    json:{...}                         options as of ``blockdev-add``, also with dots ("file.filename")

The format must be in the header (or in the json: options): it is never guessed from content, because the one who writes
into a raw backing file could make an image of it that names any file of the host.
"""

from __future__ import annotations

import json
import os
from typing import Any

from blockstep.block.driver import Driver
from blockstep.drivers.qcow2.format import Header
from blockstep.errors import ImageError, OptionError


def backing_options(header: Header, file: Driver) -> dict[str, Any] | None:
    """The options of the backing node that the header names; ``file`` is the node that the image lies in.

    None: it names none. Raises ImageError or OptionError.
    """
    name = header.backing_file
    if not name:
        return None
    if name.startswith("json:"):
        return options_of_json(name, header.backing_format)
    driver = header.backing_format
    if driver not in ("raw", "qcow2", "overlay"):
        raise ImageError("backing file format", driver, "raw or qcow2: formats are not guessed; give the option "
                                                        "'backing', or write the format into the header")
    if driver == "overlay":
        return {"driver": "overlay", "filename": image_path(name, file)}
    return {"driver": driver, "file": {"driver": "file", "filename": image_path(name, file)}}


def image_path(name: str, file: Driver) -> str:
    """The path that a name in an image stands for; relative ones begin at the image's directory."""
    name = name.removeprefix("file:")
    if "://" in name.split("/./")[0]:
        raise ImageError("backing file name", name, "the name of a file, or json: with the options of a node")
    return os.path.realpath(os.path.join(os.path.dirname(place_of(file) or ""), name))


def place_of(file: Driver) -> str | None:
    """The path of the file that a node stands for, None if it stands for no file."""
    node = file
    while "file" in node.children:
        node = node.children["file"].node
    filename = getattr(node.options, "filename", None)
    return os.path.abspath(filename) if isinstance(filename, str) else None


def options_of_json(name: str, driver: str | None) -> dict[str, Any]:
    """The options in a ``json:`` name; ``driver``: the one that it may leave out. Raises ImageError or OptionError."""
    try:
        given = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError) as error:
        raise ImageError("backing file name", name, "json: and an object") from error
    if not isinstance(given, dict):
        raise ImageError("backing file name", name, "json: and an object")
    options: dict[str, Any] = {}
    for key, value in given.items():
        *path, last = key.split(".")
        place = options
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise OptionError("backing", name, "options that do not contradict each other")
        place[last] = value
    if driver is not None:
        options.setdefault("driver", driver)
    return options
