"""Torch definitions of the three ops: the CPU path, and the truth that the kernels are held to.

Each function takes checked, normalised arguments (`sepconv.ops.arguments`) and is a plain
composition of ATen calls, so autograd, `torch.compile`, `torch.export`, ONNX and `vmap` see nothing
special in it. On a CPU everything in between is channels_last: a depthwise convolution of a
contiguous tensor is up to ten times slower there.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from sepconv.kernels.geometry import Geometry, Pair, Sides
from sepconv.ops.layout import is_channels_last, memory_format, to_channels_last, to_layout

ACTIVATIONS = ("relu", "relu6", "silu", "hardswish", "gelu")


class Weights(NamedTuple):
    """Parameters of a separable convolution: [C*M, 1, R, S], [K, C*M, 1, 1], [C*M], [K]."""

    dw: Tensor
    pw: Tensor
    bias_dw: Tensor | None
    bias_pw: Tensor | None


class Epilogue(NamedTuple):
    """What follows the two sums of a separable convolution; the residual is [N, K, P, Q]."""

    activation_mid: str | None
    activation: str | None
    residual: Tensor | None


def activate(z: Tensor, activation: str | None) -> Tensor:
    """Apply an activation by its name; `None` returns `z` itself. `gelu` is the exact (erf) one.

    >>> activate(torch.tensor([-1.0, 7.0]), "relu6")
    tensor([0., 6.])
    """
    if activation is None:
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "relu6":
        return F.relu6(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "hardswish":
        return _hardswish(z)
    return F.gelu(z)


def _hardswish(z: Tensor) -> Tensor:
    """Torch's own, but for float64 on a GPU, where that takes one sixth in float32."""
    differentiated = torch.is_grad_enabled() and z.requires_grad
    if z.dtype == torch.float64 and z.is_cuda and not differentiated:
        return z * (z + 3).clamp(0, 6) / 6
    return F.hardswish(z)


def activation_backward(dy: Tensor, z: Tensor, activation: str | None) -> Tensor:
    """Gradient before an activation, from the gradient `dy` after it and its input `z`.

    For `relu` and `relu6` the activation's output serves as `z` just as well.
    """
    if activation is None:
        return dy
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(dy, z, 0)
    if activation == "relu6":
        return aten.hardtanh_backward(dy, z, 0.0, 6.0)
    if activation == "silu":
        if torch.is_grad_enabled():  # the fused operator has no derivative of its own
            sigmoid = z.sigmoid()
            return dy * sigmoid * (1 + z * (1 - sigmoid))
        return aten.silu_backward(dy, z)
    if activation == "hardswish":
        return aten.hardswish_backward(dy, z)
    return aten.gelu_backward(dy, z)


def depthwise_conv2d(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str | None,
) -> Tensor:
    """`activation(x * weight_dw + bias)`, each channel with its own filters."""
    x, channels_last = _computing_layout(x, weight_dw)
    x, geometry = _pad_unevenly(x, geometry)
    y = activate(_depthwise(x, weight_dw, bias, geometry), activation)
    return to_layout(y, channels_last)


