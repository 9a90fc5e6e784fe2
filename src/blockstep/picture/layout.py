"""Where the boxes of a drawing go: layers from top to bottom, each box below all that use it.

The usual three steps, in their simplest form:

1. *Layers.* A box lies one below the lowest of its parents. An edge over several layers gets a waypoint in each of
   those between, so that it is led around the boxes.
2. *Order.* In sweeps down and up, each layer is sorted by the mean position of the neighbours in the layer before:
   few crossings, not the fewest.
3. *Place.* In sweeps again, each is moved to the mean of its neighbours, as far as its own neighbours in the layer
   leave room. Edges leave and reach a box side by side, in the order of where they come from and go to.

Block graphs have some tens of boxes; nothing here is meant for thousands. No graphviz is needed, and the same graph
gives the same drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

import msgspec

#: Between boxes side by side, and between layers, in the unit of the sizes given; room for an edge that passes a layer.
GAP_X: Final = 28.0
GAP_Y: Final = 64.0
PASSAGE: Final = 48.0
_SWEEPS: Final = 8

Point = tuple[float, float]


class Rect(msgspec.Struct, frozen=True):
    """A place: its upper left corner and its size."""

    x: float
    y: float
    width: float
    height: float


class Layout(msgspec.Struct, frozen=True):
    """Where everything is. ``routes``: as the edges were given, from the parent's lower to the child's upper rim."""

    places: dict[int, Rect]
    routes: list[list[Point]]
    width: float
    height: float


class _Item(msgspec.Struct, eq=False):
    """A box, or a waypoint of an edge."""

    layer: int
    width: float
    height: float
    above: list[_Item]
    below: list[_Item]
    x: float = 0.0  # of its middle


def lay_out(sizes: Mapping[int, tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Place boxes of the given (width, height), with (parent, child) edges that make no cycle."""
    depths = _depths(sizes, edges)
    items = {id: _Item(depths[id], *size, [], []) for id, size in sizes.items()}
    chains = [_chain(items[parent], items[child]) for parent, child in edges]
    every = [*items.values(), *(item for chain in chains for item in chain[1:-1])]
    layers = [[item for item in every if item.layer == depth] for depth in range(max(depths.values(), default=-1) + 1)]
    _order(layers)
    _place(layers)
    left = min((item.x - item.width / 2 for item in every), default=0.0)
    heights = [max(item.height for item in layer) for layer in layers]
    tops = [sum(heights[:depth]) + GAP_Y * depth for depth in range(len(layers))]
    places = {id: Rect(item.x - item.width / 2 - left, tops[item.layer], item.width, item.height)
              for id, item in items.items()}
    starts = _ports([(chain[0], chain[1]) for chain in chains])
    ends = _ports([(chain[-1], chain[-2]) for chain in chains])
    routes = [_route(chain, start, end, tops, heights, left)
              for chain, start, end in zip(chains, starts, ends, strict=True)]
    width = max((item.x + item.width / 2 - left for item in every), default=0.0)
    return Layout(places, routes, width, sum(heights) + GAP_Y * max(len(layers) - 1, 0))


def _depths(sizes: Mapping[int, object], edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    depths = dict.fromkeys(sizes, 0)
    for _ in sizes:
        for parent, child in edges:
            depths[child] = max(depths[child], depths[parent] + 1)
    # A user stands right above what it uses, and not at the top of everything.
    used = {child for _, child in edges}
    for id in sizes:
        if id not in used:
            depths[id] = min((depths[child] for parent, child in edges if parent == id), default=1) - 1
    return depths


def _chain(parent: _Item, child: _Item) -> list[_Item]:
    """The ends of an edge, and waypoints between them, linked."""
    between = [_Item(layer, PASSAGE, 0.0, [], []) for layer in range(parent.layer + 1, child.layer)]
    chain = [parent, *between, child]
    for upper, lower in pairwise(chain):
        upper.below.append(lower)
        lower.above.append(upper)
    return chain


def _order(layers: list[list[_Item]]) -> None:
    for layer in layers:
        _number(layer)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else layers[::-1]:
            layer.sort(key=lambda item: _middle(item.above if down else item.below, item.x))
            _number(layer)


def _number(layer: list[_Item]) -> None:
    for position, item in enumerate(layer):
        item.x = float(position) - (len(layer) - 1) / 2


def _place(layers: list[list[_Item]]) -> None:
    for layer in layers:
        _spread(layer, [0.0] * len(layer))
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else layers[::-1]:
            _spread(layer, [_middle(item.above if down else item.below, item.x) for item in layer])


def _spread(layer: list[_Item], wanted: list[float]) -> None:
    """Give each the place that it wants, or the mean of the nearest from the left and from the right that are free."""
    steps = [(a.width + b.width) / 2 + GAP_X for a, b in pairwise(layer)]
    from_left, from_right = wanted[:], wanted[:]
    for index, step in enumerate(steps):
        from_left[index + 1] = max(from_left[index + 1], from_left[index] + step)
    for index, step in reversed(list(enumerate(steps))):
        from_right[index] = min(from_right[index], from_right[index + 1] - step)
    for item, left, right in zip(layer, from_left, from_right, strict=True):
        item.x = (left + right) / 2


def _middle(items: list[_Item], otherwise: float) -> float:
    return sum(item.x for item in items) / len(items) if items else otherwise


def _ports(links: list[tuple[_Item, _Item]]) -> list[float]:
    """For each (box, where an edge of it comes from or goes to): where on the box's rim the edge stands."""
    ports = [0.0] * len(links)
    for box in {id(box): box for box, _ in links}.values():
        mine = sorted((other.x, index) for index, (one, other) in enumerate(links) if one is box)
        for position, (_, index) in enumerate(mine):
            ports[index] = box.x + box.width * ((position + 0.5) / len(mine) - 0.5)
    return ports


def _route(chain: list[_Item], start: float, end: float, tops: list[float], heights: list[float],
           left: float) -> list[Point]:
    first, *between, last = chain
    points = [(start - left, tops[first.layer] + first.height)]
    for item in between:
        points.append((item.x - left, tops[item.layer]))
        points.append((item.x - left, tops[item.layer] + heights[item.layer]))
    return [*points, (end - left, tops[last.layer])]
