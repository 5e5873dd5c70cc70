"""Gradients of the depthwise convolution.

Input gradient, a gather over the outputs that read the element:

    dx[n, c, h, w] = sum_m sum_rs dy[n, c * M + m, p, q] * w[c * M + m, r, s]
        over p * STRIDE_H = h + PAD_TOP - r * DILATION_H
        and  q * STRIDE_W = w + PAD_LEFT - s * DILATION_W

The taps r that divide evenly form an arithmetic sequence that depends on h only, and those of s on
w modulo STRIDE_W only. A program therefore makes `BLOCK_NQ` pixels of one row h and one column
phase, and visits just its own taps: at stride 2 this is the split by parity. At stride 1 it is the
forward convolution with rotated weights, and small filters use the rolling kernel. Taps outside dy
are left out, as in ATen, not multiplied by zero.

Weight gradient:

    dw[g, r, s] = sum_npq dy[n, g, p, q] * x[n, g // M, p * STRIDE_H - PAD_TOP + r * DILATION_H,
                                                        q * STRIDE_W - PAD_LEFT + s * DILATION_W]

A program keeps one [BLOCK_NQ, BLOCK_C] register accumulator per tap over its share of the pixels,
and reduces them once at the end. The shares are added afterwards in a fixed order: no atomics, the
same bits every time.
"""

import math

import torch
import triton
import triton.language as tl

from sepconv.kernels.configs import ConvShape, DepthwiseConfig, default
from sepconv.kernels.depthwise_rolling import depthwise_rolling, fits_rolling
from sepconv.kernels.geometry import Geometry
from sepconv.kernels.launch import (
    accumulator,
    accumulator_dtype,
    ceil_div,
    check_axes,
    empty_output,
    geometry_constants,
    launch,
    pack_depthwise,
)
from sepconv.kernels.tiles import split_nq

# Register accumulators of one weight-gradient program; bigger filters take several programs.
_MAX_TAPS = 9
# Enough programs to fill any GPU; a constant, so that every device adds in the same order.
_BWD_WEIGHT_PROGRAMS = 2048


@triton.jit
def _bwd_input_row(
    acc,  # [BLOCK_NQ, BLOCK_C]
    dy_ptrs,  # [BLOCK_NQ, BLOCK_C], first tap of this filter row
    w_ptrs,  # [BLOCK_C], first tap of this filter row
    first_s,
    column,  # [BLOCK_NQ], column of dy at the first tap
    mask_nq,
    mask_c,
    Q,
    stride_dyw,
    stride_wt,
    S: tl.constexpr,
    STEP_S: tl.constexpr,
    SHIFT_Q: tl.constexpr,
):
    """Add the products of one filter row, every `STEP_S`th tap of it, to `acc`."""
    TAPS: tl.constexpr = (S + STEP_S - 1) // STEP_S
    for i in tl.range(TAPS, loop_unroll_factor=TAPS if TAPS <= 9 else 1):
        j = tl.cast(i, tl.int64)
        q = column - j * SHIFT_Q
        mask_s = mask_c & (first_s + j * STEP_S < S)
        mask = (mask_nq & (q >= 0) & (q < Q))[:, None] & mask_s[None, :]
        dy = tl.load(dy_ptrs - j * SHIFT_Q * stride_dyw, mask=mask, other=0.0).to(acc.dtype)
        weight = tl.load(w_ptrs + j * STEP_S * stride_wt, mask=mask_s, other=0.0).to(acc.dtype)
        acc = tl.where(mask, acc + dy * weight[None, :], acc)
    return acc


