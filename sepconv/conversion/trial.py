"""Whether a model's own code takes separable layers where it had convolutions: by running it.

Code may ask `isinstance(layer, nn.Conv2d)`, read the order of a result in memory, or do what no
graph shows. So the model is run once with separable layers of rank 1, and once with the dense
weights that these stand for. Whatever ranks it gets afterwards, it runs the same code.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from sepconv.conversion.apply import NewLayer, apply_plan
from sepconv.factorize import Form
from sepconv.graph import Capture, ExampleInputs, Match, Skipped, SkipReason, split_inputs
from sepconv.graph.compare import Check
from sepconv.graph.state import check_copyable

Found = list[Match | Skipped]
Plan = list[tuple[Match, NewLayer]]


def tried(
    model: nn.Module, example_inputs: ExampleInputs, captured: Capture, found: Found
) -> tuple[Capture, Found]:
    """What is known of a model, and its convolutions, those left out that its code needs.

    Costs a copy of the model and two forwards; more only where something is wrong. Not tried are a
    model that cannot be copied, which is converted in place, and one that answers otherwise each
    time.
    """
    matches = [conv for conv in found if isinstance(conv, Match) and conv.runs]
    if not matches:
        return captured, found
    try:
        check_copyable(model)
    except ValueError:
        return captured, found
    layouts = (True, False) if captured.channels_last else (False,)
    why = None
    for channels_last in layouts:
        plan = [(conv, _rank_1(conv, channels_last)) for conv in matches]
        why = _difference(model, example_inputs, plan)
        if why is None:
            return replace(captured, channels_last=channels_last), found
    if not Check(model, *split_inputs(example_inputs)).repeats():
        return captured, found
    wrong = _wrong(model, example_inputs, plan)
    warnings.warn(
        f"convert: the model computes something else where these layers are separable, which are "
        f"left: {', '.join(sorted(wrong))}; {why}",
        stacklevel=5,
    )
    return replace(captured, channels_last=False), [
        conv.skipped(SkipReason.CODE) if isinstance(conv, Match) and conv.name in wrong else conv
        for conv in found
    ]


@torch.no_grad()
def _rank_1(conv: Match, channels_last: bool) -> NewLayer:
    """Each channel's filters as multiples of one, their root mean square."""
    weight = conv.weight_2d.detach().flatten(2)  # [K, C, R*S]
    filters = weight.float().square().mean(0).sqrt()
    scales = torch.einsum("kct,ct->kc", weight.float(), filters)
    scales = scales / filters.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return NewLayer(Form(1), channels_last, {"weight_dw": filters, "weight_pw": scales})


def _difference(model: nn.Module, example_inputs: ExampleInputs, plan: Plan) -> str | None:
    """How a model with separable layers answers otherwise than with the same weights dense."""
    args, kwargs = split_inputs(example_inputs)
    converted, _ = apply_plan(model, plan, inplace=False)
    with _dense(plan):
        return Check(model, args, kwargs).difference(converted)


def _wrong(model: nn.Module, example_inputs: ExampleInputs, plan: Plan) -> set[str]:
    """The layers of a plan that differs which it takes to differ, by halving."""
    half = len(plan) // 2
    found: set[str] = set()
    for part in (plan[:half], plan[half:]) if half else ():
        if _difference(model, example_inputs, part) is not None:
            found |= _wrong(model, example_inputs, part)
    return found or {conv.name for conv, _ in plan}


@contextmanager
def _dense(plan: Sequence[tuple[Match, NewLayer]]) -> Iterator[None]:
    """The convolutions with the weights that their factors stand for."""
    before = [(conv.weight, conv.weight.data) for conv, _ in plan]
    try:
        for conv, layer in plan:
            assert layer.factors is not None
            factors = (layer.factors["weight_dw"], layer.factors["weight_pw"])
            filters, scales = (f.to(conv.weight.dtype) for f in factors if f is not None)
            dense = (scales[:, :, None] * filters).to(conv.weight)
            conv.weight.data = dense.reshape(conv.weight.shape)
        yield
    finally:
        for weight, data in before:
            weight.data = data
