"""Activations in an epilogue: `y = f(z)`.

Computed in the type of `z` (float32 or float64); NaN and the infinities come out as torch has them.
Their gradients are ATen's own fused operators: they move the same bytes a kernel here would.
"""

import triton
import triton.language as tl

_INV_SQRT_2 = tl.constexpr(0.7071067811865476)


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
def _clamp_to_6(z):
    positive = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(positive, 6.0, propagate_nan=tl.PropagateNan.ALL)
