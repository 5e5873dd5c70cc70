"""What each form of a convolution costs, counted or measured, and what a whole forward takes."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sepconv._util import evaluating, track
from sepconv.calibration.long import is_long
from sepconv.factorize import Form
from sepconv.factorize.curves import form_grid
from sepconv.fusion.fuse import fuse
from sepconv.graph import ExampleInputs, Match, split_inputs
from sepconv.graph.capture import runnable
from sepconv.graph.state import untouched
from sepconv.reports.latency import LatencyTable
from sepconv.timing import take_turns

DENSE = None  # the choice to leave a layer as it is

_LONG = 0.02  # seconds of one turn of both forms, from which on one may be enough
_SECONDS = 0.1  # of further turns where it is not
_CLEAR = 1.25  # a ratio of times that no noise explains

_WORTH = 0.75  # of the dense cost: above it forms that are not plain gain nothing

Costs = dict[str, dict[Form | None, float]]  # by layer, of each form and of dense


def counted_costs(
    matches: Sequence[Match], kind: str, new_biases: bool, bottleneck: bool = True
) -> Costs:
    """Multiply-adds or parameters of every form that is cheaper than the dense one, and of it.

    Args:
        matches: The layers to choose for.
        kind: `macs` or `params`.
        new_biases: Whether layers without a bias get one, as calibration gives them.
        bottleneck: Whether to look at more than plain ranks; of 1x1 convolutions, at more anyway.
    """
    costs: Costs = {}
    for conv in matches:
        forms = form_grid(tuple(conv.weight_2d.shape))
        searched = bottleneck and not is_long(conv.weight[0].numel())
        forms = [form for form in forms if form.is_plain or searched or conv.is_pointwise]
        if kind == "macs":
            counted: dict[Form | None, float] = {form: conv.macs(form) for form in forms}
            counted[DENSE] = conv.dense_macs
        else:
            extra = len(conv.weight) if new_biases and conv.bias is None else 0
            counted = {form: conv.params(form) + extra for form in forms}
            counted[DENSE] = conv.dense_params
        costs[conv.name] = _cheaper_than_dense(counted)
    return costs


def latency_costs(
    matches: Sequence[Match],
    forms: Mapping[str, Iterable[Form]],
    channels_last: bool,
    table: LatencyTable,
) -> Costs:
    """Seconds of those forms of every layer that are faster than the dense one, and of that."""
    costs: Costs = {}
    for conv in track(matches, "measuring latency"):
        spec = conv.spec(channels_last)
        measured = {form: table.seconds(spec, form) for form in (*forms.get(conv.name, ()), DENSE)}
        costs[conv.name] = _cheaper_than_dense(measured)
    return costs


def _cheaper_than_dense(forms: Mapping[Form | None, float]) -> dict[Form | None, float]:
    """The forms that cost less than the dense one, and last that."""
    dense = forms[DENSE]
    kept: dict[Form | None, float] = {}
    for form, cost in forms.items():
        if form is not None and cost < (dense if form.is_plain else _WORTH * dense):
            kept[form] = cost
    kept[DENSE] = dense
    return kept


@torch.no_grad()
def as_run(model: nn.Module, example_inputs: ExampleInputs | None) -> nn.Module:
    """The model as `sepconv.fuse` lowers it; itself where it cannot be lowered."""
    inputs = tree_map_only(Tensor, torch.clone, example_inputs)
    with untouched(model), evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fused: nn.Module = fuse(model, inputs, measure=False)
        except ValueError:
            return model
    return fused


def forward_seconds(example_inputs: ExampleInputs, **models: nn.Module) -> dict[str, float]:
    """Median seconds of a forward of each model, in turns; nothing is left changed.

    One turn warms up. One more is enough where it takes long and shows a clear difference.
    """
    args, kwargs = tree_map_only(Tensor, torch.clone, split_inputs(example_inputs))
    with ExitStack() as stack, torch.no_grad():
        forms = {}
        for name, model in models.items():
            form = runnable(model)
            stack.enter_context(untouched(form))
            stack.enter_context(evaluating(form))
            forms[name] = partial(form, *args, **kwargs)
        times = take_turns(forms, 1)
        turn = sum(times.values())
        clear = len(times) == 1 or max(times.values()) > _CLEAR * min(times.values())
        if turn > _LONG and clear:
            return times
        return take_turns(forms, min(max(int(_SECONDS / turn), 3), 20), warm_up=False)


def device_name(model: nn.Module) -> str:
    """Where the model runs, as a person would say it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"
