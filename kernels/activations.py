"""Activations and their derivatives: `y = f(z)` in an epilogue, `dz = dy * f'(z)` on its own.

Elementwise, so the layout is whatever the tensors have. The helpers compute in the type they are
given (float32 or float64) and treat NaN and the infinities as torch does.
"""

import torch
import triton
import triton.language as tl

from sepconv.kernels.launch import accumulator, ceil_div, collapse, launch

_INV_SQRT_2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def apply_activation(z, ACTIVATION: tl.constexpr):
    """`f(z)` for `ACTIVATION` in None, relu, relu6, silu, hardswish, gelu (erf)."""
    if ACTIVATION is None:
        y = z
    elif ACTIVATION == "relu":
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = _clamp_to_6(z)
    elif ACTIVATION == "silu":
        y = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        y = z * _clamp_to_6(z + 3.0) / 6.0
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        y = 0.5 * z * (1.0 + tl.erf(z * _INV_SQRT_2))
    return y


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """`f'(z)` of the smooth activations, NaN where z is NaN."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        cdf = 0.5 * (1.0 + tl.erf(z * _INV_SQRT_2))
        slope = cdf + z * _INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    return slope


@triton.jit
def _clamp_to_6(z):
    positive = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(positive, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _activation_bwd_kernel(
    dy_ptr,  # any strides
    z_ptr,
    dz_ptr,
    OUTER_1,
    INNER,
    num_tiles,
    stride_dy0,
    stride_dy1,
    stride_dy2,
    stride_z0,
    stride_z1,
    stride_z2,
    stride_dz0,
    stride_dz1,
    stride_dz2,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    outer = pid // num_tiles
    outer_0 = outer // OUTER_1
    outer_1 = outer % OUTER_1

    offs = (pid % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < INNER

    dy_ptrs = dy_ptr + outer_0 * stride_dy0 + outer_1 * stride_dy1 + offs * stride_dy2
    z_ptrs = z_ptr + outer_0 * stride_z0 + outer_1 * stride_z1 + offs * stride_z2
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
    z = tl.load(z_ptrs, mask=mask, other=0.0).to(ACC)

    # Flat pieces select rather than multiply: an infinite dy must not turn into NaN there.
    if ACTIVATION == "relu":
        dz = tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu6":
        dz = tl.where((z > 0.0) & (z < 6.0), dy, 0.0)
    elif ACTIVATION == "hardswish":
        ramp = tl.where(z >= 3.0, dy, dy * (z / 3.0 + 0.5))
        dz = tl.where(z <= -3.0, 0.0, ramp)
    else:
        dz = dy * activation_slope(z, ACTIVATION)

    dz_ptrs = dz_ptr + outer_0 * stride_dz0 + outer_1 * stride_dz1 + offs * stride_dz2
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def activation_bwd(dy: torch.Tensor, z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Gradient before the activation.

    Args:
        dy: Gradient of the activation's output, any shape and strides.
        z: The activation's input, same shape, dtype and device.
        activation: `None`, `relu`, `relu6`, `silu`, `hardswish` or `gelu`.

    Returns:
        `dy * f'(z)` in the memory format of `z`; `dy` itself when there is no activation.
    """
    if activation is None:
        return dy
    dz = torch.empty_like(z)
    if dz.numel() == 0:
        return dz
    sizes, strides = collapse(z.shape, z.stride(), dy.stride(), dz.stride())
    if len(sizes) > 3:
        # Only memory formats that disagree on every axis get here; one copy settles it.
        dy = torch.empty_like(z).copy_(dy)
        sizes, strides = collapse(z.shape, z.stride(), dy.stride(), dz.stride())
    stride_z, stride_dy, stride_dz = strides
    block = 1024
    num_tiles = ceil_div(sizes[2], block)
    launch(
        _activation_bwd_kernel,
        sizes[0] * sizes[1] * num_tiles,
        (dy, z, dz),
        (sizes[1], sizes[2], num_tiles, *stride_dy, *stride_z, *stride_dz),
        {"ACTIVATION": activation, "ACC": accumulator(z.dtype), "BLOCK": block},
        num_warps=4,
        num_stages=1,
    )
    return dz
