"""Pointwise (1 x 1) convolution: a GEMM over pixels.

    y[n, k, i] = f(sum_c x[n, c, i] * w[k, c] + bias[k] + residual[n, k, i])

The axes (n, h, w) are merged as far as all tensors allow: channels_last tensors become one
[pixels, C] x [C, K] product, contiguous ones N of them. A program makes `BLOCK_NQ` pixels x
`BLOCK_K` channels.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import apply_activation
from sepconv.kernels.configs import ConvShape, GemmConfig, default
from sepconv.kernels.launch import (
    View,
    accumulator,
    ceil_div,
    dot_dtype,
    dot_options,
    empty_output,
    launch,
    merged_views,
    view,
)
from sepconv.kernels.statistics import Partial, collected_by, store_statistics


@triton.jit
def _pointwise_fwd_kernel(
    x,  # [OUTER_0, OUTER_1, INNER, C]
    weight,  # [K, C]
    bias,  # [K] or None
    residual,  # like y, or None
    y,  # [OUTER_0, OUTER_1, INNER, K]
    triples,  # [TILES], or None where no statistics are wanted
    sizes,
    grid,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    OUTER_1, INNER, C, K = sizes
    num_k, num_c, num_tiles = grid
    stride_x0, stride_x1, stride_x2, stride_xc = x.stride
    stride_wk, stride_wc = weight.stride
    stride_y0, stride_y1, stride_y2, stride_yc = y.stride
    pid = tl.program_id(0).to(tl.int64)
    pid_k = pid % num_k
    pid_tile = pid // num_k % num_tiles
    outer = pid // num_k // num_tiles
    outer_0 = outer // OUTER_1
    outer_1 = outer % OUTER_1

    offs_nq = pid_tile * BLOCK_NQ + tl.arange(0, BLOCK_NQ)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    mask_nq = offs_nq < INNER
    mask_k = offs_k < K

    x_pixels = x.ptr + outer_0 * stride_x0 + outer_1 * stride_x1
    x_ptrs = x_pixels + (offs_nq * stride_x2)[:, None] + (offs_c * stride_xc)[None, :]
    w_ptrs = weight.ptr + (offs_c * stride_wc)[:, None] + (offs_k * stride_wk)[None, :]
    acc = tl.zeros([BLOCK_NQ, BLOCK_K], ACC)
    for i in range(num_c):
        first_c = tl.cast(i, tl.int64) * BLOCK_C
        mask_c = first_c + offs_c < C
        value = tl.load(
            x_ptrs + first_c * stride_xc, mask=mask_nq[:, None] & mask_c[None, :], other=0.0
        )
        mix = tl.load(
            w_ptrs + first_c * stride_wc, mask=mask_c[:, None] & mask_k[None, :], other=0.0
        )
        acc = tl.dot(
            value.to(DOT.TYPE), mix.to(DOT.TYPE), acc, input_precision=DOT.PRECISION, out_dtype=ACC
        )

    if bias is not None:
        shift = tl.load(bias.ptr + offs_k * bias.stride[0], mask=mask_k, other=0.0).to(ACC)
        acc += shift[None, :]
    mask = mask_nq[:, None] & mask_k[None, :]
    if residual is not None:
        stride_r0, stride_r1, stride_r2, stride_rc = residual.stride
        residual_pixels = residual.ptr + outer_0 * stride_r0 + outer_1 * stride_r1
        residual_ptrs = residual_pixels + (offs_nq * stride_r2)[:, None]
        residual_ptrs += (offs_k * stride_rc)[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
    acc = apply_activation(acc, ACTIVATION)
    if triples is not None:
        squares = tl.zeros([BLOCK_NQ, BLOCK_K], ACC)
        tile = pid // num_k
        store_statistics(triples, tile, acc, squares, 1, mask_nq, offs_k, mask_k, K)

    y_pixels = y.ptr + outer_0 * stride_y0 + outer_1 * stride_y1
    y_ptrs = y_pixels + (offs_nq * stride_y2)[:, None] + (offs_k * stride_yc)[None, :]
    tl.store(y_ptrs, acc.to(y.ptr.dtype.element_ty), mask=mask)


def pointwise_fwd(
    x: torch.Tensor,
    weight_pw: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    *,
    allow_tf32: bool,
    channels_last: bool,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Pointwise convolution, bias, residual and activation in one kernel.

    Args:
        x: [N, C, H, W], any strides.
        weight_pw: [K, C, 1, 1], any strides.
        bias: [K] or None.
        activation: `None`, `relu`, `relu6`, `silu`, `hardswish` or `gelu`.
        residual: [N, K, H, W], any strides, added before the activation; or None.
        allow_tf32: Whether float32 products may use TF32.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        y [N, K, H, W].
    """
    y = _empty_result(x, weight_pw, channels_last)
    _pointwise(x, weight_pw, bias, activation, residual, y, allow_tf32, channels_last, config)
    return y


def pointwise_fwd_statistics(
    x: torch.Tensor,
    weight_pw: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    allow_tf32: bool,
    channels_last: bool,
    config: GemmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pointwise_fwd` with the mean and the variance of each channel, collected on the way.

    Args:
        x: [N, C, H, W], any strides.
        weight_pw: [K, C, 1, 1], any strides.
        bias: [K] or None.
        allow_tf32: Whether float32 products may use TF32.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        y [N, K, H, W]; its mean and biased variance [K], in the accumulator's type, of what was
        summed, not of what it was rounded to.
    """
    y = _empty_result(x, weight_pw, channels_last)
    options = (allow_tf32, channels_last, config)
    partial = _pointwise(x, weight_pw, bias, None, None, y, *options, statistics=True)
    assert partial is not None
    return y, *partial.combine()


def _empty_result(x: torch.Tensor, weight_pw: torch.Tensor, channels_last: bool) -> torch.Tensor:
    N, _, H, W = x.shape
    return empty_output(x, (N, weight_pw.shape[0], H, W), channels_last)


def _pointwise(
    x: torch.Tensor,
    weight_pw: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    allow_tf32: bool,
    channels_last: bool,
    config: GemmConfig | None,
    statistics: bool = False,
) -> Partial | None:
    """Fill `y`; with the statistics of its tiles, if they are wanted."""
    N, C, H, W = x.shape
    K = weight_pw.shape[0]
    if y.numel() == 0:
        return Partial(y, 0) if statistics else None
    if config is None:
        shape = ConvShape(N, C, H, W, K, H, W, channels_last=channels_last)
        config = default("pointwise_fwd", dot_dtype(x), shape)
    (OUTER_0, OUTER_1, INNER), (view_x, view_y, view_residual) = merged_views(x, y, residual)
    weight = View(weight_pw, weight_pw.stride()[:2])
    num_k = ceil_div(K, config.block_k)
    num_tiles = ceil_div(INNER, config.block_nq)
    tiles = num_tiles * OUTER_0 * OUTER_1
    partial = Partial(y, tiles) if statistics else None
    launch(
        _pointwise_fwd_kernel,
        num_k * tiles,
        (view_x, weight, view(bias), view_residual, view_y, collected_by(partial)),
        ((OUTER_1, INNER, C, K), (num_k, ceil_div(C, config.block_c), num_tiles)),
        {
            "ACTIVATION": activation,
            "ACC": accumulator(x.dtype),
            "DOT": dot_options(x, allow_tf32),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
            "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial
