"""Torch's memory-format rule for convolutions, in one place for every implementation."""

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """Whether torch takes a 4-D tensor for a channels_last one.

    This is ATen's `suggest_memory_format`: it judges shapes that fit both formats (one channel, one
    pixel) by their strides, where `Tensor.is_contiguous` would answer yes twice.

    >>> is_channels_last(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
    True
    >>> is_channels_last(torch.empty(2, 3, 4, 5)[:, :, ::2])
    False
    """
    stride_n, stride_c, stride_h, stride_w = t.stride()
    n, c, h, w = t.shape
    # In a dense channels_last tensor each stride covers the extent of the axis inside it. Only
    # `if` makes a plain bool of symbolic sizes.
    if stride_c == 0 or stride_w < stride_c * c or stride_h < stride_w * w:
        return False
    if n == 0 or c == 0 or h == 0 or w == 0:
        return False
    extent = stride_h * h
    if stride_n < extent or extent == stride_c:  # noqa: SIM103
        return False
    return True


def suggests_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of `x` with `weight` returns a channels_last tensor."""
    return is_channels_last(x) or is_channels_last(weight)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Torch's name of the layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def to_channels_last(x: Tensor) -> Tensor:
    """`x` itself where it is dense and channels_last, else a copy."""
    # Permuted rather than by `contiguous(memory_format=...)`, which vmap does not know.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def side_by_side(weight_dw: Tensor) -> Tensor:
    """Depthwise weights [G, 1, R, S] as the kernels read them: the channels of a tap in one run."""
    return weight_dw.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def to_layout(y: Tensor, channels_last: bool) -> Tensor:
    """`y` with exactly the strides of a new tensor in that layout, copied only if they differ."""
    if is_channels_last(y):
        return y if channels_last else y.clone(memory_format=torch.contiguous_format)
    return to_channels_last(y) if channels_last else y
