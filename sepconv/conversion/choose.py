"""From a budget to ranks: what each form costs, what error it makes, and which to take."""

from collections.abc import Sequence

from torch import nn

from sepconv.calibration.fit import Calibration
from sepconv.conversion.budget import Budget
from sepconv.conversion.costs import latency_costs, model_latency
from sepconv.conversion.plan import (
    Costs,
    Ranks,
    counted_costs,
    ranks_for_error,
    ranks_to_choose,
    ranks_within,
    reachable_limit,
    weight_only_errors,
)
from sepconv.conversion.predicted import PredictedLatencies, gpu_not_at_hand
from sepconv.graph import Capture, ExampleInputs, Match


def ranks_for(
    budget: Budget,
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    captured: Capture,
    matches: Sequence[Match],
    calibration: Calibration | None,
) -> Ranks:
    """Ranks, or dense, for every layer within the budget.

    With calibration the error of a rank is what it changes in the model's output, else what it
    changes in the weight.

    Raises:
        ValueError: the budget cannot be reached, or needs calibration that is not given.
    """
    costs, total = _costs(budget, model, example_inputs, captured, matches, calibration is not None)
    if calibration is None:
        if budget.kind == "error":
            raise ValueError("budget: error= is measured on calibration batches, got None")
        return ranks_within(budget, costs, weight_only_errors(matches), total)
    if budget.kind != "error":
        reachable_limit(budget, costs, total)  # before the errors, which take long
    errors = calibration.error_curves(ranks_to_choose(costs))
    if budget.kind == "error":
        return ranks_for_error(budget.fraction, costs, errors, total, calibration.plain_error)
    return ranks_within(budget, costs, errors, total)


def _costs(
    budget: Budget,
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    captured: Capture,
    matches: Sequence[Match],
    calibrated: bool,
) -> tuple[Costs, float]:
    """Costs of every form of every layer, and of the whole model."""
    if budget.kind == "latency":
        assert example_inputs is not None, "check_options() asks for them"
        gpu = gpu_not_at_hand(budget.gpu, model)
        if gpu is not None:
            predicted = PredictedLatencies(gpu)
            return predicted.costs(matches), predicted.all_convolutions(model, captured)
        costs = latency_costs(matches, captured.channels_last)
        # Measured one by one, layers can take longer than together; the whole is not less.
        layers = sum(forms[None] for forms in costs.values())
        return costs, max(model_latency(model, example_inputs), layers)
    if budget.kind == "params":
        total = sum(p.numel() for p in model.parameters())
        return counted_costs(matches, "params", new_biases=calibrated), total
    assert captured.macs is not None, "check_options() asks for example inputs"
    return counted_costs(matches, "macs", new_biases=calibrated), captured.macs
