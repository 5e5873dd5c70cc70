"""The story: prepare, plan, keep what is faster, factors, rewrite, report."""

import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sepconv.calibration.effort import Effort, check_effort
from sepconv.calibration.layers import Forms
from sepconv.calibration.refine import Fitted
from sepconv.conversion.apply import apply_plan, factored, weight_error
from sepconv.conversion.confirm import confirmed
from sepconv.conversion.costs import as_run, device_name, forward_seconds
from sepconv.conversion.optimizers import check_optimizers, update_optimizers
from sepconv.conversion.options import Budget, Choice, FilterFn, RankChoice, check_options
from sepconv.conversion.plan import Plan, forms_asked, plan_for, warn_unless_within
from sepconv.conversion.prepare import Prepared, prepare
from sepconv.conversion.quality import calibrated, tell, warn_if_lost
from sepconv.graph import ExampleInputs
from sepconv.graph.checked import checked_model
from sepconv.graph.state import check_copyable, trainable
from sepconv.reports.conversion import Report, attach
from sepconv.reports.entries import planned_layers, summarise
from sepconv.reports.latency import measure_layers
from sepconv.reports.layer import LayerReport


@torch.inference_mode(False)  # the result is to be trained, wherever it was made
def convert(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    rank: RankChoice = None,
    budget: Budget | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    filter_fn: FilterFn | None = None,
    first_conv: bool | None = None,
    bottleneck: bool | None = None,
    pointwise: bool | None = None,
    only_if_faster: bool = False,
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
    inplace: bool = False,
    dryrun: bool = False,
    calibration: Iterable[Any] | None = None,
    effort: Effort = "default",
    seed: int = 0,
) -> Any:
    """Rewrite the standard convolutions of a model into depthwise separable form.

    Every convolution with groups = 1, a filter larger than 1 x 1 and zero padding becomes a
    `sepconv.nn.SeparableConv2d`: `rank` depthwise filters per input channel and a pointwise
    convolution, factorised from the trained weight. Everything else stays, and the report
    (`sepconv.report(model)`) says why.

    Args:
        model: Any module, traceable by torch.fx or not.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of the
            model's forward. With them shapes and MACs are known, and one forward of the whole
            model is timed in both forms at the end.
        rank: An int, a `sepconv.Form` (ranks of the channels too), `"full"` (exact), or a mapping
            of name patterns to one of these or None (leave); layers that a mapping does not name
            are left. A rank above a layer's full rank, min(K, R*S), means its full rank. Default:
            1, the MobileNet form.
        budget: `Budget(macs=)`, `Budget(params=)`, `Budget(latency=)` or `Budget(error=)`; the
            ranks are then planned, with dense as one of the choices. All but `params` need
            `example_inputs`, and `error` needs `calibration`.
        include: Name patterns; only these convolutions are converted.
        exclude: Name patterns; these are not.
        filter_fn: `(module, name) -> bool`, True to convert.
        first_conv: Whether to convert the network's first convolution too (at most 4 channels).
            There is little to gain there, mostly, and accuracy to lose. Default: a budget plans it
            like any other, if it holds at least a tenth of the model's multiply-adds; else not.
        bottleneck: Whether a budget may choose forms with a 1x1 convolution before the depthwise
            filters, or two after them (docs/bottleneck.md), or plain ranks alone. Default: with
            `calibration` it may; from the weights alone such forms gain nothing.
        pointwise: Whether 1x1 convolutions may be split into two: True, those that `rank` gives a
            `Form` with `rank_in` or that a budget is planned for; False, none. Default: those
            that a mapping of ranks names, without wildcards, with such a form; and with a budget
            all, if there is `calibration` or it cannot be reached otherwise.
        only_if_faster: Keep a layer dense unless its separable form measures faster, both as
            `sepconv.fuse` leaves them. Where that breaks a budget of multiply-adds or parameters,
            it is planned again with the forms that are faster, as near to the budget as these
            come; a warning says how near.
        optimizers: Optimizers over the model's parameters; they will train the result's.
        inplace: Change `model` itself instead of a copy.
        dryrun: Return the `sepconv.Report` of what would be done, and do nothing.
        calibration: Batches of inputs, labels not needed: an iterable of tensors, of tuples whose
            first entries are the inputs (a `DataLoader`), or of dicts. Where a model takes a list
            of images, `(images, targets)`; or `images` alone, if `example_inputs` is the tuple
            `(images,)`. The factors then keep what
            the model computes on them instead of the weights, which is what makes low ranks
            usable (docs/accuracy.md). A layer without a bias gets one. Full rank stays exact.
        effort: How much time calibration may take: `fast` fits each layer in closed form; `default`
            refines all of them together afterwards, for a minute or two on two cores; `thorough`
            ten times as long; or a number of seconds for all of it.
        seed: Of the choice of samples in calibration; the same seed gives the same result.

    Returns:
        The converted model: its own class, methods and hooks, with the same dtype, device,
        `requires_grad` and train/eval flags.

    Raises:
        ValueError: Something was given that cannot be used; nothing has been changed then.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU())
        >>> small = convert(net, rank=2)
        >>> type(small[0]).__name__, small[0].channel_multiplier
        ('SeparableConv2d', 2)
        >>> plan = convert(net, torch.zeros(1, 16, 8, 8), rank=2, dryrun=True)
        >>> plan.macs_before, plan.macs_after
        (294912, 83968)
    """
    start = time.monotonic()
    model = checked_model(model)
    listed = check_optimizers(optimizers)
    if rank is None and budget is None:
        rank = 1
    flags = {"first_conv": first_conv, "bottleneck": bottleneck, "pointwise": pointwise}
    choice = Choice.of(rank=rank, include=include, exclude=exclude, filter_fn=filter_fn, **flags)
    check_options(choice, budget, example_inputs, only_if_faster)
    check_effort(effort)
    if not (inplace or dryrun):
        check_copyable(model)
    # Optimizers know the parameters themselves, as the caller of `inplace` does.
    model = trainable(model, itself=inplace or bool(listed))

    ready = prepare(model, example_inputs, choice, budget, calibration, effort, seed)
    return carry_out(ready, budget, start, only_if_faster, inplace, dryrun, listed)


