"""Plans by time, tried as a whole and as they will run, before anything is fitted to them.

Layers measured one by one miss what they do to each other: caches, memory formats, what is fused
with what. So the planned network, with any values in its factors, is lowered by `sepconv.fuse` and
timed against the original, lowered too. Where it takes longer than planned, all separable forms are
taken to cost as much more, and the plan is made again.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sepconv.conversion.apply import NewLayer, apply_plan
from sepconv.conversion.costs import DENSE, Costs, as_run, forward_seconds
from sepconv.conversion.options import Budget, UnreachableError
from sepconv.conversion.plan import Forms, Plan, forms_within
from sepconv.conversion.prepare import Prepared
from sepconv.factorize import Form
from sepconv.graph import separable_module
from sepconv.graph.state import check_copyable

ROUNDS = 2  # of corrections
_TOLERANCE = 1.03  # of the whole model's time, which no measurement tells more exactly


def confirmed(plan: Plan, budget: Budget, ready: Prepared, original: nn.Module) -> Plan:
    """A plan within a budget of time that the whole model keeps, after two corrections at most.

    Where none of them does, the last one is returned with a warning. A model that cannot be copied,
    which is converted in place, cannot be tried: its plan is taken as it is.

    Args:
        plan: To be tried.
        budget: Of latency.
        ready: The model.
        original: The model as it is timed.
    """
    try:
        check_copyable(ready.model)
    except ValueError:
        return plan
    inputs = ready.example_inputs
    assert inputs is not None, "check_options() asks for them"
    for turn in range(ROUNDS + 1):
        if all(form is DENSE for form in plan.forms.values()):
            return plan
        whole = as_run(_trial(ready, plan.forms), inputs)
        times = forward_seconds(inputs, before=original, after=whole)
        share = times["after"] / times["before"]
        if share <= _TOLERANCE * budget.fraction:
            return plan
        corrected = _corrected(plan, budget, share) if turn < ROUNDS else None
        if corrected is None:
            break
        plan = corrected
    warnings.warn(
        f"convert: budget: latency={budget.fraction:g} was not reached: the whole model, fused, "
        f"takes {share:.3g} of the original's time ({times['after'] * 1e3:.3g} ms of "
        f"{times['before'] * 1e3:.3g} ms)",
        stacklevel=5,
    )
    return plan


def _trial(ready: Prepared, forms: Mapping[str, Form | None]) -> nn.Module:
    """The model in these forms, without the work of factorising: time does not ask for values."""
    generator = torch.Generator().manual_seed(0)
    channels_last = ready.captured.channels_last
    layers = []
    for conv in ready.matches:
        form = forms[conv.name]
        if form is DENSE:
            continue
        empty = separable_module(conv.spec(channels_last), form)
        factors: dict[str, Tensor | None] = {
            name: torch.randn(factor.shape, generator=generator) / factor[0].numel() ** 0.5
            for name, factor in empty.factors.items()
        }
        layers.append((conv, NewLayer(form, channels_last, factors)))
    made, _ = apply_plan(ready.model, layers, inplace=False)
    return made


def _corrected(plan: Plan, budget: Budget, share: float) -> Plan | None:
    """A plan by costs of which those of the separable forms have grown as measured."""
    separable = {name: form for name, form in plan.forms.items() if form is not DENSE}
    planned = sum(plan.costs[name][form] for name, form in separable.items())
    rest = plan.total - sum(plan.costs[name][DENSE] for name in separable)
    ratio = (share * plan.total - rest) / planned
    if ratio <= 1:
        return None
    costs: Costs = {}
    for name, layer in plan.costs.items():
        dense = layer[DENSE]
        grown = {form: cost if form is DENSE else cost * ratio for form, cost in layer.items()}
        costs[name] = {f: c for f, c in grown.items() if f is DENSE or c < dense}
    try:
        forms: Forms = forms_within(budget, costs, plan.errors, plan.total)
    except UnreachableError:
        return None
    return plan._replace(forms=forms, costs=costs)
