"""The three ops: arguments checked, then run by the kernels or by torch's own operators.

`batch_norm` has two more, for training: a convolution with the batch normalisation behind it.
"""

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import autograd, batching, flops, reference  # noqa: F401  (registrations)
from sepconv.ops.arguments import (
    IntPair,
    Padding,
    check_depthwise,
    check_pointwise,
    check_separable,
    pair,
    sides,
)
from sepconv.ops.autocast import cast, cast_optional, is_autocasting
from sepconv.ops.backend import backend, chooses_kernels
from sepconv.ops.batch_norm import (
    BatchNorm,
    depthwise_conv2d_batch_norm,
    pointwise_conv2d_batch_norm,
)
from sepconv.ops.library import refused

__all__ = [
    "BatchNorm",
    "backend",
    "depthwise_conv2d",
    "depthwise_conv2d_batch_norm",
    "pointwise_conv2d",
    "pointwise_conv2d_batch_norm",
    "separable_conv2d",
]


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
        stride, dilation = pair("stride", stride), pair("dilation", dilation)
        padding = sides(padding, weight_dw, stride, dilation)
        if is_autocasting(x):
            device = x.device.type
            x, weight_dw = cast(x, device), cast(weight_dw, device)
            bias = cast_optional(bias, device)
        geometry = Geometry(stride, padding, dilation)
        check_depthwise(x, weight_dw, bias, geometry, activation)
    except ValueError as error:
        return refused(error, x, weight_dw)
    if not chooses_kernels(x):
        return reference.depthwise_conv2d(x, weight_dw, bias, geometry, activation)
    return torch.ops.sepconv.depthwise_conv2d(x, weight_dw, bias, *geometry, activation)


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
        if is_autocasting(x):
            device = x.device.type
            x, weight_pw = cast(x, device), cast(weight_pw, device)
            bias, residual = cast_optional(bias, device), cast_optional(residual, device)
        check_pointwise(x, weight_pw, bias, activation, residual)
    except ValueError as error:
        return refused(error, x, weight_pw)
    if not chooses_kernels(x):
        return reference.pointwise_conv2d(x, weight_pw, bias, activation, residual)
    return torch.ops.sepconv.pointwise_conv2d(x, weight_pw, bias, activation, residual)


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
        stride, dilation = pair("stride", stride), pair("dilation", dilation)
        padding = sides(padding, weight_dw, stride, dilation)
        if is_autocasting(x):
            device = x.device.type
            x, residual = cast(x, device), cast_optional(residual, device)
            weight_dw, weight_pw = cast(weight_dw, device), cast(weight_pw, device)
            bias_dw, bias_pw = cast_optional(bias_dw, device), cast_optional(bias_pw, device)
        tensors = (x, weight_dw, weight_pw, bias_dw, bias_pw)
        geometry = Geometry(stride, padding, dilation)
        check_separable(*tensors, geometry, activation_mid, activation, residual)
    except ValueError as error:
        return refused(error, x, weight_pw)
    if not chooses_kernels(x):
        return reference.separable_conv2d(*tensors, geometry, activation_mid, activation, residual)
    return torch.ops.sepconv.separable_conv2d(
        *tensors, *geometry, activation_mid, activation, residual
    )