def pointwise_conv2d(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`activation(x @ weight_pw + bias + residual)`, the channels of each pixel mixed."""
    x, channels_last = _computing_layout(x, weight_pw)
    y = _pointwise(x, weight_pw, bias)
    if residual is not None:
        y = y + residual
    return to_layout(activate(y, activation), channels_last)


def separable_conv2d(x: Tensor, weights: Weights, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """The depthwise, then the pointwise convolution, with an activation after each."""
    if weights.dw.shape[0] != x.shape[1]:
        arguments: tuple[Any, ...] = (*weights, *geometry, *epilogue)
        return separable_by_sets(x, *arguments)
    weight_dw, weight_pw, bias_dw, bias_pw = weights
    activation_mid, activation, residual = epilogue
    x, channels_last = _computing_layout(x, weight_dw)
    channels_last = channels_last or is_channels_last(weight_pw)
    x, geometry = _pad_unevenly(x, geometry)
    z = _depthwise(x, weight_dw, bias_dw, geometry)
    y = _pointwise(activate(z, activation_mid) if activation_mid else z, weight_pw, bias_pw)
    if residual is not None:
        y = y + residual
    return to_layout(activate(y, activation), channels_last)


def separable_by_sets(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None,
    bias_pw: Tensor | None,
    stride: Pair,
    padding: Sides,
    dilation: Pair,
    activation_mid: str | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`separable_conv2d` of several filters per channel, one filter of every channel at a time.

    A group with several outputs leaves ATen's fast path. The arguments are the operator's, so that
    a graph can hold the call as it holds the operator.
    """
    x, channels_last = _computing_layout(x, weight_dw)
    channels_last = channels_last or is_channels_last(weight_pw)
    x, geometry = _pad_unevenly(x, Geometry(stride, padding, dilation))
    multiplier = weight_dw.shape[0] // x.shape[1]
    sets = (
        activate(
            _depthwise(
                x,
                weight_dw[m::multiplier],
                None if bias_dw is None else bias_dw[m::multiplier],
                geometry,
            ),
            activation_mid,
        )
        for m in range(multiplier)
    )
    y = _pointwise_of_sets(sets, weight_pw, bias_pw, multiplier)
    if residual is not None:
        y = y + residual
    return to_layout(activate(y, activation), channels_last)


def depthwise_conv2d_backward_input(
    dy: Tensor,
    weight_dw: Tensor,
    x_shape: Sequence[int],
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """Gradient of `depthwise_conv2d` without bias and activation by its input."""
    n, c, h, w = x_shape
    stride, (top, bottom, left, right), dilation = geometry
    padded = (n, c, h + top + bottom, w + left + right)
    if 0 in padded or dy.numel() == 0:
        return dy.new_zeros(n, c, h, w).contiguous(memory_format=memory_format(channels_last))
    dx = conv2d_input(padded, weight_dw, to_channels_last(dy), stride, 0, dilation, c)
    return to_layout(dx[:, :, top : top + h, left : left + w].contiguous(), channels_last)


def depthwise_conv2d_backward_weight(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    """Gradient of `depthwise_conv2d` without bias and activation by its filters."""
    if dy.numel() == 0 or x.numel() == 0:
        return dy.new_zeros(weight_shape)
    stride, (top, bottom, left, right), dilation = geometry
    x = to_channels_last(F.pad(x, (left, right, top, bottom)))
    shape = torch.Size(weight_shape)
    dw = conv2d_weight(x, shape, to_channels_last(dy), stride, 0, dilation, x.shape[1])
    return dw.contiguous()


def _computing_layout(x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    """The input as it is computed with, and whether the result is to be channels_last."""
    if is_channels_last(x):
        return x, True
    if x.is_cpu:
        return to_channels_last(x), is_channels_last(weight)
    return x, is_channels_last(weight)


def _pad_unevenly(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Leave even padding to the convolution, which knows no other kind."""
    top, bottom, left, right = geometry.padding
    if top == bottom and left == right:
        return x, geometry
    unpadded = Geometry(geometry.stride, dilation=geometry.dilation)
    return F.pad(x, (left, right, top, bottom)), unpadded


def _depthwise(x: Tensor, weight_dw: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if x.numel() == 0:
        size = geometry.output_size(x.shape[2:], weight_dw.shape[2:])
        return _sum_of_nothing((x.shape[0], weight_dw.shape[0], *size), x, weight_dw, bias)
    stride, (top, _, left, _), dilation = geometry
    return F.conv2d(x, weight_dw, bias, stride, (top, left), dilation, x.shape[1])


def _pointwise(x: Tensor, weight_pw: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0 or weight_pw.shape[0] == 0:
        shape = (x.shape[0], weight_pw.shape[0], *x.shape[2:])
        return _sum_of_nothing(shape, x, weight_pw, bias)
    return F.conv2d(x, weight_pw, bias)


def _sum_of_nothing(
    shape: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """What a convolution gives that has no product to add up; ATen refuses most such shapes."""
    zero = x[:0].sum() + weight[:0].sum()  # for their gradients' sake
    if bias is not None:
        zero = zero + bias.view(-1, 1, 1)
    return zero.expand(shape).contiguous()


def _pointwise_of_sets(
    sets: Iterator[Tensor], weight_pw: Tensor, bias: Tensor | None, multiplier: int
) -> Tensor:
    """Pointwise convolution of channels that come in sets: all first filters, all second, ..."""
    filters, channels = weight_pw.shape[:2]
    weight = weight_pw.reshape(filters, channels // multiplier, multiplier)  # [K, C, M]
    if weight_pw.dtype not in (torch.float32, torch.float64):
        # Partial sums would be rounded to 16 bits.
        weight = weight.transpose(1, 2).reshape(weight_pw.shape)
        return _pointwise(torch.cat(list(sets), 1), weight, bias)

    first, *rest = weight.permute(2, 1, 0).contiguous()  # each [C, K]
    pixels = next(sets).permute(0, 2, 3, 1)  # [N, P, Q, C]
    flat = pixels.flatten(0, 2)
    y = torch.mm(flat, first) if bias is None else torch.addmm(bias, flat, first)
    for weight_of_set in rest:
        flat = next(sets).permute(0, 2, 3, 1).flatten(0, 2)
        y = torch.addmm(y, flat, weight_of_set)
    return y.view(*pixels.shape[:3], filters).permute(0, 3, 1, 2)
