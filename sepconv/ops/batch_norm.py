"""A convolution, batch normalisation in training mode and an activation, in fewer passes.

The convolution's kernel collects each channel's mean and variance while it makes the result, so no
pass over the tensor is spent on them. A second pass normalises and activates. Backwards, one pass
takes the two sums that the formula needs and one applies it, the activation's gradient included.

| tensor passes (reads and writes) | ATen: conv, BN, activation | here |
|---|---|---|
| forward, behind the convolution's own | 5 | 2 |
| backward, before the convolution's own | 8 | 5 |
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv.kernels.geometry import Geometry
from sepconv.ops import reference, run
from sepconv.ops.activation_gradients import composite_where_differentiated
from sepconv.ops.arguments import (
    IntPair,
    Padding,
    check_channels,
    check_depthwise,
    check_more_than_one,
    check_pointwise,
    pair,
    sides,
)
from sepconv.ops.autocast import cast, cast_optional, is_autocasting
from sepconv.ops.autograd import Gradient, depthwise_gradients, differentiable, pointwise_gradients
from sepconv.ops.backend import can_run_kernels, chooses_kernels
from sepconv.ops.batching import one_by_one
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import suggests_channels_last, to_layout
from sepconv.ops.library import (
    GEOMETRY_SCHEMA,
    LIBRARY,
    TAGS,
    empty,
    fake,
    normalised,
    real,
    refused,
)

Triple = tuple[Tensor, Tensor, Tensor]

_AXES = (0, 2, 3)
_NORM_SCHEMA = "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str? activation"

for _schema in (
    "depthwise_conv2d_statistics(Tensor x, Tensor weight_dw, Tensor? bias, "
    f"{GEOMETRY_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    "pointwise_conv2d_statistics(Tensor x, Tensor weight_pw, Tensor? bias) "
    "-> (Tensor, Tensor, Tensor)",
    f"batch_norm(Tensor z, {_NORM_SCHEMA}) -> Tensor",
    f"batch_norm_backward(Tensor dy, Tensor z, {_NORM_SCHEMA}) -> (Tensor, Tensor, Tensor)",
):
    LIBRARY.define(_schema, tags=TAGS)


class BatchNorm(NamedTuple):
    """What a batch normalisation needs beside its input, as `torch.nn.functional.batch_norm`.

    Attributes:
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        running_mean: [C], moved towards the batch's mean in place; or None.
        running_var: [C], moved towards the batch's unbiased variance in place; or None.
        momentum: How far they are moved, 0 to 1.
        eps: Added to the variance.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> "BatchNorm":
        """Of a module in training mode, whose count of batches goes up by one.

        Raises:
            ValueError: The module is not exactly a `torch.nn.BatchNorm2d`, or normalises with its
                running statistics.

        Example:
            >>> norm = torch.nn.BatchNorm2d(8, momentum=None)
            >>> BatchNorm.of(norm).momentum, BatchNorm.of(norm).momentum
            (1.0, 0.5)
        """
        if type(module) is not nn.BatchNorm2d:
            raise ValueError(f"norm: expected a BatchNorm2d, got {type(module).__name__}")
        if not module.training and module.running_mean is not None:
            raise ValueError("norm: expected one in training mode, got one in eval mode")
        momentum = module.momentum
        tracked = module.num_batches_tracked if module.training else None
        if tracked is not None:
            tracked.add_(1)
            if momentum is None:  # the average of all batches so far
                momentum = 1 / float(tracked)
        running = (module.running_mean, module.running_var)
        return cls(module.weight, module.bias, *running, momentum or 0.0, module.eps)


def depthwise_conv2d_batch_norm(
    x: Tensor,
    weight_dw: Tensor,
    norm: BatchNorm,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    activation: str | None = None,
) -> Tensor:
    """`activation(batch_norm(depthwise_conv2d(x)))` with the batch's own statistics.

    Args:
        x: [N, C, H, W], any strides; float32, float64, float16 or bfloat16.
        weight_dw: [C*M, 1, R, S].
        norm: Of C*M channels; its running statistics are updated.
        bias: [C*M], of the convolution.
        stride: An int or (vertical, horizontal).
        padding: As in `depthwise_conv2d`.
        dilation: An int or (vertical, horizontal).
        activation: `None`, `"relu"`, `"relu6"`, `"silu"`, `"hardswish"` or `"gelu"` (exact).

    Returns:
        y [N, C*M, P, Q].

    Raises:
        ValueError: An argument does not fit, or there is one value per channel; the message says
            which, and what was expected.

    Example:
        >>> x, weight_dw = torch.randn(2, 4, 5, 5), torch.randn(4, 1, 3, 3)
        >>> depthwise_conv2d_batch_norm(x, weight_dw, BatchNorm(), padding=1).mean().abs() < 1e-6
        tensor(True)
    """
    try:
        stride, dilation = pair("stride", stride), pair("dilation", dilation)
        padding = sides(padding, weight_dw, stride, dilation)
        if is_autocasting(x):
            device = x.device.type
            x, weight_dw = cast(x, device), cast(weight_dw, device)
            bias = cast_optional(bias, device)
        geometry = Geometry(stride, padding, dilation)
        shape = check_depthwise(x, weight_dw, bias, geometry, activation)
        _check_norm(norm, x, shape)
    except ValueError as error:
        return refused(error, x, weight_dw)
    if not (x.numel() and chooses_kernels(x)):
        z = reference.depthwise_conv2d(x, weight_dw, bias, geometry, None)
        return _composite(z, norm, activation)
    made = torch.ops.sepconv.depthwise_conv2d_statistics(x, weight_dw, bias, *geometry)
    return _normalise(made, norm, activation)


