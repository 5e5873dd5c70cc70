"""Torch definitions of the three ops: the CPU path, and the truth that the kernels are held to.

Each function takes checked, normalised arguments (`sepconv.ops.arguments`) and is a plain
composition of ATen calls, so autograd, `torch.compile`, `torch.export`, ONNX and `vmap` see nothing
special in it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.layout import suggests_channels_last

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]

_ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply an activation by its name; `None` returns `x` itself."""
    return x if activation is None else _ACTIVATIONS[activation](x)


def depthwise_conv2d(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Sides,
    dilation: Pair,
    activation: str | None,
) -> Tensor:
    """Convolve each channel with its own filters: `activation(x * weight_dw + bias)`."""
    channels_last = suggests_channels_last(x, weight_dw)
    y = _depthwise(_nhwc(x), weight_dw, bias, stride, padding, dilation)
    return _as_format(activate(y, activation), channels_last)


def pointwise_conv2d(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Mix channels at each pixel: `activation(x @ weight_pw + bias + residual)`."""
    channels_last = suggests_channels_last(x, weight_pw)
    y = _pointwise(_nhwc(x), weight_pw, bias, activation, residual)
    return _as_format(y, channels_last)


def separable_conv2d(
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
    """Depthwise, then pointwise convolution, with an activation after each."""
    channels_last = suggests_channels_last(x, weight_dw) or suggests_channels_last(x, weight_pw)
    z = activate(_depthwise(_nhwc(x), weight_dw, bias_dw, stride, padding, dilation), activation_mid)
    y = _pointwise(z, weight_pw, bias_pw, activation, residual)
    return _as_format(y, channels_last)


def _nhwc(x: Tensor) -> Tensor:
    # An NCHW depthwise convolution on a CPU is about ten times slower than an NHWC one.
    return x.contiguous(memory_format=torch.channels_last)


def _as_format(y: Tensor, channels_last: bool) -> Tensor:
    return y if channels_last else y.contiguous()


def _depthwise(
    x: Tensor, weight_dw: Tensor, bias: Tensor | None, stride: Pair, padding: Sides, dilation: Pair
) -> Tensor:
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight_dw, bias, stride, (top, left), dilation, x.shape[1])


def _pointwise(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    y = F.conv2d(x, weight_pw, bias)
    if residual is not None:
        y = y + residual
    return activate(y, activation)
