"""Separable convolutions of several filters per channel, in a compiled graph of constants.

On a CPU three forms compute the same, and which is fastest depends on the sizes:

- `by_sets`: a depthwise and a pointwise convolution for each set of one filter per channel, which
  Inductor packs, with the sums inside them;
- our operator, which goes strip by strip, where the cache does not hold the tensors;
- `as_dense`: the convolution that the factors stand for, where channels are few.

They take the arguments of `reference.separable_by_sets`, in whose place they are called.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sepconv.fusion.dense import is_faster
from sepconv.kernels.geometry import Geometry
from sepconv.nn import FusedSeparableConv2d
from sepconv.nn.composed import composed, product
from sepconv.ops.constant import constant_separable_conv2d
from sepconv.ops.onednn import fits
from sepconv.ops.packed import evenly, evenly_padded
from sepconv.ops.reference import activate
from sepconv.ops.separable import bundled
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
    # Backends are called where tensors are fake.
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x, dw, pw = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in shapes
        )
        settings = (geometry.stride, geometry.padding, geometry.dilation, mid, activation)
        separable = FusedSeparableConv2d(dw, pw, None, None, *settings)
        dense = composed(separable, shapes.x[1])
        if dense is not None and is_faster(partial(dense, x), partial(separable, x)):
            return as_dense
    sizes = (shapes.x, shapes.dw, shapes.pw[0], geometry.stride[0], geometry.padding)
    if fits(geometry.stride, geometry.dilation) and strips_for(*sizes, x.element_size()):
        return constant_separable_conv2d
    return by_sets


def by_sets(*flat: Any) -> Tensor:
    """The m-th filters of all channels and the products of what they give, summed over m."""
    x, (dw, pw, bias_dw, bias_pw), geometry, (mid, activation, residual) = bundled(*flat)
    (before, _), sets = evenly(x.shape, geometry.padding), len(dw) // x.shape[1]
    x = evenly_padded(x, geometry.padding)
    y = None
    for m in range(sets):
        bias = None if bias_dw is None else bias_dw[m::sets]
        z = F.conv2d(x, dw[m::sets], bias, geometry.stride, before, geometry.dilation, x.shape[1])
        mixed = F.conv2d(activate(z, mid), pw[:, m::sets], bias_pw if m == 0 else None)
        y = mixed if y is None else y + mixed
    assert y is not None
    return activate(y if residual is None else y + residual, activation)


def as_dense(*flat: Any) -> Tensor:
    """One convolution by the product of the factors."""
    x, weights, geometry, (_, activation, residual) = bundled(*flat)
    before, _ = evenly(x.shape, geometry.padding)
    x = evenly_padded(x, geometry.padding)
    weight, bias = product(weights, x.shape[1])
    y = F.conv2d(x, weight, bias, geometry.stride, before, geometry.dilation)
    return activate(y if residual is None else y + residual, activation)
