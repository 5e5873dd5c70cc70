"""Gradient of the depthwise convolution's weights.

    dw[g, r, s] = sum_npq dy[n, g, p, q] * x[n, g // M, p * STRIDE_H - PAD_TOP + r * DILATION_H,
                                                        q * STRIDE_W - PAD_LEFT + s * DILATION_W]

A program keeps one [BLOCK_NQ, BLOCK_C] register accumulator per tap over its share of the pixels,
and reduces them once at the end. The shares are added afterwards in a fixed order: no atomics, the
same bits every time.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.configs import ConvShape, DepthwiseConfig, default
from sepconv.kernels.geometry import Geometry
from sepconv.kernels.launch import (
    accumulator,
    accumulator_dtype,
    ceil_div,
    check_axes,
    conv_constants,
    launch,
    view,
)
from sepconv.kernels.tiles import split_nq

# Register accumulators of one weight-gradient program; bigger filters take several programs.
_MAX_TAPS = 9
# Enough programs to fill any GPU; a constant, so that every device adds in the same order.
_BWD_WEIGHT_PROGRAMS = 2048


@triton.jit
def _depthwise_bwd_weight_kernel(
    dy,  # [N, G, P, Q]
    x,  # [N, C, H, W]
    partial,  # [SPLITS, R*S, G], contiguous
    sizes,
    grid,
    CONV: tl.constexpr,
    ACC: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N, H, W, G, P, Q = sizes
    num_g, num_taps, num_tiles, tiles_per_split = grid
    stride_dyn, stride_dyc, stride_dyh, stride_dyw = dy.stride
    stride_xn, stride_xc, stride_xh, stride_xw = x.stride
    pid = tl.program_id(0).to(tl.int64)
    pid_g = pid % num_g
    first_tap = pid // num_g % num_taps * TAPS
    split = pid // num_g // num_taps

    offs_g = pid_g * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_g = offs_g < G
    dy_channels = dy.ptr + offs_g * stride_dyc
    x_channels = x.ptr + offs_g // CONV.M * stride_xc

    # TAPS times [BLOCK_NQ, BLOCK_C]
    accs = (tl.zeros([BLOCK_NQ, BLOCK_C], ACC),) * TAPS
    for i in range(tiles_per_split):
        tile = split * tiles_per_split + tl.cast(i, tl.int64)
        p = tile % P
        n, q = split_nq(tile // P, Q, BLOCK_NQ)
        mask_nq = (n < N) & (tile < num_tiles)

        dy_ptrs = (n * stride_dyn + p * stride_dyh + q * stride_dyw)[:, None] + dy_channels[None, :]
        gradient = tl.load(dy_ptrs, mask=mask_nq[:, None] & mask_g[None, :], other=0.0).to(ACC)
        for t in tl.static_range(TAPS):
            h = p * CONV.STRIDE_H - CONV.PAD_TOP + (first_tap + t) // CONV.S * CONV.DILATION_H
            w = q * CONV.STRIDE_W - CONV.PAD_LEFT + (first_tap + t) % CONV.S * CONV.DILATION_W
            inside = mask_nq & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_ptrs = (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + x_channels[None, :]
            value = tl.load(x_ptrs, mask=inside[:, None] & mask_g[None, :], other=0.0).to(ACC)
            # Triton has no starred tuples.
            accs = accs[:t] + (accs[t] + gradient * value,) + accs[t + 1 :]  # noqa: RUF005

    partial_ptrs = partial + (split * (CONV.R * CONV.S) + first_tap) * G + offs_g
    for t in tl.static_range(TAPS):
        mask = mask_g & (first_tap + t < CONV.R * CONV.S)
        tl.store(partial_ptrs + tl.cast(G, tl.int64) * t, tl.sum(accs[t], axis=0), mask=mask)


def depthwise_bwd_weight(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight_shape: tuple[int, int, int, int],
    geometry: Geometry,
    *,
    config: DepthwiseConfig | None = None,
) -> torch.Tensor:
    """Gradient of the depthwise weights, bitwise reproducible.

    Args:
        dy: [N, C*M, P, Q], any strides; before the activation, if there was one.
        x: [N, C, H, W], any strides.
        weight_shape: (C*M, 1, R, S).
        geometry: Stride, padding and dilation.
        config: Block sizes; None takes the default.

    Returns:
        dweight_dw [C*M, 1, R, S], contiguous, in the type of `x`.
    """
    N, C, H, W = x.shape
    G, _, R, S = weight_shape
    P, Q = dy.shape[2:]
    if G == 0 or dy.numel() == 0 or x.numel() == 0:
        return x.new_zeros(weight_shape)
    check_axes(x, dy)
    M = G // C
    if config is None:
        shape = ConvShape(N, C, H, W, G, P, Q, R, S, M, x.stride(1) == 1)
        config = default("depthwise_bwd_weight", x.dtype, shape)
    taps = min(R * S, _MAX_TAPS)
    num_taps = ceil_div(R * S, taps)
    num_g = ceil_div(G, config.block_c)
    num_tiles = P * ceil_div(N * Q, config.block_nq)
    tiles_per_split = ceil_div(num_tiles * num_g * num_taps, _BWD_WEIGHT_PROGRAMS)
    splits = ceil_div(num_tiles, tiles_per_split)
    partial = torch.empty((splits, R * S, G), dtype=accumulator_dtype(x.dtype), device=x.device)
    launch(
        _depthwise_bwd_weight_kernel,
        num_g * num_taps * splits,
        (view(dy), view(x), partial),
        ((N, H, W, G, P, Q), (num_g, num_taps, num_tiles, tiles_per_split)),
        {
            "CONV": conv_constants(M, (R, S), geometry),
            "ACC": accumulator(x.dtype),
            "TAPS": taps,
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial.sum(0).t().to(x.dtype).reshape(weight_shape).contiguous()
