"""Choose one option per layer where costs come in steps: a multiple-choice knapsack."""

import math
from collections.abc import Sequence

import numpy as np

from sepconv.factorize.allocate import Option

UNITS = 4096  # steps the limit is divided into where microseconds would be more


def knapsack(layers: Sequence[Sequence[Option]], limit: float) -> list[int]:
    """Pick an option for every layer: least total error within a total cost.

    Dynamic programming over the cost in whole units, as HALP (Shen et al. 2022) does with
    latency tables. A unit is a microsecond (costs are seconds), or a `UNITS`th of the limit where
    that is longer. Costs are rounded up, so the limit holds; the choice is optimal for the
    rounded costs.

    Args:
        layers: the options of each layer, in any order; costs in seconds.
        limit: the largest total cost.

    Returns:
        The index of the option chosen for each layer.

    Raises:
        ValueError: even the cheapest options together cost more than the limit.

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
    unit = max(1e-6, spare / UNITS)
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
    return chosen[::-1]
