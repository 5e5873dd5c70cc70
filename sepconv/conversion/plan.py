"""Which rank each layer gets: what the caller asked for, or what the budget allows."""

import math
from collections.abc import Callable, Mapping, Sequence

from sepconv.conversion.budget import Budget
from sepconv.conversion.select import Rank
from sepconv.factorize import Option, allocate, full_rank, weight_errors
from sepconv.factorize.knapsack import knapsack
from sepconv.graph import Match
from sepconv.reports.conversion import Report

DENSE = None  # the choice to leave a layer as it is

Ranks = dict[str, int | None]
Costs = dict[str, dict[int | None, float]]  # by layer, of each rank and of dense
Errors = Mapping[str, Mapping[int, float]]  # by layer and rank

_BISECTIONS = 7  # narrows the fraction down to one percent


def ranks_asked(matches: Sequence[Match], ranks: Mapping[str, Rank | None]) -> Ranks:
    """The caller's ranks, at most each layer's full rank; rank 1 where none was named."""
    planned: Ranks = {}
    for conv in matches:
        full = full_rank(conv.weight_2d.shape)
        wanted = ranks[conv.name]
        planned[conv.name] = full if wanted == "full" else min(wanted or 1, full)
    return planned


def counted_costs(matches: Sequence[Match], kind: str, new_biases: bool) -> Costs:
    """Multiply-adds or parameters of every rank that is cheaper than the dense form, and of it.

    Args:
        matches: the layers to choose for.
        kind: `macs` or `params`.
        new_biases: whether layers without a bias get one, as calibration gives them.
    """
    costs: Costs = {}
    for conv in matches:
        ranks = range(1, full_rank(conv.weight_2d.shape) + 1)
        if kind == "macs":
            forms: dict[int | None, float] = {rank: conv.macs(rank) for rank in ranks}
            forms[DENSE] = conv.dense_macs
        else:
            extra = len(conv.weight) if new_biases and conv.bias is None else 0
            forms = {rank: conv.params(rank) + extra for rank in ranks}
            forms[DENSE] = conv.dense_params
        costs[conv.name] = cheaper_than_dense(forms)
    return costs


def cheaper_than_dense(forms: Mapping[int | None, float]) -> dict[int | None, float]:
    """The forms that cost less than the dense one, and last that."""
    dense = forms[DENSE]
    cheaper = {rank: cost for rank, cost in forms.items() if cost < dense}
    return cheaper | {DENSE: dense}


def ranks_to_choose(costs: Costs) -> dict[str, list[int]]:
    """The ranks among the forms of each layer."""
    return {name: [r for r in forms if r is not None] for name, forms in costs.items()}


def weight_only_errors(matches: Sequence[Match]) -> Errors:
    """Relative squared errors of the weights, where there is no data to measure anything else."""
    return {conv.name: dict(enumerate(weight_errors(conv.weight_2d).tolist())) for conv in matches}


def ranks_within(budget: Budget, costs: Costs, errors: Errors, total: float) -> Ranks:
    """Ranks, or dense, with the least sum of errors within the budget.

    Args:
        budget: of what `costs` counts.
        costs: by layer, of each form.
        errors: by layer, of each rank; a layer without any stays dense.
        total: cost of the whole original model.

    Raises:
        ValueError: the budget is below what the cheapest forms cost.
    """
    forms = {
        name: {r: c for r, c in layer.items() if r is DENSE or r in errors.get(name, {})}
        for name, layer in costs.items()
    }
    choices = [
        [Option(cost, 0.0 if r is DENSE else errors[name][r]) for r, cost in layer.items()]
        for name, layer in forms.items()
    ]
    limit = reachable_limit(budget, forms, total)
    # Latency comes in steps, which no convex hull describes; counts are nearly convex.
    choose = knapsack if budget.kind == "latency" else allocate
    chosen = choose(choices, limit)
    return {name: list(layer)[i] for (name, layer), i in zip(forms.items(), chosen, strict=True)}


def reachable_limit(budget: Budget, costs: Costs, total: float) -> float:
    """What the layers of `costs` may cost together, so that the model is within the budget.

    Raises:
        ValueError: it is below what their cheapest forms cost.
    """
    # What they do not account for stays: other layers, biases, heads.
    rest = max(total - sum(layer[DENSE] for layer in costs.values()), 0.0)
    limit = budget.fraction * total - rest
    cheapest = sum(min(layer.values()) for layer in costs.values())
    if cheapest > limit:
        lowest = math.ceil((rest + cheapest) / total * 1e4) / 1e4
        raise ValueError(
            f"budget: {budget.kind}={budget.fraction:g} of the model cannot be reached; "
            f"the lowest reachable is {lowest:.4f} (the cheapest form of {len(costs)} "
            "convolutions)"
        )
    return limit


def ranks_for_error(
    limit: float, costs: Costs, errors: Errors, total: float, measure: Callable[[Ranks], float]
) -> Ranks:
    """The cheapest ranks whose measured error stays within a limit, by bisecting the budget.

    Args:
        limit: the largest error.
        costs: multiply-adds by layer, of each form.
        errors: by layer, of each rank.
        total: multiply-adds of the whole original model.
        measure: the error of a plan.
    """
    best: Ranks = dict.fromkeys(costs, DENSE)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        fraction = (low + high) / 2
        try:
            planned = ranks_within(Budget(macs=fraction), costs, errors, total)
        except ValueError:
            low = fraction
            continue
        if measure(planned) <= limit:
            best, high = planned, fraction
        else:
            low = fraction
    return best


def check_within(budget: Budget, made: Report) -> None:
    """Raise `ValueError` where layers that were kept for their latency broke the budget."""
    if budget.kind not in ("macs", "params"):
        return
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
