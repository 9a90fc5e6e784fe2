"""A small schema in QEMU's format: names of types are numbers there, and may be anything."""

from __future__ import annotations

from typing import Any

from blockstep.shell.catalogue import Catalogue


def member(name: str, type: str, optional: bool = False) -> dict[str, Any]:
    return {"name": name, "type": type, **({"default": None} if optional else {})}


def object_(name: str, *members: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"meta-type": "object", "name": name, "members": list(members), **more}


def command(name: str, arguments: str) -> dict[str, Any]:
    return {"meta-type": "command", "name": name, "arg-type": arguments, "ret-type": "0"}


SCHEMA: list[dict[str, Any]] = [
    *({"meta-type": "builtin", "name": name, "json-type": kind} for name, kind in
      [("str", "string"), ("int", "int"), ("number", "number"), ("bool", "boolean")]),
    command("query-status", "0"), command("block_resize", "1"), command("blockdev-add", "2"),
    command("job-cancel", "6"), command("block-export-del", "6"), command("tune", "7"),
    object_("0"),
    object_("1", member("node-name", "str", True), member("size", "int")),
    object_("2", member("driver", "3"), member("node-name", "str", True), member("read-only", "bool", True),
            tag="driver", variants=[{"case": "file", "type": "4"}, {"case": "quorum", "type": "5"}]),
    {"meta-type": "enum", "name": "3", "values": ["file", "quorum", "null"]},
    object_("4", member("filename", "str")),
    object_("5", member("children", "[8]"), member("vote-threshold", "int")),
    {"meta-type": "array", "name": "[8]", "element-type": "8"},
    {"meta-type": "alternate", "name": "8", "members": [{"type": "str"}, {"type": "2"}]},
    object_("6", member("id", "str")),
    object_("7", member("ratio", "number", True), member("label", "str", True), member("on", "bool", True)),
]

CATALOGUE = Catalogue(SCHEMA)
