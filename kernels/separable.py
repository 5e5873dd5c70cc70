"""Depthwise and pointwise convolution in one kernel.

    h[n, g, p, q] = f_mid(bias_dw[g] + sum_rs x[n, g // M, ...] * w_dw[g, r, s])
    y[n, k, p, q] = f(sum_g h[n, g, p, q] * w_pw[k, g] + bias_pw[k] + residual[n, k, p, q])

A program makes `BLOCK_NQ` pixels of one output row (see depthwise.py) x `BLOCK_K` channels. It
makes each [BLOCK_NQ, BLOCK_C] tile of h in registers and feeds it to the matrix unit: h never
reaches memory, and the M tiles that read the same channels of x find them in the L1 cache.
Weights are packed [R, S, M, C] and [K, M, C].
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import apply_activation
from sepconv.kernels.configs import ConvShape, GemmConfig, default
from sepconv.kernels.depthwise import depthwise_row
from sepconv.kernels.launch import (
    accumulator,
    check_axes,
    dot_options,
    empty_output,
    launch,
    output_size,
    pack_depthwise,
    pack_pointwise,
)
from sepconv.kernels.tiles import split_nq


@triton.jit
def _separable_fwd_kernel(
    x_ptr,  # [N, C, H, W]
    w_dw_ptr,  # [R, S, M, C], contiguous
    w_pw_ptr,  # [K, M, C] through strides
    bias_dw_ptr,  # [C*M] or None
    bias_pw_ptr,  # [K] or None
    residual_ptr,  # [N, K, P, Q] or None
    y_ptr,  # [N, K, P, Q]
    N,
    C,
    H,
    W,
    K,
    P,
    Q,
    G,  # C * M
    num_k,
    num_tiles,  # of h: ceil(C / BLOCK_C) * M
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wm,
    stride_wc,
    stride_bias_dw,
    stride_bias_pw,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    M: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACTIVATION_MID: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_k = pid % num_k
    p = pid // num_k % P
    pid_nq = pid // num_k // P

    n, q = split_nq(pid_nq, Q, BLOCK_NQ)
    mask_nq = n < N
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    h = p * STRIDE_H - PAD_TOP
    w = q * STRIDE_W - PAD_LEFT

    x_pixels = x_ptr + n * stride_xn + w * stride_xw
    acc = tl.zeros([BLOCK_NQ, BLOCK_K], ACC)
    # The M tiles of one block of input channels follow each other, so that x stays cached.
    for i in range(num_tiles):
        m = tl.cast(i, tl.int64) % M
        offs_c = tl.cast(i, tl.int64) // M * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C

        # A loop over rows, not an unrolled one: unrolled, the pipeliner buffers every tap.
        mid = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
        for j in range(R):
            r = tl.cast(j, tl.int64)
            row = h + r * DILATION_H
            mid = depthwise_row(
                mid,
                x_pixels[:, None] + (offs_c * stride_xc)[None, :] + row * stride_xh,
                w_dw_ptr + r * S * G + m * C + offs_c,
                w,
                mask_nq & (row >= 0) & (row < H),
                mask_c,
                W,
                stride_xw,
                G,
                S,
                DILATION_W,
            )
        if bias_dw_ptr is not None:
            bias_dw_ptrs = bias_dw_ptr + (offs_c * M + m) * stride_bias_dw
            bias_dw = tl.load(bias_dw_ptrs, mask=mask_c, other=0.0).to(ACC)
            mid += bias_dw[None, :]
        mid = apply_activation(mid, ACTIVATION_MID).to(x_ptr.dtype.element_ty)

        # [BLOCK_C, BLOCK_K]
        w_ptrs = w_pw_ptr + m * stride_wm + (offs_c * stride_wc)[:, None]
        w_ptrs += (offs_k * stride_wk)[None, :]
        weight = tl.load(w_ptrs, mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(mid.to(DOT), weight.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)

    if bias_pw_ptr is not None:
        bias_pw = tl.load(bias_pw_ptr + offs_k * stride_bias_pw, mask=mask_k, other=0.0).to(ACC)
        acc += bias_pw[None, :]
    mask = mask_nq[:, None] & mask_k[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + (n * stride_rn + p * stride_rh + q * stride_rw)[:, None]
        residual_ptrs += (offs_k * stride_rc)[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
    y = apply_activation(acc, ACTIVATION).to(y_ptr.dtype.element_ty)

    y_ptrs = y_ptr + (n * stride_yn + p * stride_yh + q * stride_yw)[:, None]
    y_ptrs += (offs_k * stride_yc)[None, :]
    tl.store(y_ptrs, y, mask=mask)


def separable_fwd(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    weight_pw: torch.Tensor,
    bias_dw: torch.Tensor | None,
    bias_pw: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
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
        stride: (vertical, horizontal).
        padding: (top, bottom, left, right).
        dilation: (vertical, horizontal).
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
    P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    y = empty_output(x, (N, K, P, Q), channels_last)
    if y.numel() == 0:
        return y
    check_axes(x, y)
    M = G // C if C else 1
    if config is None:
        shape = ConvShape(N, C, H, W, K, P, Q, R, S, M, channels_last)
        config = default("separable_fwd", x.dtype, shape)
    num_k = triton.cdiv(K, config.block_k)
    packed_pw = pack_pointwise(weight_pw, M)
    launch(
        _separable_fwd_kernel,
        num_k * P * triton.cdiv(N * Q, config.block_nq),
        (x, pack_depthwise(weight_dw, M), packed_pw, bias_dw, bias_pw, residual, y),
        (
            *(N, C, H, W, K, P, Q, G, num_k, triton.cdiv(C, config.block_c) * M),
            *x.stride(),
            *packed_pw.stride(),
            0 if bias_dw is None else bias_dw.stride(0),
            0 if bias_pw is None else bias_pw.stride(0),
            *(y if residual is None else residual).stride(),
            *y.stride(),
        ),
        {
            "M": M,
            "R": R,
            "S": S,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_TOP": padding[0],
            "PAD_LEFT": padding[2],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "ACTIVATION_MID": activation_mid,
            "ACTIVATION": activation,
            "ACC": accumulator(x.dtype),
            **dot_options(x, allow_tf32),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
            "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