def carry_out(
    ready: Prepared,
    budget: Budget | None,
    start: float,
    only_if_faster: bool = False,
    inplace: bool = False,
    dryrun: bool = False,
    optimizers: Sequence[Optimizer] = (),
) -> Any:
    """What `convert` does with a model that it has looked at.

    Args:
        ready: The model; for several budgets prepared for one of them.
        budget: To plan for, None for the ranks that were asked for.
        start: When it began, in `time.monotonic()`.
        only_if_faster: As for `convert`.
        inplace: Likewise.
        dryrun: Likewise.
        optimizers: Likewise.

    Returns:
        The converted model, or a report where there was nothing to be done.

    Raises:
        ValueError: The budget cannot be reached.
    """
    model, example_inputs = ready.model, ready.example_inputs
    captured, found = ready.captured, ready.found
    matches, study, table = ready.matches, ready.study, ready.table
    by_time = only_if_faster or (budget is not None and budget.kind == "latency")
    # What is chosen by the time of fused forms is told by it.
    original = as_run(model, example_inputs) if by_time else model
    plan: Plan | None = None
    if budget is None:
        forms: Forms = forms_asked(matches, ready.asked)
    else:
        given = (budget, model, example_inputs, captured, found, study, table)
        plan = plan_for(*given, ready.bottleneck, only_if_faster, original)
        if budget.kind == "latency" and not dryrun:
            plan = confirmed(plan, budget, ready, original)
        forms = plan.forms

    def described(
        forms: Forms, calibrated: Collection[str]
    ) -> tuple[dict[str, LayerReport], Report]:
        layers = planned_layers(found, forms, captured.channels_last, calibrated)
        if by_time:
            measure_layers([x for x in layers.values() if x.spec is not None], table)
        if only_if_faster:
            for layer in layers.values():
                layer.keep_unless_faster()
        made = summarise(layers.values(), captured, model, dryrun)
        made.settings = ready.settings(budget, only_if_faster)
        return layers, made

    layers, made = described(forms, study.reached(forms) if study is not None else ())
    if budget is not None:
        warn_unless_within(budget, made)
    if dryrun:
        for conv in matches:
            layers[conv.name].error = weight_error(conv, layers[conv.name].form)
        made.seconds = time.monotonic() - start
        return made

    planned, forms = forms, {name: layer.form for name, layer in layers.items()}
    fitted: Mapping[str, Fitted] = {}
    if study is not None and study.changes(forms):
        best = calibrated(study, forms, None if only_if_faster else budget, plan, matches)
        if not best.fitted:  # the weights' own factors are better
            # What was planned and is not faster is to say so again.
            layers, made = described(planned if best.forms == forms else best.forms, ())
        forms, fitted = best.forms, best.fitted
        tell(made, best, study.held_out)
        warn_if_lost(best, plan, study.held_out)
    new = factored(matches, layers, fitted, captured.channels_last)
    converting = any(form is not None for form in forms.values())
    if not converting:
        warnings.warn(f"convert: nothing was converted: {made.reasons()}", stacklevel=4)
    times: dict[str, float] = {}
    if converting and example_inputs is not None and inplace:
        times = forward_seconds(example_inputs, before=original)
    converted, successors = apply_plan(model, new, inplace)
    names = {id(p): name for name, p in converted.named_parameters()}
    update_optimizers(optimizers, successors, names)
    attach(converted, made)
    if converting and example_inputs is not None:
        timed = {} if inplace else {"before": original}
        timed["after"] = as_run(converted, example_inputs) if by_time else converted
        times |= forward_seconds(example_inputs, **timed)
        made.latency_before, made.latency_after = times["before"], times["after"]
        made.device = device_name(converted) + (", fused" if by_time else "")
        if times["after"] >= times["before"]:
            warnings.warn(f"convert: the model did not get faster: {made.speed()}", stacklevel=4)
    made.seconds = time.monotonic() - start
    return converted
