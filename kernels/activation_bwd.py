"""Gradient of an activation, and of the bias before it.

    dz[n, c, i] = dy[n, c, i] * f'(z[n, c, i])
    dbias[c] = sum_ni dz[n, c, i]

Or, of a batch normalisation and the activation after it, the two sums that its gradient needs (see
normalise.py). A program walks over its share of the pixels and sums in registers, which it reduces
once at the end. The shares are added afterwards in a fixed order: no atomics, the same bits every
time. Nothing is read twice in one pass, whatever is wanted of it.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activations import activation_gradient
from sepconv.kernels.configs import DepthwiseConfig
from sepconv.kernels.launch import accumulator_dtype, ceil_div, empty_output, launch
from sepconv.kernels.walk import Normalisation, Walk, channel_values, tile_of, tile_ptrs

# Shares of the pixels that are summed apart; a constant, so that every device adds in the same
# order.
_PROGRAMS = 2048


@triton.jit
def _backward_sums_kernel(
    dy,  # [OUTER_0, OUTER_1, INNER, C]
    z,  # like dy; None without an activation
    dz,  # like dy; None where only sums are wanted
    partial,  # [SPLITS, 1 or 2, C], contiguous; None where no sums are wanted
    norm,  # None without a normalisation
    sizes,
    split_sizes,
    ACTIVATION: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    OUTER_1, INNER, C, num_c, num_tiles = sizes
    all_tiles, tiles_per_split = split_sizes
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % num_c
    split = pid // num_c

    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if norm is not None:
        mean = channel_values(norm.mean, offs_c, mask_c, 0.0, ACC)
        scale = 1.0 / tl.sqrt(channel_values(norm.var, offs_c, mask_c, 1.0, ACC) + EPS)
        scale *= channel_values(norm.weight, offs_c, mask_c, 1.0, ACC)
        shift = channel_values(norm.bias, offs_c, mask_c, 0.0, ACC)

    # [BLOCK_NQ, BLOCK_C]
    sums = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    moments = tl.zeros([BLOCK_NQ, BLOCK_C], ACC)
    for i in range(tiles_per_split):
        tile = split * tiles_per_split + tl.cast(i, tl.int64)
        outer_0, outer_1, offs_nq, mask_nq = tile_of(tile, OUTER_1, INNER, num_tiles, BLOCK_NQ)
        mask = (mask_nq & (tile < all_tiles))[:, None] & mask_c[None, :]

        dy_ptrs = tile_ptrs(dy, outer_0, outer_1, offs_nq, offs_c)
        gradient = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
        if z is not None:
            z_ptrs = tile_ptrs(z, outer_0, outer_1, offs_nq, offs_c)
            value = tl.load(z_ptrs, mask=mask, other=0.0).to(ACC)
            if norm is not None:
                value -= mean[None, :]
                u = value * scale[None, :] + shift[None, :]
                gradient = activation_gradient(gradient, u, ACTIVATION)
                moments += tl.where(mask, gradient * value, 0.0)
            else:
                gradient = activation_gradient(gradient, value, ACTIVATION)
        sums += gradient

        if dz is not None:
            dz_ptrs = tile_ptrs(dz, outer_0, outer_1, offs_nq, offs_c)
            tl.store(dz_ptrs, gradient.to(dz.ptr.dtype.element_ty), mask=mask)

    if partial is not None:
        ROWS: tl.constexpr = 1 if norm is None else 2
        partial_ptrs = partial + split * ROWS * C + offs_c
        tl.store(partial_ptrs, tl.sum(sums, axis=0), mask=mask_c)
        if norm is not None:
            tl.store(partial_ptrs + tl.cast(C, tl.int64), tl.sum(moments, axis=0), mask=mask_c)


def activation_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    activation: str,
    *,
    bias: bool,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient before an activation, and that of the bias there, in one pass.

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
    sums = backward_sums(dy, z, dz, activation, bias, config)
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
    sums = backward_sums(dy, None, None, None, True, config)
    assert sums is not None
    return sums[0].to(dy.dtype)


def backward_sums(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    dz: torch.Tensor | None,
    activation: str | None,
    wants_sums: bool,
    config: DepthwiseConfig | None,
    norm: Normalisation | None = None,
    eps: float = 0.0,
) -> torch.Tensor | None:
    """One pass over `dy`: fill `dz`, if there is one; the sums [1 or 2, C], if they are wanted.

    Args:
        dy: [N, C, H, W], any strides.
        z: What the activation, or the normalisation, was given; None without either.
        dz: Like `dy`, or None.
        activation: As in the forward pass.
        wants_sums: Whether to sum the gradient before the activation and, with `norm`, also that
            times (z - mean).
        config: Block sizes; None takes the default.
        norm: Between `z` and the activation.
        eps: Of the normalisation.
    """
    # The order of the tensor that is written decides which pixels lie side by side.
    if dz is None:
        walk = Walk(config, dy, z)
        (view_dy, view_z), view_dz = walk.views, None
    else:
        walk = Walk(config, dz, dy, z)
        view_dz, view_dy, view_z = walk.views
    partial = None
    per_split = 1
    if wants_sums:
        per_split = ceil_div(walk.all_tiles * walk.num_c, _PROGRAMS)
        shape = (ceil_div(walk.all_tiles, per_split), 1 if norm is None else 2, dy.shape[1])
        partial = torch.empty(shape, dtype=accumulator_dtype(dy.dtype), device=dy.device)
    launch(
        _backward_sums_kernel,
        walk.num_c * ceil_div(walk.all_tiles, per_split),
        (view_dy, view_z, view_dz, partial, norm),
        (walk.sizes, (walk.all_tiles, per_split)),
        {"ACTIVATION": activation, "EPS": eps, **walk.constants},
        **walk.options,
    )
    return None if partial is None else partial.sum(0)
