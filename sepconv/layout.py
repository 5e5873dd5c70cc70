"""The memory-format rule: one place, used by the reference, the fake and the real implementations."""

from torch import Tensor


def suggests_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of `x` with `weight` returns a channels_last tensor, as in torch."""
    return _has_channels_last_strides(x) or _has_channels_last_strides(weight)


def _has_channels_last_strides(t: Tensor) -> bool:
    # ATen's `is_channels_last_strides_2d`, which decides ambiguous shapes (one channel, one pixel)
    # by strides alone, where `Tensor.is_contiguous` would answer yes to both formats.
    stride_n, stride_c, stride_h, stride_w = t.stride()
    if stride_c == 0:
        return False
    n, c, h, w = t.shape
    if 0 in (n, c, h, w):
        return False
    least = stride_c * c
    if stride_w < least:
        return False
    least = stride_w * w
    if stride_h < least:
        return False
    least = stride_h * h
    return stride_n >= least and least != stride_c
