"""New options for nodes that are open: whole sets of options, taken together or not at all.

    await reopen(graph, [{"driver": "raw", "node-name": "disk", "read-only": True, "file": "storage"}, ...])

A set says everything, as if the node were opened now: what it leaves out gets its default back. What differs from the
node's present options must be something that can change while the node is open:

* `Node.live_options`: looked at when needed; the new ones are put in place;
* what the driver prepares: ``read-only``, ``cache.direct`` of files, the group of a throttle node;
* the single children, ``file`` and ``backing``: another node by name, or null for no backing node. The length that
  users see stays the same.

A child that came with its parent may be given new options in its parent's set, or in one of its own. If it is not, it
follows its parent in what it has taken over from it (`child_options`); a backing node does not.

Everything is prepared and checked first, under drain; see `Graph.reopen`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from blockstep.block.driver import Driver
from blockstep.block.graph import Change, Graph, child_name, child_options, given_names
from blockstep.block.node import Child, NodeOptions
from blockstep.block.permissions import Role
from blockstep.block.registry import parse_options
from blockstep.errors import GraphError, OptionError


class _Plan(msgspec.Struct):
    """What changes at one node."""

    node: Driver
    options: NodeOptions
    #: What the driver has to prepare, flat: ``cache.direct``.
    prepared: dict[str, Any] = msgspec.field(default_factory=dict)
    rewire: list[Callable[[Change], object]] = msgspec.field(default_factory=list)
    #: Children that it gives up.
    left: list[Driver] = msgspec.field(default_factory=list)
    #: `Node.given` from now on, if that changes.
    given: frozenset[str] | None = None


async def reopen(graph: Graph, option_sets: Sequence[Mapping[str, Any]], strict: bool = True) -> None:
    """See the module. Raises NodeNotFound, OptionError, GraphError or OSError; then nothing has changed.

    But for what closing the nodes raises that were given up and belonged to nobody else: that is told when all is done.
    """
    plans: list[_Plan] = []
    for options in option_sets:
        name = options.get("node-name")
        if not isinstance(name, str):
            raise OptionError("node-name", name, "given: the node that gets these options")
        _plan(graph, graph.find(name), options, plans, strict)
    for plan in plans[:]:
        _plan_followers(plan, plans)
    for plan in plans:
        plan.node.check_operation("reopen")

    def rewire(change: Change) -> None:
        for plan in plans:
            for step in plan.rewire:
                step(change)

    await graph.reopen([(plan.node, plan.prepared) for plan in plans], rewire)
    for plan in plans:
        plan.options.node_name = plan.node.options.node_name
        if plan.given is not None:
            plan.node.given = plan.given
        plan.node.options = plan.options
    await graph.close_all_unused([node for plan in plans for node in plan.left])


def _plan(graph: Graph, node: Driver, options: Mapping[str, Any], plans: list[_Plan], strict: bool,
          given: frozenset[str] | None = None) -> None:
    if any(plan.node is node for plan in plans):
        raise OptionError("node-name", node.name, "in one set of options only")
    driver, wanted = parse_options(options, strict)
    if driver is not type(node):
        raise OptionError("driver", options["driver"], f"{node.driver}, which node '{node.name}' is")
    if wanted.force_share and not wanted.read_only:
        raise OptionError("force-share", True, "off, except with read-only")
    plan = _prepared(node, wanted)
    if node.given is not None:
        plan.given = given or given_names(options)
    plans.append(plan)
    for name, role in driver.child_roles.items():
        if isinstance(getattr(wanted, name), list):
            _same_children(node, name, getattr(wanted, name))
        else:
            _plan_child(graph, plan, name, role, options, plans, strict)


def _prepared(node: Driver, wanted: NodeOptions) -> _Plan:
    """What changes at the node itself."""
    plan = _Plan(node, wanted)
    present = _flat(node.options)
    for name, value in _flat(wanted).items():
        if value != present[name] and name not in _known(node):
            plan.prepared[name] = value
    plan.prepared["read-only"] = wanted.read_only
    if wanted.auto_read_only and not wanted.read_only and not node.options.read_only:
        plan.prepared["read-only"] = node.read_only  # the storage has decided that
    return plan


def _known(node: Driver) -> set[str]:
    """The options that are not for the driver to prepare."""
    return {"node-name", "read-only", *node.live_options, *map(child_name, node.child_roles)}


def _plan_followers(above: _Plan, plans: list[_Plan]) -> None:
    """Plan for the children that came with the node and are in no set, as far as they follow it."""
    for edge in above.node.children.values():
        node = edge.node
        if node.given is None or node.owned or edge.role is Role.BACKING or any(plan.node is node for plan in plans):
            continue
        options = child_options(above.options, edge.role, {})
        wanted = msgspec.structs.replace(node.options, cache=msgspec.structs.replace(node.options.cache))
        for name in {"auto-read-only", "discard", "force-share", "read-only"} - node.given:
            default = "ignore" if name == "discard" else False
            setattr(wanted, name.replace("-", "_"), options.get(name, default))
        for name in ("direct", "no-flush"):
            if f"cache.{name}" not in node.given:
                setattr(wanted.cache, name.replace("-", "_"), options.get("cache", {}).get(name, False))
        if wanted != node.options:
            plan = _prepared(node, wanted)
            plans.append(plan)
            _plan_followers(plan, plans)


def _plan_child(graph: Graph, plan: _Plan, field: str, role: Role, options: Mapping[str, Any], plans: list[_Plan],
                strict: bool) -> None:
    node, reference, name = plan.node, getattr(plan.options, field), child_name(field)
    edge = node.children.get(name)
    if reference == {} and getattr(node.options, field) == {}:  # what the image names, as before
        return
    if reference is None or reference == {}:  # {}: as the image says, `Node.implied_children`
        if edge is None:
            return
        if name not in options or reference == {}:
            raise OptionError(name, None, f"given, as node '{node.name}' has one: a node, or null for none")
        still = _still(edge)
        plan.left.append(edge.node)
        plan.rewire.append(lambda change: change.detach(still()))
    elif isinstance(reference, str):
        wanted = graph.find(reference)
        if edge is None:
            if role is not Role.BACKING:
                raise OptionError(name, reference, f"left out: node '{node.name}' has none")
            plan.rewire.append(lambda change: change.attach(node, name, role, wanted))
        elif wanted is not edge.node:
            _check_length(edge, role, wanted)
            still = _still(edge)
            plan.left.append(edge.node)
            plan.rewire.append(lambda change: change.move(still(), wanted))
    elif edge is None or edge.node.owned or reference.get("node-name", edge.node.name) != edge.node.name:
        raise OptionError(name, reference, "the name of a node, or the options of the child that came with its parent")
    else:
        _plan(graph, edge.node, child_options(plan.options, role, reference), plans, strict, given_names(reference))


def _still(edge: Child) -> Callable[[], Child]:
    """The edge, when the nodes are drained at last. Raises GraphError if others have changed it meanwhile."""
    node = edge.node

    def there() -> Child:
        if edge.node is not node or edge not in node.parents:
            raise GraphError(f"the child '{edge.name}' of node '{edge.parent.description}' was changed by others "
                             "meanwhile")
        return edge

    return there


def _same_children(node: Driver, name: str, references: Sequence[Any]) -> None:
    present = [edge.node for child, edge in node.children.items() if child.startswith(f"{name}.")]
    wanted = [reference if isinstance(reference, str) else reference.get("node-name") for reference in references]
    if len(wanted) != len(present) or any(
            name not in (None, child.name) for name, child in zip(wanted, present, strict=True)):
        raise OptionError(name, wanted, f"{[child.name for child in present]}, as node '{node.name}' has them now: "
                          "children come and go by x-blockdev-change")


def _check_length(edge: Child, role: Role, node: Driver) -> None:
    if role is not Role.BACKING and node.length != edge.node.length:
        raise OptionError(edge.name, node.name, f"a node of {edge.node.length} bytes, as '{edge.node.name}' has; "
                          f"it has {node.length}")


def _flat(options: NodeOptions) -> dict[str, Any]:
    """The options by their names; those of ``cache`` one by one."""
    flat: dict[str, Any] = {}
    for info in msgspec.structs.fields(options):
        value = getattr(options, info.name)
        if info.name == "cache":
            flat.update({f"cache.{each.encode_name}": getattr(value, each.name)
                         for each in msgspec.structs.fields(value)})
        else:
            flat[info.encode_name] = value
    return flat
