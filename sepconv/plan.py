"""Which rank each layer gets: what the caller asked for, or what the budget allows."""

import math
from collections.abc import Mapping, Sequence

from sepconv.budget import Budget
from sepconv.factorize import Option, allocate, full_rank, weight_errors
from sepconv.graph import Match
from sepconv.report import Report
from sepconv.select import Rank

DENSE = None  # the choice to leave a layer as it is


def ranks_asked(
    matches: Sequence[Match], ranks: Mapping[str, Rank | None]
) -> dict[str, int | None]:
    """The caller's ranks, at most each layer's full rank; rank 1 where none was named."""
    planned: dict[str, int | None] = {}
    for conv in matches:
        full = full_rank(conv.weight_2d.shape)
        wanted = ranks[conv.name]
        planned[conv.name] = full if wanted == "full" else min(wanted or 1, full)
    return planned


def ranks_within(
    matches: Sequence[Match], budget: Budget, params: int, macs: int | None
) -> dict[str, int | None]:
    """Ranks, or dense, with the least sum of relative squared weight errors within the budget.

    Args:
        matches: the layers to choose for.
        budget: of `macs` or `params`.
        params: parameters of the whole original model.
        macs: multiply-adds of the whole original model.

    Raises:
        ValueError: the budget is below what rank 1 everywhere costs.
    """
    if budget.kind not in ("macs", "params"):
        raise NotImplementedError(f"budget: {budget.kind} needs calibration, which is not given")
    total = params if budget.kind == "params" else macs
    assert total is not None, "check_options() asks for example inputs"
    options = [_options(conv, budget.kind) for conv in matches]
    choices = [[option for _, option in layer] for layer in options]
    # What the chosen layers do not account for stays: other layers, biases, heads.
    rest = total - sum(layer[-1].cost for layer in choices)
    limit = budget.fraction * total - rest
    cheapest = sum(min(option.cost for option in layer) for layer in choices)
    if cheapest > limit:
        lowest = math.ceil((rest + cheapest) / total * 1e4) / 1e4
        raise ValueError(
            f"budget: {budget.kind}={budget.fraction:g} of the model cannot be reached; "
            f"the lowest reachable is {lowest:.4f} (rank 1 in {len(matches)} convolutions)"
        )
    chosen = allocate(choices, limit)
    return {
        conv.name: layer[index][0]
        for conv, layer, index in zip(matches, options, chosen, strict=True)
    }


def check_within(budget: Budget, made: Report) -> None:
    """Raise `ValueError` where layers that were kept for their latency broke the budget."""
    before, after = (
        (made.params_before, made.params_after)
        if budget.kind == "params"
        else (made.macs_before, made.macs_after)
    )
    if before and after is not None and after > budget.fraction * before:
        raise ValueError(
            f"budget, only_if_faster: expected {budget.kind} <= {budget.fraction:g} of the model, "
            f"got {after / before:.4f} from the layers that measure faster"
        )


def _options(conv: Match, kind: str) -> list[tuple[int | None, Option]]:
    """Every rank that is cheaper than the dense form, and last the dense form."""
    errors = weight_errors(conv.weight_2d)
    dense = conv.dense_macs if kind == "macs" else conv.dense_params
    options: list[tuple[int | None, Option]] = []
    for rank in range(1, len(errors)):
        cost = conv.macs(rank) if kind == "macs" else conv.params(rank)
        if cost < dense:
            options.append((rank, Option(cost, float(errors[rank]))))
    return [*options, (DENSE, Option(dense, 0.0))]
