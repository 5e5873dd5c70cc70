"""Separable convolutions of several filters per channel, in a compiled graph of constants.

On a CPU three forms compute the same, and which is fastest depends on the sizes:

- `by_sets`: a depthwise and a pointwise convolution for each set of one filter per channel, which
  Inductor packs, with the sums inside them;
- our operator, which goes strip by strip, where the cache does not hold the tensors;
- `as_dense`: the convolution that the factors stand for, where channels are few.

They take the arguments of `reference.separable_by_sets`, in whose place they are called.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sepconv.factorize import Form, dense_weight
from sepconv.fusion.dense import is_faster
from sepconv.kernels.geometry import Geometry
from sepconv.nn import FusedSeparableConv2d
from sepconv.nn.composed import composed
from sepconv.ops.constant import constant_separable_conv2d
from sepconv.ops.reference import activate
from sepconv.ops.strips import strips_for


class Shapes(NamedTuple):
    """Of a separable convolution's input and weights."""

    x: Size  # [N, C, H, W]
    dw: Size  # [C*M, 1, R, S]
    pw: Size  # [K, C*M, 1, 1]


def fastest(
    shapes: Shapes, geometry: Geometry, mid: str | None, activation: str | None
) -> Callable[..., Tensor]:
    """What to call for a convolution of these shapes; dense and separable form are timed.

    Args:
        shapes: Of the input and the weights.
        geometry: Of the depthwise convolution.
        mid: The activation between the two.
        activation: At the end.
    """
    return _fastest(shapes, geometry, mid, activation, torch.get_num_threads())


@cache
def _fastest(
    shapes: Shapes, geometry: Geometry, mid: str | None, activation: str | None, threads: int
) -> Callable[..., Tensor]:
    (stride, across), padding, dilation = geometry
    # Backends are called where tensors are fake.
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x, dw, pw = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in shapes
        )
        settings = (geometry.stride, padding, dilation, mid, activation)
        separable = FusedSeparableConv2d(dw, pw, None, None, *settings)
        dense = composed(separable, shapes.x[1])
        if dense is not None and is_faster(partial(dense, x), partial(separable, x)):
            return as_dense
    packs = stride == across and dilation == (1, 1)
    sizes = (shapes.x, shapes.dw, shapes.pw[0])
    if packs and strips_for(*sizes, stride, padding, x.element_size()) is not None:
        return constant_separable_conv2d
    return by_sets


def by_sets(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None,
    bias_pw: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation_mid: str | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """The m-th filters of all channels and the products of what they give, summed over m."""
    x, before = _padded(x, padding)
    sets = len(weight_dw) // x.shape[1]
    y = None
    for m in range(sets):
        bias = None if bias_dw is None else bias_dw[m::sets]
        z = F.conv2d(x, weight_dw[m::sets], bias, stride, before, dilation, x.shape[1])
        z = activate(z, activation_mid)
        mixed = F.conv2d(z, weight_pw[:, m::sets], bias_pw if m == 0 else None)
        y = mixed if y is None else y + mixed
    assert y is not None
    return activate(y if residual is None else y + residual, activation)


def as_dense(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None,
    bias_pw: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation_mid: None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """One convolution by the product of the factors."""
    x, before = _padded(x, padding)
    features, filters = weight_pw.shape[:2]
    shape = (features, x.shape[1], *weight_dw.shape[2:])
    weight = dense_weight(shape, Form(filters // x.shape[1]), weight_dw, weight_pw)
    if bias_dw is not None:
        moved = weight_pw.flatten(1) @ bias_dw
        bias_pw = moved if bias_pw is None else bias_pw + moved
    y = F.conv2d(x, weight, bias_pw, stride, before, dilation)
    return activate(y if residual is None else y + residual, activation)


def _padded(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """The input channels_last, as the results are; padded if its sides differ; what is left."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return x.contiguous(memory_format=torch.channels_last), (top, left)
