"""A convolution, batch normalisation in training mode and an activation, in fewer passes.

The convolution's kernel collects each channel's mean and variance while it makes the result, so no
pass over the tensor is spent on them. A second pass normalises and activates. Backwards, one pass
takes the two sums that the formula needs and one applies it, the activation's gradient included.

| tensor passes (reads and writes) | ATen: conv, BN, activation | here |
|---|---|---|
| forward, after the convolution's own | 5 | 2 |
| backward, before the convolution's own | 8 | 5 |
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv.ops import depthwise, pointwise, reference
from sepconv.ops.arguments import (
    IntPair,
    Padding,
    check_channels,
    check_depthwise,
    check_more_than_one,
    check_pointwise,
    geometry_of,
)
from sepconv.ops.autocast import autocasted
from sepconv.ops.backend import can_run_kernels, chooses_kernels
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import suggests_channels_last, to_layout
from sepconv.ops.registry import (
    GEOMETRY_SCHEMA,
    Gradient,
    as_geometry,
    composite_where_differentiated,
    define,
    differentiable,
    empty,
    refused,
)

Triple = tuple[Tensor, Tensor, Tensor]

_AXES = (0, 2, 3)
_NORM_SCHEMA = "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str? activation"


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
        geometry = geometry_of(stride, padding, dilation, weight_dw)
        x, weight_dw, bias = autocasted(x, weight_dw, bias)
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
        x, weight_pw, bias = autocasted(x, weight_pw, bias)
        shape = check_pointwise(x, weight_pw, bias, activation, None)
        _check_norm(norm, x, shape)
    except ValueError as error:
        return refused(error, x, weight_pw)
    if not (x.numel() and chooses_kernels(x)):
        z = reference.pointwise_conv2d(x, weight_pw, bias, None, None)
        return _composite(z, norm, activation)
    made = torch.ops.sepconv.pointwise_conv2d_statistics(x, weight_pw, bias)
    return _normalise(made, norm, activation)


def normalised(z: Tensor, norm: nn.BatchNorm2d, activation: str | None) -> Tensor:
    """`activation(norm(z))` of a module in eval mode, in one pass over `z` [N, C, H, W].

    It has no gradient: that of the operator goes through the batch's own statistics.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = (t.to(_wide(z)) for t in (norm.running_mean, norm.running_var))
    return torch.ops.sepconv.batch_norm(z, mean, var, norm.weight, norm.bias, norm.eps, activation)


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


class _Norm(NamedTuple):
    """The arguments that follow `z`: the batch's statistics, the parameters, what comes after.

    Attributes:
        mean: [C], at least float32, like `var`, the biased variance.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str | None

    def affine(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the activation, and the normalised values before weight and bias."""
        scale = torch.rsqrt(self.var + self.eps).view(-1, 1, 1)
        u = normal = (z - self.mean.view(-1, 1, 1)) * scale
        if self.weight is not None:
            u = u * self.weight.to(z.dtype).view(-1, 1, 1)
        return u if self.bias is None else u + self.bias.to(z.dtype).view(-1, 1, 1), normal


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _with_statistics(y: Tensor) -> Triple:
    """`y` with the mean and the biased variance of each channel, at least in float32."""
    var, mean = torch.var_mean(y.to(_wide(y)), _AXES, correction=0)
    return y, mean, var


def _fake_statistics(x: Tensor, weight: Tensor, shape: tuple[int, int, int, int]) -> Triple:
    y = empty(x, shape, suggests_channels_last(x, weight))
    mean, var = (y.new_empty(shape[1], dtype=_wide(x)) for _ in range(2))
    return y, mean, var


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
        dx, dweight = depthwise.gradients(dy, x, weight, ctx.geometry, needs)
    else:
        dx, dweight = pointwise.gradients(dy, x, weight, needs)
    dbias = torch.ops.sepconv.channel_sum(dy) if needs_bias else None
    return dx, dweight, dbias, *(None for _ in ctx.geometry)


def _depthwise(x: Tensor, weight_dw: Tensor, bias: Tensor | None, *flat: Any) -> Triple:
    geometry = as_geometry(*flat)
    check_depthwise(x, weight_dw, bias, geometry, None)
    if not can_run_kernels(x):
        return _with_statistics(reference.depthwise_conv2d(x, weight_dw, bias, geometry, None))
    last = suggests_channels_last(x, weight_dw)
    choice = depthwise.fwd_choice(x, weight_dw, geometry, last, bias is not None)
    if choice == "library":
        y = depthwise.run_fwd(x, weight_dw, bias, geometry, None, last, choice)
        return _with_statistics(y)
    launch = kernel_module("depthwise").depthwise_fwd_statistics
    return launch(x, weight_dw, bias, geometry, channels_last=last, config=choice)


