"""Depthwise convolution.

    y[n, g, p, q] = f(bias[g] + sum_rs x[n, g // M, p * STRIDE_H - PAD_TOP + r * DILATION_H,
                                         q * STRIDE_W - PAD_LEFT + s * DILATION_W] * w[g, r, s])

A program makes `BLOCK_NQ` pixels of output row p, which may continue in the next image, for
`BLOCK_C` channels. The row is a scalar, so rows outside the image cost no mask arithmetic and small
images fill the tile. Tensors keep their strides; coalesced loads need channels_last. Padding is a
zero that is multiplied, as in ATen: times an infinite weight it is NaN.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import apply_activation
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
    pack_filters,
    pixel_view,
    view,
)
from sepconv.kernels.statistics import Partial, collected_by, store_statistics
from sepconv.kernels.tiles import split_nq

# Pixels of the general kernel's tiles where each leaves two sums per channel: what it writes for
# them is then a sixteenth of what it writes in 16 bits anyway.
_STATISTICS_BLOCK_NQ = 64


@triton.jit
def depthwise_row(
    acc,  # [BLOCK_NQ, BLOCK_C]
    x_ptrs,  # [BLOCK_NQ, BLOCK_C], the first tap of this filter row
    w_ptrs,  # [BLOCK_C], the first tap of this filter row
    column,  # [BLOCK_NQ], of the first tap
    mask_nq,
    mask_c,
    W,
    stride_xw,
    stride_wt,
    CONV: tl.constexpr,
):
    """Add the products of one filter row to `acc`."""
    for i in tl.range(CONV.S, loop_unroll_factor=CONV.S if CONV.S <= 9 else 1):
        s = tl.cast(i, tl.int64)
        w = column + s * CONV.DILATION_W
        mask = (mask_nq & (w >= 0) & (w < W))[:, None] & mask_c[None, :]
        x = tl.load(x_ptrs + s * CONV.DILATION_W * stride_xw, mask=mask, other=0.0).to(acc.dtype)
        weight = tl.load(w_ptrs + s * stride_wt, mask=mask_c, other=0.0).to(acc.dtype)
        acc += x * weight[None, :]
    return acc


@triton.jit
def _depthwise_fwd_kernel(
    x,  # [N, C, H, W]
    weight,  # [R*S, G]
    bias,  # [G] or None
    y,  # [N, G, P, Q]
    triples,  # [TILES], or None where no statistics are wanted
    sizes,
    CONV: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N, H, W, G, P, Q, num_g = sizes
    stride_xh, stride_xw, stride_xn, stride_xc = x.stride
    stride_wt, stride_wg = weight.stride
    stride_yn, stride_yc, stride_yh, stride_yw = y.stride
    pid = tl.program_id(0).to(tl.int64)
    pid_g = pid % num_g
    p = pid // num_g % P
    pid_nq = pid // num_g // P

    n, q = split_nq(pid_nq, Q, BLOCK_NQ)
    mask_nq = n < N
    offs_g = pid_g * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_g = offs_g < G
    h = p * CONV.STRIDE_H - CONV.PAD_TOP
    w = q * CONV.STRIDE_W - CONV.PAD_LEFT

    # [BLOCK_NQ, BLOCK_C]
    x_ptrs = (
        x.ptr + (n * stride_xn + w * stride_xw)[:, None] + (offs_g // CONV.M * stride_xc)[None, :]
    )
    w_ptrs = weight.ptr + offs_g * stride_wg
    acc = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    for i in tl.range(CONV.R, loop_unroll_factor=CONV.R if CONV.R <= 5 else 1):
        r = tl.cast(i, tl.int64)
        row = h + r * CONV.DILATION_H
        acc = depthwise_row(
            acc,
            x_ptrs + row * stride_xh,
            w_ptrs + r * CONV.S * stride_wt,
            w,
            mask_nq & (row >= 0) & (row < H),
            mask_g,
            W,
            stride_xw,
            stride_wt,
            CONV,
        )

    if bias is not None:
        shift = tl.load(bias.ptr + offs_g * bias.stride[0], mask=mask_g, other=0.0).to(ACC)
        acc += shift[None, :]
    acc = apply_activation(acc, ACTIVATION)
    if triples is not None:
        squares = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
        tile = pid // num_g
        store_statistics(triples, tile, acc, squares, 1, mask_nq, offs_g, mask_g, G)

    y_ptrs = y.ptr + (n * stride_yn + p * stride_yh + q * stride_yw)[:, None]
    y_ptrs += (offs_g * stride_yc)[None, :]
    acc = acc.to(y.ptr.dtype.element_ty)
    tl.store(y_ptrs, acc, mask=mask_nq[:, None] & mask_g[None, :])


def depthwise_fwd(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    activation: str | None,
    *,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> torch.Tensor:
    """Depthwise convolution, bias and activation in one kernel.

    Args:
        x: [N, C, H, W], any strides.
        weight_dw: [C*M, 1, R, S].
        bias: [C*M] or None.
        geometry: Stride, padding and dilation.
        activation: `None`, `relu`, `relu6`, `silu`, `hardswish` or `gelu`.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        y [N, C*M, P, Q].
    """
    return _depthwise(x, weight_dw, bias, geometry, activation, channels_last, config, False)[0]


def depthwise_fwd_statistics(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    *,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`depthwise_fwd` with the mean and the variance of each channel, collected on the way.

    Args:
        x: [N, C, H, W], any strides.
        weight_dw: [C*M, 1, R, S].
        bias: [C*M] or None.
        geometry: Stride, padding and dilation.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        y [N, C*M, P, Q]; its mean and biased variance [C*M], in the accumulator's type, of what
        was summed, not of what it was rounded to.
    """
    y, partial = _depthwise(x, weight_dw, bias, geometry, None, channels_last, config, True)
    assert partial is not None
    return y, *partial.combine()


def _depthwise(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    activation: str | None,
    channels_last: bool,
    config: DepthwiseConfig | None,
    statistics: bool,
) -> tuple[torch.Tensor, Partial | None]:
    N, C, H, W = x.shape
    G, _, R, S = weight_dw.shape
    P, Q = geometry.output_size((H, W), (R, S))
    y = empty_output(x, (N, G, P, Q), channels_last)
    if y.numel() == 0:
        return y, Partial(y, 0) if statistics else None
    check_axes(x, y)
    M = G // C
    if config is None:
        shape = ConvShape(N, C, H, W, G, P, Q, R, S, M, channels_last)
        config = default("depthwise_fwd", x.dtype, shape)
        rolls = fits_rolling((R, S), geometry)
        if statistics and not rolls and config.block_nq < _STATISTICS_BLOCK_NQ <= N * Q:
            config = config._replace(block_nq=_STATISTICS_BLOCK_NQ, num_warps=8)
    taps = pack_filters(weight_dw, y.numel())
    if config.rows and fits_rolling((R, S), geometry):
        partial = depthwise_rolling(
            x,
            taps,
            (R, S),
            bias,
            y,
            geometry,
            activation,
            input_gradient=False,
            statistics=statistics,
            config=config,
        )
        return y, partial
    num_g = ceil_div(G, config.block_c)
    tiles = P * ceil_div(N * Q, config.block_nq)
    partial = Partial(y, tiles) if statistics else None
    launch(
        _depthwise_fwd_kernel,
        num_g * tiles,
        (pixel_view(x), taps, view(bias), view(y), collected_by(partial)),
        ((N, H, W, G, P, Q, num_g),),
        {
            "CONV": conv_constants(M, (R, S), geometry),
            "ACTIVATION": activation,
            "ACC": accumulator(x.dtype),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, partial
