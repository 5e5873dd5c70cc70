"""Depthwise separable convolution: the public function, its operator, its gradient.

For the gradient the arguments and the result are saved, never the depthwise half, which the
backward pass computes again: that costs one depthwise convolution and spares a tensor M times the
input's size.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import depthwise, pointwise, reference
from sepconv.ops.activation import before_activation, before_last_activation
from sepconv.ops.arguments import IntPair, Padding, check_separable, geometry_of
from sepconv.ops.autocast import autocasted
from sepconv.ops.backend import can_run_kernels, chooses_kernels
from sepconv.ops.choice import ASK, Problem, lookup
from sepconv.ops.choice_files import Choice
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import is_channels_last, suggests_channels_last
from sepconv.ops.reference import Epilogue, Weights
from sepconv.ops.registry import (
    GEOMETRY_SCHEMA,
    Gradient,
    as_geometry,
    define,
    differentiable,
    empty,
    images_together,
    needs_input,
    refused,
)


def separable_conv2d(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None = None,
    bias_pw: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    activation_mid: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Depthwise, then pointwise convolution, in one kernel where a kernel runs.

    `y = activation(activation_mid(x * weight_dw + bias_dw) @ weight_pw + bias_pw + residual)`

    Args:
        x: [N, C, H, W], any strides; float32, float64, float16 or bfloat16.
        weight_dw: [C*M, 1, R, S].
        weight_pw: [K, C*M, 1, 1].
        bias_dw: [C*M].
        bias_pw: [K].
        stride: Of the depthwise convolution, an int or (vertical, horizontal).
        padding: Zeros around the input: an int, (vertical, horizontal), ((top, bottom),
            (left, right)), `"valid"`, or `"same"` at stride 1.
        dilation: An int or (vertical, horizontal).
        activation_mid: Between the two: `None`, `"relu"`, `"relu6"`, `"silu"`, `"hardswish"` or
            `"gelu"` (exact).
        activation: At the end, one of the same.
        residual: [N, K, P, Q], added before the last activation.

    Returns:
        y [N, K, P, Q], channels_last where torch's convolutions would return that.

    Raises:
        ValueError: An argument does not fit; the message says which, and what was expected.

    Example:
        >>> x, weight_dw = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)
        >>> separable_conv2d(x, weight_dw, torch.ones(5, 2, 1, 1), stride=2, padding=1).shape
        torch.Size([1, 5, 2, 2])
    """
    try:
        geometry = geometry_of(stride, padding, dilation, weight_dw)
        x, weight_dw, weight_pw, bias_dw, bias_pw, residual = autocasted(
            x, weight_dw, weight_pw, bias_dw, bias_pw, residual
        )
        weights = Weights(weight_dw, weight_pw, bias_dw, bias_pw)
        epilogue = Epilogue(activation_mid, activation, residual)
        check_separable(x, weights, geometry, epilogue)
    except ValueError as error:
        return refused(error, x, weight_pw)
    if not chooses_kernels(x):
        return reference.separable_conv2d(x, weights, geometry, epilogue)
    return torch.ops.sepconv.separable_conv2d(x, *weights, *geometry, *epilogue)


