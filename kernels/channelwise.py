"""Passes over [N, C, H, W] that know channels: gradients of activations, batch normalisation.

Gradient of an activation, and of the bias in front of it:

    dz[n, c, i] = dy[n, c, i] * f'(z[n, c, i])
    dbias[c] = sum_ni dz[n, c, i]

Batch normalisation with given statistics, and an activation; its gradient, by way of the
statistics too (Ioffe and Szegedy, 2015, section 3), with m elements per channel:

    u = (z - mean[c]) * invstd[c] * weight[c] + bias[c]            y = f(u)
    du = dy * f'(u)    dbias[c] = sum_ni du    dweight[c] = sum_ni du * (z - mean[c]) * invstd[c]
    dz = weight[c] * invstd[c] * (du - dbias[c] / m - (z - mean[c]) * invstd[c] * dweight[c] / m)

A program walks over its share of the pixels for `BLOCK_C` channels, `BLOCK_NQ` at a time, and sums
in registers, which it reduces once at the end. The shares are added afterwards in a fixed order: no
atomics, the same bits every time. Nothing is read twice in one pass, whatever is wanted of it.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import activation_gradient, apply_activation
from sepconv.kernels.configs import ConvShape, DepthwiseConfig, default
from sepconv.kernels.launch import (
    accumulator,
    accumulator_dtype,
    ceil_div,
    collapse,
    empty_output,
    launch,
)

# Shares of the pixels that are summed apart; a constant, so that every device adds in the same
# order.
_PROGRAMS = 2048


@triton.jit
def _tile(tile, OUTER_1, INNER, num_tiles, BLOCK_NQ: tl.constexpr):
    """The two outer indices of a tile, its offsets along the inner axis, and their mask."""
    outer = tile // num_tiles
    offs_nq = tile % num_tiles * BLOCK_NQ + tl.arange(0, BLOCK_NQ)
    return outer // OUTER_1, outer % OUTER_1, offs_nq, offs_nq < INNER


@triton.jit
def _channel(ptr, offs_c, mask_c, stride, absent: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK_C] of a vector of the channels, or `absent` where there is none."""
    value = tl.full(offs_c.shape, absent, ACC)
    if ptr is not None:
        value = tl.load(ptr + offs_c * stride, mask=mask_c, other=absent).to(ACC)
    return value


@triton.jit
def _backward_sums_kernel(
    dy_ptr,  # [OUTER_0, OUTER_1, INNER, C] through strides
    z_ptr,  # like dy; None without an activation
    dz_ptr,  # like dy; None where only sums are wanted
    partial_ptr,  # [SPLITS, 1 or 2, C], contiguous; None where no sums are wanted
    mean_ptr,  # [C]; None without a normalisation
    var_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    OUTER_1,
    INNER,
    C,
    num_c,
    num_tiles,
    all_tiles,
    tiles_per_split,
    stride_dy0,
    stride_dy1,
    stride_dy2,
    stride_dyc,
    stride_z0,
    stride_z1,
    stride_z2,
    stride_zc,
    stride_dz0,
    stride_dz1,
    stride_dz2,
    stride_dzc,
    stride_weight,
    stride_bias,
    ACTIVATION: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % num_c
    split = pid // num_c

    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if mean_ptr is not None:
        mean = _channel(mean_ptr, offs_c, mask_c, 1, 0.0, ACC)
        scale = 1.0 / tl.sqrt(_channel(var_ptr, offs_c, mask_c, 1, 1.0, ACC) + EPS)
        scale *= _channel(weight_ptr, offs_c, mask_c, stride_weight, 1.0, ACC)
        shift = _channel(bias_ptr, offs_c, mask_c, stride_bias, 0.0, ACC)

    # [BLOCK_NQ, BLOCK_C]
    sums = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    moments = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    for i in range(tiles_per_split):
        tile = split * tiles_per_split + tl.cast(i, tl.int64)
        outer_0, outer_1, offs_nq, mask_nq = _tile(tile, OUTER_1, INNER, num_tiles, BLOCK_NQ)
        mask = (mask_nq & (tile < all_tiles))[:, None] & mask_c[None, :]

        dy_ptrs = dy_ptr + outer_0 * stride_dy0 + outer_1 * stride_dy1
        dy_ptrs += (offs_nq * stride_dy2)[:, None] + (offs_c * stride_dyc)[None, :]
        dz = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
        if z_ptr is not None:
            z_ptrs = z_ptr + outer_0 * stride_z0 + outer_1 * stride_z1
            z_ptrs += (offs_nq * stride_z2)[:, None] + (offs_c * stride_zc)[None, :]
            z = tl.load(z_ptrs, mask=mask, other=0.0).to(ACC)
            if mean_ptr is not None:
                z -= mean[None, :]
                dz = activation_gradient(dz, z * scale[None, :] + shift[None, :], ACTIVATION)
                moments += tl.where(mask, dz * z, 0.0)
            else:
                dz = activation_gradient(dz, z, ACTIVATION)
        sums += dz

        if dz_ptr is not None:
            dz_ptrs = dz_ptr + outer_0 * stride_dz0 + outer_1 * stride_dz1
            dz_ptrs += (offs_nq * stride_dz2)[:, None] + (offs_c * stride_dzc)[None, :]
            tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)

    if partial_ptr is not None:
        ROWS: tl.constexpr = 1 if mean_ptr is None else 2
        partial_ptrs = partial_ptr + split * ROWS * C + offs_c
        tl.store(partial_ptrs, tl.sum(sums, axis=0), mask=mask_c)
        if mean_ptr is not None:
            tl.store(partial_ptrs + tl.cast(C, tl.int64), tl.sum(moments, axis=0), mask=mask_c)


