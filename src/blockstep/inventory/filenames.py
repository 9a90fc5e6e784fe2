"""How a node is called where QEMU shows a file name: the file, the URI, or the options as ``json:{...}``."""

from __future__ import annotations

import json
import os
from typing import Any, Final

import msgspec

from blockstep.block.driver import Driver
from blockstep.block.node import NodeOptions
from blockstep.drivers.file import File
from blockstep.drivers.memory import Memory
from blockstep.drivers.nbd import Nbd
from blockstep.drivers.overlay import Overlay
from blockstep.drivers.qcow2.driver import Qcow2
from blockstep.drivers.raw import Raw

#: What says how a node is used, not which it is.
_LEFT_OUT: Final = {field.name for field in msgspec.structs.fields(NodeOptions)}


def filename_of(node: Driver) -> str:
    """For people, and for those who look for a file by its name."""
    if isinstance(node, File):
        return node.options.filename
    if isinstance(node, Overlay) and node.options.filename is not None:
        return node.options.filename
    if isinstance(node, Nbd) and node.uri:
        return node.uri
    if isinstance(node, Qcow2):
        return filename_of(node.file.node)
    if isinstance(node, Raw) and not node.options.offset and node.options.size is None:
        return filename_of(node.file.node)
    return "json:" + json.dumps(_options(node))


def actual_size(node: Driver) -> int | None:
    """Bytes that it occupies where its data lies, if that is known here."""
    if isinstance(node, (File, Memory)):
        return os.fstat(node.fd).st_blocks * 512
    if isinstance(node, Overlay):
        return node.used
    if (node.is_filter or isinstance(node, (Raw, Qcow2))) and "file" in node.children:
        return actual_size(node.children["file"].node)
    return None


def _options(node: Driver) -> dict[str, Any]:
    found: dict[str, Any] = {"driver": node.driver}
    for field in msgspec.structs.fields(node.options):
        value = getattr(node.options, field.name)
        if field.name not in _LEFT_OUT and field.name not in node.child_roles and value != _default(field):
            found[field.encode_name] = msgspec.to_builtins(value)
    for name, edge in node.children.items():
        if "." in name:
            found.setdefault(name.partition(".")[0], []).append(_options(edge.node))
        else:
            found[name] = _options(edge.node)
    return found


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
