"""Choose one option per layer: least total error within a total cost."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One form a layer can take: what it costs and the error it makes."""

    cost: float
    error: float


def allocate(layers: Sequence[Sequence[Option]], limit: float) -> list[int]:
    """Pick an option for every layer by the steepest fall of error per cost.

    Walks the lower convex hull of each layer's options from its cheapest one, always taking the
    step that lowers the error most per unit of cost. For additive costs that is optimal wherever
    the limit falls on a step (Lagrangian duality; for ranks: Dbouk and Shanbhag, "GDWS", 2021);
    below that, remaining room is filled with the steepest steps that still fit.

    Args:
        layers: the options of each layer, in any order.
        limit: the largest total cost.

    Returns:
        The index of the option chosen for each layer.

    Raises:
        ValueError: even the cheapest options together cost more than the limit.

    Example:
        >>> allocate([[Option(1, 5.0), Option(3, 0.0)], [Option(1, 4.0), Option(3, 3.5)]], 4)
        [1, 0]
    """
    hulls = [_lower_hull(options) for options in layers]
    chosen = [hull[0] for hull in hulls]
    spent = sum(layers[i][k].cost for i, k in enumerate(chosen))
    if spent > limit:
        raise ValueError(f"limit: the cheapest options cost {spent:g}, got a limit of {limit:g}")

    queue: list[tuple[float, int, int]] = []

    def offer(layer: int, position: int) -> None:
        """Queue the step of a layer from one hull point to the next."""
        if position + 1 < len(hulls[layer]):
            a, b = (layers[layer][hulls[layer][position + i]] for i in (0, 1))
            heapq.heappush(queue, ((b.error - a.error) / (b.cost - a.cost), layer, position))

    for layer in range(len(layers)):
        offer(layer, 0)
    while queue:
        _, layer, position = heapq.heappop(queue)
        here, there = hulls[layer][position], hulls[layer][position + 1]
        step = layers[layer][there].cost - layers[layer][here].cost
        if spent + step <= limit:
            spent += step
            chosen[layer] = there
            offer(layer, position + 1)
    return chosen


def _lower_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options no mixture of two others beats, cheapest first."""
    order = sorted(range(len(options)), key=lambda k: options[k])
    hull: list[int] = []
    for k in order:
        if hull and options[k].error >= options[hull[-1]].error:
            continue  # dearer and no better
        # Points on the line between two others stay: small steps fit where a big one does not.
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) > _slope(options, hull[-2], k):
            hull.pop()
        hull.append(k)
    return hull


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    return (options[b].error - options[a].error) / (options[b].cost - options[a].cost)
