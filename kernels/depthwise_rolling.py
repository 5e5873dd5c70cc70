"""Depthwise convolution, vertical stride and dilation 1: each input row is read once.

    y[n, g, p, q] = f(bias[g] + sum_rs x[n, g // M, p - PAD_TOP + r,
                                         q * STRIDE_W - PAD_LEFT + s * DILATION_W] * w[g, r, s])

A program walks down a strip of `rows` output rows. An input row gives its products to the R output
rows that need it, whose sums roll through R accumulators: S loads and conversions per output
instead of R * S. Of COLS neighbouring columns made by one thread, the loads are shared too:
(S + COLS - 1) / COLS per output. Instruction issue, not memory, bounds the general kernel in 16
bits.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import apply_activation
from sepconv.kernels.configs import ROLLING_MOST_TAPS, DepthwiseConfig
from sepconv.kernels.geometry import Geometry, Pair
from sepconv.kernels.launch import View, accumulator, ceil_div, conv_constants, launch, view
from sepconv.kernels.statistics import Partial, collected_by, store_statistics
from sepconv.kernels.tiles import split_nq


@triton.jit
def _depthwise_rolling_kernel(
    x,  # [N, C, H, W]
    weight,  # [R*S, G]
    bias,  # [G] or None
    y,  # [N, G, P, Q]
    triples,  # [TILES], or None where no statistics are wanted; of one column only
    sizes,
    CONV: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLS: tl.constexpr,  # output columns of a thread; more than 1 by stride and dilation 1 only
    NUM_STAGES: tl.constexpr,
):
    # groups = ceil(Q / COLS), steps = rows + R - 1
    N, H, W, G, P, Q, groups, num_g, num_strips, rows, steps = sizes
    R: tl.constexpr = CONV.R  # Triton unrolls over what it knows as a constant only
    S: tl.constexpr = CONV.S
    stride_xn, stride_xc, stride_xh, stride_xw = x.stride
    stride_wt, stride_wg = weight.stride
    stride_yn, stride_yc, stride_yh, stride_yw = y.stride
    pid = tl.program_id(0).to(tl.int64)
    pid_g = pid % num_g
    first_p = pid // num_g % num_strips * rows
    pid_nq = pid // num_g // num_strips

    n, group = split_nq(pid_nq, groups, BLOCK_NQ)
    q = group * COLS  # the first of the thread's columns
    mask_nq = n < N
    offs_g = pid_g * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_g = offs_g < G
    w = q * CONV.STRIDE_W - CONV.PAD_LEFT

    # [BLOCK_NQ, BLOCK_C]
    x_ptrs = (
        x.ptr + (n * stride_xn + w * stride_xw)[:, None] + (offs_g // CONV.M * stride_xc)[None, :]
    )
    y_ptrs = y.ptr + (n * stride_yn + q * stride_yw)[:, None] + (offs_g * stride_yc)[None, :]
    shift = tl.zeros([BLOCK_C], ACC)
    if bias is not None:
        shift = tl.load(bias.ptr + offs_g * bias.stride[0], mask=mask_g, other=0.0).to(ACC)
    weights = ()
    for tap in tl.static_range(R * S):
        source = R * S - 1 - tap if INPUT_GRADIENT else tap
        w_ptrs = weight.ptr + offs_g * stride_wg + tl.cast(stride_wt, tl.int64) * source
        tap_weight = tl.load(w_ptrs, mask=mask_g, other=0.0).to(ACC)
        # Triton has no starred tuples.
        weights = weights + (tap_weight[None, :],)  # noqa: RUF005

    means = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    # accs[r * COLS + c] is the sum of column c in the output row that meets this input row with
    # filter row r.
    accs = (tl.zeros([BLOCK_NQ, BLOCK_C], ACC),) * (R * COLS)
    # Loads of the next rows are under way while this one is summed.
    for i in tl.range(steps, num_stages=NUM_STAGES):
        step = tl.cast(i, tl.int64)
        h = first_p + step - CONV.PAD_TOP
        mask_h = mask_nq & (h >= 0) & (h < H)
        for s in tl.static_range(S + COLS - 1):
            column = w + s * CONV.DILATION_W
            mask = (mask_h & (column >= 0) & (column < W))[:, None] & mask_g[None, :]
            tap_ptrs = x_ptrs + (
                h * stride_xh + tl.cast(stride_xw, tl.int64) * (s * CONV.DILATION_W)
            )
            value = tl.load(tap_ptrs, mask=mask, other=0.0).to(ACC)
            for c in tl.static_range(COLS):
                if (s >= c) & (s - c < S):
                    for r in tl.static_range(R):
                        before = accs[r * COLS + c]
                        acc = before + value * weights[r * S + s - c]
                        if INPUT_GRADIENT:
                            acc = tl.where(mask, acc, before)
                        accs = accs[: r * COLS + c] + (acc,) + accs[r * COLS + c + 1 :]  # noqa: RUF005

        # The strip's first R - 1 steps finish rows that belong to the strip above.
        p = first_p + step - (R - 1)
        mask_p = mask_nq & (p >= first_p) & (p < P)
        for c in tl.static_range(COLS):
            out = apply_activation(accs[(R - 1) * COLS + c] + shift[None, :], ACTIVATION)
            if triples is not None:
                # Each lane's mean so far and squared deviations from it (Welford, 1962).
                finished = (p >= first_p) & (p < P)
                share = 1.0 / tl.maximum(p - first_p + 1, 1).to(ACC)
                delta = out - means
                mean = means + delta * share
                squares = tl.where(finished, squares + delta * (out - mean), squares)
                means = tl.where(finished, mean, means)
            out = out.to(y.ptr.dtype.element_ty)
            out_ptrs = y_ptrs + p * stride_yh
            mask_q = mask_p
            if COLS > 1:
                out_ptrs += tl.cast(stride_yw, tl.int64) * c
                mask_q &= q + c < Q
            tl.store(out_ptrs, out, mask=mask_q[:, None] & mask_g[None, :])
        accs = (tl.zeros([BLOCK_NQ, BLOCK_C], ACC),) * COLS + accs[: (R - 1) * COLS]

    if triples is not None:
        tile = pid // num_g
        height = tl.minimum(rows, P - first_p)
        store_statistics(triples, tile, means, squares, height, mask_nq, offs_g, mask_g, G)


def fits_rolling(filter_size: Pair, geometry: Geometry) -> bool:
    """Whether the rolling kernel can run this convolution."""
    R, S = filter_size
    by_1 = geometry.stride[0] == 1 and geometry.dilation[0] == 1
    return by_1 and R > 1 and R * S <= ROLLING_MOST_TAPS


def depthwise_rolling(
    x: torch.Tensor,
    taps: View,
    filter_size: Pair,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    activation: str | None,
    *,
    input_gradient: bool,
    config: DepthwiseConfig,
    statistics: bool = False,
) -> Partial | None:
    """Fill `y` by the rolling kernel.

    Args:
        x: [N, C, H, W], any strides.
        taps: Weights, from `pack_filters`.
        filter_size: (R, S).
        bias: [C*M] or None.
        y: [N, C*M, P, Q], any strides.
        geometry: Of vertical stride and dilation 1. Negative padding crops; the size of `y` says
            what there is at the bottom and at the right.
        activation: `None`, `relu`, `relu6`, `silu`, `hardswish` or `gelu`.
        input_gradient: Rotate the filters by half a turn, and leave padding out instead of
            multiplying it as zero.
        config: Block sizes, with `rows` > 0. Where the horizontal stride or dilation is not 1,
            neighbouring columns share too little: each thread makes one.
        statistics: Whether to collect those of `y`, which are then returned.
    """
    N, C, H, W = x.shape
    R, S = filter_size
    _, G, P, Q = y.shape
    num_g = ceil_div(G, config.block_c)
    if statistics and config.columns > 1:
        # The sums of two columns leave no registers for their means and deviations (sm_90: 255).
        config = config._replace(block_nq=max(config.block_nq // 2, 1), columns=1)
    num_strips = ceil_div(P, config.rows)
    columns = config.columns if geometry.stride[1] == geometry.dilation[1] == 1 else 1
    groups = ceil_div(Q, columns)
    tiles = num_strips * ceil_div(N * groups, config.block_nq)
    partial = Partial(y, tiles) if statistics else None
    launch(
        _depthwise_rolling_kernel,
        num_g * tiles,
        (view(x), taps, view(bias), view(y), collected_by(partial)),
        ((N, H, W, G, P, Q, groups, num_g, num_strips, config.rows, config.rows + R - 1),),
        {
            "CONV": conv_constants(G // C, (R, S), geometry),
            "INPUT_GRADIENT": input_gradient,
            "ACTIVATION": activation,
            "ACC": accumulator(x.dtype),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
            "COLS": columns,
            "NUM_STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial
