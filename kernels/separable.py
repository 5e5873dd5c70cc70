"""Depthwise and pointwise convolution in one kernel.

    h[n, g, p, q] = f_mid(bias_dw[g] + sum_rs x[n, g // M, ...] * w_dw[g, r, s])
    y[n, k, p, q] = f(sum_g h[n, g, p, q] * w_pw[k, g] + bias_pw[k] + residual[n, k, p, q])

A program makes `BLOCK_NQ` pixels (see depthwise.py) of each of `ROWS` output rows, x `BLOCK_K`
channels. It makes each [BLOCK_NQ, BLOCK_C] tile of h in registers and feeds it to the matrix unit:
h never reaches memory, and the M tiles that read the same channels of x find them in the L1 cache.
Several rows share the loads and conversions of the input rows between them.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import apply_activation
from sepconv.kernels.configs import ConvShape, GemmConfig, default
from sepconv.kernels.depthwise import depthwise_row
from sepconv.kernels.geometry import Geometry
from sepconv.kernels.launch import (
    accumulator,
    ceil_div,
    check_axes,
    conv_constants,
    dot_dtype,
    dot_options,
    empty_output,
    launch,
    pack_depthwise,
    pack_pointwise,
    view,
)
from sepconv.kernels.tiles import split_nq

# Filter rows whose weights a strip keeps in registers.
_MAX_STRIP_R = 5


@triton.jit
def _mid_strip(
    x_ptrs,  # [BLOCK_NQ, BLOCK_C], the strip's first tap
    w_ptrs,  # [BLOCK_C], the first tap
    place,  # row, and columns [BLOCK_NQ], of the first tap
    masks,  # [BLOCK_NQ] and [BLOCK_C]
    image,  # (H, W)
    x_stride,
    w_stride,
    CONV: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Depthwise sums of `ROWS` output rows: that many [BLOCK_NQ, BLOCK_C]."""
    R: tl.constexpr = CONV.R  # Triton unrolls over what it knows as a constant only
    h, w = place
    mask_nq, mask_c = masks
    H, W = image
    mids = (tl.zeros([BLOCK_NQ, BLOCK_C], ACC),) * ROWS
    # A loop over columns, not an unrolled one: unrolled, every tap goes through shared memory.
    for i in range(CONV.S):
        s = tl.cast(i, tl.int64)
        column = w + s * CONV.DILATION_W
        mask_w = mask_nq & (column >= 0) & (column < W)
        weights = ()
        for r in tl.static_range(R):
            weight = tl.load(w_ptrs + (r * CONV.S + s) * w_stride[0], mask=mask_c, other=0.0)
            # Triton has no starred tuples.
            weights = weights + (weight.to(ACC)[None, :],)  # noqa: RUF005
        for row in tl.static_range((ROWS - 1) * CONV.STRIDE_H + (R - 1) * CONV.DILATION_H + 1):
            mask = (mask_w & (h + row >= 0) & (h + row < H))[:, None] & mask_c[None, :]
            offset = tl.cast(x_stride[2], tl.int64) * row + s * CONV.DILATION_W * x_stride[3]
            x = tl.load(x_ptrs + offset, mask=mask, other=0.0).to(ACC)
            for t in tl.static_range(ROWS):
                for r in tl.static_range(R):
                    if t * CONV.STRIDE_H + r * CONV.DILATION_H == row:
                        mids = mids[:t] + (mids[t] + x * weights[r],) + mids[t + 1 :]  # noqa: RUF005
    return mids


