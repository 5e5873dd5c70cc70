"""The fused modules that run what `SeparableConv2d` computes."""

from typing import Any

from torch import Tensor, nn

from sepconv.kernels.geometry import fixed_sides
from sepconv.nn.fused import FusedConv2d, FusedSeparableConv2d, FusedTuckerConv2d
from sepconv.nn.separable import SeparableConv2d
from sepconv.ops.arguments import pair


def fused_separable(
    conv: SeparableConv2d,
    last: Tensor,
    bias: Tensor | None,
    activation: str | None,
    channels_last: bool,
) -> nn.Module:
    """A separable convolution of any form, with another last factor and bias."""
    stride, padding, dilation = geometry(conv)
    first, filters, split = conv.weight_in, conv.weight_dw, conv.weight_out is not None

    def pointwise(weight: Tensor, bias: Tensor | None, stride: Any, end: str | None) -> nn.Module:
        return FusedConv2d(weight, bias, stride, activation=end, channels_last=channels_last)

    parts: list[nn.Module] = []
    if first is not None:
        parts.append(pointwise(first, None, stride if filters is None else (1, 1), None))
    if filters is not None:
        mixing, bias_pw, end = (conv.weight_pw, None, None) if split else (last, bias, activation)
        tensors, shape = (filters, mixing, None, bias_pw), (stride, padding, dilation)
        parts.append(FusedSeparableConv2d(*tensors, *shape, None, end, channels_last))
    if split or filters is None:
        parts.append(pointwise(last, bias, (1, 1), activation))
    return parts[0] if len(parts) == 1 else FusedTuckerConv2d(*parts)


def geometry(conv: nn.Conv2d | SeparableConv2d) -> tuple[Any, Any, Any]:
    """Stride, padding as sides where these are fixed, and dilation."""
    stride, dilation = pair("stride", conv.stride), pair("dilation", conv.dilation)
    taps = pair("kernel_size", conv.kernel_size)
    return stride, fixed_sides(conv.padding, taps, stride, dilation), dilation
