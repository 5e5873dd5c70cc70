"""Which form each layer gets: what the caller asked for, or what the budget allows."""

import math
import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from sepconv._util import track
from sepconv.calibration.fit import Calibration
from sepconv.conversion.costs import (
    DENSE,
    Costs,
    counted_costs,
    forward_seconds,
    latency_costs,
)
from sepconv.conversion.options import Budget, Rank, UnreachableError
from sepconv.factorize import Form, full_rank, weight_curve
from sepconv.factorize.knapsack import Option, knapsack
from sepconv.graph import Capture, ExampleInputs, Match, Skipped, SkipReason
from sepconv.reports.conversion import Report
from sepconv.reports.latency import LatencyTable

Forms = dict[str, Form | None]
Errors = Mapping[str, Mapping[Form, float]]  # by layer and form
IsFaster = Callable[[str, Form | None], bool]  # a layer's form, by the layer's name

_BISECTIONS = 7  # narrows the fraction down to one percent


class Plan(NamedTuple):
    """A form, or dense, for every layer, and what it was chosen by.

    Attributes:
        forms: By layer.
        errors: By layer, of each form.
        costs: By layer, of each form.
        total: Cost of the whole original model.
        kind: Of the costs, a `Budget`'s.
    """

    forms: Forms
    errors: Errors
    costs: Costs
    total: float
    kind: str

    def alone(self, forms: Mapping[str, Form | None]) -> dict[str, float]:
        """The error of each layer in its form."""
        known = {n: self.errors.get(n, {}).get(f) for n, f in forms.items() if f is not DENSE}
        return {name: error for name, error in known.items() if error is not None}

    def budget_for(self, error: float) -> float | None:
        """The share of the total, to a hundredth, with which the sum is no more."""

        def is_enough(percent: int) -> bool:
            budget = Budget(**{self.kind: percent / 100})
            try:
                forms = forms_within(budget, self.costs, self.errors, self.total)
            except ValueError:
                return False
            return sum(self.alone(forms).values()) <= error

        percent = bisect_left(range(1, 100), True, key=is_enough) + 1
        return percent / 100 if percent < 100 else None


def forms_asked(matches: Sequence[Match], ranks: Mapping[str, Rank | None]) -> Forms:
    """The caller's ranks, at most what each layer has; rank 1 where none was named.

    A 1x1 convolution that they would not make smaller stays dense.
    """
    planned: Forms = {}
    for conv in matches:
        shape = tuple(conv.weight_2d.shape)
        wanted = full_rank(shape) if ranks[conv.name] == "full" else ranks[conv.name] or 1
        assert not isinstance(wanted, str), "check_rank() allows no other word"
        form = (wanted if isinstance(wanted, Form) else Form(wanted)).within(shape)
        planned[conv.name] = DENSE if conv.is_pointwise and form.is_plain else form
    return planned


def plan_for(
    budget: Budget,
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    captured: Capture,
    found: Sequence[Match | Skipped],
    calibration: Calibration | None,
    table: LatencyTable,
    bottleneck: bool,
    only_if_faster: bool,
    original: nn.Module,
) -> Plan:
    """A form, or dense, for every match within the budget.

    With calibration the error of a form is what it changes in the model's output, else what it
    changes in the weight. With `only_if_faster` a budget of multiply-adds or parameters may be
    missed; see `forms_if_faster`. `original` is the model as it is timed.

    Raises:
        ValueError: The budget cannot be reached, or needs calibration that is not given.
    """
    if budget.kind == "error" and calibration is None:
        raise ValueError("calibration: expected batches, for error= is measured on them, got None")
    kind = "params" if budget.kind == "params" else "macs"
    matches = [conv for conv in found if isinstance(conv, Match)]
    costs = counted_costs(matches, kind, calibration is not None, bottleneck)
    total = whole_cost(kind, model, captured)
    left = left_out(found, kind, total)
    if budget.kind in ("macs", "params"):
        reachable_limit(budget, costs, total, left)  # before the errors, which take long
    if calibration is None:
        errors = weight_only_errors(matches, costs)
    else:
        errors = calibration.error_curves(costs)
    if budget.kind == "error":
        assert calibration is not None, "checked above"
        measure = calibration.plain_error
        forms = forms_for_error(budget.fraction, costs, errors, total, measure)
        return Plan(forms, errors, costs, total, kind)
    if budget.kind == "latency":
        assert example_inputs is not None, "check_options() asks for them"
        costs = latency_costs(matches, errors, captured.channels_last, table)
        # Measured one by one, layers can take longer than together; the whole is not less.
        layers = sum(forms[DENSE] for forms in costs.values())
        whole = forward_seconds(example_inputs, dense=original)
        total = max(whole["dense"], layers)
    elif only_if_faster:
        faster = _is_faster(matches, captured.channels_last, table)
        forms = forms_if_faster(budget, costs, errors, total, faster)
        return Plan(forms, errors, costs, total, kind)
    forms = forms_within(budget, costs, errors, total, left)
    kind = "latency" if budget.kind == "latency" else kind
    return Plan(forms, errors, costs, total, kind)


