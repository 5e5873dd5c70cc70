"""The smallest model that is still good enough by the caller's own measure."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from sepconv._util import track
from sepconv.conversion.budgets import Budgets, Evaluate, Kind, score_of
from sepconv.conversion.options import UnreachableError
from sepconv.graph import ExampleInputs
from sepconv.graph.state import copied


def search(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any],
    evaluate: Evaluate,
    *,
    max_drop: float = 0.01,
    cost: Kind = "macs",
    steps: int = 5,
    **options: Any,
) -> nn.Module:
    """Convert under the smallest budget at which `evaluate` drops by at most `max_drop`.

    Bisects the budget; each step converts and evaluates once. The score is taken to fall with
    the budget, as it does but for noise; the result itself was evaluated.

    Args:
        model: Never changed.
        example_inputs: As for `sepconv.convert`.
        calibration: As for `sepconv.convert`; read once.
        evaluate: A score of a model, higher is better: accuracy on a validation set, say.
        max_drop: From the score of `model`, in the score's own unit.
        cost: What the budget is of.
        steps: Of the bisection; 5 find the budget to 0.03.
        options: For `sepconv.convert`.

    Returns:
        The converted model, or a copy in which nothing is converted where no budget would do.

    Raises:
        ValueError: An argument cannot be used, or `evaluate` does not return a finite number.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(32, 2))
        >>> x = torch.randn(16, 8, 4, 4)
        >>> def agreement(candidate: nn.Module) -> float:
        ...     return float((candidate(x).argmax(1) == net(x).argmax(1)).float().mean())
        >>> small = search(net, x[:1], [x], agreement, max_drop=0.5)
        >>> agreement(small) >= 0.5
        True
    """
    if not isinstance(max_drop, int | float) or not max_drop >= 0:
        raise ValueError(f"max_drop: expected a number of at least 0, got {max_drop!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an int of at least 1, got {steps!r}")
    budgets = Budgets(model, example_inputs, calibration, cost, **options)
    needed = score_of(evaluate, model) - max_drop

    best: Any = None
    low, high = 0.0, 1.0
    for _ in track(range(steps), "searching"):
        fraction = (low + high) / 2
        try:
            candidate = budgets.convert(fraction)
        except UnreachableError:
            low = fraction
            continue
        if score_of(evaluate, candidate) >= needed:
            best, high = candidate, fraction
        else:
            low = fraction
    if best is None:
        best = copied(model)
        warnings.warn(
            f"search: no budget tried keeps a score of {needed:g}; nothing was converted",
            stacklevel=2,
        )
    return best
