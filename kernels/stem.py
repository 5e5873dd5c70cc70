"""Standard convolution of few input channels, as at the beginning of a network.

    y[n, k, p, q] = f(bias[k] + sum_crs w[k, c, r, s] *
                      x[n, c, p * STRIDE_H - PAD_TOP + r * DILATION_H,
                              q * STRIDE_W - PAD_LEFT + s * DILATION_W])

A product of [pixels, R*S*C] and [R*S*C, K], of which the first is gathered from the image. In
channels_last the S*C values of a filter row lie side by side. Libraries' convolutions want eight
channels at least: the padding alone costs them more than this takes.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import apply_activation
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
    view,
)
from sepconv.kernels.tiles import split_nq

_BLOCK_T = 32  # products of one pixel and filter that are summed at a time: 3 x 3 of RGB are 27


@triton.jit
def _stem_fwd_kernel(
    x,  # [N, C, H, W]
    weight,  # [K, C, R, S]
    bias,  # [K] or None
    y,  # [N, K, P, Q]
    sizes,
    CONV: tl.constexpr,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N, H, W, K, P, Q, num_k, num_t = sizes
    stride_xn, stride_xc, stride_xh, stride_xw = x.stride
    stride_wk, stride_wc, stride_wr, stride_ws = weight.stride
    stride_yn, stride_yk, stride_yh, stride_yw = y.stride
    pid = tl.program_id(0).to(tl.int64)
    pid_k = pid % num_k
    p = pid // num_k % P
    pid_nq = pid // num_k // P

    n, q = split_nq(pid_nq, Q, BLOCK_NQ)
    mask_nq = n < N
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    h = p * CONV.STRIDE_H - CONV.PAD_TOP
    w = q * CONV.STRIDE_W - CONV.PAD_LEFT

    x_pixels = x.ptr + n * stride_xn + h * stride_xh + w * stride_xw
    acc = tl.zeros([BLOCK_NQ, BLOCK_K], ACC)
    for i in range(num_t):
        t = i * BLOCK_T + tl.arange(0, BLOCK_T)
        r = (t // (CONV.S * C)).to(tl.int64)
        s = (t // C % CONV.S).to(tl.int64)
        c = (t % C).to(tl.int64)
        row, column = r * CONV.DILATION_H, s * CONV.DILATION_W
        mask_t = (r < CONV.R) & (h + row >= 0) & (h + row < H)
        columns = w[:, None] + column[None, :]
        mask = (columns >= 0) & (columns < W) & mask_nq[:, None] & mask_t[None, :]
        taps = row * stride_xh + column * stride_xw + c * stride_xc
        value = tl.load(x_pixels[:, None] + taps[None, :], mask=mask, other=0.0)
        w_ptrs = weight.ptr + (r * stride_wr + s * stride_ws + c * stride_wc)[:, None]
        w_ptrs += (offs_k * stride_wk)[None, :]
        mix = tl.load(w_ptrs, mask=(r < CONV.R)[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(
            value.to(DOT.TYPE), mix.to(DOT.TYPE), acc, input_precision=DOT.PRECISION, out_dtype=ACC
        )

    if bias is not None:
        shift = tl.load(bias.ptr + offs_k * bias.stride[0], mask=mask_k, other=0.0).to(ACC)
        acc += shift[None, :]
    acc = apply_activation(acc, ACTIVATION).to(y.ptr.dtype.element_ty)
    y_ptrs = y.ptr + (n * stride_yn + p * stride_yh + q * stride_yw)[:, None]
    y_ptrs += (offs_k * stride_yk)[None, :]
    tl.store(y_ptrs, acc, mask=mask_nq[:, None] & mask_k[None, :])


def stem_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    activation: str | None,
    *,
    allow_tf32: bool,
    channels_last: bool,
    block_nq: int = 128,
    num_warps: int = 4,
) -> torch.Tensor:
    """Standard convolution, bias and activation in one kernel.

    Args:
        x: [N, C, H, W], any strides; the kernel is compiled for each C.
        weight: [K, C, R, S], any strides.
        bias: [K] or None.
        geometry: Stride, padding and dilation.
        activation: `None`, `relu`, `relu6`, `silu`, `hardswish` or `gelu`.
        allow_tf32: Whether float32 products may use TF32.
        channels_last: Memory format of the result.
        block_nq: Pixels of a program, at least 16.
        num_warps: Of a program.

    Returns:
        y [N, K, P, Q].
    """
    N, C, H, W = x.shape
    K, _, R, S = weight.shape
    P, Q = geometry.output_size((H, W), (R, S))
    y = empty_output(x, (N, K, P, Q), channels_last)
    if y.numel() == 0:
        return y
    check_axes(x, y)
    block_k = min(max(triton.next_power_of_2(K), 16), 64)
    if dot_dtype(x).itemsize == 8:
        block_nq, block_k = min(block_nq, 32), min(block_k, 32)
    num_k = ceil_div(K, block_k)
    launch(
        _stem_fwd_kernel,
        num_k * P * ceil_div(N * Q, block_nq),
        (view(x), view(weight), view(bias), view(y)),
        ((N, H, W, K, P, Q, num_k, ceil_div(R * S * C, _BLOCK_T)),),
        {
            "CONV": conv_constants(1, (R, S), geometry),
            "C": C,
            "ACTIVATION": activation,
            "ACC": accumulator(x.dtype),
            "DOT": dot_options(x, allow_tf32),
            "BLOCK_NQ": block_nq,
            "BLOCK_T": _BLOCK_T,
            "BLOCK_K": block_k,
        },
        num_warps=num_warps,
        num_stages=2,
    )
    return y
