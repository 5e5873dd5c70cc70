"""A BatchNorm folded into the separable convolution before it."""

from copy import deepcopy

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sepconv.factorize.fold import batch_norm_affine, fits, fold_after
from sepconv.nn.separable import SeparableConv2d


def fold_batch_norm(conv: SeparableConv2d, bn: _BatchNorm) -> SeparableConv2d:
    """A copy of `conv` that computes `bn(conv(x))`, both in eval mode.

    A BatchNorm scales output channels, and those are rows of the last factor alone: the result
    has the form of `conv`, and nothing is lost.

    Args:
        conv: With K output channels.
        bn: Over K channels, with running statistics.

    Raises:
        ValueError: Something else was given, in training mode, without statistics, or such that
            the folded weight leaves the range of its dtype.

    Example:
        >>> import torch
        >>> conv, bn = SeparableConv2d(4, 6, 3).eval(), nn.BatchNorm2d(6).eval()
        >>> folded, x = fold_batch_norm(conv, bn), torch.randn(2, 4, 8, 8)
        >>> torch.allclose(folded(x), bn(conv(x)), atol=1e-5)
        True
    """
    if not isinstance(conv, SeparableConv2d):
        raise ValueError(f"conv: expected a SeparableConv2d, got {type(conv).__name__}")
    if not isinstance(bn, _BatchNorm):
        raise ValueError(f"bn: expected a BatchNorm, got {type(bn).__name__}")
    for name, module in (("conv", conv), ("bn", bn)):
        if module.training:
            raise ValueError(f"{name}: expected eval mode, got training mode; call .eval()")
    if bn.num_features != conv.out_channels:
        raise ValueError(
            f"bn: expected {conv.out_channels} channels, conv's own, got {bn.num_features}"
        )
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics, got track_running_stats=False")
    affine = batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    *_, (name, last) = conv.factors.items()
    weight, bias = fold_after(last, conv.bias, affine)
    if not fits(weight, bias):
        raise ValueError(f"bn: its scale and shift do not fit {weight.dtype} weights")
    folded = deepcopy(conv)
    _set(folded, name, weight)
    _set(folded, "bias", bias)
    return folded


def _set(conv: SeparableConv2d, name: str, value: Tensor) -> None:
    old: nn.Parameter = getattr(conv, name) if getattr(conv, name) is not None else conv.weight_pw
    setattr(conv, name, nn.Parameter(value.detach(), requires_grad=old.requires_grad))