@triton.jit
def _depthwise_bwd_input_kernel(
    dy_ptr,  # [N, C*M, P, Q]
    w_ptr,  # [R*S, M, C] through strides
    dx_ptr,  # [N, C, H, W]
    N,
    C,
    H,
    W,
    P,
    Q,
    num_c,
    W_PHASE,  # columns of one phase: ceil(W / STRIDE_W)
    stride_dyn,
    stride_dyc,
    stride_dyh,
    stride_dyw,
    stride_wt,
    stride_wm,
    stride_wc,
    stride_dxn,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    M: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GCD_H: tl.constexpr,  # gcd(STRIDE_H, DILATION_H)
    GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr,  # of DILATION_H / GCD_H modulo STRIDE_H / GCD_H
    INVERSE_W: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % num_c
    phase = pid // num_c % STRIDE_W
    h = pid // num_c // STRIDE_W % H
    pid_nq = pid // num_c // STRIDE_W // H

    n, column = split_nq(pid_nq, W_PHASE, BLOCK_NQ)
    w = column * STRIDE_W + phase
    mask_nq = (n < N) & (w < W)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C

    # The first tap that meets this row (column phase), and the place in dy where it does.
    STEP_R: tl.constexpr = STRIDE_H // GCD_H
    STEP_S: tl.constexpr = STRIDE_W // GCD_W
    TAPS_R: tl.constexpr = (R + STEP_R - 1) // STEP_R
    reach_h = h + PAD_TOP
    reach_w = phase + PAD_LEFT
    first_r = reach_h // GCD_H * INVERSE_H % STEP_R
    first_s = reach_w // GCD_W * INVERSE_W % STEP_S
    met = (reach_h % GCD_H == 0) & (reach_w % GCD_W == 0)
    first_p = (reach_h - first_r * DILATION_H) // STRIDE_H
    first_q = (reach_w - first_s * DILATION_W) // STRIDE_W + column

    # [BLOCK_NQ, BLOCK_C]
    dy_pixels = dy_ptr + n * stride_dyn + first_q * stride_dyw
    acc = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    for k in tl.range(M):
        m = tl.cast(k, tl.int64)
        w_ptrs = w_ptr + m * stride_wm + offs_c * stride_wc
        dy_ptrs = dy_pixels[:, None] + ((offs_c * M + m) * stride_dyc)[None, :]
        for i in tl.range(TAPS_R, loop_unroll_factor=TAPS_R if TAPS_R <= 5 else 1):
            j = tl.cast(i, tl.int64)
            r = first_r + j * STEP_R
            p = first_p - j * (DILATION_H // GCD_H)
            acc = _bwd_input_row(
                acc,
                dy_ptrs + p * stride_dyh,
                w_ptrs + (r * S + first_s) * stride_wt,
                first_s,
                first_q,
                mask_nq & met & (r < R) & (p >= 0) & (p < P),
                mask_c & (r < R),
                Q,
                stride_dyw,
                stride_wt,
                S,
                STEP_S,
                DILATION_W // GCD_W,
            )

    dx_ptrs = dx_ptr + (n * stride_dxn + h * stride_dxh + w * stride_dxw)[:, None]
    dx_ptrs += (offs_c * stride_dxc)[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_nq[:, None] & mask_c[None, :])


def depthwise_bwd_input(
    dy: torch.Tensor,
    weight_dw: torch.Tensor,
    x_shape: tuple[int, int, int, int],
    geometry: Geometry,
    *,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> torch.Tensor:
    """Gradient of the depthwise convolution's input.

    Args:
        dy: [N, C*M, P, Q], any strides; before the activation, if there was one.
        weight_dw: [C*M, 1, R, S].
        x_shape: (N, C, H, W).
        geometry: Stride, padding and dilation.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        dx [N, C, H, W].
    """
    N, C, H, W = x_shape
    G, _, R, S = weight_dw.shape
    P, Q = dy.shape[2:]
    dx = empty_output(dy, (N, C, H, W), channels_last)
    if dx.numel() == 0 or dy.numel() == 0:
        return dx.zero_()
    check_axes(dx, dy)
    M = G // C
    if config is None:
        shape = ConvShape(N, C, H, W, G, P, Q, R, S, M, channels_last)
        config = default("depthwise_bwd_input", dy.dtype, shape)
    stride, padding, dilation = geometry
    if config.rows and M == 1 and stride == (1, 1) and fits_rolling((R, S), geometry):
        top, left = R - 1 - padding[0], dilation[1] * (S - 1) - padding[2]
        depthwise_rolling(
            dy,
            pack_depthwise(weight_dw, 1, dx.numel()),
            (R, S),
            None,
            dx,
            geometry._replace(padding=(top, 0, left, 0)),
            None,
            input_gradient=True,
            config=config,
        )
        return dx
    taps = pack_depthwise(weight_dw, M, dx.numel())
    num_c = ceil_div(C, config.block_c)
    columns = ceil_div(W, stride[1])
    gcd_h, gcd_w = (math.gcd(*pair) for pair in zip(stride, dilation, strict=True))
    launch(
        _depthwise_bwd_input_kernel,
        num_c * stride[1] * H * ceil_div(N * columns, config.block_nq),
        (dy, taps.weights, dx),
        (*(N, C, H, W, P, Q, num_c, columns), *dy.stride(), *taps.strides, *dx.stride()),
        {
            "M": M,
            "R": R,
            "S": S,
            **geometry_constants(geometry),
            "GCD_H": gcd_h,
            "GCD_W": gcd_w,
            "INVERSE_H": pow(dilation[0] // gcd_h, -1, stride[0] // gcd_h),
            "INVERSE_W": pow(dilation[1] // gcd_w, -1, stride[1] // gcd_w),
            "ACC": accumulator(dy.dtype),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dx


@triton.jit
def _depthwise_bwd_weight_kernel(
    dy_ptr,  # [N, G, P, Q]
    x_ptr,  # [N, C, H, W]
    partial_ptr,  # [SPLITS, R*S, G], contiguous
    N,
    H,
    W,
    G,
    P,
    Q,
    num_g,
    num_taps,
    num_tiles,
    tiles_per_split,
    stride_dyn,
    stride_dyc,
    stride_dyh,
    stride_dyw,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    M: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACC: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_g = pid % num_g
    first_tap = pid // num_g % num_taps * TAPS
    split = pid // num_g // num_taps

    offs_g = pid_g * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_g = offs_g < G
    dy_channels = dy_ptr + offs_g * stride_dyc
    x_channels = x_ptr + offs_g // M * stride_xc

    # TAPS times [BLOCK_NQ, BLOCK_C]
    accs = (tl.zeros([BLOCK_NQ, BLOCK_C], ACC),) * TAPS
    for i in range(tiles_per_split):
        tile = split * tiles_per_split + tl.cast(i, tl.int64)
        p = tile % P
        n, q = split_nq(tile // P, Q, BLOCK_NQ)
        mask_nq = (n < N) & (tile < num_tiles)

        dy_ptrs = (n * stride_dyn + p * stride_dyh + q * stride_dyw)[:, None] + dy_channels[None, :]
        dy = tl.load(dy_ptrs, mask=mask_nq[:, None] & mask_g[None, :], other=0.0).to(ACC)
        for t in tl.static_range(TAPS):
            h = p * STRIDE_H - PAD_TOP + (first_tap + t) // S * DILATION_H
            w = q * STRIDE_W - PAD_LEFT + (first_tap + t) % S * DILATION_W
            inside = mask_nq & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_ptrs = (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + x_channels[None, :]
            x = tl.load(x_ptrs, mask=inside[:, None] & mask_g[None, :], other=0.0).to(ACC)
            # Triton has no starred tuples.
            accs = accs[:t] + (accs[t] + dy * x,) + accs[t + 1 :]  # noqa: RUF005

    partial_ptrs = partial_ptr + (split * (R * S) + first_tap) * G + offs_g
    for t in tl.static_range(TAPS):
        mask = mask_g & (first_tap + t < R * S)
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
        (dy, x, partial),
        (
            *(N, H, W, G, P, Q, num_g, num_taps, num_tiles, tiles_per_split),
            *dy.stride(),
            *x.stride(),
        ),
        {
            "M": M,
            "R": R,
            "S": S,
            **geometry_constants(geometry),
            "ACC": accumulator(x.dtype),
            "TAPS": taps,
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial.sum(0).t().to(x.dtype).reshape(weight_shape).contiguous()