@triton.jit
def _mid_row(
    x_ptrs,
    w_ptrs,
    place,
    masks,
    image,
    x_stride,
    w_stride,
    CONV: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Depthwise sum [BLOCK_NQ, BLOCK_C] of one output row, any filter; arguments as above."""
    h, w = place
    mask_nq, mask_c = masks
    H, W = image
    mid = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    # A loop over rows, not an unrolled one: unrolled, the pipeliner buffers every tap.
    for i in range(CONV.R):
        r = tl.cast(i, tl.int64)
        row = r * CONV.DILATION_H
        mid = depthwise_row(
            mid,
            x_ptrs + row * x_stride[2],
            w_ptrs + r * CONV.S * w_stride[0],
            w,
            mask_nq & (h + row >= 0) & (h + row < H),
            mask_c,
            W,
            x_stride[3],
            w_stride[0],
            CONV,
        )
    return mid


@triton.jit
def _separable_fwd_kernel(
    x,  # [N, C, H, W]
    weight_dw,  # [R*S, M, C]
    weight_pw,  # [K, M, C]
    bias_dw,  # [C*M] or None
    bias_pw,  # [K] or None
    residual,  # [N, K, P, Q] or None
    y,  # [N, K, P, Q]
    sizes,
    grid,
    CONV: tl.constexpr,
    ACTIVATION_MID: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    N, C, H, W, K, P, Q = sizes
    num_k, num_strips, num_tiles = grid  # num_tiles, of h: ceil(C / BLOCK_C) * M
    stride_xn, stride_xc, stride_xh, stride_xw = x.stride
    _, stride_wm, stride_wc = weight_dw.stride
    stride_pwk, stride_pwm, stride_pwc = weight_pw.stride
    stride_yn, stride_yc, stride_yh, stride_yw = y.stride
    pid = tl.program_id(0).to(tl.int64)
    pid_k = pid % num_k
    p = pid // num_k % num_strips * ROWS
    pid_nq = pid // num_k // num_strips

    n, q = split_nq(pid_nq, Q, BLOCK_NQ)
    mask_nq = n < N
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    h = p * CONV.STRIDE_H - CONV.PAD_TOP
    w = q * CONV.STRIDE_W - CONV.PAD_LEFT

    x_pixels = x.ptr + n * stride_xn + h * stride_xh + w * stride_xw
    # ROWS times [BLOCK_NQ, BLOCK_K]
    accs = (tl.zeros([BLOCK_NQ, BLOCK_K], ACC),) * ROWS
    # The M tiles of one block of input channels follow each other, so that x stays cached.
    for i in range(num_tiles):
        m = tl.cast(i, tl.int64) % CONV.M
        offs_c = tl.cast(i, tl.int64) // CONV.M * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C

        # [BLOCK_C, BLOCK_K], asked for early, needed after the depthwise sums.
        w_pw_ptrs = weight_pw.ptr + m * stride_pwm + (offs_c * stride_pwc)[:, None]
        w_pw_ptrs += (offs_k * stride_pwk)[None, :]
        w_pw = tl.load(w_pw_ptrs, mask=mask_c[:, None] & mask_k[None, :], other=0.0).to(DOT.TYPE)

        x_ptrs = x_pixels[:, None] + (offs_c * stride_xc)[None, :]
        w_dw_ptrs = weight_dw.ptr + m * stride_wm + offs_c * stride_wc
        place, masks = (h, w), (mask_nq, mask_c)
        at = (x_ptrs, w_dw_ptrs, place, masks, (H, W), x.stride, weight_dw.stride)
        if ROWS == 1:
            mids = (_mid_row(*at, CONV, ACC, BLOCK_NQ, BLOCK_C),)
        else:
            mids = _mid_strip(*at, CONV, ACC, BLOCK_NQ, BLOCK_C, ROWS)
        shift_dw = tl.zeros([BLOCK_C], ACC)
        if bias_dw is not None:
            bias_dw_ptrs = bias_dw.ptr + (offs_c * CONV.M + m) * bias_dw.stride[0]
            shift_dw = tl.load(bias_dw_ptrs, mask=mask_c, other=0.0).to(ACC)
        for t in tl.static_range(ROWS):
            mid = apply_activation(mids[t] + shift_dw[None, :], ACTIVATION_MID)
            mid = mid.to(x.ptr.dtype.element_ty).to(DOT.TYPE)
            acc = tl.dot(mid, w_pw, accs[t], input_precision=DOT.PRECISION, out_dtype=ACC)
            accs = accs[:t] + (acc,) + accs[t + 1 :]  # noqa: RUF005

    shift_pw = tl.zeros([BLOCK_K], ACC)
    if bias_pw is not None:
        bias_pw_ptrs = bias_pw.ptr + offs_k * bias_pw.stride[0]
        shift_pw = tl.load(bias_pw_ptrs, mask=mask_k, other=0.0).to(ACC)
    for t in tl.static_range(ROWS):
        mask = (mask_nq & (p + t < P))[:, None] & mask_k[None, :]
        acc = accs[t] + shift_pw[None, :]
        if residual is not None:
            stride_rn, stride_rc, stride_rh, stride_rw = residual.stride
            residual_ptrs = residual.ptr + n * stride_rn + (p + t) * stride_rh + q * stride_rw
            residual_ptrs = residual_ptrs[:, None] + (offs_k * stride_rc)[None, :]
            acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
        acc = apply_activation(acc, ACTIVATION).to(y.ptr.dtype.element_ty)
        y_ptrs = y.ptr + n * stride_yn + (p + t) * stride_yh + q * stride_yw
        tl.store(y_ptrs[:, None] + (offs_k * stride_yc)[None, :], acc, mask=mask)


def separable_fwd(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    weight_pw: torch.Tensor,
    bias_dw: torch.Tensor | None,
    bias_pw: torch.Tensor | None,
    geometry: Geometry,
    activation_mid: str | None,
    activation: str | None,
    residual: torch.Tensor | None,
    *,
    allow_tf32: bool,
    channels_last: bool,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Depthwise separable convolution in one kernel.

    Args:
        x: [N, C, H, W], any strides.
        weight_dw: [C*M, 1, R, S].
        weight_pw: [K, C*M, 1, 1], any strides.
        bias_dw: [C*M] or None.
        bias_pw: [K] or None.
        geometry: Stride, padding and dilation.
        activation_mid: Between the two convolutions.
        activation: After the residual.
        residual: [N, K, P, Q], any strides, or None.
        allow_tf32: Whether float32 products may use TF32.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        y [N, K, P, Q].
    """
    N, C, H, W = x.shape
    G, _, R, S = weight_dw.shape
    K = weight_pw.shape[0]
    P, Q = geometry.output_size((H, W), (R, S))
    y = empty_output(x, (N, K, P, Q), channels_last)
    if y.numel() == 0:
        return y
    check_axes(x, y)
    M = G // C if C else 1
    if config is None:
        shape = ConvShape(N, C, H, W, K, P, Q, R, S, M, channels_last)
        config = default("separable_fwd", dot_dtype(x), shape)
    rows = config.rows if R <= _MAX_STRIP_R else 1
    num_k = ceil_div(K, config.block_k)
    num_strips = ceil_div(P, rows)
    outputs = N * P * Q * G
    weights = (pack_depthwise(weight_dw, M, outputs), pack_pointwise(weight_pw, M, outputs))
    launch(
        _separable_fwd_kernel,
        num_k * num_strips * ceil_div(N * Q, config.block_nq),
        (view(x), *weights, view(bias_dw), view(bias_pw), view(residual), view(y)),
        ((N, C, H, W, K, P, Q), (num_k, num_strips, ceil_div(C, config.block_c) * M)),
        {
            "CONV": conv_constants(M, (R, S), geometry),
            "ACTIVATION_MID": activation_mid,
            "ACTIVATION": activation,
            "ACC": accumulator(x.dtype),
            "DOT": dot_options(x, allow_tf32),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
            "BLOCK_K": config.block_k,
            "ROWS": rows,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
