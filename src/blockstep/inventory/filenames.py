"""How a node is called where QEMU shows a file name: the file, the URI, or the options as ``json:{...}``."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from blockstep.block.driver import Driver
from blockstep.block.node import NodeOptions

#: What says how a node is used, not which it is.
_LEFT_OUT: Final = {field.name for field in msgspec.structs.fields(NodeOptions)}


def filename_of(node: Driver) -> str:
    """For people, and for those who look for a file by its name."""
    shown = node.shown_as()
    if isinstance(shown, Driver):
        return filename_of(shown)
    return "json:" + json.dumps(_options(node)) if shown is None else shown


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
