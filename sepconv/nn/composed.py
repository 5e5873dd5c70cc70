"""The dense convolution that a fused separable one stands for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv.factorize import Form, dense_weight
from sepconv.nn.fused import FusedConv2d, FusedSeparableConv2d, FusedTuckerConv2d
from sepconv.ops.reference import Weights


class _Dense(NamedTuple):
    """A convolution in float64, and what comes after it."""

    weight: Tensor  # [K, C, R, S]
    bias: Tensor | None
    geometry: tuple[Any, ...]  # stride, padding, dilation
    activation: str | None


def composed(module: nn.Module, channels: int) -> FusedConv2d | None:
    """Multiply the factors of a fused convolution, in float64.

    Args:
        module: Any fused module.
        channels: C of its input.

    Returns:
        The convolution that computes the same, or None where more than products of weights is in
        between, or nothing was factorised.

    Example:
        >>> dw, pw = torch.ones(8, 1, 3, 3), torch.ones(6, 8, 1, 1)
        >>> composed(FusedSeparableConv2d(dw, pw), channels=4).weight[0, 0, 0]
        tensor([2., 2., 2.])
    """
    if not isinstance(module, FusedSeparableConv2d | FusedTuckerConv2d):
        return None
    parts = list(module) if isinstance(module, FusedTuckerConv2d) else [module]
    whole = None
    for part in parts:
        dense = _dense(part, channels)
        whole = dense if whole is None or dense is None else _followed(whole, dense)
        if whole is None:
            return None
        channels = len(whole.weight)
    assert whole is not None
    last: Any = parts[-1]
    dtype = next(last.parameters()).dtype
    bias = None if whole.bias is None else whole.bias.to(dtype)
    stride, padding, dilation = whole.geometry
    settings = (stride, padding, dilation, 1, whole.activation, last.channels_last)
    return FusedConv2d(whole.weight.to(dtype), bias, *settings)


def product(weights: Weights, channels: int) -> tuple[Tensor, Tensor | None]:
    """Weight [K, C, R, S] and bias [K] of a depthwise and a pointwise convolution together.

    Args:
        weights: Of both, with nothing nonlinear between them.
        channels: C.
    """
    dw, pw, bias_dw, bias_pw = weights
    shape = (pw.shape[0], channels, *dw.shape[2:])
    weight = dense_weight(shape, Form(dw.shape[0] // channels), dw, pw)
    if bias_dw is None:
        return weight, bias_pw
    moved = pw.flatten(1) @ bias_dw
    return weight, moved if bias_pw is None else bias_pw + moved


def _dense(part: nn.Module, channels: int) -> _Dense | None:
    """One convolution, or a depthwise and a pointwise one with nothing nonlinear between them."""
    bias: Tensor | None
    if isinstance(part, FusedSeparableConv2d) and part.activation_mid is None:
        tensors = (part.weight_dw, part.weight_pw, part.bias_dw, part.bias_pw)
        doubles: Any = [None if t is None else t.double() for t in tensors]
        weight, bias = product(Weights(*doubles), channels)
    elif isinstance(part, FusedConv2d) and part.groups == 1:
        weight, bias = part.weight.double(), part.bias
    else:
        return None
    return _Dense(weight, bias, (part.stride, part.padding, part.dilation), part.activation)


def _followed(first: _Dense, second: _Dense) -> _Dense | None:
    """Both as one; one of them must be pointwise, and the second read every pixel."""
    if first.bias is not None or first.activation is not None:
        return None
    if second.weight.shape[2:] == (1, 1) and _reads_every_pixel(second):
        geometry = first.geometry
    elif first.weight.shape[2:] == (1, 1) and _reads_every_pixel(first):
        geometry = second.geometry
    else:
        return None
    weight = torch.einsum("khxy,hcuv->kcxuyv", second.weight, first.weight)
    weight = weight.flatten(4).flatten(2, 3)
    return _Dense(weight, second.bias, geometry, second.activation)


def _reads_every_pixel(dense: _Dense) -> bool:
    stride, padding, _ = dense.geometry
    return stride == (1, 1) and padding == (0, 0, 0, 0)