def pointwise_conv2d_batch_norm(
    x: Tensor,
    weight_pw: Tensor,
    norm: BatchNorm,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`activation(batch_norm(pointwise_conv2d(x)))` with the batch's own statistics.

    Args:
        x: [N, C, H, W], any strides; float32, float64, float16 or bfloat16.
        weight_pw: [K, C, 1, 1].
        norm: Of K channels; its running statistics are updated.
        bias: [K], of the convolution.
        activation: `None`, `"relu"`, `"relu6"`, `"silu"`, `"hardswish"` or `"gelu"` (exact).

    Returns:
        y [N, K, H, W].

    Raises:
        ValueError: An argument does not fit, or there is one value per channel; the message says
            which, and what was expected.

    Example:
        >>> x, weight_pw = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 1, 1)
        >>> pointwise_conv2d_batch_norm(x, weight_pw, BatchNorm(), activation="relu").shape
        torch.Size([2, 8, 5, 5])
    """
    try:
        if is_autocasting(x):
            device = x.device.type
            x, weight_pw = cast(x, device), cast(weight_pw, device)
            bias = cast_optional(bias, device)
        shape = check_pointwise(x, weight_pw, bias, activation, None)
        _check_norm(norm, x, shape)
    except ValueError as error:
        return refused(error, x, weight_pw)
    if not (x.numel() and chooses_kernels(x)):
        z = reference.pointwise_conv2d(x, weight_pw, bias, None, None)
        return _composite(z, norm, activation)
    made = torch.ops.sepconv.pointwise_conv2d_statistics(x, weight_pw, bias)
    return _normalise(made, norm, activation)


def _check_norm(norm: BatchNorm, x: Tensor, shape: tuple[int, int, int, int]) -> None:
    for name, vector in zip(BatchNorm._fields[:4], norm[:4], strict=True):
        if vector is not None:
            check_channels(f"norm.{name}", vector, shape[1], x.device)
    check_more_than_one("x", shape)


def _composite(z: Tensor, norm: BatchNorm, activation: str | None) -> Tensor:
    weight, bias, mean, var, momentum, eps = norm
    y = F.batch_norm(z, mean, var, weight, bias, True, momentum, eps)
    return reference.activate(y, activation)


def _normalise(made: Triple, norm: BatchNorm, activation: str | None) -> Tensor:
    z, mean, var = made
    count = z.shape[0] * z.shape[2] * z.shape[3]
    with torch.no_grad():
        for running, batch in (
            (norm.running_mean, mean),
            (norm.running_var, var * (count / (count - 1))),
        ):
            if running is not None:
                running.lerp_(batch.to(running.dtype), norm.momentum)
    return torch.ops.sepconv.batch_norm(z, mean, var, norm.weight, norm.bias, norm.eps, activation)


@real("depthwise_conv2d_statistics")
def _depthwise_statistics(
    x: Tensor, weight_dw: Tensor, bias: Tensor | None, *geometry: Any
) -> Triple:
    arguments = (x, weight_dw, bias, normalised(*geometry))
    check_depthwise(*arguments, None)
    if not can_run_kernels(x):
        return run.with_statistics(reference.depthwise_conv2d(*arguments, None))
    return run.depthwise_statistics(*arguments, suggests_channels_last(x, weight_dw))


@real("pointwise_conv2d_statistics")
def _pointwise_statistics(x: Tensor, weight_pw: Tensor, bias: Tensor | None) -> Triple:
    check_pointwise(x, weight_pw, bias, None, None)
    if not can_run_kernels(x):
        return run.with_statistics(reference.pointwise_conv2d(x, weight_pw, bias, None, None))
    return run.pointwise_statistics(x, weight_pw, bias, suggests_channels_last(x, weight_pw))


def _fake_statistics(x: Tensor, weight: Tensor, shape: tuple[int, int, int, int]) -> Triple:
    y = empty(x, shape, suggests_channels_last(x, weight))
    mean, var = (y.new_empty(shape[1], dtype=_wide(x)) for _ in range(2))
    return y, mean, var


@fake("depthwise_conv2d_statistics")
def _fake_depthwise_statistics(
    x: Tensor, weight_dw: Tensor, bias: Tensor | None, *geometry: Any
) -> Triple:
    shape = check_depthwise(x, weight_dw, bias, normalised(*geometry), None)
    return _fake_statistics(x, weight_dw, shape)


@fake("pointwise_conv2d_statistics")
def _fake_pointwise_statistics(x: Tensor, weight_pw: Tensor, bias: Tensor | None) -> Triple:
    return _fake_statistics(x, weight_pw, check_pointwise(x, weight_pw, bias, None, None))


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@real("batch_norm")
def _batch_norm(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    channels_last = suggests_channels_last(z, z)
    if can_run_kernels(z):
        kernels = kernel_module("normalise")
        norm = kernels.normalisation(mean, var, weight, bias)
        return kernels.normalise_fwd(z, norm, eps, activation, channels_last=channels_last)
    u, _ = _affine(z.to(_wide(z)), mean, var, weight, bias, eps)
    y = reference.activate(u, activation).to(z.dtype)
    return to_layout(y.contiguous(), channels_last)


@fake("batch_norm")
def _fake_batch_norm(z: Tensor, *_: Any) -> Tensor:
    return empty(z, z.shape, suggests_channels_last(z, z))


@real("batch_norm_backward")
def _batch_norm_backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Triple:
    channels_last = suggests_channels_last(z, z)
    if not can_run_kernels(z):
        dz, dweight, dbias = _composite_backward(dy, z, mean, var, weight, bias, eps, activation)
        return to_layout(dz.contiguous(), channels_last), dweight, dbias
    kernels = kernel_module("normalise")
    norm = kernels.normalisation(mean, var, weight, bias)
    dz, (dbias, moments) = kernels.normalise_bwd(
        dy, z, norm, eps, activation, channels_last=channels_last
    )
    return dz, moments * torch.rsqrt(var + eps), dbias.clone()


@fake("batch_norm_backward")
def _fake_batch_norm_backward(dy: Tensor, z: Tensor, mean: Tensor, *_: Any) -> Triple:
    dz = empty(z, z.shape, suggests_channels_last(z, z))
    return dz, torch.empty_like(mean), torch.empty_like(mean)


def _affine(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What goes into the activation, and the normalised values before weight and bias."""
    normal = (z - mean.view(-1, 1, 1)) * torch.rsqrt(var + eps).view(-1, 1, 1)
    u = normal if weight is None else normal * weight.to(z.dtype).view(-1, 1, 1)
    return u if bias is None else u + bias.to(z.dtype).view(-1, 1, 1), normal


