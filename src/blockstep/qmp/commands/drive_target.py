"""The target of a drive-mirror, as users of QEMU write it: one string for where it is.

    nbd://HOST:PORT/NAME    nbd+unix:///NAME?socket=PATH     NBD URIs
    nbd:HOST:PORT[:exportname=NAME]    nbd:unix:PATH[:exportname=NAME]     QEMU's older form of them
    file:PATH    PATH                                        a file
"""

from __future__ import annotations

import re
from typing import Any, Final

from blockstep.errors import OptionError

_OLD_UNIX: Final = re.compile(r"nbd:unix:(.+?)(?::exportname=(.*))?", re.DOTALL)
_OLD_INET: Final = re.compile(r"nbd:(\[[^\[\]]+\]|[^:\[\]]*):([0-9]+)(?::exportname=(.*))?", re.DOTALL)
_PROTOCOL: Final = re.compile(r"([A-Za-z0-9+.-]+):")


def target_options(target: str, node_name: str | None, unmap: bool) -> dict[str, Any]:
    """Options of a raw node over the target. Raises OptionError for one that is written in no way that we know."""
    below = {"discard": "unmap"} if unmap else {}
    name = {"node-name": node_name} if node_name is not None else {}
    return {"driver": "raw", **name, **below, "file": {**_protocol(target), **below}}


def _protocol(target: str) -> dict[str, Any]:
    if re.match(r"nbds?(\+unix)?://", target):
        return {"driver": "nbd", "uri": target}
    if found := _OLD_UNIX.fullmatch(target):
        return {"driver": "nbd", "server": {"type": "unix", "path": found[1]}, "export": found[2] or ""}
    if found := _OLD_INET.fullmatch(target):
        server = {"type": "inet", "host": found[1].strip("[]"), "port": found[2]}
        return {"driver": "nbd", "server": server, "export": found[3] or ""}
    protocol = _PROTOCOL.match(target)
    if protocol is None:
        return {"driver": "file", "filename": target}
    if protocol[1] != "file":
        raise OptionError("target", target, "an NBD URI or a file name")
    return {"driver": "file", "filename": target.removeprefix("file:")}