@triton.jit
def _normalise_kernel(
    z_ptr,  # [OUTER_0, OUTER_1, INNER, C] through strides
    dy_ptr,  # like z; None for the forward pass
    out_ptr,  # y, or dz; like z
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    sums_ptr,  # [2, C], of du and du * (z - mean); None for the forward pass
    OUTER_1,
    INNER,
    C,
    num_c,
    num_tiles,
    count,  # elements per channel
    stride_z0,
    stride_z1,
    stride_z2,
    stride_zc,
    stride_dy0,
    stride_dy1,
    stride_dy2,
    stride_dyc,
    stride_out0,
    stride_out1,
    stride_out2,
    stride_outc,
    stride_weight,
    stride_bias,
    ACTIVATION: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % num_c
    outer_0, outer_1, offs_nq, mask_nq = _tile(pid // num_c, OUTER_1, INNER, num_tiles, BLOCK_NQ)

    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = mask_nq[:, None] & mask_c[None, :]
    mean = _channel(mean_ptr, offs_c, mask_c, 1, 0.0, ACC)
    variance = _channel(var_ptr, offs_c, mask_c, 1, 1.0, ACC) + EPS
    scale = 1.0 / tl.sqrt(variance)
    scale *= _channel(weight_ptr, offs_c, mask_c, stride_weight, 1.0, ACC)
    shift = _channel(bias_ptr, offs_c, mask_c, stride_bias, 0.0, ACC)

    # [BLOCK_NQ, BLOCK_C]
    z_ptrs = z_ptr + outer_0 * stride_z0 + outer_1 * stride_z1
    z_ptrs += (offs_nq * stride_z2)[:, None] + (offs_c * stride_zc)[None, :]
    z = tl.load(z_ptrs, mask=mask, other=0.0).to(ACC) - mean[None, :]
    u = z * scale[None, :] + shift[None, :]
    if dy_ptr is None:
        out = apply_activation(u, ACTIVATION)
    else:
        dy_ptrs = dy_ptr + outer_0 * stride_dy0 + outer_1 * stride_dy1
        dy_ptrs += (offs_nq * stride_dy2)[:, None] + (offs_c * stride_dyc)[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
        du = activation_gradient(dy, u, ACTIVATION)
        average = _channel(sums_ptr, offs_c, mask_c, 1, 0.0, ACC) / count
        slope = (
            _channel(sums_ptr + tl.cast(C, tl.int64), offs_c, mask_c, 1, 0.0, ACC)
            / count
            / variance
        )
        out = scale[None, :] * (du - average[None, :] - z * slope[None, :])

    out_ptrs = out_ptr + outer_0 * stride_out0 + outer_1 * stride_out1
    out_ptrs += (offs_nq * stride_out2)[:, None] + (offs_c * stride_outc)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


class _Walk:
    """How programs go through tensors of one shape: merged axes, tiles, and the block sizes."""

    def __init__(self, config: DepthwiseConfig | None, *tensors: torch.Tensor) -> None:
        first = tensors[0]
        N, C, H, W = first.shape
        if config is None:
            shape = ConvShape(N, C, H, W, C, H, W, channels_last=first.stride(1) == 1)
            config = default("activation_bwd", first.dtype, shape)
        pixels = [tensor.stride() for tensor in tensors]
        sizes, strides = collapse((N, H, W), *((s[0], s[2], s[3]) for s in pixels))
        self.strides = [[*s, p[1]] for s, p in zip(strides, pixels, strict=True)]
        self.config = config
        self.num_c = ceil_div(C, config.block_c)
        num_tiles = ceil_div(sizes[2], config.block_nq)
        self.all_tiles = num_tiles * sizes[0] * sizes[1]
        self.scalars = (sizes[1], sizes[2], C, self.num_c, num_tiles)
        self.constants = {
            "ACC": accumulator(first.dtype),
            "BLOCK_NQ": config.block_nq,
            "BLOCK_C": config.block_c,
        }
        self.options = {"num_warps": config.num_warps, "num_stages": config.num_stages}


def activation_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    activation: str,
    *,
    bias: bool,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient in front of an activation, and that of the bias there, in one pass.

    Args:
        dy: [N, C, H, W], any strides.
        z: The activation's input, like `dy`; for relu and relu6 its output will do.
        activation: `relu`, `relu6`, `silu`, `hardswish` or `gelu`.
        bias: Whether the bias gradient is wanted.
        channels_last: Memory format of `dz`.
        config: Block sizes; None takes the default.

    Returns:
        dz [N, C, H, W], and dbias [C] or None. Sums are of what `dz` was before it was rounded.
    """
    dz = empty_output(dy, tuple(dy.shape), channels_last)
    if dz.numel() == 0:
        return dz, dy.new_zeros(dy.shape[1]) if bias else None
    sums = _backward_sums(dy, z, dz, None, activation, bias, config)
    return dz, None if sums is None else sums[0].to(dy.dtype)


def channel_sum(dy: torch.Tensor, *, config: DepthwiseConfig | None = None) -> torch.Tensor:
    """Sum of each channel, bitwise reproducible: the gradient of a bias.

    Args:
        dy: [N, C, H, W], any strides.
        config: Block sizes; None takes the default.

    Returns:
        dbias [C].
    """
    if dy.numel() == 0:
        return dy.new_zeros(dy.shape[1])
    sums = _backward_sums(dy, None, None, None, None, True, config)
    assert sums is not None
    return sums[0].to(dy.dtype)


class Normalisation:
    """Batch normalisation with known statistics.

    Attributes:
        vectors: mean and biased variance [C] in the accumulator's type; weight and bias [C], any
            strides, or None.
        eps: Added to the variance.
    """

    def __init__(
        self,
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> None:
        self.vectors = (mean, var, weight, bias)
        self.strides = tuple(0 if t is None else t.stride(0) for t in (weight, bias))
        self.eps = eps


def normalise_fwd(
    z: torch.Tensor,
    norm: Normalisation,
    activation: str | None,
    *,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> torch.Tensor:
    """Batch normalisation and activation in one pass.

    Args:
        z: [N, C, H, W], any strides.
        norm: Statistics and parameters.
        activation: `None`, `relu`, `relu6`, `silu`, `hardswish` or `gelu`.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        y [N, C, H, W].
    """
    y = empty_output(z, tuple(z.shape), channels_last)
    if y.numel():
        _normalise(z, None, y, norm, None, activation, config)
    return y


def normalise_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    norm: Normalisation,
    activation: str | None,
    *,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `normalise_fwd`, the statistics being those of `z`, in two passes.

    Args:
        dy: [N, C, H, W], any strides.
        z: [N, C, H, W], any strides.
        norm: Statistics and parameters.
        activation: As in the forward pass.
        channels_last: Memory format of `dz`.
        config: Block sizes; None takes the default.

    Returns:
        dz [N, C, H, W], and sums [2, C] in the accumulator's type: of du, which is the gradient of
        the bias, and of du * (z - mean), which is that of the weight but for the factor invstd.
    """
    dz = empty_output(z, tuple(z.shape), channels_last)
    if dz.numel() == 0:
        return dz, torch.zeros((2, z.shape[1]), dtype=accumulator_dtype(z.dtype), device=z.device)
    sums = _backward_sums(dy, z, None, norm, activation, True, config)
    _normalise(z, dy, dz, norm, sums, activation, config)
    return dz, sums


def _backward_sums(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    dz: torch.Tensor | None,
    norm: Normalisation | None,
    activation: str | None,
    wants_sums: bool,
    config: DepthwiseConfig | None,
) -> torch.Tensor | None:
    """Launch `_backward_sums_kernel`; the sums [1 or 2, C], if they are wanted."""
    # The order of the tensor that is written decides which pixels lie side by side.
    first = dy if dz is None else dz
    walk = _Walk(config, first, dy, dy if z is None else z)
    partial = None
    per_split = 1
    if wants_sums:
        per_split = ceil_div(walk.all_tiles * walk.num_c, _PROGRAMS)
        shape = (ceil_div(walk.all_tiles, per_split), 1 if norm is None else 2, dy.shape[1])
        partial = torch.empty(shape, dtype=accumulator_dtype(dy.dtype), device=dy.device)
    launch(
        _backward_sums_kernel,
        walk.num_c * ceil_div(walk.all_tiles, per_split),
        (dy, z, dz, partial, *((None,) * 4 if norm is None else norm.vectors)),
        (
            *walk.scalars,
            walk.all_tiles,
            per_split,
            *walk.strides[1],
            *walk.strides[2],
            *walk.strides[0],
            *((0, 0) if norm is None else norm.strides),
        ),
        {"ACTIVATION": activation, "EPS": 0.0 if norm is None else norm.eps, **walk.constants},
        **walk.options,
    )
    return None if partial is None else partial.sum(0)


def _normalise(
    z: torch.Tensor,
    dy: torch.Tensor | None,
    out: torch.Tensor,
    norm: Normalisation,
    sums: torch.Tensor | None,
    activation: str | None,
    config: DepthwiseConfig | None,
) -> None:
    """Launch `_normalise_kernel`."""
    walk = _Walk(config, out, z, z if dy is None else dy)
    launch(
        _normalise_kernel,
        walk.num_c * walk.all_tiles,
        (z, dy, out, *norm.vectors, sums),
        (
            *walk.scalars,
            z.numel() // z.shape[1],
            *walk.strides[1],
            *walk.strides[2],
            *walk.strides[0],
            *norm.strides,
        ),
        {"ACTIVATION": activation, "EPS": norm.eps, **walk.constants},
        **walk.options,
    )