def is_reachable(
    budget: Budget,
    model: nn.Module,
    captured: Capture,
    found: Iterable[Match | Skipped],
    new_biases: bool,
    bottleneck: bool,
) -> bool:
    """Whether the cheapest forms of the matches are within a budget that is counted."""
    if budget.kind not in ("macs", "params"):
        return True
    matches = [conv for conv in found if isinstance(conv, Match)]
    costs = counted_costs(matches, budget.kind, new_biases, bottleneck)
    try:
        reachable_limit(budget, costs, whole_cost(budget.kind, model, captured))
    except ValueError:
        return False
    return True


def whole_cost(kind: str, model: nn.Module, captured: Capture) -> float:
    """Multiply-adds or parameters of the whole original model."""
    if kind == "params":
        return float(sum(p.numel() for p in model.parameters()))
    return float(captured.macs or 0)


def weight_only_errors(matches: Sequence[Match], costs: Costs) -> Errors:
    """Relative squared errors of the weights, where there is no data to measure anything else."""
    return {conv.name: weight_curve(conv.weight_2d, costs[conv.name]) for conv in matches}


def left_out(found: Iterable[Match | Skipped], kind: str, total: float) -> str:
    """What takes no part in a plan, as the end of an error: what could, and the rest by reason.

    Args:
        found: All convolutions.
        kind: `macs` or `params`.
        total: Of the whole original model.
    """
    by_reason: dict[SkipReason, list[Skipped]] = defaultdict(list)
    for conv in found:
        if isinstance(conv, Skipped):
            by_reason[conv.reason].append(conv)
    told = ""
    if first := by_reason.pop(SkipReason.FIRST, None):
        unit = " of the parameters" if kind == "params" else " of the multiply-adds"
        names = ", ".join(conv.name for conv in first)
        told = f"; lower with first_conv=True ({names}{_share(first, kind, total, unit)})"
    if by_reason:
        rest = (f"{len(v)} x {k}{_share(v, kind, total)}" for k, v in by_reason.items())
        told += f"; left: {'; '.join(rest)}"
    return told


def _share(convs: Iterable[Skipped], kind: str, total: float, unit: str = "") -> str:
    """What they are of the whole model, as `, 12 %` and the unit; nothing where it is not known."""
    counts = [conv.params if kind == "params" else conv.macs for conv in convs]
    known = [count for count in counts if count is not None]
    if not total or len(known) < len(counts):
        return ""
    percent = 100 * sum(known) / total
    return f", {percent:.0f} %{unit}" if percent >= 1 else f", under 1 %{unit}"


def forms_within(
    budget: Budget, costs: Costs, errors: Errors, total: float, left: str = ""
) -> Forms:
    """Forms, or dense, with the least sum of errors within the budget.

    Args:
        budget: Of what `costs` counts.
        costs: By layer, of each form.
        errors: By layer, of each form; a layer without any stays dense.
        total: Cost of the whole original model.
        left: What an error is to say of the convolutions that have no part in it.

    Raises:
        ValueError: The budget is below what the cheapest forms cost.
    """
    known = _known(costs, errors)
    choices = [
        [Option(cost, 0.0 if f is DENSE else errors[name][f]) for f, cost in layer.items()]
        for name, layer in known.items()
    ]
    limit = reachable_limit(budget, known, total, left)
    if budget.kind == "latency":
        chosen = knapsack(choices, limit)
    else:
        chosen = knapsack(choices, math.floor(limit), least_unit=1)
    return {name: list(layer)[i] for (name, layer), i in zip(known.items(), chosen, strict=True)}


