"""Batch normalisation with given statistics, and an activation; its gradient.

The gradient takes the way through the statistics too (Ioffe and Szegedy, 2015, section 3), with m
elements per channel:

    u = (z - mean[c]) * invstd[c] * weight[c] + bias[c]            y = f(u)
    du = dy * f'(u)    dbias[c] = sum_ni du    dweight[c] = sum_ni du * (z - mean[c]) * invstd[c]
    dz = weight[c] * invstd[c] * (du - dbias[c] / m - (z - mean[c]) * invstd[c] * dweight[c] / m)

The sums are a pass of their own (activation_bwd.py). A program here makes one tile of y or dz.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.activation_bwd import backward_sums
from sepconv.kernels.activations import activation_gradient, apply_activation
from sepconv.kernels.configs import DepthwiseConfig
from sepconv.kernels.launch import accumulator_dtype, empty_output, launch, view
from sepconv.kernels.walk import Normalisation, Walk, channel_values, tile_of, tile_ptrs


@triton.jit
def _normalise_kernel(
    z,  # [OUTER_0, OUTER_1, INNER, C]
    dy,  # like z; None for the forward pass
    out,  # y, or dz; like z
    norm,
    sums,  # [2, C], of du and du * (z - mean), contiguous; None for the forward pass
    sizes,
    count,  # elements per channel
    ACTIVATION: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    OUTER_1, INNER, C, num_c, num_tiles = sizes
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % num_c
    outer_0, outer_1, offs_nq, mask_nq = tile_of(pid // num_c, OUTER_1, INNER, num_tiles, BLOCK_NQ)

    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = mask_nq[:, None] & mask_c[None, :]
    mean = channel_values(norm.mean, offs_c, mask_c, 0.0, ACC)
    variance = channel_values(norm.var, offs_c, mask_c, 1.0, ACC) + EPS
    scale = 1.0 / tl.sqrt(variance)
    scale *= channel_values(norm.weight, offs_c, mask_c, 1.0, ACC)
    shift = channel_values(norm.bias, offs_c, mask_c, 0.0, ACC)

    # [BLOCK_NQ, BLOCK_C]
    z_ptrs = tile_ptrs(z, outer_0, outer_1, offs_nq, offs_c)
    value = tl.load(z_ptrs, mask=mask, other=0.0).to(ACC) - mean[None, :]
    u = value * scale[None, :] + shift[None, :]
    if dy is None:
        result = apply_activation(u, ACTIVATION)
    else:
        dy_ptrs = tile_ptrs(dy, outer_0, outer_1, offs_nq, offs_c)
        gradient = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
        du = activation_gradient(gradient, u, ACTIVATION)
        sums_ptrs = sums + offs_c
        average = tl.load(sums_ptrs, mask=mask_c, other=0.0).to(ACC) / count
        moments_ptrs = sums_ptrs + tl.cast(C, tl.int64)
        slope = tl.load(moments_ptrs, mask=mask_c, other=0.0).to(ACC) / count / variance
        result = scale[None, :] * (du - average[None, :] - value * slope[None, :])

    out_ptrs = tile_ptrs(out, outer_0, outer_1, offs_nq, offs_c)
    tl.store(out_ptrs, result.to(out.ptr.dtype.element_ty), mask=mask)


def normalisation(
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Normalisation:
    """What the launchers take, from mean and biased variance [C] in the accumulator's type."""
    return Normalisation(view(mean), view(var), view(weight), view(bias))


def normalise_fwd(
    z: torch.Tensor,
    norm: Normalisation,
    eps: float,
    activation: str | None,
    *,
    channels_last: bool,
    config: DepthwiseConfig | None = None,
) -> torch.Tensor:
    """Batch normalisation and activation in one pass.

    Args:
        z: [N, C, H, W], any strides.
        norm: Statistics and parameters.
        eps: Added to the variance.
        activation: `None`, `relu`, `relu6`, `silu`, `hardswish` or `gelu`.
        channels_last: Memory format of the result.
        config: Block sizes; None takes the default.

    Returns:
        y [N, C, H, W].
    """
    y = empty_output(z, tuple(z.shape), channels_last)
    if y.numel():
        _normalise(z, None, y, norm, eps, None, activation, config)
    return y


def normalise_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    norm: Normalisation,
    eps: float,
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
        eps: Added to the variance.
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
    sums = backward_sums(dy, z, None, activation, True, config, norm, eps)
    _normalise(z, dy, dz, norm, eps, sums, activation, config)
    return dz, sums


def _normalise(
    z: torch.Tensor,
    dy: torch.Tensor | None,
    out: torch.Tensor,
    norm: Normalisation,
    eps: float,
    sums: torch.Tensor | None,
    activation: str | None,
    config: DepthwiseConfig | None,
) -> None:
    walk = Walk(config, out, z, dy)
    view_out, view_z, view_dy = walk.views
    launch(
        _normalise_kernel,
        walk.num_c * walk.all_tiles,
        (view_z, view_dy, view_out, norm, sums),
        (walk.sizes, z.numel() // z.shape[1]),
        {"ACTIVATION": activation, "EPS": eps, **walk.constants},
        **walk.options,
    )
