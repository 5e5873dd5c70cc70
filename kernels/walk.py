"""How programs go through [N, C, H, W] tensors channel by channel.

A program has `BLOCK_C` channels, and takes `BLOCK_NQ` pixels of them at a time. Images, rows and
columns are merged as far as all tensors allow.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sepconv.kernels.configs import ConvShape, DepthwiseConfig, default
from sepconv.kernels.launch import View, accumulator, ceil_div, merged_views


class Normalisation(NamedTuple):
    """Batch normalisation with known statistics.

    Attributes:
        mean: [C], in the accumulator's type.
        var: [C], biased, likewise.
        weight: [C] or None.
        bias: [C] or None.
    """

    mean: View
    var: View
    weight: View | None
    bias: View | None


@triton.jit
def tile_of(tile, OUTER_1, INNER, num_tiles, BLOCK_NQ: tl.constexpr):
    """The two outer indices of a tile, its offsets along the inner axis, and their mask."""
    outer = tile // num_tiles
    offs_nq = tile % num_tiles * BLOCK_NQ + tl.arange(0, BLOCK_NQ)
    return outer // OUTER_1, outer % OUTER_1, offs_nq, offs_nq < INNER


@triton.jit
def tile_ptrs(view, outer_0, outer_1, offs_nq, offs_c):
    """Pointers [BLOCK_NQ, BLOCK_C] to a tile of a tensor."""
    stride_0, stride_1, stride_2, stride_c = view.stride
    ptrs = view.ptr + outer_0 * stride_0 + outer_1 * stride_1
    return ptrs + ((offs_nq * stride_2)[:, None] + (offs_c * stride_c)[None, :])


@triton.jit
def channel_values(view, offs_c, mask_c, absent: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK_C] of a vector of the channels, or `absent` where there is none."""
    value = tl.full(offs_c.shape, absent, ACC)
    if view is not None:
        value = tl.load(view.ptr + offs_c * view.stride[0], mask=mask_c, other=absent).to(ACC)
    return value


class Walk:
    """The tiles of tensors of one shape: the order of the first decides what lies side by side.

    Attributes:
        views: Of the tensors.
        num_c: Blocks of channels.
        all_tiles: Tiles of pixels.
        sizes: What a kernel needs to know: (OUTER_1, INNER, C, num_c, num_tiles).
        constants: What it is compiled for.
        options: Warps and stages.
    """

    def __init__(
        self, config: DepthwiseConfig | None, first: torch.Tensor, *others: torch.Tensor | None
    ) -> None:
        N, C, H, W = first.shape
        if config is None:
            shape = ConvShape(N, C, H, W, C, H, W, channels_last=first.stride(1) == 1)
            config = default("activation_bwd", first.dtype, shape)
        (outer_0, outer_1, inner), self.views = merged_views(first, *others)
        self.num_c = ceil_div(C, config.block_c)
        num_tiles = ceil_div(inner, config.block_nq)
        self.all_tiles = num_tiles * outer_0 * outer_1
        self.sizes = (outer_1, inner, C, self.num_c, num_tiles)
        self.constants = {
            "ACC": accumulator(first.dtype),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
        }
        self.options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
