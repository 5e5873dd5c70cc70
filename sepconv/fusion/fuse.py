"""Inference lowering: lower, check, measure."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sepconv.fusion.parts import Lowering
from sepconv.fusion.verify import checked
from sepconv.graph import ExampleInputs, split_inputs
from sepconv.graph.checked import checked_model
from sepconv.graph.state import copied
from sepconv.ops.memory import mapped_anew
from sepconv.reports.conversion import attach
from sepconv.reports.fusion import FusionReport
from sepconv.timing import take_turns

ROUNDS = 5  # turns that each form takes when measured
MARGIN = 1.05  # slower by more than this is slower


@torch.inference_mode(False)  # what is made there cannot be loaded into
def fuse(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, measure: bool = True
) -> Any:
    """Lower a model for inference: the same numbers, faster.

    BatchNorm is folded into the convolution before or after it, activations and sums with a
    residual become part of it, a depthwise and the pointwise convolution after it become one
    `sepconv.ops.separable_conv2d`, and everything runs in one memory format. What cannot be fused
    stays as it is, code that no graph can stand for keeps running around what is lowered inside;
    `sepconv.report` of the result says what and why.

    The result is the same kind of object: class, attributes, methods, other entry points, hooks and
    containers are the model's. For inference in the mode it was made in, its forward runs a graph
    with frozen weights; other calls run the model's own code on its own modules. With example
    inputs the answers are compared: what a part of the graph answers otherwise stays as it was.
    Without them only what is sure to be right is lowered.

    Args:
        model: In eval mode; converted by `sepconv.convert` or not.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of the
            model's forward.
        measure: With example inputs, measure: a separable convolution whose dense form is faster
            runs dense, and a copy of the original, in its better memory format, is returned if the
            whole is slower than that.

    Returns:
        The fused model; the original is unchanged.

    Raises:
        ValueError: Not a module that can be lowered, or in training mode; or the model's forward
            fails on the example inputs, or it holds something that cannot be copied.

    Example:
        >>> conv, bn = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        >>> net = nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
        >>> fast = fuse(net.eval())
        >>> from sepconv.reports.conversion import report
        >>> [(layer.form, layer.takes) for layer in report(fast).fused]
        [('separable', ('bn', 'relu')), ('separable', ('bn',))]
    """
    model = checked_model(model)
    if model.training:
        raise ValueError("model: expected a model in eval mode, got one in training mode")
    with torch.no_grad():
        args, kwargs = split_inputs(example_inputs)
        if example_inputs is None:
            lowering = Lowering(model, None, {}, channels_last=None)
        else:
            lowering = checked(model, args, kwargs, choose=measure)
        lowered, report = lowering.model, lowering.report()
        report.checked = example_inputs is not None
        if example_inputs is not None and measure:
            lowered = _faster(model, lowered, report, args, kwargs)
    attach(lowered, report)
    return lowered


def _faster(
    model: nn.Module,
    lowered: nn.Module,
    report: FusionReport,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> nn.Module:
    """The fused model, or a copy of the original where that is faster; times go to the report."""
    plain = copied(model)
    last: nn.Module = deepcopy(plain)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    args_last, kwargs_last = tree_map(_to_channels_last, (args, kwargs))
    forms: dict[str, Callable[[], Any]] = {
        "contiguous": lambda: plain(*args, **kwargs),
        "fused": lambda: lowered(*args, **kwargs),
    }
    if report.channels_last:
        forms["channels_last"] = lambda: last(*args_last, **kwargs_last)
    times = take_turns(forms, ROUNDS)
    report.latency_after = times.pop("fused")
    best = min(times, key=times.__getitem__)
    report.latency_before = times[best]
    report.kept = report.latency_after > MARGIN * report.latency_before
    report.mapped = mapped_anew(forms[best if report.kept else "fused"])
    if not report.kept:
        return lowered
    return last if best == "channels_last" else plain


def _to_channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value
