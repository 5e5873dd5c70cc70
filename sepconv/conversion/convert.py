"""The story: capture, match, select, plan, factorise, rewrite, report."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sepconv.calibration.fit import Calibration
from sepconv.calibration.refine import Fitted
from sepconv.conversion.budget import Budget
from sepconv.conversion.checks import check_finite, check_options, checked_model
from sepconv.conversion.choose import ranks_for
from sepconv.conversion.costs import LatencyTable, fill_in_latencies
from sepconv.conversion.install import install, install_biases
from sepconv.conversion.optimizers import check_optimizers, update_optimizers
from sepconv.conversion.plan import check_within, ranks_asked
from sepconv.conversion.predicted import PredictedLatencies, gpu_not_at_hand
from sepconv.conversion.select import FilterFn, RankChoice, select
from sepconv.factorize import factorize
from sepconv.graph import (
    ExampleInputs,
    Match,
    capture,
    match,
    rewrite,
    separable_module,
)
from sepconv.nn import SeparableConv2d
from sepconv.reports.conversion import (
    LayerReport,
    attach,
    attached,
    converted_layer,
    dense_layer,
    summarise,
)


def convert(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    rank: RankChoice = None,
    budget: Budget | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    filter_fn: FilterFn | None = None,
    first_conv: bool = False,
    only_if_faster: bool = False,
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
    inplace: bool = False,
    dryrun: bool = False,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
) -> Any:
    """Rewrite the standard convolutions of a model into depthwise separable form.

    Every convolution with groups = 1, a filter larger than 1 x 1 and zero padding becomes a
    `sepconv.nn.SeparableConv2d`: `rank` depthwise filters per input channel and a pointwise
    convolution, factorised from the trained weight. Everything else stays, and the report
    (`sepconv.report(model)`) says why.

    Args:
        model: any module, traceable by torch.fx or not.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the
            model's forward. With them shapes and MACs are known and the latency of every layer
            is measured in both forms.
        rank: an int, `"full"` (exact), or a mapping of name patterns to an int, `"full"` or None
            (leave); layers that a mapping does not name are left. A rank above a layer's full
            rank, min(K, R*S), means its full rank. Default: 1, the MobileNet form.
        budget: `Budget(macs=)`, `Budget(params=)`, `Budget(latency=)` or `Budget(error=)`; the
            ranks are then planned, with dense as one of the choices. All but `params` need
            `example_inputs`, and `error` needs `calibration`. With
            `Budget(latency=0.5, gpu="H200")` the latencies are predicted for a GPU that is not at
            hand.
        include: name patterns; only these convolutions are converted.
        exclude: name patterns; these are not.
        filter_fn: `(module, name) -> bool`, True to convert.
        first_conv: whether to convert the network's first convolution too (at most 4 channels).
            There is little to gain there and accuracy to lose.
        only_if_faster: keep a layer dense unless its separable form measures faster.
        optimizers: optimizers over the model's parameters; they will train the result's.
        inplace: change `model` itself instead of a copy.
        dryrun: return the `sepconv.Report` of what would be done, and do nothing.
        calibration: batches of inputs, labels not needed: an iterable of tensors, of tuples whose
            first entries are the inputs (a `DataLoader`), or of dicts. The factors then keep what
            the model computes on them instead of the weights, which is what makes low ranks
            usable (docs/accuracy.md). A layer without a bias gets one. Full rank stays exact.
        seed: of the choice of samples in calibration; the same seed gives the same result.

    Returns:
        The converted model: its own class, methods and hooks, with the same dtype, device,
        `requires_grad` and train/eval flags.

    Raises:
        ValueError: something was given that cannot be used; nothing has been changed then.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU())
        >>> small = convert(net, torch.zeros(1, 16, 8, 8), rank=2)
        >>> type(small[0]).__name__, small[0].channel_multiplier
        ('SeparableConv2d', 2)
        >>> small._sepconv_report.macs_before, small._sepconv_report.macs_after
        (294912, 83968)
    """
    model = checked_model(model)
    listed = check_optimizers(optimizers)
    check_options(rank, budget, example_inputs, only_if_faster, filter_fn)

    captured = capture(model, example_inputs)
    found = match(model, captured)
    ranks, found = select(model, found, rank, include, exclude, filter_fn, first_conv)
    matches = [conv for conv in found if isinstance(conv, Match)]
    check_finite(matches)
    params = sum(
        p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)
    )
    study = None
    if calibration is not None:
        study = Calibration(model, matches, calibration, example_inputs, seed)
    if budget is None:
        planned = ranks_asked(matches, ranks)
    else:
        planned = ranks_for(budget, model, example_inputs, captured, matches, study)

    replacements: dict[Match, SeparableConv2d] = {}
    layers: dict[str, LayerReport] = {}
    for conv in found:
        rank_planned = planned.get(conv.name)
        if isinstance(conv, Match) and rank_planned is not None:
            factors = factorize(conv.weight_2d, rank_planned)
            replacements[conv] = separable_module(conv, factors, captured.channels_last)
            layers[conv.name] = converted_layer(conv, rank_planned, factors.error)
        else:
            layers[conv.name] = dense_layer(conv)
    gpu = gpu_not_at_hand(budget.gpu, model) if budget else None
    if captured.has_shapes:
        latencies = PredictedLatencies(gpu) if gpu else LatencyTable()
        fill_in_latencies(replacements, layers, latencies)
    if only_if_faster:
        for conv in list(replacements):
            if layers[conv.name].keep_unless_faster():
                del replacements[conv]

    fitted: dict[str, Fitted] = {}
    if study is not None:
        chosen = {conv.name: planned[conv.name] for conv in replacements}
        fitted = study.fit(chosen) if not dryrun else {}
        install(fitted, replacements, layers)

    made = summarise(
        list(layers.values()), captured, params=params, dryrun=dryrun, earlier=attached(model)
    )
    made.predicted_for = gpu.name if gpu else ""
    if budget is not None:
        check_within(budget, made)
    if dryrun:
        return made
    if not replacements:
        warnings.warn(f"convert: nothing was converted: {made.reasons()}", stacklevel=2)
    converted, memo = rewrite(model, replacements, inplace, captured.channels_last)
    install_biases(fitted, replacements)
    names = {id(p): name for name, p in converted.named_parameters()}
    update_optimizers(listed, _successors(model, replacements, memo), names)
    attach(converted, made)
    return converted


def _successors(
    model: nn.Module, replacements: Mapping[Match, SeparableConv2d], memo: Mapping[int, Any]
) -> dict[int, list[nn.Parameter]]:
    """What took the place of each parameter: its copy, or the factors of a dense weight."""
    successors = {id(p): [memo[id(p)]] for p in model.parameters() if id(p) in memo}
    for conv, module in replacements.items():
        successors[id(conv.weight)] = [module.weight_dw, module.weight_pw]
        if conv.bias is None and module.bias is not None:
            successors[id(conv.weight)].append(module.bias)
    return successors