def _known(costs: Costs, errors: Errors) -> Costs:
    """The costs of dense, and of those forms whose error is known."""
    return {
        name: {f: c for f, c in layer.items() if f is DENSE or f in errors.get(name, {})}
        for name, layer in costs.items()
    }


def reachable_limit(budget: Budget, costs: Costs, total: float, left: str = "") -> float:
    """What the layers of `costs` may cost together, so that the model is within the budget.

    Raises:
        UnreachableError: It is below what their cheapest forms cost.
    """
    # What they do not account for stays: other layers, biases, heads.
    rest = max(total - sum(layer[DENSE] for layer in costs.values()), 0.0)
    limit = budget.fraction * total - rest
    cheapest = sum(min(layer.values()) for layer in costs.values())
    if cheapest > limit:
        lowest = math.ceil((rest + cheapest) / total * 1e4) / 1e4
        raise UnreachableError(
            f"budget: {budget.kind}={budget.fraction:g} of the model cannot be reached; "
            f"the lowest reachable is {lowest:.4f} (the cheapest form of {len(costs)} "
            f"convolutions){left}"
        )
    return limit


def forms_if_faster(
    budget: Budget, costs: Costs, errors: Errors, total: float, faster: IsFaster
) -> Forms:
    """Forms within the budget, of which the caller keeps those that are faster than dense.

    Where that would break the budget: forms within it that are all faster; where there are none,
    the cheapest ones that are. A layer that no form makes faster gets its cheapest, for the caller
    to leave dense and say what it would take.

    Args:
        budget: Of multiply-adds or parameters.
        costs: By layer, of each form.
        errors: By layer, of each form; a layer without any stays dense.
        total: Cost of the whole original model.
        faster: Whether a form of a layer, by its name, is faster than the dense one.

    Raises:
        ValueError: The budget is below what the cheapest forms cost, faster or not.
    """
    known = _known(costs, errors)
    planned = forms_within(budget, known, errors, total)
    kept = {name: form if faster(name, form) else DENSE for name, form in planned.items()}
    spent = sum(known[name][form] for name, form in kept.items())
    if spent <= reachable_limit(budget, known, total):
        return planned
    fast: Costs = {
        name: {form: cost for form, cost in layer.items() if form is DENSE or faster(name, form)}
        for name, layer in track(known.items(), "measuring latency", len(known))
    }
    try:
        planned = forms_within(budget, fast, errors, total)
    except ValueError:  # out of reach
        planned = {name: _cheapest(layer) for name, layer in fast.items()}
    return {
        name: planned[name] if len(layer) > 1 else _cheapest(known[name])
        for name, layer in fast.items()
    }


def _cheapest(forms: Mapping[Form | None, float]) -> Form | None:
    return min(forms, key=forms.__getitem__)


def _is_faster(matches: Iterable[Match], channels_last: bool, table: LatencyTable) -> IsFaster:
    """By measuring; a layer that the example inputs do not run is not."""
    specs = {conv.name: conv.spec(channels_last) for conv in matches}

    def faster(name: str, form: Form | None) -> bool:
        return table.seconds(specs[name], form) < table.seconds(specs[name], DENSE)

    return faster


def forms_for_error(
    limit: float, costs: Costs, errors: Errors, total: float, measure: Callable[[Forms], float]
) -> Forms:
    """The cheapest forms whose measured error stays within a limit, by bisecting the budget.

    Args:
        limit: The largest error.
        costs: Multiply-adds by layer, of each form.
        errors: By layer, of each form.
        total: Multiply-adds of the whole original model.
        measure: The error of a plan.
    """
    best: Forms = dict.fromkeys(costs, DENSE)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        fraction = (low + high) / 2
        try:
            planned = forms_within(Budget(macs=fraction), costs, errors, total)
        except ValueError:
            low = fraction
            continue
        if measure(planned) <= limit:
            best, high = planned, fraction
        else:
            low = fraction
    return best


def warn_unless_within(budget: Budget, made: Report) -> None:
    """Warn where layers that were kept for their latency broke the budget."""
    if budget.kind not in ("macs", "params"):
        return
    before, after = (
        (made.params_before, made.params_after)
        if budget.kind == "params"
        else (made.macs_before, made.macs_after)
    )
    if before and after is not None and after > budget.fraction * before:
        warnings.warn(
            f"convert: only_if_faster: the layers that measure faster reach "
            f"{budget.kind}={after / before:.4g} of the model, not {budget.fraction:g} as asked",
            stacklevel=5,
        )
