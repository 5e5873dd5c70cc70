"""Depthwise convolution: the public function, its operators, their gradients."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import reference
from sepconv.ops.activation import before_last_activation
from sepconv.ops.arguments import IntPair, Padding, check_depthwise, geometry_of
from sepconv.ops.autocast import autocasted
from sepconv.ops.backend import can_run_kernels, chooses_kernels
from sepconv.ops.choice import ASK, Problem, lookup
from sepconv.ops.choice_files import Choice
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import is_channels_last, suggests_channels_last, to_layout
from sepconv.ops.registry import (
    GEOMETRY_SCHEMA,
    Gradient,
    Rule,
    as_geometry,
    batch_as_channels,
    batch_first,
    define,
    differentiable,
    empty,
    images_together,
    one_by_one,
    refused,
)


def depthwise_conv2d(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    activation: str | None = None,
) -> Tensor:
    """Convolve each channel with its own M filters: `y = activation(x * weight_dw + bias)`.

    Output channel g is made from input channel g // M.

    Args:
        x: [N, C, H, W], any strides; float32, float64, float16 or bfloat16.
        weight_dw: [C*M, 1, R, S].
        bias: [C*M].
        stride: An int or (vertical, horizontal).
        padding: Zeros around the input: an int, (vertical, horizontal), ((top, bottom),
            (left, right)), `"valid"`, or `"same"` at stride 1.
        dilation: An int or (vertical, horizontal).
        activation: `None`, `"relu"`, `"relu6"`, `"silu"`, `"hardswish"` or `"gelu"` (exact).

    Returns:
        y [N, C*M, P, Q], channels_last where torch's convolution would return that.

    Raises:
        ValueError: An argument does not fit; the message says which, and what was expected.

    Example:
        >>> depthwise_conv2d(torch.ones(1, 2, 4, 4), torch.ones(4, 1, 3, 3), padding=1).shape
        torch.Size([1, 4, 4, 4])
    """
    try:
        geometry = geometry_of(stride, padding, dilation, weight_dw)
        x, weight_dw, bias = autocasted(x, weight_dw, bias)
        check_depthwise(x, weight_dw, bias, geometry, activation)
    except ValueError as error:
        return refused(error, x, weight_dw)
    if not chooses_kernels(x):
        return reference.depthwise_conv2d(x, weight_dw, bias, geometry, activation)
    return torch.ops.sepconv.depthwise_conv2d(x, weight_dw, bias, *geometry, activation)


def run_fwd(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str | None,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """The launcher `depthwise_fwd`, or what tuning chose in its place."""
    if choice == ASK:
        epilogue = bias is not None or activation is not None
        choice = fwd_choice(x, weight_dw, geometry, channels_last, epilogue)
    if choice == "library":
        y = reference.depthwise_conv2d(x, weight_dw, bias, geometry, activation)
        return to_layout(y, channels_last)
    return kernel_module("depthwise").depthwise_fwd(
        x, weight_dw, bias, geometry, activation, channels_last=channels_last, config=choice
    )


def fwd_choice(
    x: Tensor, weight_dw: Tensor, geometry: Geometry, channels_last: bool, epilogue: bool
) -> Choice:
    """What is to run a forward call."""
    G, _, R, S = weight_dw.shape
    sizes = (x.shape, (G, R, S), G, geometry)
    return lookup(
        Problem("depthwise_fwd", x.dtype, x.get_device(), *sizes, channels_last, False, epilogue)
    )


def run_bwd_input(
    dy: Tensor,
    weight_dw: Tensor,
    x_shape: tuple[int, int, int, int],
    geometry: Geometry,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """The launcher `depthwise_bwd_input`, or what tuning chose in its place."""
    if choice == ASK:
        G, _, R, S = weight_dw.shape
        sizes = (x_shape, (G, R, S), G, geometry)
        choice = lookup(
            Problem("depthwise_bwd_input", dy.dtype, dy.get_device(), *sizes, channels_last)
        )
    if choice == "library":
        return reference.depthwise_conv2d_backward_input(
            dy, weight_dw, x_shape, geometry, channels_last
        )
    return kernel_module("depthwise_bwd_input").depthwise_bwd_input(
        dy, weight_dw, x_shape, geometry, channels_last=channels_last, config=choice
    )


def run_bwd_weight(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    geometry: Geometry,
    choice: Choice = ASK,
) -> Tensor:
    """The launcher `depthwise_bwd_weight`; never the library's, which may differ each time."""
    if choice == ASK:
        G, _, R, S = weight_shape
        sizes = (x.shape, (G, R, S), G, geometry)
        choice = lookup(
            Problem("depthwise_bwd_weight", dy.dtype, dy.get_device(), *sizes, is_channels_last(x))
        )
    return kernel_module("depthwise_bwd_weight").depthwise_bwd_weight(
        dy, x, tuple(weight_shape), geometry, config=choice
    )


