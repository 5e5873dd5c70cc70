"""Choose one option per layer where costs come in steps: a multiple-choice knapsack."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

UNITS = 32768  # steps that the limit is divided into at most


class Option(NamedTuple):
    """One form a layer can take: what it costs and the error it makes."""

    cost: float
    error: float


def knapsack(
    layers: Sequence[Sequence[Option]], limit: float, least_unit: float = 1e-6
) -> list[int]:
    """Pick an option for every layer: least total error within a total cost.

    Dynamic programming over the cost in whole units, as HALP (Shen et al. 2022) does with
    latency tables. Costs are rounded up to units, so the limit holds; the choice is optimal for
    the rounded costs, and what room the rounding left is filled with the best steps that fit.

    Args:
        layers: The options of each layer, in any order.
        limit: The largest total cost.
        least_unit: What no cost is divided further than: a microsecond of a latency in seconds,
            1 of a count. A unit is as many of these as leave at most `UNITS` units.

    Returns:
        The index of the option chosen for each layer.

    Raises:
        ValueError: Even the cheapest options together cost more than the limit.

    Example:
        >>> first = [Option(3e-6, 1.0), Option(6e-6, 0.0)]
        >>> second = [Option(2e-6, 2.0), Option(6e-6, 0.0)]
        >>> knapsack([first, second], 9e-6)
        [0, 1]
    """
    cheapest = [min(option.cost for option in options) for options in layers]
    spare = limit - sum(cheapest)
    if spare < 0:
        raise ValueError(f"limit: the cheapest options cost {sum(cheapest):g}, got {limit:g}")
    # Only what exceeds the cheapest option is rounded, so that a limit which just fits does fit.
    unit = least_unit * max(1, math.ceil(spare / UNITS / least_unit))
    room = math.floor(spare / unit + 1e-9)
    least = np.zeros(room + 1)  # least error of the layers so far, by units spent at most
    picks: list[np.ndarray] = []
    for options, base in zip(layers, cheapest, strict=True):
        best = np.full(room + 1, np.inf)
        pick = np.zeros(room + 1, dtype=np.int64)
        for index, option in enumerate(options):
            units = math.ceil((option.cost - base) / unit - 1e-9)
            if units > room:
                continue
            error = least[: room + 1 - units] + option.error
            better = error < best[units:]
            best[units:][better] = error[better]
            pick[units:][better] = index
        picks.append(pick)
        least = best
    chosen: list[int] = []
    for options, base, pick in reversed(list(zip(layers, cheapest, picks, strict=True))):
        index = int(pick[room])
        chosen.append(index)
        room -= math.ceil((options[index].cost - base) / unit - 1e-9)
    return _filled(layers, chosen[::-1], limit)


def _filled(layers: Sequence[Sequence[Option]], chosen: list[int], limit: float) -> list[int]:
    """Change the choice of one layer after the other, as long as it lowers the error and fits."""
    while True:
        spent = sum(options[i].cost for options, i in zip(layers, chosen, strict=True))
        steps = [
            (option.error - options[i].error, layer, index)
            for layer, (options, i) in enumerate(zip(layers, chosen, strict=True))
            for index, option in enumerate(options)
            if spent - options[i].cost + option.cost <= limit
        ]
        gain, layer, index = min(steps, default=(0.0, 0, 0))
        if gain >= 0:
            return chosen
        chosen[layer] = index