def _fake_depthwise(x: Tensor, weight_dw: Tensor, bias: Tensor | None, *flat: Any) -> Triple:
    shape = check_depthwise(x, weight_dw, bias, as_geometry(*flat), None)
    return _fake_statistics(x, weight_dw, shape)


define(
    "depthwise_conv2d_statistics(Tensor x, Tensor weight_dw, Tensor? bias, "
    f"{GEOMETRY_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _depthwise,
    _fake_depthwise,
    autograd=differentiable(_setup_statistics, _statistics_backward),
)


def _pointwise(x: Tensor, weight_pw: Tensor, bias: Tensor | None) -> Triple:
    check_pointwise(x, weight_pw, bias, None, None)
    if not can_run_kernels(x):
        return _with_statistics(reference.pointwise_conv2d(x, weight_pw, bias, None, None))
    last = suggests_channels_last(x, weight_pw)
    choice = pointwise.fwd_choice(x, weight_pw, last, bias is not None, one_pass=False)
    if choice == "library":
        return _with_statistics(pointwise.run_fwd(x, weight_pw, bias, None, None, last, choice))
    options = {"allow_tf32": pointwise.allows_tf32(x), "channels_last": last, "config": choice}
    return kernel_module("pointwise").pointwise_fwd_statistics(x, weight_pw, bias, **options)


def _fake_pointwise(x: Tensor, weight_pw: Tensor, bias: Tensor | None) -> Triple:
    return _fake_statistics(x, weight_pw, check_pointwise(x, weight_pw, bias, None, None))


define(
    "pointwise_conv2d_statistics(Tensor x, Tensor weight_pw, Tensor? bias) "
    "-> (Tensor, Tensor, Tensor)",
    _pointwise,
    _fake_pointwise,
    autograd=differentiable(_setup_statistics, _statistics_backward),
)


def _real(z: Tensor, *flat: Any) -> Tensor:
    norm = _Norm(*flat)
    channels_last = suggests_channels_last(z, z)
    if can_run_kernels(z):
        kernels = kernel_module("normalise")
        given = kernels.normalisation(*norm[:4])
        return kernels.normalise_fwd(z, given, *norm[4:], channels_last=channels_last)
    u, _ = norm.affine(z.to(_wide(z)))
    y = reference.activate(u, norm.activation).to(z.dtype)
    return to_layout(y.contiguous(), channels_last)


def _fake(z: Tensor, *_: Any) -> Tensor:
    return empty(z, z.shape, suggests_channels_last(z, z))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
    z, mean, var, weight, bias = ctx.saved_tensors
    dz, dweight, dbias = torch.ops.sepconv.batch_norm_backward(
        dy, z, mean, var, weight, bias, ctx.eps, ctx.activation
    )
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dz, None, None, dweight, None if bias is None else dbias.to(bias.dtype), None, None


define(
    f"batch_norm(Tensor z, {_NORM_SCHEMA}) -> Tensor",
    _real,
    _fake,
    autograd=differentiable(_setup, _gradients),
)


def _real_backward(dy: Tensor, z: Tensor, *flat: Any) -> Triple:
    norm = _Norm(*flat)
    channels_last = suggests_channels_last(z, z)
    if not can_run_kernels(z):
        dz, dweight, dbias = _composite_backward(dy, z, *flat)
        return to_layout(dz.contiguous(), channels_last), dweight, dbias
    kernels = kernel_module("normalise")
    given = kernels.normalisation(*norm[:4])
    dz, (dbias, moments) = kernels.normalise_bwd(
        dy, z, given, *norm[4:], channels_last=channels_last
    )
    return dz, moments * torch.rsqrt(norm.var + norm.eps), dbias.clone()


def _fake_backward(dy: Tensor, z: Tensor, mean: Tensor, *_: Any) -> Triple:
    return _fake(z), torch.empty_like(mean), torch.empty_like(mean)


def _composite_backward(dy: Tensor, z: Tensor, *flat: Any) -> Triple:
    """The formula in torch's operators, which autograd can differentiate again."""
    norm = _Norm(*flat)
    wide = z.to(_wide(z))
    if torch.is_grad_enabled():
        var, mean = torch.var_mean(wide, _AXES, correction=0)
        norm = norm._replace(mean=mean, var=var)
    u, normal = norm.affine(wide)
    du = reference.activation_backward(dy.to(wide.dtype), u, norm.activation)
    dbias, dweight = du.sum(_AXES), (du * normal).sum(_AXES)
    average, slope = (t.view(-1, 1, 1) / (du.numel() // du.shape[1]) for t in (dbias, dweight))
    scale = torch.rsqrt(norm.var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide.dtype)
    dz = scale.view(-1, 1, 1) * (du - average - normal * slope)
    return dz.to(z.dtype), dweight, dbias


define(
    f"batch_norm_backward(Tensor dy, Tensor z, {_NORM_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _real_backward,
    _fake_backward,
    autograd=composite_where_differentiated(_composite_backward),
)