def run_fwd(
    x: Tensor,
    weights: Weights,
    geometry: Geometry,
    epilogue: Epilogue,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """The launcher `separable_fwd`, or the two convolutions one after the other."""
    weight_dw, weight_pw, bias_dw, bias_pw = weights
    mid, activation, residual = epilogue
    tf32 = pointwise.allows_tf32(x)
    if choice == ASK:
        G, _, R, S = weight_dw.shape
        has_mid = bias_dw is not None or mid is not None
        has_last = bias_pw is not None or activation is not None or residual is not None
        call = (x.dtype, x.get_device(), x.shape, (G, R, S), weight_pw.shape[0], geometry)
        choice = lookup(Problem("separable_fwd", *call, channels_last, tf32, has_last, has_mid))
    if choice == "unfused":
        middle = depthwise.run_fwd(x, weight_dw, bias_dw, geometry, mid, channels_last)
        return pointwise.run_fwd(middle, weight_pw, bias_pw, activation, residual, channels_last)
    options = {"allow_tf32": tf32, "channels_last": channels_last, "config": choice}
    return kernel_module("separable").separable_fwd(x, *weights, geometry, *epilogue, **options)


def bundled(x: Tensor, *others: Any) -> tuple[Tensor, Weights, Geometry, Epilogue]:
    """What the dispatcher, or a captured graph, passes one by one."""
    geometry = as_geometry(*others[4:7])
    return x, Weights(*others[:4]), geometry, Epilogue(*others[7:])


def _gives_channels_last(x: Tensor, weights: Weights) -> bool:
    return suggests_channels_last(x, weights.dw) or is_channels_last(weights.pw)


def _real(*flat: Any) -> Tensor:
    x, weights, *_ = arguments = bundled(*flat)
    check_separable(*arguments)
    if not can_run_kernels(x):
        return reference.separable_conv2d(*arguments)
    return run_fwd(*arguments, _gives_channels_last(x, weights))


def _fake(*flat: Any) -> Tensor:
    x, weights, *_ = arguments = bundled(*flat)
    return empty(x, check_separable(*arguments), _gives_channels_last(x, weights))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_dw, weight_pw, bias_dw, _, *geometry, mid, activation, _ = inputs
    ctx.save_for_backward(x, weight_dw, weight_pw, bias_dw, output if activation else None)
    ctx.geometry, ctx.activation_mid, ctx.activation = geometry, mid, activation


def _backward(ctx: Any, dy: Gradient, also: Gradient = None) -> tuple[Gradient, ...]:
    x, weight_dw, weight_pw, bias_dw, y = ctx.saved_tensors
    _, needs_x, needs_dw, needs_pw, needs_bias_dw, needs_bias_pw, *_, needs_residual = (
        ctx.needs_input_grad
    )
    needs_depthwise = (needs_x, needs_dw, needs_bias_dw)

    dz, dbias_pw = before_last_activation(ctx, dy, also, y, needs_bias_pw)

    middle: Any = None
    z: Any = None
    if needs_pw or (ctx.activation_mid and any(needs_depthwise)):
        late = ctx.activation_mid if needs_input(ctx.activation_mid) else None
        early = None if late else ctx.activation_mid
        z = torch.ops.sepconv.depthwise_conv2d(x, weight_dw, bias_dw, *ctx.geometry, early)
        middle = reference.activate(z, late)
    needs = (any(needs_depthwise), needs_pw)
    dmiddle, dweight_pw = pointwise.gradients(dz, middle, weight_pw, needs)

    dx = dweight_dw = dbias_dw = None
    if dmiddle is not None:
        dz_dw, dbias_dw = before_activation(dmiddle, z, ctx.activation_mid, needs_bias_dw)
        needs = (needs_x, needs_dw)
        dx, dweight_dw = depthwise.gradients(dz_dw, x, weight_dw, ctx.geometry, needs)
    tensors = (dx, dweight_dw, dweight_pw, dbias_dw, dbias_pw)
    return *tensors, *(None,) * 5, dz if needs_residual else None


def _flops(
    x: Any, weight_dw: Sequence[int], weight_pw: Sequence[int], *_: Any, out_shape: Any, **__: Any
) -> int:
    n, _k, p, q = out_shape
    return 2 * n * p * q * (prod(weight_dw) + prod(weight_pw))


SCHEMA = (
    "(Tensor x, Tensor weight_dw, Tensor weight_pw, Tensor? bias_dw, Tensor? bias_pw, "
    f"{GEOMETRY_SCHEMA}, str? activation_mid, str? activation, Tensor? residual) -> Tensor"
)

define(
    f"separable_conv2d{SCHEMA}",
    _real,
    _fake,
    autograd=differentiable(_setup, _backward, activation_at=9),
    vmap=images_together(0, 10),
    flops=_flops,
    autocast=True,
)
