"""From the answers of a QMP server to a picture.

The shape is that of ``x-debug-query-block-graph``; the other commands say what its boxes are. It knows users that
are neither nodes nor jobs only by a name: ``export 'ID'`` with us. QEMU leaves it empty: there exports are told apart
by the node below them.

Source: QEMU's QMP reference, XDbgBlockGraph, BlockDeviceInfo, BlockJobInfo, BlockExportInfo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from blockstep.block.registry import driver_names, find_driver
from blockstep.picture.model import Box, Edge, Picture
from blockstep.units import format_duration

#: The one command that a server must offer, with its arguments.
GRAPH: Final = "x-debug-query-block-graph"
#: All commands of which `assemble` understands the answer.
QUESTIONS: Final[Mapping[str, dict[str, Any]]] = {
    GRAPH: {},
    "query-named-block-nodes": {"flat": True},
    "query-block-exports": {},
    "query-block-jobs": {},
    "query-replication": {},
}

#: (driver, name of the child) -> its role, empty if that is not known.
RoleOf = Callable[[str, str], str]


def role_of(driver: str, child: str) -> str:
    """The role of a child, of our own drivers (as far as they are imported) and of what goes without saying."""
    if driver in driver_names():
        role = find_driver(driver).child_roles.get(child.partition(".")[0].replace("-", "_"))
        if role is not None:
            return role.value
    return "backing" if child == "backing" else ""


def assemble(answers: Mapping[str, Any], role_of: RoleOf = role_of) -> Picture:
    """The picture of the answers to `QUESTIONS`; all but `GRAPH` may be absent."""
    graph = answers[GRAPH]
    details = {node["node-name"]: node for node in answers.get("query-named-block-nodes") or ()}
    jobs = {job["device"]: job for job in answers.get("query-block-jobs") or ()}
    exports = list(answers.get("query-block-exports") or ())
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    files = {node["id"]: str(details.get(node["name"], {}).get("file", "")) for node in graph["nodes"]}
    below = {(edge["parent"], files[edge["child"]]) for edge in graph["edges"]}
    used = {edge["parent"]: names[edge["child"]] for edge in graph["edges"]}
    stages = _stages(answers.get("query-replication"))

    def box(node: Mapping[str, Any]) -> Box:
        id, name = node["id"], node["name"]
        if node["type"] == "block-driver":
            file = "" if files[id].startswith("json:") or (id, files[id]) in below else files[id]
            return _node(id, name, details.get(name, {}), file, stages.get(name, ""))
        if node["type"] == "block-job":
            return _job(id, name, jobs.get(name, {}))
        return _user(id, name, used.get(id), exports)

    boxes = tuple(box(node) for node in sorted(graph["nodes"], key=lambda node: int(node["id"])))
    types = {one.id: one.type for one in boxes}
    edges = tuple(
        Edge(parent=edge["parent"], child=edge["child"], name=edge["name"],
             role=role_of(types[edge["parent"]], edge["name"]),
             takes=frozenset(edge["perm"]), shares=frozenset(edge["shared-perm"]))
        for edge in graph["edges"])
    return Picture(boxes=boxes, edges=edges, headline=_headline(answers.get("query-replication")))


def _node(id: int, name: str, about: Mapping[str, Any], file: str, stage: str) -> Box:
    return Box(id=id, kind="node", name=name, type=about.get("drv", ""), read_only=about.get("ro", False), state=stage,
               size=about.get("image", {}).get("virtual-size"), file=file)


def _job(id: int, name: str, about: Mapping[str, Any]) -> Box:
    return Box(id=id, kind="job", name=name, type=about.get("type", ""), state=about.get("status", ""),
               current=about.get("offset"), total=about.get("len"))


def _user(id: int, name: str, node: str | None, exports: list[Any]) -> Box:
    """An export, if one of that id or, for a user without a name, of that node has no box yet."""
    for export in exports:
        if name == f"export '{export['id']}'" or (not name and export["node-name"] == node):
            exports.remove(export)
            return Box(id=id, kind="export", name=export["id"], type=export["type"],
                       state="shutting down" if export["shutting-down"] else "")
    return Box(id=id, kind="user", name=name)


def _stages(pair: Any) -> dict[str, str]:
    """Node name -> how its replication is. A disk of a pair has the name of its topmost node."""
    return {disk["name"]: disk["state"] for disk in (pair or {}).get("disks", ())}


def _headline(pair: Any) -> str:
    if not pair or "role" not in pair:
        return ""
    words = [f"pair {pair['pair']}" if pair["pair"] else "replication", pair["role"], pair["state"],
             pair["health"].replace("-", " ")]
    if checkpoint := pair.get("checkpoint"):
        words.append(f"checkpoint {checkpoint['epoch']}, {format_duration(checkpoint['age'])} old")
    return " · ".join(words)
