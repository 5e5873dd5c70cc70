"""The three ops, and which implementation runs them."""

from torch import Tensor

from sepconv import reference
from sepconv.ops.arguments import IntPair, Padding, pair, sides
from sepconv.ops.backend import backend

__all__ = ["backend", "depthwise_conv2d", "pointwise_conv2d", "separable_conv2d"]


def depthwise_conv2d(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    activation: str | None = None,
) -> Tensor:
    """Convolve each channel with its own filters."""
    dilation = pair(dilation)
    padding = sides(padding, (weight_dw.shape[2], weight_dw.shape[3]), dilation)
    return reference.depthwise_conv2d(
        x, weight_dw, bias, pair(stride), padding, dilation, activation
    )


def pointwise_conv2d(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Mix channels at each pixel."""
    return reference.pointwise_conv2d(x, weight_pw, bias, activation, residual)


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
    """Depthwise, then pointwise convolution, with an activation after each."""
    dilation = pair(dilation)
    padding = sides(padding, (weight_dw.shape[2], weight_dw.shape[3]), dilation)
    return reference.separable_conv2d(
        x,
        weight_dw,
        weight_pw,
        bias_dw,
        bias_pw,
        pair(stride),
        padding,
        dilation,
        activation_mid,
        activation,
        residual,
    )
