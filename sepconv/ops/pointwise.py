"""Pointwise (1 x 1) convolution: the public function, its operator, its gradient.

The gradients are matrix products, which torch has already.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import reference
from sepconv.ops.activation import before_last_activation
from sepconv.ops.arguments import check_pointwise
from sepconv.ops.autocast import autocasted
from sepconv.ops.backend import can_run_kernels, chooses_kernels
from sepconv.ops.choice import ASK, Problem, blocks, lookup
from sepconv.ops.choice_files import Choice
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import suggests_channels_last, to_layout
from sepconv.ops.registry import (
    Gradient,
    define,
    differentiable,
    empty,
    images_together,
    refused,
)


def pointwise_conv2d(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Mix the channels of each pixel: `y = activation(x @ weight_pw + bias + residual)`.

    Args:
        x: [N, C, H, W], any strides; float32, float64, float16 or bfloat16.
        weight_pw: [K, C, 1, 1].
        bias: [K].
        activation: `None`, `"relu"`, `"relu6"`, `"silu"`, `"hardswish"` or `"gelu"` (exact).
        residual: [N, K, H, W], added before the activation.

    Returns:
        y [N, K, H, W], channels_last where torch's convolution would return that.

    Raises:
        ValueError: An argument does not fit; the message says which, and what was expected.

    Example:
        >>> pointwise_conv2d(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 1, 1)).shape
        torch.Size([1, 3, 4, 4])
    """
    try:
        x, weight_pw, bias, residual = autocasted(x, weight_pw, bias, residual)
        check_pointwise(x, weight_pw, bias, activation, residual)
    except ValueError as error:
        return refused(error, x, weight_pw)
    if not chooses_kernels(x):
        return reference.pointwise_conv2d(x, weight_pw, bias, activation, residual)
    return torch.ops.sepconv.pointwise_conv2d(x, weight_pw, bias, activation, residual)


def run_fwd(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """The launcher `pointwise_fwd`, or what tuning chose in its place."""
    if choice == ASK:
        epilogue = bias is not None or activation is not None or residual is not None
        relu = activation == "relu" and bias is not None
        one_pass = residual is None and (activation is None or relu)
        choice = fwd_choice(x, weight_pw, channels_last, epilogue, one_pass)
    if choice == "linear":
        return to_layout(_linear(x, weight_pw, bias, activation, residual), channels_last)
    if choice == "library":
        y = reference.pointwise_conv2d(x, weight_pw, bias, activation, residual)
        return to_layout(y, channels_last)
    options = {"allow_tf32": allows_tf32(x), "channels_last": channels_last, "config": choice}
    launch = kernel_module("pointwise").pointwise_fwd
    return launch(x, weight_pw, bias, activation, residual, **options)


def fwd_choice(
    x: Tensor, weight_pw: Tensor, channels_last: bool, epilogue: bool, one_pass: bool
) -> Choice:
    """What is to run a forward call.

    Where the library's product would need another pass over its result (`one_pass` is false), a
    kernel, which does not.
    """
    K, C = weight_pw.shape[:2]
    like = (x.dtype, x.get_device(), x.shape, (C, 1, 1), K, Geometry(), channels_last)
    problem = Problem("pointwise_fwd", *like, allows_tf32(x), epilogue)
    choice = lookup(problem)
    return blocks(problem) if choice == "linear" and not one_pass else choice


def allows_tf32(x: Tensor) -> bool:
    """Whether the user lets convolutions of `x` use TF32."""
    if x.dtype != torch.float32:
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _linear(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """A pointwise convolution as the library's matrix product, channels_last.

    On a GPU that is cuBLASLt, which adds a bias and applies a ReLU before it writes.
    """
    N, C, P, Q = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, C)
    weight = weight_pw.flatten(1).t()
    if bias is not None and activation == "relu" and residual is None:
        y, activation = torch._addmm_activation(bias, pixels, weight), None
    else:
        y = torch.mm(pixels, weight) if bias is None else torch.addmm(bias, pixels, weight)
    y = y.view(N, P, Q, -1).permute(0, 3, 1, 2)
    return reference.activate(y if residual is None else y + residual, activation)


def gradients(
    dz: Tensor, x: Tensor | None, weight_pw: Tensor, needs: tuple[bool, bool]
) -> tuple[Gradient, Gradient]:
    """Gradients by input and weights of a convolution without activation, where needed.

    The input `x` may be None where the weights need no gradient.
    """
    needs_x, needs_weight = needs
    dx = dweight = None
    weight = weight_pw.flatten(1)  # [K, C]
    pixels = dz.permute(0, 2, 3, 1)  # [N, P, Q, K]
    if needs_x:
        dx = (pixels @ weight).permute(0, 3, 1, 2)
    if needs_weight:
        assert x is not None
        # Not `flatten`, for which batched gradients (`is_grads_batched=True`) have no rule.
        rows = dz.shape[0] * dz.shape[2] * dz.shape[3]
        flat = x.permute(0, 2, 3, 1).reshape(rows, weight.shape[1])
        dweight = (pixels.reshape(rows, weight.shape[0]).t() @ flat).view(weight_pw.shape)
    return dx, dweight


def _real(x: Tensor, weight_pw: Tensor, *others: Any) -> Tensor:
    bias, activation, residual = others
    arguments = (x, weight_pw, bias, activation, residual)
    check_pointwise(*arguments)
    if not can_run_kernels(x):
        return reference.pointwise_conv2d(*arguments)
    return run_fwd(*arguments, suggests_channels_last(x, weight_pw))


def _fake(x: Tensor, weight_pw: Tensor, *others: Any) -> Tensor:
    shape = check_pointwise(x, weight_pw, *others)
    return empty(x, shape, suggests_channels_last(x, weight_pw))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_pw, _, activation, _ = inputs
    ctx.save_for_backward(x, weight_pw, output if activation else None)
    ctx.activation = activation


def _backward(ctx: Any, dy: Gradient, also: Gradient = None) -> tuple[Gradient, ...]:
    x, weight_pw, y = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias, _, needs_residual = ctx.needs_input_grad
    dz, dbias = before_last_activation(ctx, dy, also, y, needs_bias)
    dx, dweight = gradients(dz, x, weight_pw, (needs_x, needs_weight))
    return dx, dweight, dbias, None, dz if needs_residual else None


def _flops(x: Any, weight_pw: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * weight_pw[1]


define(
    "pointwise_conv2d(Tensor x, Tensor weight_pw, Tensor? bias, str? activation, "
    "Tensor? residual) -> Tensor",
    _real,
    _fake,
    autograd=differentiable(_setup, _backward, activation_at=3),
    vmap=images_together(0, 4),
    flops=_flops,
    autocast=True,
)
