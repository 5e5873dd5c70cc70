"""BatchNorm with fixed statistics folded into a convolution before or after it.

Such a BatchNorm is `scale * x + shift` per channel. The arithmetic is float64, rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """`scale * x + shift`, both [C] in float64."""

    scale: Tensor
    shift: Tensor


def batch_norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """What a BatchNorm with these running statistics [C] does to each channel.

    >>> import torch
    >>> batch_norm_affine(torch.ones(1), torch.full((1,), 4.0), None, None, 0.0).shift
    tensor([-0.5000], dtype=torch.float64)
    """
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return Affine(scale, shift)


def fits(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether folding left a weight [K, ...] and a bias [K] in the range of their dtype.

    In float16 a scale may push them under its smallest normal number, or over its largest.

    >>> fits(torch.tensor([[1e-6, 1.0]]).half(), None), fits(torch.tensor([[1e-6]]).half(), None)
    (True, False)
    """
    least = torch.finfo(weight.dtype).smallest_normal
    largest = weight.abs().flatten(1).amax(1)
    normal = (largest >= least) | (largest == 0)
    return bool(normal.all() and largest.isfinite().all()) and (
        bias is None or bool(bias.isfinite().all())
    )


def fold_after(weight: Tensor, bias: Tensor | None, bn: Affine) -> tuple[Tensor, Tensor]:
    """Weight [K, ...] and bias [K] of a convolution that includes the BatchNorm after it."""
    folded = weight.double() * bn.scale.view(-1, *[1] * (weight.dim() - 1))
    shift = bn.shift if bias is None else bias.double() * bn.scale + bn.shift
    return folded.to(weight.dtype), shift.to(weight.dtype)


def fold_before(
    weight: Tensor, bias: Tensor | None, bn: Affine, groups: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution without padding that includes the BatchNorm before it.

    Padding would add zeros where the BatchNorm's shift belongs.

    Args:
        weight: [K, C/groups, R, S].
        bias: [K] or None.
        bn: Of the C input channels.
        groups: Of the convolution.
    """
    k, per_group = weight.shape[:2]
    grouped = weight.double().view(groups, k // groups, per_group, -1)
    scale = bn.scale.view(groups, 1, per_group, 1)
    shift = (grouped * bn.shift.view(groups, 1, per_group, 1)).sum((2, 3)).view(k)
    if bias is not None:
        shift = shift + bias.double()
    return (grouped * scale).view(weight.shape).to(weight.dtype), shift.to(weight.dtype)