def gradients(
    dz: Tensor, x: Tensor, weight_dw: Tensor, geometry: Sequence[Any], needs: tuple[bool, bool]
) -> tuple[Gradient, Gradient]:
    """Gradients by input and filters of a convolution without activation, where needed."""
    needs_x, needs_weight = needs
    dx = dweight = None
    if needs_x:
        dx = _gradient_by_input(dz, weight_dw, x, geometry)
    if needs_weight:
        dweight = torch.ops.sepconv.depthwise_conv2d_backward_weight(
            dz, x, weight_dw.shape, *geometry
        )
    return dx, dweight


def _gradient_by_input(dy: Tensor, weight_dw: Tensor, x: Tensor, geometry: Sequence[Any]) -> Tensor:
    return torch.ops.sepconv.depthwise_conv2d_backward_input(
        dy, weight_dw, x.shape, *geometry, suggests_channels_last(x, weight_dw)
    )


def _real(x: Tensor, weight_dw: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    *geometry, activation = others
    arguments = (x, weight_dw, bias, as_geometry(*geometry), activation)
    check_depthwise(*arguments)
    if not can_run_kernels(x):
        return reference.depthwise_conv2d(*arguments)
    return run_fwd(*arguments, suggests_channels_last(x, weight_dw))


def _fake(x: Tensor, weight_dw: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    *geometry, activation = others
    shape = check_depthwise(x, weight_dw, bias, as_geometry(*geometry), activation)
    return empty(x, shape, suggests_channels_last(x, weight_dw))


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the gradient of a convolution needs, and of its activation."""
    x, weight_dw, _, *geometry, activation = inputs
    ctx.save_for_backward(x, weight_dw, output if activation else None)
    ctx.geometry, ctx.activation = geometry, activation


def _backward(ctx: Any, dy: Gradient, also: Gradient = None) -> tuple[Gradient, ...]:
    x, weight_dw, y = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dz, dbias = before_last_activation(ctx, dy, also, y, needs_bias)
    dx, dweight = gradients(dz, x, weight_dw, ctx.geometry, (needs_x, needs_weight))
    return dx, dweight, dbias, None, None, None, None


def _flops(x: Sequence[int], weight_dw: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight_dw[2:])


define(
    "depthwise_conv2d(Tensor x, Tensor weight_dw, Tensor? bias, "
    f"{GEOMETRY_SCHEMA}, str? activation) -> Tensor",
    _real,
    _fake,
    autograd=differentiable(keep_for_backward, _backward, activation_at=6),
    vmap=images_together(0),
    flops=_flops,
    autocast=True,
)


def _real_by_input(dy: Tensor, weight_dw: Tensor, x_shape: Sequence[int], *others: Any) -> Tensor:
    *geometry, channels_last = others
    n, c, h, w = x_shape
    arguments = (dy, weight_dw, (n, c, h, w), as_geometry(*geometry), channels_last)
    if not can_run_kernels(dy):
        return reference.depthwise_conv2d_backward_input(*arguments)
    return run_bwd_input(*arguments)


def _fake_by_input(dy: Tensor, weight_dw: Tensor, x_shape: Sequence[int], *others: Any) -> Tensor:
    return empty(dy, x_shape, others[-1])


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of either gradient: it is linear in its first two arguments."""
    dy, other, _, *geometry = inputs
    ctx.save_for_backward(dy, other)
    ctx.geometry = geometry[:3]


def _backward_by_input(ctx: Any, ddx: Tensor) -> tuple[Gradient, ...]:
    """The input's gradient is linear in `dy` and in the filters, so its own is one of each."""
    dy, weight_dw = ctx.saved_tensors
    needs_dy, needs_weight = ctx.needs_input_grad[1:3]
    d_dy = dweight = None
    if needs_dy:
        d_dy = torch.ops.sepconv.depthwise_conv2d(ddx, weight_dw, None, *ctx.geometry, None)
    if needs_weight:
        dweight = torch.ops.sepconv.depthwise_conv2d_backward_weight(
            dy, ddx, weight_dw.shape, *ctx.geometry
        )
    return d_dy, dweight, None, None, None, None, None


def _vmap_by_input(op: Any) -> Rule:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        dy, weight_dw, (n, *rest), *others = args
        if in_dims[1] is not None:
            return one_by_one(op)(info, in_dims, *args)
        dy = batch_first(dy, in_dims[0], info).flatten(0, 1)
        dx = op(dy, weight_dw, (info.batch_size * n, *rest), *others)
        return dx.unflatten(0, (info.batch_size, n)), 0

    return rule


def _flops_by_input(dy: Sequence[int], weight_dw: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(dy) * prod(weight_dw[2:])


define(
    "depthwise_conv2d_backward_input(Tensor dy, Tensor weight_dw, SymInt[4] x_shape, "
    f"{GEOMETRY_SCHEMA}, bool channels_last) -> Tensor",
    _real_by_input,
    _fake_by_input,
    autograd=differentiable(_setup_gradient, _backward_by_input),
    vmap=_vmap_by_input,
    flops=_flops_by_input,
)


def _real_by_weight(dy: Tensor, x: Tensor, weight_shape: Sequence[int], *geometry: Any) -> Tensor:
    arguments = (dy, x, tuple(weight_shape), as_geometry(*geometry))
    if not can_run_kernels(dy):
        return reference.depthwise_conv2d_backward_weight(*arguments)
    return run_bwd_weight(*arguments)


def _fake_by_weight(dy: Tensor, x: Tensor, weight_shape: Sequence[int], *_: Any) -> Tensor:
    return dy.new_empty(weight_shape)


def _backward_by_weight(ctx: Any, ddweight: Tensor) -> tuple[Gradient, ...]:
    dy, x = ctx.saved_tensors
    needs_dy, needs_x = ctx.needs_input_grad[1:3]
    d_dy = dx = None
    if needs_dy:
        d_dy = torch.ops.sepconv.depthwise_conv2d(x, ddweight, None, *ctx.geometry, None)
    if needs_x:
        dx = _gradient_by_input(dy, ddweight, x, ctx.geometry)
    return d_dy, dx, None, None, None, None


def _vmap_by_weight(op: Any) -> Rule:
    """Per-sample gradients in one call."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        dy, x, (filters, *taps), *geometry = args
        dy, x = batch_as_channels(dy, in_dims[0], info), batch_as_channels(x, in_dims[1], info)
        dweight = op(dy, x, (info.batch_size * filters, *taps), *geometry)
        return dweight.unflatten(0, (info.batch_size, filters)), 0

    return rule


def _flops_by_weight(
    dy: Sequence[int], x: Any, weight_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * prod(dy) * prod(weight_shape[2:])


define(
    "depthwise_conv2d_backward_weight(Tensor dy, Tensor x, SymInt[4] weight_shape, "
    f"{GEOMETRY_SCHEMA}) -> Tensor",
    _real_by_weight,
    _fake_by_weight,
    autograd=differentiable(_setup_gradient, _backward_by_weight),
    vmap=_vmap_by_weight,
    flops=_flops_by_weight,
)
