"""Standard convolution of few input channels: the operator that `fuse` puts at the beginning.

Torch's own operators define it, and differentiate it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import reference
from sepconv.ops.activation import before_last_activation
from sepconv.ops.arguments import check_stem
from sepconv.ops.backend import can_run_kernels, chooses_kernels
from sepconv.ops.depthwise import keep_for_backward
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import suggests_channels_last
from sepconv.ops.pointwise import allows_tf32
from sepconv.ops.registry import (
    GEOMETRY_SCHEMA,
    Gradient,
    as_geometry,
    define,
    differentiable,
    empty,
    images_together,
)

# Where the kernel was measured, in bfloat16, it is faster than the library, which pads the channels
# to eight: an image's channels, and filters up to those of a ResNet, in one tile of the product.
_HALF = (torch.float16, torch.bfloat16)
_MOST_CHANNELS, _MOST_PRODUCTS, _MOST_FILTERS = 4, 7 * 7 * 3, 64


def stem_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is to run a convolution of `x` [N, C, H, W] with `weight` [K, C, R, S]."""
    filters, channels = weight.shape[:2]
    few = channels <= _MOST_CHANNELS and filters <= _MOST_FILTERS
    few = few and prod(weight.shape[1:]) <= _MOST_PRODUCTS
    fits = x.dim() == 4 and x.shape[1] == channels and x.dtype == weight.dtype
    return few and fits and x.dtype in _HALF and chooses_kernels(x)


def stem_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str | None,
) -> Tensor:
    """`activation(conv(x) + bias)`.

    Args:
        x: [N, C, H, W], any strides.
        weight: [K, C, R, S], of the type of `x`.
        bias: [K] or None.
        geometry: Stride, padding and dilation.
        activation: As the ops name it.

    Returns:
        y [N, K, P, Q], channels_last where torch's convolution would return that.

    Raises:
        ValueError: An argument does not fit; the message says which, and what was expected.
    """
    return torch.ops.sepconv.stem_conv2d(x, weight, bias, *geometry, activation)


def by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str | None
) -> Tensor:
    """The same by torch's own operators."""
    stride, (top, bottom, left, right), dilation = geometry
    x = F.pad(x, (left, right, top, bottom))
    return reference.activate(F.conv2d(x, weight, bias, stride, 0, dilation), activation)


def _real(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    *geometry, activation = others
    arguments = (x, weight, bias, as_geometry(*geometry), activation)
    check_stem(*arguments)
    if not can_run_kernels(x):
        return by_library(*arguments)
    options = {"allow_tf32": allows_tf32(x), "channels_last": suggests_channels_last(x, weight)}
    return kernel_module("stem").stem_fwd(*arguments, **options)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    *geometry, activation = others
    shape = check_stem(x, weight, bias, as_geometry(*geometry), activation)
    return empty(x, shape, suggests_channels_last(x, weight))


def _backward(ctx: Any, dy: Gradient, also: Gradient = None) -> tuple[Gradient, ...]:
    x, weight, y = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dz, dbias = before_last_activation(ctx, dy, also, y, needs_bias)
    stride, (top, bottom, left, right), dilation = ctx.geometry
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz,
        F.pad(x, (left, right, top, bottom)),
        weight,
        None,
        stride,
        (0, 0),
        dilation,
        False,
        (0, 0),
        1,
        (needs_x, needs_weight, False),
    )
    if dx is not None:
        dx = F.pad(dx, (-left, -right, -top, -bottom))
    return dx, dweight, dbias, None, None, None, None


def _flops(x: Any, weight: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


define(
    f"stem_conv2d(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY_SCHEMA}, "
    "str? activation) -> Tensor",
    _real,
    _fake,
    autograd=differentiable(keep_for_backward, _backward, activation_at=6),
    vmap=images_together(0),
    flops=_flops,
    autocast=True,
)