def _composite_backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Triple:
    """The formula in torch's operators, which autograd can differentiate again."""
    wide = z.to(_wide(z))
    if torch.is_grad_enabled():
        var, mean = torch.var_mean(wide, _AXES, correction=0)
    u, normal = _affine(wide, mean, var, weight, bias, eps)
    du = reference.activation_backward(dy.to(wide.dtype), u, activation)
    dbias, dweight = du.sum(_AXES), (du * normal).sum(_AXES)
    average, slope = (t.view(-1, 1, 1) / (du.numel() // du.shape[1]) for t in (dbias, dweight))
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(wide.dtype)
    dz = scale.view(-1, 1, 1) * (du - average - normal * slope)
    return dz.to(z.dtype), dweight, dbias


def _setup_statistics(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    x, weight, _bias, *geometry = inputs
    ctx.save_for_backward(x, weight)
    ctx.geometry = geometry
    # The gradient of `batch_norm` by its input includes the way through these.
    ctx.mark_non_differentiable(*output[1:])


def _statistics_backward(ctx: Any, dy: Tensor, *_: Gradient) -> tuple[Gradient, ...]:
    x, weight = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    needs = (needs_x, needs_weight)
    if ctx.geometry:
        dx, dweight = depthwise_gradients(dy, x, weight, ctx.geometry, needs)
    else:
        dx, dweight = pointwise_gradients(dy, x, weight, needs)
    dbias = torch.ops.sepconv.channel_sum(dy) if needs_bias else None
    return dx, dweight, dbias, *(None for _ in ctx.geometry)


def _setup_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _batch_norm_gradients(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
    z, mean, var, weight, bias = ctx.saved_tensors
    dz, dweight, dbias = torch.ops.sepconv.batch_norm_backward(
        dy, z, mean, var, weight, bias, ctx.eps, ctx.activation
    )
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dz, None, None, dweight, None if bias is None else dbias.to(bias.dtype), None, None


for _name, _setup, _backward in (
    ("depthwise_conv2d_statistics", _setup_statistics, _statistics_backward),
    ("pointwise_conv2d_statistics", _setup_statistics, _statistics_backward),
    ("batch_norm", _setup_batch_norm, _batch_norm_gradients),
):
    _op = getattr(torch.ops.sepconv, _name).default
    LIBRARY.impl(_name, differentiable(_op, _setup, _backward), "Autograd", with_keyset=True)
_op = torch.ops.sepconv.batch_norm_backward.default
LIBRARY.impl(
    "batch_norm_backward",
    composite_where_differentiated(_op, _composite_backward),
    "Autograd",
    with_keyset=True,
)


def _register_vmap(name: str) -> None:
    op = getattr(torch.ops.sepconv, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = one_by_one(op, info, in_dims, args)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    torch.library.register_vmap(f"sepconv::{name}", rule, lib=LIBRARY)


for _name in (
    "depthwise_conv2d_statistics",
    "pointwise_conv2d_statistics",
    "batch_norm",
    "batch_norm_backward",
):
    _register_vmap(_name)
