"""A small graph as a server tells it: an export over a quorum of two files, and a mirror of one of them."""

from __future__ import annotations

from typing import Any

from blockstep.picture.assemble import GRAPH

READING, WRITING, ALL = ["consistent-read"], ["consistent-read", "write"], [
    "consistent-read", "write", "write-unchanged", "resize"]


def edge(parent: int, child: int, name: str, perm: list[str], shared: list[str]) -> dict[str, Any]:
    return {"parent": parent, "child": child, "name": name, "perm": perm, "shared-perm": shared}


def node(name: str, driver: str, **more: Any) -> dict[str, Any]:
    return {"node-name": name, "drv": driver, "ro": False, "file": "json:{}",
            "image": {"virtual-size": 64 << 20, "filename": "json:{}"}, **more}


#: Ids out of order, and edges too: QEMU does not sort them.
ANSWERS: dict[str, Any] = {
    GRAPH: {
        "nodes": [
            {"id": 2, "type": "block-driver", "name": "vda"},
            {"id": 1, "type": "block-backend", "name": ""},
            {"id": 5, "type": "block-job", "name": "copy"},
            {"id": 4, "type": "block-driver", "name": "right"},
            {"id": 3, "type": "block-driver", "name": "left"},
        ],
        "edges": [
            edge(5, 4, "source", [], ALL),
            edge(2, 4, "children.1", WRITING, READING),
            edge(1, 2, "root", WRITING, ALL),
            edge(2, 3, "children.0", WRITING, READING),
        ],
    },
    "query-named-block-nodes": [
        node("vda", "quorum"), node("left", "file", file="/srv/left.img"),
        node("right", "file", file="/srv/right.img", ro=True)],
    "query-block-exports": [{"id": "disk", "type": "nbd", "node-name": "vda", "shutting-down": False}],
    "query-block-jobs": [
        {"device": "copy", "type": "mirror", "status": "running", "offset": 16 << 20, "len": 64 << 20}],
}
