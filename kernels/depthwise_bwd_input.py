"""Gradient of the depthwise convolution's input: a gather over the outputs that read an element.

    dx[n, c, h, w] = sum_m sum_rs dy[n, c * M + m, p, q] * w[c * M + m, r, s]
        over p * STRIDE_H = h + PAD_TOP - r * DILATION_H
        and  q * STRIDE_W = w + PAD_LEFT - s * DILATION_W

The taps r that divide evenly form an arithmetic sequence that depends on h only, and those of s on
w modulo STRIDE_W only. A program therefore makes `BLOCK_NQ` pixels of one row h and one column
phase, and visits just its own taps: at stride 2 this is the split by parity. At stride 1 it is the
forward convolution with rotated weights, and small filters use the rolling kernel. Taps outside dy
are left out, as in ATen, not multiplied by zero.
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
    ceil_div,
    check_axes,
    conv_constants,
    empty_output,
    launch,
    pack_depthwise,
    pack_filters,
    view,
)
from sepconv.kernels.tiles import split_nq


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
    dy,  # [N, C*M, P, Q]
    weight,  # [R*S, M, C]
    dx,  # [N, C, H, W]
    sizes,
    CONV: tl.constexpr,
    GCD: tl.constexpr,  # of stride and dilation, (vertical, horizontal)
    INVERSE: tl.constexpr,  # of DILATION / GCD modulo STRIDE / GCD, (vertical, horizontal)
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N, C, H, W, P, Q, num_c, W_PHASE = sizes  # W_PHASE: columns of one phase, ceil(W / STRIDE_W)
    stride_dyn, stride_dyc, stride_dyh, stride_dyw = dy.stride
    stride_wt, stride_wm, stride_wc = weight.stride
    stride_dxn, stride_dxc, stride_dxh, stride_dxw = dx.stride
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % num_c
    phase = pid // num_c % CONV.STRIDE_W
    h = pid // num_c // CONV.STRIDE_W % H
    pid_nq = pid // num_c // CONV.STRIDE_W // H

    n, column = split_nq(pid_nq, W_PHASE, BLOCK_NQ)
    w = column * CONV.STRIDE_W + phase
    mask_nq = (n < N) & (w < W)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C

    # The first tap that meets this row (column phase), and the place in dy where it does.
    STEP_R: tl.constexpr = CONV.STRIDE_H // GCD[0]
    STEP_S: tl.constexpr = CONV.STRIDE_W // GCD[1]
    TAPS_R: tl.constexpr = (CONV.R + STEP_R - 1) // STEP_R
    reach_h = h + CONV.PAD_TOP
    reach_w = phase + CONV.PAD_LEFT
    first_r = reach_h // GCD[0] * INVERSE[0] % STEP_R
    first_s = reach_w // GCD[1] * INVERSE[1] % STEP_S
    met = (reach_h % GCD[0] == 0) & (reach_w % GCD[1] == 0)
    first_p = (reach_h - first_r * CONV.DILATION_H) // CONV.STRIDE_H
    first_q = (reach_w - first_s * CONV.DILATION_W) // CONV.STRIDE_W + column

    # [BLOCK_NQ, BLOCK_C]
    dy_pixels = dy.ptr + n * stride_dyn + first_q * stride_dyw
    acc = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    for k in tl.range(CONV.M):
        m = tl.cast(k, tl.int64)
        w_ptrs = weight.ptr + m * stride_wm + offs_c * stride_wc
        dy_ptrs = dy_pixels[:, None] + ((offs_c * CONV.M + m) * stride_dyc)[None, :]
        for i in tl.range(TAPS_R, loop_unroll_factor=TAPS_R if TAPS_R <= 5 else 1):
            j = tl.cast(i, tl.int64)
            r = first_r + j * STEP_R
            p = first_p - j * (CONV.DILATION_H // GCD[0])
            acc = _bwd_input_row(
                acc,
                dy_ptrs + p * stride_dyh,
                w_ptrs + (r * CONV.S + first_s) * stride_wt,
                first_s,
                first_q,
                mask_nq & met & (r < CONV.R) & (p >= 0) & (p < P),
                mask_c & (r < CONV.R),
                Q,
                stride_dyw,
                stride_wt,
                CONV.S,
                STEP_S,
                CONV.DILATION_W // GCD[1],
            )

    dx_ptrs = dx.ptr + (n * stride_dxn + h * stride_dxh + w * stride_dxw)[:, None]
    dx_ptrs += (offs_c * stride_dxc)[None, :]
    tl.store(dx_ptrs, acc.to(dx.ptr.dtype.element_ty), mask=mask_nq[:, None] & mask_c[None, :])


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
            pack_filters(weight_dw, dx.numel()),
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
    gcd = tuple(map(math.gcd, stride, dilation))
    steps = zip(stride, dilation, gcd, strict=True)
    inverse = tuple(pow(d // g, -1, t // g) for t, d, g in steps)
    launch(
        _depthwise_bwd_input_kernel,
        num_c * stride[1] * H * ceil_div(N * columns, config.block_nq),
        (view(dy), taps, view(dx)),
        ((N, C, H, W, P, Q, num_c, columns),),
        {
            "CONV": conv_constants(M, (R, S), geometry),
            "GCD": gcd,
            "INVERSE": inverse,
            "ACC": accumulator(dy.dtype),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dx
